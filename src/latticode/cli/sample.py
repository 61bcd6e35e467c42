"""Commands that draw from a prior: sample, edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from latticode.cli.options import (
    Clip,
    Device,
    DrawnAtOnce,
    Judge,
    KeepBest,
    Labels,
    Overwrite,
    RunFolder,
    Seed,
    TextFile,
    Texts,
    err,
    out,
    takes_sampling,
)
from latticode.core.types import Sampling


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
    from latticode.runs.sample import sample as run_sampling

    target = target or run / "samples"
    grid = run_sampling(
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
    from latticode.runs.sample import edit as run_edit

    grid = run_edit(
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
    from latticode.runs.open import pick_device
    from latticode.sampling.scores import load_clip

    return load_clip(name, pick_device(device))
