"""Mask and guidance schedules, and orders of decoding: how many tokens stay masked, and which come next.

`ratio` is the share of the decoding (or the draw of a training step) that is done, in [0, 1]; a schedule gives the
fraction of tokens that is still masked, 1 at ratio 0 and 0 at ratio 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The fraction at `ratio` of so many unknown tokens: MaskGIT (2202.04200), section 3.3 and figure 8, logarithm and
# exponential as in the authors' code; arccos is from later ports.
SCHEDULES: dict[str, Callable[[float, int], float]] = {
    "cosine": lambda ratio, unknown: math.cos(math.pi / 2 * ratio),
    "arccos": lambda ratio, unknown: 2 / math.pi * math.acos(ratio),
    "linear": lambda ratio, unknown: 1 - ratio,
    "square": lambda ratio, unknown: 1 - ratio**2,
    "cubic": lambda ratio, unknown: 1 - ratio**3,
    "root": lambda ratio, unknown: 1 - math.sqrt(ratio),
    "log": lambda ratio, unknown: min(1.0, -math.log(max(ratio, 1 / unknown)) / math.log(max(unknown, 2))),
    "exp": lambda ratio, unknown: 1 - unknown ** (ratio - 1),
    "cosine-float32": lambda ratio, unknown: _cosine_float32(ratio, unknown),
}
# what of the guidance acts at a step: Muse (2301.00704, section 2.7) raises it linearly, later ports by half a cosine
RAMPS: dict[str, Callable[[float], float]] = {
    "constant": lambda ratio: 1.0,
    "linear": lambda ratio: ratio,
    "cosine": lambda ratio: (1 - math.cos(math.pi * ratio)) / 2,
}


def remask_counts(unknown: int, steps: int, schedule: str = "cosine") -> list[int]:
    """How many of `unknown` tokens are masked again after each forward pass; the last entry is 0.

    MaskGIT's max(1, min(left - 1, floor(unknown * schedule))): every pass fixes at least one token, all but the last
    leave at least one. A pass on one token left is the last, so there are at most `unknown` passes: more would only
    draw that token again. Raises ValueError for a negative `unknown`, `steps` < 1 or an unknown schedule.
    """
    if unknown < 0:
        raise ValueError(f"the number of unknown tokens must be >= 0, got {unknown}")
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}")
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; valid: {', '.join(SCHEDULES)}")
    counts: list[int] = []
    left = unknown
    while left:
        fraction = SCHEDULES[schedule]((len(counts) + 1) / steps, unknown) if len(counts) + 1 < steps else 0.0
        last = left == 1 or len(counts) + 1 == steps
        # 1e-9: a product that is an integer must not fall below it by a rounding error
        left = 0 if last else max(1, min(left - 1, math.floor(unknown * fraction + 1e-9)))
        counts.append(left)
    return counts


def _cosine_float32(ratio: float, unknown: int) -> float:
    """The fraction behind the count that MaskGIT's code gets: its cosine and its product round to float32, so that a
    count now and then is off by one from "cosine"."""
    cosine = np.cos(np.float32(math.pi / 2) * np.float32(ratio), dtype=np.float32)
    return max(0, math.floor(np.float32(unknown) * cosine)) / unknown


def ratio_floor(min_masked: float) -> float:
    """r_min = 1 - (2 / pi) arccos(min_masked), FSQ (2309.15505) appendix A.4.2: 0.29715 for the paper's 0.45."""
    if not 0 <= min_masked <= 1:
        raise ValueError(f"min_masked must be in [0, 1], got {min_masked}")
    return 1 - 2 / math.pi * math.acos(min_masked)


def draw_ratios(count: int, floor: float, device: torch.device | None = None) -> Tensor:
    """(count,) draws r ~ U[floor, 1]. The paper does not say whether it rescales or clamps: rescaling puts no
    atom on the floor, and trains on more masked tokens per step (mean 0.81 against 0.70 of them)."""
    return floor + (1 - floor) * torch.rand(count, device=device)


def masked_counts(ratios: Tensor, positions: int) -> Tensor:
    """N_M = ceil(cos(pi / 2 (1 - r)) positions), at least 1, int64 (FSQ appendix A.4.2).

    For r ~ U[0, 1] the fraction x has the density (2 / pi) (1 - x^2)^(-1/2) and the mean 2 / pi = 0.64 of Muse
    (2301.00704, section 2.4): its masks are those of MaskGIT.
    """
    return (torch.cos(math.pi / 2 * (1 - ratios)) * positions).ceil().long().clamp(1, positions)


def truncated_normal(
    count: int, mean: float, std: float, low: float, high: float, device: torch.device | None = None
) -> Tensor:
    """(count,) draws from N(mean, std^2) on [low, high], by inversion of its distribution function."""
    special: Any = torch.special
    ends = special.ndtr((torch.tensor([low, high], dtype=torch.float64, device=device) - mean) / std)
    u = torch.rand(count, dtype=torch.float64, device=device)
    draws = mean + std * special.ndtri(torch.lerp(ends[0], ends[1], u))
    return draws.clamp(low, high).float()


def random_mask(counts: Tensor, positions: int) -> Tensor:
    """(B, positions) bool with exactly `counts[b]` True in row b, every such subset equally likely."""
    return ranks(torch.rand(len(counts), positions, device=counts.device)) < counts[:, None]


def ranks(x: Tensor) -> Tensor:
    """The rank of each entry in its row, 0 for the lowest; ties get different ranks, so `ranks < m` has m entries."""
    order = x.argsort(dim=-1, stable=True)
    return torch.empty_like(order).scatter_(-1, order, torch.arange(x.shape[-1], device=x.device).expand_as(order))


def group_sizes(positions: int, groups: int = 12, alpha: float = 2.2) -> list[int]:
    """Sizes of the groups that M2T (2304.07313) uncovers: positions (i / S)^alpha are known after group i of S.

    Rounded, but each group holds one position at least; min(groups, positions) groups; the sizes sum to `positions`.
    """
    if positions < 1 or groups < 1:
        raise ValueError(f"positions and groups must be >= 1, got {positions} and {groups}")
    groups = min(groups, positions)
    known = [0]
    for i in range(1, groups + 1):
        known.append(max(known[-1] + 1, round(positions * (i / groups) ** alpha)))
    return [after - before for before, after in pairwise(known)]


def spread_order(grid: Sequence[int]) -> list[int]:
    """The cells of `grid` (flat, row-major) in the order of a quantised low-discrepancy sequence (M2T).

    Point n is frac(1/2 + n / g^(axis + 1)), where g solves g^(d + 1) = g + 1 for d axes (d = 2: the plastic number);
    it falls into a cell by floor, and cells already taken are skipped. M2T's own rounding rule is not public.
    """
    return list(_spread_order(tuple(grid)))


@lru_cache(maxsize=32)
def _spread_order(grid: tuple[int, ...]) -> tuple[int, ...]:
    g = 2.0
    for _ in range(64):  # a contraction: converges to machine precision
        g = (1 + g) ** (1 / (len(grid) + 1))
    order: dict[int, None] = {}
    n = 0
    while len(order) < math.prod(grid):
        n += 1
        cell = 0
        for axis, size in enumerate(grid):
            cell = cell * size + int((0.5 + n / g ** (axis + 1)) % 1 * size)
        order[cell] = None  # a dict keeps the first visit
    return tuple(order)


def spread_groups(grid: Sequence[int], groups: int = 12) -> list[list[int]]:
    """`spread_order` cut into `group_sizes`: the fixed schedule under which compression cost is measured."""
    order = spread_order(grid)
    result: list[list[int]] = []
    start = 0
    for size in group_sizes(len(order), groups):
        result.append(order[start : start + size])
        start += size
    return result
