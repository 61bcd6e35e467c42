"""Folders of images, audio files or clips, and single files, as sources."""

from __future__ import annotations

import os
import re
from collections.abc import Set
from pathlib import Path

from latticode.data.media import IMAGE, VIDEO, Medium
from latticode.data.records import Record, Source, captions, part_of, select


class FileSource(Source):
    """Files below `root`, or folders of a clip's frames; a record's name is its relative path with forward slashes.

    `captioned` are those with captions in a file beside them: photo.jpg in photo.txt, one per line. `maps` are the
    endings of files beside them with label maps, which may be missing.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "cat.png").write_bytes(b"...")
        ...     _ = (Path(folder) / "cat.txt").write_text("a cat on a mat")
        ...     source = FileSource("cats", Path(folder), ["cat.png"], [-1], (), captioned={"cat.png"})
        ...     source[0].content, source[0].texts
        (b'...', ('a cat on a mat',))
    """

    def __init__(
        self,
        name: str,
        root: Path,
        files: list[str],
        labels: list[int],
        classes: tuple[str, ...],
        captioned: Set[str] = frozenset(),
        maps: tuple[str, ...] = (),
    ):
        self.name, self.root, self.files, self.labels, self.classes = name, root, files, labels, classes
        self.captioned, self.maps = captioned, maps

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Record:
        path = self.root / self.files[i]
        content = tuple(map(Path.read_bytes, _frames(path))) if path.is_dir() else path.read_bytes()
        texts = ()
        if self.files[i] in self.captioned:
            texts = captions((self.root / _beside(self.files[i], path.is_dir())).read_bytes())
        beside = {ending: path.with_name(f"{path.stem}.{ending}") for ending in self.maps}
        maps = {ending: file.read_bytes() for ending, file in beside.items() if file.is_file()}
        return Record(content, self.labels[i], self.name_of(i), texts=texts, maps=maps)

    def name_of(self, i: int) -> str:
        return self.files[i]


def open_file(name: str, path: Path, medium: Medium = IMAGE) -> Source:
    """One file. It is in every split: there is nothing to hold out."""
    captioned = {path.name} if (path.parent / _beside(path.name)).is_file() else set()
    return FileSource(name, path.parent, [path.name], [-1], (), captioned, medium.maps)


def open_folder(name: str, root: Path, split: str, holdout: float, medium: Medium = IMAGE) -> Source:
    """All files of `medium` below `root`, sorted by path. A folder that directly holds images is a clip of its frames.

    The label is the name of the folder directly under the root, none for files in the root itself. Folders named
    train and test (or val) directly under the root are the splits, and the classes lie under them; classes are
    numbered over all splits together. Raises ValueError if there is nothing.
    """
    found, captioned = _walk(root, medium)
    files = sorted(found)
    if not files:
        endings = ", ".join(sorted(medium.endings)) + (", or folders of frames" if medium is VIDEO else "")
        raise ValueError(
            f"no {medium.noun}s under {str(root)!r}; known endings: {endings}; or *.parquet, *.tar"
            + (", idx files" if medium is IMAGE else "")
        )
    parts = [_split_folder(file) for file in files]
    named = {"train", "test"} <= set(parts) or {"train", "val"} <= set(parts)
    groups = []
    for file, part in zip(files, parts, strict=True):
        folders = file.split("/")[:-1][1 if named and part else 0 :]
        groups.append(folders[0] if folders else None)
    classes = tuple(sorted({group for group in groups if group is not None}))
    number = {group: i for i, group in enumerate(classes)}
    labels = [-1 if group is None else number[group] for group in groups]
    source = FileSource(name, root, files, labels, classes, captioned, medium.maps)
    return select(source, parts if named else None, split, holdout)


def _split_folder(file: str) -> str | None:
    """The split that the first folder of a relative path names: the exact words, as a class may start like one."""
    first, _, rest = file.partition("/")
    return part_of(first) if rest and first.lower() in ("train", "test", "val", "validation") else None


def _walk(root: Path, medium: Medium) -> tuple[list[str], set[str]]:
    """Relative paths of the files of `medium` below `root`, and for clips of folders that directly hold images; hidden
    ones left out, links followed, each folder once. And which of them have captions beside them."""
    found, seen, notes = [], set(), set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith((".", "__MACOSX")))
        relative = Path(folder).relative_to(root)
        found += [(relative / file).as_posix() for file in files if medium.holds(file) and not file.startswith(".")]
        notes |= {(relative / file).as_posix() for file in files if file.endswith(".txt")}
        if medium is VIDEO and any(_is_frame(file) for file in files):
            found.append(relative.as_posix())
    captioned = {file for file in found if _beside(file, not medium.holds(file)) in notes} if notes else set()
    return found, captioned


def _beside(file: str, is_folder: bool = False) -> str:
    """Where the captions of a file, or of a folder of frames, are."""
    return (file if is_folder else file.rpartition(".")[0]) + ".txt"


def _is_frame(file: str) -> bool:
    return IMAGE.holds(file) and not VIDEO.holds(file) and not file.startswith(".")


def _frames(folder: Path) -> list[Path]:
    """The pictures of a clip in order, 2.png before 10.png."""
    files = [file for file in folder.iterdir() if _is_frame(file.name)]
    return sorted(files, key=lambda file: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", file.name)])
