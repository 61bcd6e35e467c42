"""study.html: quality, codebook usage and negative log-likelihood against codebook size, with the spread over seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from latticode.study.plan import Job, Plan
from latticode.study.table import Row, Spread, columns_of, evaluation_of, job_folder, over_seeds, protocols
from latticode.viz import figures
from latticode.viz.figures import Picture, Point, readable
from latticode.viz.report import Section, Table, cell, write_page

PAGE = "study.html"
BITS = "log2 of the codebook's size"
TITLES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "usage": "Codes used, %",
    "entropy_bits": "Entropy of the codes, bits",
    "compression_cost": "Compression cost, bits per token",
    "seconds": "Training, seconds",
    "prior_seconds": "Training of the prior, seconds",
    "peak_memory_mb": "Peak memory, MB",
}
NETWORKS = {"rfid_": "Reconstruction FID", "fid_": "FID of samples"}
FRONTIERS = ("entropy_bits", "compression_cost")  # what a reconstruction really costs


def write_study_page(folder: Path, plan: Plan, rows: Sequence[Row]) -> Path:
    """Write the page of the study in `folder` and return its path."""
    done = [row for row in rows if "error" not in row]
    facts = {
        "data": plan.source,
        "jobs": f"{len(done)} of {len(plan.jobs)}",
        "seeds": plan.seeds,
        "steps": plan.steps,
        "steps of the priors": plan.prior_steps or None,
        "budget": None if plan.budget is None else f"{plan.budget / 60:.0f} min",
    }
    sections = [*_sections(folder, plan, done), *_failures(rows), *_protocol(folder, plan, done)]
    path = folder / PAGE
    write_page(path, "The trade-off study", sections, facts)
    return path


def _sections(folder: Path, plan: Plan, rows: Sequence[Row]) -> Iterator[Section]:
    if not rows:
        return
    networked = _networked(rows)
    spread = "Bars are one standard deviation over seeds." if plan.seeds > 1 else "One seed, so no spread is known."
    text = f"Every job took {plan.steps:,} steps on the same images in the same order. {spread} Dashed: log2 |C|."
    by_size, by_cost = charts(rows)
    yield Section("Against the size of the codebook", text, by_size)
    yield Section(
        "Against what is really spent",
        "PSNR against the entropy that the codes turn out to have"
        + (", and against the bits that a prior needs for them." if plan.prior else "."),
        by_cost,
    )
    yield Section("Numbers", "Mean ± standard deviation over seeds.", tables=[_table(rows, networked)])
    yield from _pictures(folder, plan, rows)
    costs = [_panel(rows, key, "bits", networked) for key in ("seconds", "prior_seconds", "peak_memory_mb")]
    text = "Wall-clock time of training alone, and the most memory of a job: on a CPU, of the whole process."
    yield Section("Time and memory", text, [panel for panel in costs if panel])


def charts(rows: Sequence[Row]) -> tuple[list[Picture], list[Picture]]:
    """What was measured against the size of the codebook, and PSNR against what it really costs."""
    networked = _networked(rows)
    measured = ["psnr", *networked, "usage", "entropy_bits", "compression_cost"]
    by_size = [_panel(rows, key, "bits", networked) for key in measured]
    by_cost = [_panel(rows, "psnr", cost, networked) for cost in FRONTIERS]
    return [panel for panel in by_size if panel], [panel for panel in by_cost if panel]


def _networked(rows: Sequence[Row]) -> dict[str, str]:
    """Titles of the columns that a feature network gave, but for those of real images, which are the same for all."""
    keys = [key for key in columns_of(rows) if not key.endswith("_real")]
    return {key: title for head, title in NETWORKS.items() for key in keys if key.startswith(head)}


def _panel(rows: Sequence[Row], key: str, against: str, networked: dict[str, str]) -> Picture | None:
    """One line for each quantizer, if any job has both numbers."""
    x, y = over_seeds(rows, against), over_seeds(rows, key)
    factor = 100.0 if key == "usage" else 1.0
    series: dict[str, list[Point]] = {}
    for name in y:
        points = [(x[name][size].mean, *_scaled(y[name][size], factor)) for size in y[name] if size in x.get(name, {})]
        if points:
            series[name] = sorted(points)
    if not series:
        return None
    title = networked.get(key) or TITLES[key]
    diagonal = against == "bits" and key in FRONTIERS
    label = BITS if against == "bits" else TITLES[against]
    most = 100.0 if key == "usage" else math.inf
    return Picture(figures.trade_off(title, label, series, diagonal=diagonal, most=most), width="half")


def _scaled(value: Spread, factor: float) -> tuple[float, float]:
    return factor * value.mean, factor * (value.deviation or 0.0)


def _table(rows: Sequence[Row], networked: dict[str, str]) -> Table:
    keys = [key for key in (*TITLES, *networked) if any(key in row for row in rows)]
    found = {key: over_seeds(rows, key) for key in (*keys, "codes", "bits")}
    names = {**TITLES, **networked}
    lines = []
    for name, sizes in found["codes"].items():
        for size in sorted(sizes):
            cells = [_cell(found[key].get(name, {}).get(size), 100.0 if key == "usage" else 1.0) for key in keys]
            lines.append((name, round(sizes[size].mean), found["bits"][name][size].mean, *cells))
    return Table(lines, ("quantizer", "codes", "bits", *(names[key] for key in keys)))


def _cell(value: Spread | None, factor: float) -> str:
    if value is None:
        return ""
    mean, deviation = _scaled(value, factor)
    return cell(mean) if value.deviation is None else f"{cell(mean)}\u00a0±\u00a0{deviation:.2g}"


def _pictures(folder: Path, plan: Plan, rows: Sequence[Row]) -> Iterator[Section]:
    """What the tokenizers of the largest size make of the same images, and how the FSQ's levels are used."""
    have = {(row["quantizer"], row["size"], row["seed"]) for row in rows}
    largest = [Job(name, plan.sizes[-1], 0) for name in plan.quantizers]
    there = [job for job in largest if tuple(job) in have]
    rows_of = [(job, sorted((job_folder(folder, job) / "images").glob("reconstructions-*.png"))) for job in there]
    shown = [Picture(paths[-1], job.quantizer, "half") for job, paths in rows_of if paths and readable(paths[-1])]
    if shown:
        text = f"Held-out images above their reconstructions, largest size ({plan.sizes[-1]:,}), first seed."
        yield Section("Reconstructions", text, shown)
    for job in there:
        if histograms := evaluation_of(job_folder(folder, job)).get("level_histograms"):
            bars = [figures.level_bars(counts, f"channel {i}") for i, counts in enumerate(histograms, 1)]
            text = f"How often {job.quantizer} at the largest size uses each level. Dashed: all equally often."
            yield Section("Levels", text, [Picture(bar, width="small") for bar in bars])


def _failures(rows: Sequence[Row]) -> Iterator[Section]:
    failed = [(row["quantizer"], row["size"], row["seed"], row["error"]) for row in rows if "error" in row]
    if failed:
        text = "The next run of the same command tries these again."
        yield Section("Failed jobs", text, tables=[Table(failed, ("quantizer", "size", "seed", "error"))])


def _protocol(folder: Path, plan: Plan, rows: Sequence[Row]) -> Iterator[Section]:
    """What all jobs have in common; rows of other protocols were refused before."""
    asked = {key: value for key, value in asdict(plan).items() if key != "costs" and value not in (None, ())}
    tables = [Table([(key.replace("_", " "), value) for key, value in asked.items()], caption="Plan")]
    if rows:
        job = Job(rows[0]["quantizer"], rows[0]["size"], rows[0]["seed"])
        for kind, protocol in protocols(job_folder(folder, job)).items():
            for part, values in protocol.items():
                tables.append(Table(list(values.items()), caption=f"{kind}, as {part}".capitalize()))
    yield Section("Protocol", "The same for all jobs.", tables=tables)
