"""Discriminators of images: (B, C, H, W) to logits, high for real images and low for reconstructions.

`PatchDiscriminator` (pix2pix, VQGAN) has a logit for every patch, `StyleGANDiscriminator` one for the image. Their
losses are in `latticode.losses.adversarial`; `latticode.engine.objectives.Adversarial` trains one beside a tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from latticode.nn.conv import channels_last, group_norm

NORMS = ("group", "batch", "spectral", "none")
SLOPE = 0.2  # of every leaky ReLU


class PatchDiscriminator(nn.Module):
    """A logit for every patch of (B, channels, H, W): (B, 1, h, w) (pix2pix, Isola et al. 2017, arXiv 1611.07004, 3.2).

    `layers` 4x4 convolutions of stride 2, two of stride 1. A logit sees 16, 34, 70 or 142 px at 1, 2, 3 or 4 layers. An
    image too small to give one logit (under 24 px at 3 layers) is padded to that size by repeating its border.

    Args:
        channels: of the images.
        width: channels of the first layer; every later one doubles them, up to 8 `width`.
        layers: of stride 2.
        norm: "group"; "batch", with which names and shapes are those of the published VQGAN's; "spectral", which bounds
            the slope of every convolution (Miyato et al. 2018, arXiv 1802.05957); or "none".
        groups: of the group normalisation.

    Raises ValueError for settings that are out of range; calling it, for images of other channels.

    Examples:
        >>> discriminator = PatchDiscriminator(channels=3, width=8, layers=2)
        >>> discriminator(torch.zeros(2, 3, 32, 32)).shape  # a logit for each patch
        torch.Size([2, 1, 6, 6])
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3, norm: str = "group", groups: int = 8):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
        for name, value in (("channels", channels), ("width", width), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        self.channels, self.width, self.layers, self.norm, self.groups = channels, width, layers, norm, groups
        self.least = 3 * 2**layers  # the two convolutions of stride 1 take a pixel each
        widths = [width * min(2**n, 8) for n in range(layers + 1)]
        parts: list[nn.Module] = [self._conv(channels, width, 2), nn.LeakyReLU(SLOPE)]
        for index, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False), 1):
            stride = 2 if index < layers else 1
            parts += [self._conv(inputs, outputs, stride, bias=norm != "batch"), self._norm(outputs)]
            parts.append(nn.LeakyReLU(SLOPE))
        self.main = nn.Sequential(*parts, self._conv(widths[-1], 1, 1))

    def _conv(self, inputs: int, outputs: int, stride: int, bias: bool = True) -> nn.Module:
        conv = nn.Conv2d(inputs, outputs, 4, stride, padding=1, bias=bias)
        nn.init.normal_(conv.weight, 0, 0.02)  # as published
        return spectral_norm(conv) if self.norm == "spectral" else conv

    def _norm(self, channels: int) -> nn.Module:
        if self.norm == "group":
            return group_norm(channels, self.groups)
        if self.norm != "batch":
            return nn.Identity()
        norm = nn.BatchNorm2d(channels)
        nn.init.normal_(norm.weight, 1, 0.02)
        return norm

    def forward(self, images: Tensor) -> Tensor:
        _check(images, self.channels, 1)
        missing = [max(0, self.least - n) for n in images.shape[2:]]
        if any(missing):
            top, left = (n // 2 for n in missing)
            images = F.pad(images, (left, missing[1] - left, top, missing[0] - top), mode="replicate")
        return self.main(channels_last(images))


class StyleGANDiscriminator(nn.Module):
    """One logit per image, (B, 1): residual blocks with blurred pooling (Karras et al. 2020, arXiv 1912.04958).

    Every block halves the resolution; what they leave is averaged to 4x4 (at 16 * 2^n px and n + 2 blocks it is 4x4
    already, as in the paper). The standard deviation within small groups of images (minibatch standard deviation,
    Karras et al. 2018, arXiv 1710.10196, 3) shows a mode collapse that no single image shows. As in the discriminator
    of MaskGIT and MAGVIT, weights start at their scale instead of being scaled at run time.

    Args:
        channels: of the images.
        width: channels before the first block.
        multipliers: block i has width * multipliers[i] channels.
        group: the most images that share a deviation; of 1, it is 0 always.

    Raises ValueError for settings that are out of range; calling it, for images of other channels or below the size.

    Examples:
        >>> discriminator = StyleGANDiscriminator(channels=3, width=8, multipliers=[2, 4])
        >>> discriminator(torch.zeros(2, 3, 16, 16)).shape  # one logit for each image
        torch.Size([2, 1])
    """

    def __init__(self, channels: int = 3, width: int = 64, multipliers: Sequence[int] = (2, 4, 4, 4), group: int = 4):
        super().__init__()
        if channels < 1 or width < 1 or group < 1:
            raise ValueError(f"channels, width and group must be >= 1, got {channels}, {width} and {group}")
        if not multipliers or min(multipliers) < 1:
            raise ValueError(f"multipliers must be one or more integers >= 1, got {list(multipliers)}")
        self.channels, self.width, self.multipliers, self.group = channels, width, list(multipliers), group
        self.least = 2 ** len(multipliers)
        widths = [width, *(width * m for m in multipliers)]
        self.conv_in = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Block(a, b) for a, b in zip(widths, widths[1:], strict=False)))
        self.conv_out = nn.Conv2d(widths[-1] + 1, widths[-1], 3, padding=1)
        self.hidden = nn.Linear(16 * widths[-1], widths[-1])
        self.logit = nn.Linear(widths[-1], 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        _check(images, self.channels, self.least)
        h = self.blocks(F.leaky_relu(self.conv_in(channels_last(images)), SLOPE))
        h = F.adaptive_avg_pool2d(h, 4)
        h = F.leaky_relu(self.conv_out(torch.cat([h, self._deviation(h)], 1)), SLOPE)
        return self.logit(F.leaky_relu(self.hidden(h.flatten(1)), SLOPE))

    def _deviation(self, h: Tensor) -> Tensor:
        """(B, 1, 4, 4): the standard deviation within an image's group, averaged over channels and positions."""
        size = math.gcd(len(h), self.group)
        groups = h.float().unflatten(0, (-1, size))  # neighbours: a batch split over ranks keeps its groups
        deviation = (groups.var(1, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
        return deviation.repeat_interleave(size)[:, None, None, None].expand(-1, 1, *h.shape[2:]).to(h)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv1(x), SLOPE)
        h = F.leaky_relu(self.conv2(blur_pool(h)), SLOPE)
        return (h + self.shortcut(blur_pool(x))) / math.sqrt(2)


def blur_pool(x: Tensor) -> Tensor:
    """Halve H and W of (B, C, H, W) after the filter [1, 3, 3, 1] / 8 on each axis (Zhang 2019, arXiv 1904.11486)."""
    line = torch.tensor([1.0, 3.0, 3.0, 1.0], device=x.device, dtype=x.dtype) / 8
    kernel = torch.outer(line, line).expand(x.shape[1], 1, 4, 4)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), kernel, stride=2, groups=x.shape[1])


def _check(images: Tensor, channels: int, least: int) -> None:
    if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < least:
        raise ValueError(f"expected images (B, {channels}, H, W) of at least {least} px, got {tuple(images.shape)}")
