"""Writing of examples: PNG, wav, animated WebP, each with what it was made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin
from torch import Tensor

from latticode.core.files import replacing
from latticode.core.values import to_uint8
from latticode.data import AudioPreprocess, Preparation, VideoPreprocess
from latticode.data.clips import save_animation
from latticode.data.waveforms import save_wav

SETTINGS_KEY = "latticode"  # of the PNG text chunk


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
        save_png(path, to_picture(to_uint8(values).cpu().numpy().transpose(1, 2, 0)), about)
    return path


def save_png(path: Path, image: Image.Image, metadata: Mapping[str, Any] | None = None) -> None:
    """Write a PNG atomically; `metadata` goes into its text chunk `latticode` as JSON."""
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_text(SETTINGS_KEY, json.dumps(metadata, sort_keys=True))
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def to_picture(array: np.ndarray) -> Image.Image:
    """The picture of (H, W, C) uint8; C is 1, 3 or 4."""
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
