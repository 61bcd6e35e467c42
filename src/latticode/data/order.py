"""The order of records, for both loaders: shuffling by epoch, sharding over ranks, prefetching by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import numpy as np

T = TypeVar("T")
SHUFFLE_BUFFER = 1024


class IndexStream:
    """An endless stream of records: epoch after epoch, each in an order of its own, with no remainder dropped.

    The global batch t is `batch_size * world` consecutive entries of that stream and rank r holds the r-th part of it,
    so a batch is a pure function of (seed, t): resuming at t costs nothing, and the ranks' batches in rank order are
    the batch of one process.

    Examples:
        >>> stream = IndexStream(count=5, batch_size=2, seed=0)
        >>> epochs, indices = zip(*(stream.batch(t) for t in range(5)))  # two epochs of five records
        >>> np.concatenate(epochs).tolist()
        [0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
        >>> sorted(np.concatenate(indices)[:5].tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(self, count: int, batch_size: int, *, seed: int = 0, rank: int = 0, world: int = 1):
        if count < 1:
            raise ValueError("cannot load from an empty source")
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must be >= 0, got {seed}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be in 0..{world - 1}, got {rank}")
        self.count, self.batch_size, self.seed, self.rank, self.world = count, batch_size, seed, rank, world
        self.order = lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(self.count)

    def batch(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, indices), each (batch_size,) int64, of this rank's part of the global batch t."""
        first = (t * self.world + self.rank) * self.batch_size
        epochs, places = np.divmod(np.arange(first, first + self.batch_size), self.count)
        indices = np.empty_like(places)
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            indices[rows] = self.order(int(epoch))[places[rows]]
        return epochs, indices

    def shard(self) -> range:
        """This rank's contiguous part of one ordered pass; the parts in rank order are the whole."""
        return range(self.count * self.rank // self.world, self.count * (self.rank + 1) // self.world)


def chunks(indices: range, size: int) -> Iterator[np.ndarray]:
    """`indices` in runs of `size` (int64); the last is shorter."""
    for start in range(0, len(indices), size):
        yield np.asarray(indices[start : start + size], dtype=np.int64)


def shuffled(items: Iterator[T], rng: np.random.Generator) -> Iterator[T]:
    """A stream mixed within a window: each draw is one of the next SHUFFLE_BUFFER items that are still to come."""
    held: list[T] = []
    for item in items:
        if len(held) < SHUFFLE_BUFFER:
            held.append(item)
            continue
        place = int(rng.integers(SHUFFLE_BUFFER))
        drawn, held[place] = held[place], item
        yield drawn
    yield from (held[place] for place in rng.permutation(len(held)))


def prefetch(jobs: Iterator[Callable[[], T]], workers: int) -> Iterator[T]:
    """The results of `jobs` in their order, with up to two jobs per worker thread done or running ahead of the reader.

    Threads serve because PIL, zlib and numpy release the interpreter lock. Without workers jobs run when asked for.
    """
    if workers == 0:
        for job in jobs:
            yield job()
        return
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="latticode-loader") as pool:
        try:
            for job in jobs:
                pending.append(pool.submit(job))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
