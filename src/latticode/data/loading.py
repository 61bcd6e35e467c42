"""Loaders: batches of examples and of tokens, deterministic, resumable at any step, sharded, prefetched by threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import count, groupby, islice

import numpy as np
import torch

from latticode.core.types import Batch, CodeBatch, Texts
from latticode.core.values import to_float
from latticode.data.decoding import FLIP, Decoder, Row
from latticode.data.media import Preparation
from latticode.data.order import IndexStream, chunks, prefetch, shuffled
from latticode.data.records import Record, Source, StreamSource
from latticode.data.tokens import TokenDataset


class Loader:
    """Images, recordings or clips of a source as float batches.

    Args:
        source: what to read.
        preprocess: how to turn a record into an example. Random windows and flips apply to `batches` only.
        batch_size: per rank.
        seed, rank, world: see `IndexStream`.
        workers: threads that read and decode ahead; the batches are the same whatever their number.
        augment: False leaves out random windows and flips in `batches` too.

    A record that cannot be read is noted in `skipped` (name -> reason). Small sources are decoded once, see `Decoder`.

    Examples:
        >>> from latticode.data import Preprocess, open_source
        >>> digits = open_source("embedded:digits")
        >>> loader = Loader(digits, Preprocess(size=16, channels=1), batch_size=4)
        >>> batch = next(loader.batches())
        >>> batch.inputs.shape, batch.labels.shape
        (torch.Size([4, 1, 16, 16]), torch.Size([4]))
        >>> sum(len(batch.inputs) for batch in loader.epoch()) == len(loader)
        True
    """

    def __init__(
        self,
        source: Source,
        preprocess: Preparation,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        augment: bool = True,
    ):
        if workers < 0:
            raise ValueError(f"workers must be >= 0, got {workers}")
        self.source, self.preprocess, self.workers = source, preprocess, workers
        self.streaming = isinstance(source, StreamSource)
        length = 1 if self.streaming else len(source)
        self.order = IndexStream(length, batch_size, seed=seed, rank=rank, world=world)
        windows = augment and preprocess.windowed
        self._decoder = Decoder(source, preprocess, length, seed=seed, windows=windows, caches=not self.streaming)
        self._flips = augment and preprocess.flip
        self._coins = lru_cache(maxsize=2)(self._epoch_coins)

    def __len__(self) -> int:
        """Records of this rank in one ordered pass. Raises TypeError for a streamed source."""
        if self.streaming:
            raise TypeError(f"{self.source.name} is streamed and has no length")
        return len(self.order.shard())

    @property
    def skipped(self) -> dict[str, str]:
        """The records that could not be read so far, name -> reason."""
        return self._decoder.skipped

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """This rank's part of the global batches start, start + 1, ... without end.

        `batches(k)` equals the tail of `batches(0)`. A record that cannot be read is replaced by the next readable one
        of the source. A streamed source is shuffled within a buffer, and a start is reached by reading up to it.

        Raises ValueError if no record can be read, or if what is in one batch differs in size.
        """
        if start < 0:
            raise ValueError(f"start must be >= 0, got {start}")
        return prefetch(self._stream_jobs(start) if self.streaming else self._jobs(start), self.workers)

    def epoch(self) -> Iterator[Batch]:
        """This rank's part of one ordered pass, without augmentation; the last batch is smaller.

        A record that cannot be read is left out. Without one common shape a batch also ends where the shape changes.
        Raises ValueError if this rank has records and none can be read.
        """
        seen, good = 0, 0
        for asked, rows in prefetch(self._stream_pass() if self.streaming else self._pass(), self.workers):
            seen, good = seen + asked, good + len(rows)
            for _, run in groupby(rows, key=lambda row: row.values.shape):
                yield self._collate(list(run))
        if seen and not good:
            raise self._decoder.nothing_readable()

    def _jobs(self, start: int) -> Iterator[Callable[[], Batch]]:
        for t in count(start):
            epochs, indices = self.order.batch(t)
            flips = np.zeros(len(indices), np.bool_)
            if self._flips:
                for epoch in np.unique(epochs):
                    rows = epochs == epoch
                    flips[rows] = self._coins(int(epoch))[indices[rows]]
            yield partial(self._batch, epochs, indices, flips)

    def _epoch_coins(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.order.seed, epoch, 0, FLIP)).random(self.order.count) < 0.5

    def _batch(self, epochs: np.ndarray, indices: np.ndarray, flips: np.ndarray) -> Batch:
        if (cached := self._decoder.gather(indices)) is not None:
            return _to_batch(*cached, indices, flips)
        return self._collate([self._good(int(e), int(i)) for e, i in zip(epochs, indices, strict=True)], flips)

    def _good(self, epoch: int, index: int) -> Row:
        """The record at `index`, or the next one that can be read."""
        for step in range(self.order.count):
            if (row := self._decoder.row((index + step) % self.order.count, epoch)) is not None:
                return row
        raise self._decoder.nothing_readable()

    def _pass(self) -> Iterator[Callable[[], tuple[int, list[Row]]]]:
        for indices in chunks(self.order.shard(), self.order.batch_size):
            yield partial(self._rows, indices)

    def _rows(self, indices: np.ndarray) -> tuple[int, list[Row]]:
        rows = [self._decoder.row(int(index)) for index in indices]
        return len(indices), [row for row in rows if row is not None]

    def _stream_jobs(self, start: int) -> Iterator[Callable[[], Batch]]:
        assert isinstance(self.source, StreamSource)
        size = self.order.batch_size * self.order.world
        t, held = 0, []
        for epoch in count():
            before = t, len(held)
            rng = np.random.default_rng((self.order.seed, epoch))
            for index, record in shuffled(self.source.records(), rng):
                held.append((epoch, index, record))
                if len(held) == size:
                    if t >= start:
                        yield partial(self._stream_batch, held)
                    t, held = t + 1, []
            if before == (t, len(held)):
                raise ValueError(f"{self.source.name!r} has no records in this split")

    def _stream_batch(self, held: list[tuple[int, int, Record]]) -> Batch:
        """This rank's part of a global batch; what cannot be read is replaced by the next of that global batch."""
        rows, flips = [], []
        first = self.order.rank * self.order.batch_size
        for place in range(first, first + self.order.batch_size):
            for epoch, index, record in held[place:] + held[:place]:
                if (row := self._decoder.decode(record, index, epoch)) is not None:
                    break
            else:
                raise self._decoder.nothing_readable()
            rows.append(row)
            flips.append(self._flips and np.random.default_rng((self.order.seed, epoch, index, FLIP)).random() < 0.5)
        return self._collate(rows, np.asarray(flips))

    def _stream_pass(self) -> Iterator[Callable[[], tuple[int, list[Row]]]]:
        """A rank's records of a streamed pass: every `world`-th run of `batch_size` records."""
        assert isinstance(self.source, StreamSource)
        records = self.source.records()
        for run in count():
            held = list(islice(records, self.order.batch_size))
            if not held:
                return
            if run % self.order.world == self.order.rank:
                yield partial(self._stream_rows, held)

    def _stream_rows(self, held: list[tuple[int, Record]]) -> tuple[int, list[Row]]:
        rows = [self._decoder.decode(record, index) for index, record in held]
        return len(held), [row for row in rows if row is not None]

    def _collate(self, rows: list[Row], flips: np.ndarray | None = None) -> Batch:
        values, labels, indices, texts = zip(*rows, strict=True)
        if len(shapes := {array.shape for array in values}) > 1:
            sizes = " and ".join("x".join(map(str, shape[1:])) for shape in sorted(shapes)[:2])
            medium = self.preprocess.medium
            raise ValueError(
                f"the {medium.noun}s of one batch differ in size ({sizes}); give the preprocessing a {medium.sized}"
            )
        labels, indices = np.asarray(labels, np.int64), np.asarray(indices, np.int64)
        return _to_batch(np.stack(values), labels, texts if any(texts) else (), indices, flips)


class TokenLoader:
    """Batches of a token dataset, in the order that `Loader` would take.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from latticode.data.tokens import TokenWriter
        >>> codes = torch.zeros(2, 4, 4, 1, dtype=torch.int64)  # (B, *grid, K)
        >>> about = {"tokenizer": {"type": "mine"}, "tokenizer_hash": "1f3a", "preprocess": {}}
        >>> with TemporaryDirectory() as folder:
        ...     with TokenWriter(folder, vocab=[16], **about) as writer:
        ...         writer.write(codes, torch.tensor([3, 5]), names=["a", "b"], sizes=[(32, 32)] * 2)
        ...     batch = next(TokenLoader(TokenDataset(folder), batch_size=2).batches())
        >>> batch.codes.shape, sorted(batch.labels.tolist())
        (torch.Size([2, 4, 4, 1]), [3, 5])
    """

    def __init__(self, tokens: TokenDataset, batch_size: int, *, seed: int = 0, rank: int = 0, world: int = 1):
        self.tokens = tokens
        self.order = IndexStream(len(tokens), batch_size, seed=seed, rank=rank, world=world)

    def batches(self, start: int = 0) -> Iterator[CodeBatch]:
        """This rank's part of the global batches start, start + 1, ... without end. Needs one common grid."""
        if start < 0:
            raise ValueError(f"start must be >= 0, got {start}")
        return (self._batch(self.order.batch(t)[1]) for t in count(start))

    def epoch(self) -> Iterator[CodeBatch]:
        """This rank's part of one ordered pass; the last batch is smaller, and a batch ends where the grid changes."""
        for indices in chunks(self.order.shard(), self.order.batch_size):
            for _, run in groupby(indices, key=lambda index: self.tokens.grid_of(int(index))):
                yield self._batch(np.fromiter(run, np.int64))

    def _batch(self, indices: np.ndarray) -> CodeBatch:
        labels = self.tokens.labels[torch.from_numpy(indices)]
        return CodeBatch(self.tokens.codes(indices), labels, self.tokens.texts(indices))


def _to_batch(
    values: np.ndarray, labels: np.ndarray, texts: Texts, indices: np.ndarray, flips: np.ndarray | None
) -> Batch:
    """`values` (B, C, *size), owned by the batch: uint8 pixels or float32."""
    if flips is not None and flips.any():
        values[flips] = values[flips][..., ::-1]
    inputs = torch.from_numpy(values)
    inputs = to_float(inputs) if inputs.dtype == torch.uint8 else inputs
    return Batch(inputs, torch.from_numpy(labels), torch.from_numpy(indices), texts)
