"""What several verbs of the command line share: options, and where they print."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from latticode.core.types import Sampling

out = Console(soft_wrap=True)
err = Console(stderr=True)


class Split(StrEnum):
    train = "train"
    test = "test"
    all = "all"


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a trained run.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes the best there is.")]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", help="Class: a number, -1 for none, or a name. Several: in turn, one for each sample."),
]
Texts = Annotated[list[str] | None, typer.Option("--text", help="Caption, of a prior that reads. Several: in turn.")]
TextFile = Annotated[Path | None, typer.Option("--texts", help="File with one caption a line.")]
Judge = Annotated[Path | None, typer.Option("--classifier", help="Classifier run that --keep-best asks.")]
Clip = Annotated[str | None, typer.Option("--clip", help="CLIP that --keep-best asks: a folder or Hub name.")]
KeepBest = Annotated[
    float,
    typer.Option(
        "--keep-best", min=0.0, max=1.0, help="0.25: the best of every four draws, by --classifier or --clip."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="With the number of a sample, all that its draws depend on.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete samples of other settings in the folder.")]
DrawnAtOnce = Annotated[int, typer.Option("--batch-size", min=1, help="Drawn at once; changes no sample.")]

SAMPLING: dict[str, Any] = {  # for each field of Sampling
    "steps": typer.Option(min=1, help="Forward passes of an iterative decoder."),
    "temperature": typer.Option(min=0.0, help="Of the token draw; 0 takes the likeliest."),
    "noise": typer.Option(min=0.0, help="Gumbel noise on the confidences, annealed to 0."),
    "guidance": typer.Option(help="w in l_c + w (l_c - l_0); 0 is off."),
    "guidance_schedule": typer.Option(help="Of w over the steps: constant, or from 0 to w: linear, cosine."),
    "schedule": typer.Option(help="Of the masked fraction: cosine, arccos, linear, square, cubic, root, log, exp."),
    "top_k": typer.Option(min=0, help="Draw from the k likeliest tokens; 0 = all."),
    "top_p": typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this total probability."),
    "revisions": typer.Option(min=0, help="Rounds in which a drafted image is drawn again, part by part."),
    "revise_steps": typer.Option(min=1, help="Parts of a revision."),
}


def takes_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with an option for each field of `Sampling` where it has a keyword parameter `sampling`."""
    hints, types = get_type_hints(command, include_extras=True), get_type_hints(Sampling)
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name != "sampling":
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        for field, option in SAMPLING.items():
            annotation, default = Annotated[types[field], option], getattr(Sampling(), field)
            parameters.append(inspect.Parameter(field, keyword, default=default, annotation=annotation))

    @wraps(command)
    def run(*given: Any, **options: Any) -> None:
        chosen = {field: options.pop(field) for field in SAMPLING}
        command(*given, sampling=Sampling(**chosen), **options)

    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


OwnSize = Annotated[bool, typer.Option("--own-size", help="Keep every image's size, padded to the stride.")]
Tile = Annotated[
    int | None,
    typer.Option(min=1, help="Work in overlapping tiles where an image is longer than this; default 1024."),
]
