"""The idx format of MNIST and its relatives (http://yann.lecun.com/exdb/mnist), plain or gzipped."""

from __future__ import annotations

import gzip
import re
import struct
import zlib
from pathlib import Path

import numpy as np

from latticode.data.records import ArraySource, Source, held_out_part, select

FILE = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx([13])-ubyte(\.gz)?$")


def find(folder: Path) -> dict[tuple[str, str], Path]:
    """(part, kind) -> file; part in train, test; kind in images, labels. Empty if the folder has no idx images."""
    found: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.iterdir()):
        if match := FILE.match(path.name):
            found.setdefault(("train" if match[1] == "train" else "test", match[2]), path)
    return found if any(kind == "images" for _, kind in found) else {}


def read(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array in an idx file. Raises ValueError for another magic number, dimensions, or a wrong length."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read, probably truncated: {error}") from error
    header = 4 + 4 * dimensions
    if len(data) < header:
        raise ValueError(f"{path} is truncated: {len(data)} bytes, its header alone needs {header}")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", data[:header])
    if magic != 0x800 + dimensions:  # two zero bytes, 08 = unsigned byte, number of dimensions
        raise ValueError(
            f"{path} is not idx{dimensions} of unsigned bytes: magic {magic:#x}, not {0x800 + dimensions:#x}"
        )
    expected = int(np.prod(shape, dtype=np.int64))
    if len(data) - header != expected:
        raise ValueError(f"{path} is truncated or damaged: {len(data) - header} values for shape {tuple(shape)}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def open_idx(name: str, files: dict[tuple[str, str], Path], split: str, holdout: float) -> Source:
    """The split of a folder of idx files; a folder without a test part is split by index."""
    parts = sorted({part for part, kind in files if kind == "images"}, reverse=True)  # train before test
    labels = {part: read(files[part, "labels"], 1) for part in parts if (part, "labels") in files}
    labelled = len(labels) == len(parts)
    classes = tuple(str(i) for i in range(1 + max(int(x.max(initial=0)) for x in labels.values()))) if labelled else ()
    part = None if split == "all" else held_out_part(set(parts), split, name)
    wanted = parts if part is None else [part]
    images = [read(files[p, "images"], 3) for p in wanted]
    for p, array in zip(wanted, images, strict=True):
        if labelled and len(array) != len(labels[p]):
            raise ValueError(f"{name!r}: {len(array)} {p} images but {len(labels[p])} labels")
    source = ArraySource(
        name,
        images[0] if len(images) == 1 else np.concatenate(images),
        np.concatenate([labels[p] for p in wanted]).astype(np.int64) if labelled else None,
        classes,
        [f"{p}/{i:06d}" for p, array in zip(wanted, images, strict=True) for i in range(len(array))],
    )
    return select(source, None, split if part is None else "all", holdout)
