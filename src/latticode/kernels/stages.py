"""Residual stages of one clamped lattice on a CPU: a few stages at once, in blocks that stay in a core's cache.

n stages of L levels, each L times finer than the one before it, are one even grid of L^n levels, and the digits of the
stages are those of a place on it in base L. So a group of stages takes one rounding. `reference.to_lattices` has the
formulas; every operation here is one of them, each with a rounding of its own, so that a result does not depend on the
layout or on the place in a batch.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from latticode.kernels.grid import Lattice
from latticode.kernels.tiles import full_float32

BLOCK = 2**17  # numbers per block and thread: enough to hide the calls, few enough for a cache
ROW = 256  # least length of a row of whole tokens
FINEST = 2**12  # levels of the grid of one group: float32 holds its places to 2^-12 of a cell
EXACT = 2**24  # float32 holds all integers up to here


def fits(lattice: Lattice) -> bool:
    """Whether the stages of `lattice` are one even grid, with indices that float32 holds."""
    return lattice.bound == "clamp" and lattice.slope == 2 and max(lattice.vocab) <= EXACT


def sizes(lattice: Lattice, depth: int) -> list[int]:
    """How many stages each group has: as many as `FINEST` allows, and what is left in the last."""
    most = max(n for n in range(1, 13) if n == 1 or max(lattice.levels) ** n <= FINEST)
    return [min(most, depth - start) for start in range(0, depth, most)]


class Group(NamedTuple):
    """The constants of a group of stages, float32, each (d,) or tiled to the columns of a row.

    Examples:
        >>> found = groups(Lattice((4,), bound="clamp"), depth=7)  # stages that share a rounding: 6, then 1
        >>> [int(group.top) + 1 for group in found]  # levels of the one grid that a group's stages are
        [4096, 4]
    """

    rate: Tensor  # what is left is counted in cells of this group: times `rate`
    middle: Tensor  # (M - 1) / 2, for M levels
    top: Tensor  # M - 1
    width: Tensor  # cells from 0 to 1, in the units of the first stage
    level: Tensor  # L
    shrink: tuple[Tensor, ...]  # L^-j, for j = 1 .. stages - 1


def groups(lattice: Lattice, depth: int, device: torch.device | str = "cpu", repeat: int = 1) -> list[Group]:
    """The constants of each group, for rows of `repeat` tokens."""
    found, done = [], 0
    for size in sizes(lattice, depth):
        done += size
        rows = [
            (
                (n - 1) * n ** (size - 1) / 2 if done == size else n**size,
                (n**size - 1) / 2,
                n**size - 1,
                (n - 1) * n ** (done - 1) / 2,
                n,
                *(n**-j for j in range(1, size)),
            )
            for n in lattice.levels
        ]
        columns = torch.tensor(rows, dtype=torch.float64, device="cpu").t().repeat(1, repeat).float().to(device)
        rate, middle, top, width, level, *shrink = columns.unbind()
        found.append(Group(rate, middle, top, width, level, tuple(shrink)))
    return found


def limits(lattice: Lattice, depth: int, device: torch.device | str = "cpu", repeat: int = 1) -> Tensor:
    """The sum of all scales L^-i of each channel (d,): beyond it every stage clamps."""
    sums = [math.fsum(n**-i for i in range(depth)) for n in lattice.levels]
    return torch.tensor(sums * repeat, dtype=torch.float32, device=device)


def joint_latents(places: Tensor, lattice: Lattice) -> Tensor:
    """The latents (..., d) float32 of stages that stand `places` (..., depth, d) int64 half cells from the middle."""
    depth = places.shape[-2]
    levels = torch.tensor(lattice.levels, device=places.device)
    total, start = None, 0
    for size, group in zip(sizes(lattice, depth), groups(lattice, depth, places.device), strict=True):
        twice = places[..., start, :]
        for i in range(start + 1, start + size):
            twice = twice * levels + places[..., i, :]
        value = (twice.float() / 2) / group.width
        total, start = value if total is None else total + value, start + size
    assert total is not None
    return total


def to_lattices(z: Tensor, lattice: Lattice, depth: int) -> tuple[Tensor, Tensor]:
    """Latents (..., d) in the type of `z` (..., d), and codes (..., depth * factors) int64."""
    tokens = z.reshape(-1, z.shape[-1]).contiguous()
    out, codes = torch.empty_like(tokens), torch.empty(len(tokens), depth, lattice.factors, dtype=torch.int64)
    repeat, whole = _rows(tokens)
    with full_float32():
        for start, stop, count in ((0, whole, repeat), (whole, len(tokens), len(tokens) - whole)):
            if start < stop:
                _run(tokens[start:stop], out[start:stop], codes[start:stop], lattice, count)
    if tokens.numel() and not math.isfinite(tokens.sum().item()):
        broken = ~tokens.isfinite().all(dim=1)
        out[broken], codes[broken] = torch.nan, -1
    return out.view(z.shape), codes.view(*z.shape[:-1], depth * lattice.factors)


def to_lattices_backward(gradient: Tensor, z: Tensor, lattice: Lattice, depth: int) -> Tensor:
    """The gradient for `z` (..., d) of that for its latents: the same where a stage does not clamp or it leads back."""
    out = torch.empty(z.shape, dtype=z.dtype)
    tokens, above, below = (t.reshape(-1, z.shape[-1]).contiguous() for t in (z, gradient, out))
    repeat, whole = _rows(tokens)
    buffer = torch.empty(min(tokens.numel(), max(repeat * tokens.shape[1], BLOCK * torch.get_num_threads())))
    for start, stop, count in ((0, whole, repeat), (whole, len(tokens), len(tokens) - whole)):
        parts = zip(*(_blocks(t[start:stop], count) for t in (tokens, above, below)), strict=True)
        for part, given, target in parts:
            left, given = buffer[: part.numel()].view(part.shape), given.float()
            torch.sign(given, out=left).mul_(part.float()).add_(_beyond(lattice, depth, count))  # > 0: it may go there
            if target.dtype == torch.float32:
                torch.ops.aten.threshold_backward(given, left, 0, grad_input=target)
            else:
                target.copy_(torch.ops.aten.threshold_backward(given, left, 0))
    if tokens.numel() and not math.isfinite(tokens.sum().item()):
        below[~tokens.isfinite().all(dim=1)] = 0
    return out


def _rows(tokens: Tensor) -> tuple[int, int]:
    """How many tokens a row holds, and how many tokens fill whole rows."""
    repeat = -(-ROW // tokens.shape[1])
    return repeat, len(tokens) // repeat * repeat


def _blocks(tokens: Tensor, count: int) -> tuple[Tensor, ...]:
    """Blocks (rows, count * d) of `tokens` (N, d)."""
    if not len(tokens):
        return ()
    rows = tokens.view(len(tokens) // count, -1)
    return rows.split(max(1, BLOCK * torch.get_num_threads() // rows.shape[1]))


def _run(z: Tensor, out: Tensor, codes: Tensor, lattice: Lattice, count: int) -> None:
    """Fill latents `out` (N, d) and `codes` (N, depth, factors) of `z` (N, d), in rows of `count` tokens."""
    dim, depth = z.shape[1], codes.shape[1]
    table, bases, zero = _tables(lattice, depth, count)
    sources = _blocks(z, count)
    buffers = torch.empty(6, sources[0].numel())
    index = torch.empty(sources[0].numel() // dim)
    first = 0
    for source, target in zip(sources, _blocks(out, count), strict=True):
        left, place, inside, one, other, total = buffers[:, : source.numel()].view(6, *source.shape)
        total = target if target.dtype == torch.float32 else total
        last = first + source.numel() // dim
        chosen, slots, stage = index[: last - first], codes[first:last].flatten(1).unbind(1), 0
        torch.mul(source.float(), table[0].rate, out=left)
        for group in table:
            if stage:
                left.mul_(group.rate)
            torch.clamp(torch.add(left, group.middle, out=place).round_(), zero, group.top, out=place)
            torch.add(place, 0.5, out=inside)  # of the cell, so that rounding of the products leaves their floors alone
            spare, above = one, other
            for i, shrink in enumerate((*group.shrink[::-1], None)):
                prefix = place if shrink is None else torch.mul(inside, shrink, out=spare).floor_()
                digit = torch.sub(prefix, above.mul_(group.level), out=above) if i else prefix
                for factor, (start, basis) in enumerate(bases):
                    some = digit.view(-1, dim)
                    some = some if len(bases) == 1 else some[:, start : start + len(basis)]
                    slots[stage * lattice.factors + factor].copy_(torch.mv(some, basis, out=chosen))
                spare, above, stage = above, prefix, stage + 1
            place.sub_(group.middle)
            if stage < depth:
                left.sub_(place)
            if group is table[0]:
                torch.div(place, group.width, out=total)
            else:
                total.add_(place.div_(group.width))
        if total is not target:
            target.copy_(total)
        first = last


@functools.lru_cache(maxsize=256)
def _tables(lattice: Lattice, depth: int, count: int) -> tuple[list[Group], list[tuple[int, Tensor]], Tensor]:
    """Tiled constants, first channel and basis of each factor, and zeros for a row."""
    with torch.inference_mode(False):
        starts = range(0, len(lattice.levels), len(lattice.levels) // lattice.factors)
        bases = [
            (start, torch.tensor([math.prod(run[:i]) for i in range(len(run))], dtype=torch.float32))
            for start, run in zip(starts, lattice.runs, strict=True)
        ]
        return groups(lattice, depth, repeat=count), bases, torch.zeros(count * len(lattice.levels))


@functools.lru_cache(maxsize=256)
def _beyond(lattice: Lattice, depth: int, count: int) -> Tensor:
    """The least numbers beyond the limits, tiled to a row."""
    with torch.inference_mode(False):
        edge = limits(lattice, depth, repeat=count)
        return edge.nextafter(torch.full_like(edge, math.inf))
