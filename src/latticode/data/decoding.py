"""Decoding of records to arrays, with a cache of what was decoded and a list of what cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from latticode.core.types import Texts
from latticode.data.media import ContentError, Preparation
from latticode.data.records import Record, Source

CACHE_BYTES = 512 * 2**20
# numpy pads a seed with zeros, so that (s, e) and (s, e, 0) are one stream: the last word tells the uses apart.
CROP, FLIP = 1, 2
_NEW, _CACHED, _UNREADABLE = 0, 1, 2


class Row(NamedTuple):
    """One decoded example.

    Examples:
        >>> Row(np.zeros((1, 8, 8), np.uint8), label=3, position=0).texts
        ()
    """

    values: np.ndarray  # (C, *size), of the preparation's type
    label: int
    position: int  # in the source
    texts: tuple[str, ...] = ()


class Decoder:
    """Reads and prepares records of a source; safe to use from several threads.

    Examples of one shape that fit CACHE_BYTES together are kept as one array, so that a batch of known ones is a
    gather. Where training takes windows at random, what was decoded is kept instead, as much as fits.

    A record that cannot be read or decoded gives None and is noted in `skipped`, name -> reason.

    Examples:
        >>> from latticode.data import Preprocess, open_source
        >>> digits = open_source("embedded:digits")
        >>> settings = {"seed": 0, "windows": False, "caches": True}
        >>> decoder = Decoder(digits, Preprocess(size=16, channels=1), len(digits), **settings)
        >>> row = decoder.row(0)
        >>> row.values.shape, row.values.dtype, decoder.skipped
        ((1, 16, 16), dtype('uint8'), {})
    """

    def __init__(self, source: Source, preprocess: Preparation, length: int, *, seed: int, windows: bool, caches: bool):
        self.source, self.seed, self.windows = source, seed, windows
        self.preprocess = preprocess.still()  # the loader draws the flips of a whole batch
        self.skipped: dict[str, str] = {}
        self._state = np.zeros(length, np.uint8)
        self._labels = np.full(length, -1, np.int64)
        self._texts: dict[int, tuple[str, ...]] = {}  # of the cached records that have captions
        self._values: np.ndarray | None = None  # (N, C, *size)
        self._loaded: dict[int, tuple[Any, Record]] = {}  # decoded, and the record without its content
        self._room = CACHE_BYTES if caches and windows else 0
        if caches and preprocess.shape is not None and not windows:
            shape = (length, *preprocess.shape)
            if np.prod(shape, dtype=np.int64) * np.dtype(preprocess.dtype).itemsize <= CACHE_BYTES:
                self._values = np.empty(shape, preprocess.dtype)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, Texts] | None:
        """(values (B, C, *size), labels (B,), captions) of `indices`; None if they are not cached or one cannot be
        read."""
        if self._values is None:
            return None
        for index in indices[self._state[indices] == _NEW]:
            self.row(int(index))
        if (self._state[indices] != _CACHED).any():
            return None
        texts = tuple(self._texts.get(int(index), ()) for index in indices) if self._texts else ()
        return self._values[indices], self._labels[indices], texts

    def row(self, index: int, epoch: int | None = None) -> Row | None:
        """The record at `index`; with windows on and an epoch, its window is random, by (seed, epoch, index)."""
        if self._state[index] == _UNREADABLE:
            return None
        if self._values is not None and self._state[index] == _CACHED:
            return Row(self._values[index], int(self._labels[index]), index, self._texts.get(index, ()))
        if index in self._loaded:
            return self._arranged(*self._loaded[index], index, epoch)
        try:
            record = self.source[index]
        except OSError as error:
            self.skipped[self.source.name_of(index)] = f"{type(error).__name__}: {error}"
            self._state[index] = _UNREADABLE
            return None
        row = self.decode(record, index, epoch)
        if row is None:
            self._state[index] = _UNREADABLE
        elif self._values is not None:
            self._values[index], self._labels[index] = row.values, row.label
            if row.texts:
                self._texts[index] = row.texts
            self._state[index] = _CACHED  # last: a thread that sees it reads the values
        return row

    def decode(self, record: Record, index: int, epoch: int | None = None) -> Row | None:
        """Like `row`, for a record that is at hand."""
        try:
            loaded = self.preprocess.load(record)
        except ContentError as error:
            self.skipped[record.name] = str(error).removeprefix(f"{record.name}: ")
            return None
        if self._room > 0 and index not in self._loaded:
            self._room -= self.preprocess.weight(loaded)
            self._loaded[index] = loaded, replace(record, content=b"", maps={})
        return self._arranged(loaded, record, index, epoch)

    def _arranged(self, loaded: Any, record: Record, index: int, epoch: int | None) -> Row:
        rng = None
        if self.windows and epoch is not None:
            rng = np.random.default_rng((self.seed, epoch, index, CROP))
        return Row(self.preprocess.arrange(loaded, rng), record.label, index, record.texts)

    def nothing_readable(self) -> ValueError:
        """The error that names the first record of a source none of which can be read."""
        name, reason = next(iter(self.skipped.items()))
        noun = self.preprocess.medium.noun
        return ValueError(f"no {noun} of {self.source.name!r} can be read; the first, {name}: {reason}")
