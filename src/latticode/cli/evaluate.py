"""Commands that score or apply a run: evaluate, predict, probe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from latticode.cli.options import (
    Device,
    OwnSize,
    RunFolder,
    Seed,
    Split,
    Tile,
    err,
    out,
    takes_sampling,
)
from latticode.core.types import Sampling


@takes_sampling
def evaluate(
    run: RunFolder,
    source: Annotated[
        str | None, typer.Argument(metavar="[SOURCE]", help="Default: what the run was trained on.")
    ] = None,
    *,
    split: Annotated[Split, typer.Option(help="Part of the source to score on.")] = Split.test,
    own_size: OwnSize = False,
    tile: Tile = None,
    features: Annotated[
        str | None, typer.Option(help="Network of rFID and gFID: `inception` or the folder of a classifier run.")
    ] = None,
    perceptual: Annotated[
        str | None, typer.Option(help="Perceptual distance: `lpips` or the folder of a classifier run.")
    ] = None,
    classifier: Annotated[Path | None, typer.Option(help="Classifier run for the label accuracy of samples.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples drawn from a prior.")] = 1000,
    limit: Annotated[int | None, typer.Option(min=1, help="Score on the first N images only.")] = None,
    sampling: Sampling,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Score a run on held-out images; writes RUN/evaluation.json, with its protocol, and RUN/report.html."""
    from latticode.runs.evaluate import EvaluationRequest
    from latticode.runs.evaluate import evaluate as run_evaluation
    from latticode.runs.open import Run
    from latticode.viz.report import cell, write_report

    request = EvaluationRequest(
        source=source,
        split=split.value,
        own_size=own_size,
        tile=tile,
        features=features,
        perceptual=perceptual,
        classifier=classifier,
        samples=samples,
        limit=limit,
        sampling=sampling,
        seed=seed,
    )
    result = run_evaluation(Run.open(run, device), request, console=err)
    table = Table("metric", "value", box=None, pad_edge=False)
    for name, value in result.items():
        if isinstance(value, int | float):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    for name, values in result.get("scores", {}).items():  # of a dense task, by how the code came about
        table.add_row(name, cell(values))
    out.print(table)
    out.print(f"{write_report(run)}")


@takes_sampling
def predict(
    run: RunFolder,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A picture, or a folder or tar of pictures.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder.")],
    *,
    sampling: Sampling,
    seed: Seed = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="At once; changes no prediction.")] = 8,
    device: Device = "auto",
) -> None:
    """Solve a dense task (depth, panoptic segmentation, colorization) for pictures: of each a PNG to look at and a .npy
    of the numbers, both at the picture's own size.

    RUN is of stage II, whose prior writes the code: the likeliest, unless a sampling option is set. With a run of stage
    I there is no code, and predictions are the floor of what the base model can do.

    Example: latticode predict runs/uvim-depth-small-guide photo.jpg predicted
    """
    from latticode.core.progress import tell_skipped
    from latticode.runs.open import Run
    from latticode.runs.predict import predict as run_prediction

    opened, options = Run.open(run, device), {"sampling": sampling, "seed": seed, "batch_size": batch_size}
    result = run_prediction(opened, image, target, **options, console=err)
    tell_skipped(err, result.skipped)
    out.print(f"{len(result.files)} predictions in {target}, {result.way}")


def probe(
    run: RunFolder,
    source: Annotated[
        str | None, typer.Argument(metavar="[SOURCE]", help="With labels. Default: what the run was trained on.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Use N random images of each split only.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Draws the images of --limit and the held-out part.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Device = "auto",
) -> None:
    """Linear probing: fit a linear classifier to every layer of a trained prior.

    Writes RUN/probe.json, probe.svg and report.html. The layer is chosen on held-out training images; all are
    reported.
    """
    from latticode.runs.open import Run
    from latticode.runs.probe import probe as run_probe
    from latticode.viz.report import write_report

    result = run_probe(Run.open(run, device), source, limit=limit, seed=seed, batch_size=batch_size, console=err)
    table = Table("layer", "test", "held out", box=None, pad_edge=False)
    for layer in result["layers"]:
        table.add_row(str(layer["layer"]), f"{layer['accuracy']:.2%}", f"{layer['held_out']:.2%}")
    out.print(table)
    out.print(f"layer {result['layer']}: {result['accuracy']:.2%} of {result['test']} test images")
    out.print(f"{write_report(run)}")
