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
    """e^(logit - top) of m positions, of which each of K blocks of codes has its own top.

    Examples:
        >>> head = Head(torch.randn(10, 4), torch.zeros(10), compiled=False)
        >>> x = torch.randn(3, 4)
        >>> [(some, powers)] = head.tiles(x)
        >>> torch.allclose(powers.total(), F.linear(x, head.weight, head.bias).logsumexp(1))
        True
    """

    powers: list[Tensor]  # K of (m, codes of the block), or none
    tops: Tensor  # (m, K)
    masses: Tensor  # (m, K): the sums of the powers

    @property
    def logs(self) -> Tensor:
        """ln of the sum of e^logit over each block (m, K)."""
        return self.tops + self.masses.log()

    def total(self) -> Tensor:
        """ln sum e^logit (m,)."""
        return self.logs.logsumexp(1)


class Head(NamedTuple):
    """What makes logits x W' + b of states: `weight` (C, D), `bias` (C,), and whether `native` does its part.

    Examples:
        >>> head, x = Head(torch.randn(10, 4), torch.zeros(10), compiled=False), torch.randn(3, 4)
        >>> codes = torch.tensor([0, 5, 9])
        >>> whole = F.cross_entropy(F.linear(x, head.weight, head.bias), codes, reduction="none")
        >>> torch.allclose(nats(x, head, codes), whole, atol=1e-5)
        True
    """

    weight: Tensor
    bias: Tensor
    compiled: bool

    def blocks(self) -> list[Head]:
        """The head cut into runs of codes whose logits stay in the cache, so many codes a thread."""
        width = BLOCK * torch.get_num_threads()
        parts = zip(self.weight.split(width), self.bias.split(width), strict=True)
        return [Head(*part, self.compiled) for part in parts]

    def exponentiated(self, x: Tensor, room: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The powers (m, C) of states `x` (m, D), in `room`; the tops (m,), the masses (m,)."""
        scores = room.view(-1)[: len(x) * len(self.weight)].view(len(x), -1)
        torch.addmm(self.bias, x, self.weight.t(), out=scores)
        return scores, *self.exponentiate(scores)

    def exponentiate(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Turns each row of `scores` (m, n) into its powers of e, relative to the largest: returns that (m,) and their
        sum (m,)."""
        if self.compiled:
            return native.exponentiate(scores)
        tops = scores.amax(dim=1)
        return tops, scores.sub_(tops[:, None]).clamp_(min=LEAST).exp_().sum(dim=1)

    def tiles(self, x: Tensor, keep: bool = False) -> Iterator[tuple[slice, Powers]]:
        """Of a few positions at a time of states `x` (M, D), which these are, and their powers, good until the next."""
        blocks, rows = self.blocks(), min(ROWS, len(x))
        room = torch.empty(len(blocks) if keep else 1, rows, len(blocks[0].weight))
        for start in range(0, len(x), rows):
            some = slice(start, start + rows)
            found = [block.exponentiated(x[some], room[i if keep else 0]) for i, block in enumerate(blocks)]
            powers, tops, masses = zip(*found, strict=True)
            yield some, Powers(list(powers) if keep else [], torch.stack(tops, dim=1), torch.stack(masses, dim=1))

    def of_blocks(self, x: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
        """The powers (m, codes) of states `x` (m, D) in one `block` (m,) each, in ascending order, and its first code
        (m,)."""
        blocks = self.blocks()
        width = len(blocks[0].weight)
        scores, start = torch.empty(len(x), width), 0
        for number, size in zip(*(t.tolist() for t in block.unique(return_counts=True)), strict=True):
            part, (weight, bias, _) = slice(start, start + size), blocks[number]
            torch.addmm(bias, x[part], weight.t(), out=scores[part, : len(weight)])
            scores[part, len(weight) :] = -torch.inf  # its power is lost to rounding: that of the top is 1
            start += size
        self.exponentiate(scores)
        return scores, block * width

    def logits(self, x: Tensor, codes: Tensor) -> Tensor:
        """Of one code for each of states `x` (m, D): (m,)."""
        return (x * F.embedding(codes, self.weight)).sum(1) + self.bias[codes]


def nats(x: Tensor, head: Head, codes: Tensor) -> Tensor:
    """-ln p (M,) of `codes` (M,), no gradient."""
    return torch.cat([powers.total() for _, powers in head.tiles(x)]) - head.logits(x, codes)


def draw(x: Tensor, head: Head, u: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (M,) from the softmax by inversion at `u` (M,), and the ln p of each (M,): first a block of codes, then one
    of these."""
    codes, total = torch.empty(len(x), dtype=torch.int64), torch.empty(len(x))
    for some, powers in head.tiles(x):
        total[some] = powers.total()
        block, rest = invert(powers.logs.double().softmax(dim=1), u[some].double())
        order = block.argsort()
        inside, first = head.of_blocks(x[some][order], block[order])
        found, _ = invert(inside, rest[order].float().clamp(max=1 - 2**-24))
        codes[some] = torch.empty_like(block).scatter_(0, order, first + found)
    codes.clamp_(max=len(head.weight) - 1)  # where a NaN led beyond the last
    return codes, head.logits(x, codes) - total


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


class CrossEntropy(torch.autograd.Function):
    """The mean of `nats`, with label smoothing s: H(k) = -ln p(k) makes it H(true) + s (l_true - mean l).

    The gradients are found at once, of all inputs if of one: a second look would have to make all powers again.

    Examples:
        >>> x, weight, bias = torch.randn(3, 4), torch.randn(10, 4), torch.zeros(10)
        >>> codes = torch.tensor([0, 5, 9])
        >>> loss = CrossEntropy.apply(x, weight, bias, codes, 0.1, False)
        >>> torch.allclose(loss, F.cross_entropy(F.linear(x, weight, bias), codes, label_smoothing=0.1), atol=1e-5)
        True
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, codes: Tensor, smoothing: float, compiled: bool
    ) -> Tensor:
        head, descends = Head(weight, bias, compiled), any(ctx.needs_input_grad)
        totals, of_x = [], torch.zeros_like(x)
        of_head = x.new_zeros(x.shape[1] + 1, len(weight))  # that of the bias below that of the weight, turned
        for some, powers in head.tiles(x, keep=descends):
            totals.append(powers.total())
            if descends:
                _descend(powers, totals[-1], x[some], head, of_x[some], of_head)
        mean, sure = weight.mean(0), 1 - smoothing
        if descends:  # so far of the sum of `totals`
            of_x.sub_(F.embedding(codes, weight), alpha=sure).sub_(mean, alpha=smoothing)
            of_weight, of_bias = of_head[:-1].t().contiguous(), of_head[-1]
            of_weight.index_add_(0, codes, x, alpha=-sure).sub_(x.sum(0), alpha=smoothing / len(weight))
            of_bias.index_add_(0, codes, x.new_ones(len(x)), alpha=-sure).sub_(smoothing * len(x) / len(weight))
            ctx.save_for_backward(*(t.div_(len(x)) for t in (of_x, of_weight, of_bias)))
        return (torch.cat(totals) - sure * head.logits(x, codes) - smoothing * (x @ mean + bias.mean())).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *(gradient * t for t in ctx.saved_tensors), None, None, None


def _descend(powers: Powers, total: Tensor, x: Tensor, head: Head, of_x: Tensor, of_head: Tensor) -> None:
    """Adds the gradients of the sum of `total` (m,): of `x` (m, D), and of the weight and the bias (D + 1, C)."""
    shares = (powers.tops - total[:, None]).exp().t().contiguous()  # p of each block's top
    wide = F.pad(x, (0, 1), value=1.0)
    width = powers.powers[0].shape[1]
    for block, part, share, of_block in zip(
        head.blocks(), powers.powers, shares[..., None], of_head.split(width, dim=1), strict=True
    ):
        of_x.addcmul_(part @ block.weight, share)
        of_block.addmm_((wide * share).t(), part)
