"""study.csv: one row for each job, and the check that all were trained and evaluated under one protocol."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from latticode.core.files import read_json, write_text
from latticode.core.mappings import differences
from latticode.engine.config import read_run
from latticode.runs.evaluate import EVALUATION
from latticode.study.plan import Job, Plan

RUN = "run.json"
TRAINED = {"steps": int, "parameters": int, "seconds": (int, float)}  # by it, of a training
PROBLEMS = "job.json"  # of a job: its error, or its peak memory
FIRST = ("quantizer", "size", "codes", "bits", "seed", "steps", "psnr", "ssim", "usage", "perplexity", "entropy_bits")
OF_PRIOR = ("compression_cost", "bits_per_pixel", "samples_per_second")
NETWORKED = ("rfid_", "fid_", "precision_", "recall_")  # keys that end with the name of a feature network
VARIES = {"seed", "about"}  # of the training of two jobs; and what makes up the quantizer

Row = dict[str, Any]


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds; the latter is None for one seed.

    Examples:
        >>> Spread(27.5, 0.25).deviation, Spread(27.5, None).deviation  # of several seeds, of one
        (0.25, None)
    """

    mean: float
    deviation: float | None


def job_folder(folder: Path, job: Job) -> Path:
    """The run folder of a job."""
    return folder / "jobs" / job.name


def finished(folder: Path, plan: Plan, job: Job) -> bool:
    """Whether a job is trained and evaluated to the end."""
    place = job_folder(folder, job)
    ends = [place / EVALUATION, *([place / "prior" / EVALUATION] if plan.prior else [])]
    facts = _facts(place)
    return facts is not None and "error" not in facts and all(end.is_file() for end in ends)


def read_rows(folder: Path, plan: Plan) -> list[Row]:
    """A row for each job of `plan` that was begun and ended: its numbers, or what it is and its `error`.

    Raises ValueError, naming both jobs, if two were trained or evaluated under different protocols.
    """
    done = [job for job in plan.jobs if finished(folder, plan, job)]
    check_protocols(folder, done)
    rows = []
    for job in plan.jobs:
        if job in done:
            rows.append(_row(job_folder(folder, job), job))
        elif (facts := _facts(job_folder(folder, job))) and "error" in facts:
            rows.append({**job._asdict(), "error": facts["error"]})
    return rows


def _row(place: Path, job: Job) -> Row:
    result, about = evaluation_of(place), read_json(place / RUN, TRAINED)
    row: Row = {**job._asdict(), "codes": round(2 ** result["bits_per_token"]), "bits": result["bits_per_token"]}
    row |= {key: result[key] for key in FIRST if key in result}
    row |= {key: value for key, value in result.items() if key.startswith(NETWORKED)}
    row |= {key: about[key] for key in TRAINED}
    if (place / "prior" / EVALUATION).is_file():
        result, about = evaluation_of(place / "prior"), read_json(place / "prior" / RUN, TRAINED)
        row |= {key: result[key] for key in OF_PRIOR if key in result}
        row |= {key: value for key, value in result.items() if key.startswith(NETWORKED)}
        row |= {f"prior_{key}": about[key] for key in TRAINED}
    return row | (_facts(place) or {})


def protocols(place: Path) -> dict[str, Any]:
    """Everything of a job that all jobs must have in common: how it was trained and how it was evaluated."""
    found: dict[str, Any] = {}
    for kind, run in (("tokenizer", place), ("prior", place / "prior")):
        if (run / EVALUATION).is_file():
            scored = {k: v for k, v in evaluation_of(run)["protocol"].items() if k != "run"}
            trained = read_run(run).model_dump(mode="json", exclude=VARIES)
            if kind == "tokenizer":
                trained["tokenizer"].pop("quantizer")
                trained["tokenizer"].pop("feedback", None)
                trained.pop("weights")
            else:
                trained = {k: v for k, v in trained.items() if k != "tokenizer"}
                trained["prior"].pop("vocab", None)
            found[kind] = {"evaluated": scored, "trained": trained}
    return found


def check_protocols(folder: Path, jobs: Iterable[Job]) -> None:
    """Raise ValueError if two of the finished `jobs` are not comparable, with what differs."""
    reference: tuple[Job, dict[str, Any]] | None = None
    for job in jobs:
        own = protocols(job_folder(folder, job))
        if reference is None:
            reference = job, own
        elif changes := differences(reference[1], own, free={f"{kind}.trained.data.workers" for kind in own}):
            raise ValueError(
                f"{reference[0].name} and {job.name} were made under different protocols, so they do not belong in one "
                f"table: {changes}; delete the folder of the one that is wrong and run the study again"
            )


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns of a table of these rows, the usual ones first, errors last."""
    names = list(dict.fromkeys([*FIRST, *(key for row in rows for key in row if key != "error")]))
    return [*names, *(["error"] if any("error" in row for row in rows) else [])]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line for each job; numbers are written in full, what a job has not is empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns_of(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def over_seeds(rows: Iterable[Row], key: str) -> dict[str, dict[int, Spread]]:
    """quantizer -> size -> mean and spread of `key`, of the jobs that have it as a finite number."""
    values: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        value = row.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            values.setdefault(row["quantizer"], {}).setdefault(row["size"], []).append(float(value))
    return {name: {size: spread(found) for size, found in sizes.items()} for name, sizes in values.items()}


def spread(values: Sequence[float]) -> Spread:
    """Mean and, of two values or more, standard deviation."""
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _facts(place: Path) -> dict[str, Any] | None:
    """What is recorded of the job in `place`: its error, or its peak memory; None before it has ended."""
    return read_json(place / PROBLEMS, {}) if (place / PROBLEMS).is_file() else None


def evaluation_of(place: Path) -> dict[str, Any]:
    """The evaluation in a run folder. Raises ValueError for one without a protocol."""
    return read_json(place / EVALUATION, {"protocol": dict})
