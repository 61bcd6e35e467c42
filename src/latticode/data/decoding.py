"""Records to rows of pixels, remembering what was decoded and what cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from latticode.data.records import Record, Source
from latticode.data.transforms import ImageError, Preprocess, decode_image

CACHE_BYTES = 512 * 2**20
# numpy pads a seed with zeros, so that (s, e) and (s, e, 0) are one stream: the last word tells the uses apart.
CROP, FLIP = 1, 2
_NEW, _CACHED, _UNREADABLE = 0, 1, 2


class Row(NamedTuple):
    pixels: np.ndarray  # (C, H, W) uint8
    label: int
    position: int  # in the source


class Decoder:
    """Reads and preprocesses records of a source; safe to use from several threads.

    Images of a fixed size and crop that fit CACHE_BYTES together are kept as one uint8 array, so that a batch of known
    ones is a gather. With random crops the decoded pictures are kept instead, as many as fit.

    A record that cannot be read or decoded gives None and is noted in `skipped`, name -> reason.
    """

    def __init__(self, source: Source, preprocess: Preprocess, length: int, *, seed: int, crops: bool, caches: bool):
        self.source, self.seed, self.crops = source, seed, crops
        self.preprocess = replace(preprocess, flip=False)  # the loader draws the flips of a whole batch
        self.skipped: dict[str, str] = {}
        self._state = np.zeros(length, np.uint8)
        self._labels = np.full(length, -1, np.int64)
        self._pixels: np.ndarray | None = None  # (N, C, H, W)
        self._pictures: dict[int, Record] = {}
        self._room = CACHE_BYTES if caches and crops else 0
        if caches and preprocess.size is not None and not crops:
            shape = (length, preprocess.channels, preprocess.size, preprocess.size)
            if np.prod(shape, dtype=np.int64) <= CACHE_BYTES:
                self._pixels = np.empty(shape, np.uint8)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """(pixels (B, C, H, W), labels (B,)) of all of `indices`; None if they are not cached or one cannot be read."""
        if self._pixels is None:
            return None
        for index in indices[self._state[indices] == _NEW]:
            self.row(int(index))
        if (self._state[indices] != _CACHED).any():
            return None
        return self._pixels[indices], self._labels[indices]

    def row(self, index: int, epoch: int | None = None) -> Row | None:
        """The record at `index`; cropped at random, by (seed, epoch, index), if an epoch is given and crops are on."""
        if self._state[index] == _UNREADABLE:
            return None
        if self._pixels is not None and self._state[index] == _CACHED:
            return Row(self._pixels[index], int(self._labels[index]), index)
        try:
            record = self._pictures.get(index) or self.source[index]
        except OSError as error:
            self.skipped[self.source.name_of(index)] = f"{type(error).__name__}: {error}"
            self._state[index] = _UNREADABLE
            return None
        row = self.decode(record, index, epoch)
        if row is None:
            self._state[index] = _UNREADABLE
        elif self._pixels is not None:
            self._pixels[index], self._labels[index] = row.pixels, row.label
            self._state[index] = _CACHED  # last: a thread that sees it reads the pixels
        return row

    def decode(self, record: Record, index: int, epoch: int | None = None) -> Row | None:
        """Like `row`, for a record that is at hand."""
        rng = None
        if self.crops and epoch is not None:
            rng = np.random.default_rng((self.seed, epoch, index, CROP))
        try:
            picture = decode_image(record.image, record.name)
        except ImageError as error:
            self.skipped[record.name] = str(error).removeprefix(f"{record.name}: ")
            return None
        if self._room > 0 and index not in self._pictures:
            self._room -= picture.width * picture.height * (1 if picture.mode == "L" else 4)  # PIL pads RGB
            self._pictures[index] = replace(record, image=picture)
        return Row(self.preprocess.pixels(picture, rng), record.label, index)

    def nothing_readable(self) -> ValueError:
        name, reason = next(iter(self.skipped.items()))
        return ValueError(f"no image of {self.source.name!r} can be read; the first, {name}: {reason}")
