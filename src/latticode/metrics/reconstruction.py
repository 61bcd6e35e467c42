"""What reconstructions of each kind of data are measured by: our own metrics and those that others register."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from latticode.core.plugins import Table
from latticode.core.values import rounded, rounded_sound
from latticode.data import AUDIO, VIDEO, Preparation
from latticode.metrics.audio import AudioMetrics
from latticode.metrics.pixels import PixelMetrics
from latticode.metrics.video import VideoMetrics

Reconstructions = PixelMetrics | AudioMetrics | VideoMetrics
OWN: Mapping[str, Callable[[Any], Reconstructions]] = {  # by the name of the medium
    AUDIO.name: lambda preprocess: AudioMetrics(preprocess.rate),
    VIDEO.name: lambda _: VideoMetrics(),
}
METRICS: Table[Callable[[Tensor, Tensor], Tensor | None]] = Table("metric", {})


class Joined:
    """The metrics of one kind of data and the means of registered ones, f(originals, output) -> (B,) or None.

    Both arguments are float in [-1, 1], rounded as they would be stored: pictures to 8 bits, sound to 16. A metric that
    returns None for some data is not reported there.

    Examples:
        >>> import torch
        >>> def worst(originals, output):
        ...     return (originals - output).abs().amax((1, 2, 3))
        >>> metrics = Joined(PixelMetrics(), {"worst": worst})
        >>> images = torch.zeros(2, 3, 16, 16)
        >>> metrics.update(images, images)
        >>> metrics.compute()["worst"]
        0.0
    """

    def __init__(self, own: Reconstructions, more: Mapping[str, Callable[..., Tensor | None]]):
        self.own, self.more, self.shown = own, more, own.shown
        self.protocol = own.protocol
        self._sums: dict[str, tuple[float, int]] = {}

    def update(self, originals: Tensor, output: Tensor) -> None:
        """Add originals and outputs, both (B, C, *size) in [-1, 1]."""
        self.own.update(originals, output)
        stored = rounded_sound if isinstance(self.own, AudioMetrics) else rounded
        for name, function in self.more.items():
            values = function(stored(originals), stored(output)) if len(originals) else None
            if values is not None:
                if tuple(values.shape) != (len(originals),):
                    expected = f"one value for each of {len(originals)} examples"
                    raise ValueError(f"the metric {name!r} should give {expected}, got {tuple(values.shape)}")
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + float(values.double().sum()), count + len(values)

    def compute(self) -> dict[str, Any]:
        """All metrics by name."""
        return self.own.compute() | {name: total / count for name, (total, count) in self._sums.items()}


def metrics_of(preprocess: Preparation) -> Reconstructions | Joined:
    """A fresh scorer: PSNR and SSIM of images and clips (with changes from frame to frame), SI-SDR and spectral
    distances of sound; and what was registered.

    Examples:
        >>> import torch
        >>> from latticode.data import Preprocess
        >>> metrics = metrics_of(Preprocess(size=16))
        >>> images = torch.zeros(2, 3, 16, 16)
        >>> metrics.update(images, images + 0.2)
        >>> round(metrics.compute()["psnr"], 1)
        20.2
    """
    own = OWN.get(preprocess.medium.name, lambda _: PixelMetrics())(preprocess)
    return Joined(own, dict(METRICS)) if METRICS else own
