"""Convolutional blocks of the VQGAN family (Esser et al. 2021, arXiv 2012.09841), with the key names of the field."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]  # a normalisation of that many channels


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Group norm with the eps of VQGAN. Raises ValueError where `groups` does not divide `channels`."""
    if channels % groups:
        raise ValueError(f"groups must divide the channels of every level, got {groups} groups for {channels} channels")
    return nn.GroupNorm(groups, channels, eps=1e-6)


class PositionNorm(nn.LayerNorm):
    """(B, C, H, W): every position by the mean and deviation of its own C channels, then a scale and shift per channel.

    A group normalisation looks at the whole image; with this one an output depends on its receptive field alone.

    Examples:
        >>> PositionNorm(8)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)  # views under channels_last


def normalisation(name: str, groups: int) -> Norm:
    """What the name `norm` of an autoencoder stands for. Raises ValueError for an unknown one."""
    norms: dict[str, Norm] = {"group": partial(group_norm, groups=groups), "position": PositionNorm}
    if name not in norms:
        raise ValueError(f"norm must be one of {', '.join(norms)}, got {name!r}")
    return norms[name]


class ResnetBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W): twice norm, SiLU, 3x3 convolution; a 1x1 shortcut where the widths differ.

    Examples:
        >>> ResnetBlock(8, 16, normalisation("group", groups=4))(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 16, 4, 4])
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Norm):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Single-head self-attention over the positions of (B, C, H, W), with a residual connection.

    Examples:
        >>> AttentionBlock(8, normalisation("group", groups=4))(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))  # (B, 1, HW, C)
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(attended.squeeze(1).transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    """Residual block, attention if asked, residual block, at the lowest resolution.

    Examples:
        >>> Middle(8, normalisation("group", groups=4), attention=True)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, channels: int, norm: Norm, attention: bool):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, norm)
        self.attn_1 = AttentionBlock(channels, norm) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Halve H and W by a 3x3 convolution of stride 2, padded right and below as in the published checkpoints.

    Examples:
        >>> Downsample(8)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 2, 2])
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double H and W by nearest neighbour, then a 3x3 convolution.

    Examples:
        >>> Upsample(8)(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 8, 8, 8])
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention where asked, then the change of resolution if any.

    Examples:
        >>> norm = normalisation("group", groups=4)
        >>> level = Level([8, 16, 16], norm, attention=False, resample="downsample", module=Downsample(16))
        >>> level(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 16, 2, 2])
    """

    def __init__(self, widths: list[int], norm: Norm, attention: bool, resample: str, module: nn.Module | None):
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(a, b, norm) for a, b in zip(widths, widths[1:], strict=False))
        self.attn = nn.ModuleList(AttentionBlock(b, norm) for b in widths[1:] if attention)
        self.resample = resample if module is not None else ""
        if module is not None:
            self.add_module(resample, module)

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[index](x)
        return self.get_submodule(self.resample)(x) if self.resample else x


def channels_last(x: Tensor) -> Tensor:
    """The memory order in which CPU and GPU convolve fastest, and in which channel-last quantizers see a view."""
    return x.contiguous(memory_format=torch.channels_last)
