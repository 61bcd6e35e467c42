"""`open_source`: from what a user names (folder, file, pattern, hub:, embedded:) to a `Source`."""

from __future__ import annotations

import glob
from collections.abc import Callable
from pathlib import Path

from latticode.core.plugins import Table
from latticode.data import coco, embedded, folders, hub, idx, parquet, webdataset
from latticode.data.media import DENSE, IMAGE, Medium
from latticode.data.records import SPLITS, Record, Source, StreamSource, part_of

__all__ = ["FORMS", "Record", "Source", "StreamSource", "open_source"]

FORMS = (
    "a folder of images, recordings or clips, or one such file",
    "a *.parquet file or a folder of them",
    "a *.tar WebDataset shard, a folder of them, or a pattern such as 'shards/train-*.tar'",
    "a folder of idx files (train-images-idx3-ubyte.gz ...)",
    "COCO's panoptic annotations: their folder or one of the *.json files",
    "hub:owner/name or hub:owner/name?streaming",
    *(f"embedded:{name}" for name in sorted(embedded.SETS)),
)


def _open_hub(source: str, split: str, holdout: float, medium: Medium) -> Source:
    _without_maps(source, medium)
    return hub.open_hub(source, split, holdout, medium)


def _open_embedded(source: str, split: str, holdout: float, medium: Medium) -> Source:
    name = source.removeprefix("embedded:")
    if name not in embedded.SETS:
        raise ValueError(_unknown(source, f"embedded are {', '.join(sorted(embedded.SETS))}"))
    kind, opener = embedded.SETS[name]
    if kind.noun != medium.noun:
        raise ValueError(f"{source} holds {kind.noun}s, not {medium.noun}s: data.kind={kind.name} reads it")
    if kind is not DENSE:
        _without_maps(source, medium)
    return opener(source, split, holdout)


def _given(source: str, split: str, holdout: float, medium: Medium) -> Source:
    raise ValueError(
        f"{source!r} is data that a program gave to `latticode.engine.train(..., data=...)`; nothing else can read it. "
        "Name a source"
    )


OPENERS: Table[Callable[[str, str, float, Medium], Source]] = Table(
    "source", {"hub": _open_hub, "embedded": _open_embedded, "given": _given}
)


def open_source(source: str, split: str = "train", *, holdout: float = 0.1, medium: Medium = IMAGE) -> Source:
    """The records of `source` (see `FORMS`), all of one `medium`, that belong to `split`: 'train', 'test' or 'all'.

    A source with splits of its own keeps them. Any other is split by a hash of each record's name, a fraction `holdout`
    going to test. Raises ValueError for an unknown form, a path that does not exist, a source or split without any,
    and damaged files.

    Examples:
        >>> train, test = (open_source("embedded:digits", split) for split in ("train", "test"))
        >>> len(train) + len(test), len(train.classes)
        (1797, 10)
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if not 0 < holdout < 1:
        raise ValueError(f"holdout must lie strictly between 0 and 1, got {holdout}")
    scheme, colon, _ = source.partition(":")
    if colon and scheme in OPENERS:
        return OPENERS[scheme](source, split, holdout, medium)
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(source, path, split, holdout, medium)
    if path.is_file():
        return _open_files(source, [path], [None], split, holdout, medium)
    if any(character in source for character in "*?["):
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise ValueError(_unknown(source, "the pattern matches no file"))
        return _open_files(source, files, [part_of(file.name) for file in files], split, holdout, medium)
    existing = next(parent for parent in path.absolute().parents if parent.is_dir())
    raise ValueError(_unknown(source, f"no such path; the nearest folder that exists is {str(existing)!r}"))


def _open_folder(source: str, folder: Path, split: str, holdout: float, medium: Medium) -> Source:
    if medium is IMAGE and (files := idx.find(folder)):
        return idx.open_idx(source, files, split, holdout)
    if medium.maps and (files := coco.find(folder)):
        return coco.open_coco(source, files, split, holdout, medium)
    for suffix in (".parquet", ".tar"):
        if shards := sorted(file for file in folder.iterdir() if file.suffix == suffix and file.is_file()):
            return _open_files(source, shards, [part_of(shard.name) for shard in shards], split, holdout, medium)
    return folders.open_folder(source, folder, split, holdout, medium)


def _open_files(
    source: str, files: list[Path], parts: list[str | None], split: str, holdout: float, medium: Medium
) -> Source:
    """`parts` is the split that each file's name says; a file that the user named alone says none."""
    suffixes = {file.suffix.lower() for file in files}
    if suffixes == {".json"}:
        return coco.open_coco(source, files, split, holdout, medium)
    if suffixes == {".parquet"}:
        _without_maps(source, medium)
        return parquet.open_parquet(source, files, parts, split, holdout, medium)
    if suffixes == {".tar"}:
        return webdataset.open_tars(source, files, parts, split, holdout, medium)
    if len(files) == 1 and medium.holds(files[0].name):
        return folders.open_file(source, files[0], medium)
    raise ValueError(_unknown(source, f"no reader of {medium.noun}s for {', '.join(sorted(suffixes)) or 'it'}"))


def _without_maps(source: str, medium: Medium) -> None:
    if medium.maps:
        raise ValueError(
            f"{source!r} has no label maps ({', '.join(medium.maps)}); they are read from folders, tar files, COCO's "
            "panoptic annotations and embedded:shapes"
        )


def _unknown(source: str, reason: str) -> str:
    more = [f"{name}:..." for name in OPENERS if name not in ("hub", "embedded", "given")]
    return f"unknown source {source!r}: {reason}. Valid forms: " + "; ".join([*FORMS, *more])
