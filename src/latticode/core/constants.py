"""Small tensors that a constructor's arguments determine, made where they are used.

A buffer that is not saved would be garbage in a module that was built on the meta device and then loaded, as
`transformers` and `torch.device("meta")` do.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from latticode.core.modes import exporting, transformed


def constant(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`numbers` (n,) as a tensor (n,), not to be written to, and without a copy that a GPU would have to wait for.

    Examples:
        >>> constant([8, 5, 5, 5], torch.int64, torch.device("cpu"))
        tensor([8, 5, 5, 5])
    """
    if exporting():
        return torch.tensor(numbers, dtype=dtype, device=device)
    if torch.compiler.is_compiling():  # it fuses these; a list would be copied to a GPU in every call
        return torch.stack([torch.full((), number, dtype=dtype, device=device) for number in numbers])
    if device.type in ("cpu", "meta"):
        return torch.tensor(numbers, dtype=dtype, device=device)
    kept = _kept(tuple(numbers), dtype, device)
    if type(kept) is not Tensor or transformed(kept):
        _kept.cache_clear()  # it belongs to a trace or a transform that ends
    return kept


@functools.lru_cache(maxsize=1024)
def _kept(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=dtype, device=device)
