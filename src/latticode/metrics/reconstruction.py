"""What leaves a model, as files and as pictures to look at, for every kind of data."""

from __future__ import annotations

from latticode.data import AudioPreprocess, Preparation, VideoPreprocess
from latticode.metrics import AudioMetrics, PixelMetrics, VideoMetrics

Reconstructions = PixelMetrics | AudioMetrics | VideoMetrics


def metrics_of(preprocess: Preparation) -> Reconstructions:
    """What reconstructions of this kind of data are measured by."""
    if isinstance(preprocess, AudioPreprocess):
        return AudioMetrics(preprocess.rate)
    return VideoMetrics() if isinstance(preprocess, VideoPreprocess) else PixelMetrics()
