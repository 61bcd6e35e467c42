"""Samples of a prior by seed and number, with rejection sampling; a sample does not depend on its batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latticode.core.types import Conditioning
from latticode.data import Preparation
from latticode.priors.base import Prior
from latticode.sampling.request import Request
from latticode.tokenizers.tokenizer import Tokenizer

TOGETHER = {"cpu": 1}  # samples decoded at once, 8 elsewhere


@dataclass(frozen=True)
class Asked:
    """What the samples show: sample i the i-th of the labels and of the texts, which begin again at their end.

    Examples:
        >>> asked = Asked(labels=(3, 7), texts=("a shoe",))
        >>> asked.of(1), asked.period
        ({'label': 7, 'text': 'a shoe'}, 2)
        >>> asked.condition([0, 1]).labels
        tensor([3, 7])
    """

    labels: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()

    @property
    def period(self) -> int:
        """After how many samples labels and texts repeat."""
        return math.lcm(len(self.labels) or 1, len(self.texts) or 1)

    def of(self, number: int) -> dict[str, Any]:
        """Label and text of the sample with this number."""
        label = {"label": self.labels[number % len(self.labels)]} if self.labels else {}
        return label | ({"text": self.texts[number % len(self.texts)]} if self.texts else {})

    def condition(self, numbers: Iterable[int]) -> Conditioning:
        """The condition of a batch of samples, by their numbers."""
        rows = [self.of(number) for number in numbers]
        labels = torch.tensor([row["label"] for row in rows]) if self.labels else None
        return Conditioning(labels, tuple(row["text"] for row in rows) if self.texts else None)


@dataclass(frozen=True)
class Sampler:
    """Draws the samples of a request by their number, each the same in whatever company it is drawn.

    Args:
        prior, tokenizer: that the prior was trained over the codes of.
        preprocess: of the images, recordings or clips, whose size samples have.
        asked: what they show.
        request: its sampling, score, candidates, seed and batch size. Sample i is the best by the score of the draws
            i * candidates .. (i + 1) * candidates - 1.
        known: codes (1, *grid, K) that stay as they are; -1 where to draw.
        finish: of what was decoded, (B, C, *size) on the prior's device.

    Examples:
        >>> from latticode import GPT
        >>> from latticode.data import Preprocess
        >>> from latticode.tokenizers.palette import Palette
        >>> seeded = torch.manual_seed(0)
        >>> tokenizer = Palette(16, channels=1).eval()  # every pixel one of 16 greys
        >>> prior = GPT(tokenizer.vocab, (4, 4), classes=10, width=16, depth=1, heads=2).eval()
        >>> sampler = Sampler(prior, tokenizer, Preprocess(4, channels=1), Asked(labels=(3, 7)), Request(seed=1))
        >>> samples = sampler.draw(0, 4)
        >>> samples.shape
        torch.Size([4, 1, 4, 4])
        >>> torch.equal(sampler.draw(2, 1), samples[2:3])
        True
    """

    prior: Prior
    tokenizer: Tokenizer
    preprocess: Preparation
    asked: Asked
    request: Request
    known: Tensor | None = None
    finish: Callable[[Tensor], Tensor] | None = None

    def draw(self, first: int, count: int) -> Tensor:
        """The samples number `first` to `first + count - 1` (count, C, *size).

        Raises ValueError for a score that does not give every image a number.
        """
        score, n, batch_size = self.request.score, self.request.candidates, self.request.batch_size
        start, end = first * n, (first + count) * n
        parts, scores = [], []
        for at in range(start, end, batch_size):
            numbers = range(at, min(at + batch_size, end))
            condition = self.asked.condition(number // n for number in numbers)
            images = self._images(at, len(numbers), condition)
            parts.append(images.cpu())
            if score is not None:
                scores.append(score(images, condition).cpu())
                if scores[-1].shape != (len(numbers),) or scores[-1].isnan().any():
                    raise ValueError(f"a score must give a number for each of {len(numbers)} samples, got {scores[-1]}")
        images = torch.cat(parts)
        if score is None:
            return images
        best = torch.cat(scores).view(count, n).argmax(1)
        return images.unflatten(0, (count, n))[torch.arange(count), best]

    def _images(self, first: int, count: int, condition: Conditioning) -> Tensor:
        known = None if self.known is None else self.known.expand(count, *self.known.shape[1:])
        options: dict[str, Any] = {"sampling": self.request.sampling, "seed": self.request.seed}
        with torch.inference_mode():
            images = self._decoded(self.prior.sample(count, condition, first=first, known=known, **options), first)
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
