"""What any module or tensor needs: modes kept, eval mode and back, its device, a tensor described in an error."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def keeping_modes(*modules: Any) -> Generator[None]:
    """Puts back the training or eval mode of every submodule at the end; what is no module is passed over."""
    modes = [(m, m.training) for root in modules if isinstance(root, nn.Module) for m in root.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(*modules: Any) -> Generator[None]:
    """Eval mode and inference mode inside; every submodule's own mode is put back afterwards."""
    with keeping_modes(*modules):
        for root in modules:
            if isinstance(root, nn.Module):
                root.eval()
        with torch.inference_mode():
            yield


def device_of(module: Any) -> torch.device:
    """Where a module's parameters are, or its buffers if it has none; a CPU for a module without either."""
    tensors = (t for of in (module.parameters, module.buffers) for t in of())
    return next((t.device for t in tensors), torch.device("cpu"))


def described(tensor: Tensor) -> str:
    """Shape and type for an error: "(2, 16, 16) int64"."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given, so that a clock is right; a CPU never has to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
