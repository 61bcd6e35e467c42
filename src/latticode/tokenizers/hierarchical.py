"""Tokenizers with codes on grids of several resolutions (VQ-VAE-2, arXiv 1906.00446)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from latticode.core.types import Quantized, Softened
from latticode.quantizers.base import Quantizer
from latticode.tokenizers.tokenizer import Tokenizer


class HierarchicalTokenizer(Tokenizer):
    """Codes on grids of several resolutions, the fine conditioned on the coarse (VQ-VAE-2, arXiv 1906.00446).

    `top` is a tokenizer of the encoder's feature maps, itself hierarchical for three grids or more. The features that
    it decodes stand beside the encoder's where the fine level is quantized and beside its codes where it is decoded, so
    the decoder sees the codes of every level.

    Codes are packed at the positions of the coarsest grid, (B, *coarsest grid, K), so that datasets, statistics and
    priors need not know of levels: first the codes of `top`, then those of the r x r fine positions inside it in
    row-major order, r the stride of `top` and each position's codes side by side. With one code per level,
    K = 1 + r^2; three grids of r = 2 each: 1 + 4 + 16. `levels` unpacks. The losses of `top` are called top_<name>.

    Args:
        encoder, quantizer, decoder, pixels, gain, feedback: of the finest level, as for `Tokenizer`; `lead` must be 0.
        top: its `channels` are the encoder's `latent`; its decoder may have any `out_channels`. It has no `pixels`.

    Examples:
        >>> import torch
        >>> from latticode import FSQ, Tokenizer
        >>> from latticode.autoencoders import ResidualDecoder, ResidualEncoder
        >>> from latticode.tokenizers.hierarchical import HierarchicalTokenizer
        >>> small = dict(latent=16, hidden=8, stride=2)
        >>> top = Tokenizer(ResidualEncoder(16, **small), FSQ([5, 5]), ResidualDecoder(16, **small))
        >>> fine = ResidualEncoder(3, **small), FSQ([4, 4]), ResidualDecoder(3, **small)
        >>> tokenizer = HierarchicalTokenizer(*fine, top).eval()
        >>> codes = tokenizer.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
        >>> codes.shape, tokenizer.vocab
        (torch.Size([2, 4, 4, 5]), (25, 16, 16, 16, 16))
        >>> [tuple(level.shape) for level in tokenizer.levels(codes)]
        [(2, 4, 4, 1), (2, 8, 8, 1)]
    """

    def __init__(
        self,
        encoder: nn.Module,
        quantizer: Quantizer,
        decoder: nn.Module,
        top: Tokenizer,
        pixels: nn.Module | None = None,
        gain: float = 1.0,
        feedback: bool = False,
    ):
        super().__init__(encoder, quantizer, decoder, pixels, gain, feedback)
        if top.channels != encoder.latent or top.axes != self.axes:
            raise ValueError(
                f"top must take the encoder's {encoder.latent} channels on {self.axes} axes, "
                f"got a tokenizer of {top.channels} channels on {top.axes}"
            )
        if any(self.leads + top.leads) or top.pixels is not None:
            raise ValueError("in a hierarchy no level may have a lead, and only the finest pixels")
        self.top = top
        self.strides = tuple(s * r for s, r in zip(self.strides, top.strides, strict=True))
        self._fit(int(top.decoder.out_channels))  # type: ignore[arg-type]

    @property
    def vocab(self) -> tuple[int, ...]:
        """The number of codes of each code slot, the coarsest grid first."""
        return self.top.vocab + self.quantizer.vocab * math.prod(self.top.strides)

    @property
    def radix(self) -> tuple[int, ...] | None:
        """Those of the quantizers if all have the same."""
        return self.quantizer.radix if self.quantizer.radix == self.top.radix else None

    def soften(self, images: Tensor, temperature: float) -> Softened:
        raise ValueError("codes of several grids cannot be drawn: the distributions of each depend on those above")

    def levels(self, codes: Tensor) -> list[Tensor]:
        """`codes` grid by grid, each (B, *its grid, its K), the coarsest first."""
        above = len(self.top.vocab)
        fine = codes[..., above:].unflatten(-1, (*self.top.strides, -1))  # (B, *grid, *r, K)
        n = self.axes
        fine = fine.permute(0, *(i for axis in range(1, n + 1) for i in (axis, axis + n)), -1)
        for axis in range(1, n + 1):
            fine = fine.flatten(axis, axis + 1)
        return [*self.top.levels(codes[..., :above]), fine]

    def pack(self, levels: Sequence[Tensor]) -> Tensor:
        """The inverse of `levels`."""
        fine, n = levels[-1], self.axes
        for axis, r in enumerate(self.top.strides):
            fine = fine.unflatten(1 + 2 * axis, (-1, r))  # (B, h, r, w, r, K)
        fine = fine.permute(0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), -1).flatten(n + 1)
        return torch.cat([self.top.pack(levels[:-1]), fine], -1)

    def _encode(self, x: Tensor) -> Tensor:
        features = self.encoder(x)
        above = self.top._encode(features)
        z = self._latents(torch.cat([features, self.top._decode(above)], 1))
        return self.pack([*self.top.levels(above), self.quantizer.encode(z)])

    def _decode(self, codes: Tensor) -> Tensor:
        *_, fine = self.levels(codes)
        return self._generate(self.quantizer.decode(fine), self.top._decode(codes[..., : len(self.top.vocab)]))

    def _reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        features = self.encoder(x)
        given, above, losses = self.top._reconstruct(features)
        quantized: Quantized = self.quantizer(self._latents(torch.cat([features, given], 1)))
        codes = self.pack([*self.top.levels(above), quantized.codes])
        named = {f"top_{name}": loss for name, loss in losses.items()}
        return self._generate(quantized.latents, given), codes, {**quantized.losses, **named}
