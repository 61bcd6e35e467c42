"""The one definition of values: float32 in [-1, 1] inside; pixels of 8 bits and sound of 16 outside."""

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


def to_int16(samples: Tensor) -> Tensor:
    """Floats in [-1, 1] -> int16, rounded to the nearest, values outside clamped; 1 stands for 32768."""
    return (samples.to(torch.float32) * 32768).round().clamp(-32768, 32767).to(torch.int16)


def rounded_sound(samples: Tensor) -> Tensor:
    """Floats in [-1, 1] as they come back from a 16-bit file."""
    return to_int16(samples).to(torch.float32) / 32768
