"""Tiles change nothing that a network does not see across their edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers import FSQ_SPEC
from latticode import Tokenizer, tiling
from latticode.registry import build

REACH = 24  # pixels, at least the receptive radius of the networks below


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


@torch.no_grad()
def test_seams_fade(tokenizer: Tokenizer) -> None:
    """Tiles of unlike brightness pass into each other by even steps."""
    fades = tiling._fades([(0, 16), (8, 24)], 4, 32)
    ramp = fades[0, 16] - torch.nn.functional.pad(fades[8, 24], (32, 0))[:64]
    assert (ramp[:32] == 1).all()
    assert ramp.diff().abs().max() <= 2 / 32 + 1e-6


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
