"""Samples and edits of a prior's run, as files that say how they were made. What was cut off goes on."""

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

from latticode.core.files import write_text
from latticode.core.mappings import differences
from latticode.core.modules import device_of
from latticode.core.progress import progress
from latticode.core.types import Conditioning, Sampling
from latticode.data import IMAGE, Preparation, Preprocess, decode_image
from latticode.data.writing import save_example, save_png
from latticode.priors.base import check_sampling
from latticode.runs.open import label_numbers, note_unused, open_model, open_tokenizer, read_example
from latticode.sampling import editing
from latticode.sampling.sampler import Asked, Sampler
from latticode.sampling.scores import Score, label_score
from latticode.tokenizers.tokenizer import Tokenizer
from latticode.viz.pictures import grid_image, preview

GRID = 256  # samples shown in the grid at the most
LIST = "samples.json"
FILE = re.compile(r"sample-(\d+)\.(?:png|wav|webp)")


def sample(
    run: Path,
    target: Path,
    count: int,
    *,
    labels: Sequence[str] = (),
    texts: Sequence[str] = (),
    image: Path | None = None,
    keep: float = 0.5,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    classifier: Path | None = None,
    score: Score | None = None,
    keep_best: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    overwrite: bool = False,
    console: Console,
) -> Path:
    """Draw the samples 0 to `count - 1` of a prior's run into `target`; returns the path of their grid.

    Args:
        run: of a prior, of any kind of data.
        target: gets a file for each sample, grid.png and samples.json. Those that it already holds are kept.
        count: how many.
        labels: numbers, -1 for none, or names of classes, in turn; none asks for all classes in turn.
        texts: captions in turn.
        image: a prompt: its tokens in the first `keep` of the grid's rows (of a clip's or recording's beginning) stay.
        sampling, seed: of the draws.
        classifier, score, keep_best: with 0.25, each sample is that of four draws which the classifier's run takes for
            its label with the highest probability, or which `score` (`latticode.sampling.scores`) prefers.
        batch_size: how many are drawn at once; changes nothing else.
        overwrite: delete samples that were drawn with other settings, instead of refusing the folder.

    Raises ValueError for what does not fit the run, and for a folder with something else in it.
    """
    sampler, settings = _open(
        run, labels, texts, sampling, classifier, score, keep_best, seed, device, console, every_class=True
    )
    if image is not None:
        if not 0 <= keep <= 1:
            raise ValueError(f"keep must be in [0, 1], a fraction of the prompt, got {keep}")
        known = _encoded(sampler.tokenizer, read_example(image, _whole(sampler.preprocess))).clone()
        rows = round(keep * known.shape[1])
        known[:, rows:] = -1
        sampler = replace(sampler, known=known)
        settings |= {"image": image.name, "image_sha256": _digest(image), "kept": f"{rows}/{known.shape[1]}"}
    return _fill(target, sampler, settings, count, batch_size, overwrite, console)


def edit(
    run: Path,
    image: Path,
    target: Path,
    count: int = 4,
    *,
    mask: Path | None = None,
    box: Sequence[int] | None = None,
    outpaint: Sequence[int] | None = None,
    labels: Sequence[str] = (),
    texts: Sequence[str] = (),
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    classifier: Path | None = None,
    score: Score | None = None,
    keep_best: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    overwrite: bool = False,
    console: Console,
) -> Path:
    """Draw `count` variants of a part of an image anew, into `target` as `sample` does; returns the path of the grid,
    which begins with the image and with what is kept of it.

    Exactly one of these says which part, in the image's own pixels: `mask`, a picture of its size, white where to draw;
    `box`, (x, y, width, height); `outpaint`, (left, top, right, bottom) to add. The image is brought to the run's size
    first. Labels and texts say what to draw; without, nothing in particular. The rest as for `sample`.
    """
    ways: dict[str, Any] = {"mask": mask, "box": box, "outpaint": outpaint}
    given = {name: way for name, way in ways.items() if way is not None}
    if len(given) != 1:
        raise ValueError(f"give one of mask, box and outpaint, to say what to draw; got {', '.join(given) or 'none'}")
    sampler, settings = _open(run, labels, texts, sampling, classifier, score, keep_best, seed, device, console)
    preprocess = _whole(sampler.preprocess)
    if not isinstance(preprocess, Preprocess):
        raise ValueError(f"only images can be edited; {run} generates {preprocess.medium.noun}s")
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
    anew = editing.grid_mask(hole, tokenizer.strides).to(sampler.prior.device)
    known = _encoded(tokenizer, original).masked_fill(anew[None, ..., None], -1)
    if sampler.prior.causal:
        name = type(sampler.prior).__name__
        console.print(f"{name} draws in order: what is kept informs only the tokens behind it", style="yellow")
    place = sampler.prior.device
    finish = partial(_pasted, original.to(place), hole.to(place), max(tokenizer.strides))
    settings |= {"image": image.name, "image_sha256": _digest(image)}
    settings |= {"mask": mask.name, "mask_sha256": _digest(mask)} if mask else {k: list(v) for k, v in given.items()}
    shown = torch.stack([original, torch.where(hole, 0.0, original)])
    sampler = replace(sampler, known=known, finish=finish)
    return _fill(target, sampler, settings, count, batch_size, overwrite, console, shown)


def _open(
    run: Path,
    labels: Sequence[str],
    texts: Sequence[str],
    sampling: Sampling,
    classifier: Path | None,
    score: Score | None,
    keep_best: float,
    seed: int,
    device: str,
    console: Console,
    every_class: bool = False,
) -> tuple[Sampler, dict[str, Any]]:
    """What draws from the run, and the settings on which its samples depend."""
    config, prior = open_model(run, "prior", device)
    _, tokenizer = open_tokenizer(run, device)
    check_sampling(sampling)
    prior.texts_of(Conditioning(texts=tuple(texts)), len(texts))  # raises for what it cannot read
    numbers = label_numbers(config, labels, prior.classes)
    if not numbers and not texts and every_class:
        numbers = range(prior.classes)
    sampler = Sampler(prior, tokenizer, config.data.preprocess(), Asked(tuple(numbers), tuple(texts)), sampling, seed)
    settings = {"run": run.name, "prior": prior.fingerprint(), "tokenizer": tokenizer.fingerprint(), "seed": seed}
    settings |= vars(sampling)
    if classifier is not None or score is not None or keep_best != 1:
        sampler, about = _judged(sampler, classifier, score, keep_best, device)
        settings |= about
    note_unused(prior, sampling, console)
    return sampler, settings


def _judged(
    sampler: Sampler, classifier: Path | None, score: Score | None, keep_best: float, device: str
) -> tuple[Sampler, dict[str, Any]]:
    """`sampler` with rejection, and what to record of it."""
    if (classifier is None) == (score is None) or not 0 < keep_best < 1:
        given = f"classifier {classifier}, score {score} and keep_best {keep_best:g}"
        raise ValueError(f"rejection needs a classifier or a score, and a keep_best in (0, 1), got {given}")
    if sampler.preprocess.medium is not IMAGE:
        raise ValueError(f"a classifier or score judges images, not {sampler.preprocess.medium.noun}s")
    candidates = round(1 / keep_best)
    if score is not None:
        about = {"score": getattr(score, "name", type(score).__name__), "candidates": candidates}
        return replace(sampler, score=score, candidates=candidates), about
    assert classifier is not None
    if min(sampler.asked.labels, default=-1) < 0:
        raise ValueError("rejection by a classifier needs a label for every sample")
    judge = open_model(classifier, "classifier", device)[1]
    if judge.classes != sampler.prior.classes:
        raise ValueError(f"the classifier knows {judge.classes} classes and the prior {sampler.prior.classes}")
    about = {"classifier": judge.fingerprint(), "candidates": candidates}
    return replace(sampler, score=label_score(judge), candidates=candidates), about


def _fill(
    target: Path,
    sampler: Sampler,
    settings: dict[str, Any],
    count: int,
    batch_size: int,
    overwrite: bool,
    console: Console,
    shown: Tensor | None = None,
) -> Path:
    """Draw what `target` lacks of the samples 0 to count - 1, list all and picture the first, after `shown`."""
    asked = sampler.asked
    folder = settings | {"labels": list(asked.labels), "texts": list(asked.texts)}
    done = _claim(target, folder, overwrite)
    missing = [number for number in range(count) if number not in done]
    finished = count - len(missing)
    _list(target, folder, asked)
    try:
        with progress(console, "sample", count, start=finished) as advance:
            for first, number in _stretches(missing, max(1, batch_size // sampler.candidates)):
                for index, image in enumerate(sampler.draw(first, number, batch_size), first):
                    about = settings | {"index": index} | asked.of(index)
                    save_example(target / f"sample-{index:05d}", image, sampler.preprocess, about)
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
        old = json.loads(list_file.read_text(encoding="utf-8"))["settings"]
        if changes := differences(old, json.loads(json.dumps(settings))):
            raise ValueError(f"{target} holds samples of other settings: give another folder, or overwrite; {changes}")
    return set(files)


def _list(target: Path, settings: Mapping[str, Any], asked: Asked) -> None:
    """Write samples.json: the settings of all, and every file with what is its own."""
    files = [{"file": path.name, "index": n} | asked.of(n) for n, path in sorted(_numbered(target).items())]
    write_text(target / LIST, json.dumps({"settings": settings, "files": files}, indent=1, allow_nan=False) + "\n")


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


def _whole(preprocess: Preparation) -> Preparation:
    """Brings what a user shows to the run's size: a run that trained on windows of large images sees all of it."""
    preprocess = preprocess.still()
    if isinstance(preprocess, Preprocess) and preprocess.crop == "random":
        return replace(preprocess, crop="center")
    return preprocess


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
