"""Encoding and decoding of large images in overlapping tiles: the networks need the memory of one tile at a time.

Tiles start at multiples of the tokenizer's stride, so codes fall on the same grid as without tiles. A code is the same
too where its receptive field lies inside the tile that gave it and the networks look nowhere else: group normalisation
and attention look at the whole tile, so with these codes differ a little everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from latticode.tokenizer import Tokenizer

Span = tuple[int, int]  # first position and the one after the last


def encode(tokenizer: Tokenizer, images: Tensor, tile: int = 512, overlap: int = 64) -> Tensor:
    """The codes (B, *grid, K) of `images` (B, C, *size), by tiles of `tile` samples that share `overlap`, per axis.

    Each neighbour gives the codes of its half of the overlap. Raises ValueError for a tile that is no multiple of the
    stride, an overlap that is none of twice the stride or more than half a tile, and a tokenizer whose first sample
    stands alone.
    """
    grid = tokenizer.grid(images.shape[2:])
    codes = images.new_empty(len(images), *grid, len(tokenizer.vocab), dtype=torch.int64)
    for place in product(*_spans(tokenizer, grid, tile, overlap)):
        part = tokenizer.encode(images[(..., *_samples(tokenizer, place))])
        inner, outer = [slice(None)], [slice(None)]
        for (a, b), n, s in zip(place, grid, tokenizer.strides, strict=True):
            margin = overlap // s // 2
            first, last = (a + margin if a else 0), (b - margin if b < n else n)
            inner.append(slice(first - a, last - a))
            outer.append(slice(first, last))
        codes[tuple(outer)] = part[tuple(inner)]
    return codes


def decode(
    tokenizer: Tokenizer, codes: Tensor, size: Sequence[int] | None = None, tile: int = 512, overlap: int = 64
) -> Tensor:
    """The images (B, C, *size) of `codes` (B, *grid, K), as `Tokenizer.decode`, by tiles as in `encode`.

    Where tiles overlap each fades linearly into the next.
    """
    grid = codes.shape[1:-1]
    spans = _spans(tokenizer, grid, tile, overlap)
    fades = [_fades(of_axis, s, overlap) for of_axis, s in zip(spans, tokenizer.strides, strict=True)]
    whole = [n * s for n, s in zip(grid, tokenizer.strides, strict=True)]
    images = None
    for place in product(*spans):
        part = tokenizer.decode(codes[(slice(None), *(slice(a, b) for a, b in place))])
        for axis, span in enumerate(place):
            part = part * fades[axis][span].to(part).view(-1, *[1] * (tokenizer.axes - 1 - axis))
        if images is None:
            images = part.new_zeros(*part.shape[:2], *whole)
        images[(..., *_samples(tokenizer, place))] += part
    assert images is not None
    return images if size is None else images[(..., *(slice(n) for n in size))]


def _spans(tokenizer: Tokenizer, grid: Sequence[int], tile: int, overlap: int) -> list[list[Span]]:
    """Per axis the tiles' positions on a code grid. All are of one size, so the last two may share more."""
    if any(tokenizer.leads):
        raise ValueError("a tokenizer whose first sample stands alone does not work on tiles")
    spans: list[list[Span]] = []
    for n, s in zip(grid, tokenizer.strides, strict=True):
        if tile < 1 or tile % s or overlap % (2 * s) or not 0 <= overlap <= tile // 2:
            raise ValueError(
                f"tile must be a multiple of the stride {s}, overlap one of {2 * s} and at most half a tile, "
                f"got tile {tile} and overlap {overlap}"
            )
        length = min(tile // s, n)
        starts = [*range(0, n - length, (tile - overlap) // s), n - length]
        spans.append([(a, a + length) for a in starts])
    return spans


def _samples(tokenizer: Tokenizer, place: Sequence[Span]) -> list[slice]:
    return [slice(a * s, b * s) for (a, b), s in zip(place, tokenizer.strides, strict=True)]


def _fades(spans: Sequence[Span], stride: int, overlap: int) -> dict[Span, Tensor]:
    """A weight for every sample of every tile along one axis, linear over an overlap; at each sample their sum is 1."""
    end = spans[-1][1]
    rising = (torch.arange(overlap) + 0.5) / max(overlap, 1)
    fades: dict[Span, Tensor] = {}
    total = torch.zeros(end * stride)
    for a, b in spans:
        weights = torch.ones((b - a) * stride)
        if a > 0:
            weights[:overlap] *= rising
        if b < end:
            weights[len(weights) - overlap :] *= rising.flip(0)
        fades[a, b] = weights
        total[a * stride : b * stride] += weights
    return {(a, b): weights / total[a * stride : b * stride] for (a, b), weights in fades.items()}
