"""Entropies of soft codes: probabilities exist for one tile of tokens at a time, and once more in the backward pass.

A tokens x codes matrix never exists, and no operation saves more than its inputs for the backward pass. Two families:

- LFQ and BSQ: the distribution of a token over its 2^D codes is a product of D independent bits. Its entropy is the sum
  of the bits' entropies. The sum of many such products needs no enumeration per token either: with the bits cut into
  two halves, a token's distribution is the outer product of its halves' (2^(D/2) numbers each), and the sum of outer
  products over tokens is one matrix product.
- VQ: softmax over codes of the negative squared distance, of few tokens at a time.

The halves are products of sigmoid(l) and sigmoid(-l), both of which float32 holds to their last digit however small
they are, so there is nothing to clamp; exp of a sum of 18 logarithms near -80 would be off by 1e-5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library

from latticode.kernels import native, reference
from latticode.kernels.tiles import full_float32

CPU_TILE = 2**18  # numbers of the largest temporary, if that is `LEAST` tokens or more
GPU_TILE = 2**25
LEAST = 32  # tokens per tile: below, reading the codes again for each tile would cost the most


@library.custom_op("latticode::bernoulli_entropy", mutates_args=(), schema="(Tensor logits) -> Tensor")
def bernoulli_entropy(logits: Tensor) -> Tensor:
    """Of each row of `logits` (N, D), the entropy of D independent bits with P(bit) = sigmoid(logit), in nats: (N,)."""
    size, sure = _bounded(logits.abs())
    # softplus(l) - l sigmoid(l) without the cancellation: both terms are positive.
    return (torch.log1p(torch.exp(-size)) + size * torch.sigmoid(-size)).masked_fill_(sure, 0.0).sum(dim=-1)


@library.register_fake("latticode::bernoulli_entropy")
def _(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0])


def _second(values: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of `inputs`, where these are differentiated again: `values` are the specification's."""
    some = [one for one in inputs if one.requires_grad]
    found = iter(torch.autograd.grad(values, some, gradients, create_graph=True))
    return [next(found) if one.requires_grad else None for one in inputs]


def _entropy_gradient(ctx: Any, gradient: Tensor) -> Tensor:
    (logits,) = ctx.saved_tensors
    size, sure = _bounded(logits.abs())
    slope = size * torch.sigmoid(size) * torch.sigmoid(-size)
    return -torch.copysign(slope, logits).masked_fill(sure, 0.0) * gradient[:, None]


def _bounded(size: Tensor) -> tuple[Tensor, Tensor]:
    """Absolute logits cut off before exp(-size) underflows, which takes ten times as long, and where they were cut."""
    limit = -math.log(torch.finfo(size.dtype).tiny) - 1
    return size.clamp(max=limit), size >= limit


def entropy(p: Tensor) -> Tensor:
    """-sum p ln p of `p` (K,) in nats, a scalar; 0 ln 0 = 0, and probabilities of 0 get no gradient."""
    some = torch.where(p >= torch.finfo(p.dtype).tiny, p, 1.0)  # below, 1 / p would be infinite
    return -(some * some.log()).sum()


def _half(p: Tensor, q: Tensor) -> list[Tensor]:
    """The distributions over the first 0, 1, .. m of m bits with probabilities `p` (m, n) of 1 and `q` of 0.

    Shapes (1, n), (2, n), .. (2^m, n), the first bit fastest. Tokens run along the rows: every operation is vectorised.
    """
    levels = [p.new_ones(1, p.shape[1])]
    for one, zero in zip(p, q, strict=True):
        longer = p.new_empty(2, *levels[-1].shape)
        torch.mul(levels[-1], zero, out=longer[0])
        torch.mul(levels[-1], one, out=longer[1])
        levels.append(longer.flatten(0, 1))
    return levels


def _half_backward(gradient: Tensor, levels: list[Tensor], p: Tensor) -> Tensor:
    """From the gradient (2^m, n) of the last of `levels` that of `p` (m, n), with q = 1 - p.

    The gradient of a bit is a difference of what its two values lead to, averaged over the other bits; no large numbers
    cancel, as they would in sum(bit * x) - p sum(x).
    """
    found = torch.empty_like(p)
    for i in reversed(range(len(p))):
        zero, one = gradient.view(2, *levels[i].shape)
        step = one - zero
        gradient = torch.addcmul(zero, step, p[i])
        torch.sum(step.mul_(levels[i]), dim=0, out=found[i])
    return found


def _bit_tiles(logits: Tensor, weights: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Of a few tokens each: their slice, p (D, n), q (D, n), weights (n,)."""
    width = 2 ** ((logits.shape[1] + 1) // 2)
    step = tile_rows(logits, width)
    for start in range(0, len(logits), step):
        some = slice(start, start + step)
        bits = logits[some].t().masked_fill(weights[some] == 0, 0.0)
        yield some, torch.sigmoid(bits), torch.sigmoid(-bits), weights[some]


def tile_rows(x: Tensor, width: int) -> int:
    """How many rows of `width` numbers a temporary on the device of `x` should have: few enough for a CPU's caches."""
    return max(LEAST, (CPU_TILE if x.device.type == "cpu" else GPU_TILE) // width)


@library.custom_op("latticode::bernoulli_mixture", mutates_args=(), schema="(Tensor logits, Tensor weights) -> Tensor")
def bernoulli_mixture(logits: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights_n P_n (2^D,) of products P_n of D bits with `logits` (N, D); code sum_i 2^i [bit_i = 1]."""
    dim = logits.shape[1]
    low = (dim + 1) // 2
    mixture = logits.new_zeros(2 ** (dim - low), 2**low)
    with torch.autocast(logits.device.type, enabled=False), full_float32():
        for _, p, q, weight in _bit_tiles(logits, weights):
            lower, upper = _half(p[:low], q[:low])[-1], _half(p[low:], q[low:])[-1]
            mixture.addmm_(upper, (lower * weight).t())
    return mixture.flatten()


@library.custom_op(
    "latticode::bernoulli_mixture_backward",
    mutates_args=(),
    schema="(Tensor gradient, Tensor logits, Tensor weights) -> Tensor",
)
def _bernoulli_mixture_backward(gradient: Tensor, logits: Tensor, weights: Tensor) -> Tensor:
    dim = logits.shape[1]
    low = (dim + 1) // 2
    # A constant has no effect on bits, since probabilities sum to 1, but would cost the matrix products their digits.
    gradient = gradient.reshape(2 ** (dim - low), 2**low) - gradient.mean()
    of_logits = torch.empty_like(logits)
    with torch.autocast(logits.device.type, enabled=False), full_float32():
        for some, p, q, weight in _bit_tiles(logits, weights):
            lower, upper = _half(p[:low], q[:low]), _half(p[low:], q[low:])
            first = _half_backward(gradient.t() @ upper[-1], lower, p[:low])
            second = _half_backward(gradient @ lower[-1], upper, p[low:])
            of_logits[some] = (torch.cat([first, second]) * p * q * weight).t()
    return of_logits


@library.register_fake("latticode::bernoulli_mixture")
def _(logits: Tensor, weights: Tensor) -> Tensor:
    return logits.new_empty(2 ** logits.shape[1])


@library.register_fake("latticode::bernoulli_mixture_backward")
def _(gradient: Tensor, logits: Tensor, weights: Tensor) -> Tensor:
    return torch.empty_like(logits)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.numbers = [value for value in inputs if not isinstance(value, Tensor)]


def _mixture_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
    if torch.is_grad_enabled():
        mixture = reference.bernoulli_mixture(*ctx.saved_tensors)
        return _second([mixture], ctx.saved_tensors[:1], [gradient.to(mixture)])[0], None
    return _bernoulli_mixture_backward(gradient, *ctx.saved_tensors), None


library.register_autograd("latticode::bernoulli_entropy", _entropy_gradient, setup_context=_save)
library.register_autograd("latticode::bernoulli_mixture", _mixture_gradient, setup_context=_save)


_TOKENS = "Tensor x, Tensor codebook, Tensor weights, float temperature, bool compiled=False"


@library.custom_op("latticode::soft_assignment", mutates_args=(), schema=f"({_TOKENS}) -> (Tensor, Tensor)")
def soft_assignment(
    x: Tensor, codebook: Tensor, weights: Tensor, temperature: float, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """sum_n w_n H(p_n) and sum_n w_n p_n (K,), for p_n the softmax over codes of -|x_n - c|^2 / `temperature`.

    `compiled` takes the functions of `native` where they serve.
    """
    total, mixture = x.new_zeros(()), x.new_zeros(len(codebook))
    soften = native.soften if compiled and _serves(x) else _soften
    with torch.autocast(x.device.type, enabled=False), full_float32():
        for _, _, weight, scores in _soft_tiles(x, *_centred(codebook), weights, temperature):
            total += weight.dot(soften(scores))
            mixture.addmv_(scores.t(), weight)
    return total, mixture


@library.custom_op(
    "latticode::soft_assignment_backward",
    mutates_args=(),
    schema=f"(Tensor of_total, Tensor of_mixture, {_TOKENS}) -> (Tensor, Tensor)",
)
def _soft_assignment_backward(
    of_total: Tensor,
    of_mixture: Tensor,
    x: Tensor,
    codebook: Tensor,
    weights: Tensor,
    temperature: float,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    codes, centre = _centred(codebook)
    of_x, of_codes = torch.empty_like(x), x.new_zeros(len(codes) + 1, codes.shape[1])
    soften_backward = native.soften_backward if compiled and _serves(x) else _soften_backward
    with torch.autocast(x.device.type, enabled=False), full_float32():
        for some, tile, weight, scores in _soft_tiles(x, codes, centre, weights, temperature):
            soften_backward(scores, of_mixture, of_total, weight)
            of_x[some] = scores @ codes.t()
            of_codes.addmm_(F.pad(tile, (0, 1), value=1.0).t(), scores)  # and the sum over tokens below it
    return of_x.mul_(2 / temperature), (of_codes[:-1] - of_codes[-1] * codes).mul_(2 / temperature).t().contiguous()


def _serves(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32


def _soften(scores: Tensor) -> Tensor:
    """Turns each row of `scores` (n, K) into its softmax and returns its entropy (n,) in nats."""
    log_p = _log_softmax(scores)
    torch.exp(log_p, out=scores)
    return -log_p.mul_(scores).sum(dim=1)


def _soften_backward(scores: Tensor, of_mixture: Tensor, of_total: Tensor, weights: Tensor) -> None:
    """Turns `scores` (n, K) into the gradient for them of `weights` (n,) times entropies and softmax.

    dH/ds_k = -p_k (ln p_k + H), and p.g has the gradient p_k (g_k - p.g).
    """
    log_p = _log_softmax(scores)
    p = torch.exp(log_p, out=scores)
    value = log_p.mul_(-of_total).add_(of_mixture)  # what the objective gains per unit of each probability
    p.mul_(value.sub_(torch.linalg.vecdot(p, value)[:, None])).mul_(weights[:, None])


def _log_softmax(scores: Tensor) -> Tensor:
    """Arithmetic that underflows takes ten times as long. Half of the exponents are left for products with p."""
    return scores.log_softmax(dim=1).clamp_(min=math.log(torch.finfo(scores.dtype).tiny) / 2)


def _centred(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (d, K) as seen from their middle (d,), so that a common offset costs no digits; distances do not depend on
    it. Channels first, products of so few of them with so many codes take a third of the time."""
    centre = codebook.mean(dim=0)
    return (codebook - centre).t().contiguous(), centre


def _soft_tiles(
    x: Tensor, codes: Tensor, centre: Tensor, weights: Tensor, temperature: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Of a few tokens each: their slice, centred vectors (n, d), weights (n,), scores (n, K), the logits of p."""
    scaled, offsets = codes * (2 / temperature), codes.square().sum(dim=0) / -temperature
    step = tile_rows(x, codes.shape[1])
    for start in range(0, len(x), step):
        some = slice(start, start + step)
        tile = (x[some] - centre).masked_fill_(weights[some, None] == 0, 0.0)
        yield some, tile, weights[some], torch.addmm(offsets, tile, scaled)


@library.register_fake("latticode::soft_assignment")
def _(x: Tensor, codebook: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(()), x.new_empty(codebook.shape[0])


@library.register_fake("latticode::soft_assignment_backward")
def _(of_total: Tensor, of_mixture: Tensor, x: Tensor, codebook: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(codebook)


def _soft_gradient(ctx: Any, of_total: Tensor, of_mixture: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        values = reference.soft_assignment(*ctx.saved_tensors, temperature=ctx.numbers[0])
        of_values = [one.to(values[0]) for one in (of_total, of_mixture)]
        return *_second(values, ctx.saved_tensors[:2], of_values), None, None, None
    of_inputs = _soft_assignment_backward(of_total, of_mixture, *ctx.saved_tensors, *ctx.numbers)
    return *of_inputs, None, None, None


library.register_autograd("latticode::soft_assignment", _soft_gradient, setup_context=_save)
