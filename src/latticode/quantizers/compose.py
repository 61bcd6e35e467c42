"""Quantizers made of quantizers: behind linear maps, over groups of channels, in two levels; and channels first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.core.freezing import Freezable
from latticode.core.types import Quantized
from latticode.quantizers.base import Quantizer, Step, Tokens, contractions, pooled
from latticode.quantizers.gradients import straight_through
from latticode.quantizers.residual import held, item, listed


class Projected(Quantizer):
    """`quantizer` between two learned linear maps with biases: from `dim` channels to its own, and back.

    The losses of `quantizer` are those of the projected latents, and so train the first map too.

    Args:
        quantizer: of any width.
        dim: the width of the latents outside.

    Raises:
        ValueError: for a width below 1.

    Examples:
        >>> from latticode import FSQ
        >>> Projected(FSQ([8, 5, 5, 5]), dim=512)(torch.randn(3, 512)).latents.shape
        torch.Size([3, 512])
    """

    def __init__(self, quantizer: Quantizer, dim: int):
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be >= 1, got {dim}")
        self.quantizer, self.dim, self.vocab = quantizer, dim, quantizer.vocab
        self.project_in = nn.Linear(dim, quantizer.dim)
        self.project_out = nn.Linear(quantizer.dim, dim)

    def _quantize(self, tokens: Tokens) -> Step:
        step = self.quantizer._quantize(tokens.through(self._project_in))
        return step._replace(latents=self._project_out(step.latents))

    def _encode(self, x: Tensor) -> Tensor:
        return self.quantizer._encode(self._project_in(x))

    def _decode(self, codes: Tensor) -> Tensor:
        return self._project_out(self.quantizer._decode(codes))

    def inner(self, z: Tensor, codes: Tensor) -> Iterator[tuple[str, Quantizer, Tensor, Tensor]]:
        yield "quantizer", self.quantizer, nn.functional.linear(z, self.project_in.weight, self.project_in.bias), codes

    def _project_in(self, x: Tensor) -> Tensor:
        return self._linear(x, self.project_in)

    def _project_out(self, x: Tensor) -> Tensor:
        return self._linear(x, self.project_out)

    def _linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        # One layout, however the tokens came: a matrix product rounds by it.
        flat = x.to(self._arithmetic).reshape(-1, x.shape[-1]).contiguous()
        return F.linear(flat, layer.weight.to(flat), layer.bias.to(flat)).view(*x.shape[:-1], layer.out_features)

    @property
    def _prefixes(self) -> list[int]:
        return self.quantizer._prefixes

    @property
    def _lowest(self) -> list[int]:
        return self.quantizer._lowest


class Grouped(Quantizer):
    """The channels cut into consecutive runs that are quantized apart (product quantization).

    Codes stand group after group. Losses are the means over tokens and groups, each group of the same weight.

    Args:
        quantizers: one for each run, whose `dim` is the length of its run; or a single one for all of `groups` runs,
            which learns from the tokens of all of them in one update.
        groups: the number of runs, for a single quantizer only.

    Raises:
        ValueError: for arguments outside the above.

    Examples:
        >>> from latticode import VQ
        >>> Grouped(VQ(256, 8), groups=4)(torch.randn(300, 32)).codes.shape
        torch.Size([300, 4])
    """

    def __init__(self, quantizers: Sequence[Quantizer] | Quantizer, groups: int | None = None):
        super().__init__()
        self.quantizers, self.groups = held(quantizers, groups, "quantizers", "groups"), groups
        sequence = listed(self.quantizers, groups)
        self.dim = sum(one.dim for one in sequence)
        self.vocab = tuple(size for one in sequence for size in one.vocab)
        self.contraction = [share for one in sequence for share in contractions(one)]

    def _quantize(self, tokens: Tokens) -> Step:
        if isinstance(self.quantizers, Quantizer):
            tokens = tokens.through(self._stacked)
            keep = tokens.keep[..., None].expand(tokens.values.shape[:-1])
            step = self.quantizers._quantize(tokens._replace(keep=keep))
            return step._replace(latents=step.latents.flatten(-2), codes=step.codes.flatten(-2))
        sequence, start, steps = self._sequence, 0, []
        for one in sequence:
            run = slice(start, start + one.dim)
            steps.append(one._quantize(tokens.through(lambda x, run=run: x[..., run])))
            start += one.dim
        return Step(
            torch.cat([step.latents for step in steps], dim=-1),
            torch.cat([step.codes for step in steps], dim=-1),
            pooled([step.losses for step in steps]),
            [update for step in steps for update in step.updates],
        )

    def _encode(self, x: Tensor) -> Tensor:
        if isinstance(self.quantizers, Quantizer):
            return self.quantizers._encode(self._stacked(x)).flatten(-2)
        runs = x.split([one.dim for one in self._sequence], dim=-1)
        return torch.cat([one._encode(run) for one, run in zip(self._sequence, runs, strict=True)], dim=-1)

    def _decode(self, codes: Tensor) -> Tensor:
        if isinstance(self.quantizers, Quantizer):
            return self.quantizers._decode(self._stacked(codes)).flatten(-2)
        parts = codes.split([len(one.vocab) for one in self._sequence], dim=-1)
        return torch.cat([one._decode(part) for one, part in zip(self._sequence, parts, strict=True)], dim=-1)

    def inner(self, z: Tensor, codes: Tensor) -> Iterator[tuple[str, Quantizer, Tensor, Tensor]]:
        start = slot = 0
        for i, one in enumerate(self._sequence):
            run, chosen = z[..., start : start + one.dim], codes[..., slot : slot + len(one.vocab)]
            yield item("quantizers", i, self.groups), one, run, chosen
            start, slot = start + one.dim, slot + len(one.vocab)

    def _stacked(self, x: Tensor) -> Tensor:
        """(..., groups * n) to (..., groups, n)."""
        assert self.groups is not None
        return x.unflatten(-1, (self.groups, x.shape[-1] // self.groups))

    @property
    def _sequence(self) -> list[Quantizer]:
        return listed(self.quantizers, self.groups)

    @property
    def reach(self) -> list[float]:
        return [width for one in self._sequence for width in one.reach]

    @property
    def _lowest(self) -> list[int]:
        return [least for one in self._sequence for least in one._lowest]

    def extra_repr(self) -> str:
        return "" if self.groups is None else f"groups={self.groups}"


class Hierarchical(Quantizer):
    """Two levels at one position (those of HQ-VAE, by pixel shuffle): its channels are `fanout` children in a row.

    `top` quantizes the mean of the children; `bottom` quantizes each child less the latents of `top`. The latents of a
    child are the sum of both. Codes are those of the top, then those of each child; `decode` takes the top's alone as
    well, and -1 at the codes of a child: its latents are then the top's. Gradients and the targets of losses are as in
    `Residual`; losses are the means over tokens of both levels, where each child counts as much as the top.

    Args:
        top: for the mean of the children.
        bottom: another one of the same `dim`, for what the top leaves of each child.
        fanout: the number of children, >= 1.

    Raises:
        ValueError: for arguments outside the above.

    Examples:
        >>> from latticode import FSQ
        >>> quantizer = Hierarchical(FSQ([5, 5]), FSQ([5, 5], "clamp"), fanout=4)
        >>> out = quantizer(torch.randn(3, 8))
        >>> out.codes.shape, quantizer.decode(out.codes[:, :1]).shape
        (torch.Size([3, 5]), torch.Size([3, 8]))
    """

    def __init__(self, top: Quantizer, bottom: Quantizer, fanout: int):
        super().__init__()
        if top is bottom or top.dim != bottom.dim:
            raise ValueError(f"top and bottom must be two quantizers of one dim, got {top.dim} and {bottom.dim}")
        if fanout < 1:
            raise ValueError(f"fanout must be >= 1, got {fanout}")
        self.top, self.bottom, self.fanout = top, bottom, fanout
        self.dim, self.vocab = fanout * top.dim, top.vocab + fanout * bottom.vocab

    def _quantize(self, tokens: Tokens) -> Step:
        tokens = tokens.through(self._split)
        top = self.top._quantize(tokens.through(self._mean))
        left = tokens.values - top.latents[..., None, :]
        keep = tokens.keep[..., None].expand(left.shape[:-1])
        target = straight_through(tokens.target, left)  # what the losses see: with the gradient of z
        bottom = self.bottom._quantize(tokens.become(left, target)._replace(keep=keep))
        return Step(
            (top.latents[..., None, :] + bottom.latents).flatten(-2),
            torch.cat([top.codes, bottom.codes.flatten(-2)], dim=-1),
            pooled([top.losses, bottom.losses]),
            [*top.updates, *bottom.updates],
        )

    def _encode(self, x: Tensor) -> Tensor:
        children = self._split(x)
        top = self.top._encode(self._mean(children))
        bottom = self.bottom._encode(children - self.top._decode(top)[..., None, :])
        return torch.cat([top, bottom.flatten(-2)], dim=-1)

    def _decode(self, codes: Tensor) -> Tensor:
        slots = len(self.top.vocab)
        latents = self.top._decode(codes[..., :slots])[..., None, :]
        latents = latents.expand(*codes.shape[:-1], self.fanout, self.top.dim)
        if codes.shape[-1] > slots:
            chunk = codes[..., slots:].unflatten(-1, (self.fanout, len(self.bottom.vocab)))
            present = self.bottom._present(chunk)[..., None]
            latents = latents + torch.where(present, self.bottom._decode(torch.where(present, chunk, 0)), 0.0)
        return latents.flatten(-2)

    def inner(self, z: Tensor, codes: Tensor) -> Iterator[tuple[str, Quantizer, Tensor, Tensor]]:
        slots, children = len(self.top.vocab), self._split(z)
        yield "top", self.top, self._mean(children), codes[..., :slots]
        left = children - self.top.decode(codes[..., :slots])[..., None, :]
        yield "bottom", self.bottom, left, codes[..., slots:].unflatten(-1, (self.fanout, -1))

    def _split(self, x: Tensor) -> Tensor:
        """(..., fanout * D) to (..., fanout, D)."""
        return x.unflatten(-1, (self.fanout, self.top.dim))

    def _mean(self, children: Tensor) -> Tensor:
        return children.mean(dim=-2)

    @property
    def _prefixes(self) -> list[int]:
        return [*self.top._prefixes, len(self.vocab)]

    @property
    def _lowest(self) -> list[int]:
        return self.top._lowest + [-1] * (self.fanout * len(self.bottom.vocab))

    def extra_repr(self) -> str:
        return f"fanout={self.fanout}"


class ChannelDim(Freezable):
    """`quantizer` for latents with their channels at `channel_dim`, (B, D, *grid) by default. No copy: views only.

    Codes and masks are as they were, (B, *grid, K) and (B, *grid).

    Examples:
        >>> from latticode import FSQ
        >>> out = ChannelDim(FSQ([8, 5, 5, 5]))(torch.randn(2, 4, 16, 16))
        >>> out.latents.shape, out.codes.shape
        (torch.Size([2, 4, 16, 16]), torch.Size([2, 16, 16, 1]))
    """

    def __init__(self, quantizer: Quantizer, channel_dim: int = 1):
        super().__init__()
        self.quantizer, self.channel_dim = quantizer, channel_dim

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        """Like `Quantizer.forward`; the latents are in the layout of `z`."""
        out = self.quantizer(z.movedim(self.channel_dim, -1), mask)
        return Quantized(out.latents.movedim(-1, self.channel_dim), out.codes, out.losses)

    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Codes (B, *grid, K) of `z`."""
        return self.quantizer.encode(z.movedim(self.channel_dim, -1), mask)

    def decode(self, codes: Tensor) -> Tensor:
        """Latents, in the layout of `forward`, of `codes` (B, *grid, K)."""
        return self.quantizer.decode(codes).movedim(-1, self.channel_dim)

    def extra_repr(self) -> str:
        return f"channel_dim={self.channel_dim}"
