"""How many steps one quantizer of a study takes in the time of another's: seconds per step, in alternating runs.

    python benchmarks/equal_time.py runs/study/cifar10 --one fsq-clamp --other vq-ema

Trains the tokenizers of all sizes of the study for a few steps each, never two at once. Prints a row for each size:
seconds per step of both, the median of their ratios, and the steps of `--one` in the time of the study's of `--other`.
What comes before the first steps, such as k-means, does not count.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from systems import line

from latticode.study.plan import Job, read_plan
from latticode.study.run import measure


def main(
    folder: Annotated[Path, typer.Argument(metavar="STUDY", help="Folder of a study.")],
    one: Annotated[str, typer.Option(metavar="QUANTIZER")] = "fsq-clamp",
    other: Annotated[str, typer.Option(metavar="QUANTIZER")] = "vq-ema",
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of runs for each size.")] = 3,
) -> None:
    """Print a table: size, seconds per step, their ratio, steps in the same time."""
    plan = read_plan(folder)
    if plan is None:
        raise typer.BadParameter(f"{folder} holds no study")
    print(
        line(
            "codes", f"{one}, ms a step", f"{other}, ms a step", "ratio", f"steps of {one} in the time of {plan.steps}"
        )
    )
    print(line(*["---"] * 5))
    with tempfile.TemporaryDirectory() as scratch:
        measure(plan, Job(one, plan.sizes[0], 0), Path(scratch) / "run")  # a process's first run is its slowest
        for size in plan.sizes:
            pairs = [
                [measure(plan, Job(name, size, 0), Path(scratch) / "run")["tokenizer"].step for name in (one, other)]
                for _ in range(rounds)
            ]
            ours, theirs = (1000 * statistics.median(times) for times in zip(*pairs, strict=True))
            ratio = statistics.median(b / a for a, b in pairs)
            print(
                line(f"{size:,}", f"{ours:.0f}", f"{theirs:.0f}", f"{ratio:.2f}", f"{plan.steps * ratio:,.0f}"),
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
