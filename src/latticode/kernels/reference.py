"""The specification of every kernel: as plain and as exact as can be. Slow, and free to use any amount of memory."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from latticode.kernels import stages
from latticode.kernels.grid import Lattice, digits, values
from latticode.kernels.vocabulary import invert


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """For each row of `x` (N, d) the row of `codebook` (K, d) at the least distance, in float64: (N,) int64."""
    distances = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return distances.argmin(dim=1)


def bernoulli_entropy(logits: Tensor) -> Tensor:
    """Of each row of `logits` (N, D), the entropy of D independent bits with P(bit) = sigmoid(logit), in nats: (N,)."""
    log_p = _log_products(logits)
    return -(log_p.exp() * log_p).sum(dim=1)


def bernoulli_mixture(logits: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights_n P_n (2^D,) of products P_n of D bits with `logits` (N, D); code sum_i 2^i [bit_i = 1]."""
    return weights.double() @ _log_products(logits).exp()


def soft_assignment(x: Tensor, codebook: Tensor, weights: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """sum_n w_n H(p_n) and sum_n w_n p_n (K,), for p_n the softmax over codes of -|x_n - c|^2 / `temperature`."""
    distances = (x.double()[:, None] - codebook.double()).square().sum(dim=2)
    log_p = (-distances / temperature).log_softmax(dim=1)
    return -(weights.double() @ (log_p.exp() * log_p).sum(dim=1)), weights.double() @ log_p.exp()


def entropy(p: Tensor) -> Tensor:
    """-sum p ln p of `p` (K,) in nats, a scalar; probabilities of 0 are left out."""
    some = p[p > 0].double()
    return -(some * some.log()).sum()


def _log_products(logits: Tensor) -> Tensor:
    """ln P of all 2^D values of D independent bits: (N, 2^D) float64."""
    dim = logits.shape[1]
    bits = (torch.arange(2**dim, device=logits.device)[:, None] >> torch.arange(dim, device=logits.device)) & 1
    signs = (2 * bits - 1).double()
    return F.logsigmoid(logits.double()[:, None] * signs).sum(dim=2)


def to_lattice(z: Tensor, lattice: Lattice, precise: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Latents (..., d) in z's type and codes (..., factors) int64 of `z` (..., d), by the formulas of `grid`.

    The gradient passes through the bound, not the rounding. tanh is evaluated in `precise`.
    """
    c = lattice.channels(z.device)
    p = lattice.position(z, c, precise)
    places = digits(p.detach(), c)
    bounded = values(p + c.zero, c.width)
    latents = values(places, c.width) + (bounded - bounded.detach())
    whole = places.nan_to_num().long() * torch.tensor(lattice.basis, device=z.device)
    # not .sum(dim=-1), which onnxruntime rounds to 53 bits
    codes = functools.reduce(torch.add, whole.unflatten(-1, (lattice.factors, -1)).unbind(dim=-1))
    return latents.to(z.dtype), codes.masked_fill(places.isnan().any(dim=-1, keepdim=True), -1)


def to_lattice_backward(gradient: Tensor, z: Tensor, lattice: Lattice, precise: torch.dtype = torch.float64) -> Tensor:
    """The gradient for `z` (..., d) of that for its latents (..., d): times d value / d z, 0 where z is NaN.

    Beyond the ends of the clamp that would be 0; a gradient that leads back, of the sign of z, passes there.
    """
    c = lattice.channels(z.device)
    if lattice.bound == "clamp":
        slope = ((z.float() * lattice.alpha).abs() <= 1) | (gradient.float() * z.float() > 0)
    else:
        slope = 1 - lattice.activation(z, c, precise).square()
    product = gradient.float() * slope * (lattice.alpha * c.gain / c.width)
    return product.masked_fill(z.isnan(), 0.0).to(z.dtype)


def to_lattices(z: Tensor, lattice: Lattice, depth: int) -> tuple[Tensor, Tensor]:
    """Latents (..., d) in z's type, codes (..., depth * factors) int64: `depth` stages of the clamped `lattice`.

    Stages in groups of g, in float32 and op for op, with M = L^g levels and x = z (L-1) L^(g-1) / 2 in the first group:

        n = clamp(round(x + (M-1)/2), 0, M-1)     in base L the digits of its stages, the first one highest
        e = n - (M-1)/2                           exact; the latents are the sum of e / ((L-1) L^(stages-1) / 2)
        x = (x - e) M                             of the next group, with the M of that

    A token that is not finite has codes -1 and NaN latents.
    """
    left, total, codes = z.float(), None, []
    levels = torch.tensor(lattice.levels, device=z.device)
    basis = torch.tensor(lattice.basis, device=z.device)
    for size, group in zip(stages.sizes(lattice, depth), stages.groups(lattice, depth, z.device), strict=True):
        left = left.detach() * group.rate
        place = torch.minimum((left + group.middle).round().clamp(min=0.0), group.top)
        even = place - group.middle
        left = left - even
        total = even / group.width if total is None else total + even / group.width
        whole = place.nan_to_num().long()
        for i in range(size):
            parts = (whole // levels ** (size - 1 - i) % levels * basis).unflatten(-1, (lattice.factors, -1))
            codes.append(functools.reduce(torch.add, parts.unbind(dim=-1)))  # as in to_lattice
    assert total is not None
    limit = stages.limits(lattice, depth, z.device)
    bounded = torch.minimum(torch.maximum(z.float(), -limit), limit)
    gone = ~z.isfinite().all(dim=-1, keepdim=True)
    bounded = torch.where(gone, 0.0, bounded)
    latents = torch.where(gone, torch.nan, total + (bounded - bounded.detach()))
    return latents.to(z.dtype), torch.cat(codes, dim=-1).masked_fill(gone, -1)


def to_lattices_backward(gradient: Tensor, z: Tensor, lattice: Lattice, depth: int) -> Tensor:
    """The gradient for `z` (..., d): that for its latents where a stage does not clamp or it leads back, else 0.

    With J_i that of stage i it is 1 - prod (1 - J_i); where all stages clamp, they do so on the same side.
    """
    passes = (z.float().abs() <= stages.limits(lattice, depth, z.device)) | (gradient.float() * z.float() > 0)
    return torch.where(passes & z.isfinite().all(dim=-1, keepdim=True), gradient, 0.0)


def head_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, codes: Tensor, smoothing: float) -> Tensor:
    """The mean cross entropy of `codes` (M,) under logits x W' + b of `x` (M, D), with label smoothing."""
    return F.cross_entropy(_logits(x, weight, bias), codes, label_smoothing=smoothing)


def head_nats(x: Tensor, weight: Tensor, bias: Tensor, codes: Tensor) -> Tensor:
    """-ln p (M,) of `codes` (M,)."""
    return F.cross_entropy(_logits(x, weight, bias), codes, reduction="none")


def head_draw(x: Tensor, weight: Tensor, bias: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (M,) by inversion at `u` (M,), and ln p of each (M,)."""
    log_p = _logits(x, weight, bias).log_softmax(1)
    codes, _ = invert(log_p.exp(), u)
    return codes, log_p.gather(1, codes[:, None])[:, 0]


def _logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    logits = F.linear(x, weight, bias)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
