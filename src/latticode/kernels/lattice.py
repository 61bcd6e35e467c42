"""Finite scalar quantization on a CPU: a dozen vectorised passes over blocks that stay in a core's cache.

A pass over a cached block costs a tenth of what its first reading from memory does, so what counts is that each pass is
vectorised. Three obstacles:

- Constants per channel. Nothing vectorises over a last axis of 4, so a row holds many tokens and the constants are
  tiled to match. In image layout a row is one channel, and its constant a scalar.
- tanh costs six times what sigmoid does. 2 sigmoid(2x) - 1 is the same function but for some units in the last place.
  So each row remembers how close to an edge any of its positions came, and rows within `MARGIN`, a few in 10,000, are
  done again by the exact formula: the result is that of `reference` bit for bit, in every layout and place of a batch.
- An index sums along the channels: as a matrix-vector product, exact in float32 below 2^24. Runs of levels with larger
  products are cut in parts, which are joined in int64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from latticode.kernels.grid import Channels, Lattice, digits, values
from latticode.kernels.tiles import full_float32

BLOCK = 2**18  # numbers per block and thread: enough to hide the calls, few enough for a cache
ROW = 256  # least length of a row of whole tokens
PLANE = 64  # least length of a row of one channel
LINE = 512  # greatest length of what is done again for one number, where such a length divides the row
LANES = 64  # a multiple of the width of every vector unit
GRAIN = 32768  # PyTorch gives each thread at least so many numbers
MARGIN = 5e-7  # bounds the error of a position, per level: 1.8e-7 of sigmoid, the rest of rounding here and in `grid`
EXACT = 2**24  # float32 holds all integers up to here
ABOVE_ONE = 1 + 2**-23


def to_lattice(z: Tensor, lattice: Lattice) -> tuple[Tensor, Tensor]:
    """Latents (..., d) in the type of `z` (..., d), and codes (..., factors) int64."""
    z, place = dense(z)
    latents = empty_like(z)
    codes = torch.empty(*z.shape[:-1], lattice.factors, dtype=torch.int64)
    if z.numel():
        source = planes(z, place)
        indices = codes.view(len(source), source.shape[2], lattice.factors)
        with full_float32():
            for sheet in _sheets([source, planes(latents, place)], [indices], lattice):
                _quantize(sheet, lattice)
    return latents, codes


def to_lattice_backward(gradient: Tensor, z: Tensor, lattice: Lattice) -> Tensor:
    """The gradient for `z` (..., d), in its type, of that for its latents (..., d)."""
    z, place = dense(z)
    out = empty_like(z)
    gradient = alike(gradient, z)
    if z.numel():
        for sheet in _sheets([planes(t, place) for t in (gradient, z, out)], [], lattice):
            _differentiate(sheet, lattice)
    return out


def dense(z: Tensor) -> tuple[Tensor, int]:
    """`z` (..., d), or a copy without gaps, and where among its axes the channels stand in memory."""
    for place in (z.ndim - 1, *range(z.ndim - 1)):
        if z.movedim(-1, place).is_contiguous():
            return z, place
    return z.contiguous(), z.ndim - 1


def planes(t: Tensor, place: int) -> Tensor:
    """A view (outer, d, inner) of `t` (..., d), whose channels stand at `place` in memory."""
    moved = t.movedim(-1, place)
    return moved.view(math.prod(moved.shape[:place]), t.shape[-1], math.prod(moved.shape[place + 1 :]))


def empty_like(z: Tensor, device: str | None = None) -> Tensor:
    """Room for a tensor in the memory layout of `z`; channels last where axes of length 1 leave that open."""
    layout = torch.contiguous_format if z.is_contiguous() else torch.preserve_format
    return torch.empty_like(z, memory_format=layout, device=device)


def alike(t: Tensor, z: Tensor) -> Tensor:
    """`t`, or a copy, in the memory layout of `empty_like(z)`."""
    return t if t.stride() == empty_like(z, device="meta").stride() else empty_like(z).copy_(t)


class Tiles(NamedTuple):
    """Constants for the columns of a sheet, float32: (1, c) where a row holds whole tokens, (d, 1) where a channel.

    Examples:
        >>> tiles = _tiles(Lattice((5, 3)), inner=1, repeat=4)  # rows of 4 tokens of 2 channels
        >>> tiles.scale.shape, tiles.exact.top
        (torch.Size([1, 8]), tensor([[4., 2., 4., 2., 4., 2., 4., 2.]]))
    """

    exact: Channels
    lean: Tensor  # the position is scale s + offset, for s = sigmoid(rate z + lean) or the clamp of that
    scale: Tensor
    offset: Tensor
    slope: Tensor  # of the latent: times s (1 - s), or where the clamp lets a gradient pass


@functools.lru_cache(maxsize=256)
def _tiles(lattice: Lattice, inner: int, repeat: int) -> Tiles:
    """For rows of `repeat` tokens of d channels of `inner` numbers, or of one channel if `repeat` is 0."""
    with torch.inference_mode(False):
        c = lattice.channels(torch.device("cpu"))
        steep = 1 if lattice.bound == "clamp" else 2  # tanh x = 2 sigmoid(2 x) - 1
        offset = c.base + c.zero - (steep - 1) * c.gain
        rows = torch.stack([*c, steep * c.shift, steep * c.gain, offset, steep**2 * lattice.alpha * c.gain / c.width])
        tiles = rows.repeat_interleave(inner, dim=1).repeat(1, repeat)[:, None] if repeat else rows[:, :, None]
        return Tiles(Channels(*tiles[: len(c)].unbind()), *tiles[len(c) :].unbind())


class Sheet(NamedTuple):
    """Rows of one kind: long enough to vectorise, whole tokens (rows, 1, long) or one channel each (rows, d, long).

    Examples:
        >>> z, codes = torch.zeros(2, 2, 100), torch.zeros(2, 100, 1)  # two images of 100 positions, channels first
        >>> [sheet] = _sheets([z], [codes], Lattice((5, 3)))
        >>> sheet.planes[0].shape, sheet.tiles.scale.shape
        (torch.Size([2, 2, 100]), torch.Size([2, 1]))
    """

    planes: list[Tensor]  # (rows, 1 or d, long)
    codes: list[Tensor]  # (rows, tokens of a row, factors)
    tiles: Tiles
    group: int  # numbers of one channel that lie side by side, 0 for all
    line: int  # divides long

    def cut(self, t: Tensor, axis: int = 2) -> list[Tensor]:
        """Blocks of rows and columns of `t`, whose `axis` runs along the rows."""
        *_, channels, long = self.planes[0].shape
        size = BLOCK * torch.get_num_threads()
        step, run = max(1, size // (channels * long)), max(1, size // (channels * self.line)) * self.line
        if len(t) <= step and long <= run:
            return [t]
        return [part for rows in t.split(step) for part in rows.split(run * t.shape[axis] // long, axis)]

    def by_token(self, digit: Tensor, lattice: Lattice) -> Tensor:
        """Digits (b, c, n) as (tokens, d, group)."""
        return digit.view(-1, len(lattice.levels), self.group or digit.shape[2])


def _sheets(planes: list[Tensor], codes: list[Tensor], lattice: Lattice) -> Iterator[Sheet]:
    """All of `planes` (outer, d, inner) and `codes` (outer, inner, factors)."""
    outer, dim, inner = planes[0].shape
    if inner >= PLANE:
        line = next((n for n in range(LINE, PLANE - 1, -1) if inner % n == 0), inner)
        yield Sheet(planes, codes, _tiles(lattice, 1, 0), 0, line)
        return
    repeat = max(1, ROW // (dim * inner))
    whole = outer // repeat * repeat
    for first, last, tokens in ((0, whole, repeat), (whole, outer, outer - whole)):
        if first < last:
            long = tokens * dim * inner
            sheets = [p[first:last].view(-1, 1, long) for p in planes]
            indices = [c[first:last].view(-1, tokens * inner, lattice.factors) for c in codes]
            yield Sheet(sheets, indices, _tiles(lattice, inner, tokens), inner, long)


def _quantize(sheet: Sheet, lattice: Lattice) -> None:
    """Fill the second of the planes and the codes from the first."""
    (z, latents), (codes,), tiles = sheet.planes, sheet.codes, sheet.tiles
    rate = lattice.alpha if lattice.bound == "clamp" else lattice.slope
    worst = torch.empty(*z.shape[:2], z.shape[2] // sheet.line)  # how near any position of a line is to an edge
    buffers = _buffers(sheet)
    blocks = zip(sheet.cut(z), sheet.cut(latents), sheet.cut(codes, axis=1), sheet.cut(worst), strict=True)
    for part, out, index, far in blocks:
        position, digit = (b[: part.numel()].view(part.shape) for b in buffers)
        digit = out if out.dtype == torch.float32 else digit
        torch.add(tiles.lean, part.float(), alpha=rate, out=position)
        position = position.clamp_(-1.0, 1.0) if lattice.bound == "clamp" else position.sigmoid_()
        position.mul_(tiles.scale).add_(tiles.offset)
        if lattice.bound == "equal-bins":  # else saturated channels lie on the outermost edges
            torch.minimum(position.clamp_(min=0.0), tiles.exact.top, out=position)
        torch.round(position, out=digit)
        torch.amax(position.sub_(digit).abs_().view(*far.shape, -1), dim=3, out=far)
        _index(sheet.by_token(digit, lattice), index.view(-1, sheet.group or index.shape[1], lattice.factors), lattice)
        torch.div(digit.sub_(tiles.exact.width), tiles.exact.width, out=out)
    edge = 0.5 - MARGIN * max(lattice.levels)
    if not worst.amax().item() < edge:  # true with a NaN, too
        _decide(sheet, (~(worst.amax(dim=1) < edge)).nonzero(), lattice)


def _decide(sheet: Sheet, lines: Tensor, lattice: Lattice) -> None:
    """Do the `lines` (n, 2), given by row and place along it, again by the exact formula."""
    (z, latents), (codes,), c = sheet.planes, sheet.codes, sheet.tiles.exact
    tokens = codes.shape[1] * sheet.line // z.shape[2]
    for some in lines.split(max(1, BLOCK // (z.shape[1] * sheet.line))):
        at, place = some.unbind(dim=1)
        digit = digits(lattice.position(z.unflatten(2, (-1, sheet.line))[at, :, place], c), c)
        latents.unflatten(2, (-1, sheet.line))[at, :, place] = values(digit, c.width).to(latents.dtype)
        index = codes.new_empty(len(some), tokens, lattice.factors)
        by_token = sheet.by_token(digit, lattice)
        broken = by_token.isnan().any(dim=1)[..., None]
        by_group = index.view(*broken.shape[:2], lattice.factors)
        _index(by_token, by_group, lattice)
        by_group.masked_fill_(broken, -1)
        codes.unflatten(1, (-1, tokens))[at, place] = index


def _index(digit: Tensor, codes: Tensor, lattice: Lattice) -> None:
    """The codes (n, m, factors) of digits (n, d, m); those of a NaN are of no meaning."""
    for factor, start, stop, basis, step in _parts(lattice):
        some = digit[:, start:stop]
        if digit.shape[2] == 1:
            index = torch.mv(some[..., 0], basis)[:, None]
        else:
            index = some[:, 0]
            for i in range(1, stop - start):
                index = torch.add(index, some[:, i], alpha=basis[i].item())
        if step == 1:
            codes[..., factor].copy_(index)
        else:
            codes[..., factor].add_(index.long(), alpha=step)


@functools.lru_cache(maxsize=256)
def _parts(lattice: Lattice) -> list[tuple[int, int, int, Tensor, int]]:
    """factor, first and last channel, basis, what its index counts for: parts with products of levels up to 2^24."""
    parts, start = [], 0
    for factor, run in enumerate(lattice.runs):
        step = 1
        while run:
            length = max(n for n in range(1, len(run) + 1) if math.prod(run[:n]) <= EXACT)
            with torch.inference_mode(False):
                basis = torch.tensor([math.prod(run[:i]) for i in range(length)], dtype=torch.float32)
            parts.append((factor, start, start + length, basis, step))
            step, start, run = step * math.prod(run[:length]), start + length, run[length:]
    return parts


def _differentiate(sheet: Sheet, lattice: Lattice) -> None:
    """Fill the third of the planes from the first, the gradient of the latents, and the second, z."""
    buffers = _buffers(sheet)
    for above, part, out in zip(*(sheet.cut(p) for p in sheet.planes), strict=True):
        source, product = (b[: part.numel()].view(part.shape) for b in buffers)
        product = out if out.dtype == torch.float32 else product
        above = above.float()
        if lattice.bound == "clamp":
            torch.mul(part.float(), lattice.alpha, out=source).mul_(torch.sign(above, out=product))
            torch.ops.aten.threshold_backward(above, source, -ABOVE_ONE, grad_input=product)  # inside, or leads back
        else:
            torch.add(sheet.tiles.lean, part.float(), alpha=lattice.slope, out=source)
            _whole(buffers[0], part.numel()).sigmoid_()
            torch.ops.aten.sigmoid_backward(above, source, grad_input=product)
        torch.mul(product, sheet.tiles.slope, out=out)
        if math.isnan(source.sum().item()):
            out.masked_fill_(part.isnan(), 0.0)


def _whole(buffer: Tensor, count: int) -> Tensor:
    """The first `count` numbers and as many more as let every thread fill its vectors.

    What is left over would go through another implementation, which differs in the last place.
    """
    unit = LANES * min(torch.get_num_threads(), -(-count // GRAIN))
    return buffer[: -(-count // unit) * unit]


def _buffers(sheet: Sheet) -> Tensor:
    """Two buffers (2, n) for a block and what fills the last vectors."""
    return torch.empty(2, sheet.cut(sheet.planes[0])[0].numel() + LANES * torch.get_num_threads())
