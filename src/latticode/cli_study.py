"""The command line's verb `study`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


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
    ] = "fsq,vq,vq-ema,simvq,lfq,bsq",
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
    console = Console(stderr=True)
    typer.echo(run_study(plan, target, shard=parse_shard(shard), plan_only=plan_only, console=console))
