"""The convolutional encoder and decoder of VQGAN (Esser et al. 2021, arXiv 2012.09841, App. A)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from latticode.nn.conv import Downsample, Level, Middle, Upsample, channels_last, normalisation


def _per_level(blocks: int | Sequence[int], levels: int) -> list[int]:
    counts = [blocks] * levels if isinstance(blocks, int) else list(blocks)
    if len(counts) != levels or any(n < 0 for n in counts):
        raise ValueError(f"blocks must be one number >= 0 or one for each of {levels} multipliers, got {blocks}")
    return counts


def _check(multipliers: Sequence[int], attention: Sequence[int]) -> None:
    if not multipliers or any(m < 1 for m in multipliers):
        raise ValueError(f"multipliers must be one or more integers >= 1, got {list(multipliers)}")
    if any(not 0 <= level < len(multipliers) for level in attention):
        raise ValueError(f"attention names levels 0 .. {len(multipliers) - 1}, got {list(attention)}")


def _reach(norm: str, attention: Sequence[int], blocks: int | Sequence[int], multipliers: Sequence[int]) -> int | None:
    """What `reach` of both networks is; the two are mirrors, so one formula holds.

    The two convolutions of each residual block add their level's step of 1, 2, 4, ... samples on either side; so do the
    ends, the middle's four convolutions and each change of resolution: 1 + 5 * stride + (stride - 1).
    """
    if norm == "group" or attention:
        return None
    counts = _per_level(blocks, len(multipliers))
    return 6 * 2 ** (len(counts) - 1) + sum(2 * n * 2**level for level, n in enumerate(counts))


class ConvEncoder(nn.Module):
    """(B, in_channels, H, W) -> (B, latent, H / stride, W / stride) with stride 2^(len(multipliers) - 1).

    Args:
        in_channels: 1 for grey, 3 for colour.
        latent: channels of the output.
        width: channels of the finest level before its multiplier; level i has width * multipliers[i].
        multipliers: one per resolution; each step between two halves H and W.
        blocks: residual blocks per level, one number or one per level.
        attention: indices of the levels with self-attention; the middle has it iff this is not empty.
        groups: of every group normalisation; divides every width.
        norm: "group" as published, or "position", which normalises over the channels of each position. With that and
            no attention an output depends on a bounded receptive field, so that tiles which share enough give the codes
            of the whole image (`latticode.tokenizers.tiling`).

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import ConvEncoder
        >>> encoder = ConvEncoder(3, latent=16, width=8, multipliers=(1, 2, 2), groups=4)
        >>> encoder.stride, encoder(torch.randn(2, 3, 32, 32)).shape
        (4, torch.Size([2, 16, 8, 8]))
        >>> local = ConvEncoder(3, latent=16, width=8, multipliers=(1, 2), groups=4, norm="position")
        >>> encoder.reach, local.reach  # None: a position depends on the whole image
        (None, 24)
    """

    def __init__(
        self,
        in_channels: int = 3,
        latent: int = 256,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int | Sequence[int] = 2,
        attention: Sequence[int] = (),
        groups: int = 32,
        norm: str = "group",
    ):
        super().__init__()
        _check(multipliers, attention)
        self.in_channels, self.latent, self.width = in_channels, latent, width
        self.groups, self.norm, normed = groups, norm, normalisation(norm, groups)
        self.multipliers, self.attention = list(multipliers), list(attention)
        self.blocks = blocks if isinstance(blocks, int) else list(blocks)
        self.stride = 2 ** (len(multipliers) - 1)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.down = nn.ModuleList()
        here = width
        for level, (m, n) in enumerate(zip(multipliers, _per_level(blocks, len(multipliers)), strict=True)):
            widths = [here] + [width * m] * n
            here = widths[-1]
            down = Downsample(here) if level < len(multipliers) - 1 else None
            self.down.append(Level(widths, normed, level in attention, "downsample", down))
        self.mid = Middle(here, normed, bool(attention))
        self.norm_out = normed(here)
        self.conv_out = nn.Conv2d(here, latent, 3, padding=1)

    @property
    def reach(self) -> int | None:
        """A position depends on its own stride^2 samples and on this many more on every side; None: on all there are.

        On one side it may be fewer, because halving pads on the other.
        """
        return _reach(self.norm, self.attention, self.blocks, self.multipliers)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(channels_last(x))
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class ConvDecoder(nn.Module):
    """(B, latent, h, w) -> (B, out_channels, h * stride, w * stride): the mirror of `ConvEncoder`.

    Arguments as there; `blocks` and `multipliers` are given finest level first too. The published decoder has one
    block more per level than its encoder.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import ConvDecoder
        >>> decoder = ConvDecoder(3, latent=16, width=8, multipliers=(1, 2, 2), groups=4)
        >>> decoder(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        out_channels: int = 3,
        latent: int = 256,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int | Sequence[int] = 3,
        attention: Sequence[int] = (),
        groups: int = 32,
        norm: str = "group",
    ):
        super().__init__()
        _check(multipliers, attention)
        self.out_channels, self.latent, self.width = out_channels, latent, width
        self.groups, self.norm, normed = groups, norm, normalisation(norm, groups)
        self.multipliers, self.attention = list(multipliers), list(attention)
        self.blocks = blocks if isinstance(blocks, int) else list(blocks)
        self.stride = 2 ** (len(multipliers) - 1)
        here = width * multipliers[-1]
        self.conv_in = nn.Conv2d(latent, here, 3, padding=1)
        self.mid = Middle(here, normed, bool(attention))
        counts = _per_level(blocks, len(multipliers))
        levels: list[Level] = []
        for level in reversed(range(len(multipliers))):
            widths = [here] + [width * multipliers[level]] * counts[level]
            here = widths[-1]
            up = Upsample(here) if level > 0 else None
            levels.append(Level(widths, normed, level in attention, "upsample", up))
        self.up = nn.ModuleList(reversed(levels))  # up.0 is the finest level, as in the published key names
        self.norm_out = normed(here)
        self.conv_out = nn.Conv2d(here, out_channels, 3, padding=1)

    @property
    def reach(self) -> int | None:
        """A position changes its own stride^2 samples and this many more on every side; None: all there are."""
        return _reach(self.norm, self.attention, self.blocks, self.multipliers)

    @property
    def last_layer(self) -> Tensor:
        """The weight that the output comes from: where an adaptive adversarial weight measures gradients."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(channels_last(z)))
        for level in reversed(self.up):  # type: ignore[arg-type]
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
