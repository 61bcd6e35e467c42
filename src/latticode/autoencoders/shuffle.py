"""Exchange of resolution for channels around any encoder and decoder (HQ-VAE, NeurIPS 2022, openreview NYF6jNTAui)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def unshuffle(x: Tensor, factor: int) -> Tensor:
    """(B, C, h f, w f) -> (B, f f C, h, w); the C channels of one of the f f positions stay together.

    The positions are in row-major order: quantizers that split channels into children see one child per position.
    (`torch.nn.functional.pixel_unshuffle` keeps the positions of one channel together instead.)
    """
    x = x.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))  # (B, C, h, f, w, f)
    return x.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)


def shuffle(x: Tensor, factor: int) -> Tensor:
    """(B, f f C, h, w) -> (B, C, h f, w f), the inverse of `unshuffle`."""
    x = x.unflatten(1, (factor, factor, -1))  # (B, f, f, C, h, w)
    return x.permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)


class Unshuffled(nn.Module):
    """`encoder` with its output at 1 / `factor` of the resolution and `factor`^2 times the channels.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import ResidualEncoder, Unshuffled
        >>> encoder = Unshuffled(ResidualEncoder(3, latent=16, hidden=8, stride=4))
        >>> encoder.stride, encoder(torch.randn(2, 3, 16, 16)).shape
        (8, torch.Size([2, 64, 2, 2]))
    """

    def __init__(self, encoder: nn.Module, factor: int = 2):
        super().__init__()
        _check(factor)
        inner: Any = encoder
        self.encoder, self.factor = encoder, factor
        self.in_channels, self.latent, self.stride = inner.in_channels, inner.latent * factor**2, inner.stride * factor

    def forward(self, x: Tensor) -> Tensor:
        return unshuffle(self.encoder(x), self.factor)


class Shuffled(nn.Module):
    """`decoder` for the output of `Unshuffled`.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import ResidualDecoder, Shuffled
        >>> decoder = Shuffled(ResidualDecoder(3, latent=16, hidden=8, stride=4))
        >>> decoder(torch.randn(2, 64, 2, 2)).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(self, decoder: nn.Module, factor: int = 2):
        super().__init__()
        _check(factor)
        inner: Any = decoder
        self.decoder, self.factor = decoder, factor
        self.out_channels, self.latent = inner.out_channels, inner.latent * factor**2
        self.stride = inner.stride * factor

    @property
    def last_layer(self) -> Tensor:
        """The weight that the output comes from: where an adaptive adversarial weight measures gradients."""
        return self.decoder.last_layer  # type: ignore[return-value]

    def forward(self, z: Tensor) -> Tensor:
        return self.decoder(shuffle(z, self.factor))


def _check(factor: int) -> None:
    if factor < 1:
        raise ValueError(f"factor must be >= 1, got {factor}")
