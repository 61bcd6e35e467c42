"""Tensors that constructor arguments determine: made when they are asked for, never kept in a buffer.

A buffer that is not saved would be garbage in a module that was built on the meta device and then loaded, as
`transformers` and `torch.device("meta")` do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from latticode.core.modes import exporting, transformed


def derived(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Decorates a pure function of hashable arguments, which makes a tensor on the CPU: the result takes the keyword
    `device` too, and makes each tensor once for every device. It is not to be written to. A compiled graph holds it as
    a constant.

    Examples:
        >>> @derived
        ... def steps(count: int) -> Tensor:
        ...     return torch.arange(count)
        >>> steps(3, device=torch.device("cpu"))
        tensor([0, 1, 2])
    """

    @functools.lru_cache(maxsize=256)
    def kept(device: torch.device, *arguments: Hashable) -> Tensor:
        with torch.inference_mode(False), torch.device("cpu"):
            return make(*arguments).to(device)

    @functools.wraps(make)
    def found(*arguments: Hashable, device: torch.device) -> Tensor:
        tensor = kept(device, *arguments)
        if type(tensor) is not Tensor or transformed(tensor):
            kept.cache_clear()  # it belongs to a trace or a transform that ends
        return tensor

    # As `torch.compiler.assume_constant_result` does, without its import of the compiler.
    found._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return found


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
