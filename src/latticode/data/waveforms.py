"""Preprocessing of recordings: decoding (wav here, others by soundfile), resampling, windows; and wav files written."""

from __future__ import annotations

import io
import math
import struct
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latticode.core.files import replacing
from latticode.core.values import to_int16
from latticode.data.media import AUDIO, ContentError, Preparation, window
from latticode.data.records import Record

PCM, FLOAT, EXTENSIBLE = 1, 3, 0xFFFE  # format tags of wav files
UNKNOWN = 0x7FFFF000  # from here on, a size is what programs that cannot seek write for one that they do not know


class SoundError(ContentError):
    """A recording that cannot be decoded; the message has its name and the reason."""


def decode_sound(data: bytes | np.ndarray, name: str = "sound") -> tuple[np.ndarray, int]:
    """(samples (C, T) float32 in [-1, 1], samples per second) of an encoded file.

    Wav files (PCM of 8, 16, 24 and 32 bits, floats) are read here; anything else by soundfile, of the `audio` extra.
    Raises SoundError for what is unreadable, empty or not finite.
    """
    try:
        if not isinstance(data, bytes) or not data:
            raise SoundError("empty" if isinstance(data, bytes) else f"expected bytes, got {type(data).__name__}")
        samples, rate = _read_wav(data) if data[:4] == b"RIFF" and data[8:12] == b"WAVE" else _read_other(data)
        if not samples.size or rate < 1:
            raise SoundError(f"{samples.shape[1]} samples at {rate} Hz")
        if not np.isfinite(samples).all():
            raise SoundError("samples that are not finite")
    except SoundError as error:
        raise SoundError(f"{name}: {error}") from None
    return np.clip(samples, -1, 1).astype(np.float32, copy=False), rate


def _read_wav(data: bytes) -> tuple[np.ndarray, int]:
    """The chunks of a RIFF file: `fmt ` says what the samples in `data` are; others are passed over.

    A reader of its own because the standard library's knows no floats and scipy's warns, which threads cannot silence.
    """
    whole = 8 + struct.unpack_from("<I", data, 4)[0]  # bytes; with samples of size 0 and more behind, both are unknown
    place, layout = 12, None
    while place + 8 <= len(data):
        kind, size = data[place : place + 4], struct.unpack_from("<I", data, place + 4)[0]
        body = place + 8
        if kind == b"fmt " and size >= 16 and body + size <= len(data):
            tag, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", data, body)
            if tag == EXTENSIBLE and size >= 26:
                tag = struct.unpack_from("<H", data, body + 24)[0]
            layout = tag, channels, rate, bits
        elif kind == b"data":
            if layout is None:
                break
            if size >= UNKNOWN or (size == 0 and body >= whole):
                size = len(data) - body
            if body + size > len(data):
                raise SoundError(f"truncated: {len(data) - body} of {size} bytes of samples")
            return _samples(data[body : body + size], *layout)
        place = body + size + size % 2
    raise SoundError("a wav file without format or samples")


def _samples(data: bytes, tag: int, channels: int, rate: int, bits: int) -> tuple[np.ndarray, int]:
    if channels < 1 or (tag, bits) not in ((PCM, 8), (PCM, 16), (PCM, 24), (PCM, 32), (FLOAT, 32), (FLOAT, 64)):
        raise SoundError(f"wav format {tag} of {bits} bits and {channels} channels; valid: PCM 8, 16, 24, 32, floats")
    frame = channels * bits // 8
    data = data[: len(data) // frame * frame]
    if tag == FLOAT:
        samples = np.frombuffer(data, f"<f{bits // 8}")
    elif bits == 8:  # the only unsigned one
        samples = np.frombuffer(data, np.uint8).astype(np.float32) / 128 - 1
    elif bits == 24:
        triples = np.frombuffer(data, np.uint8).reshape(-1, 3)
        wide = np.concatenate([np.zeros_like(triples[:, :1]), triples], 1)  # the low byte of 32 bits is 0
        samples = np.ascontiguousarray(wide).view("<i4")[:, 0] / 2.0**31
    else:
        samples = np.frombuffer(data, f"<i{bits // 8}") / 2.0 ** (bits - 1)
    return samples.reshape(-1, channels).T, rate


def _read_other(data: bytes) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ImportError:
        raise SoundError("not a wav file; FLAC and OGG need soundfile: pip install 'latticode[audio]'") from None
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (RuntimeError, TypeError, ValueError) as error:
        raise SoundError(f"not a recording, or of an unknown format ({str(error).rpartition(': ')[2]})") from None
    return samples.T, int(rate)


def encode_wav(samples: np.ndarray, rate: int) -> bytes:
    """The 16-bit PCM wav file of `samples` (C, T) in [-1, 1]."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(samples))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(to_int16(torch.from_numpy(samples)).numpy().T.astype("<i2").tobytes())
    return buffer.getvalue()


def save_wav(path: Path, samples: np.ndarray, rate: int) -> None:
    """Write `samples` (T, channels) at `rate` as a wav file of 16 bits, atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(encode_wav(samples, rate))


@dataclass(frozen=True)
class AudioPreprocess(Preparation):
    """How a recording becomes float32 samples at one rate.

    `channels` 1 takes the mean of all channels, 2 keeps two or doubles one. Other rates are resampled by a polyphase
    low-pass filter (scipy's resample_poly, Kaiser window of 5). `length` is the training window in samples, taken at
    random; what is shorter is followed by silence, which counts in the loss like any other: a network has to reproduce
    the silence after a word too. With `length` None a recording keeps its own.

    Raises ValueError for a rate or length < 1 and other channels.

    Examples:
        >>> preprocess = AudioPreprocess(rate=8000, length=1000)
        >>> second = Record(encode_wav(np.zeros((2, 16000), np.float32), 16000), -1, "stereo.wav")
        >>> preprocess.arrange(preprocess.load(second)).shape
        (1, 1000)
        >>> preprocess.whole().load(second).shape
        (1, 8000)
    """

    medium = AUDIO
    dtype = np.float32
    flip = False

    rate: int
    length: int | None = None
    channels: int = 1

    def __post_init__(self) -> None:
        if self.rate < 1 or (self.length is not None and self.length < 1):
            raise ValueError(f"rate and length must be >= 1 (or length None), got {self.rate} and {self.length}")
        if self.channels not in (1, 2):
            raise ValueError(f"channels must be 1 or 2, got {self.channels}")

    @property
    def shape(self) -> tuple[int, ...] | None:
        return None if self.length is None else (self.channels, self.length)

    @property
    def windowed(self) -> bool:
        return self.length is not None

    def load(self, record: Record) -> np.ndarray:
        """(C, T) float32 at `rate`."""
        samples, rate = decode_sound(record.content, record.name)  # type: ignore[arg-type]
        if len(samples) != self.channels:
            if self.channels == 1:
                samples = samples.mean(0, keepdims=True)
            elif len(samples) == 1:
                samples = samples.repeat(2, 0)
            else:
                raise SoundError(f"{record.name}: {len(samples)} channels cannot become {self.channels}")
        if rate != self.rate:
            from scipy.signal import resample_poly

            common = math.gcd(rate, self.rate)
            samples = resample_poly(samples, self.rate // common, rate // common, axis=1)
            samples = np.clip(samples, -1, 1)  # a filter overshoots
        return np.ascontiguousarray(samples, np.float32)

    def arrange(self, loaded: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        if self.length is None:
            return loaded
        part = loaded[:, window(loaded.shape[1], self.length, rng)]
        return np.pad(part, ((0, 0), (0, self.length - part.shape[1])))

    def weight(self, loaded: np.ndarray) -> int:
        return loaded.nbytes

    def seconds(self, inputs: Tensor) -> float:
        return inputs.shape[0] * inputs.shape[2] / self.rate

    def save(self, path: Path, values: Tensor, about: Mapping[str, Any] | None = None) -> Path:
        """A 16-bit wav file."""
        path = path.with_name(f"{path.name}.wav")
        save_wav(path, values.float().cpu().numpy(), self.rate)
        return path

    def whole(self) -> AudioPreprocess:
        return AudioPreprocess(self.rate, None, self.channels)

    def own_size(self) -> AudioPreprocess:
        return self.whole()
