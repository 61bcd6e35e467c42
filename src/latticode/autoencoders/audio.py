"""Strided 1-D convolutions over waveforms, laid out and named as in DAC (Kumar et al. 2023, arXiv 2306.06546)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from latticode.nn.causal import Conv1d, ConvTranspose1d, Snake


class ResidualUnit(nn.Module):
    """(B, C, T) -> (B, C, T): Snake, dilated convolution of 7, Snake, convolution of 1, added to the input.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders.audio import ResidualUnit
        >>> ResidualUnit(8, dilation=3, causal=True)(torch.randn(2, 8, 50)).shape
        torch.Size([2, 8, 50])
    """

    def __init__(self, channels: int, dilation: int, causal: bool):
        super().__init__()
        self.block = nn.Sequential(
            Snake(channels),
            Conv1d(channels, channels, 7, dilation=dilation, causal=causal),
            Snake(channels),
            Conv1d(channels, channels, 1, gain=0.5),  # each unit adds a quarter of the variance
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class _Level(nn.Module):
    """The residual units of one resolution and the change to the next."""

    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.block = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class AudioEncoder(nn.Module):
    """(B, in_channels, T) -> (B, latent, T / stride) with stride the product of `strides`.

    Args:
        in_channels: 1 for mono, 2 for stereo.
        latent: channels of the output.
        width: channels at the full rate; every stride doubles them.
        strides: finest first.
        dilations: of the residual units before each stride.
        causal: an output depends on no sample behind its own `stride` ones, so sound can be coded while it arrives.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import AudioEncoder
        >>> encoder = AudioEncoder(1, latent=16, width=8, strides=(2, 4))
        >>> encoder.stride, encoder(torch.randn(2, 1, 64)).shape
        (8, torch.Size([2, 16, 8]))
    """

    axes = 1

    def __init__(
        self,
        in_channels: int = 1,
        latent: int = 1024,
        width: int = 64,
        strides: Sequence[int] = (2, 4, 8, 8),
        dilations: Sequence[int] = (1, 3, 9),
        causal: bool = False,
    ):
        super().__init__()
        _check(strides, dilations)
        self.in_channels, self.latent, self.width, self.causal = in_channels, latent, width, causal
        self.strides, self.dilations = list(strides), list(dilations)
        self.stride = math.prod(strides)
        parts: list[nn.Module] = [Conv1d(in_channels, width, 7, causal=causal)]
        for stride in strides:
            units = [ResidualUnit(width, dilation, causal) for dilation in dilations]
            down = Conv1d(width, 2 * width, 2 * stride, stride=stride, causal=causal)
            parts.append(_Level(*units, Snake(width), down))
            width *= 2
        self.block = nn.Sequential(*parts, Snake(width), Conv1d(width, latent, 3, causal=causal))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class AudioDecoder(nn.Module):
    """(B, latent, t) -> (B, out_channels, t * stride) in [-1, 1]: the mirror of `AudioEncoder`.

    Arguments as there; `strides` are given finest first too and `width` is that of the full rate. If `causal`, the
    samples of position t depend on the positions up to t only.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import AudioDecoder
        >>> decoder = AudioDecoder(1, latent=16, width=8, strides=(2, 4))
        >>> decoder(torch.randn(2, 16, 8)).shape
        torch.Size([2, 1, 64])
    """

    axes = 1

    def __init__(
        self,
        out_channels: int = 1,
        latent: int = 1024,
        width: int = 96,
        strides: Sequence[int] = (2, 4, 8, 8),
        dilations: Sequence[int] = (1, 3, 9),
        causal: bool = False,
    ):
        super().__init__()
        _check(strides, dilations)
        self.out_channels, self.latent, self.width, self.causal = out_channels, latent, width, causal
        self.strides, self.dilations = list(strides), list(dilations)
        self.stride = math.prod(strides)
        here = width * 2 ** len(strides)
        parts: list[nn.Module] = [Conv1d(latent, here, 7, causal=causal)]
        for stride in reversed(strides):
            units = [ResidualUnit(here // 2, dilation, causal) for dilation in dilations]
            parts.append(_Level(Snake(here), ConvTranspose1d(here, here // 2, stride, causal=causal), *units))
            here //= 2
        last = Conv1d(here, out_channels, 7, causal=causal, gain=0.1)  # quiet, away from where tanh saturates
        self.model = nn.Sequential(*parts, Snake(here), last)

    @property
    def last_layer(self) -> Tensor:
        """The weight that the output comes from: where an adaptive adversarial weight measures gradients."""
        return self.model[-1].weight_v  # type: ignore[union-attr, return-value]

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.model(z))


def _check(strides: Sequence[int], dilations: Sequence[int]) -> None:
    if not strides or min(strides) < 2 or not all(d >= 1 for d in dilations):
        raise ValueError(
            f"strides must be one or more integers >= 2 and dilations >= 1, got {list(strides)}, {list(dilations)}"
        )
