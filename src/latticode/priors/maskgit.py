"""MaskGIT (2202.04200): a bidirectional transformer over partly masked codes, sampled in a few parallel steps.

B batch, N positions, C codes, M masked positions of the whole batch, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.nn.transformer import Transformer, initialise
from latticode.priors.base import DEFAULT, Prior, check_sampling, draw, filtered, guided, gumbel, uniforms
from latticode.priors.schedules import (
    draw_ratios,
    masked_counts,
    random_mask,
    ranks,
    ratio_floor,
    remask_counts,
    spread_groups,
)
from latticode.types import Conditioning, Sampling

GROUPS = 12  # of the schedule of `bits`; M2T finds the gain of more groups saturated by about 8


class MaskGIT(Prior):
    """One shared embedding holds C codes, the classes and MASK, which is also the class token of 'no label'.

    Args:
        vocab: [C]; other quantizers than those with one code per position need another prior.
        grid: positions along each axis.
        classes: 0 = unconditional.
        width, depth, heads, mlp: of the transformer; `mlp` is hidden width over width.
        dropout: on the embeddings and on each branch.
        label_smoothing: of the cross entropy.
        min_masked: training masks more than this fraction of the positions; FSQ (A.4.2) traced unstable training to
            batches with hardly a masked position and uses 0.45.
        label_dropout: probability that training hides the label, for guidance.
    """

    def __init__(
        self,
        vocab: Sequence[int],
        grid: Sequence[int],
        classes: int = 0,
        width: int = 256,
        depth: int = 6,
        heads: int = 8,
        mlp: float = 4.0,
        dropout: float = 0.1,
        label_smoothing: float = 0.1,
        min_masked: float = 0.45,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__(vocab, grid, classes)
        if len(self.vocab) != 1:
            raise ValueError(f"MaskGIT models one code per position, got {len(self.vocab)} (vocab {self.vocab})")
        rates = {"dropout": dropout, "label_smoothing": label_smoothing, "label_dropout": label_dropout}
        for name, value in rates.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        self.width, self.depth, self.heads, self.mlp = width, depth, heads, mlp
        self.dropout, self.label_smoothing, self.label_dropout = dropout, label_smoothing, label_dropout
        self.min_masked = min_masked
        self.floor = ratio_floor(min_masked)
        self.code_count = self.vocab[0]  # C; the label y is token C + y
        self.mask_token = self.code_count + self.classes

        self.embedding = nn.Embedding(self.mask_token + 1, width)
        self.position = nn.Parameter(torch.empty(self.positions + 1, width))  # the class token comes first
        self.input = nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout))
        self.transformer = Transformer(width, depth, heads, mlp, dropout)
        self.head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(self.code_count))
        self.head.apply(initialise)
        for weight in (self.embedding.weight, self.position):
            nn.init.normal_(weight, std=width**-0.5)  # logits of unit variance at first, at any width

    def logits(self, tokens_BN: Tensor, labels_B: Tensor, at_BN: Tensor) -> Tensor:
        """Logits (M, C) at the positions `at_BN` (bool), row-major, given codes with MASK where unknown.

        The head works on those alone: with tens of thousands of codes it costs more than the blocks, and `bits` and the
        later passes of `sample` ask for few.
        """
        classes_B = torch.where(labels_B < 0, self.mask_token, labels_B + self.code_count)
        x_BLD = self.embedding(torch.cat([classes_B[:, None], tokens_BN], dim=1)) + self.position
        x_BLD = self.transformer(self.input(x_BLD))
        return F.linear(self.head(x_BLD[:, 1:][at_BN]), self.embedding.weight[: self.code_count], self.bias)

    def loss(self, codes: Tensor, cond: Conditioning | None = None) -> dict[str, Tensor]:
        """`cross_entropy`: nats per masked position, with label smoothing, of `codes` (B, *grid, 1)."""
        self.check_codes(codes)
        labels = self.labels_of(cond, len(codes))
        codes_BN = codes.flatten(1)
        counts = masked_counts(draw_ratios(len(codes), self.floor, codes.device), self.positions)
        masked = random_mask(counts, self.positions)
        hidden = torch.rand(len(codes), device=codes.device) < self.label_dropout
        logits = self.logits(codes_BN.masked_fill(masked, self.mask_token), labels.masked_fill(hidden, -1), masked)
        smoothing = self.label_smoothing
        return {"cross_entropy": F.cross_entropy(logits.float(), codes_BN[masked], label_smoothing=smoothing)}

    def sample(
        self,
        count: int,
        cond: Conditioning | None = None,
        *,
        sampling: Sampling = DEFAULT,
        seed: int = 0,
        first: int = 0,
        known: Tensor | None = None,
    ) -> Tensor:
        """Codes (count, *grid, 1), after at most `sampling.steps` forward passes, twice as wide under guidance.

        Each pass draws a token for every unknown position and masks again those of least confidence
        log p + noise (1 - ratio) Gumbel, p before temperature and filters. Guidance has no effect without a label.
        """
        check_sampling(sampling)
        labels = self.labels_of(cond, count)
        tokens = self.known_codes(count, known).flatten(1)
        unknown = tokens < 0
        tokens = tokens.masked_fill(unknown, self.mask_token)
        plans = [remask_counts(n, sampling.steps, sampling.schedule) for n in unknown.sum(1).tolist()]
        passes = max(map(len, plans), default=0)
        most = min(sampling.steps, self.positions)  # not `passes`: a row's noise must not depend on the other rows
        noise = uniforms((most, 2, self.positions), seed, first, count)
        with self.inference():
            for step in range(passes):
                left = torch.tensor([plan[step] if step < len(plan) else 0 for plan in plans], device=self.device)
                u = noise[:, step].to(self.device)
                tokens, confidence = self._fill(tokens, unknown, labels, u[:, 0], sampling)
                confidence += sampling.noise * max(0.0, 1 - (step + 1) / sampling.steps) * gumbel(u[:, 1])
                unknown = ranks(confidence.masked_fill(~unknown, math.inf)) < left[:, None]
                tokens = tokens.masked_fill(unknown, self.mask_token)
        return tokens.view(count, *self.grid, 1)

    def bits(self, codes: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Compression cost (B,): -log2 p of each group given those uncovered before, in M2T's fixed order (FSQ, 5.1).

        A uniform prior needs log2 C per position. At most 12 forward passes.
        """
        self.check_codes(codes)
        labels = self.labels_of(cond, len(codes))
        codes_BN = codes.flatten(1)
        tokens = torch.full_like(codes_BN, self.mask_token)
        total = torch.zeros(len(codes), device=codes.device)
        with self.inference():
            for group in spread_groups(self.grid, GROUPS):
                at = torch.zeros_like(tokens, dtype=torch.bool)
                at[:, group] = True
                nats = F.cross_entropy(self.logits(tokens, labels, at).float(), codes_BN[at], reduction="none")
                total += nats.view(len(codes), len(group)).sum(1) / math.log(2)
                tokens = torch.where(at, codes_BN, tokens)
        return total

    def _fill(
        self, tokens: Tensor, unknown: Tensor, labels: Tensor, u: Tensor, sampling: Sampling
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, N) with a draw at each unknown position, and the draws' log p (B, N), 0 at known ones."""
        if sampling.guidance and bool((labels >= 0).any()):
            both = torch.cat([labels, torch.full_like(labels, -1)])
            conditional, unconditional = self.logits(tokens.repeat(2, 1), both, unknown.repeat(2, 1)).float().chunk(2)
            logits = guided(conditional, unconditional, sampling.guidance)
        else:
            logits = self.logits(tokens, labels, unknown).float()
        total = logits.logsumexp(-1)
        if not bool(total.isfinite().all()):
            raise FloatingPointError("the prior's logits are not finite: broken weights, or a dtype too narrow")
        drawn = draw(filtered(logits, sampling), u[unknown])
        log_p = logits.gather(-1, drawn[:, None])[:, 0] - total
        confidence = torch.zeros(tokens.shape, device=tokens.device)
        return tokens.masked_scatter(unknown, drawn), confidence.masked_scatter(unknown, log_p)
