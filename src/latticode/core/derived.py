"""Tensors that constructor arguments determine: made when they are asked for and kept for each device.

A buffer that is not saved would be garbage in a module that was built on the meta device and then loaded, as
`transformers` and `torch.device("meta")` do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


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
        if type(tensor) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # pyright: ignore
            kept.cache_clear()  # it belongs to a trace or a transform that ends
        return tensor

    # As `torch.compiler.assume_constant_result` does, without its import of the compiler.
    found._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return found
