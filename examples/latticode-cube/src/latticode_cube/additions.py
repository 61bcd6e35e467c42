"""A loss, a metric, a source, a quantizer by its size for `latticode study`, and a verb of the command line."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
import torch.nn.functional as F
import typer
from torch import Tensor

from latticode.data import Source
from latticode.data.records import Record

SIDE = 4


def huber(output: Tensor, target: Tensor) -> Tensor:
    """A loss: (output, target) to a scalar."""
    return F.huber_loss(output, target, delta=0.2)


def worst_error(originals: Tensor, output: Tensor) -> Tensor | None:
    """A metric: (originals, output) to one number for each example; None for what it does not know."""
    return (originals - output).abs().flatten(1).amax(1) if originals.ndim == 4 else None


class Checkers(Source):
    """`count` checkerboards, black and white, of fields of 1 to 4 pixels."""

    classes = ()

    def __init__(self, name: str, count: int):
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count

    def name_of(self, i: int) -> str:
        return f"board-{i}"

    def __getitem__(self, i: int) -> Record:
        fields = np.arange(16) // (1 + i % 4)
        return Record(((fields[:, None] + fields) % 2 * 255).astype(np.uint8), -1, self.name_of(i))


def checkers(source: str, split: str, holdout: float, medium: Any) -> Source:
    """A source: `data.source=checkers:100` reads a hundred boards, a share `holdout` of them for testing."""
    count = int(source.removeprefix("checkers:"))
    held_out = max(1, round(count * holdout))
    return Checkers(source, {"all": count, "test": held_out, "train": count - held_out}[split])


def cube_of_size(size: int) -> tuple[dict[str, Any], dict[str, float]]:
    """For `study`: a spec of about `size` codes and the weights of its losses."""
    return {"type": "cube", "side": SIDE, "dim": _dim(size)}, {"commitment": 0.06}


def cube(size: Annotated[int, typer.Argument(min=2, help="Wanted number of codes.")]) -> None:
    """Say which cube has about SIZE codes."""
    print(f"side={SIDE} dim={_dim(size)}: {SIDE ** _dim(size)} codes")


def _dim(size: int) -> int:
    return max(1, round(math.log(size, SIDE)))
