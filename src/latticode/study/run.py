"""Run the jobs of a study one after another, each in a run folder of its own, and write what they gave."""

from __future__ import annotations

import gc
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from latticode.core.files import write_json
from latticode.core.progress import part_of, progress
from latticode.data.passes import count_of
from latticode.engine import TrainingError, TrainingStoppedError, train
from latticode.engine.config import RunConfig
from latticode.engine.feed import open_loader
from latticode.evaluate import Reference
from latticode.runs.evaluate import EvaluationRequest, evaluate
from latticode.study.page import PAGE, write_study_page
from latticode.study.plan import PLAN, Cost, Job, Plan, check_same, planned, read_plan
from latticode.study.table import PROBLEMS, finished, read_rows, write_csv
from latticode.viz.report import cell

CALIBRATION, LOGGED = 12, 4  # steps of a measurement, and how many pass between two logs; the first few do not count
LOOKS = (64, 320)  # images evaluated to know what all of them cost
EARLY = 300.0  # seconds after which the page shows what there is
QUIET = Console(quiet=True)

Measure = Callable[[Plan, Job, Path], dict[str, Cost]]


def study(
    plan: Plan, folder: Path, *, shard: tuple[int, int] = (1, 1), plan_only: bool = False, console: Console
) -> Path:
    """Do what `folder` lacks of `plan`, or the `shard` (i, n) of it, and write study.csv and study.html there: in the
    end, also if interrupted, and every five minutes before.

    Returns the path of the page. Where `folder` holds a plan already, its steps are taken. A job that fails is recorded
    and tried again by the next call. Raises ValueError for overrides that a job would refuse, for a folder with another
    study, for a budget that pays for no step, and for a part of a study whose steps are not known yet: shards must not
    measure them each for itself. Raises TrainingError in the end, with everything else done, if jobs failed.
    """
    index, count = shard
    mine = plan.jobs[index - 1 :: count]
    todo = [job for job in mine if not finished(folder, plan, job)]
    if todo:  # jobs that were copied together need neither data nor networks here
        plan.check()
    plan = _settled(plan, folder, shard, console)
    if plan_only:
        return folder / PLAN
    if len(todo) < len(mine):
        console.print(f"{len(mine) - len(todo)} of {len(mine)} jobs are there already")
    began = written = time.monotonic()
    spent = 0.0
    references: dict[str, Reference] = {}
    named: set[str] = set()  # images that were skipped
    try:
        for number, job in enumerate(todo, 1):
            which = f"{number}/{len(todo)} {job.name}"
            with part_of(which, named):
                said = run_job(plan, job, folder, references, console=console)
            spent += plan.estimate(job)
            left = (time.monotonic() - began) / spent * sum(plan.estimate(other) for other in todo[number:])
            console.print(f"{which}: {said}; {_duration(left)} left", markup=False, soft_wrap=True)
            if number < len(todo) and time.monotonic() - written > EARLY:
                _write(folder, plan)
                written = time.monotonic()
    except TrainingStoppedError:
        message = f"interrupted; {folder / PAGE} shows what is done, and the same command goes on where it was"
        raise TrainingStoppedError(message) from None
    finally:
        page = _write(folder, plan)
    if failed := [job.name for job in mine if not finished(folder, plan, job)]:
        raise TrainingError(
            f"{len(failed)} of {len(mine)} jobs failed: {', '.join(failed)}; {page} has the others and says why; "
            "the same command tries them again"
        )
    return page


def _write(folder: Path, plan: Plan) -> Path:
    rows = read_rows(folder, plan)
    write_csv(folder / "study.csv", rows)
    return write_study_page(folder, plan, rows)


def run_job(
    plan: Plan, job: Job, folder: Path, references: dict[str, Reference] | None = None, *, console: Console
) -> str:
    """Train and evaluate one job; returns its scores in words, or its error, which is recorded in its folder.

    Jobs that share `references` look at the training images, which samples are measured against, only once.

    Raises TrainingStoppedError if it was interrupted.
    """
    place = folder / "jobs" / job.name
    began = time.monotonic()
    watching = _forget_peak()
    error, scores = "", {}
    try:
        train(plan.tokenizer_config(job), place, resume=True, console=console)
        scores = _evaluate(plan, place, plan.limit, console)
        if plan.prior:
            train(plan.prior_config(job, place), place / "prior", resume=True, console=console)
            scores |= _evaluate(plan, place / "prior", plan.limit, console, references)
    except TrainingStoppedError:
        raise
    except TrainingError as failure:
        error = str(failure)
    except Exception as failure:  # whatever it is, the other jobs must go on
        error = f"{type(failure).__name__}: {failure}"
    facts = {"error": error} if error else {"peak_memory_mb": _peak() if watching else None}
    write_json(place / PROBLEMS, facts, indent=None)
    if error:
        return f"failed: {error.splitlines()[0]}"
    shown = [
        f"{key.replace('_', ' ')} {cell(scores[key])}" for key in ("psnr", "usage", "compression_cost") if key in scores
    ]
    return f"{', '.join(shown)}, {_duration(time.monotonic() - began)}"


def _evaluate(
    plan: Plan, run: Path, limit: int | None, console: Console, references: dict[str, Reference] | None = None
) -> dict[str, Any]:
    request = EvaluationRequest(features=plan.features, samples=plan.samples, limit=limit)
    return evaluate(run, request, references=references, console=console)


def _settled(plan: Plan, folder: Path, shard: tuple[int, int], console: Console) -> Plan:
    """The plan with its steps: the one in `folder`, or `plan`, measured if need be, which then is in `folder`."""
    old = read_plan(folder)
    if old is not None:
        check_same(old, plan)
        return old
    if not plan.steps:
        if shard != (1, 1):
            raise ValueError(
                f"{folder} holds no plan, and shards that each measured the steps would differ: write it first with "
                "--plan-only, or give --steps"
            )
        plan = calibrated(plan, folder, measure, console)
    elif plan.prior and not plan.prior_steps:
        plan = replace(plan, prior_steps=plan.steps)
    plan.write(folder)
    return plan


def calibrated(
    plan: Plan, folder: Path, measured: Measure, console: Console, clock: Callable[[], float] = time.monotonic
) -> Plan:
    """`plan` with the costs of every quantizer at the smallest and largest size, and the steps that the rest of the
    budget then allows. What a prior costs depends on the number of codes alone: it is measured with one quantizer."""
    assert plan.budget is not None
    began = clock()
    costs: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    measured(replace(plan, prior=False), plan.jobs[0], folder / "calibration")  # a process's first run is its slowest
    looks = [(name, size) for name in plan.quantizers for size in sorted({plan.sizes[0], plan.sizes[-1]})]
    with progress(console, "measure", len(looks), unit="steps", scale=CALIBRATION) as advance:
        for done, (name, size) in enumerate(looks, 1):
            asked = replace(plan, prior=plan.prior and name == plan.quantizers[0])
            for kind, cost in measured(asked, Job(name, size, 0), folder / "calibration").items():
                costs.setdefault(kind, {}).setdefault(name, {})[str(size)] = (cost.fixed, cost.step)
            advance(done)
    if plan.prior:
        costs["prior"] = dict.fromkeys(plan.quantizers, costs["prior"][plan.quantizers[0]])
    budget = plan.budget
    plan = planned(replace(plan, costs=costs), budget - (clock() - began))
    more = f" and {plan.prior_steps:,} of its prior" if plan.prior else ""
    console.print(f"{len(plan.jobs)} jobs of {plan.steps:,} steps{more} fit in {_duration(budget)}")
    return plan


def measure(plan: Plan, job: Job, place: Path) -> dict[str, Cost]:
    """Costs of a job's tokenizer and, if wanted, its prior: a few steps, and what evaluating two numbers of images
    says of all."""
    try:
        costs = {"tokenizer": _timed(plan, plan.tokenizer_config(job), place)}
        if plan.prior:
            costs["prior"] = _timed(plan, plan.prior_config(job, place), place / "prior")
    finally:
        gc.collect()
        shutil.rmtree(place, ignore_errors=True)
    return costs


def _timed(plan: Plan, config: RunConfig, run: Path) -> Cost:
    config = config.model_copy(update={"steps": CALIBRATION, "log_every": LOGGED})
    began = time.monotonic()
    train(config, run, console=QUIET)
    trained = time.monotonic()
    few = _evaluate(plan, run, LOOKS[0], QUIET)["count"]
    looked = time.monotonic()
    more = _evaluate(plan, run, LOOKS[1], QUIET)["count"]
    first, second = looked - trained, time.monotonic() - looked
    an_image = max(0.0, second - first) / max(more - few, 1)
    images = max(
        more, count_of(open_loader(config, "test", batch_size=64), plan.limit)
    )  # how long a stream is nobody knows
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    step = (seconds[-1] - seconds[0]) / (CALIBRATION - LOGGED)
    return Cost(max(0.0, trained - began - CALIBRATION * step) + first + an_image * (images - few), step)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"


STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _forget_peak() -> bool:
    """Let the peak begin anew: of the accelerator, or of this process where Linux allows it (proc(5), clear_refs).

    Returns whether it did. A finished run lives on in reference cycles, with its images, until they are collected.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _peak() -> float | None:
    """Megabytes at the most since `_forget_peak`; None where nobody tells."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    return round(int(found[1]) * 1024 / 1e6, 1) if found else None


__all__ = ["calibrated", "measure", "run_job", "study"]
