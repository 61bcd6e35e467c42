"""Small made-up sets, the same on every machine: for trying sound and video out, and for tests."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from latticode.data.records import ArraySource, Record, Source
from latticode.data.waveforms import encode_wav


class Tones(Source):
    """Synthetic vowels at 8 kHz: five vowels at 48 pitches, labelled by vowel."""

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
    """Clips of 12 frames, 32x32: a handwritten digit of 16x16 that flies straight and bounces off the border."""

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
