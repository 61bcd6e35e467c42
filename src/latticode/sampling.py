"""Samples and edits of a prior's run, as files that say how they were made. What was cut off goes on."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from latticode import editing
from latticode.data import IMAGE, Preparation, Preprocess, decode_image
from latticode.engine.config import differences
from latticode.engine.progress import progress
from latticode.files import write_text
from latticode.outputs import preview, save_example
from latticode.pictures import grid_image, save_png
from latticode.priors.base import Prior, check_sampling
from latticode.runs import label_numbers, note_unused, open_model, open_tokenizer, read_example
from latticode.scores import Score, label_score
from latticode.tokenizer import Tokenizer
from latticode.types import Conditioning, Sampling

GRID = 256  # samples shown in the grid at the most
TOGETHER = {"cpu": 1}  # samples decoded at once, 8 elsewhere
LIST = "samples.json"
FILE = re.compile(r"sample-(\d+)\.(?:png|wav|webp)")


@dataclass(frozen=True)
class Asked:
    """What the samples show: sample i the i-th of the labels and of the texts, which begin again at their end."""

    labels: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()

    @property
    def period(self) -> int:
        return math.lcm(len(self.labels) or 1, len(self.texts) or 1)

    def of(self, number: int) -> dict[str, Any]:
        label = {"label": self.labels[number % len(self.labels)]} if self.labels else {}
        return label | ({"text": self.texts[number % len(self.texts)]} if self.texts else {})

    def condition(self, numbers: Iterable[int]) -> Conditioning:
        rows = [self.of(number) for number in numbers]
        labels = torch.tensor([row["label"] for row in rows]) if self.labels else None
        return Conditioning(labels, tuple(row["text"] for row in rows) if self.texts else None)


@dataclass(frozen=True)
class Sampler:
    """Draws the samples of a seed by their number, each the same in whatever company it is drawn."""

    prior: Prior
    tokenizer: Tokenizer
    preprocess: Preparation
    asked: Asked
    sampling: Sampling
    seed: int
    score: Score | None = None
    candidates: int = 1  # sample i is the best by `score` of the draws i * candidates ... (i + 1) * candidates - 1
    known: Tensor | None = None  # (1, *grid, K), -1 where to draw
    finish: Callable[[Tensor], Tensor] | None = None  # of what was decoded

    def draw(self, first: int, count: int, batch_size: int) -> Tensor:
        """The samples number `first` to `first + count - 1` (count, C, *size), with `batch_size` draws at once."""
        n = self.candidates
        start, end = first * n, (first + count) * n
        parts, scores = [], []
        for at in range(start, end, batch_size):
            numbers = range(at, min(at + batch_size, end))
            condition = self.asked.condition(number // n for number in numbers)
            images = self._images(at, len(numbers), condition)
            parts.append(images.cpu())
            if self.score is not None:
                scores.append(self.score(images, condition).cpu())
                if scores[-1].shape != (len(numbers),) or scores[-1].isnan().any():
                    raise ValueError(f"a score must give a number for each of {len(numbers)} samples, got {scores[-1]}")
        images = torch.cat(parts)
        if self.score is None:
            return images
        best = torch.cat(scores).view(count, n).argmax(1)
        return images.unflatten(0, (count, n))[torch.arange(count), best]

    def _images(self, first: int, count: int, condition: Conditioning) -> Tensor:
        known = None if self.known is None else self.known.expand(count, *self.known.shape[1:])
        options: dict[str, Any] = {"sampling": self.sampling, "seed": self.seed, "first": first, "known": known}
        with torch.inference_mode():
            images = self._decoded(self.prior.sample(count, condition, **options), first)
            return images if self.finish is None else self.finish(images)

    def _decoded(self, codes: Tensor, first: int) -> Tensor:
        """Decoded in batches of one size in which every sample has its own place: a batch of another size rounds the
        last bits differently, and with them a pixel now and then. On a CPU one by one, which of large images is no
        slower."""
        size = TOGETHER.get(codes.device.type, 8)
        lead = first % size
        filled = torch.cat([codes[:1].expand(lead, *codes.shape[1:]), codes])
        filled = torch.cat([filled, codes[:1].expand(-len(filled) % size, *codes.shape[1:])])
        shape = self.preprocess.shape
        images = [self.tokenizer.decode(part, shape[1:] if shape else None) for part in filled.split(size)]
        return torch.cat(images)[lead : lead + len(codes)]


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
            its label with the highest probability, or which `score` (`latticode.scores`) prefers.
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
        return tokenizer.encode(values[None].to(next(tokenizer.parameters()).device))


def _whole(preprocess: Preparation) -> Preparation:
    """Brings what a user shows to the run's size: a run that trained on windows of large images sees all of it."""
    preprocess = preprocess.still()
    if isinstance(preprocess, Preprocess) and preprocess.crop == "random":
        return replace(preprocess, crop="center")
    return preprocess


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
