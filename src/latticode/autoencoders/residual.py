"""The encoder and decoder of VQ-VAE for small images (van den Oord et al. 2017, arXiv 1711.00937, Sec. 4.1)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from latticode.nn.conv import channels_last


class ReluBlock(nn.Module):
    """(B, C, H, W) to the same: x + conv1x1(relu(conv3x3(relu(x)))) with `hidden` channels between.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders.residual import ReluBlock
        >>> ReluBlock(8, 4)(torch.randn(2, 8, 6, 6)).shape
        torch.Size([2, 8, 6, 6])
    """

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def _begin(module: nn.Module) -> None:
    """Weights from N(0, 1 / n), cut off at two deviations, n the inputs that meet in an output, and no biases.

    As in Sonnet, which the paper used. Torch's third of that variance dies out over the layers, as nothing here
    normalises, and biases drown what is left: the upper level of VQ-VAE-2 then hardly sees the image.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            meeting = math.prod(layer.kernel_size) // (math.prod(layer.stride) if layer.transposed else 1)
            std = (layer.in_channels * meeting) ** -0.5
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def _halvings(stride: int) -> int:
    if stride < 2 or stride & (stride - 1):
        raise ValueError(f"stride must be a power of two >= 2, got {stride}")
    return stride.bit_length() - 1


def _widths(latent: int, halvings: int) -> list[int]:
    """Half the channels at the finer resolutions, all at the last, but where that is the only one."""
    if latent < 2 or latent % 2:
        raise ValueError(f"latent must be even and >= 2, got {latent}")
    return [latent // 2] * max(halvings - 1, 1) + [latent] * (halvings > 1)


class ResidualEncoder(nn.Module):
    """(B, in_channels, H, W) -> (B, latent, H / stride, W / stride): 4x4 convolutions of stride 2, residual blocks.

    There is no normalisation, so an output depends on the pixels near it only.

    Args:
        in_channels: 1 for grey, 3 for colour.
        latent: channels of the output and of the residual blocks; half as many at finer resolutions. Even.
        hidden: channels inside a residual block.
        blocks: residual blocks.
        stride: a power of two.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import ResidualEncoder
        >>> ResidualEncoder(3, latent=16, hidden=8, stride=4)(torch.randn(2, 3, 16, 16)).shape
        torch.Size([2, 16, 4, 4])
    """

    def __init__(self, in_channels: int = 3, latent: int = 128, hidden: int = 32, blocks: int = 2, stride: int = 4):
        super().__init__()
        self.in_channels, self.latent, self.hidden = in_channels, latent, hidden
        self.blocks, self.stride = blocks, stride
        widths = [in_channels, *_widths(latent, _halvings(stride))]
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in zip(widths, widths[1:]))
        self.conv = nn.Conv2d(widths[-1], latent, 3, padding=1)
        self.block = nn.ModuleList(ReluBlock(latent, hidden) for _ in range(blocks))
        _begin(self)

    def forward(self, x: Tensor) -> Tensor:
        h = channels_last(x)
        for down in self.down:
            h = F.relu(down(h))
        h = self.conv(h)
        for block in self.block:
            h = block(h)
        return F.relu(h)


class ResidualDecoder(nn.Module):
    """(B, latent, h, w) -> (B, out_channels, h * stride, w * stride): the mirror of `ResidualEncoder`.

    Transposed 4x4 convolutions of stride 2 take the place of the others.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import ResidualDecoder
        >>> ResidualDecoder(3, latent=16, hidden=8, stride=4)(torch.randn(2, 16, 4, 4)).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(self, out_channels: int = 3, latent: int = 128, hidden: int = 32, blocks: int = 2, stride: int = 4):
        super().__init__()
        self.out_channels, self.latent, self.hidden = out_channels, latent, hidden
        self.blocks, self.stride = blocks, stride
        halvings = _halvings(stride)
        widths = [latent, *_widths(latent, halvings)[: halvings - 1], out_channels]
        self.conv = nn.Conv2d(latent, latent, 3, padding=1)
        self.block = nn.ModuleList(ReluBlock(latent, hidden) for _ in range(blocks))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1) for a, b in zip(widths, widths[1:]))
        _begin(self)

    @property
    def last_layer(self) -> Tensor:
        """The weight that the output comes from: where an adaptive adversarial weight measures gradients."""
        return self.up[-1].weight  # type: ignore[return-value]

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv(channels_last(z))
        for block in self.block:
            h = block(h)
        for up in self.up:
            h = up(F.relu(h))
        return h
