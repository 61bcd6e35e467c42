"""Tables and charts of studies that belong together, as docs/results/study.md shows them.

    python benchmarks/study.py runs/study/cifar10 runs/study/cifar10-vq --out study-cifar10.png > study-cifar10.md

Each argument is the folder of a `latticode study`, or the jobs that `--rows FILE.csv` kept of such folders. What they
differ in besides quantizers, sizes and seeds is refused, but where STUDY@WORD adds a word to the names of its
quantizers that says it: `runs/study/cifar10-digits@digits`. Prints a table for each metric, quantizers against sizes as
mean ± standard deviation over seeds, and PSNR less that of `--rival` at the same cost, interpolated between its sizes.
Draws the charts of the study's report.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import numpy as np
import typer
from PIL import Image
from systems import line

from latticode.core.mappings import differences
from latticode.data.writing import save_png
from latticode.study.page import charts
from latticode.study.plan import read_plan
from latticode.study.table import Row, Spread, finished, job_folder, over_seeds, protocols, read_rows, write_csv
from latticode.viz.figures import STYLE, Picture

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
    studies: Annotated[list[str], typer.Argument(metavar="STUDY...", help="Folders, or rows kept, or STUDY@WORD.")],
    out: Annotated[Path, typer.Option(metavar="FILE.png", help="Where the charts go.")],
    rival: Annotated[str, typer.Option(metavar="QUANTIZER", help="The one to compare with at equal cost.")] = "vq-ema",
    names: Annotated[str, typer.Option(metavar="QUANTIZER,...", help="These alone, as the tables name them.")] = "",
    rows_to: Annotated[Path | None, typer.Option("--rows", metavar="FILE.csv", help="Keep each job's numbers.")] = None,
    only: Annotated[str, typer.Option(metavar="KEY,...", help=f"Of {', '.join(METRICS)}.")] = ",".join(METRICS),
) -> None:
    """Print the tables of some studies and draw their charts."""
    keys = only.split(",")
    unwanted = METRICS.keys() - {"psnr", *keys}
    rows = [row for row in together(studies) if not names or row["quantizer"] in names.split(",")]
    if rows_to is not None:
        write_csv(rows_to, rows)
    rows = [{key: value for key, value in row.items() if key not in unwanted} for row in rows]
    for key in keys:
        if table := list(against_size(over_seeds(rows, key), *METRICS[key])):
            print(*table, sep="\n", end="\n\n")
    for cost in ("entropy_bits", "compression_cost"):
        if table := list(at_equal_cost(rows, cost, rival)):
            print(*table, sep="\n", end="\n\n")
    by_size, by_cost = charts(rows)
    save_png(out, Image.fromarray(tiled([rastered(chart) for chart in (*by_size, *by_cost)])))


def together(studies: Sequence[str]) -> Iterator[Row]:
    """The rows of all studies, each with the fingerprint of its `protocol`. Raises ValueError for a study that has
    none, and if protocols of one word differ."""
    references: dict[str, tuple[str, Row, dict[str, Any] | None]] = {}
    for study, _, word in (text.partition("@") for text in studies):
        rows, own = kept(Path(study)) if study.endswith(".csv") else made(Path(study))
        for row in rows:
            first, reference, theirs = references.setdefault(word, (study, row, own))
            if row["protocol"] != reference["protocol"]:
                told = f": {differences(theirs, own)}" if own and theirs else ""
                raise ValueError(f"{study} was made under another protocol than {first}{told}")
            yield {**row, "quantizer": f"{row['quantizer']} {word}".strip()}


def made(folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """The rows of the finished jobs of a study, and their protocol."""
    plan = read_plan(folder)
    job = None if plan is None else next((job for job in plan.jobs if finished(folder, plan, job)), None)
    if plan is None or job is None:
        raise ValueError(f"{folder} holds no study, or none with a finished job")
    own = protocols(job_folder(folder, job))
    fingerprint = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:12]
    return [{**row, "protocol": fingerprint} for row in read_rows(folder, plan) if "error" not in row], own


def kept(file: Path) -> tuple[list[Row], None]:
    """The rows that `--rows` wrote; of their protocol there is the fingerprint alone."""
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or "protocol" not in rows[0]:
        raise ValueError(f"{file} holds no rows of jobs that name their protocol, as --rows writes them")
    words = ("quantizer", "protocol")
    return [{k: v if k in words else number(v) for k, v in row.items() if v} for row in rows], None


def number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)


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
