"""What reconstructions are measured by, for every kind of data: our own metrics and those that others register."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from latticode.core.plugins import Table
from latticode.core.values import rounded, rounded_sound
from latticode.data import AudioPreprocess, Preparation, VideoPreprocess
from latticode.metrics.audio import AudioMetrics
from latticode.metrics.pixels import PixelMetrics
from latticode.metrics.video import VideoMetrics

METRICS: Table[Callable[[Tensor, Tensor], Tensor | None]] = Table("metric", {})


class Joined:
    """The metrics of one kind of data and the means of registered ones, f(originals, output) -> (B,) or None.

    Both arguments are float in [-1, 1], rounded as they would be stored: pictures to 8 bits, sound to 16. A metric that
    returns None for some data is not reported there.
    """

    def __init__(self, own: PixelMetrics | AudioMetrics | VideoMetrics, more: dict[str, Callable[..., Tensor | None]]):
        self.own, self.more, self.shown = own, more, own.shown
        self.protocol = own.protocol
        self._sums: dict[str, tuple[float, int]] = {}

    def update(self, originals: Tensor, output: Tensor) -> None:
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
        return self.own.compute() | {name: total / count for name, (total, count) in self._sums.items()}


def metrics_of(preprocess: Preparation) -> PixelMetrics | AudioMetrics | VideoMetrics | Joined:
    """What reconstructions of this kind of data are measured by."""
    if isinstance(preprocess, AudioPreprocess):
        own = AudioMetrics(preprocess.rate)
    else:
        own = VideoMetrics() if isinstance(preprocess, VideoPreprocess) else PixelMetrics()
    return Joined(own, dict(METRICS)) if METRICS else own
