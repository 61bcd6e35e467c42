"""The contract of encoders and decoders, and what looks whether it is kept.

Any `torch.nn.Module` that has the attributes of `Encoder` or `Decoder` is one; there is nothing to inherit. `Tokenizer`
reads the attributes when it is made (`geometry`), and `try_out` runs a pair on examples too: call it in a test of your
own. To be saved and named by recipes a class is registered as well (`latticode.register`), and then keeps each argument
of its constructor as an attribute of the same name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from latticode.core.modules import described, keeping_modes


@runtime_checkable
class Encoder(Protocol):
    """(B, in_channels, *size) float in [-1, 1] -> (B, latent, *grid) float.

    `size` has one length for each axis. The tokenizer pads it, so that along every axis it is a multiple of the stride,
    behind the `lead` first samples of the first axis: grid = lead + (size - lead) / stride there, size / stride
    elsewhere. An output in memory format channels_last is taken as it is, and spares a copy: quantizers work on the
    channels of each position. In eval mode the output of an example depends on no other example of the batch.

    Optional attributes, with what is taken where they are not there:
        axes (2): number of spatial axes: 1 waveforms, 2 images, 3 videos.
        lead (0): samples at the start of the first axis that make one position each; 1: a video's first frame alone.
        reach (None): samples beside its own stride^axes that a position depends on, at most, on every side; None: all
            there are. Tiles of large images overlap by it (`latticode.tokenizers.tiling`).

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import Encoder, ResidualEncoder
        >>> isinstance(ResidualEncoder(), Encoder), isinstance(torch.nn.Linear(3, 8), Encoder)
        (True, False)
    """

    in_channels: int  # C: 1 grey or mono, 3 colour, 2 stereo
    latent: int  # channels of the output
    stride: int | Sequence[int]  # samples per position, one number or one for each axis

    def __call__(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class Decoder(Protocol):
    """(B, latent, *grid) float -> (B, out_channels, *size) float, about [-1, 1]: the way back of an `Encoder`.

    size = lead + (grid - lead) stride on the first axis, grid stride elsewhere; what was padding is cropped elsewhere.

    Optional attributes: `axes`, `lead` and `reach` as for `Encoder`, of which `axes` must be the encoder's; and
        last_layer (none): the weight by which the output is computed last. With all of it 0 the output does not depend
            on the input. An adversarial loss with an adaptive weight measures its gradients there
            (`latticode.losses.adversarial`); without it give `adversarial.adaptive=false`.

    Examples:
        >>> import torch
        >>> from latticode.autoencoders import Decoder, ResidualDecoder
        >>> isinstance(ResidualDecoder(), Decoder), isinstance(torch.nn.Linear(3, 8), Decoder)
        (True, False)
    """

    out_channels: int  # as many as the encoder's in_channels, or what `pixels` of the tokenizer takes, e.g. 2 C
    latent: int  # channels of the input; need not be the encoder's
    stride: int | Sequence[int]  # the encoder's

    def __call__(self, z: Tensor) -> Tensor: ...


class Geometry(NamedTuple):
    """How samples and positions go together.

    Examples:
        >>> from latticode.autoencoders.contract import Geometry
        >>> from latticode.autoencoders import VideoEncoder
        >>> geometry(VideoEncoder(1, 8, 8, groups=4, blocks=0), "encoder")
        Geometry(axes=3, strides=(4, 8, 8), lead=1)
    """

    axes: int
    strides: tuple[int, ...]  # one for each axis
    lead: int


def geometry(network: Any, kind: str) -> Geometry:
    """The geometry of an encoder or decoder, `kind`, after a look at all attributes of the contract.

    Raises:
        ValueError: with everything that the contract asks for and the network lacks.

    Examples:
        >>> import torch, latticode
        >>> latticode.Tokenizer(torch.nn.Conv2d(3, 8, 4, 4), latticode.FSQ([4, 4]), torch.nn.Conv2d(8, 3, 1))
        Traceback (most recent call last):
        ...
        ValueError: Conv2d is no encoder (latticode.autoencoders.contract): it lacks `latent` (an integer >= 1)
    """
    wrong: list[str] = []
    for name in ("in_channels" if kind == "encoder" else "out_channels", "latent"):
        value = getattr(network, name, None)
        if value is None:
            wrong.append(f"it lacks `{name}` (an integer >= 1)")
        elif not _whole(value, 1):
            wrong.append(f"`{name}` must be an integer >= 1, got {value!r}")
    axes, lead, stride = getattr(network, "axes", 2), getattr(network, "lead", 0), getattr(network, "stride", None)
    if axes not in (1, 2, 3):
        wrong.append(f"`axes` must be 1 (waveforms), 2 (images) or 3 (videos), got {axes!r}")
        axes = 2
    if not _whole(lead, 0):
        wrong.append(f"`lead` must be an integer >= 0, got {lead!r}")
    strides = (stride,) * axes if isinstance(stride, int) else tuple(stride or ())
    if stride is None:
        wrong.append("it lacks `stride` (samples per position: an integer >= 1, or one for each axis)")
    elif len(strides) != axes:
        wrong.append(f"a stride is one number or one for each of {axes} axes, got {stride}")
    elif not all(_whole(s, 1) for s in strides):
        wrong.append(f"`stride` must be of integers >= 1, got {stride!r}")
    if kind == "decoder" and not isinstance(getattr(network, "last_layer", torch.empty(0)), Tensor):
        wrong.append(f"`last_layer` must be a weight, got {type(network.last_layer).__name__}")
    if wrong:
        name = type(network).__name__
        raise ValueError(f"{name} is no {kind} (latticode.autoencoders.contract): {'; '.join(wrong)}")
    return Geometry(axes, strides, lead)


def paired(encoder: Any, decoder: Any) -> Geometry:
    """The geometry that `encoder` and `decoder` share. Raises ValueError for two that do not fit, and as `geometry`."""
    here, there = geometry(encoder, "encoder"), geometry(decoder, "decoder")
    if here.axes != there.axes:
        raise ValueError(f"encoder and decoder need the same number of axes, got {here.axes} and {there.axes}")
    if here.strides != there.strides:
        raise ValueError(f"encoder and decoder need one stride, got {encoder.stride} and {decoder.stride}")
    if here.lead != getattr(decoder, "lead", here.lead):
        raise ValueError(f"encoder and decoder need the same lead, got {here.lead} and {there.lead}")
    return here


@torch.no_grad()
def try_out(encoder: nn.Module, decoder: nn.Module, positions: int = 4) -> None:
    """Run a pair on two random examples of `positions` positions along every axis, in eval mode.

    Raises:
        ValueError: naming what of the contract is broken: an attribute, the shape or type of an output, an example
            whose output depends on another, a `last_layer` that the output does not come from.

    Examples:
        >>> from latticode.autoencoders import ConvDecoder, ConvEncoder, try_out
        >>> small = dict(latent=4, width=8, multipliers=(1, 2), groups=4)
        >>> try_out(ConvEncoder(3, **small), ConvDecoder(3, **small))
    """
    axes, strides, lead = paired(encoder, decoder)
    grid = (positions,) * axes
    size = tuple(first + (n - first) * s for n, s, first in zip(grid, strides, (lead, 0, 0), strict=False))
    with keeping_modes(encoder, decoder):
        x = torch.rand(2, int(encoder.in_channels), *size) * 2 - 1  # type: ignore[arg-type]
        _run(encoder.eval(), x, (int(encoder.latent), *grid))  # type: ignore[arg-type]
        z = torch.randn(2, int(decoder.latent), *grid)  # type: ignore[arg-type]
        _run(decoder.eval(), z, (int(decoder.out_channels), *size))  # type: ignore[arg-type]
        layer = getattr(decoder, "last_layer", None)
        if isinstance(layer, Tensor):
            kept = layer.clone()
            layer.zero_()
            one, two = decoder(z)
            layer.copy_(kept)
            if not torch.equal(one, two):
                raise _broken(decoder, "with all of `last_layer` 0 its output still depends on its input")


def _run(network: nn.Module, x: Tensor, expected: tuple[int, ...]) -> None:
    output = network(x)
    if not isinstance(output, Tensor) or output.shape != (len(x), *expected) or not output.is_floating_point():
        got = described(output) if isinstance(output, Tensor) else type(output).__name__
        raise _broken(network, f"of {tuple(x.shape)} it should make floats {(len(x), *expected)}, got {got}")
    if not torch.allclose(network(x[:1]), output[:1], rtol=1e-3, atol=1e-4):
        raise _broken(network, "in eval mode its output of one example depends on the others in the batch")


def _broken(network: nn.Module, what: str) -> ValueError:
    return ValueError(f"{type(network).__name__} breaks the contract (latticode.autoencoders.contract): {what}")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
