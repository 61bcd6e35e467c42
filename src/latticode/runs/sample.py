"""Sample from a prior's run and edit images with it: files that say how they were drawn. What was cut off goes on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from latticode.core.files import read_json, write_json
from latticode.core.mappings import differences
from latticode.core.modules import device_of
from latticode.core.progress import progress
from latticode.core.types import Conditioning
from latticode.data import IMAGE, decode_image
from latticode.data.writing import save_png
from latticode.priors.base import check_sampling
from latticode.runs.open import Run, note_unused, read_example
from latticode.sampling import editing
from latticode.sampling.request import Request
from latticode.sampling.sampler import Asked, Sampler
from latticode.sampling.scores import record_of
from latticode.tokenizers.tokenizer import Tokenizer
from latticode.viz.pictures import grid_image, preview

GRID = 256  # samples shown in the grid at the most
LIST, LISTED = "samples.json", {"settings": dict, "files": list}
FILE = re.compile(r"sample-(\d+)\.(?:png|wav|webp)")


def sample(
    run: Run | Path | str,
    target: Path,
    request: Request = Request(),  # noqa: B008 (frozen)
    *,
    image: Path | None = None,
    keep: float = 0.5,
    overwrite: bool = False,
    console: Console,
) -> Path:
    """Draw the samples of `request` from a prior's run into `target`; returns the path of their grid.

    Args:
        run: of a prior, of any kind of data.
        target: gets a file for each sample, grid.png and samples.json. Those that it already holds are kept.
        request: which, and how they are drawn. Without labels and texts all classes are drawn in turn.
        image: a prompt: its tokens in the first `keep` of the grid's rows (of a clip's or recording's beginning) stay.
        overwrite: delete samples that were drawn with other settings, instead of refusing the folder.

    Raises ValueError for what does not fit the run, and for a folder with something else in it.
    """
    sampler, settings = _open(Run.open(run), request, console, every_class=True)
    if image is not None:
        if not 0 <= keep <= 1:
            raise ValueError(f"keep must be in [0, 1], a fraction of the prompt, got {keep}")
        known = _encoded(sampler.tokenizer, read_example(image, sampler.preprocess.shown())).clone()
        rows = round(keep * known.shape[1])
        known[:, rows:] = -1
        sampler = replace(sampler, known=known)
        settings |= {"image": image.name, "image_sha256": _digest(image), "kept": f"{rows}/{known.shape[1]}"}
    return _fill(target, sampler, settings, overwrite, console)


def edit(
    run: Run | Path | str,
    image: Path,
    target: Path,
    request: Request = Request(count=4),  # noqa: B008 (frozen)
    *,
    mask: Path | None = None,
    box: Sequence[int] | None = None,
    outpaint: Sequence[int] | None = None,
    overwrite: bool = False,
    console: Console,
) -> Path:
    """Draw variants of a part of an image anew (inpainting, outpainting), into `target` as `sample` does; returns the
    path of the grid, which begins with the image and with what is kept of it.

    Exactly one of these says which part, in the image's own pixels: `mask`, a picture of its size, white where to draw;
    `box`, (x, y, width, height); `outpaint`, (left, top, right, bottom) to add. The image is brought to the run's size
    first. Labels and texts of `request` say what to draw; without, nothing in particular. The rest as for `sample`.
    """
    ways: dict[str, Any] = {"mask": mask, "box": box, "outpaint": outpaint}
    given = {name: way for name, way in ways.items() if way is not None}
    if len(given) != 1:
        raise ValueError(f"give one of mask, box and outpaint, to say what to draw; got {', '.join(given) or 'none'}")
    run = Run.open(run)
    sampler, settings = _open(run, request, console)
    preprocess: Any = sampler.preprocess.shown()
    if preprocess.medium is not IMAGE:
        raise ValueError(f"only images can be edited; {run.folder} generates {preprocess.medium.noun}s")
    picture = decode_image(image.read_bytes(), image.name)
    if outpaint is not None:
        picture, white = editing.extended(picture, outpaint)
        if picture.width != picture.height and preprocess.crop != "squash":
            raise ValueError(
                f"the canvas must be square, or the run would crop it; got {picture.width}x{picture.height}"
            )
    elif box is not None:
        white = editing.box_hole(picture.size, box)
    else:
        assert mask is not None
        white = decode_image(mask.read_bytes(), mask.name)
    original, hole = editing.framed(picture, white, preprocess)
    tokenizer = sampler.tokenizer
    anew = editing.grid_mask(hole, tokenizer.strides).to(run.device)
    known = _encoded(tokenizer, original).masked_fill(anew[None, ..., None], -1)
    if sampler.prior.causal:
        name = type(sampler.prior).__name__
        console.print(f"{name} draws in order: what is kept informs only the tokens behind it", style="yellow")
    finish = partial(_pasted, original.to(run.device), hole.to(run.device), max(tokenizer.strides))
    settings |= {"image": image.name, "image_sha256": _digest(image)}
    settings |= {"mask": mask.name, "mask_sha256": _digest(mask)} if mask else {k: list(v) for k, v in given.items()}
    shown = torch.stack([original, torch.where(hole, 0.0, original)])
    sampler = replace(sampler, known=known, finish=finish)
    return _fill(target, sampler, settings, overwrite, console, shown)


def _open(run: Run, request: Request, console: Console, every_class: bool = False) -> tuple[Sampler, dict[str, Any]]:
    """What draws from the run, and the settings on which its samples depend."""
    prior, tokenizer, preprocess = run.prior, run.tokenizer, run.config.data.preprocess()
    check_sampling(request.sampling)
    prior.texts_of(Conditioning(texts=tuple(request.texts)), len(request.texts))  # raises for what it cannot read
    labels = run.label_numbers(request.labels)
    if not labels and not request.texts and every_class:
        labels = range(prior.classes)
    asked = Asked(tuple(labels), tuple(request.texts))
    settings = {"run": run.name, "prior": prior.fingerprint(), "tokenizer": tokenizer.fingerprint()}
    settings |= {"seed": request.seed, **vars(request.sampling)}
    if request.score is not None:
        if preprocess.medium is not IMAGE:
            raise ValueError(f"a classifier or score judges images, not {preprocess.medium.noun}s")
        if check := getattr(request.score, "check", None):
            check(asked.labels, prior.classes)
        settings |= {**record_of(request.score), "candidates": request.candidates}
    note_unused(prior, request.sampling, console)
    return Sampler(prior, tokenizer, preprocess, asked, request), settings


def _fill(
    target: Path,
    sampler: Sampler,
    settings: dict[str, Any],
    overwrite: bool,
    console: Console,
    shown: Tensor | None = None,
) -> Path:
    """Draw what `target` lacks of the samples, list all and picture the first, after `shown`."""
    asked, count = sampler.asked, sampler.request.count
    folder = settings | {"labels": list(asked.labels), "texts": list(asked.texts)}
    done = _claim(target, folder, overwrite)
    missing = [number for number in range(count) if number not in done]
    finished = count - len(missing)
    _list(target, folder, asked)
    try:
        with progress(console, "sample", count, start=finished) as advance:
            for first, number in _stretches(missing, max(1, sampler.request.batch_size // sampler.request.candidates)):
                for index, image in enumerate(sampler.draw(first, number), first):
                    about = settings | {"index": index} | asked.of(index)
                    sampler.preprocess.save(target / f"sample-{index:05d}", image, about)
                finished += number
                advance(finished)
    finally:
        _list(target, folder, asked)
    files = _numbered(target)
    images = torch.stack([read_example(files[i], sampler.preprocess) for i in range(min(count, GRID))])
    pictures, columns = preview(images if shown is None else torch.cat([shown, images]), sampler.preprocess)
    if shown is None and 1 < asked.period <= 16:  # what is alike stands below each other
        columns = max(columns // asked.period, 1) * asked.period
    grid = target / "grid.png"
    save_png(grid, grid_image(pictures, min(columns, len(pictures))), folder | {"count": count})
    return grid


def _claim(target: Path, settings: Mapping[str, Any], overwrite: bool) -> set[int]:
    """The numbers of the samples that `target` holds, all of these settings. Raises ValueError if there are others."""
    target.mkdir(parents=True, exist_ok=True)
    files, list_file = _numbered(target), target / LIST
    if overwrite:
        for path in files.values():
            path.unlink()
        return set()
    if files and not list_file.is_file():
        raise ValueError(f"{target} holds samples but no {LIST}: give another folder, or overwrite them")
    if files:
        old = read_json(list_file, LISTED)["settings"]
        if changes := differences(old, json.loads(json.dumps(settings))):
            raise ValueError(f"{target} holds samples of other settings: give another folder, or overwrite; {changes}")
    return set(files)


def _list(target: Path, settings: Mapping[str, Any], asked: Asked) -> None:
    """Write samples.json: the settings of all, and every file with what is its own."""
    files = [{"file": path.name, "index": n} | asked.of(n) for n, path in sorted(_numbered(target).items())]
    write_json(target / LIST, {"settings": settings, "files": files}, indent=1)


def _numbered(target: Path) -> dict[int, Path]:
    """The sample files by number."""
    return {int(match[1]): path for path in target.iterdir() if (match := FILE.fullmatch(path.name))}


def _stretches(numbers: Sequence[int], most: int) -> Iterator[tuple[int, int]]:
    """(first, count) of stretches of consecutive `numbers`, each of `most` at the most."""
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        stretch = [number for _, number in group]
        for start in range(0, len(stretch), most):
            yield stretch[start], len(stretch[start : start + most])


def _pasted(original: Tensor, hole: Tensor, width: int, generated: Tensor) -> Tensor:
    return editing.paste(original, generated, hole, width)


def _encoded(tokenizer: Tokenizer, values: Tensor) -> Tensor:
    """Codes (1, *grid, K) of one example (C, *size)."""
    with torch.inference_mode():
        return tokenizer.encode(values[None].to(device_of(tokenizer)))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
