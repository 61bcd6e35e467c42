"""Laws of the networks of sound and video and their tokenizers: what a causal one says of a beginning never changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode import Tokenizer, load
from latticode.autoencoders import AudioDecoder, AudioEncoder, VideoDecoder, VideoEncoder
from latticode.core.registry import build, spec_of
from latticode.nn.causal import CausalConv3d, CausalUpsample, Conv1d, ConvTranspose1d, FrameNorm, Snake

AUDIO = {"latent": 4, "width": 4, "strides": [2, 5], "dilations": [1, 3]}  # stride 10
VIDEO = {"latent": 4, "width": 4, "multipliers": [1, 2, 2], "strides": [[1, 2], [2, 2]], "blocks": 1, "groups": 2}
PATCH = VIDEO | {"multipliers": [1, 2], "strides": [[1, 2]], "blocks": [1, 0], "patch": [2, 2]}


def tokenizer_spec(kind: str, channels: int, **options: Any) -> dict[str, Any]:
    return {
        "type": "tokenizer",
        "encoder": {"type": f"{kind}_encoder", "in_channels": channels, **options},
        "quantizer": {"type": "fsq", "levels": [8, 5, 5]},
        "decoder": {"type": f"{kind}_decoder", "out_channels": channels, **options},
    }


CASES = {
    "audio": (tokenizer_spec("audio", 1, **AUDIO), (70,), (63,), (7,)),
    "audio-stereo": (tokenizer_spec("audio", 2, **AUDIO), (70,), (1,), (7,)),
    "audio-causal": (tokenizer_spec("audio", 1, causal=True, **AUDIO), (70,), (63,), (7,)),
    "video": (tokenizer_spec("video", 3, **VIDEO), (5, 8, 12), (4, 7, 9), (3, 2, 3)),
    "video-patch": (tokenizer_spec("video", 3, **PATCH), (5, 8, 12), (4, 7, 9), (3, 2, 3)),
    "video-grey": (tokenizer_spec("video", 1, **VIDEO), (1, 8, 8), (2, 5, 8), (1, 2, 2)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Tokenizer, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    spec, size, odd, grid = CASES[request.param]
    model = build(spec)
    model.quant_conv.weight.data *= 10  # so that latents spread over many codes although nothing is trained
    return model.eval(), size, odd, grid


def noise(tokenizer: Tokenizer, *size: int, count: int = 2) -> Tensor:
    return torch.rand(count, tokenizer.channels, *size) * 2 - 1


@torch.no_grad()
def test_tokenizers(case, tmp_path) -> None:
    tokenizer, size, odd, grid = case
    for shape in (size, odd):
        x = noise(tokenizer, *shape)
        result, codes = tokenizer(x), tokenizer.encode(x)
        assert torch.equal(codes, result.codes)
        assert codes.shape == (2, *tokenizer.grid(shape), 1)
        assert torch.equal(tokenizer.decode(codes, shape), result.output)
        assert result.output.shape == x.shape
    x = noise(tokenizer, *size, count=3)
    codes = tokenizer.encode(x)
    assert codes.shape[1:-1] == grid
    assert len(codes.unique()) > 5
    assert torch.equal(codes[1:2], tokenizer.encode(x[1:2]))
    again = load(tokenizer.save_pretrained(tmp_path))
    assert torch.equal(again.encode(x), codes)
    assert torch.equal(again(x).output, tokenizer(x).output)
    assert spec_of(again) == spec_of(tokenizer)
    with pytest.raises(ValueError, match=r"expected float (waveforms|videos)"):
        tokenizer.encode(torch.zeros(2, tokenizer.channels, 8, 8))


def test_every_parameter_learns(case) -> None:
    tokenizer, _, odd, _ = case
    x = noise(tokenizer, *(4 * n for n in odd))
    (tokenizer.train()(x).output - x).square().mean().backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_the_last_layer_carries_all_that_varies(case) -> None:
    tokenizer, size, _, _ = case
    tokenizer.decoder.last_layer.zero_()
    assert float(tokenizer(noise(tokenizer, *size)).output.std(0).max()) == 0


def reach(network: nn.Module, x: Tensor, position: int) -> Tensor:
    """The indices of the time axis of `x` that the output at `position` of that axis depends on, exactly, by gradients.

    Every weight of the networks is random, so a gradient that is 0 is no accident.
    """
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x)[:, :, position].square().sum(), x)
    return gradient.abs().transpose(0, 2).flatten(1).sum(1).nonzero().flatten()


def test_reach_of_sound() -> None:
    encoder, decoder = AudioEncoder(causal=True, **AUDIO), AudioDecoder(causal=True, **AUDIO)  # type: ignore[arg-type]
    x, z = torch.randn(1, 1, 120), torch.randn(1, 4, 12)
    for position in (0, 3, 11):
        assert int(reach(encoder, x, position).max()) == 10 * position + 9
        for sample in (0, 9):
            assert int(reach(decoder, z, 10 * position + sample).max()) == position
    assert int(reach(AudioEncoder(**AUDIO), x, 0).max()) > 9  # type: ignore[arg-type]
    assert int(reach(AudioDecoder(**AUDIO), z, 0).max()) > 0  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [VIDEO, PATCH])
def test_reach_of_video(options: dict[str, Any]) -> None:
    encoder, decoder = VideoEncoder(**options), VideoDecoder(**options)
    x, z = torch.randn(1, 3, 9, 8, 8), torch.randn(1, 4, 5, 2, 2)
    for position in (0, 1, 4):
        assert int(reach(encoder, x, position).max()) == 2 * position  # the first frame stands alone
    for frame in range(9):
        assert int(reach(decoder, z, frame).max()) == (frame + 1) // 2


def test_reach_of_norms() -> None:
    x = torch.randn(1, 4, 6, 4, 4)
    assert int(reach(nn.GroupNorm(2, 4), x, 0).max()) == 5  # what FrameNorm is for
    assert int(reach(FrameNorm(4, 2), x, 0).max()) == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["audio-causal", "video", "video-patch"])
def test_a_prefix_is_coded_and_decoded_as_a_prefix(name: str) -> None:
    spec, size, _, grid = CASES[name]
    tokenizer = build(spec).eval()
    tokenizer.quant_conv.weight.data *= 10
    x = noise(tokenizer, *size)
    codes = tokenizer.encode(x)
    output = tokenizer.decode(codes)
    stride, lead = tokenizer.strides[0], tokenizer.leads[0]
    for length in range(1, grid[0]):
        samples = lead + (length - lead) * stride
        assert torch.equal(tokenizer.encode(x[:, :, :samples]), codes[:, :length])
        torch.testing.assert_close(tokenizer.decode(codes[:, :length]), output[:, :, :samples], rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_image_is_the_first_frame_of_a_clip() -> None:
    tokenizer = build(CASES["video"][0]).eval()
    clip = noise(tokenizer, 5, 8, 12)
    image = tokenizer.encode(clip[:, :, :1])
    assert image.shape == (2, 1, 2, 3, 1)
    assert torch.equal(image, tokenizer.encode(clip)[:, :1])


@pytest.mark.parametrize("stride", [2, 3, 4, 5])
@torch.no_grad()
def test_convolutions_are_those_of_dac(stride: int) -> None:
    """A kernel of two strides, ceil(stride / 2) zeros on both sides; transposed with output padding where it is odd."""
    x, pad = torch.randn(2, 3, 6 * stride), -(-stride // 2)
    down, up = Conv1d(3, 4, 2 * stride, stride=stride), ConvTranspose1d(3, 4, stride)
    wanted = F.conv1d(x, down.weight, down.bias, stride, pad)
    torch.testing.assert_close(down(x), wanted)
    assert wanted.shape == (2, 4, 6)
    torch.testing.assert_close(up(x), F.conv_transpose1d(x, up.weight, up.bias, stride, pad, stride % 2))
    assert up(x).shape == (2, 4, x.shape[-1] * stride)
    wide = Conv1d(3, 4, 7, dilation=9)
    torch.testing.assert_close(wide(x), F.conv1d(x, wide.weight, wide.bias, 1, 27, 9))


@torch.no_grad()
def test_weight_is_length_times_direction() -> None:
    for layer in (Conv1d(3, 4, 5), ConvTranspose1d(3, 4, 2)):
        torch.testing.assert_close(layer.weight, layer.weight_v)  # at the start
        layer.weight_v.mul_(7)
        torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), layer.weight_g.flatten())
        layer.weight_v.zero_()
        assert float(layer.weight.abs().max()) == 0


def test_keys_are_those_of_dac() -> None:
    """Some of each kind of the 44 kHz model of Kumar et al. 2023, and the number of all."""
    encoder = AudioEncoder(strides=[2, 4, 8, 8]).state_dict()
    decoder = AudioDecoder(strides=[2, 4, 8, 8]).state_dict()
    for state, key, shape in (
        (encoder, "block.0.weight_v", (64, 1, 7)),
        (encoder, "block.1.block.0.block.0.alpha", (1, 64, 1)),
        (encoder, "block.1.block.2.block.3.weight_g", (64, 1, 1)),
        (encoder, "block.1.block.4.weight_v", (128, 64, 4)),
        (encoder, "block.6.bias", (1024,)),
        (decoder, "model.0.weight_v", (1536, 1024, 7)),
        (decoder, "model.1.block.1.weight_v", (1536, 768, 16)),
        (decoder, "model.1.block.1.weight_g", (1536, 1, 1)),
        (decoder, "model.1.block.4.block.3.weight_v", (768, 768, 1)),
        (decoder, "model.6.weight_v", (1, 96, 7)),
    ):
        assert state[key].shape == shape
    assert (len(encoder), len(decoder)) == (119, 119)


@torch.no_grad()
def test_parts() -> None:
    x = torch.linspace(-3, 3, 50)[None, None]
    snake = Snake(1)
    snake.alpha.fill_(2.0)
    torch.testing.assert_close(snake(x), x + torch.sin(2 * x) ** 2 / 2)
    assert torch.equal(snake(x + torch.pi) > snake(x), torch.ones_like(x, dtype=torch.bool))  # it grows, unlike a sine
    frames = torch.randn(2, 4, 3, 5, 5) * 5 + 3
    norm = FrameNorm(4, 2)
    for t in range(3):
        torch.testing.assert_close(norm(frames)[:, :, t], F.group_norm(frames[:, :, t], 2, eps=1e-6))
    upsample = CausalUpsample(2, 2, (2, 2))
    small = torch.randn(1, 2, 3, 4, 4)
    repeated = upsample.conv(small)[:, ::8].repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
    torch.testing.assert_close(upsample(small), repeated[:, :, 1:])
    clip = torch.randn(1, 2, 1, 6, 6).expand(-1, -1, 4, -1, -1)
    still = CausalConv3d(2, 3)(clip)
    torch.testing.assert_close(still, still[:, :, :1].expand_as(still))  # no motion: every frame like the first


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (AudioEncoder, {"strides": [2, 1]}, r"strides must be .*>= 2 .*got \[2, 1\]"),
        (AudioDecoder, {"dilations": [0]}, r"dilations >= 1, got .*\[0\]"),
        (VideoEncoder, {"strides": [[1, 2]]}, r"strides 3 such pairs, .*got \[1, 1\] and \[\[1, 2\]\]"),
        (VideoDecoder, {"patch": [1, 4]}, r"patch must be a pair \(time, space\) of 1 or 2 .*got \[1, 4\]"),
        (VideoEncoder, {"strides": [[1, 2], [3, 2], [2, 2]]}, r"and \[\[1, 2\], \[3, 2\], \[2, 2\]\]"),
        (VideoDecoder, {"blocks": [1, 2]}, r"blocks one number .*got .*\[1, 2\]"),
        (VideoDecoder, {"groups": 24}, "groups must divide"),
    ],
)
def test_bad_settings_are_named(cls: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**({"width": 4, "groups": 2} | options if cls in (VideoEncoder, VideoDecoder) else options))
