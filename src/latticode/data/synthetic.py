"""Synthetic data sets, the same on every machine: to try audio, video and dense tasks, and for tests."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from latticode.data.records import ArraySource, Record, Source
from latticode.data.waveforms import encode_wav


class Tones(Source):
    """Synthetic vowels at 8 kHz: five vowels at 48 pitches, labelled by vowel.

    Examples:
        >>> tones = Tones("tones")
        >>> len(tones), tones.classes, tones[0].name
        (240, ('i', 'e', 'a', 'o', 'u'), 'tones/i-00')
    """

    # The first two formants in Hz of i, e, a, o, u (Peterson and Barney 1952, men, rounded)
    FORMANTS: ClassVar = {"i": (270, 2290), "e": (530, 1840), "a": (730, 1090), "o": (570, 840), "u": (300, 870)}
    RATE, PITCHES = 8000, 48

    def __init__(self, name: str):
        self.name, self.classes = name, tuple(self.FORMANTS)

    def __len__(self) -> int:
        return len(self.FORMANTS) * self.PITCHES

    def __getitem__(self, i: int) -> Record:
        pitch, vowel = divmod(i, len(self.FORMANTS))
        start = 80 * 2 ** (pitch / self.PITCHES * 1.5)  # Hz, gliding up a tenth; 0.3 to 0.5 s
        time = np.arange(2400 + 33 * pitch) / self.RATE
        phase = 2 * np.pi * start * (time + 0.1 * time**2)
        harmonics = np.arange(1, int(3600 / start))[:, None]
        distance = np.stack([(harmonics * start - formant) / 120 for formant in self.FORMANTS[self.classes[vowel]]])
        sound = ((1 / (1 + distance**2)).sum(0) * np.sin(harmonics * phase)).sum(0) * np.hanning(len(time))
        return Record(encode_wav(sound[None] / np.abs(sound).max() * 0.7, self.RATE), vowel, self.name_of(i))

    def name_of(self, i: int) -> str:
        return f"tones/{self.classes[i % len(self.classes)]}-{i // len(self.classes):02d}"


class MovingDigits(Source):
    """Clips of 12 frames, 32x32: a handwritten digit of 16x16 that flies straight and bounces off the border.

    Examples:
        >>> digits = ArraySource("digits", np.full((1, 8, 8), 255, np.uint8), np.array([7]), ("0",) * 10, ["seven"])
        >>> clip = MovingDigits("moving", digits)[0]
        >>> clip.content.shape, clip.frames, clip.label  # the frames side by side
        ((32, 384), 12, 7)
    """

    FRAMES, SIDE = 12, 32

    def __init__(self, name: str, digits: ArraySource):
        self.name, self.classes, self.digits = name, digits.classes, digits

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, i: int) -> Record:
        digit = self.digits[i]
        sprite = np.asarray(digit.content).repeat(2, 0).repeat(2, 1)  # type: ignore[arg-type]
        way = np.random.default_rng(i).uniform([0, 0, -3, -3], [32, 32, 3, 3])  # place and speed, pixels a frame
        strip = np.zeros((self.SIDE, self.FRAMES * self.SIDE), np.uint8)
        for t in range(self.FRAMES):
            top, left = np.abs((way[:2] + way[2:] * t) % 32 - 16).round().astype(int)  # a triangle wave over 0 .. 16
            strip[top : top + 16, t * self.SIDE + left : t * self.SIDE + left + 16] = sprite
        return Record(strip, digit.label, self.name_of(i), self.FRAMES)

    def name_of(self, i: int) -> str:
        return f"moving-{self.digits.name_of(i)}"


class Shapes(Source):
    """Photographs of a room, 64x64: balls and boxes on a chequered floor before a wall, nearer ones in front.

    Label maps: "depth.png" in millimetres (0 = not measured), "sem.png" (`NAMES` in this order) and "inst.png" (0 =
    none). At the rims of things nothing is measured, and the class is `VOID`: sensors and annotators are unsure there.

    Examples:
        >>> room = Shapes("shapes")[0]
        >>> room.content.shape, sorted(room.maps)
        ((64, 64, 3), ['depth.png', 'inst.png', 'sem.png'])
    """

    NAMES, VOID = ("floor", "wall", "ball", "box"), 4
    COUNT, SIDE, HORIZON, FOCAL, EYE = 300, 64, 20, 60.0, 1.5  # pixels; the eye is 1.5 m above the floor
    classes = ()

    def __init__(self, name: str):
        self.name = name

    def __len__(self) -> int:
        return self.COUNT

    def name_of(self, i: int) -> str:
        return f"shapes/{i:04d}"

    def __getitem__(self, i: int) -> Record:
        rng = np.random.default_rng(i)
        y, x = np.mgrid[: self.SIDE, : self.SIDE] + 0.5
        x, y = (x - self.SIDE / 2) / self.FOCAL, (y - self.HORIZON) / self.FOCAL  # of the rays, to the right and down
        wall, tints = rng.uniform(4, 7), rng.uniform(0.3, 1, (3, 3))  # metres; colours of wall, floor, other tiles
        depth = np.minimum(wall, self.EYE / np.maximum(y, 1e-6))
        semantic, instance, sure = np.where(depth == wall, 1, 0), np.zeros(depth.shape, int), depth > 0
        tile = (np.floor(x * depth) + np.floor(depth)).astype(int) % 2
        colour = np.where(semantic[..., None], tints[0], tints[1 + tile])
        for number, distance in enumerate(np.sort(rng.uniform(1.5, wall - 0.5, rng.integers(2, 6)))[::-1], 1):
            is_box, radius, tint = rng.random() < 0.5, rng.uniform(0.2, 0.5), rng.uniform(0.3, 1, 3)
            across = (x * distance - rng.uniform(-0.5, 0.5) * distance) / radius  # -1 .. 1 on it
            down = (y * distance - self.EYE + radius) / radius
            reach = np.maximum(abs(across), abs(down)) if is_box else np.hypot(across, down)
            facing = np.ones_like(reach) if is_box else np.sqrt(np.maximum(0, 1 - reach**2))
            light = 0.25 + 0.75 * np.clip(0.8 * facing - 0.3 * across - 0.4 * down, 0, 1)  # from above on the left
            on = reach <= 1
            colour[on], depth[on] = (tint * light[..., None])[on], (distance - radius * facing)[on]
            semantic[on], instance[on] = 2 + is_box, number
            sure = np.where(reach <= 1.1, reach < 0.9, sure)
        dimmed = 255 * colour * np.exp(-depth / 10)[..., None] + rng.normal(0, 3, colour.shape)
        maps = {
            "depth.png": np.rint(1000 * depth * sure).astype(np.uint16),
            "sem.png": np.where(sure, semantic, self.VOID).astype(np.uint8),
            "inst.png": (instance * sure).astype(np.uint8),
        }
        return Record(np.clip(np.rint(dimmed), 0, 255).astype(np.uint8), -1, self.name_of(i), maps=maps)
