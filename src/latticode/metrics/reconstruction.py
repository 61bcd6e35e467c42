"""What reconstructions of each kind of data are measured by."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from latticode.data import AUDIO, VIDEO, Preparation
from latticode.metrics.audio import AudioMetrics
from latticode.metrics.pixels import PixelMetrics
from latticode.metrics.video import VideoMetrics

Reconstructions = PixelMetrics | AudioMetrics | VideoMetrics
METRICS: Mapping[str, Callable[[Any], Reconstructions]] = {  # by the name of the medium
    AUDIO.name: lambda preprocess: AudioMetrics(preprocess.rate),
    VIDEO.name: lambda _: VideoMetrics(),
}


def metrics_of(preprocess: Preparation) -> Reconstructions:
    """A fresh scorer: PSNR and SSIM of images and clips (with changes from frame to frame), SI-SDR and spectral
    distances of sound.

    Examples:
        >>> import torch
        >>> from latticode.data import Preprocess
        >>> metrics = metrics_of(Preprocess(size=16))
        >>> images = torch.zeros(2, 3, 16, 16)
        >>> metrics.update(images, images + 0.2)
        >>> round(metrics.compute()["psnr"], 1)
        20.2
    """
    return METRICS.get(preprocess.medium.name, lambda _: PixelMetrics())(preprocess)
