"""The lattice of FSQ, in numbers: one affine, activation, rounding and affine again for every bound.

For each channel i, in float32 and op for op:

    x = alpha z + shift,  a = tanh(x) or clamp(x, -1, 1),  p = gain a + base
    digit = clamp(round(p) + zero, 0, L - 1)          round: half to even
    value = (digit - width) / width                   exact but for the one rounding of the division

and the index of a run of channels is its digits in mixed radix, the first channel fastest (arXiv 2309.15505, App. A.1).
tanh is the correctly rounded one, so that the digits do not depend on which library, vector width or position computes
it: it is evaluated in float64 where that matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

BOUNDS = ("paper", "symmetric", "equal-bins", "clamp")
EPS = 1e-3  # keeps a saturated channel off the rounding ties at its two ends (App. A.1)
WIDEST = 2**22  # levels: beyond, float32 has no number half way between two of them


class Channels(NamedTuple):
    """The constants of each channel, float32 tensors of one shape.

    Examples:
        >>> constants = Lattice((5, 4), bound="symmetric").channels(torch.device("cpu"))
        >>> constants.top, constants.width
        (tensor([4., 3.]), tensor([2.0000, 1.5000]))
    """

    shift: Tensor
    gain: Tensor
    base: Tensor
    zero: Tensor
    top: Tensor
    width: Tensor


@dataclass(frozen=True)
class Lattice:
    """The levels of each of d channels, how latents are bound to them, and into how many codes the digits go.

    Raises:
        ValueError: for a level outside 2 .. 2^22, an unknown bound, a slope that is not positive, or factors that do
            not divide the channels into runs whose products of levels stay below 2^63.

    Examples:
        >>> from latticode.kernels import to_lattice
        >>> lattice = Lattice((8, 5, 5, 5))
        >>> lattice.vocab, lattice.basis
        ((1000,), [1, 8, 40, 200])
        >>> latents, codes = to_lattice(torch.zeros(3, 4), lattice)
        >>> codes.flatten()
        tensor([500, 500, 500])
    """

    levels: tuple[int, ...]
    bound: str = "paper"
    slope: float = 2.0
    factors: int = 1

    def __post_init__(self) -> None:
        levels = list(self.levels)
        if self.bound not in BOUNDS:
            raise ValueError(f"bound must be one of {', '.join(BOUNDS)}, got {self.bound!r}")
        if not levels or any(not isinstance(n, int) or not 2 <= n <= WIDEST for n in levels):
            raise ValueError(f"levels must be integers in 2 .. {WIDEST}, one per channel, got {levels}")
        if not 0 < self.slope < math.inf:
            raise ValueError(f"slope must be > 0 and finite, got {self.slope}")
        if self.factors < 1 or len(levels) % self.factors:
            raise ValueError(f"factors must divide the {len(levels)} channels, got {self.factors}")
        if max(self.vocab) >= 2**63:
            raise ValueError(
                f"the product of levels must be below 2^63 to index it, got {levels} in {self.factors} factors; "
                f"factors={len(levels)} gives each channel a code of its own"
            )

    @property
    def runs(self) -> list[tuple[int, ...]]:
        """The levels of each factor: consecutive runs of equal length."""
        length = len(self.levels) // self.factors
        return [self.levels[i : i + length] for i in range(0, len(self.levels), length)]

    @property
    def vocab(self) -> tuple[int, ...]:
        """Codes of each factor: the product of the levels of its channels."""
        return tuple(math.prod(run) for run in self.runs)

    @property
    def basis(self) -> list[int]:
        """What a step of each channel's digit adds to the index of its run."""
        return [math.prod(run[:i]) for run in self.runs for i in range(len(run))]

    @property
    def alpha(self) -> float:
        """The factor of z in tanh(alpha z) = 2 sigmoid(slope z) - 1."""
        return self.slope / 2

    def channels(self, device: torch.device) -> Channels:
        """The constants, each (d,): computed in float64 and rounded once, as the published code does."""
        rows = [_constants(level, self.bound) for level in self.levels]
        return Channels(*torch.tensor(list(zip(*rows, strict=True)), dtype=torch.float32, device=device).unbind())

    def activation(self, z: Tensor, c: Channels, precise: torch.dtype = torch.float64) -> Tensor:
        """a (..., d) float32 of `z` (..., d), with tanh evaluated in `precise`."""
        x = z.float() * self.alpha + c.shift
        return x.clamp(-1.0, 1.0) if self.bound == "clamp" else torch.tanh(x.to(precise)).float()

    def position(self, z: Tensor, c: Channels, precise: torch.dtype = torch.float64) -> Tensor:
        """p (..., d) float32: what is rounded."""
        return self.activation(z, c, precise) * c.gain + c.base


def digits(p: Tensor, c: Channels) -> Tensor:
    """The digits at positions `p`, as floats; NaN stays NaN."""
    return torch.minimum((p.round() + c.zero).clamp(min=0.0), c.top)


def values(digits: Tensor, width: Tensor) -> Tensor:
    """The latents of `digits`, or of any place between them."""
    return (digits - width) / width


def _constants(level: int, bound: str) -> Sequence[float]:
    """shift, gain, base, zero, top and width of a channel."""
    top = level - 1
    if bound == "paper":
        gain, offset, half = top * (1 - EPS) / 2, 0.5 - 0.5 * (level % 2), level // 2
        return math.tan(offset / gain), gain, -offset, half, top, half
    reach = level if bound == "equal-bins" else top
    return 0.0, reach / 2, top / 2, 0.0, top, top / 2
