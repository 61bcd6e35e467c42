"""Run folders as the command line uses them: open what was trained, and score it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from latticode import registry
from latticode.data import Loader, Preparation, open_source
from latticode.engine.checkpoint import STATE
from latticode.engine.config import RunConfig, read_run
from latticode.engine.feed import open_loader
from latticode.engine.finetune import trained_objective
from latticode.engine.progress import progress
from latticode.evaluate import Reference, evaluate_classifier, evaluate_dense, evaluate_prior, evaluate_tokenizer
from latticode.evaluate.dense import GREEDY
from latticode.files import write_text
from latticode.losses.perceptual import LPIPS, FeatureDistance
from latticode.metrics.features import FeatureNetwork, feature_network
from latticode.objectives import PriorClassificationObjective
from latticode.pretrained import load_model
from latticode.priors.base import Prior
from latticode.registry import nearest
from latticode.types import Sampling
from latticode.uvim import UViM
from latticode.values import to_float


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


def open_dense(run: Path, device: str = "auto") -> tuple[RunConfig, UViM, Prior | None]:
    """Config and model of a dense task's run and, if it is of stage II, the prior of its codes.

    Raises ValueError for other runs.
    """
    config = read_run(run)
    place = pick_device(device)
    model = load_model(run).to(place)
    uvim = load_model(run / "tokenizer").to(place) if isinstance(model, Prior) else model
    if not isinstance(uvim, UViM):
        kind = type(model).__name__
        raise ValueError(f"{run} is the run of a {kind}; one of a uvim, or of a prior of its codes, is needed")
    return config, uvim, model if isinstance(model, Prior) else None


def greedy_unless_asked(sampling: Sampling) -> Sampling:
    """The likeliest codes, unless some option of sampling was set: a prediction is no draw."""
    return GREEDY if sampling == Sampling() else sampling


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


def read_example(path: Path, preprocess: Preparation) -> Tensor:
    """The one image, recording or clip in a file: (C, *size) in [-1, 1], without augmentation."""
    record = open_source(str(path), "all", medium=preprocess.medium)[0]
    values = torch.tensor(preprocess.arrange(preprocess.load(record)))
    return to_float(values) if values.dtype == torch.uint8 else values


def label_numbers(config: RunConfig, labels: Sequence[str], classes: int) -> list[int]:
    """The labels that the user means: numbers, -1 = none, or names of the classes of the run's data.

    Only for names is the data's source opened. Raises ValueError for a number outside [-1, classes) or unknown names.
    """
    names: tuple[str, ...] = ()
    if not all(_is_number(label) for label in labels):
        data = config.data
        names = open_source(data.source, "all", holdout=data.holdout, medium=data.preprocess().medium).classes
    numbers = []
    for label in labels:
        if not _is_number(label) and label not in names:
            raise ValueError(f"no class is called {label!r}{nearest(label, names)}; or give a number")
        number = int(label) if _is_number(label) else names.index(label)
        if not -1 <= number < classes:
            valid = f"0 .. {classes - 1}, or -1 for none" if classes else "none, the prior is unconditional"
            raise ValueError(f"label {label} is not a class; valid: {valid}")
        numbers.append(number)
    return numbers


def note_unused(prior: Prior, sampling: Sampling, console: Console) -> None:
    """Say which of the options that were set the prior has no use for."""
    changed = [name for name, value in vars(sampling).items() if value != getattr(Sampling(), name)]
    if unused := [name for name in changed if name not in prior.uses]:
        console.print(f"{type(prior).__name__} has no use for {', '.join(unused)}", style="yellow")


def network_of(features: str, device: torch.device | str) -> FeatureNetwork:
    """The feature network that `features`, "inception" or the folder of a classifier's run, names."""
    name, path = ("inception", None) if features == "inception" else ("classifier", features)
    return feature_network(name, path=path, device=device)


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
    references: dict[str, Reference] | None = None,
    device: str = "auto",
    console: Console,
) -> dict[str, Any]:
    """Score the run on `split` of `source` (default: its own data), write `evaluation.json` and return it.

    `own_size` and `tile` as for encoding and `perceptual`, "lpips" or the folder of a classifier's run, are for
    tokenizers. Runs of dense tasks, of either stage, are scored as `evaluate_dense` says; the codes of stage II are the
    likeliest unless `sampling` is not the default. Calls that share `references` look at a training set only once, and
    do not notice that it changes. Raises ValueError for what does not fit the run.
    """
    config = read_run(run).on(source)
    if config.kind != "tokenizer" and (own_size or perceptual):
        raise ValueError(f"own sizes and perceptual distances are of tokenizers; {run} is the run of a {config.kind}")
    place = pick_device(device)
    if config.kind == "tokenizer":
        loader = open_whole(config, config.data.source, split, own_size=own_size)
    else:
        loader = open_loader(config, split, batch_size=64)
    network = None
    if features is not None:
        network = network_of(features, place)
    protocol = {
        "source": config.data.source,
        "split": split,
        "preprocessing": loader.preprocess.record(),
        "augmentation": "none: nothing is flipped, and of crop 'random' the centred window is taken",
        "ema": config.ema,
        "run": run.name,
    }
    model = load_model(run).to(place)
    coder = load_model(run / "tokenizer").to(place) if config.kind == "prior" else model
    dense = isinstance(coder, UViM)
    if dense and (own_size or perceptual or tile or classifier):
        raise ValueError(f"own sizes, tiles, perceptual distances and classifiers are not for dense tasks, as of {run}")
    if config.kind == "prior":
        sampling = greedy_unless_asked(sampling) if dense else sampling
        note_unused(model, sampling, console)
    with watched(console, f"evaluate {run.name}") as watch:
        shared: dict[str, Any] = {"limit": limit, "protocol": protocol, "progress": watch}
        if dense:
            prior = model if config.kind == "prior" else None
            result = evaluate_dense(
                coder, loader, prior=prior, sampling=sampling, seed=seed, features=network, **shared
            )
        elif config.kind == "tokenizer":
            eyes = None
            if perceptual is not None:
                eyes = (LPIPS() if perceptual == "lpips" else FeatureDistance(perceptual)).to(place)
            result = evaluate_tokenizer(model, loader, features=network, perceptual=eyes, tile=tile, **shared)
        elif config.kind == "classifier":
            result = evaluate_classifier(model, loader, **shared)
        else:
            result = evaluate_prior(
                model,
                coder,
                loader,
                features=network,
                reference=_reference(config, network, {} if references is None else references) if network else None,
                classifier=open_model(classifier, "classifier", device)[1] if classifier else None,
                samples=samples,
                sampling=sampling,
                seed=seed,
                label_of=_head(run, config, model),
                **shared,
            )
    write_text(run / "evaluation.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def _reference(config: RunConfig, network: FeatureNetwork, known: dict[str, Reference]) -> Reference:
    key = f"{network.weights} {config.data.model_dump_json()}"
    if key not in known:
        known[key] = Reference(open_loader(config, "train", batch_size=64))
    return known[key]


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


def _head(run: Path, config: RunConfig, prior: Prior) -> Callable[[Tensor], Tensor] | None:
    """Codes to logits of labels, where a prior was trained with a head and the training's state is still there."""
    trained = issubclass(registry.resolve(config.objective["type"]), PriorClassificationObjective)
    if not trained or not (run / STATE).is_file():
        return None
    return partial(trained_objective(run, config).to(prior.device).classify, prior)


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal()
