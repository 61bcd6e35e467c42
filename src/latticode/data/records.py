"""Sources and their records: images, recordings or clips, and the train and test split of a source without one."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SPLITS = ("train", "test", "all")
TEXT_COLUMNS = ("captions", "caption", "text")
LabelMap = bytes | np.ndarray | Callable[[], np.ndarray]  # an encoded file; (H, W); what decodes it
MAX_CLASSES = 1_000_000  # a larger integer in a label column is an identifier, not a class


@dataclass(frozen=True)
class Record:
    """One image, recording or clip as its source stores it; a `Preparation` decodes it.

    Examples:
        >>> record = Record(np.zeros((8, 8), np.uint8), label=3, name="zeros/0", texts=("a black square",))
        >>> record.label, record.texts
        (3, ('a black square',))
    """

    content: Image.Image | bytes | np.ndarray | tuple[bytes, ...]  # an encoded file; (H, W[, C]); files of frames
    label: int  # -1 = none
    name: str  # unique within the source
    frames: int = 0  # of a clip that is stored as one picture, side by side
    texts: tuple[str, ...] = ()  # its captions
    maps: Mapping[str, LabelMap] = field(default_factory=dict)  # its label maps, by the ending of their file


class Source(ABC):
    """An ordered, random-access collection of records. Reading is safe from several threads.

    Examples:
        A source of your own is three methods:

        >>> class Noise(Source):
        ...     name, classes = "noise", ()
        ...     def __len__(self):
        ...         return 10
        ...     def __getitem__(self, i):
        ...         return Record(np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8), -1, self.name_of(i))
        ...     def name_of(self, i):
        ...         return f"noise/{i}"
        >>> from latticode.data import Loader, Preprocess
        >>> next(Loader(Noise(), Preprocess(size=8, channels=1), batch_size=4).batches()).inputs.shape
        torch.Size([4, 1, 8, 8])
    """

    name: str  # what the user typed
    classes: tuple[str, ...]  # names by label; empty = unlabelled

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> Record: ...

    @abstractmethod
    def name_of(self, i: int) -> str:
        """The name of record `i`, without reading its content."""

    def captions(self) -> Iterator[str]:
        """All captions of all records. Files are read for them but not decoded; those that cannot be read have none."""
        for i in range(len(self)):
            with suppress(OSError):
                yield from self[i].texts


class StreamSource(Source):
    """A source that can only be read from its start: no length, no random access.

    Examples:
        >>> class Endless(StreamSource):
        ...     name, classes = "endless", ()
        ...     def records(self):
        ...         for i in range(100):
        ...             yield i, Record(np.full((8, 8), i, np.uint8), -1, self.name_of(i))
        >>> from latticode.data import Loader, Preprocess
        >>> next(Loader(Endless(), Preprocess(size=8, channels=1), batch_size=4).batches()).inputs.shape
        torch.Size([4, 1, 8, 8])
    """

    @abstractmethod
    def records(self) -> Iterator[tuple[int, Record]]:
        """(position in the source, record) from the start, always in the same order."""

    def captions(self) -> Iterator[str]:
        for _, record in self.records():
            yield from record.texts

    def __len__(self) -> int:
        raise TypeError(f"{self.name} is streamed and has no length")

    def __getitem__(self, i: int) -> Record:
        raise TypeError(f"{self.name} is streamed: iterate over records() instead of asking for record {i}")

    def name_of(self, i: int) -> str:
        return f"{i:08d}"


class Subset(Source):
    """Some records of another source, in the given order.

    Examples:
        >>> source = ArraySource("zeros", np.zeros((3, 8, 8), np.uint8), None, (), ["a", "b", "c"])
        >>> part = Subset(source, np.array([2, 0]))
        >>> [part.name_of(i) for i in range(len(part))]
        ['c', 'a']
    """

    def __init__(self, base: Source, indices: np.ndarray):
        self.base, self.indices = base, indices
        self.name, self.classes = base.name, base.classes

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Record:
        return self.base[int(self.indices[i])]

    def name_of(self, i: int) -> str:
        return self.base.name_of(int(self.indices[i]))


class ArraySource(Source):
    """Images that lie in memory: (N, H, W) or (N, H, W, C) uint8, labels (N,) or None.

    Examples:
        >>> images = np.zeros((3, 8, 8), np.uint8)
        >>> source = ArraySource("zeros", images, np.array([0, 1, 0]), ("cat", "dog"), ["a", "b", "c"])
        >>> len(source), source[1].label, source[1].name
        (3, 1, 'b')
    """

    def __init__(
        self,
        name: str,
        images: np.ndarray,
        labels: np.ndarray | None,
        classes: tuple[str, ...],
        names: Sequence[str],
    ):
        self.name, self.classes = name, classes
        self.images, self.labels, self.names = images, labels, names

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Record:
        return Record(self.images[i], -1 if self.labels is None else int(self.labels[i]), self.names[i])

    def name_of(self, i: int) -> str:
        return self.names[i]


def captions(stored: Any) -> tuple[str, ...]:
    """The captions in what a source stores: one per line of a file or member, a string, a list of them, or nothing."""
    if isinstance(stored, bytes):
        stored = stored.decode("utf-8", "replace").splitlines()
    found = [stored] if isinstance(stored, str) else stored or []
    return tuple(text.strip() for text in found if text and text.strip())


def is_held_out(name: str, holdout: float) -> bool:
    """Whether the record called `name` belongs to the test part: a function of the name alone, so that adding or
    removing other records never moves it."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < holdout * 2**64


def part_of(name: str) -> str | None:
    """'train', 'test' or 'val' if a file or folder name starts so (case ignored), else None."""
    lower = name.lower()
    return next((part for part in ("train", "test", "val") if lower.startswith(part)), None)


def held_out_part(parts: set[str | None], split: str, source: str) -> str | None:
    """Which named part of a source is `split`; None = the source has no such parts and is split by name.

    A source with `train` and one of `test`, `val` has named splits (`test` wins). One that has only `train`, or no
    names, is split by name. One that has only `test` or `val` has nothing to train on: ValueError.
    """
    test = next((part for part in ("test", "val") if part in parts), None)
    if test is None:
        return None
    if split == "test":
        return test
    if "train" not in parts:
        raise ValueError(f"{source!r} has a {test!r} split only, nothing to train on; use split 'test' or 'all'")
    return "train"


def select(base: Source, parts: Sequence[str | None] | None, split: str, holdout: float) -> Source:
    """The records of `base` that are in `split`; `parts` names the part of each record where the source has parts.

    Raises ValueError if that leaves nothing.
    """
    if len(base) == 0:
        raise ValueError(f"{base.name!r} holds nothing")
    if split == "all":
        return base
    part = held_out_part(set(parts), split, base.name) if parts is not None else None
    if part is not None and parts is not None:
        keep = [i for i, p in enumerate(parts) if p == part]
    else:
        keep = [i for i in range(len(base)) if is_held_out(base.name_of(i), holdout) == (split == "test")]
    if not keep:
        raise ValueError(
            f"split {split!r} of {base.name!r} is empty: it has {len(base)} records and holdout is {holdout}; "
            "use split 'all', another holdout, or folders named train and test"
        )
    return Subset(base, np.asarray(keep))


def number_labels(raw: Sequence[int | str | None]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels (N,) int64 with -1 for none, and the class names, from integers or strings.

    Integers keep their value (class names are the numbers up to the largest); strings are numbered in sorted order.
    """
    known = [label for label in raw if label is not None]
    if all(_is_integer(label) for label in known):
        labels = np.array([-1 if label is None else max(-1, int(label)) for label in raw], dtype=np.int64)
        largest = int(labels.max(initial=-1))
        if largest >= MAX_CLASSES:
            raise ValueError(f"labels must be below {MAX_CLASSES}, got {largest}")
        return labels, tuple(str(i) for i in range(largest + 1))
    classes = tuple(sorted({str(label) for label in known}))
    number = {name: i for i, name in enumerate(classes)}
    return np.array([-1 if label is None else number[str(label)] for label in raw], dtype=np.int64), classes


def _is_integer(label: int | str) -> bool:
    return not isinstance(label, str) or label.removeprefix("-").isdecimal()
