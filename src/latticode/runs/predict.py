"""Predict depth, segments or colours for pictures at their own sizes: a PNG to look at, and the numbers as .npy."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from latticode.core.files import replacing
from latticode.core.modules import device_of, evaluating
from latticode.core.progress import progress
from latticode.core.types import Sampling
from latticode.core.values import to_float
from latticode.data import open_source
from latticode.data.media import ContentError
from latticode.data.writing import save_png
from latticode.dense.uvim import UViM
from latticode.priors.base import Prior
from latticode.runs.open import Run, greedy_unless_asked, note_unused
from latticode.viz.pictures import grid_image, with_legend


@dataclass(frozen=True)
class Predictions:
    """What was written.

    Examples:
        >>> result = Predictions("by the likeliest codes", [Path("out/room.png")], {"broken.jpg": "cannot be decoded"})
        >>> [picture.with_suffix(".npy").name for picture in result.files]
        ['room.npy']
    """

    way: str  # how the codes came about
    files: list[Path] = field(default_factory=list)  # the pictures; the numbers lie beside them as .npy
    skipped: dict[str, str] = field(default_factory=dict)  # name -> why


def predict(
    run: Run | Path | str,
    image: Path,
    target: Path,
    *,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    batch_size: int = 8,
    console: Console,
) -> Predictions:
    """Predict for a picture, or all of a folder or tar, and write NAME.png and NAME.npy into `target`.

    The numbers are (P, H, W) at the size of the picture: metres, class and instance, RGB in [-1, 1]. A picture is
    squashed to the run's size first. `run` is of stage II; of stage I, predictions are made without a code. What cannot
    be decoded is skipped. Raises ValueError for other runs, and if nothing can be decoded.
    """
    run = Run.open(run)
    uvim, prior = run.uvim, run.prior if run.config.kind == "prior" else None
    trained: Any = run.config.data.preprocess()
    if trained.shape is None:
        raise ValueError(f"{run.folder} has no size of its own: its data.size is not set")
    preprocess = trained.pictures()
    way = "without a code: the run is of stage I" if prior is None else "by the likeliest codes"
    if prior is not None:
        sampling = greedy_unless_asked(sampling)
        note_unused(prior, sampling, console)
        way = way if sampling.temperature == 0 else f"by codes drawn with seed {seed}"
    source = open_source(str(image), "all", medium=trained.medium)  # whose label maps are no photographs
    stems = [Path(source.name_of(i)).stem for i in range(len(source))]
    shared = Counter(stems)
    result = Predictions(way)

    target.mkdir(parents=True, exist_ok=True)
    waiting: list[tuple[int, Tensor, Tensor]] = []
    with evaluating(uvim, prior), progress(console, f"predict with {run.name}", len(source)) as advance:
        for i in range(len(source)):
            try:
                loaded = preprocess.load(source[i])
            except (ContentError, OSError) as error:
                result.skipped[source.name_of(i)] = str(error)
            else:
                own = torch.from_numpy(np.array(loaded[0])).movedim(-1, 0)
                waiting.append((i, own, torch.from_numpy(preprocess.arrange(loaded))))
            if len(waiting) == batch_size or (waiting and i == len(source) - 1):
                numbers, originals, inputs = zip(*waiting, strict=True)
                found = _solved(uvim, prior, torch.stack(inputs), sampling, seed, first=len(result.files))
                for number, own, prediction in zip(numbers, originals, found, strict=True):
                    stem = stems[number] if shared[stems[number]] == 1 else f"{number:06d}-{stems[number]}"
                    result.files.append(_written(uvim, prediction[None], own[None], target / stem))
                waiting.clear()
            advance(i + 1)
    if not result.files:
        raise ValueError("; ".join(result.skipped.values()) or f"{image} holds no pictures")
    return result


def _solved(uvim: UViM, prior: Prior | None, inputs: Tensor, sampling: Sampling, seed: int, first: int) -> Tensor:
    """(n, P, h, w) on the CPU, of pictures (n, 3, h, w) 0..255, of which the first is number `first`."""
    image = uvim.task.image(inputs.to(device_of(uvim)))
    codes = None
    if prior is not None:
        cond = prior.condition(images=image)
        codes = prior.sample(len(image), cond, sampling=sampling, seed=seed, first=first)
    return uvim.task.predict(uvim.solve(image, codes), image).cpu()


def _written(uvim: UViM, prediction: Tensor, own: Tensor, path: Path) -> Path:
    """Write a prediction (1, P, h, w) at the size of the photograph `own` (1, 3, H, W) uint8; returns the PNG."""
    prediction = uvim.task.enlarge(prediction, to_float(own))
    picture, numbers = path.with_name(f"{path.name}.png"), path.with_name(f"{path.name}.npy")
    save_png(picture, with_legend(grid_image(uvim.task.picture(prediction), 1, 0), uvim.task.legend(prediction)))
    with replacing(numbers) as temporary, temporary.open("wb") as file:
        np.save(file, prediction[0].numpy())
    return picture
