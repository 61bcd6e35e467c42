"""Commands that sample from a prior: sample, edit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from latticode.cli.options import Device, Overwrite, RunFolder, err, out, takes_request


@takes_request
def sample(
    run: RunFolder,
    *,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 64,
    image: Annotated[
        Path | None, typer.Option(help="Prompt: an image (or what else the run generates) whose beginning is kept.")
    ] = None,
    keep: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Of --image: the fraction of the grid's rows, from the top.")
    ] = 0.5,
    request: Any,
    target: Annotated[Path | None, typer.Option("--out", "-o", help="Folder; default RUN/samples.")] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Draw samples from a trained prior: a file each, a grid, and samples.json, with the settings in all of them.

    A sample depends on its seed and number alone; a folder that holds some of them with the same settings gets the
    others. Without --label, all classes in turn.

    Examples: latticode sample runs/prior --label 3 --guidance 2 --out threes
    or: latticode sample runs/prior --image photo.png --keep 0.5 --count 16 --out completed
    """
    from latticode.runs.open import Run
    from latticode.runs.sample import sample as run_sampling

    target, opened = target or run / "samples", Run.open(run, device)
    asked = request(count, opened.device)
    grid = run_sampling(opened, target, asked, image=image, keep=keep, overwrite=overwrite, console=err)
    out.print(f"{count} samples in {target}, together in {grid}")


@takes_request
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
    request: Any,
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Draw a part of an image anew (inpainting, another class in its place) or add to its sides (outpainting).

    Give one of --mask, --box and --outpaint. What is kept are the image's own pixels, but for a soft border.

    Example: latticode edit runs/prior shirt.png edited --box 8,8,16,16 --label 3
    """
    from latticode.runs.open import Run
    from latticode.runs.sample import edit as run_edit

    opened = Run.open(run, device)
    grid = run_edit(
        opened,
        image,
        target,
        request(count, opened.device),
        mask=mask,
        box=_four("--box", box),
        outpaint=_four("--outpaint", outpaint),
        overwrite=overwrite,
        console=err,
    )
    out.print(f"{count} variants in {target}, together with the image in {grid}")


def _four(option: str, given: str | None) -> list[int] | None:
    if given is None:
        return None
    try:
        a, b, c, d = map(int, given.split(","))
    except ValueError:
        raise ValueError(f"{option} needs four integers with commas between, got {given!r}") from None
    return [a, b, c, d]
