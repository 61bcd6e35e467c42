"""Muse (2301.00704): MaskGIT over a coarse grid of codes, and another over a fine grid that is told the coarse one.

B batch, N positions of the top grid, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from latticode.core.types import Conditioning, Sampling
from latticode.nn.transformer import Transformer
from latticode.priors.base import DEFAULT, IN_ORDER, Prior, check_sampling, uniforms
from latticode.priors.grids import packed, ratio_of, unpacked
from latticode.priors.masked import Context, Told, projection
from latticode.priors.maskgit import MaskedTransformer


class Muse(Prior):
    """A prior over the packed codes of a `HierarchicalTokenizer` of two grids, told classes, captions, both or nothing.

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
        label_dropout: probability that training hides label and text, from both grids at once.
        bottom_steps: forward passes of the bottom for each of the top's `sampling.steps`, rounded: it knows the top, so
            it needs fewer (section 2.8: 8 for 24).
        text: what reads captions (`latticode.priors.text`), or None.
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

    def loss(self, codes: Tensor, cond: Conditioning | None = None) -> dict[str, Tensor]:
        """`top_cross_entropy` and, of the bottom given the whole top, `cross_entropy`: each as MaskGIT's."""
        self.check_codes(codes)
        labels, texts = self._told(cond, len(codes)).hidden(self.label_dropout)
        top, bottom = self._levels(codes)
        on_top, on_bottom = self._read(texts)
        return {
            "top_cross_entropy": self.top.nats(top, labels, on_top),
            "cross_entropy": self.bottom.nats(bottom, labels, self._below(top, on_bottom)),
        }

    def bits(self, codes: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Compression cost (B,): of the top, and of the bottom given the top, each as MaskGIT's."""
        self.check_codes(codes)
        labels, texts = self._told(cond, len(codes))
        top, bottom = self._levels(codes)
        with self.inference():
            on_top, on_bottom = self._read(texts)
            below = self._below(top, on_bottom)
            return self.top.cost(top, labels, on_top) + self.bottom.cost(bottom, labels, below)

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
        """Codes (count, h, w, 1 + r r): the top in `sampling.steps` passes, then the bottom in `bottom_steps` of those.

        Both are told the same and guided alike. Known codes of the bottom do not inform the top.
        """
        check_sampling(sampling)
        labels, texts = self._told(cond, count).branches(sampling)
        top, bottom = self._levels(self.known_codes(count, known))
        fewer = replace(sampling, steps=max(1, round(sampling.steps * self.bottom_steps)))
        shapes = self.top.noise_shape(sampling), self.bottom.noise_shape(fewer)
        sizes = [math.prod(shape) for shape in shapes]
        noise = uniforms((sum(sizes),), seed, first, count).split(sizes, dim=1)
        at_top, at_bottom = (part.view(-1, *shape) for part, shape in zip(noise, shapes, strict=True))
        with self.inference():
            on_top, on_bottom = self._read(texts)
            top = self.top.fill(top, labels, on_top, sampling, at_top)
            below = self._below(top.repeat(len(labels) // max(count, 1), 1), on_bottom)
            bottom = self.bottom.fill(bottom, labels, below, fewer, at_bottom)
        return packed(top.view(-1, *self.top.grid), bottom.view(-1, *self.bottom.grid), self.ratio)

    def features(self, codes: Tensor, cond: Conditioning | None = None) -> list[Tensor]:
        """Of the top: means over its positions (B, D), of the embedding and after each block."""
        self.check_codes(codes)
        labels, texts = self._told(cond, len(codes))
        top, _ = self._levels(codes)
        return self.top.means(top, labels, self._read(texts)[0])

    def _told(self, cond: Conditioning | None, count: int) -> Told:
        return Told(self.labels_of(cond, count), self.texts_of(cond, count))

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
