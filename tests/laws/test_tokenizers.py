"""Laws of every tokenizer, whatever its parts."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from helpers import FSQ_SPEC, VQ_SPEC, tokenizer_spec
from latticode import FSQ, Tokenizer, load
from latticode.autoencoders import Decoder, Encoder, try_out
from latticode.autoencoders.shuffle import shuffle, unshuffle
from latticode.core.registry import TABLE, build, resolve, spec_of
from latticode.tokenizers.hierarchical import HierarchicalTokenizer

SMALL = {"latent": 4, "width": 4, "multipliers": [1, 2, 2], "blocks": 1, "groups": 2}
VIT = {"latent": 4, "patch": 4, "width": 8, "depth": 1, "heads": 2, "side": 4}
RESIDUAL = {"latent": 8, "hidden": 6, "blocks": 1}
CHILDREN = {"type": "hierarchical", "top": VQ_SPEC, "bottom": FSQ_SPEC | {"levels": [4, 3, 3]}, "fanout": 4}


def pair(kind: str, quantizer: dict[str, Any], channels: int = 3, outputs: int = 0, **options: Any) -> dict[str, Any]:
    return {
        "type": "tokenizer",
        "encoder": {"type": f"{kind}_encoder", "in_channels": channels, **options},
        "quantizer": quantizer,
        "decoder": {"type": f"{kind}_decoder", "out_channels": outputs or channels, **options},
    }


def hierarchy(quantizers: list[dict[str, Any]]) -> dict[str, Any]:
    """Strides 2, 2, ..., quantizers coarsest first."""
    top = pair("residual", quantizers[0], 3 if len(quantizers) == 1 else RESIDUAL["latent"], stride=2, **RESIDUAL)
    for index, quantizer in enumerate(quantizers[1:], 2):
        level = pair("residual", quantizer, 3 if index == len(quantizers) else RESIDUAL["latent"], stride=2, **RESIDUAL)
        top = {**level, "type": "hierarchical_tokenizer", "top": top}
    return top


def shuffled(spec: dict[str, Any]) -> dict[str, Any]:
    encoder = {"type": "unshuffled", "encoder": spec["encoder"]}
    return {**spec, "encoder": encoder, "decoder": {"type": "shuffled", "decoder": spec["decoder"]}}


CASES = {
    "fsq": tokenizer_spec(FSQ_SPEC),
    "fsq-colour": tokenizer_spec(FSQ_SPEC, 3),
    "vq": tokenizer_spec(VQ_SPEC),
    "maskgit": pair("maskgit", VQ_SPEC, **SMALL),
    "residual": pair("residual", VQ_SPEC, stride=4, **RESIDUAL),
    "vit": pair("vit", FSQ_SPEC, **VIT),
    "logit-laplace": pair("conv", FSQ_SPEC, outputs=6, **SMALL) | {"pixels": {"type": "logit_laplace"}},
    "two-grids": hierarchy([VQ_SPEC, FSQ_SPEC]),
    "three-grids": hierarchy([FSQ_SPEC, FSQ_SPEC, VQ_SPEC]),
    "shuffled": shuffled(pair("residual", CHILDREN, stride=2, **RESIDUAL)),
    "palette": {"type": "palette", "size": 16},
    "feedback": tokenizer_spec(FSQ_SPEC | {"feedback": True}) | {"feedback": True},
    "two-grids-feedback": hierarchy([VQ_SPEC, FSQ_SPEC]) | {"feedback": True},
}


AUDIO = {"latent": 4, "width": 4, "strides": [2, 3], "dilations": [1]}
VIDEO = {"latent": 4, "width": 4, "multipliers": [1, 1], "strides": [[2, 2]], "blocks": 1, "groups": 2, "patch": [1, 2]}
PAIRS = {name: (spec["encoder"], spec["decoder"]) for name, spec in CASES.items() if "encoder" in spec} | {
    name: (spec["encoder"], spec["decoder"])
    for name, spec in {
        "audio": pair("audio", FSQ_SPEC, 2, **AUDIO),
        "causal-audio": pair("audio", FSQ_SPEC, 1, **AUDIO, causal=True),
        "video": pair("video", FSQ_SPEC, **VIDEO),
    }.items()
}


def test_every_registered_autoencoder_is_held_to_the_contract() -> None:
    registered = {name for name, entry in TABLE.items() if str(entry).startswith("latticode.autoencoders.")}
    assert registered - {"logit_laplace"} == {network["type"] for networks in PAIRS.values() for network in networks}


@pytest.mark.parametrize("networks", PAIRS.values(), ids=PAIRS)
def test_the_contract_of_autoencoders(networks: tuple[dict[str, Any], dict[str, Any]]) -> None:
    encoder, decoder = map(build, networks)
    assert all(isinstance(network, kind) for network, kind in ((encoder, Encoder), (decoder, Decoder)))
    try_out(encoder, decoder)
    try_out(encoder, decoder, positions=6)
    if (reach := getattr(encoder, "reach", None)) is not None:
        assert reach == decoder.reach >= 0


class Coded(nn.Module):
    """An encoder of stride 2, or its decoder, that one `change` breaks."""

    def __init__(self, up: bool = False, **change: Any):
        super().__init__()
        self.up, self.latent, self.stride = up, 4, 2
        self.in_channels = self.out_channels = 3
        self.conv = nn.ConvTranspose2d(4, 3, 2, 2) if up else nn.Conv2d(3, 4, 2, 2)
        self.last_layer = self.conv.weight
        self.norm: Any = nn.Identity()
        self.after: Any = lambda h: h
        for name, value in change.items():
            object.__setattr__(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm(self.conv(x)))


@pytest.mark.parametrize(
    ("up", "change", "message"),
    [
        (False, {"latent": None}, "Coded is no encoder .*: it lacks `latent` .an integer >= 1"),
        (False, {"in_channels": 2.5}, "`in_channels` must be an integer >= 1, got 2.5"),
        (False, {"latent": None, "stride": None}, "lacks `latent` .*; it lacks `stride` .samples per position"),
        (False, {"stride": 0}, "`stride` must be of integers >= 1, got 0"),
        (False, {"axes": 4}, "`axes` must be 1 .waveforms., 2 .images. or 3 .videos., got 4"),
        (False, {"lead": -1}, "`lead` must be an integer >= 0, got -1"),
        (True, {"last_layer": nn.Identity()}, "Coded is no decoder .*: `last_layer` must be a weight, got Identity"),
        (True, {"out_channels": None}, "it lacks `out_channels`"),
        (True, {"axes": 1}, "the same number of axes, got 2 and 1"),
        (True, {"stride": 4}, "need one stride, got 2 and 4"),
        (True, {"lead": 1}, "the same lead, got 0 and 1"),
    ],
)
def test_a_tokenizer_says_what_of_the_contract_is_broken(up: bool, change: dict[str, Any], message: str) -> None:
    networks = [Coded(False, **({} if up else change)), Coded(True, **(change if up else {}))]
    with pytest.raises(ValueError, match=message):
        Tokenizer(networks[0], FSQ([3, 3]), networks[1])


@pytest.mark.parametrize(
    ("up", "change", "message"),
    [
        (False, {"latent": 5}, r"of \(2, 3, 8, 8\) it should make floats \(2, 5, 4, 4\), got \(2, 4, 4, 4\) float32"),
        (False, {"stride": 4}, r"should make floats \(2, 4, 4, 4\), got \(2, 4, 8, 8\)"),
        (False, {"after": torch.round_}, None),
        (False, {"after": lambda h: h.long()}, r"should make floats .*, got \(2, 4, 4, 4\) int64"),
        (False, {"after": lambda h: (h, h)}, "should make floats .*, got tuple"),
        (False, {"after": lambda h: h - h.mean(0)}, "output of one example depends on the others in the batch"),
        (True, {"out_channels": 1}, r"of \(2, 4, 4, 4\) it should make floats \(2, 1, 8, 8\)"),
        (True, {"last_layer": nn.Parameter(torch.ones(3))}, "with all of `last_layer` 0 its output still depends"),
    ],
)
def test_a_trial_says_what_a_pair_does_otherwise(up: bool, change: dict[str, Any], message: str | None) -> None:
    encoder, decoder = Coded(False, **({} if up else change)), Coded(True, **(change if up else {}))
    if change.get("stride"):
        decoder.stride = change["stride"]
    before = [p.clone() for p in decoder.parameters()]
    if message is None:
        try_out(encoder, decoder)
    else:
        with pytest.raises(ValueError, match=message):
            try_out(encoder, decoder)
    assert all(torch.equal(a, b) for a, b in zip(before, decoder.parameters()))
    assert encoder.training
    assert decoder.training


def test_no_registered_tokenizer_is_left_out() -> None:
    registered = {name for name in TABLE if issubclass(resolve(name), Tokenizer)}
    assert registered == {spec["type"] for spec in CASES.values()}


def prepared(spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer in eval mode, its latents spread over many codes although nothing is trained."""
    torch.manual_seed(0)
    model = build(spec)
    for name, parameter in model.named_parameters():
        if name.endswith("quant_conv.weight"):
            parameter.data *= 10
        if name.startswith(("neighbours", "quantizer.shear")):  # zero at first
            nn.init.uniform_(parameter, -1, 1)
    model(torch.rand(4, model.channels, 16, 16) * 2 - 1)  # data-dependent initialisation
    return model.eval()


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return prepared(request.param)


def images(tokenizer: Tokenizer, count: int = 3, height: int = 16, width: int = 12) -> Tensor:
    return torch.rand(count, tokenizer.channels, height, width) * 2 - 1


@torch.no_grad()
def test_decode_of_encode_is_forward(tokenizer: Tokenizer) -> None:
    x = images(tokenizer)
    result = tokenizer(x)
    codes = tokenizer.encode(x)
    assert torch.equal(codes, result.codes)
    assert codes.dtype == torch.int64
    assert codes.shape == (3, *tokenizer.grid((16, 12)), len(tokenizer.vocab))
    assert torch.equal(tokenizer.decode(codes, (16, 12)), result.output)
    for slot, size in enumerate(tokenizer.vocab):
        assert codes[..., slot].min() >= 0
        assert codes[..., slot].max() < size
    assert len(codes.unique()) > 1


@torch.no_grad()
def test_one_image_is_coded_as_in_a_batch(tokenizer: Tokenizer) -> None:
    x = images(tokenizer, 4)
    assert torch.equal(tokenizer.encode(x)[2:3], tokenizer.encode(x[2:3]))
    torch.testing.assert_close(tokenizer(x).output[2:3], tokenizer(x[2:3]).output, rtol=0, atol=1e-5)
    assert tokenizer.encode(x[:0]).shape == (0, *tokenizer.grid(x.shape[2:]), len(tokenizer.vocab))


@torch.no_grad()
@pytest.mark.parametrize("size", [(13, 9), (1, 1), (16, 17)])
def test_odd_sizes_are_padded_and_cropped(tokenizer: Tokenizer, size: tuple[int, int]) -> None:
    x = images(tokenizer, 2, *size)
    codes = tokenizer.encode(x)
    assert codes.shape[1:3] == tokenizer.grid(size)
    assert tokenizer.decode(codes, size).shape == x.shape
    assert torch.equal(tokenizer.decode(codes, size), tokenizer(x).output)
    stride = tokenizer.stride
    assert isinstance(stride, int)
    border = [torch.arange(g * stride).clamp(max=n - 1) for g, n in zip(tokenizer.grid(size), size)]
    assert torch.equal(tokenizer.encode(x[:, :, border[0]][..., border[1]]), codes)


@torch.no_grad()
def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path) -> None:
    again = load(tokenizer.save_pretrained(tmp_path))
    x = images(tokenizer)
    assert torch.equal(again.encode(x), tokenizer.encode(x))
    assert torch.equal(again(x).output, tokenizer(x).output)
    assert spec_of(again) == spec_of(tokenizer)
    assert again.fingerprint() == tokenizer.fingerprint()
    assert isinstance(Tokenizer.from_pretrained(tmp_path), type(tokenizer))
    next(again.parameters()).data += 1
    assert again.fingerprint() != tokenizer.fingerprint()


def test_every_parameter_gets_a_gradient(tokenizer: Tokenizer) -> None:
    x = images(tokenizer)
    result = tokenizer.train()(x)
    ((result.output - x).square().mean() + sum(result.losses.values())).backward()
    for name, parameter in tokenizer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_the_last_layer_carries_all_that_varies(tokenizer: Tokenizer) -> None:
    if not hasattr(tokenizer.decoder, "last_layer"):
        assert not list(tokenizer.decoder.parameters())
        return
    x = images(tokenizer)
    assert tokenizer(x).output.std(0).max() > 0
    cast(Any, tokenizer.decoder).last_layer.data.zero_()
    assert tokenizer(x).output.std(0).max() == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["vq", "vit", "logit-laplace", "three-grids", "shuffled", "palette"])
@pytest.mark.slow
def test_compiled_and_exported(name: str) -> None:
    tokenizer = prepared(CASES[name])
    x = images(tokenizer, 2, 13, 9)
    codes = tokenizer.encode(x)
    assert torch.equal(torch.compile(tokenizer.encode, backend="aot_eager", fullgraph=True)(x), codes)
    exported = torch.export.export(Encoding(tokenizer), (x,))
    assert torch.equal(exported.module()(x), codes)


class Encoding(nn.Module):
    """`encode` as a module's forward, which is what can be exported."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, x: Tensor) -> Tensor:
        return self.tokenizer.encode(x)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda c: torch.zeros(2, c + 1, 8, 8), r"expected float images .*got \(2, \d, 8, 8\) float32"),
        (lambda c: torch.zeros(c, 8, 8), r"expected float images .*got \(\d, 8, 8\) float32"),
        (lambda c: torch.zeros(2, c, 8, 8, dtype=torch.uint8), r"expected float images .*got \(2, \d, 8, 8\) uint8"),
        (lambda c: torch.zeros(2, c, 0, 8), r"at least \[1, 1\] samples, got size \(0, 8\)"),
        (lambda c: torch.full((1, c, 2, 2), torch.nan), r"expected finite values, got (4|12) of (4|12) that are NaN"),
        (lambda c: torch.full((1, c, 2, 2), torch.inf), r"expected finite values, got (4|12) of (4|12) that are NaN"),
    ],
)
def test_bad_images_are_named(tokenizer: Tokenizer, bad, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(bad(tokenizer.channels))
    with pytest.raises(ValueError, match=message):
        tokenizer(bad(tokenizer.channels))


def test_a_size_of_other_axes_is_refused(tokenizer: Tokenizer) -> None:
    codes = tokenizer.encode(images(tokenizer))
    with pytest.raises(ValueError, match=r"a size of 2 axes, got \(8,\)"):
        tokenizer.decode(codes, (8,))


def test_in_training_the_loss_shows_a_nan() -> None:
    tokenizer = prepared(CASES["residual"]).train()
    x = images(tokenizer)
    x[0, 0, 0, 0] = torch.nan
    assert tokenizer(x).output.isnan().any()


def test_another_stride_is_refused() -> None:
    spec = tokenizer_spec()
    spec["decoder"] |= {"multipliers": [1, 2], "blocks": 1}
    with pytest.raises(ValueError, match="one stride, got 4 and 2"):
        build(spec)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vq", "two-grids"])
def test_gain_widens_what_is_quantized(name: str) -> None:
    usual = prepared(CASES[name])
    wide = build(CASES[name] | {"gain": 4.0}).eval()
    wide.load_state_dict(
        {key: value / (4.0 if key.startswith("quant_conv.") else 1.0) for key, value in usual.state_dict().items()}
    )
    x = images(usual)
    assert torch.equal(wide.encode(x), usual.encode(x))  # a power of two rounds nothing
    wide.load_state_dict(usual.state_dict())
    assert not torch.equal(wide.encode(x), usual.encode(x))
    with pytest.raises(ValueError, match="gain must be > 0, got 0"):
        build(CASES[name] | {"gain": 0})


def test_damaged_files_are_named(tmp_path) -> None:
    folder = build(tokenizer_spec()).save_pretrained(tmp_path)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is no latticode file"):
        load(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        load(folder)


# Several grids


@torch.no_grad()
def test_levels_of_packed_codes() -> None:
    tokenizer = prepared(CASES["three-grids"])
    assert tokenizer.stride == 8
    assert tokenizer.vocab == (12,) + (12,) * 4 + (16,) * 16
    assert tokenizer.bits == pytest.approx(5 * torch.tensor(12.0).log2() + 16 * 4)
    codes = tokenizer.encode(images(tokenizer, 2, 16, 24))
    top, middle, fine = tokenizer.levels(codes)
    assert (top.shape, middle.shape, fine.shape) == ((2, 2, 3, 1), (2, 4, 6, 1), (2, 8, 12, 1))
    assert torch.equal(tokenizer.pack([top, middle, fine]), codes)
    for dy in range(2):
        for dx in range(2):
            assert torch.equal(middle[:, dy::2, dx::2, 0], codes[..., 1 + 2 * dy + dx])
    # The 4 x 4 fine codes of a position of the coarsest grid, in row-major order
    assert torch.equal(fine[:, 3::4, 2::4, 0], codes[..., 5 + 4 * 3 + 2])


@torch.no_grad()
def test_fine_codes_depend_on_coarse_ones_and_both_are_seen() -> None:
    tokenizer = prepared(CASES["two-grids"])
    assert isinstance(tokenizer, HierarchicalTokenizer)
    x = images(tokenizer)
    codes = tokenizer.encode(x)
    output = tokenizer.decode(codes)
    for slot in range(len(tokenizer.vocab)):
        other = codes.clone()
        other[..., slot] = (other[..., slot] + 1) % tokenizer.vocab[slot]
        assert not torch.equal(tokenizer.decode(other), output)
    cast(Any, tokenizer.top).decoder.last_layer.data.zero_()
    top, fine = tokenizer.levels(tokenizer.encode(x))
    assert torch.equal(top, tokenizer.levels(codes)[0])
    assert not torch.equal(fine, tokenizer.levels(codes)[1])


def test_losses_of_levels_are_told_apart() -> None:
    tokenizer = prepared(hierarchy([VQ_SPEC, VQ_SPEC, VQ_SPEC]))
    assert set(tokenizer(images(tokenizer)).losses) == {"commitment", "top_commitment", "top_top_commitment"}


def test_hierarchies_that_do_not_fit_are_refused() -> None:
    spec = hierarchy([FSQ_SPEC, FSQ_SPEC])
    spec["top"]["encoder"]["in_channels"] = 3
    with pytest.raises(ValueError, match="top must take the encoder's 8 channels on 2 axes, got a tokenizer of 3"):
        build(spec)
    spec = hierarchy([FSQ_SPEC, FSQ_SPEC])
    spec["top"] |= {"pixels": {"type": "logit_laplace"}}
    with pytest.raises(ValueError, match="only the finest pixels"):
        build(spec)


def test_unshuffled_positions_keep_their_channels_together() -> None:
    x = torch.randn(2, 3, 4, 6)
    y = unshuffle(x, 2)
    assert y.shape == (2, 12, 2, 3)
    assert torch.equal(y[:, 6:9], x[:, :, 1::2, 0::2])  # position (1, 0), the third of four
    assert torch.equal(shuffle(y, 2), x)


# Likelihood of pixels


def test_logit_laplace_is_the_density_of_dalle() -> None:
    likelihood = build({"type": "logit_laplace", "eps": 0.1})
    x = torch.rand(1, 1, 1, 64, dtype=torch.float64) * 2 - 1
    mu, log_b = torch.randn(2, 1, 1, 1, 64, dtype=torch.float64)
    y = 0.8 * (x + 1) / 2 + 0.1
    laplace = torch.distributions.Laplace(mu, log_b.exp())
    density = torch.distributions.TransformedDistribution(laplace, [torch.distributions.SigmoidTransform()])
    torch.testing.assert_close(likelihood.nll(torch.cat([mu, log_b], 1), x), -density.log_prob(y).mean())
    torch.testing.assert_close(likelihood.image(torch.cat([y.logit(), log_b], 1)), x)
    assert likelihood.nll(torch.cat([mu, log_b], 1), torch.full_like(x, 7)).isfinite()


def test_logit_laplace_needs_two_channels_each() -> None:
    tokenizer = build(CASES["fsq-colour"] | {"pixels": {"type": "logit_laplace"}})
    with pytest.raises(ValueError, match="2 output channels per channel, got 3"):
        tokenizer(images(tokenizer))
    with pytest.raises(ValueError, match=r"eps must be in \(0, 0.5\), got 0.5"):
        build({"type": "logit_laplace", "eps": 0.5})


# Other numbers of axes, with networks that take every s-th sample and repeat it


class Take(nn.Module):
    def __init__(self, axes: int, stride: int | tuple[int, ...], lead: int, up: bool):
        super().__init__()
        self.axes, self.stride, self.lead, self.up = axes, stride, lead, up
        self.in_channels = self.out_channels = self.latent = 2

    def forward(self, x: Tensor) -> Tensor:
        for axis in range(self.axes):
            s = self.stride if isinstance(self.stride, int) else self.stride[axis]
            lead = self.lead if axis == 0 else 0
            first, rest = torch.arange(lead), torch.arange(lead, x.shape[axis + 2])
            picked = torch.cat([first, rest.repeat_interleave(s) if self.up else rest[::s]])
            x = x.index_select(axis + 2, picked)
        return x


@torch.no_grad()
@pytest.mark.parametrize(
    ("axes", "stride", "lead", "size", "grid"),
    [
        (1, 4, 0, (9,), (3,)),
        (1, 4, 1, (9,), (3,)),
        (1, 4, 1, (1,), (1,)),
        (1, 4, 1, (2,), (2,)),
        (2, (4, 2), 0, (9, 5), (3, 3)),
        (3, (4, 2, 2), 1, (6, 4, 5), (3, 2, 3)),
        (3, 2, 0, (5, 4, 5), (3, 2, 3)),
    ],
)
def test_axes(axes: int, stride: Any, lead: int, size: tuple[int, ...], grid: tuple[int, ...]) -> None:
    networks = [Take(axes, stride, lead, up) for up in (False, True)]
    tokenizer = Tokenizer(networks[0], FSQ([4, 3]), networks[1]).eval()
    assert tokenizer.stride == stride
    x = torch.rand(2, 2, *size)
    codes = tokenizer.encode(x)
    assert codes.shape == (2, *tokenizer.grid(size), 1) == (2, *grid, 1)
    assert torch.equal(tokenizer.decode(codes, size), tokenizer(x).output)
    assert tokenizer(x).output.shape == x.shape
    first = (slice(None), *[slice(0, 1)] * axes)
    assert torch.equal(codes[first], tokenizer.encode(x[(slice(None), slice(None), *[slice(0, 1)] * axes)]))
    with pytest.raises(ValueError, match=r"expected float (waveforms|images|videos)"):
        tokenizer.encode(x[0])


def test_a_stride_of_other_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one for each of 3 axes, got \(4, 2\)"):
        Tokenizer(Take(3, (4, 2), 0, False), FSQ([4, 3]), Take(3, (4, 2), 0, True))
