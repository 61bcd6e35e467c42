"""Nearest-neighbour search: one function, which takes the fastest way there is for its tensors."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from latticode.kernels.tiles import tiled


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """For each row of `x` (N, d) the row of `codebook` (K, d) at the least Euclidean distance: (N,) int64."""
    double = torch.float64 in (x.dtype, codebook.dtype)
    if x.is_cuda and not double and has_triton():
        from latticode.kernels import nearest_triton

        return nearest_triton.nearest_code(x, codebook)
    return tiled(x, codebook)


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, so that a GPU can run its kernels."""
    return importlib.util.find_spec("triton") is not None
