"""Preprocessing of images: decoding, colour, resizing, cropping, mirroring. It is recorded in runs and token files."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from latticode.data.media import IMAGE, ContentError, Preparation
from latticode.data.records import LabelMap, Record

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 200_000_000
RESIZES = ("bicubic", "bilinear", "lanczos", "box", "nearest")  # PIL's, antialiased when shrinking (but nearest)
CROPS = ("center", "random", "squash")
_opening = threading.Lock()


class ImageError(ContentError):
    """An image that cannot be decoded; the message has its name and the reason."""


def decode_image(data: Image.Image | bytes | np.ndarray, name: str = "image") -> Image.Image:
    """The image as 8-bit grey ('L') or colour ('RGB'), upright.

    Alpha is composited over white; 16-bit grey is scaled by 1/257, not clipped; floats in [0, 1] are scaled by 255; of
    an animation the first frame is taken; the EXIF orientation is applied. Raises ImageError for anything unreadable
    and for more than MAX_PIXELS pixels.
    """
    with _blaming(name):
        image = _open(data)
        return _normalise(image if isinstance(data, np.ndarray) else _upright(image))


def decode_numbers(data: LabelMap, name: str = "label map") -> np.ndarray:
    """A picture of one channel as the integers that it stores, (H, W) int32: 16 bits stay what they are, and of a
    palette the indices are taken. Raises ImageError as `decode_image` does, and for colours and floats."""
    with _blaming(name):
        if isinstance(data, bytes):
            array = np.asarray(_upright(_open(data)))
        else:
            array = data if isinstance(data, np.ndarray) else data()
        if array.ndim != 2 or array.dtype.kind not in "uib":
            raise ImageError(f"a label map is one channel of integers, got {array.dtype} {array.shape}")
        return array.astype(np.int32)


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """Whatever goes wrong is an ImageError that begins with `name`."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None
    except Exception as error:  # a boundary: on damaged files PIL's plugins raise nearly anything
        raise ImageError(f"{name}: {type(error).__name__}: {error}") from error


def _open(data: Image.Image | bytes | np.ndarray) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    if isinstance(data, bytes):
        if not data:
            raise ImageError("empty")
        # PIL has a limit of its own, with a warning below it. It is lifted while the header is read: no pixel is
        # decoded before the check below. The lock keeps other threads from restoring the lifted value.
        with _opening:
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image: Image.Image = Image.open(io.BytesIO(data))
            except UnidentifiedImageError:  # its message is a memory address
                raise ImageError("not an image, or of an unknown format") from None
            finally:
                Image.MAX_IMAGE_PIXELS = limit
    elif isinstance(data, np.ndarray):
        image = _from_array(data)
    else:
        image = data
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(f"{image.width}x{image.height} is more than {MAX_PIXELS / 1e6:g} megapixels")
    if not image.width * image.height:
        raise ImageError(f"{image.width}x{image.height} has no pixels")
    return image


def _from_array(array: np.ndarray) -> Image.Image:
    from PIL import Image

    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(f"an array must be (H, W) or (H, W, 1|3|4), got {array.shape}")
    return Image.fromarray(_to_bytes(array))


def _to_bytes(array: np.ndarray) -> np.ndarray:
    """uint8 of other kinds of pixels: bool, 16 bits (also as wider integers), floats in [0, 1]."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    low, high = array.min(), array.max()
    if array.dtype.kind in "ui" and low >= 0 and high <= 65535:
        return np.rint(array / 257).astype(np.uint8)
    if array.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.rint(array * 255).astype(np.uint8)
    raise ImageError(f"{array.dtype} pixels from {low} to {high}; valid: 0..65535 for integers, 0..1 for floats")


def _normalise(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return Image.fromarray(_to_bytes(np.asarray(image)))
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        colour = image.convert("RGBA")
        white = Image.new("RGBA", colour.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, colour).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ExifTags, ImageOps

    image.load()
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # the pixels of a file with damaged EXIF data are still good
        return image
    return ImageOps.exif_transpose(image) if turned else image


@dataclass(frozen=True)
class Preprocess(Preparation):
    """How an image becomes a uint8 array of a fixed size.

    `crop`: 'center' takes the largest centred square and resizes it; 'random' cuts a size x size window out of the
    image as it is (first enlarged so that its short side is `size` if it is smaller); 'squash' resizes without regard
    to the aspect. Cropping at random and flipping happen in training only: without a generator the window of 'random'
    is the centred one and nothing is flipped. With `size` None the image keeps its own size.

    Raises ValueError for settings that are unknown or out of range.

    Examples:
        >>> preprocess = Preprocess(size=8, channels=1)
        >>> preprocess(np.zeros((20, 30, 3), np.uint8)).shape
        (1, 8, 8)
    """

    medium = IMAGE

    size: int | None = None
    channels: int = 3
    resize: str = "bicubic"
    crop: str = "center"
    flip: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"size must be >= 1 or None, got {self.size}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if self.resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {self.resize!r}")
        if self.crop not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, got {self.crop!r}")
        if self.size is None and self.crop == "random":
            raise ValueError("crop 'random' needs a size")

    def __call__(
        self, image: Image.Image | bytes | np.ndarray, rng: np.random.Generator | None = None
    ) -> np.ndarray:  # (C, H, W) uint8
        """Raises ImageError if `image` cannot be decoded."""
        return self.pixels(decode_image(image), rng)

    def pixels(self, picture: Image.Image, rng: np.random.Generator | None = None) -> np.ndarray:
        """(C, H, W) uint8 of what `decode_image` gave."""
        from PIL import Image

        mode = "L" if self.channels == 1 else "RGB"
        if picture.mode != mode:
            picture = picture.convert(mode)
        if self.size is not None:
            left, top, right, bottom = box = self._box(picture.width, picture.height, rng)
            if (right - left, bottom - top) == (self.size, self.size):
                picture = picture.crop(box)
            else:  # resizing out of a box is resizing everything and cropping after, without the work on what is cut
                filtering = Image.Resampling[self.resize.upper()]
                picture = picture.resize((self.size, self.size), filtering, box=box)
        pixels = np.asarray(picture).reshape(picture.height, picture.width, self.channels)
        if self.flip and rng is not None and rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _box(self, width: int, height: int, rng: np.random.Generator | None) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the part of the image that is kept."""
        assert self.size is not None
        if self.crop == "squash":
            return (0, 0, width, height)
        side = min(width, height) if self.crop == "center" else min(width, height, self.size)
        left, top = (width - side) // 2, (height - side) // 2
        if self.crop == "random" and rng is not None:
            left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        return (left, top, left + side, top + side)

    @property
    def shape(self) -> tuple[int, ...] | None:
        return None if self.size is None else (self.channels, self.size, self.size)

    @property
    def windowed(self) -> bool:
        return self.crop == "random"

    def load(self, record: Record) -> Image.Image:
        return decode_image(record.content, record.name)  # type: ignore[arg-type]

    def arrange(self, loaded: Image.Image, rng: np.random.Generator | None = None) -> np.ndarray:
        return self.pixels(loaded, rng)

    def weight(self, loaded: Image.Image) -> int:
        return loaded.width * loaded.height * (1 if loaded.mode == "L" else 4)  # PIL pads RGB

    def shown(self) -> Preprocess:
        """A run that was trained on windows of large images sees all of one."""
        return replace(self, crop="center" if self.crop == "random" else self.crop, flip=False)

    def whole(self) -> Preprocess:
        return self.still()

    def own_size(self) -> Preprocess:
        return replace(self, size=None, crop="center", flip=False)
