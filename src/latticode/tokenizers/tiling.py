"""Encoding and decoding of large images in overlapping tiles: the networks need the memory of one tile at a time.

Tiles start at multiples of the tokenizer's stride, so codes fall on the same grid as without tiles. Where the networks
have a bounded `reach` (the number of samples around a position that it depends on and changes; see `ConvEncoder`) and
half the overlap covers it, codes and images are those without tiles, to float rounding. Group normalisation and
attention look at the whole tile: with these codes differ a little everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from latticode.core.types import Reconstruction
from latticode.tokenizers.hierarchical import HierarchicalTokenizer
from latticode.tokenizers.tokenizer import Tokenizer

TILE = 1024  # samples a side of a tile of an image, unless said otherwise

Span = tuple[int, int]  # first position and the one after the last


def encode(tokenizer: Tokenizer, images: Tensor, tile: int | None = None, overlap: int | None = None) -> Tensor:
    """The codes (B, *grid, K) of `images` (B, C, *size), by tiles of `tile` samples that share `overlap`, per axis.

    Each neighbour gives the codes of its half of the overlap. Along an axis that is no longer than a tile there is one.
    `tile` None: about TILE for images, and one tile for other data. `overlap` None: what the encoder's reach needs, at
    most half a tile; a quarter if the reach is unknown.

    Raises ValueError for a tile that is no multiple of the stride, an overlap that is none of twice the stride or more
    than half a tile, and several tiles of a tokenizer whose first sample stands alone.
    """
    grid = tokenizer.grid(images.shape[2:])
    reach = _reach(tokenizer, tokenizer.encoder)
    if reach is not None and tokenizer.feedback:
        reach += max(tokenizer.strides)  # a position is told of its neighbours
    spans, shared = _spans(tokenizer, grid, tile, overlap, reach)
    if _single(spans):
        return tokenizer.encode(images)
    codes = torch.empty(len(images), *grid, len(tokenizer.vocab), dtype=torch.int64, device=images.device)
    for place in product(*spans):
        part = tokenizer.encode(images[(..., *_samples(tokenizer, place))])
        inner, outer = [slice(None)], [slice(None)]
        for (a, b), n, s in zip(place, grid, tokenizer.strides, strict=True):
            margin = shared // s // 2
            first, last = (a + margin if a else 0), (b - margin if b < n else n)
            inner.append(slice(first - a, last - a))
            outer.append(slice(first, last))
        codes[tuple(outer)] = part[tuple(inner)]
    return codes


def decode(
    tokenizer: Tokenizer,
    codes: Tensor,
    size: Sequence[int] | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Tensor:
    """The images (B, C, *size) of `codes` (B, *grid, K), as `Tokenizer.decode`, by tiles as in `encode`.

    Where tiles overlap each fades linearly into the next; what its missing surroundings would have changed, or an outer
    quarter of the overlap where that is all of it, does not count.
    """
    grid = codes.shape[1:-1]
    reach = _reach(tokenizer, tokenizer.decoder)
    spans, shared = _spans(tokenizer, grid, tile, overlap, reach)
    if _single(spans):
        return tokenizer.decode(codes, size)
    margin = shared // 4 if reach is None or 2 * reach > shared else reach
    fades = [_fades(of_axis, s, shared, margin) for of_axis, s in zip(spans, tokenizer.strides, strict=True)]
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


def reconstruct(tokenizer: Tokenizer, images: Tensor, tile: int | None = None) -> Reconstruction:
    """`tokenizer(images)` for images that fit one tile; for others `encode`, then `decode`, without losses."""
    spans, _ = _spans(tokenizer, tokenizer.grid(images.shape[2:]), tile, None, None)
    if _single(spans):
        return tokenizer(images)
    codes = encode(tokenizer, images, tile)
    return Reconstruction(decode(tokenizer, codes, images.shape[2:], tile), codes, {})


def _reach(tokenizer: Tokenizer, network: object) -> int | None:
    """Of the whole way between samples and codes; in a hierarchy that is more than the network's."""
    return None if isinstance(tokenizer, HierarchicalTokenizer) else getattr(network, "reach", None)


def _spans(
    tokenizer: Tokenizer, grid: Sequence[int], tile: int | None, overlap: int | None, reach: int | None
) -> tuple[list[list[Span]], int]:
    """Per axis the tiles' positions on a code grid, and the overlap in samples.

    All tiles are of one size, so the last two may share more. But with `feedback` they start at even positions, so that
    each has the turns of the whole, and the last may be longer by one.
    """
    turns = 2 if tokenizer.feedback else 1
    unit = 2 * math.lcm(*tokenizer.strides)
    if tile is None and tokenizer.axes != 2:
        return [[(0, n)] for n in grid], 0
    if tile is None:
        tile = max(TILE // unit, 1) * unit
    if overlap is None:
        wanted = tile // 4 if reach is None else 2 * reach
        overlap = min(-(-wanted // unit), tile // 2 // unit) * unit
    spans: list[list[Span]] = []
    for n, s in zip(grid, tokenizer.strides, strict=True):
        if tile < 1 or tile % (turns * s) or overlap % (2 * s) or not 0 <= overlap <= tile // 2:
            raise ValueError(
                f"tile must be a multiple of {turns * s}, overlap one of {2 * s} and at most half a tile, "
                f"got tile {tile} and overlap {overlap}"
            )
        length = min(tile // s, n)
        last = (n - length) // turns * turns
        spans.append([*((a, a + length) for a in range(0, last, (tile - overlap) // s)), (last, n)])
    if any(tokenizer.leads) and not _single(spans):
        raise ValueError("a tokenizer whose first sample stands alone does not work on tiles")
    return spans, overlap


def _single(spans: list[list[Span]]) -> bool:
    return all(len(of_axis) == 1 for of_axis in spans)


def _samples(tokenizer: Tokenizer, place: Sequence[Span]) -> list[slice]:
    return [slice(a * s, b * s) for (a, b), s in zip(place, tokenizer.strides, strict=True)]


def _fades(spans: Sequence[Span], stride: int, overlap: int, margin: int) -> dict[Span, Tensor]:
    """A weight for every sample of every tile along one axis; at each sample their sum is 1.

    Over an overlap it is 0 for `margin` samples from the tile's edge, then rises linearly, and is 1 for as many.
    """
    end = spans[-1][1]
    rising = ((torch.arange(overlap) + 0.5 - margin) / max(overlap - 2 * margin, 1)).clamp(0, 1)
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
