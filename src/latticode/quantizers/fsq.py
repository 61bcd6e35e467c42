"""Finite scalar quantization (Mentzer et al. 2023, arXiv 2309.15505): bound each channel, round it, index the grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from latticode.core.derived import constant
from latticode.core.types import Quantized
from latticode.kernels import Lattice, to_lattice
from latticode.kernels.grid import Channels, digits, values
from latticode.quantizers.base import Quantizer, Step, Tokens
from latticode.quantizers.gradients import ESTIMATORS, check_estimator


class FSQ(Quantizer):
    """Quantize each channel to its own few levels, whose product is the codebook; only `feedback` learns anything.

    With a = 2 sigmoid(slope z) - 1 (slope 2 is tanh z, slope 1.6 is iFSQ's activation, arXiv 2601.17124), channel by
    channel, for L levels:

    - `paper` (App. A.1): position (L-1)(1-eps)/2 a(z + shift) - offset, rounded. Latents are position / floor(L/2):
      [-1, 1] for odd L, [-1, 1 - 2/L] for even L. For even L offset is 1/2, and shift tan(offset / half) puts bound(0)
      near 0. It is a slip for atanh that the authors have confirmed, kept because checkpoints were trained with it: it
      moves edges by less than 5e-4 for L >= 4. For L = 2, where atanh has no value, 94 % of N(0, 1) fall in one bin.
    - `symmetric` (arXiv 2411.19842): round((L-1)(a+1)/2) on the grid -1 .. 1; the end bins are half as wide in a.
    - `equal-bins`: round(L (a+1)/2 - 1/2) on the same grid; all bins are equally wide in a.
    - `clamp`: `symmetric` with a = clamp(slope z / 2, -1, 1): values of the grid stay what they are, as residual stages
      need it. Beyond the ends a gradient passes only where it leads back, so that no channel can stay there for good.
      With few channels of many levels (`levels.fine`) it reconstructs best (docs/results/study.md).

    Args:
        levels: number of levels of each channel, every one >= 2.
        bound: one of the four.
        slope: of the activation at the input, > 0.
        factors: the codes of a position. The channels are cut into so many runs of equal length, each with an index of
            its own, which must stay below 2^63; as many factors as channels give the digits themselves.
        noise: stable-codec's probability p of two draws in training (arXiv 2411.19842), 0 for none. With p the rounding
            is left out; of what that gives, a share p is kept, and the rest becomes the bounded value plus noise that
            is uniform over one bin of its channel. Drawn for each entry of the first axis: a sample of (B, ..., D), a
            token of (N, D). Codes are never noisy.
        gradient: how it passes the rounding in training, a name in `gradients.ESTIMATORS`, of the bounded values and
            their levels; with "diveq" the latents are only near the levels in training. In eval mode it is
            straight-through.
        feedback: whether a channel is told the errors of those before it. It is given z_i + sum over j < i of F_ij e_j,
            with e_j what rounding has added to the bounded channel j, and a learned strictly lower triangular F, at
            first 0. So what channel j has lost, later ones make good: Babai's nearest plane instead of his rounding
            (Combinatorica 6, 1986), in the basis that suits the decoder. D (D-1) / 2 numbers, trained by what the
            decoder loses; grid, codes and `decode` stay the same. It reconstructs better (docs/results/study.md).

    Arithmetic is float32 whatever the autocast or parameter type, so the codes of a value do not depend on it; tanh is
    correctly rounded (`kernels.to_lattice`). The gradient passes through the bound, whatever passes it by the rounding.
    Other than in most quantizers, infinities saturate, and a NaN stays NaN in its own channel only; the codes of its
    token are -1.

    Raises:
        ValueError: for arguments outside the above.

    Examples:
        >>> quantizer = FSQ([8, 5, 5, 5])
        >>> out = quantizer(torch.randn(2, 16, 16, 4))
        >>> out.latents.shape, out.codes.shape, quantizer.vocab
        (torch.Size([2, 16, 16, 4]), torch.Size([2, 16, 16, 1]), (1000,))
        >>> torch.equal(quantizer.decode(out.codes), out.latents)
        True
    """

    def __init__(
        self,
        levels: Sequence[int],
        bound: str = "paper",
        slope: float = 2.0,
        factors: int = 1,
        noise: float = 0.0,
        gradient: str = "straight-through",
        feedback: bool = False,
    ):
        super().__init__()
        self._lattice = Lattice(tuple(levels), bound, slope, factors)
        if not 0 <= noise <= 1:
            raise ValueError(f"noise is a probability, got {noise}")
        check_estimator(gradient)
        self.gradient = gradient
        self.levels, self.bound, self.slope, self.factors, self.noise = list(levels), bound, slope, factors, noise
        self.dim, self.vocab, self.feedback = len(self.levels), self._lattice.vocab, feedback
        if feedback:
            self.shear = nn.ParameterList(nn.Parameter(torch.zeros(i)) for i in range(1, self.dim))  # rows of F

    @property
    def radix(self) -> tuple[int, ...] | None:
        """The levels, unless codes are split into factors already."""
        return tuple(self.levels) if self.factors == 1 else None

    @property
    def contraction(self) -> list[float]:  # type: ignore[override]
        """h / (1 + h), with h half the distance of neighbouring values: 1 / L for a grid that reaches -1 and 1."""
        return [1 / (level + (self.bound == "paper" and level % 2 == 0)) for level in self.levels]

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantize `z` (..., D) with gradients; `mask` (...) bool is False at padding."""
        self._check_latents(z, mask)
        latents, codes = self._both(z)
        if mask is not None:
            gone = ~mask[..., None]
            latents, codes = latents.masked_fill(gone, 0.0), codes.masked_fill(gone, -1)
        return Quantized(latents, codes)

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Codes (..., K) int64 of `z` (..., D). Pure."""
        self._check_latents(z, mask)
        codes = self._encode(z)
        return codes if mask is None else codes.masked_fill(~mask[..., None], -1)

    def _quantize(self, tokens: Tokens) -> Step:
        return Step(*self._both(tokens.values))

    def _both(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Latents, in training with the gradient and the noise that are asked for, and codes."""
        dtype, z = z.dtype, self.sheared(z)
        latents, codes = to_lattice(z, self._lattice)
        if self.training and self.gradient != "straight-through":
            latents = self._estimated(z, latents)
        latents = self._disturbed(z, latents) if self.training and self.noise else latents
        return latents.to(dtype), codes

    def sheared(self, z: Tensor) -> Tensor:
        """What is bounded: `z` (..., D), with `feedback` in float32 and moved by the errors of earlier channels."""
        if not self.feedback:
            return z
        channels, errors, c = [], [], self._lattice.channels(z.device)
        for i, (x, row) in enumerate(zip(z.float().unbind(-1), [(), *self.shear], strict=True)):
            if i:  # that of the last channel nobody is told
                errors.append(self._error(channels[-1].detach(), Channels(*(constant[i - 1] for constant in c))))
            for weight, error in zip(row, errors, strict=True):
                x = x + weight.float() * error
            channels.append(x)
        return torch.stack(channels, dim=-1)

    def _estimated(self, z: Tensor, latents: Tensor) -> Tensor:
        finite = latents.isfinite().all(-1, keepdim=True)
        bounded = self._soft(z.where(finite, 0.0), latents.where(finite, 0.0))
        return latents.where(~finite, ESTIMATORS[self.gradient](bounded, latents.detach().float()).to(z.dtype))

    def _disturbed(self, z: Tensor, latents: Tensor) -> Tensor:
        bounded = self._soft(z, latents)
        ones = (len(z), *[1] * (z.ndim - 1)) if z.ndim > 1 else (1,)
        soft, kept = torch.rand(2, *ones, device=z.device) < self.noise
        bins = (torch.rand(z.shape, device=z.device) - 0.5) / self._width(z.device)
        return torch.where(kept, torch.where(soft, bounded, latents), bounded + bins).to(z.dtype)

    def _soft(self, z: Tensor, latents: Tensor) -> Tensor:
        """`bounded`, with the gradient that the `latents` of `z` have."""
        return self.bounded(z.detach()) + (latents - latents.detach()).float()

    def _error(self, x: Tensor, c: Channels) -> Tensor:
        """What rounding adds to a channel, in units of latents, at `x` (...) float32; 0 at a NaN."""
        place = self._lattice.position(x, c)
        return (values(digits(place, c), c.width) - values(place + c.zero, c.width)).nan_to_num(0.0)

    def _encode(self, x: Tensor) -> Tensor:
        return to_lattice(self.sheared(x), self._lattice)[1]

    def _decode(self, codes: Tensor) -> Tensor:
        return values(self._digits(codes).float(), self._width(codes.device))

    def _width(self, device: torch.device) -> Tensor:
        """The bins between the middle of the grid, 0, and its lower end, -1."""
        bins = [level // 2 if self.bound == "paper" else (level - 1) / 2 for level in self.levels]
        return constant(bins, torch.float32, device)

    def bounded(self, z: Tensor) -> Tensor:
        """What is rounded, in units of latents: float32, shape of `z` (..., D)."""
        c = self._lattice.channels(z.device)
        return values(self._lattice.position(z, c, torch.float32) + c.zero, c.width)

    def index(self, digits: Tensor) -> Tensor:
        """Digits (..., D) to codes (..., K): mixed radix in each run, the first channel fastest (App. A.1)."""
        basis = constant(self._lattice.basis, torch.int64, digits.device)
        return (digits.long() * basis).unflatten(-1, (self.factors, -1)).sum(dim=-1)

    def digits(self, codes: Tensor) -> Tensor:
        """Codes (..., K) to the digit of each channel (..., D) int64. Raises ValueError outside `vocab`."""
        self._check_codes(codes)
        return self._digits(codes.long())

    def _digits(self, codes: Tensor) -> Tensor:
        lists = (self._lattice.basis, self.levels)
        basis, levels = (constant(one, torch.int64, codes.device).view(self.factors, -1) for one in lists)
        return (codes[..., None] // basis % levels).flatten(-2)  # not .div(), which ONNX rounds to 53 bits

    def extra_repr(self) -> str:
        names = ("levels", "bound", "slope", "factors", "noise", "gradient", "feedback")
        given = {name: getattr(self, name) for name in names}
        return ", ".join(f"{name}={value!r}" for name, value in given.items())
