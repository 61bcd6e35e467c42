"""Causal convolutions over time, of sound and of video, which see no future: the outputs of a beginning do not change
when more follows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Snake(nn.Module):
    """x + sin^2(a x) / a with one a per channel of (B, C, T), because sound is periodic (Ziyin et al. 2020, arXiv
    2006.08195, eq. 3).

    Examples:
        >>> Snake(8)(torch.randn(2, 8, 100)).shape
        torch.Size([2, 8, 100])
    """

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.alpha * x).sin().square() * (self.alpha + 1e-9).reciprocal()  # one division per channel


class _Normed(nn.Module):
    """Holds a weight as length `weight_g` times direction `weight_v`, per index of the first axis (Salimans and Kingma
    2016, arXiv 1602.07868, eq. 2), under the key names of the field.

    At the start outputs vary `gain` times as much as inputs, and biases are 0. There is no normalisation between these
    layers: with torch's own initialisation, which shrinks what varies and adds constants, speech came out of an encoder
    with a deviation of 0.01 and all of it in one FSQ code.
    """

    def __init__(self, shape: Sequence[int], outputs: int, fan_in: float, gain: float):
        super().__init__()
        bound = gain * math.sqrt(3 / fan_in)
        self.weight_v = nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))
        self.weight_g = nn.Parameter(self.weight_v.detach().flatten(1).norm(dim=1)[:, None, None])
        self.bias = nn.Parameter(torch.zeros(outputs))

    @property
    def weight(self) -> Tensor:
        length = self.weight_v.flatten(1).norm(dim=1).clamp_min(1e-12)
        return self.weight_v * (self.weight_g / length[:, None, None])


class Conv1d(_Normed):
    """(B, in, T) -> (B, out, T / stride), zeros around the signal; all of them before it if `causal`.

    Causal output t depends on the inputs before (t + 1) * stride only.

    Examples:
        >>> Conv1d(1, 8, 7, stride=4, causal=True)(torch.randn(2, 1, 100)).shape
        torch.Size([2, 8, 25])
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        causal: bool = False,
        gain: float = 1.0,
    ):
        super().__init__((outputs, inputs, kernel), outputs, inputs * kernel, gain)
        self.stride, self.dilation = stride, dilation
        missing = (kernel - 1) * dilation + 1 - stride
        right = 0 if causal else missing // 2
        self.pad = missing - right, right

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(F.pad(x, self.pad), self.weight, self.bias, self.stride, 0, self.dilation)


class ConvTranspose1d(_Normed):
    """(B, in, t) -> (B, out, t * stride) with a kernel of two strides; the surplus is cut, all behind if `causal`.

    Causal outputs t * stride ... (t + 1) * stride - 1 depend on the inputs up to t only.

    Examples:
        >>> ConvTranspose1d(8, 1, 4)(torch.randn(2, 8, 25)).shape
        torch.Size([2, 1, 100])
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, causal: bool = False):
        super().__init__((inputs, outputs, 2 * stride), outputs, 2 * inputs, 1.0)  # two taps reach each output
        self.stride = stride
        self.skip = 0 if causal else stride - stride // 2

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv_transpose1d(x, self.weight, self.bias, self.stride)
        return y[..., self.skip : self.skip + x.shape[-1] * self.stride]


class CausalConv3d(nn.Conv3d):
    """(B, in, T, H, W) -> (B, out, 1 + (T - 1) / st, H / ss, W / ss) with stride (st, ss, ss) (MAGVIT-v2, arXiv
    2310.05737, section 3.2).

    kernel - 1 frames are put before the first one: `before` says "copies" of it, so that a single image passes through
    every tap in time like a clip without motion, or "zeros", as in public reimplementations of MAGVIT-v2. Around the
    frames there are zeros, below and at the right only where ss is 2.

    Examples:
        >>> CausalConv3d(3, 8, stride=(2, 2))(torch.randn(1, 3, 5, 16, 16)).shape
        torch.Size([1, 8, 3, 8, 8])
    """

    before = "copies"

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: tuple[int, int] = (1, 1)):
        time, space = stride
        margin = kernel // 2 if space == 1 else 0
        super().__init__(inputs, outputs, kernel, (time, space, space), (0, margin, margin))

    def forward(self, input: Tensor) -> Tensor:
        if (missing := self.kernel_size[0] - 1) > 0:
            first = input[:, :, :1] if self.before == "copies" else torch.zeros_like(input[:, :, :1])
            input = torch.cat([first.expand(-1, -1, missing, -1, -1), input], 2)
        if self.stride[1] > 1:
            input = F.pad(input, (0, 1, 0, 1))
        return super().forward(input)


BEFORE = ("copies", "zeros")


def put_before(network: nn.Module, before: str) -> None:
    """Let every causal convolution of `network` put this before the first frame. Raises ValueError for another word."""
    if before not in BEFORE:
        raise ValueError(f"before must be one of {', '.join(BEFORE)}, got {before!r}")
    for module in network.modules():
        if isinstance(module, CausalConv3d):
            module.before = before


class FrameNorm(nn.GroupNorm):
    """Group normalisation of every frame of (B, C, T, H, W) by itself: statistics over time would show the future.

    Examples:
        >>> FrameNorm(8, groups=2)(torch.randn(1, 8, 5, 16, 16)).shape
        torch.Size([1, 8, 5, 16, 16])
    """

    def __init__(self, channels: int, groups: int):
        if channels % groups:
            raise ValueError(
                f"groups must divide the channels of every level, got {groups} groups for {channels} channels"
            )
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, input: Tensor) -> Tensor:
        frames = input.transpose(1, 2)  # (B, T, C, H, W)
        return super().forward(frames.flatten(0, 1)).view(frames.shape).transpose(1, 2)


class CausalUpsample(nn.Module):
    """(B, in, T, H, W) -> (B, out, 1 + (T - 1) * st, H * ss, W * ss): a convolution, then channels to time and space.

    The first frame has a position of its own, so the st - 1 frames that would come before it are dropped.

    Examples:
        >>> CausalUpsample(8, 4, stride=(2, 2))(torch.randn(1, 8, 3, 8, 8)).shape
        torch.Size([1, 4, 5, 16, 16])
    """

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int]):
        super().__init__()
        self.factors = stride[0], stride[1], stride[1]
        more = math.prod(self.factors)
        self.conv = CausalConv3d(inputs, outputs * more)
        # All positions of a block start with one filter, as if the input were repeated: no checkerboard to unlearn
        # (Aitken et al. 2017, arXiv 1707.02937).
        with torch.no_grad():
            self.conv.weight.copy_(self.conv.weight[::more].repeat_interleave(more, 0))
            assert self.conv.bias is not None
            self.conv.bias.copy_(self.conv.bias[::more].repeat_interleave(more, 0))

    def forward(self, x: Tensor) -> Tensor:
        b, _, t, h, w = x.shape
        i, j, k = self.factors
        y = self.conv(x).view(b, -1, i, j, k, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return y.reshape(b, -1, t * i, h * j, w * k)[:, :, i - 1 :]
