"""How a gradient passes a step that has none: estimators (z, q) -> latents, all (..., D), z finite, q the code of z."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TINY = 1e-6  # norms below have no direction worth turning by
OPPOSITE = 1e-6  # of 1 + cos: below, no plane of rotation can be told
DIVEQ_VARIANCE = 1e-3  # of the noise in each channel, in the units of the latents squared


def straight_through(z: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` itself, with the gradient of `z`; both (..., D), `z` finite.

    Straight-through estimator of VQ-VAE (arXiv 1711.00937, Sec. 3.2). The usual z + sg(quantized - z) rounds, and what
    the decoder trains on would not be what `decode` returns.
    """
    if torch.compiler.is_compiling():  # which fuses this, and warns of a Function
        return quantized.detach() + (z - z.detach())
    return _StraightThrough.apply(z, quantized)  # three tensors less


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, quantized: Tensor) -> Tensor:
        return quantized.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


def rotation(z: Tensor, quantized: Tensor) -> Tensor:
    """`quantized` itself, as if it were (|q| / |z|) R z, with R the rotation of z onto q in their plane, both constant.

    So z gets (|q| / |z|) R^T g, and the angle between gradient and latent survives the quantization (rotation trick,
    arXiv 2410.06424, Sec. 4.2). With unit vectors a of z and b of q, R = I - (a + b)(a + b)^T / (1 + a.b) + 2 b a^T,
    two reflections. Where that does not exist, at z or q shorter than `TINY` and where they point in opposite
    directions, it is straight-through.
    """
    z_norm, q_norm = (v.detach().norm(dim=-1, keepdim=True) for v in (z, quantized))
    a, b = z.detach() / z_norm.clamp(min=TINY), quantized.detach() / q_norm.clamp(min=TINY)
    closeness = 1 + (a * b).sum(dim=-1, keepdim=True)
    ratio = q_norm / z_norm.clamp(min=TINY)
    defined = (z_norm >= TINY) & (q_norm >= TINY) & (closeness >= OPPOSITE) & ratio.isfinite()
    closeness, ratio = torch.where(defined, closeness, 1.0), torch.where(defined, ratio, 1.0)
    # Only differences of z from its own value, exactly 0, go through R: nothing can overflow or round.
    zero = z - z.detach()
    along, across = ((zero * v).sum(dim=-1, keepdim=True) for v in (a, a + b))
    turned = zero - (a + b) * (across / closeness) + 2 * b * along
    return quantized.detach() + torch.where(defined, ratio * turned, zero)


def diveq(z: Tensor, quantized: Tensor, variance: float = DIVEQ_VARIANCE) -> Tensor:
    """z + |q - z| sg(u) with u the unit vector of (q - z) + v, v ~ N(0, `variance` I): near `quantized`, not on it.

    DiVeQ (arXiv 2509.26469): the length of the step is exact and differentiable in z and q alike, only its direction is
    noisy and constant, so what the decoder loses moves codes and latents without a loss of their own. As `variance`
    goes to 0 the result goes to q, z gets g - e (e.g) and q gets e (e.g), with e the direction from z to q.
    """
    step = quantized - z
    noisy = step.detach() + variance**0.5 * torch.randn_like(step)
    return z + step.norm(dim=-1, keepdim=True) * F.normalize(noisy, dim=-1)


def synchronized(latents: Tensor, quantized: Tensor, strength: float) -> Tensor:
    """`latents`, with `strength` times their gradient for the differentiable `quantized` as well.

    Synchronized update of code and latent (Huh et al. 2023, arXiv 2305.08842): + strength (q - sg(q)).
    """
    return latents + strength * (quantized - quantized.detach())


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "straight-through": straight_through,
    "rotation": rotation,
    "diveq": diveq,
}


def check_estimator(name: str) -> None:
    """Raise ValueError for a name that is not in `ESTIMATORS`."""
    if name not in ESTIMATORS:
        raise ValueError(f"gradient must be one of {', '.join(ESTIMATORS)}, got {name!r}")
