"""Metrics of audio reconstructions: SI-SDR, mel and STFT distance, on the 16-bit samples that would be stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latticode.core.values import rounded_sound
from latticode.losses.spectral import WINDOWS, mel_distance, stft_distance

CAP = 100.0  # dB, of a recording that is restored exactly

PROTOCOL: dict[str, Any] = {
    "round": "16 bits",
    "si_sdr": f"mean over recordings of each channel's own, mean removed, capped at +-{CAP:g} dB; silent ones left out",
    "mel_distance": f"mean |difference| of log10 mel magnitudes, window / 16 bands, Hann windows {WINDOWS}, hop 1/4",
    "stft_distance": f"spectral convergence + mean |difference| of ln magnitudes, Hann windows {WINDOWS}, hop 1/4; "
    "silent recordings left out",
}


def si_sdr(target: Tensor, output: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio (...) in dB of (..., T); NaN where `target` is silent.

    10 log10(|a s|^2 / |a s - s'|^2), a = <s', s> / |s|^2 (Le Roux et al. 2019, arXiv 1811.02508, eq. 5), means removed.
    """
    s, e = (x.double() - x.double().mean(-1, keepdim=True) for x in (target, output))
    energy = s.square().sum(-1)
    part = ((e * s).sum(-1) / energy).unsqueeze(-1) * s
    ratio = 10 * (part.square().sum(-1) / (part - e).square().sum(-1)).log10()
    # 0 / 0 is a silent output (the worst) or, part and e being equal, an exact one: the first has no energy
    ratio = torch.where(part.square().sum(-1) == 0, -CAP, ratio.clamp(-CAP, CAP))
    return torch.where(energy < 1e-12, torch.nan, ratio)  # one step of 16 bits alone has 1e-9


class AudioMetrics:
    """Streaming SI-SDR and spectral distances; every recording counts once, however they come in batches.

    Examples:
        >>> metrics = AudioMetrics(rate=8000)
        >>> sine = torch.sin(torch.arange(4000) * 0.3)[None, None]  # (B, C, T)
        >>> metrics.update(sine, 0.5 * sine)
        >>> scores = metrics.compute()
        >>> scores["si_sdr"] > 60, scores["mel_distance"] > 0.1, scores["count"]  # a scale costs no SI-SDR
        (True, True, 1)
    """

    shown = ("si_sdr", "mel_distance")
    protocol = PROTOCOL

    def __init__(self, rate: int):
        self.rate = rate
        self.count = self.silent = 0
        self._ratio = self._mel = self._stft = 0.0

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        """Count waveforms (B, C, T), float in [-1, 1], and their reconstructions.

        Raises ValueError for other shapes and for reconstructions that are not finite.
        """
        if inputs.ndim != 3 or inputs.shape != outputs.shape:
            shapes = f"{tuple(inputs.shape)} and {tuple(outputs.shape)}"
            raise ValueError(f"expected waveforms and reconstructions of one shape (B, C, T), got {shapes}")
        if not outputs.isfinite().all():
            raise ValueError("reconstructions hold values that are not finite; they have no distance")
        for true, ours in zip(rounded_sound(inputs), rounded_sound(outputs), strict=True):
            ratio = si_sdr(true, ours).nanmean()
            self.count += 1
            self._mel += float(mel_distance(ours[None], true[None], self.rate))
            if ratio.isnan():
                self.silent += 1
            else:
                self._ratio += float(ratio)
                self._stft += float(stft_distance(ours[None], true[None]))  # relative to a magnitude that is not 0

    def compute(self) -> dict[str, Any]:
        """si_sdr in dB and stft_distance (None if everything was silent), mel_distance, silent (recordings), count.

        Raises ValueError when nothing was counted.
        """
        if not self.count:
            raise ValueError("no recordings were counted")
        audible = self.count - self.silent
        return {
            "si_sdr": self._ratio / audible if audible else None,
            "mel_distance": self._mel / self.count,
            "stft_distance": self._stft / audible if audible else None,
            "silent": self.silent,
            "count": self.count,
        }
