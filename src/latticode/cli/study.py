"""Commands for choosing a codebook: study, compare, diagnose, levels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from latticode.cli.options import Device, RunFolder, Split, err, out


def study(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder, parquet, tar, idx folder, hub:NAME, embedded:NAME.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Of the recipe, for all jobs; prior.KEY=VALUE of the prior."),
    ] = None,
    *,
    sizes: Annotated[
        str, typer.Option(help="Codebooks: 2^4..2^16 for all powers of two from one to the other, or 16,64,256.")
    ] = "2^4,2^6,2^8,2^10,2^12,2^14,2^16",
    quantizers: Annotated[
        str,
        typer.Option(
            help="With commas; fsq-N has N levels in every channel, NAME+KEY=VALUE is NAME with a change, as "
            "fsq+bound=symmetric or vq-ema+gradient=rotation."
        ),
    ] = "fsq,fsq-feedback,vq,vq-ema,simvq,lfq,bsq",
    budget: Annotated[str, typer.Option(help="Wall time of all jobs on this machine, as 90s, 30m, 1h30m.")] = "30m",
    steps: Annotated[int | None, typer.Option(min=1, help="Of every job, instead of a budget.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How many of each quantizer and size.")] = 1,
    prior: Annotated[bool, typer.Option("--prior", help="Train a MaskGIT over each tokenizer's tokens too.")] = False,
    features: Annotated[
        str | None, typer.Option(help="Network of the FIDs: `inception` or the folder of a classifier run.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples drawn from each prior.")] = 1000,
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate on the first N held-out images only.")] = None,
    recipe: Annotated[str, typer.Option(help="Of the tokenizer: a shipped one or a .yaml file.")] = "study",
    shard: Annotated[str, typer.Option(metavar="I/N", help="Do the I-th of N parts of the jobs, I from 1.")] = "1/1",
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Write the plan, OUT/study.json, and stop.")] = False,
    target: Annotated[Path, typer.Option("--out", "-o", help="Folder of the study.")] = Path("runs/study"),
) -> None:
    """Compare quantizers over codebook sizes on your own images; writes OUT/study.csv and OUT/study.html.

    All jobs take the same number of steps. Each is a run folder in OUT/jobs; called again with the same options, a
    study goes on where it was, and shards that share OUT merge.

    Examples: latticode study photos/ --budget 2h --seeds 3 --out runs/study
    or: latticode study data/fashion-mnist data.channels=1 --quantizers fsq,vq-ema --sizes 16,256 --steps 500 --prior
    """
    from latticode.study import Plan, parse_budget, parse_shard, parse_sizes
    from latticode.study import study as run_study

    plan = Plan(
        source=source,
        sizes=parse_sizes(sizes),
        quantizers=tuple(dict.fromkeys(name.strip() for name in quantizers.split(","))),
        seeds=seeds,
        prior=prior,
        features=features,
        samples=samples,
        limit=limit,
        recipe=recipe,
        overrides=tuple(overrides or ()),
        budget=None if steps else parse_budget(budget),
        steps=steps or 0,
    )
    out.print(f"{run_study(plan, target, shard=parse_shard(shard), plan_only=plan_only, console=err)}")


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Evaluated runs, or evaluations as JSON files.")],
) -> None:
    """Put evaluations side by side. Those of another protocol stand in a table of their own, with what differs.

    Example: latticode compare runs/fsq runs/vq theirs.json
    """
    from latticode.runs.compare import compare as compared
    from latticode.viz.report import cell

    groups = compared(runs)
    for group in groups:
        if group.differs:
            out.print(f"not comparable with the first table: {group.differs}", style="yellow", markup=False)
        table = Table("", *map(escape, group.results), box=None, pad_edge=False)
        for key, *values in group.rows():
            table.add_row(key, *("" if value is None else cell(value) for value in values))
        out.print(table)
    if len(groups) == 1:
        out.print("all under one protocol")


def diagnose(
    run: RunFolder,
    source: Annotated[str | None, typer.Argument(metavar="[SOURCE]", help="Default: the run's own data.")] = None,
    split: Annotated[Split, typer.Option(help="Part of the source.")] = Split.test,
    limit: Annotated[int | None, typer.Option(min=1, help="The first N examples only.")] = None,
    device: Device = "auto",
) -> None:
    """Find dead codes, codebook collapse and channels that saturate or repeat each other, and say what to change.

    Writes RUN/diagnosis.json and RUN/report.html.
    """
    from latticode.diagnose import diagnose as run_diagnosis
    from latticode.diagnose import show
    from latticode.runs.open import Run
    from latticode.viz.report import write_report

    out.print(show(run_diagnosis(Run.open(run, device), source, split.value, limit=limit, console=err)))
    out.print(f"{write_report(run)}")


def levels(
    bits: Annotated[float | None, typer.Option(help="Wanted bits per position.")] = None,
    size: Annotated[int | None, typer.Option(help="Wanted codebook size.")] = None,
    bound: Annotated[
        str, typer.Option(help="paper, symmetric, equal-bins, or clamp, which takes fewer channels; a run has its own.")
    ] = "paper",
    run: Annotated[Path | None, typer.Option(help="An FSQ tokenizer's run, whose latents are the evidence.")] = None,
    source: Annotated[str | None, typer.Argument(metavar="[SOURCE]", help="For --run; default: its data.")] = None,
) -> None:
    """Recommend FSQ levels for a codebook size, with what a unit-normal input, or those of a run, make of them."""
    from latticode.quantizers.levels import recommend

    if run or source:
        from latticode.diagnose import recommended, show_levels

        if run is None:
            raise ValueError(f"SOURCE {source} is for --run, which names the tokenizer that shall see it")
        return out.print(show_levels(recommended(run, source, size=size, bits=bits, console=err)))
    found = recommend(size=size, bits=bits, bound=bound)
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in (
        ("levels", "[" + ", ".join(map(str, found.levels)) + "]"),
        ("size", f"{found.size:,}"),
        ("bits", f"{found.bits:.3f}"),
        ("entropy", f"{found.entropy:.3f} bits for a unit-normal input under the {found.bound} bound"),
        ("usage", f"{found.usage:.2%} of the codes appear in {found.tokens:,} unit-normal tokens"),
        ("source", found.source),
    ):
        table.add_row(name, value)
    out.print(table)
