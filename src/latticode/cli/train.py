"""Commands that train and report: train, recipes, report, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from latticode.cli.options import RunFolder, err, out


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A shipped recipe (see `latticode recipes`) or a .yaml file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, e.g. steps=2000 data.source=photos/"),
    ] = None,
    folder: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/RECIPE.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in that folder.")] = False,
) -> None:
    """Train a recipe and write a run folder: weights, config, metrics, pictures, report.

    Examples: latticode train fsq-tokenizer data.source=photos/ tokenizer.quantizer.levels=[8,8,8,6,5]
    or: latticode train maskgit tokenizer=runs/fsq-tokenizer --out runs/prior
    """
    from latticode.core import distributed
    from latticode.engine import load_config
    from latticode.engine import train as run_training
    from latticode.viz.report import write_report

    config = load_config(recipe, overrides or [])
    folder = folder or Path("runs") / Path(recipe).stem
    run_training(config, folder, resume=resume, console=err)
    if distributed.rank() == 0:
        out.print(f"{write_report(folder)}")


def recipes() -> None:
    """List the shipped recipes and what each reproduces."""
    from latticode.engine.config import read_recipe, recipe_names

    table = Table("recipe", "about", box=None, pad_edge=False)
    for name in recipe_names():
        table.add_row(name, read_recipe(name).get("about", ""))
    out.print(table)


def report(run: RunFolder) -> None:
    """Write RUN/report.html again from what the run folder holds."""
    from latticode.engine.config import read_run
    from latticode.viz.report import write_report

    read_run(run)
    out.print(f"{write_report(run)}")


def demo(
    target: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs and the report.")] = Path("runs/demo"),
) -> None:
    """Train, tokenize, sample and report on embedded data, in a few minutes."""
    from latticode.runs.demo import run_demo

    out.print(f"{run_demo(target, err)}")
