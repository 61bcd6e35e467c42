"""Batches as one picture: grids, originals above reconstructions, spectrograms, film strips, segments, legends."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from latticode.core.values import to_uint8
from latticode.data import AUDIO, VIDEO, Preparation
from latticode.data.writing import to_picture
from latticode.losses.spectral import magnitudes

BACKGROUND = 255
WINDOW, DEEPEST, SHOWN = 256, -80.0, 8  # samples and dB of spectrograms; frames of a film strip
# Colours of a spectrogram from silence to full scale: dark to light, so that they also read in grey.
RAMP = np.array([[0, 0, 12], [65, 20, 105], [170, 50, 90], [240, 130, 40], [255, 250, 180]], dtype=np.float64)
GOLDEN, SATURATION = 0.618034, 0.65  # steps between the hues of classes, and how strong they are
FONT, LINE, GAP = 12, 16, 6  # pixels of a legend


def grid_image(images: np.ndarray | Tensor, columns: int = 8, pad: int = 2) -> Image.Image:
    """A grid of uint8 images (N, C, H, W), row by row, with `pad` white pixels between them; C is 1, 3 or 4.

    Raises ValueError for an empty batch, another type or shape, columns < 1 or pad < 0.
    """
    return to_picture(_grid(_channel_last(images), columns, pad))


def side_by_side(
    originals: np.ndarray | Tensor, reconstructions: np.ndarray | Tensor, columns: int = 8, pad: int = 2
) -> Image.Image:
    """Each row of originals (N, C, H, W) uint8 directly above the row of their reconstructions, pairs of rows apart.

    Raises ValueError as `grid_image` does, and when the two batches differ in shape.
    """
    above, below = _channel_last(originals), _channel_last(reconstructions)
    if above.shape != below.shape:
        raise ValueError(
            f"originals and reconstructions must have one shape, got {tuple(originals.shape)} and "
            f"{tuple(reconstructions.shape)}"
        )
    columns = min(columns, len(above))
    rows = []
    for start in range(0, len(above), max(columns, 1)):
        chunk = slice(start, start + columns)
        rows.append(_stack([_grid(above[chunk], columns, pad), _grid(below[chunk], columns, pad)], pad))
    return to_picture(_stack(rows, 4 * pad))


def spectrograms(waveforms: Tensor) -> np.ndarray:
    """(N, 3, WINDOW / 2 + 1, 2 * frames) uint8 of waveforms (N, C, T), from DEEPEST to 0 dB.

    Time runs to the right, pitch upwards; the channels of one recording are averaged in power.
    """
    spectra = magnitudes(waveforms.float(), WINDOW).unflatten(0, waveforms.shape[:2]).square().mean(1)
    level = (1 - 10 * spectra.log10().numpy() / DEEPEST)[:, ::-1].repeat(2, 2)
    return _ramp(level)


def ramp_colours(share: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 of numbers (B, H, W): 0 is dark, 1 light; those outside are clamped."""
    return torch.from_numpy(_ramp(share.double().cpu().numpy()))


def _ramp(share: np.ndarray) -> np.ndarray:
    knots = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(share.clip(0, 1), knots, RAMP[:, i]) for i in range(3)], 1).round().astype(np.uint8)


def segment_colours(classes: Tensor, instances: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 of maps (B, H, W) int64: a hue for each class, always the same, a shade for each instance, and
    a dark outline where a segment ends."""
    number, instance = classes.cpu().numpy(), instances.cpu().numpy()
    hue = number * GOLDEN % 1  # neighbours in number are far apart, however many classes there are
    light = np.where(instance > 0, 0.6 + 0.4 * (instance * GOLDEN % 1), 0.8) - 0.25 * (number % 2)
    corners = (hue[:, None] * 6 + np.array([0, 4, 2])[:, None, None]) % 6  # RGB of a hue at full saturation
    colour = 1 - SATURATION * (1 - (np.abs(corners - 3) - 1).clip(0, 1))
    segment = number * (instance.max(initial=0) + 1) + instance
    ends = np.zeros(segment.shape, bool)
    ends[:, 1:] |= segment[:, 1:] != segment[:, :-1]
    ends[:, :, 1:] |= segment[:, :, 1:] != segment[:, :, :-1]
    return torch.from_numpy((255 * colour * (light * np.where(ends, 0.4, 1))[:, None]).round().astype(np.uint8))


def with_legend(image: Image.Image, entries: Sequence[tuple[str, tuple[int, ...]]]) -> Image.Image:
    """`image` with a column at its right that names colours (text, RGB), top down; as it is for no entries."""
    if not entries:
        return image
    font = ImageFont.load_default(size=FONT)
    line = min(LINE, max(2, image.height // len(entries))) if any(not text for text, _ in entries) else LINE
    wide = max(round(font.getlength(text)) for text, _ in entries)
    height = max(image.height, line * len(entries) + FONT)
    canvas = Image.new("RGB", (image.width + 3 * GAP + LINE + wide, height), (BACKGROUND,) * 3)
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    left = image.width + GAP
    for place, (text, colour) in enumerate(entries):
        top = FONT // 2 + place * line
        draw.rectangle((left, top, left + LINE - 1, top + line - 1), tuple(colour))
        draw.text((left + LINE + GAP, top + line / 2), text, fill=(0, 0, 0), font=font, anchor="lm")
    return canvas


def captioned(parts: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures below each other, each under its text. Raises ValueError for none."""
    if not parts:
        raise ValueError("expected at least one picture")
    font = ImageFont.load_default(size=FONT)
    wide = max(max(image.width, round(font.getlength(text))) for text, image in parts)
    canvas = Image.new("RGB", (wide, sum(LINE + image.height + GAP for _, image in parts) - GAP), (BACKGROUND,) * 3)
    draw, top = ImageDraw.Draw(canvas), 0
    for text, image in parts:
        draw.text((0, top + LINE / 2), text, fill=(0, 0, 0), font=font, anchor="lm")
        canvas.paste(image, (0, top + LINE))
        top += LINE + image.height + GAP
    return canvas


def film_strips(clips: np.ndarray) -> np.ndarray:
    """(N, C, H, frames * W) of clips (N, C, T, H, W): at most SHOWN frames side by side, evenly spaced in time."""
    count = clips.shape[2]
    chosen = np.linspace(0, count - 1, min(count, SHOWN)).round().astype(int)
    return np.concatenate([clips[:, :, t] for t in chosen], -1)


def _channel_last(images: np.ndarray | Tensor) -> np.ndarray:
    """(N, C, H, W) to (N, H, W, C), checked."""
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] not in (1, 3, 4) or array.size == 0:
        raise ValueError(f"expected uint8 images (N, 1|3|4, H, W), N >= 1, got {array.shape} {array.dtype}")
    return array.transpose(0, 2, 3, 1)


def _grid(images: np.ndarray, columns: int, pad: int) -> np.ndarray:
    """(N, H, W, C) to one (rows H + gaps, columns W + gaps, C); places without an image are background."""
    if columns < 1 or pad < 0:
        raise ValueError(f"columns must be >= 1 and pad >= 0, got columns={columns}, pad={pad}")
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + pad) - pad, columns * (width + pad) - pad, channels), BACKGROUND, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + pad), index % columns * (width + pad)
        canvas[top : top + height, left : left + width] = image
    return canvas


def _stack(rows: list[np.ndarray], gap: int) -> np.ndarray:
    """Rows of one width, top to bottom, `gap` background pixels apart."""
    _, width, channels = rows[0].shape
    space = np.full((gap, width, channels), BACKGROUND, dtype=np.uint8)
    parts = [part for row in rows for part in (space, row)]
    return np.concatenate(parts[1:])


PREVIEWS: Mapping[str, Callable[[Tensor], tuple[np.ndarray, int]]] = {  # by the name of the medium
    AUDIO.name: lambda values: (spectrograms(values.cpu()), 4),
    VIDEO.name: lambda values: (film_strips(to_uint8(values).cpu().numpy()), 1),
}


def preview(values: Tensor, preprocess: Preparation) -> tuple[np.ndarray, int]:
    """(pictures (N, C, H, W) uint8 of a batch (N, C, *size) in [-1, 1], how many fit side by side): images as they are,
    spectrograms of sound, film strips of clips."""
    pictured = PREVIEWS.get(preprocess.medium.name)
    return pictured(values) if pictured else (to_uint8(values).cpu().numpy(), 8)
