"""Tokenizer = encoder + quantizer + decoder: images to codes and back. The only place that moves channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from latticode.pretrained import Pretrained
from latticode.quantizers.base import Quantizer
from latticode.types import Quantized, Reconstruction


class Tokenizer(Pretrained):
    """Images (B, C, H, W) float in [-1, 1] to codes (B, h, w, K) int64 and back.

    Two 1x1 convolutions, `quant_conv` and `post_quant_conv`, fit the encoder's and decoder's width to the quantizer's.
    A size that the stride does not divide is padded below and at the right by repeating the border, and the decoder's
    output is cropped to `size` again.

    Args:
        encoder: has `in_channels`, `latent` and `stride`.
        quantizer: any of the library.
        decoder: has `out_channels`, `latent` and the same `stride`.
    """

    def __init__(self, encoder: nn.Module, quantizer: Quantizer, decoder: nn.Module):
        super().__init__()
        if encoder.stride != decoder.stride:
            raise ValueError(f"encoder and decoder need one stride, got {encoder.stride} and {decoder.stride}")
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.quant_conv = nn.Conv2d(int(encoder.latent), quantizer.dim, 1)  # type: ignore[arg-type]
        self.post_quant_conv = nn.Conv2d(quantizer.dim, int(decoder.latent), 1)  # type: ignore[arg-type]

    @property
    def stride(self) -> int:
        return int(self.encoder.stride)  # type: ignore[arg-type]

    @property
    def channels(self) -> int:
        return int(self.encoder.in_channels)  # type: ignore[arg-type]

    @property
    def vocab(self) -> tuple[int, ...]:
        return self.quantizer.vocab

    def grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """The code grid (h, w) of an image of `size` pixels (H, W)."""
        return tuple(-(-n // self.stride) for n in size)

    def encode(self, images: Tensor) -> Tensor:
        """Codes (B, h, w, K) of `images` (B, C, H, W). Raises ValueError for another shape or dtype."""
        return self.quantizer.encode(self._latents(images))

    def decode(self, codes: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Images (B, C, h * stride, w * stride) of `codes` (B, h, w, K), cropped to `size` (H, W) if given."""
        images = self._images(self.quantizer.decode(codes))
        return images if size is None else images[..., : size[0], : size[1]]

    def forward(self, images: Tensor) -> Reconstruction:
        quantized: Quantized = self.quantizer(self._latents(images))
        output = self._images(quantized.latents)[..., : images.shape[-2], : images.shape[-1]]
        return Reconstruction(output, quantized.codes, quantized.losses)

    def _latents(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.channels or not images.is_floating_point():
            dtype = str(images.dtype).removeprefix("torch.")
            raise ValueError(f"expected float images (B, {self.channels}, H, W), got {tuple(images.shape)} {dtype}")
        height, width = images.shape[-2:]
        pad = (-width % self.stride, -height % self.stride)
        if any(pad):
            images = F.pad(images, (0, pad[0], 0, pad[1]), mode="replicate")
        return self.quant_conv(self.encoder(images)).movedim(1, -1)  # a view under channels_last

    def _images(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents.movedim(-1, 1)))
