"""Inpainting and outpainting as in MaskGIT (Chang et al. 2022, arXiv 2202.04200): which tokens an edit draws anew, and
how its result goes back into the picture.

H, W pixels; h, w tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from latticode.core.values import to_float
from latticode.data import Preprocess

if TYPE_CHECKING:
    from PIL import Image

THRESHOLD = 128  # of a mask's 8 bits: from here on white


def grid_mask(hole: Tensor, strides: Sequence[int], grow: int = 1) -> Tensor:
    """The tokens (h, w) bool to draw anew for the pixels `hole` (H, W) bool: every token with such a pixel in its cell,
    and `grow` rings of tokens around those, which the encoder let see into the hole."""
    cells = F.max_pool2d(hole[None].float(), tuple(strides), ceil_mode=True)[0]
    return _grown(cells > 0, grow)


def soft_edge(hole: Tensor, width: int) -> Tensor:
    """(H, W) float: 1 in the hole, falling in equal steps to 0 at more than `width` pixels from it along an axis."""
    return torch.stack([_grown(hole, distance) for distance in range(width + 1)]).float().mean(0)


def paste(original: Tensor, generated: Tensor, hole: Tensor, width: int) -> Tensor:
    """`generated` (B, C, H, W) inside the hole, `original` (C, H, W) outside, blended over `width` pixels there.

    Exact at both ends, so that what is kept are the pixels themselves and not what the tokenizer makes of them.
    """
    share = soft_edge(hole, width)
    return (1 - share) * original + share * generated


def box_hole(size: tuple[int, int], box: Sequence[int]) -> Image.Image:
    """A mask of `size` (width, height), white in `box` (x, y, width, height). Raises ValueError for one outside."""
    from PIL import Image

    x, y, width, height = box
    if min(x, y) < 0 or min(width, height) < 1 or x + width > size[0] or y + height > size[1]:
        raise ValueError(f"a box x,y,width,height must lie within the {size[0]}x{size[1]} image, got {list(box)}")
    hole = Image.new("L", size)
    hole.paste(255, (x, y, x + width, y + height))
    return hole


def extended(picture: Image.Image, margins: Sequence[int]) -> tuple[Image.Image, Image.Image]:
    """`picture` on a canvas with `margins` (left, top, right, bottom) pixels more, and the mask that is white there.

    The margins repeat the border, so that the tokens beside them, which are kept, see nothing odd.
    """
    from PIL import Image

    left, top, right, bottom = margins
    if min(margins) < 0 or not any(margins):
        raise ValueError(f"margins left,top,right,bottom must be >= 0 and not all 0, got {list(margins)}")
    pixels = np.asarray(picture)
    around = [(top, bottom), (left, right)]
    canvas = np.pad(pixels, around + [(0, 0)] * (pixels.ndim - 2), mode="edge")
    hole = np.pad(np.zeros((picture.height, picture.width), np.uint8), around, constant_values=255)
    return Image.fromarray(canvas), Image.fromarray(hole)


def framed(picture: Image.Image, hole: Image.Image, preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """(image (C, H, W) in [-1, 1], hole (H, W) bool) as large as a run's images: both cropped and scaled alike.

    A pixel that lies partly in the hole is part of it. Raises ValueError for a mask of another size, and for a hole of
    which the crop leaves nothing.
    """
    if picture.size != hole.size:
        sizes = ["{}x{}".format(*one.size) for one in (hole, picture)]
        raise ValueError(f"the mask must have the size of the image, got {sizes[0]} for an image of {sizes[1]}")
    white = hole.convert("L").point([255 * (value >= THRESHOLD) for value in range(256)])
    image = to_float(torch.tensor(preprocess.pixels(picture)))
    kept = torch.tensor(replace(preprocess, channels=1, resize="box").pixels(white))[0] > 0
    if white.getbbox() and not kept.any():
        raise ValueError("nothing of the mask lies in the centred square of the image, to which this run crops")
    return image, kept


def _grown(mask: Tensor, by: int) -> Tensor:
    """`mask` (H, W) bool with all that lies within `by` of it along both axes."""
    return F.max_pool2d(mask[None].float(), 2 * by + 1, stride=1, padding=by)[0] > 0
