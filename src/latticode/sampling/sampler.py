"""The samples of a seed by their number, each the same in whatever company it is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latticode.core.types import Conditioning, Sampling
from latticode.data import Preparation
from latticode.priors.base import Prior
from latticode.sampling.scores import Score
from latticode.tokenizers.tokenizer import Tokenizer

TOGETHER = {"cpu": 1}  # samples decoded at once, 8 elsewhere


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
