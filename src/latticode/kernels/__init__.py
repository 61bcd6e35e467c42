"""One function per hot operation, with one dispatch: `reference` is the specification, `fast` what runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, library

from latticode.kernels import nearest, reference

_NEAREST = {"fast": nearest.nearest_code, "reference": reference.nearest_code}
_active = "fast"


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run the kernels of `name`, "fast" or "reference", inside the block; the whole process is switched."""
    global _active
    if name not in _NEAREST:
        raise ValueError(f"kernels must be one of {', '.join(_NEAREST)}, got {name!r}")
    previous, _active = _active, name
    try:
        yield
    finally:
        _active = previous


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """For each row of `x` (N, d) the row of `codebook` (K, d) at the least Euclidean distance: (N,) int64.

    The answer is that of float64, unless more codes tie in float32 than the fast kernel compares exactly: then it is
    one of these. Half precision is widened, autocast has no effect, and no gradient flows. A row that is not finite
    gets some code in 0 .. K-1. One opaque operator to torch.compile.

    Raises:
        ValueError: for other ranks, different widths, an empty codebook or integers.
    """
    fits = x.ndim == codebook.ndim == 2 and x.shape[1] == codebook.shape[1] > 0 and len(codebook) > 0
    if not fits or not x.is_floating_point() or not codebook.is_floating_point():
        raise ValueError(
            "nearest_code expects float x (N, d) and codebook (K, d) with K, d >= 1, "
            f"got {tuple(x.shape)} {x.dtype} and {tuple(codebook.shape)} {codebook.dtype}"
        )
    return _nearest_code(x.detach(), codebook.detach())


@library.custom_op("latticode::nearest_code", mutates_args=(), schema="(Tensor x, Tensor codebook) -> Tensor")
def _nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return _NEAREST[_active](x, codebook)


@library.register_fake("latticode::nearest_code")
def _(x: Tensor, codebook: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)
