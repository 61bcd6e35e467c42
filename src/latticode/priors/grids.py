"""Packing and unpacking the codes of two grids, as a `HierarchicalTokenizer` of two levels packs them.

At each position of the top grid (h, w) stand its code and then those of the r x r positions of the bottom grid inside
it, row-major: (B, h, w, 1 + r r).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def ratio_of(vocab: Sequence[int], grid: Sequence[int], name: str) -> int:
    """r of a prior called `name`. Raises ValueError unless `vocab` is [C_top, C_bottom, ..., C_bottom] with r r of the
    latter and `grid` has two axes."""
    ratio = math.isqrt(len(vocab) - 1)
    if ratio < 1 or ratio**2 != len(vocab) - 1 or len(set(vocab[1:])) > 1:
        raise ValueError(f"{name} models codes of sizes [top, bottom * r * r], got {len(vocab)}: {list(vocab)}")
    if len(grid) != 2:
        raise ValueError(f"{name} models grids of two axes, got {len(grid)} (grid {list(grid)})")
    return ratio


def unpacked(codes: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
    """The top grid (B, h, w) and the bottom grid (B, h r, w r) of `codes` (B, h, w, 1 + r r)."""
    cells = torch.unflatten(codes[..., 1:], -1, (ratio, ratio))  # (B, h, w, r, r)
    return codes[..., 0], cells.transpose(2, 3).flatten(3).flatten(1, 2)


def packed(top: Tensor, bottom: Tensor, ratio: int) -> Tensor:
    """The inverse of `unpacked`."""
    rows = torch.unflatten(bottom, 2, (-1, ratio))
    cells = torch.unflatten(rows, 1, (-1, ratio)).transpose(2, 3)  # (B, h, w, r, r)
    return torch.cat([top[..., None], cells.flatten(3)], dim=-1)
