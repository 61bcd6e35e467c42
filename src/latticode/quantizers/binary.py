"""Lookup-free quantization (LFQ) and binary spherical quantization (BSQ): the signs of the channels are the code."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from latticode import kernels
from latticode.core import distributed
from latticode.core.derived import constant
from latticode.quantizers.base import Loss, Quantizer, Step, Tokens, token_mean
from latticode.quantizers.gradients import straight_through

DIGIT_BITS = 9  # of a digit, at most
LARGEST_BITS = 62  # of a code, an int64
EXACT_BITS = 24  # of an entropy group: its distribution takes 2^24 numbers, 64 MB, several times over in training
TINY = 1e-6  # latents whose greatest channel is below have no direction worth scaling up


class Binary(Quantizer):
    """Every channel is one bit, 1 where z > 0, and one of two values, +- `magnitude`, with a straight-through gradient.

    A code is sum_i 2^i bit_i, the first channel fastest. The entropy losses treat a token as spread over all codes c,
    p(c) = softmax(2 <x, c> / temperature) = softmax(-|x - c|^2 / temperature): a product of one Bernoulli for each
    channel with logit 4 magnitude x_i / temperature. So both entropies are exact without a list of codes (`kernels`).

    Examples:
        >>> from latticode.quantizers import LFQ
        >>> quantizer = LFQ(dim=3)
        >>> isinstance(quantizer, Binary), quantizer.vocab
        (True, (8,))
        >>> quantizer.encode(torch.tensor([[0.2, -0.3, 0.9]]))  # bits 1, 0, 1: 1 + 4
        tensor([[5]])
    """

    temperature: float
    entropy_groups: int
    factors: int

    def __init__(self, dim: int, temperature: float, entropy_groups: int, factors: int):
        super().__init__()
        if dim < 1 or factors < 1 or dim % factors or dim // factors > LARGEST_BITS:
            raise ValueError(
                f"dim must divide into factors of 1 to {LARGEST_BITS} bits, got dim={dim} and factors={factors}"
            )
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        if not 1 <= entropy_groups <= dim:
            raise ValueError(f"entropy_groups must be in 1 .. {dim}, got {entropy_groups}")
        if -(-dim // entropy_groups) > EXACT_BITS:
            raise ValueError(
                f"the entropy of {dim} bits in {entropy_groups} group(s) needs 2^{-(-dim // entropy_groups)} numbers; "
                f"entropy_groups={-(-dim // EXACT_BITS)} or more gives an upper bound from groups of {EXACT_BITS} bits"
            )
        self.dim, self.vocab = dim, (2 ** (dim // factors),) * factors
        self.temperature, self.entropy_groups, self.factors = temperature, entropy_groups, factors

    @property
    def radix(self) -> tuple[int, ...]:
        """Even groups of at most 9 bits, as MAGVIT-v2 has two of 9 in place of 18 bits."""
        bits = self.dim // self.factors
        groups = -(-bits // DIGIT_BITS)
        return tuple(2 ** (bits // groups + (i < bits % groups)) for i in range(groups))

    @property
    @abstractmethod
    def magnitude(self) -> float:
        """The absolute value of each channel of the latents."""

    @abstractmethod
    def _place(self, x: Tensor) -> Tensor:
        """The points (..., D) that codes stand for; signs stay."""

    def _quantize(self, tokens: Tokens) -> Step:
        bits = tokens.values > 0
        placed = tokens.through(self._place)
        q = self._signs(bits, placed.values.dtype)
        losses = {"commitment": token_mean((placed.target - q).square(), tokens.keep)}
        losses |= self._entropies(placed.target, tokens.keep)
        return Step(straight_through(placed.values, q), self._pack(bits), losses)

    def _entropies(self, x: Tensor, keep: Tensor) -> dict[str, Loss]:
        """mean_n H(p_n) and D ln 2 - H(mean_n p_n), for p_n the soft code of token n; in training over all ranks.

        The first is exact whatever the groups, since the entropies of independent bits add up.
        """
        logits = (x * (4 * self.magnitude / self.temperature)).reshape(-1, self.dim)
        keep = keep.reshape(-1)
        weights = keep.to(x.dtype)
        total, count = torch.where(keep, kernels.bernoulli_entropy(logits), 0.0).sum(), weights.sum()
        sums = [
            *(kernels.bernoulli_mixture(part, weights) for part in logits.tensor_split(self.entropy_groups, dim=1)),
            count,
        ]
        *mixtures, n = distributed.joined(sums) if self.training else sums
        gap = self.dim * math.log(2) - torch.stack([kernels.entropy(m / n.clamp(min=1)) for m in mixtures]).sum()
        some = (n > 0).to(gap)
        return {"sample_entropy": (total, count), "diversity": (gap.clamp(min=0) * some, some)}

    def _encode(self, x: Tensor) -> Tensor:
        return self._pack(x > 0)

    def _decode(self, codes: Tensor) -> Tensor:
        bits = codes[..., None].div(self._basis(codes.device), rounding_mode="floor") % 2
        return self._signs(bits.flatten(-2), self._arithmetic)

    def _pack(self, bits: Tensor) -> Tensor:
        """Codes (..., factors) of bits (..., D)."""
        return (bits.unflatten(-1, (self.factors, -1)).long() * self._basis(bits.device)).sum(dim=-1)

    def _basis(self, device: torch.device) -> Tensor:
        return constant([2**i for i in range(self.dim // self.factors)], torch.int64, device)

    def _signs(self, bits: Tensor, dtype: torch.dtype) -> Tensor:
        """+- magnitude in `dtype`: 2 bits - 1 is exact, so both have exactly this absolute value."""
        return (2 * bits.to(dtype) - 1) * self.magnitude


class LFQ(Binary):
    """Lookup-free quantization (MAGVIT-v2, arXiv 2310.05737): latents scale * sign(z), sign(0) = -1.

    Losses, unweighted and >= 0, the last two in nats: `commitment`, mean (z - q)^2; `sample_entropy`, the mean over
    tokens of the entropy of their soft code, to be small for confident tokens; `diversity`, D ln 2 - the entropy of the
    mean soft code of the batch, to be small for evenly used codes. Usual weights: 0.25, 0.1 and 0.1.

    Args:
        dim: D, the number of channels and of bits.
        scale: of the latents.
        temperature: of the soft codes, in units of scale * z; the logit of a bit is 4 scale z / temperature.
        entropy_groups: compute `diversity` for so many runs of bits apart, as if they were independent. An upper bound
            of the entropy, so correlated bits look more diverse than they are; needed above 24 bits. 1 is exact.
        factors: split the bits into so many runs of equal length, each with a code of its own (token
            factorization); a code has up to 62 bits. Nothing but the codes depends on it.

    Raises:
        ValueError: for arguments outside the above.

    Examples:
        >>> out = LFQ(4, scale=0.5)(torch.tensor([[0.1, -2.0, 0.0, 3.0]]))
        >>> out.latents.tolist(), out.codes.tolist(), list(out.losses)
        ([[0.5, -0.5, -0.5, 0.5]], [[9]], ['commitment', 'sample_entropy', 'diversity'])
    """

    contraction = 0.5

    def __init__(
        self,
        dim: int,
        *,
        scale: float = 1.0,
        temperature: float = 0.01,
        entropy_groups: int = 1,
        factors: int = 1,
    ):
        super().__init__(dim, temperature, entropy_groups, factors)
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be > 0, got {scale}")
        self.scale = scale

    @property
    def magnitude(self) -> float:
        return self.scale

    @property
    def reach(self) -> list[float]:
        return [2 * self.scale] * self.dim  # two cells of this width around +- scale

    def _place(self, x: Tensor) -> Tensor:
        return x

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, scale={self.scale}, temperature={self.temperature}, "
            f"entropy_groups={self.entropy_groups}, factors={self.factors}"
        )


class BSQ(Binary):
    """Binary spherical quantization (arXiv 2406.07548): u = z / |z|, latents sign(u) / sqrt(D), of length 1.

    The gradient passes straight through to u, and on to z. z = 0 has u = 0 and code 0; below 1e-6 u shrinks with z, so
    that no gradient explodes. Losses as for `LFQ`, with u in place of z. The published commitment loss sums over
    channels, so is D times this one; its weight is 0 in the authors' configurations, since the error is bounded anyway.

    Args:
        dim: D, the number of channels and of bits.
        temperature: of the soft codes; the logit of a bit is 4 u / (sqrt(D) temperature). The default is the authors'.
        entropy_groups: as for `LFQ`.
        factors: as for `LFQ`.

    Raises:
        ValueError: for arguments outside the above.

    Examples:
        >>> quantizer = BSQ(4)
        >>> out = quantizer(torch.tensor([[0.1, -2.0, 0.0, 3.0]]))
        >>> out.latents.tolist(), out.codes.tolist(), quantizer.bits
        ([[0.5, -0.5, -0.5, 0.5]], [[9]], 4.0)
    """

    def __init__(self, dim: int, *, temperature: float = 1.0, entropy_groups: int = 1, factors: int = 1):
        super().__init__(dim, temperature, entropy_groups, factors)

    @property
    def magnitude(self) -> float:
        return self.dim**-0.5

    def _place(self, x: Tensor) -> Tensor:
        # u does not depend on the length of z, so neither does its gradient on how z is scaled first: no square
        # overflows or underflows.
        x = x / x.detach().abs().amax(dim=-1, keepdim=True).clamp(min=TINY)
        return x / x.norm(dim=-1, keepdim=True).clamp(min=1.0)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, temperature={self.temperature}, entropy_groups={self.entropy_groups}, factors={self.factors}"
        )
