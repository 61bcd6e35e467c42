"""Photographs with label maps (depth, classes, instances) as one array, which is cropped and mirrored as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from latticode.data.media import DENSE, IMAGE, Preparation
from latticode.data.records import Record
from latticode.data.transforms import RESIZES, ImageError, decode_image, decode_numbers

if TYPE_CHECKING:
    from PIL import Image

CROPS = ("squash", "center", "inception")
ATTEMPTS = 10  # at a random part that fits, then all of the picture is taken
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class DensePreprocess(Preparation):
    """How a photograph and its label maps become integers (3 + L, H, W): RGB 0..255, then the maps as they are stored.

    `maps` are the endings of the L files beside a photograph, in the order that the task wants: PHOTO.sem.png beside
    PHOTO.jpg is "sem.png". `size` is (H, W), or one number for both. `crop`: 'squash' resizes without regard to the
    aspect; 'center' takes the largest centred part of the right aspect; 'inception' takes, in training, a part with a
    random share of the picture within `area` and a random aspect (width / height, its logarithm uniform) within
    `aspect`, and squashes it; else it is 'squash'. `resize` is for photographs, maps take the nearest pixel. `largest`
    is the largest number that each map may hold, where that is to be checked.

    Raises ValueError for settings that are unknown or out of range.

    Examples:
        >>> from latticode.data import Loader, open_source
        >>> preprocess = DensePreprocess(size=(32, 48), maps=["depth.png"])
        >>> shapes = open_source("embedded:shapes", medium=preprocess.medium)
        >>> next(Loader(shapes, preprocess, batch_size=2).batches()).inputs.shape  # RGB and a map
        torch.Size([2, 4, 32, 48])
    """

    medium = DENSE
    dtype = np.int32

    size: int | Sequence[int] | None = None
    maps: Sequence[str] = ()
    resize: str = "bicubic"
    crop: str = "squash"
    area: Sequence[float] = (0.05, 1.0)
    aspect: Sequence[float] = (0.75, 1.333)
    flip: bool = False
    largest: Sequence[int] = ()

    def __post_init__(self) -> None:
        sides = (self.size, self.size) if isinstance(self.size, int) else self.size
        if sides is not None and (len(sides) != 2 or min(sides) < 1):
            raise ValueError(f"size must be one number or two, height and width, >= 1, got {self.size}")
        if self.resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {self.resize!r}")
        if self.crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, got {self.crop!r}")
        if sides is None and self.crop == "inception":
            raise ValueError("crop 'inception' needs a size")
        for name, (low, high) in (("area", self.area), ("aspect", self.aspect)):
            if not 0 < low <= high or (name == "area" and high > 1):
                raise ValueError(
                    f"{name} must be two numbers, 0 < low <= high{' <= 1' * (name == 'area')}, got {low}, {high}"
                )
        maps = tuple(ending.lower().removeprefix(".") for ending in self.maps)
        if len(set(maps)) != len(maps) or not all(map(IMAGE.holds, maps)):
            raise ValueError(
                f"maps must be different endings of pictures, such as depth.png, got {', '.join(self.maps)}"
            )
        if self.largest and len(self.largest) != len(maps):
            raise ValueError(f"largest needs one number for each of the {len(maps)} maps, got {list(self.largest)}")
        settled = {"size": sides, "maps": maps, "area": self.area, "aspect": self.aspect, "largest": self.largest}
        for name, value in settled.items():  # a recipe's lists
            object.__setattr__(self, name, None if value is None else tuple(value))
        object.__setattr__(self, "channels", 3 + len(maps))
        object.__setattr__(self, "medium", replace(DENSE, maps=maps) if maps else IMAGE)  # then any image will do

    @property
    def shape(self) -> tuple[int, ...] | None:
        return None if self.size is None else (self.channels, *self.size)  # type: ignore[misc]

    @property
    def windowed(self) -> bool:
        return self.crop == "inception"

    def load(self, record: Record) -> tuple[Image.Image, ...]:
        """The photograph and its maps, as 32-bit integers. Raises ImageError as `decode_image` does, for a map that is
        missing, of another size, or with a number that is negative or above `largest`."""
        from PIL import Image

        picture = decode_image(record.content, record.name).convert("RGB")  # type: ignore[arg-type]
        numbers = [self._numbers(record, ending, (picture.height, picture.width)) for ending in self.maps]
        return picture, *(Image.fromarray(array) for array in numbers)

    def _numbers(self, record: Record, ending: str, size: tuple[int, int]) -> np.ndarray:
        if ending not in record.maps:
            there = f"only {', '.join(record.maps)}" if record.maps else "nor another label map"
            raise ImageError(f"{record.name}: it has no {ending}, {there}")
        found = decode_numbers(record.maps[ending], f"{record.name}: {ending}")
        if found.shape != size:
            (height, width), (rows, columns) = found.shape, size
            raise ImageError(f"{record.name}: {ending} is {width}x{height}, the image {columns}x{rows}")
        most = dict(zip(self.maps, self.largest, strict=False)).get(ending, np.iinfo(np.int32).max)
        if found.min() < 0 or found.max() > most:
            raise ImageError(f"{record.name}: {ending} holds {found.min()}..{found.max()}, valid are 0..{most}")
        return found

    def arrange(self, loaded: tuple[Image.Image, ...], rng: np.random.Generator | None = None) -> np.ndarray:
        picture, *maps = loaded
        if self.size is not None:
            box = self._box(picture.width, picture.height, rng)
            picture = self._fitted(picture, box, self.resize)
            maps = [self._fitted(one, box, "nearest") for one in maps]
        values = np.concatenate([np.asarray(picture).transpose(2, 0, 1), *(np.asarray(one)[None] for one in maps)])
        values = values[..., ::-1] if self.flip and rng is not None and rng.random() < 0.5 else values
        return np.ascontiguousarray(values, np.int32)

    def _fitted(self, picture: Image.Image, box: Box, resize: str) -> Image.Image:
        from PIL import Image

        height, width = self.size  # type: ignore[misc]
        return picture.resize((width, height), Image.Resampling[resize.upper()], box=box)

    def _box(self, width: int, height: int, rng: np.random.Generator | None) -> Box:
        """The part of a picture that is kept."""
        if self.crop == "center":
            rows, columns = self.size  # type: ignore[misc]
            wide = min(width, max(1, round(height * columns / rows)))
            tall = min(height, max(1, round(width * rows / columns)))
            left, top = (width - wide) // 2, (height - tall) // 2
            return left, top, left + wide, top + tall
        if self.crop == "inception" and rng is not None:
            for _ in range(ATTEMPTS):
                area = rng.uniform(self.area[0], self.area[1]) * width * height
                aspect = self.aspect[0] * (self.aspect[1] / self.aspect[0]) ** rng.random()
                wide, tall = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
                if 0 < wide <= width and 0 < tall <= height:
                    left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - tall + 1))
                    return left, top, left + wide, top + tall
        return 0, 0, width, height

    def weight(self, loaded: tuple[Image.Image, ...]) -> int:
        return sum(4 * one.width * one.height for one in loaded)  # PIL pads RGB

    def pictures(self) -> DensePreprocess:
        """For photographs without label maps, all of which is seen."""
        return replace(self.whole(), maps=(), largest=(), crop="squash")

    def whole(self) -> DensePreprocess:
        return self.still()

    def own_size(self) -> DensePreprocess:
        return replace(self, size=None, crop="squash", flip=False)
