"""Means of the loss terms between two lines of the log, and which term was the first that was not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


class TrainingError(RuntimeError):
    """Training that cannot go on; the last good checkpoint is on disk."""


class TrainingStoppedError(TrainingError):
    """Training that was interrupted and can be resumed from its last checkpoint."""


class Tally:
    """Sums loss terms on their device; numbers are fetched from it only for the means.

    Examples:
        >>> tally = Tally()
        >>> for step, loss in enumerate([1.0, 3.0], 1):
        ...     tally.add({"mse": torch.tensor(loss)}, step, share=1.0)
        ...     tally.steps += 1
        >>> tally.means()
        {'mse': 2.0}
        >>> tally.add({"mse": torch.tensor(float("nan"))}, step=3, share=1.0)
        >>> tally.means()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        latticode.engine.tally.TrainingError: loss term mse was not finite at step 3; ...
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was counted."""
        self.steps = 0
        self._sums: dict[str, Tensor] = {}
        self._wrong: dict[str, Tensor] = {}  # the first step at which a term was not finite, or infinity

    def add(self, terms: Mapping[str, Tensor], step: int, share: float) -> None:
        """Count the values of one micro-batch, `share` of the step's."""
        for name, value in terms.items():
            value = value.detach()
            now = torch.where(value.isfinite(), math.inf, float(step))
            self._sums[name] = self._sums.get(name, 0) + value * share
            self._wrong[name] = torch.minimum(self._wrong.get(name, now), now)

    def means(self) -> dict[str, float]:
        """Mean of every term over the steps since `clear`. Raises TrainingError naming the first that is not finite."""
        wrong = {name: step for name, value in self._wrong.items() if math.isfinite(step := float(value))}
        if wrong:
            first = min(wrong.values())
            names = ", ".join(sorted(name for name, step in wrong.items() if step == first))
            raise TrainingError(
                f"loss term {names} was not finite at step {first:.0f}; the last checkpoint, from before it, is kept. "
                "Try a lower optimizer.lr, or an optimizer.clip, in a new run"
            )
        return {name: float(value) / max(self.steps, 1) for name, value in self._sums.items()}
