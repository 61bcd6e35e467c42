"""Nearest-neighbour search for CUDA in one launch: matrix product, greatest and second greatest score of each token.

The tile of scores never leaves the chip. The second greatest says whether float32 could tell: a token whose two best
lie within rounding error of each other, one in thousands, is searched again by the exact tiled path.

Never imported before a CUDA tensor comes by, since importing Triton takes time.
"""

# pyright: standard

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from latticode.kernels import tiles

TOKENS, CODES = 64, 64  # of one tile of scores, which lives in registers
CHANNELS = 32  # of one step of the matrix product


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """`nearest.tiled` for floats up to float32: (N,) int64, the same codes."""
    codebook = codebook.float()
    centre = codebook.mean(dim=0)
    codes, centred = codebook - centre, x.float() - centre
    codes, centred = codes.contiguous(), centred.contiguous()
    top, second, best = two_best(centred, codes, codes.square().sum(dim=1) / -2)
    sure = top - second > tiles.margin(centred, top, codes.norm(dim=1).amax())
    left = (~sure).nonzero().squeeze(1)
    if len(left):
        best[left] = tiles.tiled(x[left], codebook)
    return best


def two_best(x: Tensor, codes: Tensor, offsets: Tensor, precision: str = "ieee") -> tuple[Tensor, Tensor, Tensor]:
    """For each row of `x` (N, d) the two greatest x.c + offset over `codes` (K, d), (N,) each, and the first's place.

    All contiguous float32. `precision` is that of `tl.dot`; only "ieee" keeps to the bound of `tiles.margin`. With
    one code the second is -inf.
    """
    n, dim = x.shape
    top, second = x.new_empty(n), x.new_empty(n)
    place = torch.empty(n, dtype=torch.int64, device=x.device)
    if n:
        with torch.cuda.device_of(x):
            constants = {"TOKENS": TOKENS, "CODES": CODES, "CHANNELS": CHANNELS, "PRECISION": precision}
            _two_best[(triton.cdiv(n, TOKENS),)](x, codes, offsets, top, second, place, n, len(codes), dim, **constants)
    return top, second, place


@triton.jit
def _two_best(
    x,
    codes,
    offsets,
    top_out,
    second_out,
    place_out,
    n,
    size,
    dim,
    TOKENS: tl.constexpr,
    CODES: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # 64-bit rows and columns: n times dim may pass 2^31
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    top = tl.full((TOKENS,), float("-inf"), tl.float32)
    second = tl.full((TOKENS,), float("-inf"), tl.float32)
    place = tl.zeros((TOKENS,), tl.int64)
    lanes = tl.arange(0, CODES)
    for start in range(0, size, CODES):
        columns = start + lanes.to(tl.int64)
        scores = tl.zeros((TOKENS, CODES), tl.float32)
        for first in range(0, dim, CHANNELS):
            channels = first + tl.arange(0, CHANNELS)
            real = channels < dim
            part = tl.load(
                x + rows[:, None] * dim + channels[None, :], mask=(rows < n)[:, None] & real[None, :], other=0.0
            )
            near = tl.load(
                codes + columns[None, :] * dim + channels[:, None],
                mask=(columns < size)[None, :] & real[:, None],
                other=0.0,
            )
            scores = tl.dot(part, near, scores, input_precision=PRECISION)
        scores += tl.load(offsets + columns, mask=columns < size, other=float("-inf"))[None, :]
        scores = tl.where(scores == scores, scores, float("-inf"))  # NaN: then no code is sure to be the best
        here = tl.max(scores, axis=1)
        lane = tl.argmax(scores, axis=1)
        others = tl.max(tl.where(lanes[None, :] == lane[:, None], float("-inf"), scores), axis=1)
        second = tl.maximum(tl.maximum(second, others), tl.minimum(top, here))
        place = tl.where(here > top, start + lane, place)
        top = tl.maximum(top, here)
    tl.store(top_out + rows, top, mask=rows < n)
    tl.store(second_out + rows, second, mask=rows < n)
    tl.store(place_out + rows, place, mask=rows < n)
