"""Somebody else's tokenizer, behind two functions, so that it can be evaluated under the same protocol as ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from latticode.core.modules import described
from latticode.core.types import Reconstruction
from latticode.tokenizers.tokenizer import Tokenizer


class Foreign(Tokenizer):
    """Images (B, C, H, W) float in [-1, 1] to codes and back by functions that are given; to be measured, not trained.

    Images whose sides the stride does not divide are padded, and outputs cropped, as for every `Tokenizer`. It has no
    spec, so it cannot be saved.

    Args:
        encode: padded images to integer codes (B, h, w) or (B, h, w, K), h = H / stride.
        decode: such codes to images (B, C, H, W), about [-1, 1].
        vocab: the number of codes of a position, or of each of its K.
        stride: pixels per position along each side.
        channels: C.
        module: what both functions compute with, if it shall be moved and set to eval mode with this one.

    Raises:
        ValueError: for codes of another shape, type or range than announced, and outputs of another shape.

    Examples:
        >>> from latticode import Foreign
        >>> import torch
        >>> def encode(images):  # somebody else's: the mean of each patch, in 16 steps
        ...     means = torch.nn.functional.avg_pool2d(images, 4).mean(1)
        ...     return ((means + 1) / 2 * 15).round().long()
        >>> def decode(codes):
        ...     grey = codes[:, None].repeat_interleave(4, 2).repeat_interleave(4, 3) / 15 * 2 - 1
        ...     return grey.expand(-1, 3, -1, -1)
        >>> theirs = Foreign(encode, decode, vocab=16, stride=4)
        >>> result = theirs(torch.rand(2, 3, 10, 12) * 2 - 1)
        >>> result.codes.shape, result.output.shape
        (torch.Size([2, 3, 3, 1]), torch.Size([2, 3, 10, 12]))
    """

    def __init__(
        self,
        encode: Callable[[Tensor], Tensor],
        decode: Callable[[Tensor], Tensor],
        vocab: int | Sequence[int],
        stride: int,
        channels: int = 3,
        module: nn.Module | None = None,
    ):
        nn.Module.__init__(self)
        sizes = (vocab,) if isinstance(vocab, int) else tuple(vocab)
        if not sizes or min(sizes) < 1 or stride < 1 or channels < 1:
            raise ValueError(f"vocab, stride and channels must be >= 1, got {vocab}, {stride} and {channels}")
        self.module, self._functions = module, (encode, decode)
        self._vocab, self._channels, self._flat = sizes, channels, isinstance(vocab, int)
        self.axes, self.strides, self.leads, self.pixels = 2, (stride, stride), (0, 0), None
        self.encoder = self.decoder = self.quantizer = None  # type: ignore[assignment]

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self._channels

    @property
    def vocab(self) -> tuple[int, ...]:
        """The number of codes of each code slot."""
        return self._vocab

    def _encode(self, x: Tensor) -> Tensor:
        codes, grid = self._functions[0](x), self.grid(x.shape[2:])
        codes = codes[..., None] if codes.ndim == 3 and self._flat else codes
        expected = (len(x), *grid, len(self.vocab))
        if tuple(codes.shape) != expected or codes.is_floating_point():
            wanted = f"integer codes {expected} for images {tuple(x.shape)}"
            raise ValueError(f"encode should give {wanted}, got {described(codes)}")
        low, high = codes.flatten(0, -2).aminmax(dim=0)
        least, most = int(low.min()), [int(h) for h in high]
        if least < 0 or any(h >= size for h, size in zip(most, self.vocab, strict=True)):
            raise ValueError(f"encode gave codes {least} .. {most} where vocab is {self.vocab}")
        return codes.long()

    def _decode(self, codes: Tensor) -> Tensor:
        output = self._functions[1](codes[..., 0] if self._flat else codes)
        expected = (len(codes), self.channels, *(n * s for n, s in zip(codes.shape[1:-1], self.strides, strict=True)))
        if tuple(output.shape) != expected:
            raise ValueError(f"decode should give images {expected}, got {tuple(output.shape)}")
        return output.float()

    def forward(self, images: Tensor) -> Reconstruction:
        codes = self.encode(images)
        return Reconstruction(self.decode(codes, images.shape[2:]), codes, {})


__all__ = ["Foreign"]
