"""The command line. Heavy imports happen inside the commands, so that --help is quick."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Images, video and audio to discrete tokens and back, and generators over the tokens.",
    epilog="Begin with: latticode demo. Then: latticode recipes, latticode train fsq-tokenizer data.source=photos/",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(soft_wrap=True)
err = Console(stderr=True)


class Split(StrEnum):
    train = "train"
    test = "test"
    all = "all"


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a trained run.")]
OwnSize = Annotated[bool, typer.Option("--own-size", help="Keep every image's size, padded to the stride.")]
Tile = Annotated[
    int | None,
    typer.Option(min=1, help="Work in overlapping tiles where an image is longer than this; default 1024."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes the best there is.")]


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

    config, tokenizer = runs.open_tokenizer(run, device)
    loader = runs.open_whole(config, source, split.value, own_size=own_size, batch_size=batch_size)
    dataset = tokens.encode(tokenizer, loader, target, tile=tile, console=err, resume=resume)
    _skipped(dataset.manifest["skipped"])
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
def sample(
    run: RunFolder,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 64,
    label: Annotated[int | None, typer.Option(help="Class index; default: all classes in turn.")] = None,
    guidance: Annotated[float, typer.Option(help="w in l_c + w (l_c - l_0); 0 is off.")] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Forward passes per image.")] = 12,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the token draw.")] = 1.0,
    noise: Annotated[float, typer.Option(min=0.0, help="Gumbel noise on the confidences, annealed to 0.")] = 4.5,
    schedule: Annotated[str, typer.Option(help="Of the masked fraction: cosine, arccos, linear, ...")] = "cosine",
    seed: Annotated[int, typer.Option(min=0)] = 0,
    target: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default RUN/samples.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Device = "auto",
) -> None:
    """Draw samples from a trained prior: single PNG files and a grid, with the settings in their metadata."""
    from latticode import runs
    from latticode.types import Sampling

    sampling = Sampling(steps=steps, temperature=temperature, noise=noise, guidance=guidance, schedule=schedule)
    target = target or run / "samples"
    grid = runs.sample(
        run, target, count, label=label, sampling=sampling, seed=seed, batch_size=batch_size, device=device, console=err
    )
    out.print(f"{count} samples in {target}, together in {grid}")


@app.command()
def evaluate(
    run: RunFolder,
    source: Annotated[
        str | None, typer.Argument(metavar="[SOURCE]", help="Default: what the run was trained on.")
    ] = None,
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
    guidance: Annotated[float, typer.Option(help="Of the samples.")] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Of the samples.")] = 12,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the samples.")] = 1.0,
    noise: Annotated[float, typer.Option(min=0.0, help="Of the samples.")] = 4.5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = "auto",
) -> None:
    """Score a run on held-out images; writes RUN/evaluation.json, with its protocol, and RUN/report.html."""
    from latticode import runs
    from latticode.report import write_report
    from latticode.types import Sampling

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
        sampling=Sampling(steps=steps, temperature=temperature, noise=noise, guidance=guidance),
        seed=seed,
        device=device,
        console=err,
    )
    table = Table("metric", "value", box=None, pad_edge=False)
    for name, value in result.items():
        if isinstance(value, int | float):
            table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    out.print(table)
    out.print(f"{write_report(run)}")


@app.command()
def levels(
    bits: Annotated[float | None, typer.Option(help="Wanted bits per position.")] = None,
    size: Annotated[int | None, typer.Option(help="Wanted codebook size.")] = None,
) -> None:
    """Recommend FSQ levels for a codebook size, with what a unit-normal input makes of them."""
    from latticode.quantizers.levels import recommend

    found = recommend(size=size, bits=bits)
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


def _skipped(skipped: dict[str, str]) -> None:
    for name, reason in skipped.items():
        err.print(f"skipped {name}: {reason}", style="yellow", markup=False, soft_wrap=True)
    if skipped:
        err.print(f"{len(skipped)} images skipped", style="yellow")


def main() -> None:
    """Run the command line; bad input ends with one message and exit code 2."""
    try:
        app(prog_name="latticode")
    except Exception as error:
        from latticode.engine import TrainingError

        if not isinstance(error, ValueError | OSError | TrainingError) or "LATTICODE_TRACEBACK" in os.environ:
            raise
        err.print("error:", style="bold red", end=" ")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
