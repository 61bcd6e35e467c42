"""The structs that cross layers. Shapes: B batch, C channels, D latent width, K codes per position, *grid positions.

What a module returns is a named tuple, since that is the one struct that all of PyTorch takes apart and puts together
again: `torch.export`, hooks, `DataParallel`, FSDP, activation checkpointing, pytrees in Python and in C++.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor
from torch.utils import _pytree


class Quantized(NamedTuple):
    """What a quantizer returns; `latents, codes, losses = quantizer(z)` works as well.

    Examples:
        >>> import torch
        >>> from latticode import FSQ
        >>> out = FSQ([3, 5, 4])(torch.tensor([[0.25, 0.6, -7.0]]))
        >>> out.latents, out.codes, out.losses
        (tensor([[ 0.0000,  0.5000, -1.0000]]), tensor([[10]]), {})
    """

    latents: Tensor  # (B, *grid, D), what the decoder sees; carries the gradient
    codes: Tensor  # (B, *grid, K) int64; K codes per position, never squeezed
    losses: Mapping[str, Tensor] = {}  # unweighted scalars by name; empty for FSQ


class Reconstruction(NamedTuple):
    """What a tokenizer returns from `forward`.

    Examples:
        >>> import torch
        >>> from latticode import FSQ, Tokenizer
        >>> from latticode.autoencoders import ResidualDecoder, ResidualEncoder
        >>> encoder, decoder = ResidualEncoder(3, latent=16, hidden=8), ResidualDecoder(3, latent=16, hidden=8)
        >>> tokenizer = Tokenizer(encoder, FSQ([8, 5]), decoder).eval()
        >>> with torch.no_grad():
        ...     result = tokenizer(torch.zeros(1, 3, 16, 16))
        >>> result.output.shape, result.codes.shape, result.losses
        (torch.Size([1, 3, 16, 16]), torch.Size([1, 4, 4, 1]), {})
    """

    output: Tensor  # (B, C, *size), like the input
    codes: Tensor  # (B, *grid, K) int64
    losses: Mapping[str, Tensor]  # the quantizer's, unweighted


class Guided(NamedTuple):
    """What a model of a dense task returns from `forward` (`latticode.dense.uvim`).

    Examples:
        >>> import torch
        >>> depth = Guided(torch.zeros(1, 256, 8, 8), torch.zeros(1, 2, 2, 1, dtype=torch.int64), {})
        >>> output, codes, losses = depth
        >>> output.argmax(1).shape  # of 256 bins of depth, the likeliest at each pixel
        torch.Size([1, 8, 8])
    """

    output: Tensor  # (B, channels of the task, H, W)
    codes: Tensor  # (B, *grid, K) int64, by which it was guided
    losses: Mapping[str, Tensor]  # the quantizer's, unweighted


class Softened(NamedTuple):
    """Codes that were drawn, and the distributions that they were drawn from.

    Examples:
        >>> import torch
        >>> from latticode import VQ
        >>> codes, p = VQ(4, 2).soften(torch.randn(10, 2), temperature=0.5)
        >>> codes.shape, p.shape, torch.allclose(p.sum(-1), torch.ones(10, 1))
        (torch.Size([10, 1]), torch.Size([10, 1, 4]), True)
    """

    codes: Tensor  # (B, *grid, K) int64
    p: Tensor  # (B, *grid, K, C), C the largest codebook's size; 0 where a smaller one has no code


for _struct in (Quantized, Reconstruction, Guided, Softened):  # by name in the files of `torch.export.save`
    _pytree._register_namedtuple(  # pyright: ignore[reportPrivateUsage]
        _struct, serialized_type_name=f"latticode.{_struct.__name__}"
    )

Texts = tuple[tuple[str, ...], ...]  # of each of the B examples, all its captions; empty where the source has none


def first_texts(texts: Texts, count: int) -> tuple[str, ...]:
    """The first caption of each of `count` examples, '' where there is none."""
    return tuple(own[0] if own else "" for own in texts or ((),) * count)


@dataclass(frozen=True)
class Batch:
    """What a loader yields: preprocessed images, clips or waveforms and what is known of them.

    Examples:
        >>> import torch
        >>> batch = Batch(torch.zeros(3, 1, 4, 4), torch.tensor([7, -1, 2]), torch.arange(3))
        >>> batch.drop(1).labels
        tensor([-1,  2])
    """

    # float32 in [-1, 1]: images (B, C, H, W), videos (B, C, T, H, W), waveforms (B, C, T); dense examples are int32
    # (B, 3 + L, H, W), RGB 0..255 and then L label maps
    inputs: Tensor
    labels: Tensor  # (B,) int64; -1 = no label
    indices: Tensor  # (B,) int64, position in the source
    texts: Texts = ()

    def drop(self, count: int) -> Batch:
        """Without the first `count`."""
        return Batch(self.inputs[count:], self.labels[count:], self.indices[count:], self.texts[count:])

    def to(self, device: Any) -> Batch:
        """The same batch with its tensors on `device`."""
        return replace(
            self, inputs=self.inputs.to(device), labels=self.labels.to(device), indices=self.indices.to(device)
        )


@dataclass(frozen=True)
class CodeBatch:
    """Tokens of images instead of images: what a prior trains on.

    Examples:
        >>> import torch
        >>> batch = CodeBatch(torch.zeros(2, 4, 4, 1, dtype=torch.int64), torch.tensor([3, -1]), (("a cat",), ()))
        >>> first_texts(batch.texts, 2)
        ('a cat', '')
    """

    codes: Tensor  # (B, *grid, K) int64
    labels: Tensor  # (B,) int64; -1 = no label
    texts: Texts = ()
    soft: Tensor | None = None  # (B, *grid, K, C), what the codes were drawn from (`Softened.p`)
    images: Tensor | None = (
        None  # (B, 3, H, W) in [-1, 1], of whose unknown labels the codes tell (`latticode.dense.uvim`)
    )

    def to(self, device: Any) -> CodeBatch:
        """The same batch with its tensors on `device`."""
        soft, images = (None if t is None else t.to(device) for t in (self.soft, self.images))
        return replace(self, codes=self.codes.to(device), labels=self.labels.to(device), soft=soft, images=images)


@dataclass(frozen=True)
class Conditioning:
    """The condition of a prior. A label of -1 and an empty text ask for an unconditional sample.

    Examples:
        >>> import torch
        >>> Conditioning(labels=torch.tensor([3, -1, 7])).take(slice(0, 2)).labels
        tensor([ 3, -1])
    """

    labels: Tensor | None = None  # (B,) int64
    texts: tuple[str, ...] | None = None  # one for each of the B images
    images: Tensor | None = None  # (B, 3, H, W) in [-1, 1], of a prior that sees

    def take(self, rows: slice) -> Conditioning:
        """The condition of these examples of the batch alone."""
        told = {name: value[rows] for name, value in vars(self).items() if value is not None}
        return Conditioning(**told)


@dataclass(frozen=True)
class Sampling:
    """How a prior samples. A prior ignores what its decoding order has no use for.

    Examples:
        >>> greedy = Sampling(temperature=0.0)
        >>> Sampling(steps=18, guidance=2.0, guidance_schedule="linear").steps
        18
    """

    steps: int = 12  # forward passes of an iterative decoder
    temperature: float = 1.0  # of the token draw
    noise: float = (
        4.5  # Gumbel noise on the confidences at the first step, annealed to 0 (MaskGIT's choice temperature)
    )
    guidance: float = 0.0  # w in l_c + w (l_c - l_0); 0 = off
    guidance_schedule: str = "constant"  # of w over an iterative decoder's steps: constant, linear or cosine
    schedule: str = "cosine"  # of the masked fraction over the steps (`latticode.priors.schedules`)
    revisions: int = 0  # rounds in which a drafted image is generated again, part by part (draft-and-revise)
    revise_steps: int = 2  # parts of a revision
    top_k: int = 0  # keep the k likeliest tokens; 0 = all
    top_p: float = 1.0  # keep the likeliest tokens of this total probability


@runtime_checkable
class Coder(Protocol):
    """What turns examples into codes that a prior may be trained over: a tokenizer, or the oracle of a dense task
    (`latticode.dense.uvim`).

    Examples:
        >>> from latticode.tokenizers.palette import Palette
        >>> coder = Palette(16, channels=1)
        >>> isinstance(coder, Coder), coder.guides, coder.vocab, coder.grid((8, 8))
        (True, False, (16,), (8, 8))
    """

    guides: bool  # True: its codes say nothing by themselves, but guide what a model makes of an image

    @property
    def channels(self) -> int:
        """Of the examples."""
        ...

    @property
    def vocab(self) -> tuple[int, ...]:
        """The number of codes of each of the K code slots of a position."""
        ...

    @property
    def radix(self) -> tuple[int, ...] | None:
        """Sizes of the digits of every code, if it has such."""
        ...

    @property
    def bits(self) -> float:
        """Bits per position at a uniform distribution of codes."""
        ...

    def grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """The grid of the codes of examples of `size`."""
        ...

    def encode(self, inputs: Tensor, /) -> Tensor:
        """Codes (B, *grid, K) int64 of examples (B, C, *size)."""
        ...

    def image(self, inputs: Tensor, /) -> Tensor | None:
        """(B, 3, H, W) in [-1, 1]: what of examples a prior of the codes sees; None where it sees nothing."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 over spec and weights."""
        ...

    def save_pretrained(self, folder: str | Path, /) -> Path:
        """Write the model to a folder."""
        ...
