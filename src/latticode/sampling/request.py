"""What is asked of a prior: which samples, and how they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from latticode.core.types import Sampling
from latticode.sampling.scores import Score


@dataclass(frozen=True)
class Request:
    """Which samples are wanted of a prior, and how they are drawn.

    With a `score`, sampling is by rejection: of 1 / `keep_best` draws for every sample the one that it prefers is kept.

    Args:
        count: how many; their numbers are 0 .. count - 1.
        labels: numbers, -1 for none, or names of classes, in turn.
        texts: captions in turn.
        sampling: how tokens are drawn; the prior checks it.
        score: of images and what was asked for, a higher one is better (`latticode.sampling.scores`).
        keep_best: the share of the draws that is kept, in (0, 1) with a score and 1 without.
        seed: with the number of a sample all that its draws depend on.
        batch_size: how many are drawn at once; changes no sample.

    Raises:
        ValueError: for a count or batch size < 1, and a score without a share to keep or the other way round.

    Examples:
        >>> from latticode.sampling.scores import LabelScore
        >>> request = Request(count=16, labels=["3", "shoe"], sampling=Sampling(guidance=2.0), seed=1)
        >>> request.labels, request.candidates
        (('3', 'shoe'), 1)
        >>> Request(labels=["3"], score=LabelScore(lambda images: images.mean((2, 3))), keep_best=0.25).candidates
        4
    """

    count: int = 64
    labels: Sequence[str] = ()
    texts: Sequence[str] = ()
    sampling: Sampling = field(default_factory=Sampling)
    score: Score | None = None
    keep_best: float = 1.0
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch_size < 1:
            raise ValueError(f"count and batch_size must be >= 1, got {self.count} and {self.batch_size}")
        if (self.score is not None or self.keep_best != 1) and (self.score is None or not 0 < self.keep_best < 1):
            given = f"score {self.score} and keep_best {self.keep_best:g}"
            raise ValueError(f"rejection needs a classifier or another score, and a keep_best in (0, 1), got {given}")
        for name in ("labels", "texts"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def candidates(self) -> int:
        """Draws for every sample."""
        return round(1 / self.keep_best)
