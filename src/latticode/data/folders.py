"""Folders of image files, and single image files."""

from __future__ import annotations

import os
from pathlib import Path

from latticode.data.records import Record, Source, part_of, select

# without the dot, lower case
PHOTOS = ("png", "jpg", "jpeg", "jpe", "jfif", "webp", "avif", "jp2", "gif")
OTHERS = ("bmp", "tif", "tiff", "tga", "ppm", "pgm", "pbm", "pnm")
EXTENSIONS = frozenset((*PHOTOS, *OTHERS))


def is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in EXTENSIONS


class FileSource(Source):
    """Image files below `root`; the name of a record is its path relative to it, with forward slashes."""

    def __init__(self, name: str, root: Path, files: list[str], labels: list[int], classes: tuple[str, ...]):
        self.name, self.root, self.files, self.labels, self.classes = name, root, files, labels, classes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Record:
        return Record((self.root / self.files[i]).read_bytes(), self.labels[i], self.name_of(i))

    def name_of(self, i: int) -> str:
        return self.files[i]


def open_file(name: str, path: Path) -> Source:
    """One image file. It is in every split: there is nothing to hold out."""
    return FileSource(name, path.parent, [path.name], [-1], ())


def open_folder(name: str, root: Path, split: str, holdout: float) -> Source:
    """All image files below `root`, sorted by path.

    The label is the name of the folder directly under the root, none for files in the root itself. Folders named
    train and test (or val) directly under the root are the splits, and the classes lie under them; classes are
    numbered over all splits together. Raises ValueError if there is no image.
    """
    files = sorted(_walk(root))
    if not files:
        endings = ", ".join(sorted(EXTENSIONS))
        raise ValueError(f"no images under {str(root)!r}; known endings: {endings}; or *.parquet, *.tar, idx files")
    parts = [_split_folder(file) for file in files]
    named = {"train", "test"} <= set(parts) or {"train", "val"} <= set(parts)
    groups = []
    for file, part in zip(files, parts, strict=True):
        folders = file.split("/")[:-1][1 if named and part else 0 :]
        groups.append(folders[0] if folders else None)
    classes = tuple(sorted({group for group in groups if group is not None}))
    number = {group: i for i, group in enumerate(classes)}
    labels = [-1 if group is None else number[group] for group in groups]
    return select(FileSource(name, root, files, labels, classes), parts if named else None, split, holdout)


def _split_folder(file: str) -> str | None:
    """The split that the first folder of a relative path names: the exact words, as a class may start like one."""
    first, _, rest = file.partition("/")
    return part_of(first) if rest and first.lower() in ("train", "test", "val", "validation") else None


def _walk(root: Path) -> list[str]:
    """Relative paths of the image files below `root`; hidden ones left out, links followed, each folder once."""
    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith((".", "__MACOSX")))
        relative = Path(folder).relative_to(root)
        found += [(relative / file).as_posix() for file in files if is_image(file) and not file.startswith(".")]
    return found
