"""The command line. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from latticode.cli_study import compare, diagnose, levels, study
from latticode.options import (
    Clip,
    Device,
    DrawnAtOnce,
    Judge,
    KeepBest,
    Labels,
    Overwrite,
    RunFolder,
    Seed,
    Split,
    TextFile,
    Texts,
    err,
    out,
    takes_sampling,
)
from latticode.types import Sampling

app = typer.Typer(
    help="Images, video and audio to discrete tokens and back, and generators over the tokens.",
    epilog="Begin with: latticode demo. Then: latticode recipes, latticode train fsq-tokenizer data.source=photos/",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


OwnSize = Annotated[bool, typer.Option("--own-size", help="Keep every image's size, padded to the stride.")]
Tile = Annotated[
    int | None,
    typer.Option(min=1, help="Work in overlapping tiles where an image is longer than this; default 1024."),
]


@app.command()
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
    from latticode import distributed
    from latticode.engine import load_config
    from latticode.engine import train as run_training
    from latticode.report import write_report

    config = load_config(recipe, overrides or [])
    folder = folder or Path("runs") / Path(recipe).stem
    run_training(config, folder, resume=resume, console=err)
    if distributed.rank() == 0:
        out.print(f"{write_report(folder)}")


@app.command()
def recipes() -> None:
    """List the shipped recipes and what each reproduces."""
    from latticode.engine.config import read_recipe, recipe_names

    table = Table("recipe", "about", box=None, pad_edge=False)
    for name in recipe_names():
        table.add_row(name, read_recipe(name).get("about", ""))
    out.print(table)


@app.command()
def encode(
    run: RunFolder,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder, parquet, tar, idx folder, hub:NAME, embedded:NAME.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the token dataset.")],
    split: Annotated[Split, typer.Option(help="Part of the source.")] = Split.all,
    own_size: OwnSize = False,
    tile: Tile = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the shards that are there and encode the rest.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Device = "auto",
) -> None:
    """Turn images, recordings or clips into a token dataset that remembers its tokenizer."""
    from latticode import runs
    from latticode.engine import tokens
    from latticode.engine.progress import tell_skipped

    config, tokenizer = runs.open_tokenizer(run, device)
    loader = runs.open_whole(config, source, split.value, own_size=own_size, batch_size=batch_size)
    dataset = tokens.encode(tokenizer, loader, target, tile=tile, console=err, resume=resume)
    tell_skipped(err, dataset.manifest["skipped"])
    out.print(f"{len(dataset)} {loader.preprocess.medium.noun}s in {target}, {tokenizer.bits:.2f} bits per position")


@app.command()
def decode(
    run: RunFolder,
    source: Annotated[Path, typer.Argument(metavar="TOKENS", help="Folder of a token dataset.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the files: PNG, wav or WebP.")],
    tile: Tile = None,
    device: Device = "auto",
) -> None:
    """Turn a token dataset back into images, wav files or animated WebP files, named as they were."""
    from latticode import runs
    from latticode.data import TokenDataset
    from latticode.engine import tokens
    from latticode.engine.progress import progress
    from latticode.outputs import save_example

    config, tokenizer = runs.open_tokenizer(run, device)
    preprocess = config.data.preprocess()
    dataset = TokenDataset(source, expect_hash=tokenizer.fingerprint())
    with progress(err, "decode", len(dataset)) as advance:
        for positions, images in tokens.decode(tokenizer, dataset, tile=tile):
            for position, image in zip(positions, images, strict=True):
                save_example(target / f"{position:06d}-{Path(dataset.name(position)).stem}", image, preprocess)
            advance(positions[-1] + 1)
    out.print(f"{len(dataset)} {preprocess.medium.noun}s in {target}")


@app.command()
@takes_sampling
def sample(
    run: RunFolder,
    *,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 64,
    label: Labels = None,
    text: Texts = None,
    texts: TextFile = None,
    image: Annotated[
        Path | None, typer.Option(help="Prompt: an image (or what else the run generates) whose beginning is kept.")
    ] = None,
    keep: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of --image: the fraction of the grid's rows, from the top.")
    ] = 0.5,
    sampling: Sampling,
    classifier: Judge = None,
    clip: Clip = None,
    keep_best: KeepBest = 1.0,
    seed: Seed = 0,
    target: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default RUN/samples.")] = None,
    overwrite: Overwrite = False,
    batch_size: DrawnAtOnce = 64,
    device: Device = "auto",
) -> None:
    """Draw samples from a trained prior: a file each, a grid, and samples.json, with the settings in all of them.

    A sample depends on its seed and number alone; a folder that holds some of them with the same settings gets the
    others. Without --label, all classes in turn.

    Examples: latticode sample runs/prior --label 3 --guidance 2 --out threes
    or: latticode sample runs/prior --image photo.png --keep 0.5 --count 16 --out completed
    """
    from latticode import sampling as draws

    target = target or run / "samples"
    grid = draws.sample(
        run,
        target,
        count,
        labels=label or (),
        texts=_texts(text, texts),
        image=image,
        keep=keep,
        sampling=sampling,
        classifier=classifier,
        score=_clip(clip, device),
        keep_best=keep_best,
        seed=seed,
        batch_size=batch_size,
        device=device,
        overwrite=overwrite,
        console=err,
    )
    out.print(f"{count} samples in {target}, together in {grid}")


@app.command()
@takes_sampling
def edit(
    run: RunFolder,
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="It is brought to the run's size.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder.")],
    *,
    mask: Annotated[Path | None, typer.Option(help="A picture of the image's size, white where to draw anew.")] = None,
    box: Annotated[str | None, typer.Option(metavar="X,Y,WIDTH,HEIGHT", help="Draw this box anew (pixels).")] = None,
    outpaint: Annotated[
        str | None, typer.Option(metavar="LEFT,TOP,RIGHT,BOTTOM", help="Draw so many pixels around the image.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="How many variants.")] = 4,
    label: Labels = None,
    text: Texts = None,
    texts: TextFile = None,
    sampling: Sampling,
    classifier: Judge = None,
    clip: Clip = None,
    keep_best: KeepBest = 1.0,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    batch_size: DrawnAtOnce = 64,
    device: Device = "auto",
) -> None:
    """Draw a part of an image anew (inpainting, another class in its place) or add to its sides (outpainting).

    Give one of --mask, --box and --outpaint. What is kept are the image's own pixels, but for a soft border.

    Example: latticode edit runs/prior shirt.png edited --box 8,8,16,16 --label 3
    """
    from latticode import sampling as draws

    grid = draws.edit(
        run,
        image,
        target,
        count,
        mask=mask,
        box=_four("--box", box),
        outpaint=_four("--outpaint", outpaint),
        labels=label or (),
        texts=_texts(text, texts),
        sampling=sampling,
        classifier=classifier,
        score=_clip(clip, device),
        keep_best=keep_best,
        seed=seed,
        batch_size=batch_size,
        device=device,
        overwrite=overwrite,
        console=err,
    )
    out.print(f"{count} variants in {target}, together with the image in {grid}")


@app.command()
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
        str | None, typer.Option(help="Network of FID: `inception` or the folder of a classifier run.")
    ] = None,
    perceptual: Annotated[
        str | None, typer.Option(help="Perceptual distance: `lpips` or the folder of a classifier run.")
    ] = None,
    classifier: Annotated[Path | None, typer.Option(help="Classifier run that judges the samples' labels.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples drawn from a prior.")] = 1000,
    limit: Annotated[int | None, typer.Option(min=1, help="Score on the first N images only.")] = None,
    sampling: Sampling,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Score a run on held-out images; writes RUN/evaluation.json, with its protocol, and RUN/report.html."""
    from latticode import runs
    from latticode.report import cell, write_report

    result = runs.evaluate(
        run,
        source,
        split.value,
        own_size=own_size,
        tile=tile,
        features=features,
        perceptual=perceptual,
        classifier=classifier,
        samples=samples,
        limit=limit,
        sampling=sampling,
        seed=seed,
        device=device,
        console=err,
    )
    table = Table("metric", "value", box=None, pad_edge=False)
    for name, value in result.items():
        if isinstance(value, int | float):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    for name, values in result.get("scores", {}).items():  # of a dense task, by how the code came about
        table.add_row(name, cell(values))
    out.print(table)
    out.print(f"{write_report(run)}")


@app.command()
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
    """Solve a dense task (depth, segments, colours) for pictures: of each a PNG to look at and a .npy of the numbers,
    both at the picture's own size.

    RUN is of stage II, whose prior writes the code: the likeliest, unless a sampling option is set. With a run of stage
    I there is no code, and predictions are the floor of what the base model can do.

    Example: latticode predict runs/uvim-depth-small-guide photo.jpg predicted
    """
    from latticode.engine.progress import tell_skipped
    from latticode.predict import predict as run_prediction

    result = run_prediction(
        run,
        image,
        target,
        sampling=sampling,
        seed=seed,
        batch_size=batch_size,
        device=device,
        console=err,
    )
    tell_skipped(err, result.skipped)
    out.print(f"{len(result.files)} predictions in {target}, {result.way}")


@app.command()
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
    """Fit a linear classifier to every layer of a trained prior; writes RUN/probe.json, probe.svg and report.html.

    The best layer is chosen on held-out training images; all are reported.
    """
    from latticode.probe import probe as run_probe
    from latticode.report import write_report

    result = run_probe(run, source, limit=limit, seed=seed, batch_size=batch_size, device=device, console=err)
    table = Table("layer", "test", "held out", box=None, pad_edge=False)
    for layer in result["layers"]:
        table.add_row(str(layer["layer"]), f"{layer['accuracy']:.2%}", f"{layer['held_out']:.2%}")
    out.print(table)
    out.print(f"layer {result['layer']}: {result['accuracy']:.2%} of {result['test']} test images")
    out.print(f"{write_report(run)}")


for verb in (study, compare, diagnose, levels):
    app.command()(verb)


@app.command()
def report(run: RunFolder) -> None:
    """Write RUN/report.html again from what the run folder holds."""
    from latticode.engine.config import read_run
    from latticode.report import write_report

    read_run(run)
    out.print(f"{write_report(run)}")


@app.command()
def demo(
    target: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs and the report.")] = Path("runs/demo"),
) -> None:
    """Train, tokenize, sample and report on embedded data, in a few minutes."""
    from latticode.demo import run_demo

    out.print(f"{run_demo(target, err)}")


def _texts(given: list[str] | None, file: Path | None) -> list[str]:
    lines = file.read_text(encoding="utf-8").splitlines() if file else []
    return [*(given or ()), *(line.strip() for line in lines if line.strip())]


def _four(option: str, given: str | None) -> list[int] | None:
    if given is None:
        return None
    try:
        a, b, c, d = map(int, given.split(","))
    except ValueError:
        raise ValueError(f"{option} needs four integers with commas between, got {given!r}") from None
    return [a, b, c, d]


def _clip(name: str | None, device: str) -> Any:
    if name is None:
        return None
    from latticode.runs import pick_device
    from latticode.scores import load_clip

    return load_clip(name, pick_device(device))


def main() -> None:
    """Run the command line; bad input, or an extra that is missing, ends with one message and exit code 2."""
    try:
        app(prog_name="latticode")
    except Exception as error:
        from latticode.engine import TrainingError

        expected = ValueError | OSError | ImportError | TrainingError
        if not isinstance(error, expected) or "LATTICODE_TRACEBACK" in os.environ:
            raise
        err.print("error:", style="bold red", end=" ")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
