"""One pass over a loader, cut off after a limit, with its progress reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from latticode.core.types import Batch
from latticode.data.loading import Loader

Progress = Callable[[int, int], None]  # images done, images in all


class Report:
    """Adds up what is done and tells the caller.

    Examples:
        >>> report = Report(lambda done, total: print(f"{done} of {total}"), total=5)
        >>> report(3)
        3 of 5
        >>> report(2)
        5 of 5
    """

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, number: int) -> None:
        self.done += number
        if self.progress is not None:
            self.progress(self.done, max(self.total, self.done))


def batches_of(loader: Loader, limit: int | None, report: Report) -> Iterator[Batch]:
    """The batches of one epoch, cut off after `limit` images; each is reported once it has been used."""
    left = limit
    iterator = iter(loader.epoch())
    try:
        while left is None or left > 0:
            batch = next(iterator, None)
            if batch is None:
                break
            if left is not None:
                inputs, labels, indices = batch.inputs[:left], batch.labels[:left], batch.indices[:left]
                batch = replace(batch, inputs=inputs, labels=labels, indices=indices, texts=batch.texts[:left])
                left -= len(batch.inputs)
            yield batch
            report(len(batch.inputs))
    finally:
        if close := getattr(iterator, "close", None):  # a loader's threads end now, not at the next collection
            close()


def count_of(loader: Loader, limit: int | None = None) -> int:
    """The images of one pass; of a stream only the limit is known."""
    if loader.streaming:
        return limit or 0
    count = len(loader.order.shard())
    return count if limit is None else min(count, limit)
