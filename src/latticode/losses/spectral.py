"""Spectral losses of audio, multi-resolution STFT and mel, by name.

(output, target), both (B, C, T) in [-1, 1], to a scalar.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOWS = (256, 512, 1024)  # samples of a Hann window; the hop is a quarter of it
FLOOR = 1e-5  # of magnitudes before the logarithm: -100 dB below a full-scale sine, about the step of 16 bits
RATES = (8000, 16000, 22050, 24000, 32000, 44100, 48000)  # that have a mel term


def magnitudes(waveforms: Tensor, window: int) -> Tensor:
    """|STFT| (B * C, window / 2 + 1, frames) of (B, C, T), at least FLOOR; a full-scale sine has a peak of 1."""
    taps = torch.hann_window(window, dtype=waveforms.dtype, device=waveforms.device)
    spectra = torch.stft(
        waveforms.flatten(0, 1), window, window // 4, window=taps, pad_mode="constant", return_complex=True
    )
    power = spectra.real.square() + spectra.imag.square()  # abs() has no gradient at 0
    scale = 2 / taps.sum()
    return power.clamp_min((FLOOR / scale) ** 2).sqrt() * scale


def mel_filters(rate: int, window: int, bands: int, device: torch.device | str = "cpu") -> Tensor:
    """(bands, window / 2 + 1) triangles of height 1 whose corners are equally spaced in mel from 0 Hz to rate / 2.

    mel(f) = 2595 log10(1 + f / 700) (O'Shaughnessy 1987, Speech Communication: Human and Machine, p. 150).
    """
    corners = torch.linspace(0, 2595 * math.log10(1 + rate / 2 / 700), bands + 2, dtype=torch.float64)
    corners = 700 * (10 ** (corners / 2595) - 1)
    low, middle, high = (corners[i : i + bands, None] for i in range(3))
    frequencies = torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float64)
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp_min(0).to(device, torch.float32)


@lru_cache(maxsize=64)
def _filters(rate: int, window: int, bands: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # else what an evaluation computed first could take part in no training
        return mel_filters(rate, window, bands, device)


def stft_distance(output: Tensor, target: Tensor) -> Tensor:
    """Spectral convergence plus the mean difference of log magnitudes, averaged over WINDOWS.

    |S - S'|_F / |S|_F and mean |ln S - ln S'| (Yamamoto et al. 2020, arXiv 1910.11480, eqs. 4 to 6).

    Examples:
        >>> sine = torch.sin(torch.arange(2000) * 0.3)[None, None]
        >>> float(stft_distance(sine, sine))
        0.0
        >>> bool(stft_distance(0.5 * sine, sine) > 0.5)
        True
    """
    total = output.new_zeros(())
    for window in WINDOWS:
        ours, true = magnitudes(output.float(), window), magnitudes(target.float(), window)
        total = total + torch.linalg.vector_norm(true - ours) / torch.linalg.vector_norm(true)
        total = total + F.l1_loss(ours.log(), true.log())
    return total / len(WINDOWS)


def mel_distance(output: Tensor, target: Tensor, rate: int) -> Tensor:
    """Mean |log10 M - log10 M'| of mel spectra of window / 16 bands, averaged over WINDOWS.

    Kumar et al. 2023, arXiv 2306.06546, section 3.5, with other windows.

    Examples:
        >>> sine = torch.sin(torch.arange(2000) * 0.3)[None, None]
        >>> distances = [float(mel_distance(gain * sine, sine, rate=8000)) for gain in (1.0, 0.5, 0.1)]
        >>> distances[0] == 0 and distances[1] < distances[2]
        True
    """
    total = output.new_zeros(())
    for window in WINDOWS:
        filters = _filters(rate, window, window // 16, output.device)
        with torch.autocast(output.device.type, enabled=False):  # half precision loses small ones
            ours, true = (filters @ magnitudes(x.float(), window) for x in (output, target))
        total = total + F.l1_loss(ours.log10(), true.log10())
    return total / len(WINDOWS)


SOUND_TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "stft": stft_distance,
    **{f"mel_{rate}": partial(mel_distance, rate=rate) for rate in RATES},  # the rate is not in the waveform
}
