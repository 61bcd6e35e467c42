"""Photographs at their own size: rates and errors of tokenizers, and what tiles cost and change.

    python benchmarks/photographs.py table runs/a runs/b --photos kodak --photos bsds500 --out runs/photographs

Writes OUT/photographs.json and prints its tables: PSNR, SSIM and bits per pixel of each tokenizer on each set; for a
picture of 24 megapixels, made of a photograph and its mirror images, the seconds and the highest resident memory above
that of model and picture (in a process of its own, since a peak never goes down); and how far tiles lie from none on a
photograph that is small enough for both. OUT/photographs.png shows crops over a border of tiles: the original, then for
each tokenizer the picture from tiles and their distance from the picture without, eight times enlarged around grey.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor

from latticode.core.files import write_text
from latticode.core.progress import watched
from latticode.core.values import to_uint8
from latticode.data.writing import save_png
from latticode.evaluate import evaluate_tokenizer
from latticode.runs import open as runs
from latticode.tokenizers import tiling
from latticode.viz.pictures import grid_image

LARGE, CROP = (4000, 6000), 192  # samples
AMPLIFIED = 8.0
COLUMNS = ("psnr", "ssim", "bits_per_pixel", "usage", "count")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Run = Annotated[Path, typer.Argument(metavar="RUN")]
Tile = Annotated[int, typer.Option(help="Samples a side of the tiles of what fits no tile.")]


def open_run(run: Path) -> runs.Run:
    return runs.Run.open(run, "cpu")


def scores(run: Path, source: Path, console: Console) -> dict[str, Any]:
    """Of a whole source at its own sizes, in tiles only where a side is longer than the default tile."""
    opened = open_run(run)
    loader = opened.whole(str(source), "all", own_size=True)
    with watched(console, f"{run.name} on {source.name}") as watch:
        result = evaluate_tokenizer(opened.tokenizer, loader, progress=watch)
    return {name: result[name] for name in COLUMNS} | {"sizes": result["protocol"]["sizes"]}


def photograph(run: Path, source: Path) -> Tensor:
    """The first photograph (1, C, H, W) in [-1, 1]."""
    return next(iter(open_run(run).whole(str(source), "all", own_size=True).epoch())).inputs


def mirrored(image: Tensor, size: tuple[int, int]) -> Tensor:
    """`image` (1, C, H, W) continued by its mirror images to `size`."""
    rows, columns = (
        torch.from_numpy(np.pad(np.arange(n), (0, wanted - n), mode="symmetric"))
        for n, wanted in zip(image.shape[2:], size, strict=True)
    )
    return image[:, :, rows][:, :, :, columns]


def peak() -> float:
    """The highest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def difference(run: Path, image: Tensor, tile: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Of `image` with and without tiles; crops (C, CROP, CROP) uint8 around a border of tiles, the first one in tiles
    and the second the amplified difference."""
    tokenizer = open_run(run).tokenizer
    size = image.shape[2:]
    with torch.inference_mode():
        codes, tiled = tokenizer.encode(image), tiling.encode(tokenizer, image, tile)
        whole = tokenizer.decode(codes, size)
        same_codes = tiling.decode(tokenizer, codes, size, tile)
        shown = tiling.decode(tokenizer, tiled, size, tile)
    facts = {
        "tile": tile,
        "reach": [tokenizer.encoder.reach, tokenizer.decoder.reach],
        "codes_that_differ": float((codes != tiled).any(-1).float().mean()),
        "decoder_max": float((same_codes - whole).abs().max()) * 127.5,
        "max": float((shown - whole).abs().max()) * 127.5,
        "mean": float((shown - whole).abs().mean()) * 127.5,
        "psnr": [float(10 * (4 / (output.clamp(-1, 1) - image).square().mean()).log10()) for output in (whole, shown)],
    }
    return facts, [crop(shown, tile), crop((shown - whole) * AMPLIFIED, tile)]


def crop(image: Tensor, tile: int) -> Tensor:
    """(C, CROP, CROP) uint8 where the first tile along either axis ends, or as near to that as the image goes."""
    top, left = (max(0, min(tile - CROP // 2, n - CROP)) for n in image.shape[2:])
    return to_uint8(image[0, :, top : top + CROP, left : left + CROP])


@app.command()
def large(run: Run, source: Path) -> None:
    """Print what a picture of 24 megapixels takes, as JSON."""
    tokenizer = open_run(run).tokenizer
    image = mirrored(photograph(run, source), LARGE)
    result: dict[str, Any] = {"megapixels": LARGE[0] * LARGE[1] / 1e6, "threads": torch.get_num_threads()}
    with torch.inference_mode():
        tokenizer(image[:, :, :64, :64])  # what a first call allocates for good
        before, began = peak(), time.perf_counter()
        codes = tiling.encode(tokenizer, image)
        result |= {"encode_seconds": time.perf_counter() - began, "encode_mb": peak() - before}
        began = time.perf_counter()
        restored = tiling.decode(tokenizer, codes, LARGE)
        result |= {"decode_seconds": time.perf_counter() - began, "both_mb": peak() - before}
    result |= {"image_mb": restored.numel() * 4 / 1e6}
    print(json.dumps(result))


@app.command(help=__doc__)
def table(
    run: Annotated[list[Path], typer.Argument(metavar="RUN...")],
    photos: Annotated[list[Path], typer.Option(help="Folder or tar of photographs; several are possible.")],
    out: Annotated[Path, typer.Option(help="Folder of what is written.")] = Path("runs/photographs"),
    tile: Tile = 384,
    skip_large: Annotated[bool, typer.Option("--skip-large", help="Leave the 24 megapixels out.")] = False,
) -> None:
    console = Console(stderr=True)
    image = photograph(run[0], photos[0])
    results: dict[str, Any] = {}
    pictures = [crop(image, tile)]
    for each in run:
        facts, crops = difference(each, image, tile)
        results[each.name] = {"tiles": facts, "sets": {p.name: scores(each, p, console) for p in photos}}
        pictures += crops
        if not skip_large:
            command = [sys.executable, __file__, "large", str(each), str(photos[0])]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[each.name]["large"] = json.loads(printed)
        write_text(out / "photographs.json", json.dumps(results, indent=2) + "\n")
    save_png(out / "photographs.png", grid_image(torch.stack(pictures), len(pictures)))
    print("\n\n".join(tables(results)))


def tables(results: dict[str, Any]) -> list[str]:
    scored = [
        (name, source, f"{s['psnr']:.2f}", f"{s['ssim']:.4f}", f"{s['bits_per_pixel']:.4f}", str(s["count"]))
        for name, result in results.items()
        for source, s in result["sets"].items()
    ]
    tiled = [
        (name, f"{t['codes_that_differ']:.2%}", f"{t['decoder_max']:.2g}", f"{t['max']:.2g}", f"{t['mean']:.2g}")
        for name, result in results.items()
        for t in [result["tiles"]]
    ]
    taken = [
        (name, *(f"{m[key]:.0f}" for key in ("encode_seconds", "decode_seconds", "encode_mb", "both_mb", "image_mb")))
        for name, result in results.items()
        if (m := result.get("large"))
    ]
    levels = "greatest difference, 8-bit levels"
    heads = {
        ("tokenizer", "photographs", "PSNR", "SSIM", "bits per pixel", "number"): scored,
        ("tokenizer", "codes that differ", f"{levels}, same codes", levels, "mean difference"): tiled,
        ("tokenizer", "encode s", "decode s", "encode MB", "both MB", "of these the image"): taken,
    }
    return [markdown(head, rows) for head, rows in heads.items() if rows]


def markdown(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    app()
