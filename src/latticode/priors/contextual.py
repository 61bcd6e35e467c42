"""Contextual RQ-Transformer with draft-and-revise decoding (2206.04452): a bidirectional transformer over positions of
which some are masked, and a causal one over the symbols of each masked position.

B batch, N positions, K codes of a position, S symbols of a position, M positions of the whole batch, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from latticode.core.types import Sampling
from latticode.nn.transformer import Transformer
from latticode.priors.base import IN_ORDER, Chooser, Condition, Prior, check_rates
from latticode.priors.schedules import draw_ratios, masked_counts, random_mask, ranks, ratio_floor, spread_groups
from latticode.priors.symbols import Digits, Sequential, check_soft, check_targets, levels_of, nats, offsets, table_of


class ContextualRQ(Prior):
    """A masked prior for several codes per position (Lee et al. 2022, arXiv 2206.04452).

    A position is known, and its input is the sum of its symbols' embeddings, or it is masked with all its codes.

    Unlike MaskGIT's, the codes of a position are drawn one after another, and a position is never kept for the
    confidence in it: every open position is generated once in the draft, and once more in every revision.

    Args:
        vocab: the number of codes of each of the K code slots.
        grid: positions along each axis.
        classes: 0 = unconditional.
        width, depth, heads, mlp: of the transformer over positions; `mlp` is hidden width over width.
        inner_depth: blocks of the transformer over the symbols of a position.
        dropout: on the embeddings and on each branch.
        label_dropout: probability that training drops the label, for classifier-free guidance.
        min_masked: training masks more than this fraction of the positions; else the fraction is cos(pi / 2 r) with r
            uniform, as MaskGIT's.
        style: "gpt" or "llama", of the blocks (`latticode.nn.transformer.Block`).
        digits, shared, soft_labels: as for `GPT`.

    Examples:
        >>> import torch
        >>> from latticode import Conditioning, Sampling
        >>> prior = ContextualRQ([64] * 4, [4, 4], classes=10, width=32, depth=2, heads=4, shared=True)
        >>> codes, cond = torch.randint(64, (2, 4, 4, 4)), Conditioning(torch.tensor([3, 7]))
        >>> list(prior.loss(codes, cond))  # nats per symbol
        ['cross_entropy']
        >>> prior.sample(2, cond, sampling=Sampling(steps=4, revisions=1), seed=1).shape
        torch.Size([2, 4, 4, 4])
    """

    uses = IN_ORDER | {"steps", "revisions", "revise_steps"}

    def __init__(
        self,
        vocab: Sequence[int],
        grid: Sequence[int],
        classes: int = 0,
        width: int = 256,
        depth: int = 6,
        heads: int = 8,
        mlp: float = 4.0,
        inner_depth: int = 2,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        min_masked: float = 0.0,
        style: str = "gpt",
        digits: Sequence[int] | None = None,
        shared: bool = False,
        soft_labels: float = 0.0,
    ) -> None:
        super().__init__(vocab, grid, classes)
        check_rates(dropout=dropout, label_dropout=label_dropout)
        check_soft(soft_labels, digits)
        self.width, self.depth, self.heads, self.mlp, self.inner_depth = width, depth, heads, mlp, inner_depth
        self.dropout, self.label_dropout, self.min_masked = dropout, label_dropout, min_masked
        self.style, self.shared, self.soft_labels = style, shared, soft_labels
        self.digits = None if digits is None else list(digits)
        self.floor = ratio_floor(min_masked)
        self.symbols = Digits(self.vocab, self.digits)
        sizes = self.symbols.sizes
        levels = levels_of(sizes, shared)

        self.label = nn.Embedding(self.classes + 1, width)  # the last is 'no label'
        rows, self.starts = table_of(sizes, levels)
        self.embedding = nn.Embedding(rows, width)
        self.hidden = nn.Parameter(torch.empty(width))
        self.place = nn.Parameter(torch.empty(self.positions, width))
        self.drop = nn.Dropout(dropout)
        self.transformer = Transformer(width, depth, heads, mlp, dropout, style)
        self.head = Sequential(sizes, width, inner_depth, heads, mlp, dropout, style, levels)
        for weight in (self.label.weight, self.embedding.weight, self.hidden, self.place):
            nn.init.normal_(weight, std=width**-0.5)

    @property
    def offsets(self) -> Tensor:
        """Where the symbols of each slot start in the table of embeddings."""
        return offsets(self.starts, device=self.device)

    def logits(self, symbols_BNS: Tensor, hidden_BN: Tensor, labels_B: Tensor, at_BN: Tensor) -> list[Tensor]:
        """Logits (M, size) of each of the S symbols at the positions `at_BN`, row-major, given the positions that are
        not `hidden_BN` and the former symbols of their own position."""
        context_MD = self.context(symbols_BNS, hidden_BN, labels_B)[at_BN]
        return self.head(context_MD, self.embedding(symbols_BNS[at_BN] + self.offsets))

    def context(self, symbols_BNS: Tensor, hidden_BN: Tensor, labels_B: Tensor) -> Tensor:
        """What the transformer makes of each position (B, N, D); the symbols of masked ones are not looked at."""
        open_BN1 = hidden_BN[..., None]
        known_BND = self.embedding(symbols_BNS.masked_fill(open_BN1, 0) + self.offsets).sum(2)
        label_B1D = self.label(torch.where(labels_B < 0, self.classes, labels_B))[:, None]
        x_BLD = torch.cat([label_B1D, torch.where(open_BN1, self.hidden, known_BND) + self.place], dim=1)
        return self.transformer(self.drop(x_BLD))[:, 1:]

    def noise_shape(self, sampling: Sampling) -> tuple[int, ...]:
        """For each round a draw that cuts the positions into parts, and one for each symbol."""
        if sampling.revisions < 0 or sampling.revise_steps < 1:
            got = f"{sampling.revisions} and {sampling.revise_steps}"
            raise ValueError(f"revisions must be >= 0 and revise_steps >= 1, got {got}")
        return 1 + sampling.revisions, 1 + len(self.symbols.sizes), self.positions

    def _terms(self, codes: Tensor, condition: Condition, soft: Tensor | None = None) -> dict[str, Tensor]:
        """Of the symbols of masked positions."""
        symbols_BNS = self.symbols.split(codes).flatten(1, -2)
        counts = masked_counts(draw_ratios(len(codes), self.floor, codes.device), self.positions)
        hidden = random_mask(counts, self.positions)
        logits = self.logits(symbols_BNS, hidden, condition.drop(self.label_dropout).labels, hidden)
        soft_MSC = None if soft is None else soft.flatten(1, -3)[hidden]
        return {"cross_entropy": nats(logits, symbols_BNS[hidden], soft_MSC).mean()}

    def _soft_terms(self, codes: Tensor, condition: Condition, soft: Tensor) -> dict[str, Tensor]:
        check_targets(soft, codes, self.symbols)
        return self._terms(codes, condition, soft)

    def _nats(self, codes: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Of each group of positions (B, G) given those uncovered before, in M2T's fixed order as MaskGIT's.

        The codes of a position are coded one after another, so what is lost is what the positions of one group share.
        """
        symbols_BNS = self.symbols.split(codes).flatten(1, -2)
        hidden = torch.ones(symbols_BNS.shape[:2], dtype=torch.bool, device=codes.device)
        found: list[Tensor] = []
        for group in spread_groups(self.grid):
            at = torch.zeros_like(hidden)
            at[:, group] = True
            nats_MS = nats(self.logits(symbols_BNS, hidden, condition.labels, at), symbols_BNS[at])
            found.append(nats_MS.view(len(codes), len(group) * nats_MS.shape[1]).sum(1))
            hidden &= ~at
        return {"cross_entropy": torch.stack(found, dim=1)}

    def _draw(self, known: Tensor, condition: Condition, noise: Tensor, choose: Chooser) -> Tensor:
        """Draft-and-revise (2206.04452, section 3.3).

        The open positions are cut at random into `sampling.steps` parts of equal size, and part after part is
        generated. Each of `sampling.revisions` rounds cuts them anew, into `sampling.revise_steps` parts, and generates
        each part again given all other positions. One forward pass for each part, twice as wide under guidance, which
        acts on the revisions alone where there are any, as in the paper: the draft keeps its variety. Known codes are
        kept: a position with an unknown code is open, and of its codes only those before inform a drawn one.
        """
        sampling = choose.sampling
        symbols = self.symbols.split(known).flatten(1, -2)
        kept, hidden = symbols.clone(), (symbols < 0).any(-1)
        open_BN = hidden.clone()
        guided = condition.branches(sampling.guidance).labels
        for turn in range(1 + sampling.revisions):
            part = partition(noise[:, turn, 0], open_BN, sampling.revise_steps if turn else sampling.steps)
            u_BNS = noise[:, turn, 1:].mT
            labels = condition.labels if turn == 0 < sampling.revisions else guided
            for step in range(int(part.max()) + 1 if part.numel() else 0):
                at = part == step
                hidden |= at
                symbols[at] = self._generate(symbols, hidden, labels, at, kept[at], u_BNS[at], choose)
                hidden &= ~at
        return self.symbols.join(symbols).view(known.shape)

    def _generate(
        self,
        symbols_BNS: Tensor,
        hidden_BN: Tensor,
        labels: Tensor,
        at_BN: Tensor,
        kept_MS: Tensor,
        u_MS: Tensor,
        choose: Chooser,
    ) -> Tensor:
        """Symbols (M, S) at the positions `at_BN`: those of `kept_MS` where they are known, others drawn at `u_MS`.
        `labels` are B, or 2 B with those of the unconditional branch behind."""
        copies = len(labels) // len(at_BN)
        context_BND = self.context(symbols_BNS.repeat(copies, 1, 1), hidden_BN.repeat(copies, 1), labels)
        drawn: list[Tensor] = []

        def chosen(slot: int, logits: Tensor) -> Tensor:
            drawn.append(choose(logits, u_MS[:, slot], kept_MS[:, slot]))
            return self.embedding(drawn[-1] + self.starts[slot]).repeat(copies, 1)

        self.head.generate(context_BND[at_BN.repeat(copies, 1)], chosen)
        return torch.stack(drawn, dim=-1)


def partition(u_BN: Tensor, open_BN: Tensor, parts: int) -> Tensor:
    """The part (B, N) of each open position, -1 for the others, in the order of the draws `u_BN`.

    Each row has min(parts, open positions) parts, 0, 1, ..., of sizes that differ by one at the most.
    """
    count_B1 = open_BN.sum(1, keepdim=True)
    place_BN = ranks(u_BN.masked_fill(~open_BN, math.inf))
    return torch.where(open_BN, place_BN * count_B1.clamp(max=parts) // count_B1.clamp(min=1), -1)
