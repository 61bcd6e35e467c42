"""PNG files, written atomically, with JSON about their making in the metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from latticode.core.files import replacing

SETTINGS_KEY = "latticode"  # of the PNG text chunk


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
