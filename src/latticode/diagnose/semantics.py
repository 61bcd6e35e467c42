"""What single codes mean: the semantic probes of the FSQ paper (arXiv 2309.15505, App. A.3) and one of its channels.

Each decodes codes that no image has; all take and give codes (B, *grid, K) of one grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from latticode.core.modules import device_of, evaluating
from latticode.core.values import to_uint8
from latticode.data import IMAGE, Loader
from latticode.data.passes import Report, batches_of
from latticode.data.writing import save_png
from latticode.quantizers import FSQ
from latticode.tokenizers.tokenizer import Tokenizer
from latticode.viz.pictures import captioned, grid_image

COLUMNS = 8
LEAST = 64  # pixels of a side that is looked at
POOL = 256  # images whose positions make the marginal


def drawn(codes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` maps whose positions are drawn independently from all positions of `codes`: their marginal, with the K
    codes of a position kept together."""
    pool, shape = codes.flatten(0, -2), codes.shape[1:-1]
    places = torch.randint(len(pool), (count, *shape), generator=generator)
    return pool[places.to(pool.device)]


def uniform(codes: Tensor, count: int) -> Tensor:
    """At most `count` positions of `codes` (all their K codes), each everywhere in a map of its own.

    They are taken at even steps of the cumulative frequency, the most frequent first: those at the top alone are often
    shades of one background.
    """
    values, numbers = codes.flatten(0, -2).unique(dim=0, return_counts=True)
    order = numbers.argsort(descending=True, stable=True)
    share = numbers[order].cumsum(0).double() / numbers.sum()
    steps = (torch.arange(count, device=share.device).double() + 0.5) / count
    most = values[order[torch.searchsorted(share, steps).unique()]]
    return most.view(len(most), *[1] * (codes.ndim - 2), -1).expand(-1, *codes.shape[1:]).clone()


def stitched(codes: Tensor) -> Tensor:
    """The first half of the first spatial axis from each map, the rest from the next one, the last's from the first."""
    half = codes.shape[1] // 2
    return torch.cat([codes[:, :half], codes.roll(-1, 0)[:, half:]], 1)


def shifted(codes: Tensor, quantizer: FSQ, channel: int, offset: int) -> Tensor:
    """Every level of one channel moved by `offset`, held at the ends. Raises ValueError for another channel."""
    if not 0 <= channel < quantizer.dim:
        raise ValueError(f"channel must lie in 0 .. {quantizer.dim - 1}, got {channel}")
    digits = quantizer.digits(codes)
    digits[..., channel] = (digits[..., channel] + offset).clamp(0, quantizer.levels[channel] - 1)
    return quantizer.index(digits)


def probes(tokenizer: Tokenizer, images: Tensor, pool: Tensor, seed: int = 0) -> list[tuple[str, Tensor]]:
    """(name, images (N, C, H, W)) of every probe on `images` (N, C, H, W), with the marginal of `pool`, codes of more.

    Of an FSQ also each channel of the first image, from its lowest offset to its highest.
    """
    codes, count, size = tokenizer.encode(images), len(images), images.shape[2:]
    generator = torch.Generator().manual_seed(seed)
    rows = [
        ("reconstructions", codes),
        ("drawn from the marginal", drawn(pool, count, generator)),
        ("one code everywhere", uniform(pool, count)),
        ("upper half of one, lower half of the next", stitched(codes)),
    ]
    if isinstance(one := tokenizer.quantizer, FSQ) and tokenizer.vocab == one.vocab:
        for channel in range(min(one.dim, COLUMNS)):
            offsets = range(-(count // 2), count - count // 2)
            moved = [shifted(codes[:1], one, channel, offset) for offset in offsets]
            rows.append((f"channel {channel} of the first by {offsets[0]} .. {offsets[-1]}", torch.cat(moved)))
    return [("images", images), *((name, tokenizer.decode(some, size)) for name, some in rows)]


def picture(rows: Sequence[tuple[str, Tensor]]) -> Image.Image:
    """The rows of `probes` below each other under their names, small images enlarged."""
    factor = -(-LEAST // max(rows[0][1].shape[2:]))
    shown = [(name, to_uint8(images).cpu()) for name, images in rows]
    large = [(name, images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)) for name, images in shown]
    return captioned([(name, grid_image(images, columns=len(images))) for name, images in large])


def write_probes(tokenizer: Tokenizer, loader: Loader, path: Path, limit: int = POOL) -> list[str]:
    """Write the probes of the first images of `loader` as the PNG `path` and return the names of its rows.

    The marginal is that of the first `limit` images. Raises ValueError for what is not images of one size.
    """
    if loader.preprocess.medium is not IMAGE or not loader.preprocess.shape:
        raise ValueError(f"the probes need images of one size, got {loader.preprocess.medium.noun}s")
    with evaluating(tokenizer):
        inputs = [batch.inputs.to(device_of(tokenizer)) for batch in batches_of(loader, limit, Report(None, 0))]
        pool = torch.cat([tokenizer.encode(images) for images in inputs])
        rows = probes(tokenizer, torch.cat(inputs)[:COLUMNS], pool)
    save_png(path, picture(rows))
    return [name for name, _ in rows]
