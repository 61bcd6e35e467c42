"""Finite scalar quantization for CUDA: one launch forward and one backward, which touch each number once.

Never imported before a CUDA tensor comes by, since importing Triton takes time.
"""

# pyright: standard

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from latticode.kernels.grid import Lattice
from latticode.kernels.lattice import alike, dense, empty_like, planes

NUMBERS = 2048  # of one program
HALF_EVEN = tl.constexpr(1.5 * 2**23)  # adding it leaves float32 no place for a fraction: rounds half to even


def to_lattice(z: Tensor, lattice: Lattice) -> tuple[Tensor, Tensor]:
    """Latents (..., d) in the type of `z` (..., d), and codes (..., factors) int64; by float32 tanh."""
    z, place = dense(z)
    latents = empty_like(z)
    codes = torch.empty(*z.shape[:-1], lattice.factors, dtype=torch.int64, device=z.device)
    if z.numel():
        outer, dim, inner = planes(z, place).shape
        width = triton.next_power_of_2(dim)
        tokens = max(1, NUMBERS // width)
        constants, basis = _constants(lattice, z.device)
        options = {
            "FACTORS": lattice.factors,
            "RUN": dim // lattice.factors,
            "CLAMP": lattice.bound == "clamp",
            "TOKENS": tokens,
            "WIDTH": width,
        }
        count = outer * inner
        with torch.cuda.device_of(z):
            _quantize[(triton.cdiv(count, tokens),)](
                z, latents, codes, constants, basis, count, inner, lattice.alpha, dim, **options
            )
    return latents, codes


def to_lattice_backward(gradient: Tensor, z: Tensor, lattice: Lattice) -> Tensor:
    """The gradient for `z` (..., d), in its type, of that for its latents (..., d)."""
    z, place = dense(z)
    out, gradient = empty_like(z), alike(gradient, z)
    if z.numel():
        _, dim, inner = planes(z, place).shape
        constants, _ = _constants(lattice, z.device)
        options, count = {"CLAMP": lattice.bound == "clamp", "COUNT": NUMBERS}, z.numel()
        with torch.cuda.device_of(z):
            _differentiate[(triton.cdiv(count, NUMBERS),)](
                gradient, z, out, constants, count, inner, lattice.alpha, dim, **options
            )
    return out


@functools.lru_cache(maxsize=64)
def _constants(lattice: Lattice, device: torch.device) -> tuple[Tensor, Tensor]:
    """(7, d) float32: the rows of `Channels` and the latent's slope per 1 - a^2; and the basis (d,) int64."""
    with torch.inference_mode(False):
        c = lattice.channels(device)
        rows = torch.stack([*c, lattice.alpha * c.gain / c.width])
        return rows, torch.tensor(lattice.basis, dtype=torch.int64, device=device)


@triton.jit
def _activation(x, CLAMP: tl.constexpr):
    if CLAMP:
        return tl.minimum(tl.maximum(x, -1.0), 1.0)
    decay = tl.exp(-2.0 * tl.abs(x))  # in (0, 1]: never overflows
    size = (1.0 - decay) / (1.0 + decay)
    return tl.where(x < 0, -size, size)


@triton.jit
def _quantize(
    z,
    latents,
    codes,
    constants,
    basis,
    n,
    inner,
    alpha,
    dim,
    FACTORS: tl.constexpr,
    RUN: tl.constexpr,
    CLAMP: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # 64-bit places: n times dim may pass 2^31
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, WIDTH)
    real = channel < dim
    places = ((token // inner) * inner * dim + token % inner)[:, None] + (channel * inner).to(tl.int64)[None, :]
    mask = (token < n)[:, None] & real[None, :]
    shift = tl.load(constants + channel, mask=real, other=0.0)[None, :]
    gain = tl.load(constants + dim + channel, mask=real, other=0.0)[None, :]
    base = tl.load(constants + 2 * dim + channel, mask=real, other=0.0)[None, :]
    zero = tl.load(constants + 3 * dim + channel, mask=real, other=0.0)[None, :]
    top = tl.load(constants + 4 * dim + channel, mask=real, other=0.0)[None, :]
    width = tl.load(constants + 5 * dim + channel, mask=real, other=1.0)[None, :]
    step = tl.load(basis + channel, mask=real, other=0)[None, :]

    x = tl.load(z + places, mask=mask, other=0.0).to(tl.float32)
    broken = x != x
    position = _activation(tl.where(broken, 0.0, x) * alpha + shift, CLAMP) * gain + base
    digit = tl.minimum(tl.maximum((position + HALF_EVEN) - HALF_EVEN + zero, 0.0), top)
    value = tl.math.div_rn(digit - width, tl.broadcast_to(width, (TOKENS, WIDTH)))
    tl.store(latents + places, tl.where(broken, x, value).to(latents.dtype.element_ty), mask=mask)

    parts = digit.to(tl.int64) * step
    valid = tl.sum(broken.to(tl.int32), axis=1) == 0
    for factor in tl.static_range(FACTORS):  # type: ignore[reportGeneralTypeIssues]
        mine = (channel // RUN == factor)[None, :]
        index = tl.sum(tl.where(mine, parts, 0), axis=1)
        tl.store(codes + token * FACTORS + factor, tl.where(valid, index, -1), mask=token < n)


@triton.jit
def _differentiate(
    gradient,
    z,
    out,
    constants,
    count,
    inner,
    alpha,
    dim,
    CLAMP: tl.constexpr,
    COUNT: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * COUNT + tl.arange(0, COUNT)
    mask = places < count
    channel = (places // inner) % dim
    shift = tl.load(constants + channel, mask=mask, other=0.0)
    scale = tl.load(constants + 6 * dim + channel, mask=mask, other=0.0)
    x = tl.load(z + places, mask=mask, other=0.0).to(tl.float32)
    above = tl.load(gradient + places, mask=mask, other=0.0).to(tl.float32)
    moved = x * alpha + shift
    a = _activation(moved, CLAMP)
    passes = (tl.abs(moved) <= 1.0) | (above * moved > 0.0)  # inside, or leads back
    slope = passes.to(tl.float32) if CLAMP else 1.0 - a * a
    product = tl.where(x == x, above * (slope * scale), 0.0)
    tl.store(out + places, product.to(out.dtype.element_ty), mask=mask)
