"""Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505): bound each channel, round it, index the grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from latticode.quantizers.base import Quantizer, Step, Tokens

BOUNDS = ("paper", "symmetric", "equal-bins")
EPS = 1e-3  # keeps a saturated channel off the rounding ties at its two ends (paper, App. A.1)


class FSQ(Quantizer):
    """Quantize every channel to its own few levels; the product of the levels is the codebook, and nothing is learned.

    With a = 2 sigmoid(slope z) - 1 (slope 2 is tanh z, slope 1.6 is iFSQ's activation, arXiv 2601.17124), channel by
    channel, for L levels:

    - `paper` (App. A.1): position (L-1)(1-eps)/2 a(z + shift) - offset, rounded; offset is 1/2 for even L and shift
      puts bound(0) = 0. Latents are position / floor(L/2): [-1, 1] for odd L, [-1, 1 - 2/L] for even L. The published
      shift tan(offset/half) is the authors' slip for atanh, which is used here; it has no solution for L = 2.
    - `symmetric` (arXiv 2411.19842): round((L-1)(a+1)/2) on the grid -1 .. 1 for every L >= 2; the end bins are half as
      wide in a.
    - `equal-bins`: floor(L (a+1)/2) on the same grid; all bins are equally wide in a.

    Args:
        levels: number of levels of each channel, every one >= 2 (>= 3 for `paper`), with a product below 2^63.
        bound: one of `BOUNDS`.
        slope: of the activation at the input, > 0.

    Bound, rounding and index are computed in float32 and int64 whatever the autocast or parameter type, so the codes
    of a value do not depend on it. The straight-through gradient passes through the bound, not the rounding.
    A NaN gives the code -1 and stays NaN in the latents; infinities saturate.

    Raises:
        ValueError: for levels, bound or slope outside the above.
    """

    def __init__(self, levels: Sequence[int], bound: str = "paper", slope: float = 2.0):
        super().__init__()
        smallest = 3 if bound == "paper" else 2
        if bound not in BOUNDS:
            raise ValueError(f"bound must be one of {', '.join(BOUNDS)}, got {bound!r}")
        if not levels or any(not isinstance(n, int) or n < smallest for n in levels):
            hint = "; for L = 2 use bound='symmetric'" if bound == "paper" else ""
            raise ValueError(f"levels must be integers >= {smallest} for bound {bound!r}, got {list(levels)}{hint}")
        if math.prod(levels) >= 2**63:
            raise ValueError(f"the product of levels must be below 2^63 to index it, got {list(levels)}")
        if not slope > 0:
            raise ValueError(f"slope must be > 0, got {slope}")
        self.levels, self.bound, self.slope = list(levels), bound, slope
        self.dim, self.vocab = len(levels), (math.prod(levels),)
        # Integers survive .bfloat16(); nothing is saved, since the spec says it all.
        self.register_buffer("_levels", torch.tensor(self.levels), persistent=False)
        self.register_buffer("_basis", torch.tensor([math.prod(levels[:i]) for i in range(self.dim)]), persistent=False)

    _levels: Tensor
    _basis: Tensor

    def _quantize(self, tokens: Tokens) -> Step:
        position = self.position(tokens.values)
        digits = self.round(position.detach())
        # Exactly the grid's values forward, the bound's gradient backward.
        value = self.value(digits) + (self.value(position) - self.value(position.detach()))
        return Step(value, self.index(digits))

    def _encode(self, x: Tensor) -> Tensor:
        return self.index(self.round(self.position(x)))

    def _decode(self, codes: Tensor) -> Tensor:
        return self.value(self.digits(codes).float())

    def position(self, z: Tensor) -> Tensor:
        """The bounded value in units of levels, 0 .. L-1, whose rounding is the digit; float32, shape of z."""
        z, levels = z.float(), self._levels.float()
        if self.bound == "paper":
            half, offset = (levels - 1) * (1 - EPS) / 2, (1 - levels % 2) / 2
            shift = torch.atanh(offset / half) * (2 / self.slope)
            return half * self.activation(z + shift) - offset + levels.div(2, rounding_mode="floor")
        a = self.activation(z)
        return (levels - 1) * (a + 1) / 2 if self.bound == "symmetric" else levels * (a + 1) / 2 - 0.5

    def activation(self, z: Tensor) -> Tensor:
        """a(z) = 2 sigmoid(slope z) - 1 = tanh(slope z / 2), in (-1, 1)."""
        return torch.tanh(z if self.slope == 2.0 else z * (self.slope / 2))

    def round(self, position: Tensor) -> Tensor:
        """The digit of each channel, 0 .. L-1, as a float; NaN stays NaN."""
        top = (self._levels - 1).float()
        return position.round().clamp(min=torch.zeros_like(top), max=top)

    def value(self, position: Tensor) -> Tensor:
        """The latent at a position: affine, onto [-1, 1] (for `paper` and even L onto [-1, 1 - 2/L])."""
        levels = self._levels.float()
        if self.bound == "paper":
            half_width = levels.div(2, rounding_mode="floor")
            return (position - half_width) / half_width
        return position * (2 / (levels - 1)) - 1

    def index(self, digits: Tensor) -> Tensor:
        """Digits (..., D) to codes (..., 1): mixed radix, the first channel fastest (App. A.1)."""
        invalid = digits.isnan().any(-1, keepdim=True)
        index = (digits.nan_to_num().long() * self._basis).sum(-1, keepdim=True)
        return index.masked_fill(invalid, -1)

    def digits(self, codes: Tensor) -> Tensor:
        """Codes (..., 1) to the digit of each channel (..., D) int64. Raises ValueError outside 0 .. |C|-1."""
        self._check_codes(codes)
        return codes.long().div(self._basis, rounding_mode="floor") % self._levels

    def extra_repr(self) -> str:
        return f"levels={self.levels}, bound={self.bound!r}, slope={self.slope}"
