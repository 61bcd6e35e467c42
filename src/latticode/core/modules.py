"""What any module needs done to it: eval mode and back, its device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(*modules: Any) -> Iterator[None]:
    """Eval mode and inference mode inside; every submodule's own mode is put back afterwards."""
    roots = [m for m in modules if isinstance(m, nn.Module)]
    modes = [(m, m.training) for root in roots for m in root.modules()]
    try:
        for root in roots:
            root.eval()
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def device_of(module: Any) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
