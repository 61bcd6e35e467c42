"""Options that several commands share, and the consoles they print to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console

from latticode.core.types import Sampling

if TYPE_CHECKING:
    import torch

    from latticode.sampling.request import Request

out = Console(soft_wrap=True)
err = Console(stderr=True)


class Split(StrEnum):
    """Part of a source.

    Examples:
        >>> Split("test").value, [part.value for part in Split]
        ('test', ['train', 'test', 'all'])
    """

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
Judge = Annotated[Path | None, typer.Option("--classifier", help="Classifier run that scores for --keep-best.")]
Clip = Annotated[str | None, typer.Option("--clip", help="CLIP that scores for --keep-best: a folder or Hub name.")]
KeepBest = Annotated[
    float,
    typer.Option("--keep-best", min=0.0, max=1.0, help="Rejection sampling: 0.25 keeps the best of every four draws."),
]
Seed = Annotated[int, typer.Option(min=0, help="With the number of a sample, all that its draws depend on.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete samples of other settings in the folder.")]
DrawnAtOnce = Annotated[int, typer.Option("--batch-size", min=1, help="Drawn at once; changes no sample.")]

SAMPLING: dict[str, Any] = {  # for each field of Sampling
    "steps": typer.Option(min=1, help="Forward passes of an iterative decoder."),
    "temperature": typer.Option(min=0.0, help="Of the token draw; 0 takes the likeliest."),
    "noise": typer.Option(min=0.0, help="Choice temperature: Gumbel noise on the confidences, annealed to 0."),
    "guidance": typer.Option(help="Classifier-free guidance, w in l_c + w (l_c - l_0); 0 is off."),
    "guidance_schedule": typer.Option(help="Of w over the steps: constant, or from 0 to w: linear, cosine."),
    "schedule": typer.Option(help="Of the masked fraction: cosine, arccos, linear, square, cubic, root, log, exp."),
    "top_k": typer.Option(min=0, help="Draw from the k likeliest tokens; 0 = all."),
    "top_p": typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this total probability."),
    "revisions": typer.Option(min=0, help="Rounds in which a drafted image is drawn again, part by part."),
    "revise_steps": typer.Option(min=1, help="Parts of a revision."),
}


REQUEST: dict[str, tuple[Any, Any]] = {  # type and default of what makes up a `Request`, but for the count
    "label": (Labels, None),
    "text": (Texts, None),
    "texts": (TextFile, None),
    "sampling": (Sampling, inspect.Parameter.empty),
    "classifier": (Judge, None),
    "clip": (Clip, None),
    "keep_best": (KeepBest, 1.0),
    "seed": (Seed, 0),
    "batch_size": (DrawnAtOnce, 64),
}


def takes_sampling(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with an option for each field of `Sampling` where it has a keyword parameter `sampling`."""
    types = get_type_hints(Sampling)
    options = {name: (Annotated[types[name], option], getattr(Sampling(), name)) for name, option in SAMPLING.items()}
    return _takes(command, "sampling", options, lambda given: Sampling(**given))


def takes_request(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the options of `REQUEST` where it has a keyword parameter `request`: a function of the count and
    the device, which makes the `Request`, as reading a classifier takes time."""
    return takes_sampling(_takes(command, "request", REQUEST, lambda given: partial(_request, given)))


def _takes(
    command: Callable[..., None],
    name: str,
    options: Mapping[str, tuple[Any, Any]],
    make: Callable[[dict[str, Any]], Any],
) -> Callable[..., None]:
    """`command` with `options`, their types and defaults, in the place of its keyword parameter `name`, which becomes
    what is made of them."""
    hints, parameters = get_type_hints(command, include_extras=True), []
    for own, parameter in inspect.signature(command).parameters.items():
        if own != name:
            parameters.append(parameter.replace(annotation=hints[own]))
            continue
        for option, (kind, default) in options.items():
            keyword = inspect.Parameter.KEYWORD_ONLY
            parameters.append(inspect.Parameter(option, keyword, default=default, annotation=kind))

    @wraps(command)
    def run(*given: Any, **values: Any) -> None:
        made = make({option: values.pop(option) for option in options})
        command(*given, **{name: made}, **values)

    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _request(given: dict[str, Any], count: int, device: torch.device) -> Request:
    from latticode.runs.open import Run
    from latticode.sampling.request import Request
    from latticode.sampling.scores import LabelScore, load_clip

    given = dict(given)
    classifier, clip, file = given.pop("classifier"), given.pop("clip"), given.pop("texts")
    if classifier and clip:
        raise ValueError(f"give --classifier or --clip, not both; got {classifier} and {clip}")
    score = None
    if classifier:
        score = LabelScore(Run.open(classifier, device).classifier)
    elif clip:
        score = load_clip(clip, device)
    lines = file.read_text(encoding="utf-8").splitlines() if file else []
    texts = [*(given.pop("text") or ()), *(line.strip() for line in lines if line.strip())]
    return Request(count=count, labels=given.pop("label") or (), texts=texts, score=score, **given)


OwnSize = Annotated[bool, typer.Option("--own-size", help="Keep every image's size, padded to the stride.")]
Tile = Annotated[
    int | None,
    typer.Option(min=1, help="Work in overlapping tiles where an image is longer than this; default 1024."),
]
