"""Tokenizer = encoder + quantizer + decoder: images, videos or waveforms to codes and back.

The only place that moves channels. Shapes: B batch, C channels, *size samples along each axis, *grid code positions,
K codes per position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.autoencoders.contract import paired
from latticode.core.modules import described
from latticode.core.pretrained import Pretrained
from latticode.core.types import Quantized, Reconstruction, Softened
from latticode.quantizers.base import Quantizer
from latticode.quantizers.vq import Softening

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
INPUTS = {1: "waveforms (B, {}, T)", 2: "images (B, {}, H, W)", 3: "videos (B, {}, T, H, W)"}


class Tokenizer(Pretrained):
    """Inputs (B, C, *size) float in [-1, 1] to codes (B, *grid, K) int64 and back.

    Two 1x1 convolutions, `quant_conv` and `post_quant_conv`, fit the encoder's and decoder's width to the quantizer's.
    A size that the stride does not divide is padded at the end of its axis (for images below and at the right) by
    repeating the border, and the decoder's output is cropped to `size` again.

    Args:
        encoder: any module that keeps the contract of `latticode.autoencoders.contract.Encoder`.
        quantizer: any of the library.
        decoder: keeps that of `Decoder`, with the encoder's axes, stride and lead.
        pixels: what the decoder's output says of the pixels, e.g. `LogitLaplace`; None: it is the image itself.
        gain: the quantizer is given so many times what `quant_conv` says, > 0. At the start a convolutional encoder's
            latents are narrow beside the units of bounds and commitment losses; most quantizers reconstruct better
            with 4 (docs/results/study.md). For an FSQ it is a steeper bound.
        feedback: whether positions are quantized in two turns, like the squares of a chessboard: those of the second
            are told the errors of their neighbours by `neighbours`, a learned linear map that is 0 at first. So what
            the decoder would lose at one position another one makes good. `decode` stays as it is; codes depend on one
            position more in every direction, in time too, so that a causal encoder's are not causal.

    `encode` and `forward` raise ValueError for another number of channels or axes, an axis without samples, another
    type than floats and, in eval mode, values that are not finite (in training the loss shows them; looking would make
    a GPU wait at every step).

    Examples:
        >>> import torch
        >>> from latticode import FSQ, Tokenizer
        >>> from latticode.autoencoders import ResidualDecoder, ResidualEncoder
        >>> _ = torch.manual_seed(0)
        >>> encoder, decoder = ResidualEncoder(3, latent=16, hidden=8), ResidualDecoder(3, latent=16, hidden=8)
        >>> tokenizer = Tokenizer(encoder, FSQ([8, 5, 5, 5]), decoder).eval()
        >>> images = torch.rand(2, 3, 30, 32) * 2 - 1
        >>> codes = tokenizer.encode(images)
        >>> codes.shape, tokenizer.stride, tokenizer.vocab, round(tokenizer.bits, 2)
        (torch.Size([2, 8, 8, 1]), 4, (1000,), 9.97)
        >>> tokenizer.decode(codes, (30, 32)).shape  # padded to 32 x 32 and cropped again
        torch.Size([2, 3, 30, 32])
        >>> torch.equal(tokenizer(images).codes, codes)
        True
    """

    guides = False  # its codes can be decoded by themselves (`latticode.core.types.Coder`)
    feedback = False  # of one whose positions do not come from `_latents`

    def __init__(
        self,
        encoder: nn.Module,
        quantizer: Quantizer,
        decoder: nn.Module,
        pixels: nn.Module | None = None,
        gain: float = 1.0,
        feedback: bool = False,
    ):
        super().__init__()
        if not 0 < gain < math.inf:
            raise ValueError(f"gain must be > 0, got {gain}")
        self.gain, self.feedback = gain, feedback
        self.encoder, self.quantizer, self.decoder, self.pixels = encoder, quantizer, decoder, pixels
        self.axes, self.strides, lead = paired(encoder, decoder)
        self.leads = (lead, *[0] * (self.axes - 1))
        self._fit(0)
        if feedback:
            self.neighbours = nn.Linear(2 * self.axes * quantizer.dim, quantizer.dim, bias=False)
            nn.init.zeros_(self.neighbours.weight)

    def _fit(self, given: int) -> None:
        """The 1x1 convolutions, with `given` channels from elsewhere beside the encoder's and the quantizer's."""
        encoder, decoder, dim = self.encoder, self.decoder, self.quantizer.dim
        conv = CONVOLUTIONS[self.axes]
        self.quant_conv: nn.Module = conv(int(encoder.latent) + given, dim, 1)  # type: ignore[arg-type]
        self.post_quant_conv: nn.Module = conv(dim + given, int(decoder.latent), 1)  # type: ignore[arg-type]

    @property
    def stride(self) -> int | tuple[int, ...]:
        """Samples per position, one number if all axes share it."""
        return self.strides[0] if len(set(self.strides)) == 1 else self.strides

    @property
    def channels(self) -> int:
        """Channels of the inputs."""
        return int(self.encoder.in_channels)  # type: ignore[arg-type]

    @property
    def vocab(self) -> tuple[int, ...]:
        """The number of codes of each code slot."""
        return self.quantizer.vocab

    @property
    def radix(self) -> tuple[int, ...] | None:
        """Sizes of the digits of every code, if the quantizer has such."""
        return self.quantizer.radix

    @property
    def bits(self) -> float:
        """Bits per position at a uniform distribution of codes."""
        return sum(math.log2(size) for size in self.vocab)

    def grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """The code grid of inputs of `size`: ceil(n / stride), after the `lead` samples that have a position each."""
        least = [max(1, lead) for lead in self.leads]
        if len(size) != self.axes or any(n < m for n, m in zip(size, least, strict=True)):
            expected = INPUTS[self.axes].format(self.channels)
            raise ValueError(f"expected {expected} of at least {least} samples, got size {tuple(size)}")
        # Not -(-n // s): ONNX divides integers towards zero.
        return tuple(lead + (n - lead + s - 1) // s for n, s, lead in zip(size, self.strides, self.leads, strict=True))

    def encode(self, images: Tensor) -> Tensor:
        """Codes (B, *grid, K) of `images` (B, C, *size)."""
        return self._encode(self._padded(images))

    def image(self, images: Tensor) -> None:
        """What of `images` a prior of the codes sees: nothing."""

    def soften(self, images: Tensor, temperature: float) -> Softened:
        """Codes (B, *grid, K) of `images` (B, C, *size) drawn by their distance, and their distributions
        (`latticode.quantizers.vq.Softening.soften`). Raises ValueError for a quantizer that cannot draw them."""
        if not isinstance(self.quantizer, Softening):
            name = type(self.quantizer).__name__
            raise ValueError(f"codes are drawn by their distance from those of vq, simvq or residual, not of {name}")
        with torch.no_grad():
            latents = self._latents(self.encoder(self._padded(images)))
        return self.quantizer.soften(latents, temperature)

    def decode(self, codes: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Images (B, C, *(grid * stride)) of `codes` (B, *grid, K), cropped to `size` if given."""
        output = self._decode(codes)
        return self._shown(output if size is None else self._cropped(output, size))

    def forward(self, images: Tensor) -> Reconstruction:
        output, codes, losses = self._reconstruct(self._padded(images))
        output = self._cropped(output, images.shape[2:])
        if self.pixels is not None:
            likelihood: Any = self.pixels
            losses = {**losses, likelihood.name: likelihood.nll(output, images)}
        return Reconstruction(self._shown(output), codes, losses)

    def levels(self, codes: Tensor) -> list[Tensor]:
        """`codes` grid by grid, each (B, *its grid, its K), the coarsest first; here there is one."""
        return [codes]

    def pack(self, levels: Sequence[Tensor]) -> Tensor:
        """The inverse of `levels`."""
        (codes,) = levels
        return codes

    def _latents(self, features: Tensor) -> Tensor:
        """What is to be quantized, (B, *grid, D)."""
        latents = self.quant_conv(features)
        latents = latents if self.gain == 1 else self.gain * latents
        latents = latents.movedim(1, -1)  # a view under channels_last
        return self._fed(latents) if self.feedback else latents

    def _fed(self, latents: Tensor) -> Tensor:
        """`latents` (B, *grid, D), those of every second position moved by the errors of their neighbours."""
        places = [torch.arange(n, device=latents.device) for n in latents.shape[1:-1]]
        second = (torch.stack(torch.meshgrid(*places, indexing="ij"), -1).sum(-1, keepdim=True) % 2).bool()
        error = self.quantizer.error(latents).masked_fill(second, 0.0)
        around = [_shifted(error, axis, by) for axis in range(1, 1 + self.axes) for by in (1, -1)]
        return latents + self.neighbours(torch.cat(around, -1)).where(second, 0.0)

    def _encode(self, x: Tensor) -> Tensor:
        return self.quantizer.encode(self._latents(self.encoder(x)))

    def _decode(self, codes: Tensor) -> Tensor:
        return self._generate(self.quantizer.decode(codes))

    def _reconstruct(self, x: Tensor) -> tuple[Tensor, Tensor, Mapping[str, Tensor]]:
        """The decoder's output, the codes and the quantizer's losses of padded `x`."""
        quantized: Quantized = self.quantizer(self._latents(self.encoder(x)))
        return self._generate(quantized.latents), quantized.codes, quantized.losses

    def _generate(self, latents: Tensor, *given: Tensor) -> Tensor:
        maps = latents.movedim(-1, 1)
        return self.decoder(self.post_quant_conv(torch.cat([maps, *given], 1) if given else maps))

    def _padded(self, images: Tensor) -> Tensor:
        if images.ndim != 2 + self.axes or images.shape[1] != self.channels or not images.is_floating_point():
            raise ValueError(f"expected float {INPUTS[self.axes].format(self.channels)}, got {described(images)}")
        grid = self.grid(images.shape[2:])
        if not self.training and not torch.compiler.is_compiling() and not bool(images.isfinite().all()):
            count = int((~images.isfinite()).sum())
            raise ValueError(f"expected finite values, got {count} of {images.numel()} that are NaN or infinite")
        whole = [lead + (g - lead) * s for g, s, lead in zip(grid, self.strides, self.leads, strict=True)]
        pad = [n - have for n, have in zip(whole, images.shape[2:], strict=True)]
        # A graph that is traced once must pad whatever size it is given; it could not choose.
        if not torch.compiler.is_compiling() and not any(pad):
            return images
        return F.pad(images, [p for n in reversed(pad) for p in (0, n)], mode="replicate")

    def _cropped(self, output: Tensor, size: Sequence[int]) -> Tensor:
        if len(size) != self.axes:
            raise ValueError(f"expected a size of {self.axes} axes, got {tuple(size)}")
        return output[(..., *(slice(n) for n in size))]

    def _shown(self, output: Tensor) -> Tensor:
        return output if self.pixels is None else self.pixels.image(output)  # type: ignore[operator]


def _shifted(t: Tensor, axis: int, by: int) -> Tensor:
    """`t` moved along `axis` by 1 or -1, with zeros where nothing comes from."""
    zero, n = torch.zeros_like(t.narrow(axis, 0, 1)), t.shape[axis] - 1
    return torch.cat([zero, t.narrow(axis, 0, n)] if by == 1 else [t.narrow(axis, 1, n), zero], axis)
