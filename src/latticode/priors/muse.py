"""Muse (2301.00704): MaskGIT over a coarse grid of codes, and another over a fine grid that is conditioned on it.

B batch, N positions of the top grid, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from latticode.core.types import Sampling
from latticode.nn.transformer import Transformer
from latticode.priors.base import IN_ORDER, Chooser, Condition, Prior
from latticode.priors.grids import packed, ratio_of, unpacked
from latticode.priors.masked import Context, projection
from latticode.priors.maskgit import MaskedTransformer


class Muse(Prior):
    """A prior over the packed codes of a `HierarchicalTokenizer` of two grids (Chang et al. 2023, arXiv 2301.00704),
    conditioned on classes, captions, both or nothing.

    The codes (B, h, w, 1 + r r) hold at each position the code of the top grid and those of the r x r positions of the
    bottom grid inside it, row-major. The top is a MaskGIT; the bottom, on the (h r, w r) grid, is one whose blocks
    attend to a transformer's encoding of all top codes, followed by the states of the text (section 2.5).

    Args:
        vocab: [C_top, C_bottom, ..., C_bottom], 1 + r r of them.
        grid: rows and columns of the top grid.
        classes: 0 = unconditional.
        width, depth: of the top.
        bottom_width, bottom_depth: of the bottom.
        encoder_depth: of what the bottom reads the top codes with, in its own width.
        heads, mlp, dropout, label_smoothing, min_masked: of all of them, as for `MaskGIT`.
        label_dropout: probability that training drops label and text, for both grids at once.
        bottom_steps: forward passes of the bottom for each of the top's `sampling.steps`, rounded: it knows the top, so
            it needs fewer (section 2.8: 8 for 24).
        text: what reads captions (`latticode.priors.text`), or None.

    Examples:
        >>> import torch
        >>> from latticode import Sampling
        >>> prior = Muse([64] * 5, [2, 2], width=32, depth=1, bottom_width=32, bottom_depth=1, encoder_depth=1, heads=4)
        >>> list(prior.loss(torch.randint(64, (2, 2, 2, 5))))  # nats per masked position of either grid
        ['top_cross_entropy', 'cross_entropy']
        >>> prior.sample(2, sampling=Sampling(steps=6), seed=1).shape  # 6 passes of the top, 2 of the bottom
        torch.Size([2, 2, 2, 5])
    """

    uses = IN_ORDER | {"steps", "noise", "schedule", "guidance_schedule"}

    def __init__(
        self,
        vocab: Sequence[int],
        grid: Sequence[int],
        classes: int = 0,
        width: int = 256,
        depth: int = 6,
        bottom_width: int = 256,
        bottom_depth: int = 6,
        encoder_depth: int = 2,
        heads: int = 8,
        mlp: float = 4.0,
        dropout: float = 0.1,
        label_smoothing: float = 0.1,
        min_masked: float = 0.45,
        label_dropout: float = 0.1,
        bottom_steps: float = 1 / 3,
        text: nn.Module | None = None,
    ) -> None:
        super().__init__(vocab, grid, classes)
        self.ratio = ratio_of(self.vocab, self.grid, type(self).__name__)  # r
        if not 0 < bottom_steps < math.inf:
            raise ValueError(f"bottom_steps must be > 0, got {bottom_steps}")
        self.width, self.depth = width, depth
        self.bottom_width, self.bottom_depth, self.encoder_depth = bottom_width, bottom_depth, encoder_depth
        self.heads, self.mlp, self.dropout = heads, mlp, dropout
        self.label_smoothing, self.min_masked, self.label_dropout = label_smoothing, min_masked, label_dropout
        self.bottom_steps, self.text = bottom_steps, text

        shared = heads, mlp, dropout, label_smoothing, min_masked, label_dropout
        coarse, fine = self.grid, [axis * self.ratio for axis in self.grid]
        self.top = MaskedTransformer(
            self.vocab[:1], coarse, self.classes, width, depth, *shared, context=text is not None
        )
        self.bottom = MaskedTransformer(
            self.vocab[1:2], fine, self.classes, bottom_width, bottom_depth, *shared, context=True
        )
        self.embedding = nn.Embedding(self.vocab[0], bottom_width)
        self.position = nn.Parameter(torch.empty(self.positions, bottom_width))
        self.input = nn.Sequential(nn.LayerNorm(bottom_width), nn.Dropout(dropout))
        self.encoder = Transformer(bottom_width, encoder_depth, heads, mlp, dropout)
        self.to_top = None if text is None else projection(text, width)
        self.to_bottom = None if text is None else projection(text, bottom_width)
        for weight in (self.embedding.weight, self.position):
            nn.init.normal_(weight, std=bottom_width**-0.5)

    def noise_shape(self, sampling: Sampling) -> tuple[int, ...]:
        return (sum(map(math.prod, self._noise_shapes(sampling))),)

    def _terms(self, codes: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Of the top, and of the bottom given the whole top: each as MaskGIT's."""
        condition = condition.drop(self.label_dropout)
        top, bottom = self._levels(codes)
        on_top, on_bottom = self._read(condition.texts)
        return {
            "top_cross_entropy": self.top.training_loss(top, condition.labels, on_top),
            "cross_entropy": self.bottom.training_loss(bottom, condition.labels, self._below(top, on_bottom)),
        }

    def _nats(self, codes: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Of the top, and of the bottom given the top, each as MaskGIT's."""
        top, bottom = self._levels(codes)
        on_top, on_bottom = self._read(condition.texts)
        return {
            "top_cross_entropy": self.top.group_nats(top, condition.labels, on_top),
            "cross_entropy": self.bottom.group_nats(bottom, condition.labels, self._below(top, on_bottom)),
        }

    def _draw(self, known: Tensor, condition: Condition, noise: Tensor, choose: Chooser) -> Tensor:
        """The top in `sampling.steps` passes, then the bottom in `bottom_steps` of those.

        Both have the same condition and are guided alike. Known codes of the bottom do not inform the top.
        """
        condition = condition.branches(choose.sampling.guidance)
        top, bottom = self._levels(known)
        shapes = self._noise_shapes(choose.sampling)
        parts = torch.split(noise, [math.prod(shape) for shape in shapes], dim=1)
        at_top, at_bottom = (part.view(-1, *shape) for part, shape in zip(parts, shapes, strict=True))
        on_top, on_bottom = self._read(condition.texts)
        top = self.top.fill(top, condition.labels, on_top, at_top, choose)
        below = self._below(top.repeat(len(condition.labels) // max(len(top), 1), 1), on_bottom)
        choose_below = Chooser(self._fewer(choose.sampling), noise.device)
        bottom = self.bottom.fill(bottom, condition.labels, below, at_bottom, choose_below)
        choose_below.check()
        return packed(top.view(-1, *self.top.grid), bottom.view(-1, *self.bottom.grid), self.ratio)

    def _features(self, codes: Tensor, condition: Condition) -> list[Tensor]:
        """Of the top."""
        top, _ = self._levels(codes)
        return self.top.means(top, condition.labels, self._read(condition.texts)[0])

    def _fewer(self, sampling: Sampling) -> Sampling:
        """What the bottom samples by."""
        return replace(sampling, steps=max(1, round(sampling.steps * self.bottom_steps)))

    def _noise_shapes(self, sampling: Sampling) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        return self.top.noise_shape(sampling), self.bottom.noise_shape(self._fewer(sampling))

    def _levels(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Top (B, N) and bottom (B, N r r), row-major."""
        top, bottom = unpacked(codes, self.ratio)
        return top.flatten(1), bottom.flatten(1)

    def _read(self, texts: Sequence[str]) -> tuple[Context | None, Context | None]:
        """What the texts tell the top and the bottom."""
        if self.text is None or self.to_top is None or self.to_bottom is None:
            return None, None
        states, mask = self.text(texts)
        return Context(self.to_top(states), mask), Context(self.to_bottom(states), mask)

    def _below(self, top_BN: Tensor, text: Context | None) -> Context:
        """What the bottom attends to: the top's positions, then the text's."""
        states = self.encoder(self.input(self.embedding(top_BN) + self.position))
        mask = torch.ones_like(top_BN, dtype=torch.bool)
        if text is None:
            return Context(states, mask)
        return Context(torch.cat([states, text.states], dim=1), torch.cat([mask, text.mask], dim=1))
