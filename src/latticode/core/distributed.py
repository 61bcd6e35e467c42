"""Rank, sum and broadcast over the process group of torch.distributed; no-ops on one process.

Asked at every call, never cached: a module built before the process group still synchronises.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether a process group of more than one rank is there."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process in the group; 0 without one."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """The number of processes in the group; 1 without one."""
    return dist.get_world_size() if is_distributed() else 1


def all_sum(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over ranks of several tensors of one dtype, packed into one all-reduce."""
    if not is_distributed() or not tensors:
        return list(tensors)
    packed = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(packed)
    return [part.view_as(t) for part, t in zip(packed.split([t.numel() for t in tensors]), tensors, strict=True)]


def joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums over ranks of several tensors, packed into one all-reduce, with gradients.

    The gradient of a sum is `world_size` times that of this rank's own part. Averaged over ranks, as training averages
    gradients, it is the gradient of one process on the joined batch, however unequal the ranks' shares are.
    """
    if not is_distributed():
        return list(tensors)
    totals = all_sum([t.detach() for t in tensors])
    own = [world_size() * (t - t.detach()) if t.requires_grad else 0 for t in tensors]
    return [total.to(t) + zero for total, t, zero in zip(totals, tensors, own, strict=True)]


def all_gather(tensor: Tensor) -> Tensor:
    """Rows of all ranks in rank order; ranks may hold different numbers of rows."""
    if not is_distributed():
        return tensor
    counts = [torch.zeros((), dtype=torch.int64, device=tensor.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor(len(tensor), device=tensor.device))
    longest = int(max(counts))
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts, strict=True)])


def broadcast(tensor: Tensor, source: int = 0) -> Tensor:
    """`tensor` of rank `source`, in place, on every rank."""
    if is_distributed():
        dist.broadcast(tensor, source)
    return tensor
