"""A linear head over many codes and its softmax, on a CPU: the logits exist for a few positions at a time.

Those of one block of codes become powers of e, relative to the block's largest, while they lie in the cache: the
product that makes them is then half as dear as that of whole rows of logits, which travels to memory and back. The
gradients and the draws read these powers once more. All is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from latticode.kernels import native

ROWS = 256  # positions at a time
BLOCK = 1024  # codes at a time, for each thread
LEAST = -43.0  # of logarithms, as in native.c: arithmetic that underflows takes ten times as long


def serves(x: Tensor, codes: int) -> bool:
    """Whether the logits of states `x` (M, D) for so many codes are worth it; else they fit a cache, or a GPU."""
    narrow = x.dtype != torch.float32 or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return x.device.type == "cpu" and not narrow and codes >= BLOCK and len(x) * codes > ROWS * BLOCK


class Powers(NamedTuple):
    """e^(logit - top) of m positions, of which each block of codes has its own top."""

    powers: Tensor  # (K, m, BLOCK), 0 behind the last code
    tops: Tensor  # (m, K)
    masses: Tensor  # (m, K): the sums of the powers

    def total(self) -> Tensor:
        """ln sum e^logit (m,)."""
        return (self.tops + self.masses.log()).logsumexp(1)


def tiles(x: Tensor, weight: Tensor, bias: Tensor, compiled: bool) -> Iterator[tuple[slice, Powers]]:
    """Of a few positions at a time of states `x` (M, D), which are, and their powers, good until the next."""
    width, rows = BLOCK * torch.get_num_threads(), min(ROWS, len(x))
    heads = list(zip(weight.split(width), bias.split(width), strict=True))
    room = torch.empty(len(heads), rows, width)
    room[-1, :, len(heads[-1][0]) :] = 0
    exponentiate = native.exponentiate if compiled else _exponentiate
    for start in range(0, len(x), rows):
        states = x[start : start + rows]
        found = []
        for powers, (w, b) in zip(room[:, : len(states)], heads, strict=True):
            found.append(exponentiate(torch.addmm(b, states, w.t(), out=powers[:, : len(w)])))
        tops, masses = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))
        yield slice(start, start + rows), Powers(room[:, : len(states)], tops, masses)


def _exponentiate(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Turns each row of `scores` (m, n) into its powers of e, relative to the largest: returns that (m,) and their sum
    (m,)."""
    tops = scores.amax(dim=1)
    return tops, scores.sub_(tops[:, None]).clamp_(min=LEAST).exp_().sum(dim=1)


def nats(x: Tensor, weight: Tensor, bias: Tensor, codes: Tensor, compiled: bool) -> Tensor:
    """-ln p (M,) of `codes` (M,), no gradient."""
    total = torch.cat([powers.total() for _, powers in tiles(x, weight, bias, compiled)])
    return total - _logits(x, weight, bias, codes)


def draw(x: Tensor, weight: Tensor, bias: Tensor, u: Tensor, compiled: bool) -> tuple[Tensor, Tensor]:
    """Codes (M,) from the softmax by inversion at `u` (M,), and the ln p of each (M,): first a block, then the code."""
    codes, log_p = torch.empty(len(x), dtype=torch.int64), torch.empty(len(x))
    for some, (powers, tops, masses) in tiles(x, weight, bias, compiled):
        shares = (tops + masses.log()).double().softmax(dim=1)
        block, rest = invert(shares, u[some].double())
        inside = powers[block, torch.arange(len(block))]
        at, _ = invert(inside, rest.float().clamp(max=1 - 2**-24))
        codes[some] = block * powers.shape[2] + at
        block, at = block[:, None], at[:, None]
        share = shares.gather(1, block).log().float() - masses.gather(1, block).log()
        log_p[some] = (share + inside.gather(1, at).log())[:, 0]
    return codes, log_p


def invert(masses: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The index (...,) of the one of `masses` (..., n) at the share `u` (...,) in [0, 1) of their sum, and how much of
    that one lies before u: uniform in [0, 1] again. A mass of 0 is never found; what is not finite gives some index.
    """
    cdf = masses.cumsum(-1)
    total = cdf[..., -1:]
    at = torch.minimum(u[..., None] * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(cdf, at, right=True).clamp(max=masses.shape[-1] - 1)
    rest = 1 - (cdf.gather(-1, found) - at) / masses.gather(-1, found)
    return found.squeeze(-1), rest.squeeze(-1).clamp(min=0.0)


def _logits(x: Tensor, weight: Tensor, bias: Tensor, codes: Tensor) -> Tensor:
    return (x * F.embedding(codes, weight)).sum(1) + bias[codes]


class CrossEntropy(torch.autograd.Function):
    """The mean of `nats`, with label smoothing s: H(k) = -ln p(k) makes it H(true) + s (l_true - mean l).

    The gradients are found at once, of what has one: a second look would have to make all powers again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, codes: Tensor, smoothing: float, compiled: bool
    ) -> Tensor:
        grads = [torch.zeros_like(t) for t in (x, weight, bias)] if any(ctx.needs_input_grad) else None
        totals = []
        for some, powers in tiles(x, weight, bias, compiled):
            totals.append(powers.total())
            if grads is not None:
                _descend(powers, totals[-1], x[some], weight, grads[0][some], *grads[1:])
        mean, sure = weight.mean(0), 1 - smoothing
        if grads is not None:  # so far of the sum of `totals`
            of_x, of_weight, of_bias = grads
            of_x.sub_(F.embedding(codes, weight), alpha=sure).sub_(mean, alpha=smoothing)
            of_weight.index_add_(0, codes, x, alpha=-sure).sub_(x.sum(0), alpha=smoothing / len(weight))
            of_bias.index_add_(0, codes, x.new_ones(len(x)), alpha=-sure).sub_(smoothing * len(x) / len(weight))
            ctx.save_for_backward(*(t.div_(len(x)) for t in grads))
        true, middle = _logits(x, weight, bias, codes), x @ mean + bias.mean()
        return (torch.cat(totals) - sure * true - smoothing * middle).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *(gradient * t for t in ctx.saved_tensors), None, None, None


def _descend(
    powers: Powers, total: Tensor, x: Tensor, weight: Tensor, of_x: Tensor, of_weight: Tensor, of_bias: Tensor
) -> None:
    """Adds the gradients of the sum of `total` (m,)."""
    width = powers.powers.shape[2]
    shares = (powers.tops - total[:, None]).exp().t().contiguous()  # p of each block's top
    parts = zip(*(t.split(width) for t in (weight, of_weight, of_bias)), shares, powers.powers, strict=True)
    for w, of_w, of_b, share, part in parts:
        part = part[:, : len(w)]
        of_x.addcmul_(part @ w, share[:, None])
        of_w.addmm_(part.t(), x * share[:, None])
        of_b.addmv_(part.t(), share)
