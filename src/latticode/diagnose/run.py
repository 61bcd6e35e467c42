"""Diagnose a run folder (diagnosis.json and its charts), and recommend FSQ levels by the latents of its tokenizer."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from latticode.core.files import replacing, write_json
from latticode.core.progress import watched
from latticode.data import IMAGE, Loader
from latticode.diagnose.bounds import GAIN, better_bound
from latticode.diagnose.evidence import Evidence, gather, measure
from latticode.diagnose.findings import Finding, findings, notes
from latticode.diagnose.parts import Part
from latticode.diagnose.semantics import POOL, write_probes
from latticode.quantizers.levels import recommend
from latticode.runs.open import Run
from latticode.viz import figures

DIAGNOSIS, PROBES = "diagnosis.json", "semantics.png"


def diagnose(
    run: Run | Path | str,
    source: str | None = None,
    split: str = "test",
    *,
    limit: int | None = None,
    console: Console,
) -> dict[str, Any]:
    """Say what is wrong with the codes of `run` on `split` of `source` (default: its own data).

    Returns findings, notes, parts (`measure`), probes, the rows of semantics.png (of images of one size only), and
    protocol, and writes them to diagnosis.json with diagnosis.svg and semantics.png beside it. Raises ValueError for
    runs without a tokenizer and for data that give no valid token.
    """
    run = Run.open(run)
    loader, evidence = observe(run, source, split, limit=limit, console=console)
    parts = list(evidence.parts.values())
    if not any(part.codes.positions for part in parts):
        raise ValueError(f"no valid codes in {evidence.tokens} tokens of {run.folder}: the latents are not finite")
    measured = [measure(part) for part in parts]
    found = [f for part, numbers in zip(parts, measured, strict=True) for f in findings(part, numbers)]
    if evidence.invalid:
        share = evidence.invalid / evidence.tokens
        text = f"{evidence.invalid} of {evidence.tokens} tokens are not finite"
        found.insert(0, Finding("invalid", "", [], share, 0.0, text, ["optimizer.clip=1.0"]))
    rows: list[str] = []
    if not run.coder.guides and loader.preprocess.medium is IMAGE and loader.preprocess.shape:
        rows = write_probes(run.tokenizer, loader, run.folder / PROBES, min(limit or POOL, POOL))
    result = {
        "findings": [asdict(finding) for finding in found],
        "notes": [note for numbers in measured for note in notes(numbers)],
        "parts": measured,
        "probes": rows,
        "protocol": {
            "source": source or run.config.data.source,
            "split": split,
            "limit": limit,
            "tokens": evidence.tokens,
            "latents": f"of {evidence.share:.2%} of the tokens, drawn by a fixed seed; codes of all",
            "preprocessing": run.config.data.preprocess().record(),
            "ema": run.config.ema,
            "run": run.name,
        },
    }
    write_json(run.folder / DIAGNOSIS, result)
    with replacing((run.folder / DIAGNOSIS).with_suffix(".svg")) as temporary:
        temporary.write_bytes(figures.svg(figures.code_panels(_panels(parts, measured))))
    return result


def recommended(
    run: Run | Path | str,
    source: str | None = None,
    split: str = "test",
    *,
    size: int | None = None,
    bits: float | None = None,
    limit: int | None = None,
    console: Console,
) -> dict[str, Any]:
    """Levels and bound for `size` or `bits` (default: as many codes as now) by the latents of `run`, an FSQ's.

    Returns levels, bound and slope; rows, what each bound makes of the latents (`bounds`) at those `measured` levels:
    the recommended ones if the run has as many channels, else the run's own; idle, the channels that are dead or repeat
    another; evidence, a sentence. Raises ValueError for a run with more or other quantizers than one FSQ.
    """
    run = Run.open(run)
    _, found = observe(run, source, split, limit=limit, console=console)
    kinds = [type(part.quantizer).__name__ for part in found.parts.values()]
    if kinds != ["FSQ"]:
        raise ValueError(
            f"levels are recommended by the latents of one FSQ; {run.folder} has {', '.join(kinds) or 'none'}"
        )
    (part,) = found.parts.values()
    one: Any = part.quantizer
    own = math.prod(one.levels)
    wanted = own if size is None and bits is None else size
    levels = list(recommend(size=wanted, bits=bits, bound=one.bound).levels)
    if (size is None and bits is None) or math.prod(levels) == own:
        levels = list(one.levels)
    measured = levels if len(levels) == one.dim else list(one.levels)
    latents = torch.cat(part.latents)
    best, rows = better_bound(measured, one, latents)
    idle = [i for f in findings(part, measure(part)) if f.kind in ("dead", "correlated") for i in f.channels[-1:]]
    return {
        "levels": levels,
        "bound": best["bound"],
        "slope": best["slope"],
        "measured": measured,
        "rows": rows,
        "idle": idle,
        "evidence": f"{len(latents):,} latents of {run.name} on {split} of {source or run.config.data.source}, trained "
        f"with levels {one.levels} under the {one.bound} bound of slope {one.slope:g}. Another bound is named where it "
        f"spends more than {GAIN:g} bits more. Entropy and usage say how evenly codes are spent, not how well they "
        "reconstruct, and latents move when they are trained under another bound.",
    }


def observe(
    run: Run, source: str | None, split: str, *, limit: int | None, console: Console
) -> tuple[Loader, Evidence]:
    """`split` of `source` (default: the run's own data), and what the run's quantizers make of it."""
    loader = run.whole(source, split)
    with watched(console, f"diagnose {run.name}") as watch:
        return loader, gather(run.coder, loader, limit, watch)


def _panels(parts: list[Part], measured: list[dict[str, Any]]) -> list[tuple[str, list[int], bool]]:
    """Title, counts and whether they are of levels: for each channel with levels, else for the codes of each part."""
    panels: list[tuple[str, list[int], bool]] = []
    for part, numbers in zip(parts, measured, strict=True):
        if "correlation" in numbers:
            for channel in numbers["channels"]:
                title = f"{part.name} {channel['channel']}: {channel['entropy_bits']:.2f} bits"
                panels.append((title, channel["histogram"], True))
        else:
            counts = part.codes.counts()[1].tolist()
            counts += [0] * (numbers["size"] - len(counts))
            panels.append((f"{part.name}: {numbers['entropy_bits']:.2f} bits", counts, False))
    return panels


def show(result: dict[str, Any]) -> Group:
    """The findings and notes of `diagnose` for a terminal."""
    notes = [escape(f"note: {note}") for note in result["notes"]]
    if not result["findings"]:
        return Group("healthy: nothing is wrong with the codes", *notes)
    table = Table("finding", "where", "value", "threshold", "what", box=None, pad_edge=False)
    tries = []  # below the table, whose columns would break them
    for one in result["findings"]:
        numbers = f"{one['value']:.3g}", f"{one['threshold']:.3g}"
        table.add_row(*map(escape, (one["kind"], one["part"], *numbers, one["text"])))
        about = " ".join([one["part"] or "latents", *map(str, one["channels"])])
        tries.append(escape(f"{one['kind']}, {about}: try " + ", or ".join(one["change"])))
    return Group(table, *tries, *notes)


def show_levels(result: dict[str, Any]) -> Group:
    """What `recommended` found, for a terminal."""
    table = Table("bound", "slope", "entropy", "usage", "entropy of each channel", box=None, pad_edge=False)
    for row in result["rows"]:
        entropy = f"{row['entropy_bits']:.3f} of {math.log2(math.prod(result['measured'])):.3f} bits"
        each = " ".join(f"{bits:.2f}" for bits in row["channels"])
        table.add_row(row["bound"], f"{row['slope']:g}", entropy, f"{row['usage']:.2%}", each)
    lines = [f"levels {result['levels']} bound {result['bound']} slope {result['slope']:g}"]
    if result["measured"] != result["levels"]:
        lines.append(f"other channels than the run's: measured is {result['measured']}, so the bound is a guess")
    if result["idle"]:
        lines.append(f"channels {result['idle']} of the run say nothing of their own: fewer channels would do")
    return Group(*map(escape, lines), table, escape(f"evidence: {result['evidence']}"))
