"""A quantizer: the points of a cubic lattice."""

from __future__ import annotations

import torch
from torch import Tensor

from latticode import Quantizer
from latticode.quantizers.base import Step, Tokens, token_mean
from latticode.quantizers.gradients import straight_through


class Cube(Quantizer):
    """Each of `dim` channels becomes the nearest of `side` integers around 0: side^dim codes."""

    def __init__(self, side: int, dim: int):
        super().__init__()
        if side < 2 or dim < 1:
            raise ValueError(f"side must be >= 2 and dim >= 1, got {side} and {dim}")
        self.side, self.dim, self.vocab = side, dim, (side**dim,)

    def _encode(self, x: Tensor) -> Tensor:
        return (self._indices(x).long() * self._powers(x)).sum(-1, keepdim=True)

    def _decode(self, codes: Tensor) -> Tensor:
        return (codes // self._powers(codes) % self.side).to(self._arithmetic) - (self.side - 1) / 2

    def _quantize(self, tokens: Tokens) -> Step:
        q = self._indices(tokens.values) - (self.side - 1) / 2
        losses = {"commitment": token_mean((tokens.target - q).square(), tokens.keep)}
        return Step(straight_through(tokens.values, q), self._encode(tokens.values), losses)

    def _indices(self, x: Tensor) -> Tensor:
        return (x + (self.side - 1) / 2).round().clamp(0, self.side - 1)

    def _powers(self, like: Tensor) -> Tensor:
        return self.side ** torch.arange(self.dim, device=like.device)
