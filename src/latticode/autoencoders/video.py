"""The causal 3-D convolutional encoder and decoder of MAGVIT-v2 (Yu et al. 2023, arXiv 2310.05737, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from latticode.nn.causal import CausalConv3d, CausalUpsample, FrameNorm, put_before


class ResidualBlock3d(nn.Module):
    """(B, in, T, H, W) -> (B, out, T, H, W): twice norm, SiLU, causal convolution; a shortcut where widths differ.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders.video import ResidualBlock3d
        >>> ResidualBlock3d(8, 16, groups=4)(torch.randn(2, 8, 3, 6, 6)).shape
        torch.Size([2, 16, 3, 6, 6])
    """

    def __init__(self, inputs: int, outputs: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = FrameNorm(inputs, groups), CausalConv3d(inputs, outputs)
        self.norm2, self.conv2 = FrameNorm(outputs, groups), CausalConv3d(outputs, outputs)
        self.shortcut = CausalConv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class _Settings(nn.Module):
    """What encoder and decoder share."""

    axes, lead = 3, 1  # the first frame is a group of its own: a single image is a clip of one frame

    def __init__(
        self,
        latent: int,
        width: int,
        multipliers: Sequence[int],
        strides: Sequence[Sequence[int]],
        blocks: int | Sequence[int],
        groups: int,
        patch: Sequence[int],
    ):
        super().__init__()
        counts = [blocks] * len(multipliers) if isinstance(blocks, int) else list(blocks)
        if not multipliers or min(multipliers) < 1 or len(counts) != len(multipliers) or min(counts) < 0:
            raise ValueError(
                "multipliers must be integers >= 1 and blocks one number >= 0 or one for each of them, "
                f"got {list(multipliers)} and {blocks}"
            )
        steps = [patch, *strides]
        if len(strides) != len(multipliers) - 1 or any(len(s) != 2 or not set(s) <= {1, 2} for s in steps):
            raise ValueError(
                f"patch must be a pair (time, space) of 1 or 2 and strides {len(multipliers) - 1} such pairs, one "
                f"between two multipliers, got {list(patch)} and {[list(s) for s in strides]}"
            )
        self.latent, self.width, self.groups = latent, width, groups
        self.multipliers = list(multipliers)
        self.patch, *self.strides = [(s[0], s[1]) for s in steps]
        self.blocks = blocks if isinstance(blocks, int) else list(blocks)
        self.counts = counts
        time, space = (math.prod(s[i] for s in steps) for i in (0, 1))
        self.stride = (time, space, space)


class VideoEncoder(_Settings):
    """(B, in_channels, T, H, W) -> (B, latent, 1 + (T - 1) / stride[0], H / stride[1], W / stride[2]).

    Output t depends on the frames up to stride[0] * t only.

    Args:
        in_channels: 1 for grey, 3 for colour.
        latent: channels of the output.
        width: channels of the finest level before its multiplier; level i has width * multipliers[i].
        multipliers: one per resolution.
        strides: (time, space) between two resolutions, finest first, 1 or 2 each.
        blocks: residual blocks per level, one number or one per level; the coarsest has two more.
        groups: of every group normalisation; divides every width.
        patch: (time, space) of the first convolution's stride, 1 or 2 each: no work at the resolution of the frames.
        before: what the convolutions put before the first frame, "copies" of it or "zeros".

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import VideoEncoder
        >>> small = dict(latent=16, width=8, multipliers=(1, 2), strides=((2, 2),), blocks=1, groups=4)
        >>> encoder = VideoEncoder(3, **small)
        >>> encoder.stride, encoder(torch.randn(1, 3, 5, 8, 8)).shape  # the first frame has a position of its own
        ((2, 2, 2), torch.Size([1, 16, 3, 4, 4]))
    """

    def __init__(
        self,
        in_channels: int = 3,
        latent: int = 256,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 4),
        strides: Sequence[Sequence[int]] = ((1, 2), (2, 2), (2, 2)),
        blocks: int | Sequence[int] = 4,
        groups: int = 32,
        patch: Sequence[int] = (1, 1),
        before: str = "copies",
    ):
        super().__init__(latent, width, multipliers, strides, blocks, groups, patch)
        self.in_channels = in_channels
        self.conv_in = CausalConv3d(in_channels, width, stride=self.patch)
        here, levels = width, []
        for level, (m, n) in enumerate(zip(multipliers, self.counts, strict=True)):
            widths = [here] + [width * m] * n
            here = widths[-1]
            parts: list[nn.Module] = [ResidualBlock3d(a, b, groups) for a, b in pairwise(widths)]
            if level < len(self.strides):
                parts.append(CausalConv3d(here, here, stride=self.strides[level]))
            levels.append(nn.Sequential(*parts))
        self.down = nn.ModuleList(levels)
        self.mid = nn.Sequential(*(ResidualBlock3d(here, here, groups) for _ in range(2)))
        self.norm_out = FrameNorm(here, groups)
        self.conv_out = CausalConv3d(here, latent)
        self.before = before
        put_before(self, before)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class VideoDecoder(_Settings):
    """(B, latent, t, h, w) -> (B, out_channels, 1 + (t - 1) * stride[0], h * stride[1], w * stride[2]).

    The mirror of `VideoEncoder`, arguments as there and finest level first too. The frames up to stride[0] * t depend
    on the positions up to t only.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import VideoDecoder
        >>> small = dict(latent=16, width=8, multipliers=(1, 2), strides=((2, 2),), blocks=1, groups=4)
        >>> VideoDecoder(3, **small)(torch.randn(1, 16, 3, 4, 4)).shape
        torch.Size([1, 3, 5, 8, 8])
    """

    def __init__(
        self,
        out_channels: int = 3,
        latent: int = 256,
        width: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 4),
        strides: Sequence[Sequence[int]] = ((1, 2), (2, 2), (2, 2)),
        blocks: int | Sequence[int] = 4,
        groups: int = 32,
        patch: Sequence[int] = (1, 1),
        before: str = "copies",
    ):
        super().__init__(latent, width, multipliers, strides, blocks, groups, patch)
        self.out_channels = out_channels
        here, levels = width * multipliers[-1], []
        self.conv_in = CausalConv3d(latent, here)
        self.mid = nn.Sequential(*(ResidualBlock3d(here, here, groups) for _ in range(2)))
        for level in reversed(range(len(multipliers))):
            widths = [here] + [width * multipliers[level]] * self.counts[level]
            here = widths[-1]
            parts: list[nn.Module] = [ResidualBlock3d(a, b, groups) for a, b in pairwise(widths)]
            if level > 0:  # to the next width at once: most of the work is here
                finer = width * multipliers[level - 1]
                parts.append(CausalUpsample(here, finer, self.strides[level - 1]))
                here = finer
            levels.append(nn.Sequential(*parts))
        self.up = nn.ModuleList(reversed(levels))  # up.0 is the finest level, as in ConvDecoder
        self.norm_out = FrameNorm(here, groups)
        self.conv_out = CausalUpsample(here, out_channels, self.patch)
        self.before = before
        put_before(self, before)

    @property
    def last_layer(self) -> Tensor:
        """The weight that the output comes from: where an adaptive adversarial weight measures gradients."""
        return self.conv_out.conv.weight

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):  # type: ignore[arg-type]
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
