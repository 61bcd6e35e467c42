"""Discriminators of audio: waveforms (B, C, T) to logits, high for recordings and low for reconstructions.

`PeriodDiscriminator` (HiFi-GAN) and `STFTDiscriminator` (DAC) each see one period or one window. Several of them in a
`MultiDiscriminator` are what the papers call the multi-period and the multi-resolution discriminator.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

SLOPE = 0.1  # of every leaky ReLU
BANDS = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # borders, as shares of the spectrum


class MultiDiscriminator(nn.Module):
    """Several discriminators as one: (B, N) with N the most logits that one of them gives a recording.

    Where one gives fewer, its logits are repeated, so that in a mean over all logits every discriminator counts the
    same. Raises ValueError for an empty list.

    Examples:
        >>> periods = [PeriodDiscriminator(period=p, width=2) for p in (2, 3, 5)]  # HiFi-GAN's multi-period one
        >>> logits = MultiDiscriminator(periods)(torch.zeros(2, 1, 600))
        >>> len(logits), logits.ndim
        (2, 2)
    """

    def __init__(self, discriminators: Sequence[nn.Module]):
        super().__init__()
        if not discriminators:
            raise ValueError("discriminators must be one or more, got none")
        self.discriminators = nn.ModuleList(discriminators)

    def forward(self, waveforms: Tensor) -> Tensor:
        logits = [discriminator(waveforms).flatten(1) for discriminator in self.discriminators]
        most = max(x.shape[1] for x in logits)
        return torch.cat([F.interpolate(x[:, None], most)[:, 0] for x in logits], 1)


class PeriodDiscriminator(nn.Module):
    """Logits (B, 1, n, period) of samples that lie whole periods apart (HiFi-GAN, Kong et al. 2020, arXiv 2010.05646,
    2.3): the waveform as rows of `period` samples, convolved along the columns.

    Args:
        channels: of the waveforms.
        period: in samples; several discriminators with prime periods share few samples. Published: 2, 3, 5, 7 and 11.
        width: channels of the first layer; the others have 4, 16, 32 and 32 times as many.

    Raises ValueError for settings below 1; calling it, for waveforms of other channels or shorter than a period.

    Examples:
        >>> PeriodDiscriminator(period=5, width=2)(torch.zeros(2, 1, 600)).shape
        torch.Size([2, 1, 2, 5])
    """

    def __init__(self, channels: int = 1, period: int = 2, width: int = 32):
        super().__init__()
        _check(channels=channels, period=period, width=width)
        self.channels, self.period, self.width = channels, period, width
        widths = [channels, *(width * m for m in (1, 4, 16, 32))]
        parts = [_conv(a, b, (5, 1), (3, 1)) for a, b in pairwise(widths)]
        self.main = nn.Sequential(*parts, _conv(widths[-1], widths[-1], (5, 1)), _last(widths[-1], (3, 1)))

    def forward(self, waveforms: Tensor) -> Tensor:
        _check_waveforms(waveforms, self.channels, self.period)
        missing = -waveforms.shape[-1] % self.period
        return self.main(F.pad(waveforms, (0, missing), mode="reflect").unflatten(-1, (-1, self.period)))


class STFTDiscriminator(nn.Module):
    """Logits (B, 1, frames, n) of the complex spectrogram, each of its BANDS seen by layers of its own.

    DAC's multi-band STFT discriminator at one resolution (Kumar et al. 2023, arXiv 2306.06546, section 3.4).

    Args:
        channels: of the waveforms; real and imaginary parts make two of each.
        window: of the Hann window in samples; the hop is a quarter. Published at 44.1 kHz: 512, 1024 and 2048.
        width: channels of every layer.

    Raises ValueError for settings that are out of range; calling it, for waveforms of other channels.

    Examples:
        >>> STFTDiscriminator(window=64, width=4)(torch.zeros(2, 1, 256)).shape
        torch.Size([2, 1, 17, 6])
    """

    def __init__(self, channels: int = 1, window: int = 1024, width: int = 32):
        super().__init__()
        _check(channels=channels, width=width)
        if window < 32 or window % 4:  # narrower, and a band would have no frequency
            raise ValueError(f"window must be >= 32 and a multiple of 4, got {window}")
        self.channels, self.window, self.width = channels, window, width
        self.bands = nn.ModuleList(
            nn.Sequential(
                _conv(2 * channels, width, (3, 9)),
                *(_conv(width, width, (3, 9), (1, 2)) for _ in range(3)),
                _conv(width, width, (3, 3)),
            )
            for _ in pairwise(BANDS)
        )
        self.last = _last(width, (3, 3))

    def forward(self, waveforms: Tensor) -> Tensor:
        _check_waveforms(waveforms, self.channels, 1)
        x = waveforms.float().flatten(0, 1)
        taps = torch.hann_window(self.window, device=x.device)
        spectra = torch.stft(
            x, self.window, self.window // 4, window=taps, pad_mode="constant", normalized=True, return_complex=True
        )
        parts = torch.view_as_real(spectra).unflatten(0, waveforms.shape[:2])  # (B, C, bins, frames, 2)
        parts = parts.permute(0, 1, 4, 3, 2).flatten(1, 2)  # (B, 2 C, frames, bins)
        borders = [int(share * parts.shape[-1]) for share in BANDS]
        bands = [net(parts[..., a:b]) for net, (a, b) in zip(self.bands, pairwise(borders), strict=True)]
        return self.last(torch.cat(bands, -1))


def _last(inputs: int, kernel: tuple[int, int]) -> nn.Module:
    return weight_norm(nn.Conv2d(inputs, 1, kernel, padding=(kernel[0] // 2, kernel[1] // 2)))


def _conv(inputs: int, outputs: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel[0] // 2, kernel[1] // 2))
    return nn.Sequential(weight_norm(conv), nn.LeakyReLU(SLOPE))


def _check(**settings: int) -> None:
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")


def _check_waveforms(waveforms: Tensor, channels: int, least: int) -> None:
    if waveforms.ndim != 3 or waveforms.shape[1] != channels or waveforms.shape[2] < least:
        raise ValueError(
            f"expected waveforms (B, {channels}, T) of at least {least} samples, got {tuple(waveforms.shape)}"
        )
