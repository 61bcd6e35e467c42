"""Preprocessing of clips: animations and frames decoded, sampled in time and cropped; animated WebP files written."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from latticode.core.files import replacing
from latticode.core.values import to_uint8
from latticode.data.media import VIDEO, ContentError, Preparation, window
from latticode.data.records import Record
from latticode.data.transforms import MAX_PIXELS, ImageError, Preprocess, decode_image


class ClipError(ContentError):
    """A clip that cannot be decoded; the message has its name and the reason."""


def frames_of(record: Record, fps: float) -> Iterator[Any]:
    """The frames of a clip as upright 8-bit pictures, one at a time.

    A clip is an animation (GIF, WebP, APNG), the encoded files of its frames in order, or, where the record says how
    many, one picture with the frames side by side. An animation says how long each of its frames lasts and is sampled
    `fps` times a second; frames without a duration come once. Raises ClipError for anything unreadable and for more
    than MAX_PIXELS pixels.
    """
    try:
        if record.frames:
            yield from _cut(decode_image(record.content, record.name), record)  # type: ignore[arg-type]
        elif isinstance(record.content, tuple):
            for number, file in enumerate(record.content):
                yield decode_image(file, f"{record.name}, frame {number}")
        else:
            yield from _animation(record, 1000 / fps)
    except ImageError as error:
        raise ClipError(str(error)) from None


def _cut(strip: Any, record: Record) -> Iterator[Any]:
    if strip.width % record.frames:
        raise ClipError(f"{record.name}: {strip.width} pixels are not {record.frames} frames side by side")
    width = strip.width // record.frames
    for left in range(0, strip.width, width):
        yield strip.crop((left, 0, left + width, strip.height))


def _animation(record: Record, period: float) -> Iterator[Any]:
    """What an animation shows in the middle of every `period` milliseconds."""
    from PIL import Image, ImageSequence

    decode_image(record.content, record.name)  # type: ignore[arg-type]  # refuses what is no picture or too large
    with Image.open(io.BytesIO(record.content)) as animation:  # type: ignore[arg-type]
        most = MAX_PIXELS // (animation.width * animation.height)
        count, end = 0, 0.0
        try:
            for frame in ImageSequence.Iterator(animation):
                picture = decode_image(frame.copy(), record.name)
                end += frame.info.get("duration") or period
                if end > (most + 0.5) * period:
                    raise ValueError(f"more than {most} frames, {MAX_PIXELS / 1e6:g} megapixels in all")
                while (count + 0.5) * period < end:
                    count += 1
                    yield picture
        except (OSError, EOFError, SyntaxError, ValueError) as error:
            raise ClipError(f"{record.name}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class VideoPreprocess(Preparation):
    """How a clip becomes uint8 frames of one size.

    Every frame is treated like an image (`size`, `channels`, `resize`, `crop`: 'center' or 'squash'). `frames` is the
    training window, taken at random; a clip with fewer repeats its last frame. With `frames` None a clip keeps its
    own. `flip` mirrors a whole clip. At `fps` animations are sampled and written; other sources do not say theirs.

    Raises ValueError for settings that are unknown or out of range.

    Examples:
        >>> preprocess = VideoPreprocess(size=8, frames=4)
        >>> strip = Record(np.zeros((8, 48, 3), np.uint8), -1, "strip", frames=6)  # six frames side by side
        >>> preprocess.arrange(preprocess.load(strip)).shape
        (3, 4, 8, 8)
    """

    medium = VIDEO

    size: int | None = None
    frames: int | None = None
    channels: int = 3
    resize: str = "bicubic"
    crop: str = "center"
    flip: bool = False
    fps: float = 25.0

    def __post_init__(self) -> None:
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"frames must be >= 1 or None, got {self.frames}")
        if self.crop == "random":
            raise ValueError("crop must be 'center' or 'squash' for clips, got 'random'")
        if not self.fps > 0:
            raise ValueError(f"fps must be > 0, got {self.fps}")
        self._image()

    def _image(self) -> Preprocess:
        return Preprocess(self.size, self.channels, self.resize, self.crop)

    @property
    def shape(self) -> tuple[int, ...] | None:
        return (self.channels, self.frames, self.size, self.size) if self.frames and self.size else None

    @property
    def windowed(self) -> bool:
        return self.frames is not None

    def load(self, record: Record) -> np.ndarray:
        """(C, T, H, W) uint8."""
        image = self._image()
        frames = [image.pixels(frame) for frame in frames_of(record, self.fps)]
        if not frames or len({frame.shape for frame in frames}) > 1:
            sizes = " and ".join(sorted({f"{f.shape[1]}x{f.shape[2]}" for f in frames})) or "no frames"
            raise ClipError(f"{record.name}: a clip has frames of one size, got {sizes}")
        return np.stack(frames, 1)

    def arrange(self, loaded: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        if self.frames is not None:
            loaded = loaded[:, window(loaded.shape[1], self.frames, rng)]
            loaded = np.pad(loaded, ((0, 0), (0, self.frames - loaded.shape[1]), (0, 0), (0, 0)), mode="edge")
        return loaded[..., ::-1] if self.flip and rng is not None and rng.random() < 0.5 else loaded

    def weight(self, loaded: np.ndarray) -> int:
        return loaded.nbytes

    def seconds(self, inputs: Tensor) -> float:
        return inputs.shape[0] * inputs.shape[2] / self.fps

    def save(self, path: Path, values: Tensor, about: Mapping[str, Any] | None = None) -> Path:
        """A lossless animated WebP file."""
        path = path.with_name(f"{path.name}.webp")
        save_animation(path, to_uint8(values).cpu().numpy(), self.fps)
        return path

    def whole(self) -> VideoPreprocess:
        return VideoPreprocess(self.size, None, self.channels, self.resize, self.crop, fps=self.fps)

    def own_size(self) -> VideoPreprocess:
        return VideoPreprocess(None, None, self.channels, fps=self.fps)


def save_animation(path: Path, frames: np.ndarray, fps: float) -> None:
    """`frames` (C, T, H, W) uint8 as a lossless animated WebP file.

    The format keeps equal neighbours as one frame that lasts as long as all of them, in whole milliseconds.
    """
    from PIL import Image

    pictures = [
        Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames.transpose(1, 2, 3, 0)
    ]
    ends = [round(1000 * i / fps) for i in range(len(pictures) + 1)]
    lasting = [b - a for a, b in zip(ends, ends[1:], strict=False)]
    with replacing(path) as temporary:
        pictures[0].save(temporary, "WEBP", save_all=True, append_images=pictures[1:], duration=lasting, lossless=True)
