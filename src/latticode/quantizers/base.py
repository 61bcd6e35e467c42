"""The contract of every quantizer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from latticode.types import Quantized


class Quantizer(nn.Module, ABC):
    """Maps continuous latents to discrete codes and back. Channel-last, any rank >= 1, empty batches allowed.

    Laws, held by `tests/laws/test_quantizers.py` for every registered class: `decode(encode(z))` equals the latents of
    `forward(z)` in eval mode bit for bit; codes lie in `vocab`; the result for a token does not depend on the others in
    eval mode; a spec rebuilds the module.
    """

    dim: int  # D, the width of the latents
    vocab: tuple[int, ...]  # the number of codes of each of the K code slots

    @property
    def bits(self) -> float:
        """Bits per position at a uniform distribution of codes: the sum of log2 of `vocab`."""
        return sum(math.log2(size) for size in self.vocab)

    @abstractmethod
    def forward(self, z: Tensor) -> Quantized:
        """Quantize `z` (..., D) with gradients. May update running statistics, in training mode only."""

    @abstractmethod
    def encode(self, z: Tensor) -> Tensor:
        """Codes (..., K) int64 of `z` (..., D). Pure. A token that holds a NaN gets the code -1."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Latents (..., D) of `codes` (..., K). Raises ValueError for codes outside `vocab` or of another K."""

    def _check_latents(self, z: Tensor) -> None:
        if z.ndim < 1 or z.shape[-1] != self.dim or not z.is_floating_point():
            raise ValueError(f"{type(self).__name__} expects float latents (..., {self.dim}), got {_describe(z)}")

    def _check_codes(self, codes: Tensor) -> None:
        if codes.ndim < 1 or codes.shape[-1] != len(self.vocab) or codes.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} expects integer codes (..., {len(self.vocab)}), got {_describe(codes)}"
            )
        if torch.compiler.is_compiling() or codes.numel() == 0:
            return
        flat = codes.reshape(-1, len(self.vocab))
        low, high = flat.amin(0).tolist(), flat.amax(0).tolist()
        if any(a < 0 or b >= size for a, b, size in zip(low, high, self.vocab, strict=True)):
            raise ValueError(f"codes must lie in 0 .. {[n - 1 for n in self.vocab]} per slot, got {low} .. {high}")


def _describe(t: Tensor) -> str:
    return f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}"
