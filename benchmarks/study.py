"""Tables and charts of studies that belong together, as docs/results/study.md shows them.

    python benchmarks/study.py runs/study/cifar10 runs/study/cifar10-vq --out study-cifar10.png > study-cifar10.md

Each argument is the folder of a `latticode study`; what they differ in besides quantizers, sizes and seeds is refused,
but where FOLDER@WORD adds a word to the names of its quantizers that says it: `runs/study/cifar10-digits@digits`.
Prints a table for each metric, quantizers against sizes as mean ± standard deviation over seeds, and PSNR less that of
`--rival` at the same cost, interpolated between its sizes. Draws the charts of the study's report.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import typer
from PIL import Image
from systems import line

from latticode.engine.config import differences
from latticode.figures import STYLE, Picture
from latticode.pictures import save_png
from latticode.study.page import charts
from latticode.study.plan import read_plan
from latticode.study.table import Row, Spread, finished, job_folder, over_seeds, protocols, read_rows

METRICS = {  # title, factor, decimals
    "psnr": ("PSNR, dB", 1.0, 2),
    "usage": ("Codes used, %", 100.0, 1),
    "entropy_bits": ("Entropy of the codes, bits", 1.0, 2),
    "compression_cost": ("Compression cost, bits per token", 1.0, 2),
    "rfid_classifier": ("FID of reconstructions", 1.0, 2),
    "fid_classifier": ("FID of samples", 1.0, 2),
    "precision_classifier": ("Precision of samples, %", 100.0, 1),
    "recall_classifier": ("Recall of samples, %", 100.0, 1),
    "seconds": ("Training, seconds", 1.0, 0),
}
ACROSS = 2  # charts in a row


def main(
    folders: Annotated[list[str], typer.Argument(metavar="STUDY...", help="Folders of studies, or FOLDER@WORD.")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Where the charts go.")],
    rival: Annotated[str, typer.Option(metavar="QUANTIZER", help="The one to compare with at equal cost.")] = "vq-ema",
    names: Annotated[str, typer.Option(metavar="QUANTIZER,...", help="These alone, as the tables name them.")] = "",
    only: Annotated[str, typer.Option(metavar="KEY,...", help=f"Of {', '.join(METRICS)}.")] = ",".join(METRICS),
) -> None:
    """Print the tables of some studies and draw their charts."""
    keys = only.split(",")
    unwanted = METRICS.keys() - {"psnr", *keys}
    rows = [{key: value for key, value in row.items() if key not in unwanted} for row in together(folders)]
    rows = [row for row in rows if "error" not in row and (not names or row["quantizer"] in names.split(","))]
    for key in keys:
        if table := list(against_size(over_seeds(rows, key), *METRICS[key])):
            print(*table, sep="\n", end="\n\n")
    for cost in ("entropy_bits", "compression_cost"):
        if table := list(at_equal_cost(rows, cost, rival)):
            print(*table, sep="\n", end="\n\n")
    by_size, by_cost = charts(rows)
    save_png(out, Image.fromarray(tiled([rastered(chart) for chart in (*by_size, *by_cost)])))


def together(folders: Sequence[str]) -> Iterator[Row]:
    """The rows of all studies. Raises ValueError for a folder that holds none, and if protocols of one word differ."""
    references: dict[str, tuple[str, dict[str, Any]]] = {}
    for folder, _, word in (text.partition("@") for text in folders):
        plan = read_plan(Path(folder))
        if plan is None:
            raise ValueError(f"{folder} holds no study")
        job = next(job for job in plan.jobs if finished(Path(folder), plan, job))
        own = protocols(job_folder(Path(folder), job))
        first, reference = references.setdefault(word, (folder, own))
        if changes := differences(reference, own):
            raise ValueError(f"{folder} was made under another protocol than {first}: {changes}")
        for row in read_rows(Path(folder), plan):
            yield {**row, "quantizer": f"{row['quantizer']} {word}".strip()}


def against_size(found: dict[str, dict[int, Spread]], title: str, factor: float, decimals: int) -> Iterator[str]:
    sizes = sorted({size for spreads in found.values() for size in spreads})
    if sizes:
        yield line(title, *(f"{size:,}" for size in sizes))
        yield line(*["---"] * (1 + len(sizes)))
    for name, spreads in found.items():
        yield line(name, *(shown(spreads.get(size), factor, decimals) for size in sizes))


def shown(value: Spread | None, factor: float, decimals: int) -> str:
    if value is None:
        return ""
    mean = f"{factor * value.mean:.{decimals}f}"
    return mean if value.deviation is None else f"{mean} ± {factor * value.deviation:.{decimals}f}"


def at_equal_cost(rows: Sequence[Row], cost: str, rival: str) -> Iterator[str]:
    """PSNR less that of the rival where it spends as much, where the rival spends as little and as much at all."""
    bits, psnr = over_seeds(rows, cost), over_seeds(rows, "psnr")
    if len(bits.get(rival, {})) < 2:
        return
    x, y = zip(*sorted((bits[rival][size].mean, psnr[rival][size].mean) for size in bits[rival]), strict=True)
    sizes = sorted({size for spreads in bits.values() for size in spreads})
    yield line(f"dB ahead of {rival} at its {METRICS[cost][0].lower()}", *(f"{size:,}" for size in sizes))
    yield line(*["---"] * (1 + len(sizes)))
    for name in bits:
        if name != rival:
            ahead = {
                size: psnr[name][size].mean - float(np.interp(spent.mean, x, y))
                for size, spent in bits[name].items()
                if x[0] <= spent.mean <= x[-1]
            }
            yield line(name, *(f"{ahead[size]:+.2f}" if size in ahead else "" for size in sizes))


def rastered(chart: Picture) -> np.ndarray:
    """(H, W, 3) uint8."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        chart.image.savefig(buffer, format="png", dpi=110)  # type: ignore[union-attr]
    return np.asarray(Image.open(buffer).convert("RGB"))


def tiled(pictures: Sequence[np.ndarray]) -> np.ndarray:
    white = np.full_like(pictures[0], 255)
    filled = [*pictures, *[white] * (-len(pictures) % ACROSS)]
    return np.concatenate([np.concatenate(filled[i : i + ACROSS], 1) for i in range(0, len(filled), ACROSS)])


if __name__ == "__main__":
    typer.run(main)
