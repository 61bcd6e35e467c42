"""The picture of README and front page: a photograph, its tokens, what is decoded from them, samples of a prior.

    latticode demo --out runs/demo
    python docs/pictures/overview.py runs/demo/photos

The photograph (NASA's portrait of Eileen Collins, in scikit-image) was held out of the demo's training. A token has the
mean colour of a patch of tokens like it, decoded. The samples are those of docs/results/fashion-mnist.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from latticode import Tokenizer, load
from latticode.core.values import to_uint8
from latticode.data import Loader, Preprocess, open_source

DOCS = Path(__file__).parents[1]
SIDE, CELL = 192, 6  # pixels of the photograph; of a token in the picture


def colours(tokenizer: Tokenizer, codes: torch.Tensor) -> torch.Tensor:
    """(H, W, 3) uint8: for every token of `codes` (H, W) the mean colour of a patch of 3 x 3 tokens like it."""
    kinds, where = codes.unique(return_inverse=True)
    patches = kinds[:, None, None, None].expand(-1, 3, 3, 1)
    means = [to_uint8(tokenizer.decode(part)).float().mean((2, 3)) for part in patches.split(256)]
    return torch.cat(means)[where].round().to(torch.uint8)


def main(run: str) -> None:
    tokenizer = load(run)
    loader = Loader(open_source("embedded:photos", "test"), Preprocess(size=SIDE, channels=3), 1)
    image = next(iter(loader.epoch())).inputs
    with torch.inference_mode():
        codes = tokenizer.encode(image)
        restored = tokenizer.decode(codes, image.shape[-2:])
        tokens = colours(tokenizer, codes[0, ..., 0])
    size = codes.shape[1] * CELL
    pixels = [to_uint8(t)[0].movedim(0, -1).numpy() for t in (image, restored)]
    photo, back = (Image.fromarray(p).resize((size, size), Image.Resampling.LANCZOS) for p in pixels)
    mosaic = Image.fromarray(tokens.numpy()).resize((size, size), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(mosaic)
    for at in range(0, size, CELL):
        draw.line([(at, 0), (at, size)], fill="white")
        draw.line([(0, at), (size, at)], fill="white")
    samples = Image.open(DOCS / "results" / "fashion-mnist-fsq-samples.png").convert("RGB")
    samples = samples.crop((136, 0, 337, 201)).resize((size, size), Image.Resampling.LANCZOS)  # six classes, six rows
    h, w = codes.shape[1:3]
    titles = (f"{SIDE} x {SIDE} pixels", f"{h} x {w} tokens", "decoded from the tokens", "samples of a prior")
    gap, below = 12, 30
    sheet = Image.new("RGB", (4 * size + 3 * gap, size + below), "white")
    font = ImageFont.load_default(17)
    for i, (part, title) in enumerate(zip((photo, mosaic, back, samples), titles, strict=True)):
        sheet.paste(part, (i * (size + gap), 0))
        ImageDraw.Draw(sheet).text((i * (size + gap) + size / 2, size + 6), title, "#333", font, anchor="ma")
    sheet.save(DOCS / "pictures" / "overview.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
