"""The structs that cross layers. Shapes: B batch, C channels, D latent width, K codes per position, *grid positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Quantized:
    """What a quantizer returns."""

    latents: Tensor  # (B, *grid, D), what the decoder sees; carries the gradient
    codes: Tensor  # (B, *grid, K) int64; K codes per position, never squeezed
    losses: Mapping[str, Tensor] = field(default_factory=dict)  # unweighted scalars by name; empty for FSQ


@dataclass(frozen=True)
class Reconstruction:
    """What a tokenizer returns from `forward`."""

    output: Tensor  # (B, C, *size), like the input
    codes: Tensor  # (B, *grid, K) int64
    losses: Mapping[str, Tensor]  # the quantizer's, unweighted


@dataclass(frozen=True)
class Batch:
    """What a loader yields: preprocessed images, clips or waveforms and what is known of them."""

    inputs: Tensor  # float32 in [-1, 1]: images (B, C, H, W), videos (B, C, T, H, W), waveforms (B, C, T)
    labels: Tensor  # (B,) int64; -1 = no label
    indices: Tensor  # (B,) int64, position in the source

    def drop(self, count: int) -> Batch:
        """Without the first `count`."""
        return Batch(self.inputs[count:], self.labels[count:], self.indices[count:])

    def to(self, device: Any) -> Batch:
        return replace(
            self, inputs=self.inputs.to(device), labels=self.labels.to(device), indices=self.indices.to(device)
        )


@dataclass(frozen=True)
class CodeBatch:
    """Tokens of images instead of images: what a prior trains on."""

    codes: Tensor  # (B, *grid, K) int64
    labels: Tensor  # (B,) int64; -1 = no label

    def to(self, device: Any) -> CodeBatch:
        return CodeBatch(self.codes.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Conditioning:
    """What a prior is told. A label of -1 asks for an unconditional sample."""

    labels: Tensor | None = None  # (B,) int64

    def take(self, rows: slice) -> Conditioning:
        return Conditioning(None if self.labels is None else self.labels[rows])


@dataclass(frozen=True)
class Sampling:
    """How a prior samples. A prior ignores what its decoding order has no use for."""

    steps: int = 12  # forward passes of an iterative decoder
    temperature: float = 1.0  # of the token draw
    noise: float = (
        4.5  # Gumbel noise on the confidences at the first step, annealed to 0 (MaskGIT's choice temperature)
    )
    guidance: float = 0.0  # w in l_c + w (l_c - l_0); 0 = off
    schedule: str = "cosine"  # of the masked fraction over the steps
    top_k: int = 0  # keep the k likeliest tokens; 0 = all
    top_p: float = 1.0  # keep the likeliest tokens of this total probability
