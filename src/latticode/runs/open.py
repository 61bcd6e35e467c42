"""A run folder opened, `Run`: its configuration, model and tokenizer, read once, and the data that fit them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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
from latticode.metrics.classifier import Classifier
from latticode.metrics.features import FeatureNetwork, feature_network
from latticode.priors.base import Prior
from latticode.tokenizers.tokenizer import Tokenizer


def pick_device(name: torch.device | str = "auto") -> torch.device:
    """The device of that name, or the best there is. Raises ValueError for one that this machine has not."""
    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r}: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True, eq=False)
class Run:
    """A trained run: its configuration, and its models, which are read once, at their first use.

    Everything here raises ValueError for the run of another kind.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from rich.console import Console
        >>> from latticode.engine import load_config, train
        >>> overrides = ["data.source=embedded:digits", "data.size=8", "data.channels=1", "data.workers=0", "steps=1"]
        >>> config = load_config("classifier", [*overrides, "batch_size=4", "classifier.width=4"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trained = train(config, Path(folder) / "judge", console=Console(quiet=True))
        ...     run = Run.open(trained, "cpu")
        ...     run.name, run.config.kind, run.classifier.classes
        ('judge', 'classifier', 10)
    """

    folder: Path
    config: RunConfig
    device: torch.device

    @classmethod
    def open(cls, run: Run | Path | str, device: torch.device | str = "auto") -> Run:
        """The run in a folder, for `device`; one that is open already stays where it is.

        Raises ConfigError for a folder that holds no run, ValueError for a device that this machine has not.
        """
        if isinstance(run, Run):
            return run
        return cls(Path(run), read_run(Path(run)), pick_device(device))

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.folder.name

    @cached_property
    def model(self) -> Any:
        """What was trained, in eval mode."""
        return load_model(self.folder).to(self.device)

    @cached_property
    def coder(self) -> Any:
        """What makes the codes: the trained tokenizer or model of a dense task, or the one that a prior was trained
        over. All are a `Coder`."""
        if self.config.kind != "prior":
            return self._of("tokenizer")
        return load_model(self.folder / "tokenizer").to(self.device)

    @property
    def tokenizer(self) -> Tokenizer:
        """The coder, if its codes can be decoded by themselves."""
        if self.coder.guides:
            raise ValueError(
                f"{self.folder} is of a dense task, whose codes can only be used beside an image; see predict"
            )
        return self.coder

    @property
    def uvim(self) -> UViM:
        """The model of a dense task, of whose codes a prior may have been trained."""
        if self.config.kind == "classifier" or not self.coder.guides:
            kind = type(self.model).__name__
            raise ValueError(
                f"{self.folder} is the run of a {kind}; one of a uvim, or of a prior of its codes, is needed"
            )
        return self.coder

    @property
    def prior(self) -> Prior:
        """The model of a prior's run. Raises ValueError for a run of another kind."""
        return self._of("prior")

    @property
    def classifier(self) -> Classifier:
        """The model of a classifier's run. Raises ValueError for a run of another kind."""
        return self._of("classifier")

    def _of(self, kind: str) -> Any:
        if self.config.kind != kind:
            raise ValueError(f"{self.folder} is the run of a {self.config.kind}; a {kind}'s is needed")
        return self.model

    def whole(
        self, source: str | None = None, split: str = "test", *, own_size: bool = False, batch_size: int = 64
    ) -> Loader:
        """`source` (default: the run's own) for its tokenizer: images as they were for training or at their `own_size`,
        recordings and clips from beginning to end. What has no common size comes one by one."""
        data = self.config.data
        preprocess = data.preprocess().whole()
        preprocess = preprocess.own_size() if own_size else preprocess
        return Loader(
            open_source(source or data.source, split, holdout=data.holdout, medium=preprocess.medium),
            preprocess,
            batch_size if preprocess.shape else 1,
            workers=data.workers,
        )

    def label_numbers(self, labels: Sequence[str]) -> list[int]:
        """The labels that the user means: numbers, -1 = none, or names of the classes of the run's data.

        Only for names is the data's source opened. Raises ValueError for a number outside [-1, classes) of the prior or
        unknown names.
        """
        names: tuple[str, ...] = ()
        if not all(_is_number(label) for label in labels):
            data = self.config.data
            names = open_source(data.source, "all", holdout=data.holdout, medium=data.preprocess().medium).classes
        numbers, classes = [], self.prior.classes
        for label in labels:
            if not _is_number(label) and label not in names:
                raise ValueError(f"no class is called {label!r}{nearest(label, names)}; or give a number")
            number = int(label) if _is_number(label) else names.index(label)
            if not -1 <= number < classes:
                valid = f"0 .. {classes - 1}, or -1 for none" if classes else "none, the prior is unconditional"
                raise ValueError(f"label {label} is not a class; valid: {valid}")
            numbers.append(number)
        return numbers


def greedy_unless_asked(sampling: Sampling) -> Sampling:
    """The likeliest codes, unless some option of sampling was set: a prediction is no draw."""
    return GREEDY if sampling == Sampling() else sampling


def read_example(path: Path, preprocess: Preparation) -> Tensor:
    """The one image, recording or clip in a file: (C, *size) in [-1, 1], without augmentation."""
    record = open_source(str(path), "all", medium=preprocess.medium)[0]
    values = torch.tensor(preprocess.arrange(preprocess.load(record)))
    return to_float(values) if values.dtype == torch.uint8 else values


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
