"""What PyTorch is doing just now, where it has no public question for it: the one place that asks its internals."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_C: Any = getattr(torch, "_C")  # noqa: B009 (private, and without types)
_top_hooks: Any = getattr(_C._autograd, "_top_saved_tensors_default_hooks", None)


def in_backward() -> bool:
    """Whether a backward pass runs on this thread: a forward pass inside one is a replay, of a checkpoint."""
    return _C._current_graph_task_id() != -1


def hooks_on_saved() -> bool:
    """Whether tensors saved for the backward pass go through hooks, as in a checkpoint without reentry."""
    return _top_hooks is None or _top_hooks(True) is not None


def transformed(tensor: Tensor) -> bool:
    """Whether `tensor` is inside a transform of `torch.func`."""
    return _C._functorch.is_functorch_wrapped_tensor(tensor)


def exporting() -> bool:
    """Whether `torch.export` traces."""
    return bool(getattr(torch.compiler, "is_exporting", bool)())  # torch before 2.7 has none
