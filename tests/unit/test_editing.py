"""Laws of edits: what is kept is the user's own, what is drawn anew is the prior's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from latticode.core.values import to_float
from latticode.data import Preprocess
from latticode.sampling.editing import box_hole, extended, framed, grid_mask, paste, soft_edge


def hole_of(height: int, width: int, *boxes: tuple[int, int, int, int]) -> torch.Tensor:
    hole = torch.zeros(height, width, dtype=torch.bool)
    for top, left, bottom, right in boxes:
        hole[top:bottom, left:right] = True
    return hole


@pytest.mark.parametrize(("height", "width", "strides"), [(16, 16, (4, 4)), (17, 10, (4, 4)), (12, 20, (2, 5))])
@pytest.mark.parametrize("grow", [0, 1, 2])
def test_tokens_near_the_hole_are_drawn_anew_and_no_others(height, width, strides, grow) -> None:
    for y in range(0, height, 3):
        for x in range(0, width, 3):
            anew = grid_mask(hole_of(height, width, (y, x, y + 1, x + 1)), strides, grow)
            assert anew.shape == (-(-height // strides[0]), -(-width // strides[1]))
            i, j = y // strides[0], x // strides[1]
            rows, columns = (torch.arange(n) for n in anew.shape)
            near = ((rows - i).abs() <= grow)[:, None] & ((columns - j).abs() <= grow)
            assert torch.equal(anew, near)


def test_nothing_and_everything() -> None:
    nothing, everything = hole_of(9, 9), ~hole_of(9, 9)
    original, generated = torch.rand(3, 9, 9), torch.rand(2, 3, 9, 9)
    assert not grid_mask(nothing, (4, 4)).any()
    assert grid_mask(everything, (4, 4)).all()
    assert torch.equal(paste(original, generated, nothing, 4), original.expand(2, -1, -1, -1))
    assert torch.equal(paste(original, generated, everything, 4), generated)


def test_a_result_is_generated_in_the_hole_original_away_from_it_and_mixed_between() -> None:
    hole, width = hole_of(20, 24, (6, 8, 12, 12)), 3
    original, generated = torch.zeros(1, 20, 24), torch.ones(1, 1, 20, 24)
    share = paste(original, generated, hole, width)[0, 0]
    assert torch.equal(share, soft_edge(hole, width))
    y, x = torch.arange(20)[:, None], torch.arange(24)
    beyond = torch.stack([(6 - y).expand(20, 24), (y - 11).expand(20, 24), (8 - x).expand(20, 24), x - 11 + 0 * y])
    distance = beyond.amax(0).clamp(min=0)
    torch.testing.assert_close(share, (1 - distance / (width + 1)).clamp(min=0))


def test_a_box_is_white_where_it_says_and_refused_outside() -> None:
    hole = np.asarray(box_hole((10, 6), (3, 1, 4, 2)))
    assert hole.shape == (6, 10)
    assert (hole[1:3, 3:7] == 255).all()
    assert (hole > 0).sum() == 8
    for wrong in ((-1, 0, 2, 2), (0, 0, 0, 2), (8, 0, 3, 2), (0, 5, 2, 2)):
        with pytest.raises(ValueError, match="within the 10x6 image"):
            box_hole((10, 6), wrong)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_canvas_has_the_image_inside_and_its_border_around(mode) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (4, 5, 3), np.uint8)).convert(mode)
    canvas, hole = (np.asarray(one) for one in extended(picture, (1, 2, 3, 0)))
    pixels = np.asarray(picture)
    assert canvas.shape[:2] == hole.shape == (6, 9)
    assert (canvas[2:, 1:6] == pixels).all()
    assert (canvas[:2, 1:6] == pixels[:1]).all()
    assert (hole[2:, 1:6] == 0).all()
    assert (hole == 255).sum() == 6 * 9 - 4 * 5
    for wrong in ((0, 0, 0, 0), (-1, 2, 0, 0)):
        with pytest.raises(ValueError, match="margins"):
            extended(picture, wrong)


def test_image_and_mask_are_framed_alike() -> None:
    """A white thing in the image, which the mask covers, lies under it after cropping and scaling too."""
    pixels = np.zeros((40, 60), np.uint8)
    pixels[10:20, 30:36] = 255
    picture = Image.fromarray(pixels)
    image, hole = framed(picture, picture, Preprocess(16, 1))
    assert image.shape == (1, 16, 16)
    assert hole[image[0] > 0].all()
    assert 0 < hole.sum() <= 6 * 4 + 8
    same, hole = framed(picture.crop((20, 0, 60, 40)), picture.crop((20, 0, 60, 40)), Preprocess(40, 1))
    assert torch.equal(same[0], to_float(torch.tensor(pixels[:, 20:])))
    assert torch.equal(hole, torch.tensor(pixels[:, 20:] > 0))
    with pytest.raises(ValueError, match="60x40"):
        framed(picture, Image.new("L", (40, 40)), Preprocess(16, 1))
    with pytest.raises(ValueError, match="centred square"):
        framed(picture, box_hole((60, 40), (0, 0, 5, 5)), Preprocess(16, 1))
