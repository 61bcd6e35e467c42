"""One self-contained HTML page from what a run folder holds: pictures first, then numbers, curves and the config.

A page is a list of `Section`s; `write_page` renders any list, `write_report` makes the sections of one run. Class, file
and metric names come from users: the template escapes all text, and the page's own policy forbids scripts and anything
from elsewhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from latticode.core.files import read_json, write_text
from latticode.core.mappings import flat
from latticode.core.renamed import FACTS, METRICS, renamed
from latticode.viz import figures
from latticode.viz.figures import Picture, embed, readable, thumbnail

EARLIER = 5  # pictures in the strip of earlier ones
MOST_CHANNELS = 32  # level histograms drawn

# Metrics of evaluation.json: what a reader calls them and how they are written. Others appear under their own keys.
LABELS = {
    "psnr": "PSNR, dB",
    "psnr_pooled": "PSNR of the pooled error, dB",
    "ssim": "SSIM",
    "usage": "Codes used, %",
    "perplexity": "Perplexity of the codes",
    "entropy_bits": "Entropy of the codes, bits",
    "bits_per_token": "Bits per token",
    "compression_cost_uniform": "log2 of the codebook (bits per token)",
    "rmse": "RMSE, m",
    "abs_rel": "Relative error",
    "log10": "Error of log10",
    "pq": "PQ",
    "sq": "SQ",
    "rq": "RQ",
    "pq_things": "PQ of things",
    "pq_stuff": "PQ of stuff",
    "colourfulness_real": "Colourfulness of the originals",
    "code_accuracy": "Codes predicted right, %",
    "si_sdr": "SI-SDR, dB",
    "mel_distance": "Log-mel distance",
    "stft_distance": "Multi-resolution STFT distance",
    "temporal_error": "Error of the changes from frame to frame, 8-bit steps",
    "temporal_change": "Change from frame to frame of the originals, 8-bit steps",
    "tokens_per_second": "Tokens per second",
    "bits_per_second": "Bits per second",
    "bits_per_pixel": "Bits per pixel",
    "compression_cost": "Compression cost (negative log-likelihood), bits per token",
    "tokens_per_image": "Tokens per image",
    "label_accuracy": "Label accuracy: samples recognized as their class, %",
    "label_accuracy_shuffled": "The same if labels were shuffled, %",
    "label_accuracy_real": "Real images recognized as their label, %",
    "samples_per_second": "Samples per second",
    "seconds": "Time",
    "discriminator_from": "Discriminator moves the tokenizer from step",
    "count": "Examples",
}
PERCENTAGES = {"usage", "code_accuracy", "label_accuracy", "label_accuracy_shuffled", "label_accuracy_real"}
SCHEMAS: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {  # what the page needs of a file
    "diagnosis.json": {"findings": list, "notes": list},
    "probe.json": {"layer": int, "accuracy": float, "chance": float, "test": int, "layers": list},
}
FEATURE_LABELS = {"rfid": "rFID", "fid": "FID", "precision": "Precision", "recall": "Recall"}  # of <name>_<network>


@dataclass(frozen=True)
class Table:
    """Rows of cells under column names. Numbers are set right, everything else left; `columns` may be empty.

    Examples:
        >>> table = Table([("fsq", 27.5), ("vq", 27.0)], columns=("quantizer", "PSNR, dB"))
        >>> [row[0] for row in table.rows]
        ['fsq', 'vq']
    """

    rows: Sequence[Sequence[Any]]
    columns: Sequence[str] = ()
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A titled part of a page: text (paragraphs end at blank lines), pictures, tables, and a folded verbatim text.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> section = Section("Numbers", "Of 100 images.", tables=[Table([("PSNR, dB", 27.5)])])
        >>> with TemporaryDirectory() as folder:
        ...     write_page(Path(folder) / "page.html", "My study", [section])
        ...     print("Of 100 images." in (Path(folder) / "page.html").read_text())
        True
    """

    title: str
    text: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    folded: str = ""
    id: str = ""  # of the HTML element; from the title if empty


def write_report(run_folder: Path) -> Path:
    """Write `run_folder`/report.html and return its path. What the folder lacks is left out of the page.

    Read are run.json, images/*.png, evaluation.json, diagnosis.json, probe.json, metrics.jsonl and config.yaml. Raises
    FileNotFoundError if there is no such folder and ValueError, with the file's name, for JSON that is not an object.
    """
    if not run_folder.is_dir():
        raise FileNotFoundError(f"no run folder {run_folder}")
    run = renamed(_read_object(run_folder / "run.json"), FACTS)
    title = str(run.pop("title", None) or run_folder.resolve().name)
    path = run_folder / "report.html"
    write_page(path, title, run_sections(run_folder), facts=run)
    return path


def run_sections(run_folder: Path) -> list[Section]:
    """The sections of one run, in reading order."""
    evaluation = _read_object(run_folder / "evaluation.json")
    sections = list(_image_sections(run_folder / "images"))
    if evaluation:
        sections += list(_evaluation_sections(evaluation))
    if diagnosis := _read_object(run_folder / "diagnosis.json"):
        sections.append(_diagnosis_section(diagnosis, run_folder))
    if probe := _read_object(run_folder / "probe.json"):
        sections.append(_probe_section(probe))
    if lines := read_metrics(run_folder / "metrics.jsonl"):
        facts = renamed(_read_object(run_folder / "run.json"), FACTS)
        sections += _discriminator_sections(lines, facts.get("discriminator_from"))
        sections.append(_curves_section(lines))
    if (config := run_folder / "config.yaml").is_file():
        sections.append(Section("Configuration", folded=config.read_text(encoding="utf-8"), id="configuration"))
    return sections


def write_page(path: Path, title: str, sections: Sequence[Section], facts: Mapping[str, Any] | None = None) -> None:
    """Render `sections` as one HTML file without references to anything outside it; `facts` stand under the title."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"cell": cell, "embed": embed, "paragraphs": _paragraphs}
    environment.tests["numeric"] = _is_number
    source = resources.files("latticode.viz").joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        title=title,
        facts={_label(key): _fact(key, value) for key, value in (facts or {}).items() if value not in (None, "")},
        sections=list(zip(_ids(sections), sections, strict=True)),
    )
    write_text(path, page)


# --- sections of a run ---------------------------------------------------------------------------------------------


def _image_sections(folder: Path) -> Iterator[Section]:
    """One section per kind of picture: the latest large, earlier ones as a strip."""
    kinds: dict[str, list[tuple[int, Path]]] = {"reconstructions": [], "samples": []}  # these two come first
    broken: list[str] = []
    for path in sorted(folder.glob("*.png")):
        kind, _, step = path.stem.rpartition("-")
        if not kind or not step.isdecimal():
            kind, step = path.stem, "0"
        if readable(path):
            kinds.setdefault(kind, []).append((int(step), path))
        else:
            broken.append(path.name)
    for kind, entries in kinds.items():
        if not entries:
            continue
        *earlier, (step, latest) = sorted(entries)
        pictures = [Picture(latest, f"step {step:,}" if step else "")]
        pictures += [Picture(thumbnail(path), f"step {step:,}", "small") for step, path in _spread(earlier, EARLIER)]
        text = "Originals above their reconstructions." if kind == "reconstructions" else ""
        yield Section(_label(kind), text, pictures)
    if broken:
        yield Section("Unreadable pictures", "\n".join(broken))


def _evaluation_sections(evaluation: dict[str, Any]) -> Iterator[Section]:
    """Numbers with their protocol, level histograms, code usage. No key is dropped."""
    evaluation = dict(evaluation)
    protocol = evaluation.pop("protocol", None) or {}
    protocol = dict(protocol) if isinstance(protocol, Mapping) else {"protocol": protocol}
    scores, classes = evaluation.pop("scores", None), evaluation.pop("classes", None)
    if scores:
        yield _dense_section(scores, classes or {}, protocol)
    histograms = _take_counts(evaluation, "level_histograms", nested=True)
    counts = _take_counts(evaluation, "code_counts", nested=False)
    values = dict(flat(evaluation, " "))
    rows = [(_label(key), _value(key, value), protocol.pop(key, "")) for key, value in values.items()]
    columns = ("", "value", "protocol")
    if not any(how for _, _, how in rows):
        rows, columns = [row[:2] for row in rows], columns[:2]
    tables = [Table(rows, columns)]
    if protocol:
        tables.append(Table([(_label(k), v) for k, v in flat(protocol, " ")], caption="Protocol of all numbers"))
    yield Section("Numbers", tables=tables)
    if histograms:
        shown = histograms[:MOST_CHANNELS]
        text = "How often each level of each channel was used. Dashed: all levels equally often."
        if len(shown) < len(histograms):
            text += f" The first {len(shown)} of {len(histograms)} channels."
        bars = [figures.level_bars(c, f"channel {i + 1}: {len(c)} levels") for i, c in enumerate(shown)]
        yield Section("Levels", text, [Picture(bar, width="small") for bar in bars])
    if counts:
        used = sum(count > 0 for count in counts)
        text = f"{used:,} of {len(counts):,} codes were used. Dashed: all codes equally often."
        yield Section("Code usage", text, [Picture(figures.usage_curve(counts))] if used else [])


def _dense_section(scores: Mapping[str, Any], classes: Mapping[str, Any], protocol: Mapping[str, Any]) -> Section:
    """Metrics of a dense task by how the code of its predictions came about, and the same for each class."""
    ways = list(dict.fromkeys(way for values in scores.values() for way in values))
    rows = [(_label(name), *(values.get(way, "") for way in ways)) for name, values in scores.items()]
    tables = [Table(rows, ("", *ways))]
    for way, found in classes.items():
        names = list(dict.fromkeys(key for row in found.values() for key in row))
        cells = [(name, *(row.get(key, "") for key in names)) for name, row in found.items()]
        if cells:
            tables.append(Table(cells, ("class", *map(_label, names)), f"Classes, {way}"))
    text = "\n\n".join(f"{way.capitalize()}: {protocol[way]}." for way in ways if way in protocol)
    return Section("Predictions", text, tables=tables)


def _diagnosis_section(diagnosis: Mapping[str, Any], folder: Path) -> Section:
    """What is wrong with the codes and what to change, how they are used, and what they mean."""
    found = [(f["kind"], f["part"], f["text"], " or ".join(f["change"])) for f in diagnosis["findings"]]
    text = "\n\n".join(["" if found else "Nothing is wrong with the codes.", *diagnosis["notes"]]).strip()
    tables = [Table(found, ("finding", "where", "what", "try"))] if found else []
    if protocol := diagnosis.get("protocol"):
        tables.append(Table([(_label(k), v) for k, v in flat(protocol, " ")], caption="Protocol"))
    curves, images = folder / "diagnosis.svg", folder / "semantics.png"
    pictures = [Picture(curves, "How often levels or codes are used")] if curves.is_file() else []
    pictures += [Picture(images, "What codes mean")] if readable(images) else []
    return Section("Diagnosis", text, pictures, tables)


def _probe_section(probe: Mapping[str, Any]) -> Section:
    """How much of the label a linear classifier finds in each layer of a prior."""
    text = (
        f"A linear classifier on layer {probe['layer']} tells the label of {100 * probe['accuracy']:.1f} % of "
        f"{probe['test']:,} test images; always the most frequent label would be right about "
        f"{100 * probe['chance']:.1f} % (dashed). The layer was chosen on held-out training images."
    )
    rows = [(layer["layer"], 100 * layer["accuracy"], 100 * layer["held_out"]) for layer in probe["layers"]]
    tables = [Table(rows, ("layer", "test accuracy, %", "held-out accuracy, %"))]
    if protocol := probe.get("protocol"):
        tables.append(Table([(_label(k), v) for k, v in flat(protocol, " ")], caption="Protocol"))
    return Section("Linear probe", text, [Picture(figures.probe_curve(probe))], tables)


def _curves_section(lines: Mapping[str, figures.Series]) -> Section:
    """One panel per quantity; train/x and val/x share the panel of x. Rates and speeds come last."""
    panels: dict[str, dict[str, figures.Series]] = {}
    for name, series in lines.items():
        group, _, quantity = name.partition("/")
        panels.setdefault(quantity or group, {})[group if quantity else name] = series
    names = sorted(panels, key=_is_schedule)  # stable: else as logged
    pictures = []
    for name in names:
        lone = next(iter(panels[name])) if len(panels[name]) == 1 and name not in lines else ""
        title = f"{lone} {name}".strip().replace("_", " ")
        pictures.append(Picture(figures.curves(title, panels[name], log=not _is_schedule(name)), width="half"))
    return Section("Training", pictures=pictures)


def _discriminator_sections(lines: Mapping[str, figures.Series], discriminator_from: Any) -> Iterator[Section]:
    """What became of the reconstructions once a discriminator moved the tokenizer, in a sentence with the numbers."""
    looks = list(zip(*lines.get("val/psnr", ((), ())), strict=True))
    if not _is_number(discriminator_from) or not looks or looks[-1][0] <= discriminator_from:
        return
    last, after = looks[-1]
    earlier = [(step, value) for step, value in looks if step <= discriminator_from]
    if not earlier:
        text = (
            f"PSNR of the watched held-out images was {after:.2f} dB at step {last:,.0f}. It is not known from before "
            f"step {discriminator_from:,}, from which on the discriminator moved the tokenizer, so its effect is not "
            "known either."
        )
    else:
        step, before = earlier[-1]
        verdict = "worse" if after < before else "better"
        text = (
            f"By PSNR, reconstructions are {abs(after - before):.2f} dB {verdict} than before the discriminator moved "
            f"the tokenizer (from step {discriminator_from:,} on): {before:.2f} dB at step {step:,.0f}, {after:.2f} dB "
            f"at step {last:,.0f}, on the watched held-out images."
        )
    yield Section("Since the discriminator joined", text)


def _is_schedule(name: str) -> bool:
    """What the run sets or how fast it is, rather than how well it does."""
    return name == "lr" or "learning_rate" in name or "per_second" in name


def read_metrics(path: Path) -> dict[str, figures.Series]:
    """name -> (steps, values) from JSON lines {"step": int, name: number, ...}, in the order of first appearance.

    The last line of a step counts (a resumed run logs some steps again). Lines that are torn, and values that are no
    finite numbers, are passed over. Without the file the result is empty.
    """
    seen: dict[str, dict[float, float]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if not isinstance(record, dict) or not _is_number(record.get("step")):
                continue
            for name, value in renamed(record, METRICS).items():
                if name != "step" and _is_number(value) and math.isfinite(value):
                    seen.setdefault(name, {})[record["step"]] = float(value)
    return {name: (sorted(points), [points[step] for step in sorted(points)]) for name, points in seen.items()}


# --- cells and labels ----------------------------------------------------------------------------------------------


def cell(value: Any) -> str:
    """A value as text: 1,234 and 27.35 and 0.0001234; lists up to 16 entries; mappings as key: value."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {cell(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        cells = (f"({cell(inner)})" if isinstance(inner, list | tuple) else cell(inner) for inner in value)
        return ", ".join(cells) if len(value) <= 16 else f"{len(value):,} values"
    return "none" if value is None else str(value)


def _value(key: str, value: Any) -> Any:
    return 100 * float(value) if key in PERCENTAGES and _is_number(value) else value


def _label(key: str) -> str:
    """What a reader calls a key: by `LABELS`; fid_classifier_real -> FID (classifier), real images; else as words."""
    name, _, network = key.partition("_")
    if key in LABELS or name not in FEATURE_LABELS or not network:
        text = LABELS.get(key, key.replace("_", " "))
        return text[:1].upper() + text[1:]
    bare = network.removesuffix("_real")
    return f"{FEATURE_LABELS[name]} ({bare})" + (", real images" if bare != network else "")


def _fact(key: str, value: Any) -> str:
    if key == "seconds" and _is_number(value) and math.isfinite(value):
        minutes, seconds = divmod(round(value), 60)
        hours, minutes = divmod(minutes, 60)
        return (
            f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
        )
    return cell(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _take_counts(evaluation: dict[str, Any], key: str, *, nested: bool) -> list[Any]:
    """Remove and return a list of counts (of lists of counts); anything else stays, to be shown as it is."""
    value = evaluation.get(key)
    lists = value if nested else [value]
    if not isinstance(lists, list) or not lists:
        return []
    if not all(isinstance(row, list) and row and all(_is_number(n) and n >= 0 for n in row) for row in lists):
        return []
    return evaluation.pop(key)


def _read_object(path: Path) -> dict[str, Any]:
    return read_json(path, SCHEMAS.get(path.name, {})) if path.is_file() else {}


# --- lists ---------------------------------------------------------------------------------------------


def _spread(entries: Sequence[Any], count: int) -> list[Any]:
    """At most `count` entries, evenly spaced, the first and the last among them."""
    if len(entries) <= count:
        return list(entries)
    return [entries[round(i * (len(entries) - 1) / (count - 1))] for i in range(count)]


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _ids(sections: Sequence[Section]) -> list[str]:
    """An id for each section, unique on the page."""
    taken: list[str] = []
    for section in sections:
        base = re.sub(r"[^a-z0-9]+", "-", (section.id or section.title).lower()).strip("-") or "section"
        number = 1
        while (name := base if number == 1 else f"{base}-{number}") in taken:
            number += 1
        taken.append(name)
    return taken
