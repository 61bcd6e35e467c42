"""Kinds of data (`Medium`) and the contract of preprocessing (`Preparation`): records to arrays, examples to files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from torch import Tensor

from latticode.core.values import to_uint8

if TYPE_CHECKING:
    from latticode.data.records import Record

VALUE_RANGE = "[-1, 1]"
# without the dot, lower case
PHOTOS = ("png", "jpg", "jpeg", "jpe", "jfif", "webp", "avif", "jp2", "gif")
OTHERS = ("bmp", "tif", "tiff", "tga", "ppm", "pgm", "pbm", "pnm")


class ContentError(ValueError):
    """A record that cannot be decoded; the message has its name and the reason."""


@dataclass(frozen=True)
class Medium:
    """How sources tell records of this kind, and how messages call them.

    Examples:
        >>> IMAGE.holds("cat.JPG"), IMAGE.holds("cat.txt")
        (True, False)
        >>> replace(DENSE, maps=("depth.png",)).holds("cat.depth.png")  # a label map
        False
    """

    name: str  # `data.kind` of a run
    noun: str
    endings: tuple[str, ...]  # of files, without the dot, lower case
    columns: tuple[str, ...]  # of parquet files and Hub sets
    feature: str  # the type that `datasets` declares such a column to have
    sized: str  # the settings that give all of them one size
    maps: tuple[str, ...] = ()  # of files beside each, as PHOTO.depth.png beside PHOTO.jpg, that hold its label maps

    def holds(self, file: str) -> bool:
        """Whether a file of this name is an example, by its ending, and no label map."""
        return file.rpartition(".")[2].lower() in self.endings and not f".{file.lower()}".endswith(
            tuple(f".{ending}" for ending in self.maps)
        )


IMAGE = Medium("image", "image", PHOTOS + OTHERS, ("image", "img", "jpg", "png", "picture", "photo"), "Image", "size")
DENSE = replace(IMAGE, name="dense")  # a preparation says which maps
AUDIO = Medium(
    "audio", "recording", ("wav", "flac", "ogg"), ("audio", "sound", "wav", "flac", "speech"), "Audio", "length"
)
VIDEO = Medium("video", "clip", ("gif", "webp", "apng"), ("video", "clip", "gif", "webp"), "Video", "size and frames")


class Preparation(ABC):
    """From records to arrays of one type: `load` is what never varies, `arrange` what training does at random.

    Subclasses are frozen dataclasses, whose fields are the recipe's settings and go into run and token files.

    Examples:
        >>> from latticode.data import Preprocess
        >>> preparation = Preprocess(size=16, channels=3, flip=True)  # that of images
        >>> isinstance(preparation, Preparation), preparation.shape, preparation.still().flip
        (True, (3, 16, 16), False)
        >>> Preprocess.from_record(preparation.record()) == preparation
        True
    """

    medium: ClassVar[Medium]
    dtype: ClassVar[type] = np.uint8  # of what `arrange` returns; uint8 stands for pixels, which become floats
    channels: int
    flip: bool  # training mirrors the last axis of half of the examples; the loader draws which

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...] | None:
        """(C, *size) of every example; None: each has its own."""

    @property
    @abstractmethod
    def windowed(self) -> bool:
        """Whether training takes windows at random."""

    @abstractmethod
    def load(self, record: Record) -> Any:
        """The decoded content. Raises ContentError if it cannot be decoded."""

    @abstractmethod
    def arrange(self, loaded: Any, rng: np.random.Generator | None = None) -> np.ndarray:
        """(C, *size) of what `load` gave; without `rng` a window is the centred one and nothing is mirrored."""

    @abstractmethod
    def weight(self, loaded: Any) -> int:
        """Bytes of memory that it takes to keep what `load` gave."""

    def still(self) -> Self:
        """Without mirroring."""
        return replace(self, flip=False) if self.flip else self  # type: ignore[type-var]

    def shown(self) -> Self:
        """For one example that a user shows: nothing is mirrored, and all of a picture is brought to the size."""
        return self.still()

    @abstractmethod
    def whole(self) -> Self:
        """For evaluation and tokens: no window in time, nothing mirrored; the size in pixels stays."""

    @abstractmethod
    def own_size(self) -> Self:
        """As `whole`, and every picture as large as it is."""

    def seconds(self, inputs: Tensor) -> float:
        """How long the examples of a batch (B, C, T, ...) last together; 0 for what has no time."""
        return 0.0

    def save(self, path: Path, values: Tensor, about: Mapping[str, Any] | None = None) -> Path:
        """Write one example, `values` (C, *size) in [-1, 1], as `path` with the ending of its kind; returns the file.

        Here that is a PNG with `about` in its metadata; wav and WebP files have none.
        """
        from latticode.data.writing import save_png, to_picture

        path = path.with_name(f"{path.name}.png")
        save_png(path, to_picture(to_uint8(values).cpu().numpy().transpose(1, 2, 0)), about)
        return path

    def record(self) -> dict[str, Any]:
        """A description that goes into run and token files; `from_record` reads it. Images, the first, have no kind."""
        kind = {} if type(self).medium is IMAGE else {"kind": type(self).medium.name}
        return {**kind, **asdict(self), "range": VALUE_RANGE}  # type: ignore[call-overload]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Self:
        """Raises ValueError for unknown keys, another kind and another value range."""
        settings = {key: value for key, value in record.items() if key not in ("range", "kind")}
        if record.get("kind", IMAGE.name) != cls.medium.name:
            raise ValueError(f"this is the preprocessing of {record.get('kind', IMAGE.name)}, not {cls.medium.name}")
        if record.get("range") != VALUE_RANGE:
            raise ValueError(f"the value range must be {VALUE_RANGE!r}, got {record.get('range')!r}")
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        if unknown := set(settings) - set(names):
            raise ValueError(
                f"unknown preprocessing keys {', '.join(sorted(unknown))}; valid: {', '.join(names)}, range"
            )
        return cls(**settings)


def window(length: int, wanted: int, rng: np.random.Generator | None) -> slice:
    """Where a window of `wanted` of `length` lies: at random, or centred; all of it if there are not so many."""
    spare = max(0, length - wanted)
    start = spare // 2 if rng is None else int(rng.integers(spare + 1))
    return slice(start, start + wanted)
