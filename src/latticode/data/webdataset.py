"""WebDataset shards: tar files whose members with one stem form a sample. Nothing is extracted."""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path

from latticode.data.folders import EXTENSIONS, is_image
from latticode.data.records import Record, Source, number_labels, select


@dataclass(frozen=True)
class Member:
    """Where an image lies: `size` bytes at `offset` of shard `shard`."""

    shard: int
    offset: int
    size: int
    name: str


class TarSource(Source):
    """The samples of several shards, indexed once by their headers and read by offset."""

    def __init__(self, name: str, files: list[Path]):
        self.name, self.files = name, files
        self.members: list[Member] = []
        raw: list[int | str | None] = []
        for shard, path in enumerate(files):
            for member, label in _index(shard, path):
                self.members.append(member)
                raw.append(label)
        self.labels, self.classes = number_labels(raw)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, i: int) -> Record:
        member = self.members[i]
        with open(self.files[member.shard], "rb") as file:
            file.seek(member.offset)
            return Record(file.read(member.size), int(self.labels[i]), member.name)

    def name_of(self, i: int) -> str:
        return self.members[i].name


def open_tars(name: str, files: list[Path], parts: list[str | None], split: str, holdout: float) -> Source:
    """Samples of `files`; `parts` is the split that each shard is said to belong to."""
    source = TarSource(name, files)
    return select(source, [parts[member.shard] for member in source.members], split, holdout)


def _index(shard: int, path: Path) -> list[tuple[Member, int | str | None]]:
    """(image, label) of each sample of a shard, in its order.

    A sample is the members that share everything before the first dot of the file name. Its image is the member whose
    whole extension is an image's (KEY.jpg, not KEY.seg.png), or, where there is none, the first that ends like one; its
    label is in KEY.cls, or "label" in KEY.json.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    labels: dict[str, int | str | None] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, _, file = info.name.rpartition("/")
                if not info.isreg() or file.startswith("."):
                    continue
                stem, _, extension = file.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                samples.setdefault(key, {}).setdefault(extension.lower(), info)
                if extension.lower() in ("cls", "json") and labels.get(key) is None:
                    stream = tar.extractfile(info)
                    labels[key] = _label(stream.read() if stream else b"", extension.lower())
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is not a readable, uncompressed tar file: {error}") from error
    length = path.stat().st_size
    found = []
    for key, members in samples.items():
        extension = next((e for e in members if e in EXTENSIONS), None) or next(filter(is_image, members), None)
        if extension is None:
            continue
        info = members[extension]
        if info.offset_data + info.size > length:
            raise ValueError(
                f"{path} is truncated: {info.name} ends at byte {info.offset_data + info.size} of {length}"
            )
        found.append((Member(shard, info.offset_data, info.size, f"{path.stem}/{key}"), labels.get(key)))
    return found


def _label(data: bytes, extension: str) -> int | str | None:
    text = data.decode("utf-8", "replace").strip()
    if extension == "cls":
        return text or None
    try:
        label = json.loads(text)["label"]
    except (KeyError, TypeError, ValueError):
        return None
    return label if isinstance(label, int | str) else None
