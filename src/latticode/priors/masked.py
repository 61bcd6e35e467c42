"""What masked priors (MaskGIT, Muse, MAGE) share: embedding, head, parallel decoding in a few steps, compression cost.

B batch, N positions, C codes of S digits, M masked positions of the whole batch, D width, T states of a context.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode import kernels
from latticode.core.types import Sampling
from latticode.kernels.entropies import tile_rows
from latticode.nn.transformer import initialise
from latticode.priors.base import (
    IN_ORDER,
    Chooser,
    Condition,
    Prior,
    check_rates,
    draw,
    filtered,
    guided,
    gumbel,
    numbers,
    unfiltered,
)
from latticode.priors.schedules import RAMPS, ranks, remask_counts, spread_groups
from latticode.priors.symbols import Digits, Sequential, nats, offsets, table_of

GROUPS = 12  # of the schedule of `bits`; M2T finds the gain of more groups saturated by about 8


class Context(NamedTuple):
    """What a network attends to beside its own positions.

    Examples:
        >>> context = Context(states=torch.zeros(2, 5, 32), mask=torch.arange(5) < torch.tensor([[3], [5]]))
        >>> context.mask.sum(1)  # tokens of each text
        tensor([3, 5])
    """

    states: Tensor  # (B, T, D)
    mask: Tensor  # (B, T) bool: which of them there are


class Masked(Prior):
    """One shared embedding holds the codes, the classes and MASK, which is also the class token of 'no label'.

    A code may be cut into `digits` (`symbols.Digits`): it is embedded as their sum, and each of them is predicted from
    the same state, or with `inner_depth` > 0 from those before it too, by a small transformer. So 2^18 codes cost two
    softmaxes over 512, as in MAGVIT-v2 (2310.05737, section 3.2).

    A subclass says by `states` what it makes of a partly masked image, and by `training_loss` what it learns from.

    Examples:
        >>> class Bag(Masked):  # sees which codes are known, not where they are
        ...     def states(self, tokens_BN, labels_B, at_BN, context=None):
        ...         x_BLD = self.embedded(tokens_BN, labels_B)
        ...         return x_BLD.mean(1, keepdim=True).expand(-1, at_BN.shape[1], -1)[at_BN]
        ...     def training_loss(self, codes_BN, labels_B, context=None):
        ...         masked = torch.ones_like(codes_BN, dtype=torch.bool)
        ...         tokens = codes_BN.masked_fill(masked, self.mask_token)
        ...         return self.smoothed(self.states(tokens, labels_B, masked), codes_BN[masked])
        >>> rates = {"dropout": 0.0, "label_smoothing": 0.0, "label_dropout": 0.1}
        >>> prior = Bag([64], [4, 4], classes=0, width=16, heads=2, mlp=2.0, **rates)
        >>> prior.sample(2, seed=1).shape
        torch.Size([2, 4, 4, 1])
    """

    uses = IN_ORDER | {"steps", "noise", "schedule", "guidance_schedule"}

    def __init__(
        self,
        vocab: Sequence[int],
        grid: Sequence[int],
        classes: int,
        width: int,
        heads: int,
        mlp: float,
        dropout: float,
        label_smoothing: float,
        label_dropout: float,
        digits: Sequence[int] | None = None,
        inner_depth: int = 0,
    ) -> None:
        super().__init__(vocab, grid, classes)
        if len(self.vocab) != 1:
            name = type(self).__name__
            raise ValueError(f"{name} models one code per position, got {len(self.vocab)} (vocab {self.vocab})")
        check_rates(dropout=dropout, label_smoothing=label_smoothing, label_dropout=label_dropout)
        if inner_depth < 0:
            raise ValueError(f"inner_depth must be >= 0 (0 = digits are independent), got {inner_depth}")
        self.width, self.heads, self.mlp, self.dropout = width, heads, mlp, dropout
        self.label_smoothing, self.label_dropout = label_smoothing, label_dropout
        self.digits, self.inner_depth = None if digits is None else list(digits), inner_depth
        self.symbols = Digits(self.vocab, self.digits)
        self.mask_token = self.vocab[0]  # stands in the place of a code

        sizes, levels = self.symbols.sizes, [1] * len(self.symbols.sizes)
        self.rows, self.starts = table_of(sizes, levels)  # of the digits; then come the classes, then MASK
        self.embedding = nn.Embedding(self.rows + self.classes + 1, width)
        self.position = nn.Parameter(torch.empty(self.positions + 1, width))  # the class token comes first
        self.input = nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout))
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.head.apply(initialise)
        inner = Sequential(sizes, width, inner_depth, heads, mlp, dropout, "gpt", levels) if inner_depth else None
        self.bias = nn.Parameter(torch.zeros(self.rows)) if inner is None else None
        self.inner = inner
        for weight in (self.embedding.weight, self.position):
            nn.init.normal_(weight, std=width**-0.5)  # logits of unit variance at first, at any width

    @property
    def offsets(self) -> Tensor:
        """Where the symbols of each slot start in the table of embeddings."""
        return offsets(self.starts, device=self.device)

    @abstractmethod
    def states(self, tokens_BN: Tensor, labels_B: Tensor, at_BN: Tensor, context: Context | None = None) -> Tensor:
        """What the head reads (M, D) at positions `at_BN` (bool), row-major, given codes with MASK where unknown."""

    @abstractmethod
    def training_loss(self, codes_BN: Tensor, labels_B: Tensor, context: Context | None = None) -> Tensor:
        """The smoothed cross entropy, a scalar per masked position, under masks drawn from torch's generators."""

    def context(self, texts: Sequence[str]) -> Context | None:
        """What the network attends to of captions; None if it reads none."""
        return None

    def noise_shape(self, sampling: Sampling) -> tuple[int, int, int]:
        """No more passes than positions, and of these as many as there may be, because an image's noise must not
        depend on the others of its batch."""
        return min(sampling.steps, self.positions), len(self.symbols.sizes) + 1, self.positions

    def _terms(self, codes: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Per masked position, with label smoothing."""
        condition = condition.drop(self.label_dropout)
        codes_BN, context = codes.flatten(1), self.context(condition.texts)
        return {"cross_entropy": self.training_loss(codes_BN, condition.labels, context)}

    def _nats(self, codes: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Of each group (B, G), a compression cost (FSQ, 5.1): a uniform prior needs ln C per position."""
        codes_BN, context = codes.flatten(1), self.context(condition.texts)
        return {"cross_entropy": self.group_nats(codes_BN, condition.labels, context)}

    def _draw(self, known: Tensor, condition: Condition, noise: Tensor, choose: Chooser) -> Tensor:
        """At most `sampling.steps` forward passes, twice as wide under guidance."""
        condition = condition.branches(choose.sampling.guidance)
        context = self.context(condition.texts)
        return self.fill(known.flatten(1), condition.labels, context, noise, choose).view(known.shape)

    def group_nats(self, codes_BN: Tensor, labels_B: Tensor, context: Context | None = None) -> Tensor:
        """-ln p (B, G) of each group of positions of `codes_BN` given those uncovered before, in M2T's fixed order: at
        most 12 forward passes."""
        tokens_BN = torch.full_like(codes_BN, self.mask_token)
        found: list[Tensor] = []
        for group in spread_groups(self.grid, GROUPS):
            at_BN = torch.zeros_like(tokens_BN, dtype=torch.bool)
            at_BN[:, group] = True
            nats_M = self._nats_at(self.states(tokens_BN, labels_B, at_BN, context), codes_BN[at_BN])
            found.append(nats_M.view(len(codes_BN), len(group)).sum(1))
            tokens_BN = torch.where(at_BN, codes_BN, tokens_BN)
        return torch.stack(found, dim=1)

    def fill(self, codes_BN: Tensor, labels: Tensor, context: Context | None, noise: Tensor, choose: Chooser) -> Tensor:
        """`codes_BN` with a code at each -1: MaskGIT's decoding.

        Each pass draws a token for every unknown position and masks again those of least confidence
        log p + noise (1 - ratio) Gumbel, p before temperature and filters. `labels` and `context` have B rows, or 2 B,
        of which the second half is the unconditional branch; guidance grows with the ratio by its schedule. `noise` is
        (B, *noise_shape) uniform numbers.
        """
        sampling = choose.sampling
        unknown = codes_BN < 0
        tokens = codes_BN.masked_fill(unknown, self.mask_token)
        plans = [remask_counts(n, sampling.steps, sampling.schedule) for n in numbers(unknown.sum(1))]
        for step in range(max(map(len, plans), default=0)):
            left = torch.tensor([plan[step] if step < len(plan) else 0 for plan in plans], device=tokens.device)
            u, ratio = noise[:, step], (step + 1) / sampling.steps
            branches = len(labels) // len(tokens)  # the second is the unconditional one
            y = self.states(tokens.repeat(branches, 1), labels, unknown.repeat(branches, 1), context)
            guidance = sampling.guidance * RAMPS[sampling.guidance_schedule](ratio)
            drawn, log_p = self._drawn(y.view(branches, -1, self.width), u[:, :-1].mT[unknown], sampling, guidance)
            choose.note(log_p)
            tokens = tokens.masked_scatter(unknown, drawn)
            confidence = torch.zeros(tokens.shape, device=tokens.device).masked_scatter(unknown, log_p)
            confidence += sampling.noise * max(0.0, 1 - ratio) * gumbel(u[:, -1])
            unknown = ranks(confidence.masked_fill(~unknown, math.inf)) < left[:, None]
            tokens = tokens.masked_fill(unknown, self.mask_token)
        return tokens

    def _nats_at(self, y_MD: Tensor, codes_M: Tensor) -> Tensor:
        """-ln p (M,) of `codes_M` given states `y_MD`."""
        if (whole := self._whole) is not None:
            return kernels.head_nats(self.head(y_MD), *whole, codes_M)
        tiles = self._tiles(y_MD[None], codes_M)
        return torch.cat(
            [nats(self.predicted(y[0], true), self.symbols.split(true[:, None])).sum(1) for y, true in tiles]
        )

    def _drawn(self, y_GMD: Tensor, u_MS: Tensor, sampling: Sampling, guidance: float) -> tuple[Tensor, Tensor]:
        """Tokens (M,) and the log p of each, from states of G = 1 branch or 2, of which `guidance` leads away from the
        second."""
        if (whole := self._whole) is not None and unfiltered(sampling):
            tokens, log_p = self._inverted(*whole, y_GMD, u_MS[:, 0], sampling.temperature, guidance)
        else:
            found = [self._generated(y, u, sampling, guidance) for y, u in self._tiles(y_GMD, u_MS)]
            symbols, log_p = (torch.cat(parts) for parts in zip(*found, strict=True))
            tokens = self.symbols.join(symbols)[:, 0]
        return tokens, log_p

    def _inverted(
        self, weight_CD: Tensor, bias_C: Tensor, y_GMD: Tensor, u_M: Tensor, temperature: float, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """`_drawn` where no code of the whole ones is left out: what comes behind the head's states is linear, so that
        guidance and temperature of these are those of the logits."""
        h_GMD = self.head(y_GMD)
        h_MD = guided(h_GMD[0], h_GMD[1], guidance) if len(h_GMD) > 1 else h_GMD[0]
        codes, log_p = kernels.head_draw(h_MD / temperature, weight_CD, bias_C / temperature, u_M)
        return codes, log_p if temperature == 1 else -kernels.head_nats(h_MD, weight_CD, bias_C, codes)

    def _generated(self, y_GMD: Tensor, u_MS: Tensor, sampling: Sampling, guidance: float) -> tuple[Tensor, Tensor]:
        """The digits (M, S) of `_drawn`, and the sum of their log p (M,)."""
        digits: list[Tensor] = []
        log_p: list[Tensor] = []

        def choose(slot: int, logits: Tensor) -> Tensor:
            branches = torch.unflatten(logits.float(), 0, y_GMD.shape[:2])
            one = guided(branches[0], branches[1], guidance) if len(branches) > 1 else branches[0]
            digits.append(draw(filtered(one, sampling), u_MS[:, slot]))
            log_p.append(one.gather(-1, digits[-1][:, None])[:, 0] - one.logsumexp(-1))
            return self.embedding(digits[-1] + self.starts[slot]).repeat(len(branches), 1)

        if self.inner is None:
            for slot, logits in enumerate(self.predicted(y_GMD.flatten(0, 1))):
                choose(slot, logits)
        else:
            self.inner.generate(self.head(y_GMD.flatten(0, 1)), choose)
        return torch.stack(digits, dim=-1), torch.stack(log_p).sum(0)

    def embedded(self, tokens_BN: Tensor, labels_B: Tensor) -> Tensor:
        """The class token and the positions (B, 1 + N, D)."""
        masked_BN1 = (tokens_BN == self.mask_token)[..., None]
        symbols_BNS = self.symbols.split(tokens_BN[..., None].masked_fill(masked_BN1, 0)) + self.offsets
        classes_B = torch.where(labels_B < 0, self.classes, labels_B) + self.rows
        x_BND = self.embedding(symbols_BNS).sum(2)
        x_BND = torch.where(masked_BN1, self.embedding.weight[-1], x_BND)
        return self.input(torch.cat([self.embedding(classes_B)[:, None], x_BND], dim=1) + self.position)

    def predicted(self, y_MD: Tensor, codes_M: Tensor | None = None) -> list[Tensor]:
        """Logits (M, size) of each of the S digits, that of whole codes (M, C); of those in turn given `codes_M`.

        Only of the positions that are asked for: with tens of thousands of codes they cost more than the blocks, and
        `bits` and the later passes of `sample` ask for few.
        """
        h_MD = self.head(y_MD)
        if self.inner is None:
            logits = F.linear(h_MD, self.embedding.weight[: self.rows], self.bias)
            return list(torch.split(logits, self.symbols.sizes, dim=-1))
        assert codes_M is not None
        return self.inner(h_MD, self.embedding(self.symbols.split(codes_M[:, None]) + self.offsets))

    def smoothed(self, y_MD: Tensor, codes_M: Tensor) -> Tensor:
        """The cross entropy of `codes_M` at positions of states `y_MD`, with label smoothing of each digit: nats per
        position, a scalar."""
        if (whole := self._whole) is not None:
            return kernels.head_cross_entropy(self.head(y_MD), *whole, codes_M, self.label_smoothing)
        symbols_MS = self.symbols.split(codes_M[:, None])
        return nats(self.predicted(y_MD, codes_M), symbols_MS, smoothing=self.label_smoothing).sum(1).mean()

    @property
    def _whole(self) -> tuple[Tensor, Tensor] | None:
        """Weights (C, D) and biases (C,) of the linear head, if one softmax is over whole codes."""
        if self.bias is None or len(self.symbols.sizes) > 1:
            return None
        return self.embedding.weight[: self.rows], self.bias

    def _tiles(self, y_GMD: Tensor, of_M: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """States (G, m, D) of a few positions at a time, and what `of_M` holds of these.

        Logits of all positions of a batch would fill memory, which costs more than to compute them.
        """
        size = tile_rows(y_GMD, y_GMD.shape[0] * self.rows)
        return zip(torch.split(y_GMD, size, dim=1), torch.split(of_M, size), strict=True)


def projection(text: nn.Module, onto: int) -> nn.Module:
    """What brings the states of `text` to a width: linear if it differs from theirs."""
    width = int(text.width)  # type: ignore[arg-type]
    if width == onto:
        return nn.Identity()
    linear = nn.Linear(width, onto)
    initialise(linear)
    return linear
