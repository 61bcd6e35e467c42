"""WebDataset shards: tar files whose members with one stem form a sample. Nothing is extracted."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from latticode.data.media import IMAGE, VIDEO, Medium
from latticode.data.records import Record, Source, captions, number_labels, select


@dataclass(frozen=True)
class Member:
    """Where a record lies: `size` bytes at `offset` of shard `shard`, as `frames` side by side if it is a strip; its
    captions ("txt") and label maps are the (bytes, offset) of `parts`.

    Examples:
        >>> member = Member(shard=0, offset=512, size=100, name="train-0/cat", frames=0, parts={"txt": (8, 1536)})
        >>> member.parts["txt"]
        (8, 1536)
    """

    shard: int
    offset: int
    size: int
    name: str
    frames: int
    parts: Mapping[str, tuple[int, int]]


class TarSource(Source):
    """The samples of several shards, indexed once by their headers and read by offset.

    Examples:
        >>> from io import BytesIO
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with tarfile.open(Path(folder) / "train-0.tar", "w") as tar:
        ...         for name, content in (("0.jpg", b"..."), ("0.cls", b"3"), ("0.txt", b"a cat")):
        ...             info = tarfile.TarInfo(name)
        ...             info.size = len(content)
        ...             tar.addfile(info, BytesIO(content))
        ...     source = TarSource("pets", [Path(folder) / "train-0.tar"])
        ...     len(source), source[0].label, source[0].texts
        (1, 3, ('a cat',))
    """

    def __init__(self, name: str, files: list[Path], medium: Medium = IMAGE):
        self.name, self.files = name, files
        self.members: list[Member] = []
        raw: list[int | str | None] = []
        for shard, path in enumerate(files):
            for member, label in _index(shard, path, medium):
                self.members.append(member)
                raw.append(label)
        self.labels, self.classes = number_labels(raw)

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, i: int) -> Record:
        member = self.members[i]
        with open(self.files[member.shard], "rb") as file:
            file.seek(member.offset)
            content, parts = file.read(member.size), {}
            for extension, (size, offset) in member.parts.items():
                file.seek(offset)
                parts[extension] = file.read(size)
        texts = captions(parts.pop("txt", None))
        return Record(content, int(self.labels[i]), member.name, member.frames, texts, parts)

    def name_of(self, i: int) -> str:
        return self.members[i].name


def open_tars(
    name: str, files: list[Path], parts: list[str | None], split: str, holdout: float, medium: Medium = IMAGE
) -> Source:
    """Samples of `files`; `parts` is the split that each shard is said to belong to."""
    source = TarSource(name, files, medium)
    return select(source, [parts[member.shard] for member in source.members], split, holdout)


def _index(shard: int, path: Path, medium: Medium) -> list[tuple[Member, int | str | None]]:
    """(record, label) of each sample of a shard, in its order.

    A sample is the members that share everything before the first dot of the file name. Its content is the member whose
    whole extension is of `medium` (for images KEY.jpg, not KEY.seg.png), or, where there is none, the first that ends
    like one and is no label map. A clip may also be an image of its frames side by side, with their number as "frames"
    in KEY.json. The label is in KEY.cls, or "label" or "class" in KEY.json; the captions are the lines of KEY.txt.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    labels: dict[str, int | str | None] = {}
    strips: dict[str, int] = {}  # frames of clips that are stored as one image
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, _, file = info.name.rpartition("/")
                if not info.isreg() or file.startswith("."):
                    continue
                stem, _, extension = file.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                samples.setdefault(key, {}).setdefault(extension.lower(), info)
                if extension.lower() not in ("cls", "json"):
                    continue
                stream = tar.extractfile(info)
                label, frames = _about(stream.read() if stream else b"", extension.lower())
                if labels.get(key) is None:
                    labels[key] = label
                if frames and medium is VIDEO:
                    strips[key] = frames
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path} is not a readable, uncompressed tar file: {error}") from error
    length = path.stat().st_size
    found = []
    for key, members in samples.items():
        kind = IMAGE if key in strips else medium
        content = list(filter(kind.holds, members))
        extension = next((e for e in content if e in kind.endings), None) or next(iter(content), None)
        if extension is None:
            continue
        info, beside = members[extension], {e: members[e] for e in ("txt", *medium.maps) if e in members}
        for part in (info, *(beside[e] for e in medium.maps if e in beside)):
            if part.offset_data + part.size > length:
                raise ValueError(
                    f"{path} is truncated: {part.name} ends at byte {part.offset_data + part.size} of {length}"
                )
        parts = {e: (part.size, part.offset_data) for e, part in beside.items()}
        member = Member(shard, info.offset_data, info.size, f"{path.stem}/{key}", strips.get(key, 0), parts)
        found.append((member, labels.get(key)))
    return found


def _about(data: bytes, extension: str) -> tuple[int | str | None, int]:
    """(label or None, number of frames or 0) that a .cls or .json member says."""
    text = data.decode("utf-8", "replace").strip()
    if extension == "cls":
        return text or None, 0
    try:
        content = json.loads(text)
    except ValueError:
        return None, 0
    if not isinstance(content, dict):
        return None, 0
    label, frames = content.get("label", content.get("class")), content.get("frames")
    return label if isinstance(label, int | str) else None, frames if isinstance(frames, int) and frames > 0 else 0
