"""What training optimizes, as turns of players.

An objective is built from a spec like any module, so it can own networks that the trained model does not (a critic).
`players` names the modules that are optimized; `turns` yields one (player, unweighted loss terms) after another, and
the engine weighs, backpropagates into that player alone and steps. A generator may share one forward between turns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from latticode.losses import PIXEL_TERMS
from latticode.registry import SpecError, nearest
from latticode.types import Batch, CodeBatch, Conditioning

Turn = tuple[str, Mapping[str, Tensor]]


class Objective(nn.Module, ABC):
    @abstractmethod
    def players(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules to optimize by name; the trained model is the first."""

    @abstractmethod
    def turns(self, model: Any, batch: Any, step: int) -> Iterator[Turn]:
        """One player after another with its unweighted terms on `batch`."""


class ReconstructionObjective(Objective):
    """A tokenizer's: pixel losses by name (`l1`, `mse`) and whatever losses its quantizer returns."""

    def __init__(self, terms: Sequence[str] = ("mse",)):
        super().__init__()
        for name in terms:
            if name not in PIXEL_TERMS:
                raise SpecError(f"unknown pixel loss {name!r}{nearest(name, PIXEL_TERMS)}")
        self.terms = list(terms)

    def players(self, model: nn.Module) -> dict[str, nn.Module]:
        return {"tokenizer": model}

    def turns(self, model: Any, batch: Batch, step: int) -> Iterator[Turn]:
        result = model(batch.inputs)
        yield "tokenizer", {n: PIXEL_TERMS[n](result.output, batch.inputs) for n in self.terms} | dict(result.losses)


class PriorObjective(Objective):
    """A prior's own loss on codes, told the label where there is one."""

    def players(self, model: nn.Module) -> dict[str, nn.Module]:
        return {"prior": model}

    def turns(self, model: Any, batch: CodeBatch, step: int) -> Iterator[Turn]:
        yield "prior", model.loss(batch.codes, Conditioning(batch.labels) if model.classes else None)


class ClassificationObjective(Objective):
    """Cross entropy of a classifier on labelled images."""

    def players(self, model: nn.Module) -> dict[str, nn.Module]:
        return {"classifier": model}

    def turns(self, model: Any, batch: Batch, step: int) -> Iterator[Turn]:
        yield "classifier", {"cross_entropy": F.cross_entropy(model(batch.inputs), batch.labels)}
