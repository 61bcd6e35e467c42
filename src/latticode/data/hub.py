"""Datasets of the Hugging Face Hub, whole or streamed. The only module that imports `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from latticode.data.media import IMAGE, Medium
from latticode.data.parquet import LABEL_COLUMNS
from latticode.data.records import (
    TEXT_COLUMNS,
    Record,
    Source,
    StreamSource,
    captions,
    held_out_part,
    is_held_out,
    number_labels,
    part_of,
    select,
)


class HubSource(Source):
    """A downloaded dataset, its splits one after another.

    Examples:
        >>> import datasets
        >>> rows = {"image": [b"...", b"..."], "label": [0, 1], "caption": ["a cat", "a dog"]}
        >>> source = HubSource("hub:me/pets", {"train": datasets.Dataset.from_dict(rows)})
        >>> len(source), source[1].label, source[1].texts
        (2, 1, ('a dog',))
    """

    def __init__(self, name: str, splits: dict[str, Any], medium: Medium = IMAGE):
        import datasets

        self.name = name
        self.splits = list(splits)
        self.parts = [_encoded(part, medium) for part in splits.values()]
        self.joined = datasets.concatenate_datasets(self.parts)
        self.column, label, self.text, self.classes = _columns(self.parts[0].features, name, medium)
        self.labels, numbered = number_labels(self.joined[label][:] if label else [None] * len(self.joined))
        self.classes = self.classes or numbered

    def __len__(self) -> int:
        return len(self.joined)

    def __getitem__(self, i: int) -> Record:
        row = self.joined[i]
        texts = captions(row[self.text]) if self.text else ()
        return Record(_bytes(row[self.column]), int(self.labels[i]), self.name_of(i), texts=texts)

    def name_of(self, i: int) -> str:
        for split, part in zip(self.splits, self.parts, strict=True):
            if i < len(part):
                return f"{split}/{i:08d}"
            i -= len(part)
        raise IndexError(i)


class HubStream(StreamSource):
    """A dataset read over the network as it is used; split by position where it has no test split.

    Examples:
        >>> import datasets
        >>> rows = {"image": [b"...", b"..."], "label": [0, 1]}
        >>> stream = datasets.Dataset.from_dict(rows).to_iterable_dataset()
        >>> source = HubStream("hub:me/pets?streaming", {"train": stream}, split="all", holdout=0.1)
        >>> [(position, record.label) for position, record in source.records()]
        [(0, 0), (1, 1)]
    """

    def __init__(self, name: str, splits: dict[str, Any], split: str, holdout: float, medium: Medium = IMAGE):
        import datasets

        self.name, self.split, self.holdout = name, split, holdout
        part = held_out_part({part_of(key) for key in splits}, split, name) if split != "all" else None
        self.by_position = part is None and split != "all"
        streams = [_encoded(stream, medium) for key, stream in splits.items() if part is None or part_of(key) == part]
        features = next(iter(splits.values())).features
        if features is None:
            raise ValueError(f"{name!r} does not declare its columns, so it cannot be streamed; leave out ?streaming")
        self.column, self.label, self.text, self.classes = _columns(features, name, medium)
        self.stream: Any = datasets.concatenate_datasets(streams)

    def records(self) -> Iterator[tuple[int, Record]]:
        for position, row in enumerate(self.stream):
            name = self.name_of(position)
            if self.by_position and is_held_out(name, self.holdout) != (self.split == "test"):
                continue
            label = row[self.label] if self.label else None
            label = label if isinstance(label, int) else -1  # names of string labels are not known before the end
            texts = captions(row[self.text]) if self.text else ()
            yield position, Record(_bytes(row[self.column]), label, name, texts=texts)


def open_hub(source: str, split: str, holdout: float, medium: Medium = IMAGE) -> Source:
    """`hub:owner/name`, with `?streaming` and `?config=NAME` joined by `&`. A local folder works as a name too.

    Raises ValueError for an option that does not exist, and with one message for whatever `datasets` cannot load: no
    such name, no network, a login needed.
    """
    name, _, query = source.removeprefix("hub:").partition("?")
    options = parse_qs(query, keep_blank_values=True)
    if unknown := set(options) - {"streaming", "config"}:
        raise ValueError(f"{source!r}: unknown option {', '.join(sorted(unknown))}; valid: streaming, config=NAME")
    streaming = "streaming" in options
    splits = _load(source, name, options.get("config", [None])[0], streaming)
    if streaming:
        return HubStream(source, splits, split, holdout, medium)
    hub = HubSource(source, splits, medium)
    rows = zip(hub.splits, hub.parts, strict=True)
    return select(hub, [part_of(key) for key, part in rows for _ in range(len(part))], split, holdout)


def _load(source: str, name: str, config: str | None, streaming: bool) -> dict[str, Any]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, streaming=streaming)
    except Exception as error:  # a boundary: datasets lets the errors of a dozen libraries through
        raise ValueError(
            f"{source!r} could not be loaded through datasets ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "check the name (hub:owner/name), the network, and that the data need no login"
        ) from error
    return {str(key): part for key, part in loaded.items()}  # type: ignore[union-attr]


def _columns(features: Any, name: str, medium: Medium) -> tuple[str, str | None, str | None, tuple[str, ...]]:
    """(column of `medium`, label column or None, column of captions or None, class names)."""
    import datasets

    found = [c for c, kind in features.items() if type(kind).__name__ == medium.feature]
    found = found or [c for c in medium.columns if _holds_bytes(features.get(c))]
    found = [c for c in found if c in medium.columns] or found
    if not found:
        raise ValueError(f"{name!r} has no {medium.noun} column, only {', '.join(features)}")
    label = next((c for c in LABEL_COLUMNS if _names_a_class(features.get(c))), None)
    kind = features[label] if label else None
    text = next((c for c in TEXT_COLUMNS if _holds_texts(features.get(c))), None)
    return found[0], label, text, tuple(kind.names or ()) if isinstance(kind, datasets.ClassLabel) else ()


def _holds_bytes(kind: Any) -> bool:
    import datasets

    kind = kind.get("bytes") if isinstance(kind, dict) else kind
    return isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")


def _holds_texts(kind: Any) -> bool:
    """Strings, or lists of them, which `datasets` declares as [kind] or as an object with the kind as its feature."""
    import datasets

    kind = kind[0] if isinstance(kind, list) else getattr(kind, "feature", kind)
    return isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")


def _names_a_class(kind: Any) -> bool:
    import datasets

    plain = isinstance(kind, datasets.Value) and kind.dtype.startswith(("int", "uint", "string", "large_string"))
    return plain or isinstance(kind, datasets.ClassLabel)


def _encoded(dataset: Any, medium: Medium) -> Any:
    """The dataset with its columns of `medium` left as encoded bytes."""
    import datasets

    for column, kind in (dataset.features or {}).items():
        if type(kind).__name__ == medium.feature:
            dataset = dataset.cast_column(column, getattr(datasets, medium.feature)(decode=False))
    return dataset


def _bytes(value: Any) -> bytes:
    if not value or isinstance(value, bytes):
        return value or b""
    return value["bytes"] or (Path(value["path"]).read_bytes() if value["path"] else b"")
