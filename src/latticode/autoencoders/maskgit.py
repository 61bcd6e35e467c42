"""The encoder and decoder of MaskGIT's own VQGAN (Chang et al. 2022, arXiv 2202.04200), which the FSQ paper uses.

Against VQGAN's: no attention, convolutions without bias, average pooling down, 1x1 convolution out of the encoder. The
key names are those of the published checkpoint; it was trained on images in [0, 1], so to use its weights on images
here map x to (x + 1) / 2 before and y to 2 y - 1 behind.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from latticode.nn.conv import channels_last, group_norm


class MaskGITBlock(nn.Module):
    """(B, in, H, W) -> (B, out, H, W): twice norm, SiLU, 3x3 convolution.

    Where the widths differ the branch's own output goes through `nin_shortcut`, as in the published network, and the
    input is not added: there is no identity path through such a block.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders.maskgit import MaskGITBlock
        >>> MaskGITBlock(8, 16, groups=4)(torch.randn(2, 8, 6, 6)).shape
        torch.Size([2, 16, 6, 6])
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(out_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(h) if hasattr(self, "nin_shortcut") else x)


class MaskGITLevel(nn.Module):
    """The blocks of one resolution and, in a decoder, the way up to the next.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders.maskgit import MaskGITLevel
        >>> MaskGITLevel([8, 16], groups=4, up=True)(torch.randn(2, 8, 6, 6)).shape
        torch.Size([2, 16, 12, 12])
    """

    def __init__(self, widths: Sequence[int], groups: int, up: bool = False):
        super().__init__()
        self.block = nn.ModuleList(MaskGITBlock(a, b, groups) for a, b in zip(widths, widths[1:], strict=False))
        if up:
            self.upsample_conv = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        if hasattr(self, "upsample_conv"):
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class MaskGITEncoder(nn.Module):
    """(B, in_channels, H, W) -> (B, latent, H / stride, W / stride) with stride 2^(len(multipliers) - 1).

    Args:
        in_channels: 1 for grey, 3 for colour.
        latent: channels of the output.
        width: channels of the finest level before its multiplier; level i has width * multipliers[i].
        multipliers: one per resolution; each step between two halves H and W.
        blocks: residual blocks per level and in the middle.
        groups: of every group normalisation; divides every width.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import MaskGITEncoder
        >>> encoder = MaskGITEncoder(3, latent=16, width=8, multipliers=(1, 2), groups=4)
        >>> encoder(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(
        self,
        in_channels: int = 3,
        latent: int = 256,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        groups: int = 32,
    ):
        super().__init__()
        _check(multipliers, blocks)
        self.in_channels, self.latent, self.width, self.groups = in_channels, latent, width, groups
        self.multipliers, self.blocks, self.stride = list(multipliers), blocks, 2 ** (len(multipliers) - 1)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        widths = [width, *(width * m for m in multipliers)]
        self.down = nn.ModuleList(MaskGITLevel([a] + [b] * blocks, groups) for a, b in zip(widths, widths[1:]))
        self.mid = nn.ModuleList(MaskGITBlock(widths[-1], widths[-1], groups) for _ in range(blocks))
        self.norm_out = group_norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], latent, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(channels_last(x))
        for index, level in enumerate(self.down):
            h = level(F.avg_pool2d(h, 2) if index else h)
        for block in self.mid:
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class MaskGITDecoder(nn.Module):
    """(B, latent, h, w) -> (B, out_channels, h * stride, w * stride): the mirror of `MaskGITEncoder`.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import MaskGITDecoder
        >>> decoder = MaskGITDecoder(3, latent=16, width=8, multipliers=(1, 2), groups=4)
        >>> decoder(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        out_channels: int = 3,
        latent: int = 256,
        width: int = 128,
        multipliers: Sequence[int] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        groups: int = 32,
    ):
        super().__init__()
        _check(multipliers, blocks)
        self.out_channels, self.latent, self.width, self.groups = out_channels, latent, width, groups
        self.multipliers, self.blocks, self.stride = list(multipliers), blocks, 2 ** (len(multipliers) - 1)
        widths = [width * m for m in multipliers]
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.mid = nn.ModuleList(MaskGITBlock(widths[-1], widths[-1], groups) for _ in range(blocks))
        above = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            MaskGITLevel([a] + [b] * blocks, groups, up=i > 0) for i, (a, b) in enumerate(zip(above, widths))
        )
        self.norm_out = group_norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    @property
    def last_layer(self) -> Tensor:
        """The weight that the output comes from: where an adaptive adversarial weight measures gradients."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(channels_last(z))
        for block in self.mid:
            h = block(h)
        for level in reversed(self.up):  # type: ignore[arg-type]
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def _check(multipliers: Sequence[int], blocks: int) -> None:
    if not multipliers or any(m < 1 for m in multipliers):
        raise ValueError(f"multipliers must be one or more integers >= 1, got {list(multipliers)}")
    if blocks < 1:
        raise ValueError(f"blocks must be >= 1, got {blocks}")
