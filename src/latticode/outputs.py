"""What leaves a model, as files and as pictures to look at, for every kind of data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from latticode.data import AudioPreprocess, Preparation, VideoPreprocess
from latticode.data.clips import save_animation
from latticode.data.waveforms import save_wav
from latticode.metrics import AudioMetrics, PixelMetrics, VideoMetrics
from latticode.pictures import film_strips, grid_image, save_png, spectrograms
from latticode.values import to_uint8

Reconstructions = PixelMetrics | AudioMetrics | VideoMetrics


def metrics_of(preprocess: Preparation) -> Reconstructions:
    """What reconstructions of this kind of data are measured by."""
    if isinstance(preprocess, AudioPreprocess):
        return AudioMetrics(preprocess.rate)
    return VideoMetrics() if isinstance(preprocess, VideoPreprocess) else PixelMetrics()


def seconds_of(preprocess: Preparation, inputs: Tensor) -> float:
    """How long the recordings or clips of a batch (B, C, T, ...) last together; 0 for images."""
    rates = {"audio": getattr(preprocess, "rate", 0), "video": getattr(preprocess, "fps", 0)}
    rate = rates.get(preprocess.medium.name, 0)
    return inputs.shape[0] * inputs.shape[2] / rate if rate else 0.0


def save_example(path: Path, values: Tensor, preprocess: Preparation, about: Mapping[str, Any] | None = None) -> Path:
    """Write `values` (C, *size) in [-1, 1] as `path` with the ending of its kind: PNG, 16-bit wav or lossless WebP.

    `about` goes into the metadata of a PNG.
    """
    if isinstance(preprocess, AudioPreprocess):
        path = path.with_name(f"{path.name}.wav")
        save_wav(path, values.float().cpu().numpy(), preprocess.rate)
    elif isinstance(preprocess, VideoPreprocess):
        path = path.with_name(f"{path.name}.webp")
        save_animation(path, to_uint8(values).cpu().numpy(), preprocess.fps)
    else:
        path = path.with_name(f"{path.name}.png")
        save_png(path, grid_image(to_uint8(values)[None], 1, 0), about)
    return path


def preview(values: Tensor, preprocess: Preparation) -> tuple[np.ndarray, int]:
    """(pictures (N, C, H, W) uint8 of a batch (N, C, *size) in [-1, 1], how many fit side by side)."""
    if isinstance(preprocess, AudioPreprocess):
        return spectrograms(values.cpu()), 4
    if isinstance(preprocess, VideoPreprocess):
        return film_strips(to_uint8(values).cpu().numpy()), 1
    return to_uint8(values).cpu().numpy(), 8
