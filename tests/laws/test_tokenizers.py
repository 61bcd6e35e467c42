"""Laws of every tokenizer, whatever its parts."""

from __future__ import annotations

import pytest
import torch

from helpers import FSQ_SPEC, VQ_SPEC, tokenizer_spec
from latticode import Tokenizer, load
from latticode.registry import build, spec_of

CASES = {
    "fsq": tokenizer_spec(FSQ_SPEC),
    "fsq-colour": tokenizer_spec(FSQ_SPEC, 3),
    "vq": tokenizer_spec(VQ_SPEC),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    model = build(request.param)
    model(torch.rand(4, model.channels, 16, 16) * 2 - 1)  # data-dependent initialisation
    return model.eval()


def images(tokenizer: Tokenizer, count: int = 3, height: int = 16, width: int = 12) -> torch.Tensor:
    return torch.rand(count, tokenizer.channels, height, width) * 2 - 1


@torch.no_grad()
def test_decode_of_encode_is_forward(tokenizer: Tokenizer) -> None:
    x = images(tokenizer)
    result = tokenizer(x)
    codes = tokenizer.encode(x)
    assert torch.equal(codes, result.codes)
    assert codes.dtype == torch.int64
    assert codes.shape == (3, *tokenizer.grid((16, 12)), len(tokenizer.vocab))
    assert torch.equal(tokenizer.decode(codes), result.output)
    for slot, size in enumerate(tokenizer.vocab):
        assert codes[..., slot].min() >= 0
        assert codes[..., slot].max() < size


@torch.no_grad()
def test_one_image_is_coded_as_in_a_batch(tokenizer: Tokenizer) -> None:
    x = images(tokenizer, 4)
    assert torch.equal(tokenizer.encode(x)[2:3], tokenizer.encode(x[2:3]))


@torch.no_grad()
@pytest.mark.parametrize("size", [(13, 9), (1, 1), (16, 17)])
def test_odd_sizes_are_padded_and_cropped(tokenizer: Tokenizer, size: tuple[int, int]) -> None:
    x = images(tokenizer, 2, *size)
    codes = tokenizer.encode(x)
    assert codes.shape[1:3] == tokenizer.grid(size)
    assert tokenizer.decode(codes, size).shape == x.shape
    assert torch.equal(tokenizer.decode(codes, size), tokenizer(x).output)


@torch.no_grad()
def test_saved_and_loaded(tokenizer: Tokenizer, tmp_path) -> None:
    again = load(tokenizer.save_pretrained(tmp_path))
    x = images(tokenizer)
    assert torch.equal(again.encode(x), tokenizer.encode(x))
    assert torch.equal(again(x).output, tokenizer(x).output)
    assert spec_of(again) == spec_of(tokenizer)
    assert again.fingerprint() == tokenizer.fingerprint()
    next(again.parameters()).data += 1
    assert again.fingerprint() != tokenizer.fingerprint()


def test_gradient_reaches_the_encoder(tokenizer: Tokenizer) -> None:
    x = images(tokenizer)
    (tokenizer(x).output - x).square().mean().backward()
    gradient = tokenizer.encoder.conv_in.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("bad", "got"),
    [
        (lambda c: torch.zeros(2, c + 1, 8, 8), r"\(2, \d, 8, 8\) float32"),
        (lambda c: torch.zeros(c, 8, 8), r"\(\d, 8, 8\) float32"),
        (lambda c: torch.zeros(2, c, 8, 8, dtype=torch.uint8), r"\(2, \d, 8, 8\) uint8"),
    ],
)
def test_bad_images_are_named(tokenizer: Tokenizer, bad, got: str) -> None:
    with pytest.raises(ValueError, match=f"expected float images .*got {got}"):
        tokenizer.encode(bad(tokenizer.channels))


def test_another_stride_is_refused() -> None:
    spec = tokenizer_spec()
    spec["decoder"] |= {"multipliers": [1, 2], "blocks": 1}
    with pytest.raises(ValueError, match="one stride, got 4 and 2"):
        build(spec)


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
