"""Transformer encoder and decoder on patches (ViT-VQGAN, arXiv 2110.04627; BSQ, arXiv 2406.07548)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.nn.transformer import Transformer


def sinusoids(side: int, width: int) -> Tensor:
    """(side, side, width) sines and cosines, half the channels for the row and half for the column."""
    if side < 1 or width % 4:
        raise ValueError(f"positions need side >= 1 and a width divisible by 4, got {side} and {width}")
    rates = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * rates  # (side, width / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2)


class Positions(nn.Module):
    """Adds learned positions to (B, h, w, D), from a table of (side, side, D) that starts as sinusoids.

    On another grid the table is stretched to it by bilinear interpolation: the image as a whole keeps its extent, as
    in a finer or coarser picture of the same scene. Quality on grids far from `side` is not to be expected without
    training there; cut large images into tiles.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders.vit import Positions
        >>> Positions(4, 8)(torch.zeros(2, 6, 6, 8)).shape  # a table of 4 x 4, stretched
        torch.Size([2, 6, 6, 8])
    """

    def __init__(self, side: int, width: int):
        super().__init__()
        self.table = nn.Parameter(sinusoids(side, width))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and x.shape[1:] == self.table.shape:  # a graph serves every grid
            return x + self.table
        table = F.interpolate(self.table.movedim(-1, 0)[None], size=x.shape[1:3], mode="bilinear", align_corners=False)
        return x + table.movedim(1, -1)


class ViTEncoder(nn.Module):
    """(B, in_channels, H, W) -> (B, latent, H / patch, W / patch): patches, positions, pre-norm transformer, linear.

    Args:
        in_channels: 1 for grey, 3 for colour.
        latent: channels of the output.
        patch: side of a patch in pixels, the stride.
        width: of the transformer, divisible by 4 and by `heads`.
        depth: blocks.
        heads: of the attention.
        mlp: hidden width of the MLPs over `width`.
        side: patches per side of the training images, for which the table of positions is made.
        style: of the blocks (`latticode.nn.transformer.Block`); "vitvqgan" is that of ViT-VQGAN's public code.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import ViTEncoder
        >>> encoder = ViTEncoder(3, latent=8, patch=4, width=16, depth=1, heads=2, side=4)
        >>> encoder(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        in_channels: int = 3,
        latent: int = 32,
        patch: int = 8,
        width: int = 512,
        depth: int = 8,
        heads: int = 8,
        mlp: float = 4.0,
        side: int = 32,
        style: str = "gpt",
    ):
        super().__init__()
        self.in_channels, self.latent, self.patch, self.stride = in_channels, latent, patch, patch
        self.width, self.depth, self.heads, self.mlp, self.side = width, depth, heads, mlp, side
        self.style = style
        self.patchify = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.positions = Positions(side, width)
        self.transformer = Transformer(width, depth, heads, mlp, style=style)
        self.head = nn.Linear(width, latent)

    def forward(self, x: Tensor) -> Tensor:
        x_BhwD = self.positions(self.patchify(x).movedim(1, -1))
        h = self.head(self.transformer(x_BhwD.flatten(1, 2)))
        return h.unflatten(1, x_BhwD.shape[1:3]).movedim(-1, 1)


class ViTDecoder(nn.Module):
    """(B, latent, h, w) -> (B, out_channels, h * patch, w * patch): the mirror of `ViTEncoder`, arguments as there.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import ViTDecoder
        >>> decoder = ViTDecoder(3, latent=8, patch=4, width=16, depth=1, heads=2, side=4)
        >>> decoder(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        out_channels: int = 3,
        latent: int = 32,
        patch: int = 8,
        width: int = 512,
        depth: int = 8,
        heads: int = 8,
        mlp: float = 4.0,
        side: int = 32,
        style: str = "gpt",
    ):
        super().__init__()
        self.out_channels, self.latent, self.patch, self.stride = out_channels, latent, patch, patch
        self.width, self.depth, self.heads, self.mlp, self.side = width, depth, heads, mlp, side
        self.style = style
        self.embed = nn.Linear(latent, width)
        self.positions = Positions(side, width)
        self.transformer = Transformer(width, depth, heads, mlp, style=style)
        self.head = nn.Linear(width, out_channels * patch**2)

    @property
    def last_layer(self) -> Tensor:
        """The weight that the output comes from: where an adaptive adversarial weight measures gradients."""
        return self.head.weight

    def forward(self, z: Tensor) -> Tensor:
        z_BhwD = self.positions(self.embed(z.movedim(1, -1)))
        patches = self.head(self.transformer(z_BhwD.flatten(1, 2)))  # (B, h w, out_channels patch^2)
        return F.pixel_shuffle(patches.unflatten(1, z_BhwD.shape[1:3]).movedim(-1, 1), self.patch)
