"""Tiles change nothing that a network does not see across their edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import FSQ_SPEC
from latticode import Tokenizer
from latticode.core.registry import build
from latticode.tokenizers import tiling

REACH = 24  # samples, at least the receptive radius of the networks below


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Without normalisation or attention, stride 4, and sensitive to its input."""
    torch.manual_seed(0)
    sizes = {"latent": 4, "hidden": 4, "blocks": 1}
    model = build(
        {
            "type": "tokenizer",
            "encoder": {"type": "residual_encoder", **sizes},
            "quantizer": FSQ_SPEC,
            "decoder": {"type": "residual_decoder", **sizes},
        }
    )
    for parameter in model.parameters():
        parameter.data *= 2
    model.quant_conv.weight.data *= 8
    return model.eval()


@pytest.fixture
def image() -> Tensor:
    return torch.rand(1, 3, 165, 94) * 2 - 1


@torch.no_grad()
def test_codes_are_those_without_tiles(tokenizer: Tokenizer, image: Tensor) -> None:
    codes = tokenizer.encode(image)
    assert len(codes.unique()) > 4
    assert torch.equal(tiling.encode(tokenizer, image, 96, 48), codes)
    assert torch.equal(tiling.encode(tokenizer, image, 512, 64), codes)
    assert not torch.equal(tiling.encode(tokenizer, image, 16, 0), codes)  # no overlap: the edges are seen


@torch.no_grad()
def test_images_are_those_without_tiles_away_from_edges(tokenizer: Tokenizer, image: Tensor) -> None:
    codes = tokenizer.encode(image)
    whole = tokenizer.decode(codes, image.shape[2:])
    tiled = tiling.decode(tokenizer, codes, image.shape[2:], 96, 48)
    assert tiled.shape == image.shape
    # Tiles of rows 0..96, 48..144 and 72..168, and of all columns. Of these rows each tile is far from its edges.
    sure = [*range(48), *range(72 + REACH, 144 - REACH), *range(144, 165)]
    torch.testing.assert_close(tiled[:, :, sure], whole[:, :, sure], rtol=0, atol=1e-5)
    cut = tiling.decode(tokenizer, codes, image.shape[2:], 96, 0)
    assert 0 < (tiled - whole).abs().max() < 0.5 * (cut - whole).abs().max()
    assert torch.equal(tiling.decode(tokenizer, codes, image.shape[2:], 512, 64), whole)


@torch.no_grad()
@pytest.mark.parametrize(("tile", "overlap"), [(32, 16), (32, 0), (32, 8), (96, 48)])
def test_a_network_that_looks_at_single_pixels_needs_no_overlap(image: Tensor, tile: int, overlap: int) -> None:
    palette = build({"type": "palette", "size": 16})
    palette(image)
    palette.eval()
    codes = tiling.encode(palette, image, tile, overlap)
    assert torch.equal(codes, palette.encode(image))
    restored = tiling.decode(palette, codes, tile=tile, overlap=overlap)
    torch.testing.assert_close(restored, palette.decode(codes), rtol=0, atol=1e-6)  # so the fades add up to 1


def test_seams_fade() -> None:
    """Tiles of unlike brightness pass into each other by even steps."""
    for margin in (0, 8, 16):
        fades = tiling._fades([(0, 16), (8, 24)], 4, 32, margin)
        ramp = fades[0, 16] - torch.nn.functional.pad(fades[8, 24], (32, 0))[:64]
        assert (ramp[: 32 + margin] == 1).all()
        assert (ramp[64 - margin :] == -1).all()
        assert ramp.diff().abs().max() <= 2 / max(32 - 2 * margin, 1) + 1e-6


@torch.no_grad()
def test_the_networks_see_one_tile_at_a_time(tokenizer: Tokenizer, image: Tensor) -> None:
    seen: set[tuple[int, ...]] = set()
    hooks = [
        part.register_forward_pre_hook(lambda _, inputs: seen.add(tuple(inputs[0].shape[2:])))
        for part in (tokenizer.encoder, tokenizer.decoder)
    ]
    tiling.decode(tokenizer, tiling.encode(tokenizer, image, 32, 16), tile=32, overlap=16)
    assert seen == {(32, 32), (8, 8)}
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(("tile", "overlap"), [(30, 8), (32, 4), (32, 24), (32, -8), (0, 0)])
def test_bad_tiles_are_named(tokenizer: Tokenizer, image: Tensor, tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=f"got tile {tile} and overlap {overlap}"):
        tiling.encode(tokenizer, image, tile, overlap)


def convolutional(**options: Any) -> Tokenizer:
    """Of stride 4 and reach 36, and sensitive to its input."""
    torch.manual_seed(0)
    sizes = {"latent": 4, "width": 4, "multipliers": [1, 2, 2], "blocks": [0, 1, 1], "groups": 2, **options}
    model = build(
        {
            "type": "tokenizer",
            "encoder": {"type": "conv_encoder", **sizes},
            "quantizer": FSQ_SPEC,
            "decoder": {"type": "conv_decoder", **sizes},
        }
    )
    for name, parameter in model.named_parameters():
        if name.endswith("conv2.weight"):
            parameter.data *= 3  # what the branches see outweighs what passes by them
    model.quant_conv.weight.data *= 3
    return model.eval()


@torch.no_grad()
def test_an_overlap_that_covers_the_reach_changes_nothing(image: Tensor) -> None:
    tokenizer = convolutional(norm="position")
    images = torch.cat([image, image.flip(2)], 2)  # 330 rows, which the stride does not divide
    codes, tiled = tokenizer.encode(images), tiling.encode(tokenizer, images, 144)
    assert len(codes.unique()) > 3
    assert torch.equal(tiled, codes)
    assert not torch.equal(tiling.encode(tokenizer, images, 144, 24), codes)
    whole = tokenizer.decode(codes, images.shape[2:])
    for overlap in (None, 72):
        restored = tiling.decode(tokenizer, codes, images.shape[2:], 144, overlap)
        torch.testing.assert_close(restored, whole, rtol=0, atol=2e-6)
    assert (tiling.decode(tokenizer, codes, images.shape[2:], 144, 48) - whole).abs().max() > 1e-5
    assert torch.equal(tiling.reconstruct(tokenizer, images, 144).output, restored)
    assert torch.equal(tiling.reconstruct(tokenizer, images).output, tokenizer(images).output)


@torch.no_grad()
def test_group_normalisation_sees_the_whole_tile(image: Tensor) -> None:
    tokenizer = convolutional(norm="group")
    assert not torch.equal(tiling.encode(tokenizer, image, 144, 72), tokenizer.encode(image))


@pytest.mark.parametrize("blocks", [1, [0, 2, 1]])
def test_reach_is_the_receptive_field(blocks: Any) -> None:
    tokenizer = convolutional(norm="position", blocks=blocks)
    size, at = 160, 20  # position 20 of 40, samples 80 .. 83
    x = torch.randn(1, 3, size, 8, requires_grad=True)
    tokenizer.encoder(x)[0, :, at].sum().backward()
    assert x.grad is not None
    rows = x.grad[0].abs().amax((0, 2)).nonzero()
    assert tokenizer.encoder.reach == max(4 * at - int(rows.min()), int(rows.max()) - 4 * at - 3)
    z = torch.randn(1, 4, size // 4, 2)
    z[:, :, at] = torch.nan
    rows = tokenizer.decoder(z)[0].isnan().any(0).any(1).nonzero()
    assert (4 * at - int(rows.min()), int(rows.max()) - 4 * at - 3) == (tokenizer.decoder.reach,) * 2


def test_what_looks_everywhere_has_no_reach() -> None:
    assert convolutional().encoder.reach is None
    assert convolutional(norm="position", attention=[2]).decoder.reach is None


@torch.no_grad()
def test_only_images_are_cut_unasked(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE", 48)
    image = torch.rand(1, 3, 96, 40) * 2 - 1
    seen = []
    hook = tokenizer.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[2:])))
    tiling.encode(tokenizer, image)
    hook.remove()
    assert set(seen) == {(48, 40)}
    sizes = {"width": 4, "strides": [2, 4], "latent": 4}
    sound = build(
        {
            "type": "tokenizer",
            "encoder": {"type": "audio_encoder", **sizes},
            "quantizer": FSQ_SPEC,
            "decoder": {"type": "audio_decoder", **sizes},
        }
    ).eval()
    waves = torch.rand(1, 1, 333)
    assert torch.equal(tiling.encode(sound, waves), sound.encode(waves))
    assert torch.equal(tiling.reconstruct(sound, waves).output, sound(waves).output)
