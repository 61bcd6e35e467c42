"""Run folders as the command line uses them: open what was trained, score it, draw from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from latticode.data import Loader, open_source
from latticode.engine.config import RunConfig, read_run
from latticode.engine.feed import open_loader
from latticode.engine.progress import progress
from latticode.evaluate import evaluate_classifier, evaluate_prior, evaluate_tokenizer
from latticode.files import write_text
from latticode.losses.perceptual import LPIPS, FeatureDistance
from latticode.metrics.features import feature_network
from latticode.outputs import preview, save_example
from latticode.pictures import grid_image, save_png
from latticode.pretrained import load_model
from latticode.types import Conditioning, Sampling

GRID = 256  # samples shown in the grid at the most


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name, or the best there is. Raises ValueError for one that this machine has not."""
    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r}: {str(error).splitlines()[0]}") from None


def open_model(run: Path, kind: str, device: str = "auto") -> tuple[RunConfig, Any]:
    """Config and model of a run, which must have trained a `kind`."""
    config = read_run(run)
    if config.kind != kind:
        raise ValueError(f"{run} is the run of a {config.kind}; a {kind}'s is needed")
    return config, load_model(run).to(pick_device(device))


def open_tokenizer(run: Path, device: str = "auto") -> tuple[RunConfig, Any]:
    """Config and tokenizer of a tokenizer's or a prior's run."""
    config = read_run(run)
    if config.kind == "prior":
        return config, load_model(run / "tokenizer").to(pick_device(device))
    return open_model(run, "tokenizer", device)


def open_whole(config: RunConfig, source: str, split: str, *, own_size: bool = False, batch_size: int = 64) -> Loader:
    """`source` for the tokenizer of a run: images as they were for training or at their `own_size`, recordings and
    clips from beginning to end. What has no common size comes one by one."""
    preprocess = config.data.preprocess().whole()
    preprocess = preprocess.own_size() if own_size else preprocess
    return Loader(
        open_source(source, split, holdout=config.data.holdout, medium=preprocess.medium),
        preprocess,
        batch_size if preprocess.shape else 1,
        workers=config.data.workers,
    )


def sample(
    run: Path,
    target: Path,
    count: int,
    *,
    label: int | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    console: Console,
) -> Path:
    """Draw `count` samples of a prior's run into `target`: one file each and grid.png, whose path is returned.

    `label` None asks for all classes in turn. The settings stand in the metadata of every PNG.
    """
    config, prior = open_model(run, "prior", device)
    _, tokenizer = open_tokenizer(run, device)
    if label is not None and not 0 <= label < prior.classes:
        valid = f"0 .. {prior.classes - 1}" if prior.classes else "none, the prior is unconditional"
        raise ValueError(f"label {label} is not a class; valid: {valid}")
    labels = torch.arange(count) % max(prior.classes, 1) if label is None else torch.full((count,), label)
    settings: dict[str, Any] = {"run": run.name, "seed": seed, **vars(sampling)}
    preprocess = config.data.preprocess()
    shown: list[np.ndarray] = []
    columns = 8
    with progress(console, "sample", count) as advance, torch.inference_mode():
        for first in range(0, count, batch_size):
            part = labels[first : first + batch_size].to(pick_device(device))
            cond = Conditioning(part) if prior.classes else None
            codes = prior.sample(len(part), cond, sampling=sampling, seed=seed, first=first)
            images = tokenizer.decode(codes, preprocess.shape[1:] if preprocess.shape else None).cpu()
            for index, image in enumerate(images, first):
                about = settings | {"index": index} | ({"label": int(labels[index])} if prior.classes else {})
                save_example(target / f"sample-{index:05d}", image, preprocess, about)
            pictures, columns = preview(images, preprocess)
            shown += list(pictures[: max(0, GRID - len(shown))])
            advance(first + len(part))
    columns = prior.classes if label is None and 1 < prior.classes <= 16 else columns
    grid = target / "grid.png"
    save_png(grid, grid_image(np.stack(shown), min(columns, count)), settings | {"count": count, "label": label})
    return grid


def evaluate(
    run: Path,
    source: str | None = None,
    split: str = "test",
    *,
    own_size: bool = False,
    tile: int | None = None,
    features: str | None = None,
    perceptual: str | None = None,
    classifier: Path | None = None,
    samples: int = 1000,
    limit: int | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    device: str = "auto",
    console: Console,
) -> dict[str, Any]:
    """Score the run on `split` of `source` (default: its own data), write `evaluation.json` and return it.

    `own_size` and `tile` as for encoding and `perceptual`, "lpips" or the folder of a classifier's run, are for
    tokenizers. Raises ValueError for what does not fit the run.
    """
    config = read_run(run)
    if config.kind != "tokenizer" and (own_size or perceptual):
        raise ValueError(f"own sizes and perceptual distances are of tokenizers; {run} is the run of a {config.kind}")
    if source is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"source": source})})
    place = pick_device(device)
    if config.kind == "tokenizer":
        loader = open_whole(config, config.data.source, split, own_size=own_size)
    else:
        loader = open_loader(config, split, batch_size=64)
    network = None
    if features is not None:
        name, path = ("inception", None) if features == "inception" else ("classifier", features)
        network = feature_network(name, path=path, device=place)
    protocol = {
        "source": config.data.source,
        "split": split,
        "preprocessing": loader.preprocess.record(),
        "augmentation": "none: nothing is flipped, and of crop 'random' the centred window is taken",
        "ema": config.ema,
        "run": run.name,
    }
    model = load_model(run).to(place)
    with watched(console, f"evaluate {run.name}") as watch:
        shared: dict[str, Any] = {"limit": limit, "protocol": protocol, "progress": watch}
        if config.kind == "tokenizer":
            eyes = None
            if perceptual is not None:
                eyes = (LPIPS() if perceptual == "lpips" else FeatureDistance(perceptual)).to(place)
            result = evaluate_tokenizer(model, loader, features=network, perceptual=eyes, tile=tile, **shared)
        elif config.kind == "classifier":
            result = evaluate_classifier(model, loader, **shared)
        else:
            result = evaluate_prior(
                model,
                load_model(run / "tokenizer").to(place),
                loader,
                features=network,
                reference=open_loader(config, "train", batch_size=64) if network else None,
                classifier=open_model(classifier, "classifier", device)[1] if classifier else None,
                samples=samples,
                sampling=sampling,
                seed=seed,
                **shared,
            )
    write_text(run / "evaluation.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


@contextmanager
def watched(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar whose total is known only once the work reports it: yields hook(done, total)."""
    with ExitStack() as stack:
        advance: Callable[..., None] | None = None

        def hook(done: int, total: int) -> None:
            nonlocal advance
            if advance is None:
                advance = stack.enter_context(progress(console, title, total))
            advance(done)

        yield hook
