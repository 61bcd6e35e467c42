"""Run folders opened: config, model and tokenizer, and the data that fit them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from latticode.core.pretrained import load_model
from latticode.core.registry import nearest
from latticode.core.types import Sampling
from latticode.core.values import to_float
from latticode.data import Loader, Preparation, open_source
from latticode.dense.uvim import UViM
from latticode.engine.config import RunConfig, read_run
from latticode.evaluate.dense import GREEDY
from latticode.metrics.features import FeatureNetwork, feature_network
from latticode.priors.base import Prior


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


def _is_number(label: str) -> bool:
    return label.removeprefix("-").isdecimal()
