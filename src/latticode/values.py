"""The one definition of pixel values: float32 in [-1, 1] inside, 8 bits outside."""

from __future__ import annotations

import torch
from torch import Tensor


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return pixels.to(torch.float32) / 127.5 - 1


def to_uint8(values: Tensor) -> Tensor:
    """Floats in [-1, 1] -> uint8, rounded to the nearest (half to even), values outside clamped; inverts `to_float`."""
    return ((values.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def rounded(values: Tensor) -> Tensor:
    """Floats in [-1, 1] as they come back from an 8-bit file."""
    return to_float(to_uint8(values))
