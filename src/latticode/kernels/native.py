"""`native.c`, where it could be compiled at installation: finite scalar quantization in one pass on a CPU, the nearest
code with one look at each score, soft codes and the powers of logits in one row of scores.

A library without Python in it, called by address. What it does not serve goes to `lattice`, `nearest`, `entropies` and
`vocabulary`: the same latents and codes.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latticode.kernels import lattice as portable
from latticode.kernels import nearest, stages, tiles
from latticode.kernels.grid import Lattice
from latticode.kernels.lattice import alike, dense, empty_like, planes

FILE = "_native.pyd" if sys.platform == "win32" else "_native.so"  # as setup.py calls it, whatever the Python
VERSION = 5  # of the functions' signatures
ROW = 512  # numbers of one row of whole tokens, at most, as in native.c
CHANNELS = 64  # at most, as in native.c
GRAIN = 2**17  # numbers that are worth a thread
MARGIN = 1e-6  # bounds the error of a position, per level: below 4e-7 here and in `grid` together


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """For each row of `x` (N, d) the row of `codebook` (K, d) at the least Euclidean distance: (N,) int64.

    Where the second best score is further below the best than rounding can explain (`tiles.margin`), the best is the
    nearest; the few tokens without a clear winner go to `nearest.tiled`.
    """
    if x.device.type != "cpu" or torch.float64 in (x.dtype, codebook.dtype) or len(codebook) >= 2**31:
        return nearest.nearest_code(x, codebook)
    centre = codebook.float().mean(dim=0)
    codes = codebook.float() - centre
    offsets = codes.square().sum(dim=1) / -2
    reach = (-2 * offsets.amin()).sqrt()
    rows, width = tiles.CPU_TILE
    found = torch.empty(len(x), dtype=torch.int64)
    scores = torch.empty(min(width, len(codes)), min(rows, len(x)))
    with tiles.full_float32():
        for start in range(0, len(x), rows):
            tile = x[start : start + rows].float() - centre
            best, second = torch.full((2, len(tile)), -torch.inf)
            number = torch.zeros(len(tile), dtype=torch.int32)
            for first in range(0, len(codes), width):
                some = codes[first : first + width]
                part = scores[: len(some), : len(tile)]
                _scan(torch.mm(some, tile.t(), out=part), offsets, first, best, second, number)
            clear = best - tiles.margin(tile, best, reach) > second
            found[start : start + rows] = number.long().where(clear, -1)
    unclear = (found < 0).nonzero().squeeze(1)
    if len(unclear):
        found[unclear] = tiles.tiled(x[unclear], codebook)
    return found


def _scan(scores: Tensor, offsets: Tensor, first: int, best: Tensor, second: Tensor, number: Tensor) -> None:
    """Take the `scores` (k, n) of the codes from `first` on into what is known of n tokens."""
    k, stride = len(scores), scores.stride(0)

    def run(start: int, count: int) -> None:
        tokens = (t.data_ptr() + 4 * start for t in (best, second, number))
        tile, offset = scores.data_ptr() + 4 * start, offsets.data_ptr() + 4 * first
        _library().scan(*map(_argument, (tile, offset, k, stride, count, first, *tokens)))

    _spread(run, len(best), k)


def soften(scores: Tensor) -> Tensor:
    """As `entropies._soften`, for contiguous float32 on a CPU."""
    size, found = scores.shape[1], torch.empty(len(scores))

    def run(start: int, count: int) -> None:
        at = (scores.data_ptr() + 4 * start * size, count, size, found.data_ptr() + 4 * start)
        _library().soften(*map(_argument, at))

    _spread(run, len(scores), size)
    return found


def soften_backward(scores: Tensor, of_mixture: Tensor, of_total: Tensor, weights: Tensor) -> None:
    """As `entropies._soften_backward`, for contiguous float32 on a CPU."""
    size, slope = scores.shape[1], ctypes.c_float(of_total.item())
    of_mixture, weights = of_mixture.contiguous(), weights.contiguous()

    def run(start: int, count: int) -> None:
        at = (scores.data_ptr() + 4 * start * size, count, size, of_mixture.data_ptr(), weights.data_ptr() + 4 * start)
        _library().soften_backward(*map(_argument, at), slope)

    _spread(run, len(scores), size)


def exponentiate(scores: Tensor) -> tuple[Tensor, Tensor]:
    """As `vocabulary.Head.exponentiate`, for contiguous float32 on a CPU."""
    size = scores.shape[1]
    tops, masses = torch.empty(2, len(scores))

    def run(start: int, count: int) -> None:
        found = (t.data_ptr() + 4 * start for t in (tops, masses))
        _library().exponentiate(*map(_argument, (scores.data_ptr() + 4 * start * size, count, size, *found)))

    _spread(run, len(scores), size)
    return tops, masses


def to_lattice(z: Tensor, lattice: Lattice) -> tuple[Tensor, Tensor]:
    """Latents (..., d) in the type of `z` (..., d), and codes (..., factors) int64."""
    if not _serves(z):
        return portable.to_lattice(z, lattice)
    if z.dtype != torch.float32:
        latents, codes = to_lattice(z.float(), lattice)
        return latents.to(z.dtype), codes
    z, place = dense(z)
    outer, dim, inner = planes(z, place).shape
    latents = empty_like(z)
    codes = torch.empty(*z.shape[:-1], lattice.factors, dtype=torch.int64)
    table, stride, basis, small = _table(lattice, inner == 1)
    tail = (table.data_ptr(), *([stride] if inner == 1 else []), lattice.factors, basis.data_ptr(), small)

    def run(start: int, count: int) -> None:
        numbers, tokens = start * dim * inner, start * inner * lattice.factors
        at = (z.data_ptr() + 4 * numbers, latents.data_ptr() + 4 * numbers, codes.data_ptr() + 8 * tokens)
        shape = (count, dim) if inner == 1 else (count, dim, inner)
        forward = _library().tokens_forward if inner == 1 else _library().planes_forward
        forward(*map(_argument, (*at, *shape, *tail)), ctypes.c_float(lattice.alpha), _clamps(lattice))

    _spread(run, outer, dim * inner)
    return latents, codes


def to_lattice_backward(gradient: Tensor, z: Tensor, lattice: Lattice) -> Tensor:
    """The gradient for `z` (..., d), in its type, of that for its latents (..., d)."""
    if not _serves(z):
        return portable.to_lattice_backward(gradient, z, lattice)
    if z.dtype != torch.float32:
        return to_lattice_backward(gradient.float(), z.float(), lattice).to(z.dtype)
    z, place = dense(z)
    outer, dim, inner = planes(z, place).shape
    gradient, out = alike(gradient, z), empty_like(z)
    table, stride, *_ = _table(lattice, inner == 1)

    def run(start: int, count: int) -> None:
        at = [t.data_ptr() + 4 * start * dim * inner for t in (gradient, z, out)]
        shape = (count * dim,) if inner == 1 else (count, dim, inner)
        tail = (table.data_ptr(), stride) if inner == 1 else (table.data_ptr(),)
        backward = _library().tokens_backward if inner == 1 else _library().planes_backward
        backward(*map(_argument, (*at, *shape, *tail)), ctypes.c_float(lattice.alpha), _clamps(lattice))

    _spread(run, outer, dim * inner)
    return out


def to_lattices(z: Tensor, lattice: Lattice, depth: int) -> tuple[Tensor, Tensor]:
    """Latents (..., d) in the type of `z` (..., d), and codes (..., depth * factors) int64."""
    dim = z.shape[-1]
    if not _serves(z):
        return stages.to_lattices(z, lattice, depth)
    tokens = z.reshape(-1, dim).float().contiguous()
    latents, codes = torch.empty_like(tokens), torch.empty(len(tokens), depth * lattice.factors, dtype=torch.int64)
    table, stride, sizes, basis = _groups(lattice, depth)
    tail = (dim, table.data_ptr(), stride, sizes.data_ptr(), len(sizes), depth, lattice.factors, basis.data_ptr())

    def run(start: int, count: int) -> None:
        at = (z_at + 4 * start * dim, latents_at + 4 * start * dim, codes_at + 8 * start * codes.shape[1])
        _library().stages_forward(*map(_argument, (*at, count, *tail)))

    z_at, latents_at, codes_at = (t.data_ptr() for t in (tokens, latents, codes))
    _spread(run, len(tokens), dim)
    if not math.isfinite(tokens.sum().item()):
        broken = ~tokens.isfinite().all(dim=1)
        latents[broken], codes[broken] = torch.nan, -1
    return latents.to(z.dtype).view(z.shape), codes.view(*z.shape[:-1], -1)


to_lattices_backward = stages.to_lattices_backward


def available() -> bool:
    """Whether the library was compiled, and is that of this version."""
    return _library() is not None


def _serves(z: Tensor) -> bool:
    return z.shape[-1] <= CHANNELS and z.numel() > 0


def _argument(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)  # addresses as well: all arguments but `alpha` are 64 bits wide


def _clamps(lattice: Lattice) -> ctypes.c_int64:
    return ctypes.c_int64(lattice.bound == "clamp")


def _spread(run: Callable[[int, int], None], outer: int, numbers: int) -> None:
    """`run(start, count)` over all of `outer` parts of so many `numbers` each, on PyTorch's number of threads."""
    threads = min(torch.get_num_threads(), outer, max(1, outer * numbers // GRAIN))
    if threads == 1:
        run(0, outer)
        return
    step = -(-outer // threads)
    starts = range(0, outer, step)
    list(_pool(torch.get_num_threads()).map(run, starts, [min(step, outer - start) for start in starts]))


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "latticode")


@functools.lru_cache(maxsize=256)
def _table(lattice: Lattice, tokens: bool) -> tuple[Tensor, int, Tensor, bool]:
    """The constants of each column as native.c orders them and the length of their rows; the basis of the indices, and
    whether float32 holds these."""
    with torch.inference_mode(False):
        c = lattice.channels(torch.device("cpu"))
        steep = 1 if lattice.bound == "clamp" else 2  # tanh x = 2 sigmoid(2 x) - 1
        scale, offset = steep * c.gain, c.base + c.zero - (steep - 1) * c.gain
        slope = steep**2 * lattice.alpha * c.gain / c.width
        clear = 0.5 - MARGIN * (c.top + 1)
        rows = [steep * c.shift, scale, offset, slope, c.shift, c.gain, c.base, c.zero, c.top, c.width, clear]
        table = torch.stack(rows)
        if tokens:
            table = table.repeat(1, max(1, ROW // len(lattice.levels)))
        basis = torch.tensor(lattice.basis, dtype=torch.int64)
        return table.contiguous(), table.shape[1], basis, max(lattice.vocab) <= portable.EXACT


@functools.lru_cache(maxsize=256)
def _groups(lattice: Lattice, depth: int) -> tuple[Tensor, int, Tensor, Tensor]:
    """The constants of `stages.groups` as native.c orders them, the length of their rows, the sizes of the groups, the
    basis of the indices."""
    with torch.inference_mode(False):
        repeat = max(1, ROW // len(lattice.levels))
        found = stages.groups(lattice, depth, repeat=repeat)
        table = torch.cat([torch.stack([*group[:5], *group.shrink]) for group in found])
        sizes = torch.tensor(stages.sizes(lattice, depth), dtype=torch.int64)
        return table, table.shape[1], sizes, torch.tensor(lattice.basis, dtype=torch.int64)


@functools.cache
def _library() -> Any:
    """The loaded library, or None."""
    try:
        library = ctypes.CDLL(str(Path(__file__).with_name(FILE)))
        return library if library.latticode_native_version() == VERSION else None
    except (OSError, AttributeError):  # not compiled, or for another machine, or by an older version
        return None
