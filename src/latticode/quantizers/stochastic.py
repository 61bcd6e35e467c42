"""Quantizers that draw their codes in training: Gumbel-softmax (dVAE) and stochastic quantization (SQ-VAE).

Both weigh every code for every token, so training takes O(N K) memory by nature.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode import kernels
from latticode.quantizers.base import Quantizer, Step, Tokens, token_mean
from latticode.quantizers.gradients import straight_through


class Gumbel(Quantizer):
    """Codes drawn from a categorical distribution that a linear map of the latents gives (dVAE, arXiv 2102.12092).

    With logits l = linear(z), in training the weights are y = softmax((l + g) / temperature), g ~ Gumbel(0, 1), and the
    latents y E with the learned codes E (K, D); `codes` is the argmax of y, and the latents are near its row of E, not
    on it, unless `hard`. In eval mode the code is the argmax of l and the latents are its row, with the gradient of
    softmax(l / temperature).

    Loss, unweighted: `kl`, the mean over tokens of sum_k p_k ln(p_k K), p = softmax(l), in nats: the divergence from
    the uniform prior, exact and the same in both modes; 0 for uniform p, at most ln K.

    Args:
        size: K, the number of codes.
        dim: D, the width of latents and codes.
        temperature: > 0, of the weights. An attribute that may be set at any step of training: DALL-E lowers it from 1
            to 1/16.
        hard: latents in training are exactly the row of the drawn code; the gradient is that of y E to the logits and
            that of the row to E (straight-through Gumbel, arXiv 1611.01144).

    Raises:
        ValueError: for arguments outside the above.

    Examples:
        >>> quantizer = Gumbel(64, 8)
        >>> quantizer.temperature = 0.5  # lowered in training
        >>> out = quantizer(torch.randn(100, 8))
        >>> out.codes.shape, list(out.losses)
        (torch.Size([100, 1]), ['kl'])
    """

    def __init__(self, size: int, dim: int, *, temperature: float = 1.0, hard: bool = False):
        super().__init__()
        _check(size, dim, temperature)
        self.size, self.dim, self.vocab = size, dim, (size,)
        self.temperature, self.hard = temperature, hard
        self.logits = nn.Linear(dim, size)
        self.embedding = nn.Parameter(torch.randn(size, dim))

    def _quantize(self, tokens: Tokens) -> Step:
        scores = self._scores(tokens.values)
        aimed = scores if tokens.target is tokens.values else self._scores(tokens.target)
        log_p = aimed.log_softmax(dim=-1)
        kl = (log_p.exp() * log_p).sum(dim=-1, keepdim=True) + math.log(self.size)
        drawn = scores + gumbel_like(scores) if self.training else scores
        weights, codes = (drawn / self.temperature).softmax(dim=-1), drawn.argmax(dim=-1)
        vectors = self.embedding.to(weights)
        exact = self.hard or not self.training
        latents = hard_choice(weights, codes, vectors) if exact else weights @ vectors
        return Step(latents, codes[..., None], {"kl": token_mean(kl.clamp(min=0), tokens.keep)})

    def _encode(self, x: Tensor) -> Tensor:
        return self._scores(x).argmax(dim=-1, keepdim=True)

    def _decode(self, codes: Tensor) -> Tensor:
        return F.embedding(codes[..., 0], self.embedding.to(self._arithmetic))

    def _scores(self, x: Tensor) -> Tensor:
        """Logits (..., K)."""
        return F.linear(x, self.logits.weight.to(x), self.logits.bias.to(x))

    def extra_repr(self) -> str:
        return f"{self.size}, {self.dim}, temperature={self.temperature}, hard={self.hard}"


class StochasticVQ(Quantizer):
    """Codes drawn by their distance, with a learned variance that anneals itself (SQ-VAE, arXiv 2205.07547).

    The posterior of a token is p_k = softmax(-|z - c_k|^2 / (2 v)), v = exp(log_variance) one learned number. In
    training the latents are y C with y = softmax((ln p + g) / temperature), g ~ Gumbel(0, 1): near the code, not on it,
    and `codes` is the argmax of y. In eval mode it is the nearest code, with a straight-through gradient.

    Losses, in nats per token, both of weight 1 beside a likelihood: `kl`, the mean of sum_k p_k ln(p_k K), the
    divergence of the codes from a uniform prior; `kl_continuous`, the mean of |z - q|^2 / (2 v), summed over channels,
    that of the two normal distributions around z and the latents q. Neither holds v down: only the loss of the
    decoder does, which suffers from the noise.

    Args:
        size: K, the number of codes.
        dim: D, the width of latents and codes.
        temperature: > 0, of the weights; an attribute that may be set at any step of training.
        variance: v at the start, > 0, in squared units of the latents.

    Raises:
        ValueError: for arguments outside the above.

    Examples:
        >>> quantizer = StochasticVQ(64, 8)
        >>> out = quantizer(torch.randn(100, 8))
        >>> loss = out.losses["kl"] + out.losses["kl_continuous"]  # beside a likelihood
        >>> out.codes.shape
        torch.Size([100, 1])
    """

    def __init__(self, size: int, dim: int, *, temperature: float = 1.0, variance: float = 1.0):
        super().__init__()
        _check(size, dim, temperature)
        if not 0 < variance < math.inf:
            raise ValueError(f"variance must be > 0, got {variance}")
        self.size, self.dim, self.vocab = size, dim, (size,)
        self.temperature, self.variance = temperature, variance
        self.embedding = nn.Parameter(torch.randn(size, dim))
        self.log_variance = nn.Parameter(torch.tensor([math.log(variance)]))  # (1,): no scalar can be sharded
        self.register_load_state_dict_pre_hook(_as_vector)

    def _quantize(self, tokens: Tokens) -> Step:
        x, target, keep = tokens.values, tokens.target, tokens.keep
        vectors = self.embedding.to(x)
        precision = torch.exp(-self.log_variance.to(x))
        if self.training:
            scores = _log_posterior(x, vectors, precision)
            drawn = scores + gumbel_like(scores)
            codes = drawn.argmax(dim=-1)
            q = latents = (drawn / self.temperature).softmax(dim=-1) @ vectors
        else:
            codes = self._encode(x)[..., 0]
            q = F.embedding(codes, vectors)
            latents = straight_through(x, q)
        weights = keep.reshape(-1).to(x)
        # In units of the standard deviation the temperature is a constant, and the gradient reaches the variance.
        unit = precision.sqrt()
        total, _ = kernels.soft_assignment(target.reshape(-1, self.dim) * unit, vectors * unit, 2.0, weights)
        count = weights.sum()
        square = (target - q).square() * (precision * self.dim / 2)  # token_mean divides by the channels
        kl = (count * math.log(self.size) - total).clamp(min=0)
        return Step(latents, codes[..., None], {"kl": (kl, count), "kl_continuous": token_mean(square, keep)})

    def _encode(self, x: Tensor) -> Tensor:
        return kernels.nearest_code(x.reshape(-1, self.dim), self.embedding).view(*x.shape[:-1], 1)

    def _decode(self, codes: Tensor) -> Tensor:
        return F.embedding(codes[..., 0], self.embedding.to(self._arithmetic))

    def extra_repr(self) -> str:
        return f"{self.size}, {self.dim}, temperature={self.temperature}, variance={self.variance}"


def _as_vector(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Version 0.1 saved the variance as a scalar."""
    if (saved := state.get(f"{prefix}log_variance")) is not None:
        state[f"{prefix}log_variance"] = saved.reshape(1)


def gumbel_like(x: Tensor) -> Tensor:
    """Independent draws from Gumbel(0, 1), in the shape and type of `x`."""
    # A uniform draw of 0 would be -inf, and the gradient of a row of these NaN.
    return -torch.log(-torch.log(torch.rand_like(x).clamp(min=torch.finfo(x.dtype).tiny)))


def hard_choice(weights: Tensor, codes: Tensor, vectors: Tensor) -> Tensor:
    """Exactly rows `codes` (...) of `vectors` (K, D), with the gradient of `weights` (..., K) @ sg(vectors) as well."""
    return F.embedding(codes, vectors) + (weights - weights.detach()) @ vectors.detach()


def _log_posterior(x: Tensor, vectors: Tensor, precision: Tensor) -> Tensor:
    """-|x - c|^2 precision / 2 of `x` (..., D) and `vectors` (K, D), less what all codes of a token share: (..., K)."""
    # Seen from the middle of the codes, so that a common offset costs no digits; distances do not depend on it.
    middle = vectors.detach().mean(dim=0)
    x, vectors = x - middle, vectors - middle
    return (x @ vectors.t() - vectors.square().sum(dim=-1) / 2) * precision


def _check(size: int, dim: int, temperature: float) -> None:
    if size < 1 or dim < 1:
        raise ValueError(f"size and dim must be >= 1, got {size} and {dim}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be > 0, got {temperature}")
