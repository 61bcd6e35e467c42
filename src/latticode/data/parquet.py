"""Parquet files with a column of encoded images, recordings or clips, as the Hub distributes them."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latticode.data.media import IMAGE, Medium
from latticode.data.records import TEXT_COLUMNS, Record, Source, captions, number_labels, select

LABEL_COLUMNS = ("label", "labels", "class", "cls", "target", "fine_label")
CACHE_BYTES = 512 * 2**20  # of encoded row groups kept in memory


class ParquetSource(Source):
    """Rows of parquet files, read by row group; the row groups used last stay in memory up to CACHE_BYTES.

    Files beyond that are best read in order: a shuffled pass over them reads a row group per record.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> import pyarrow as pa, pyarrow.parquet as pq
        >>> table = pa.table({"image": [b"...", b"..."], "label": [0, 1], "caption": ["a cat", "a dog"]})
        >>> with TemporaryDirectory() as folder:
        ...     pq.write_table(table, Path(folder) / "train.parquet")
        ...     source = ParquetSource("pets", [Path(folder) / "train.parquet"])
        ...     len(source), source[1].label, source[1].texts
        (2, 1, ('a dog',))
    """

    def __init__(self, name: str, files: list[Path], medium: Medium = IMAGE):
        import pyarrow.parquet as pq

        self.name, self.files = name, files
        self._cache: OrderedDict[tuple[int, int], tuple[Any, Any]] = OrderedDict()
        self._lock = threading.Lock()
        raw: list[int | str | None] = []
        starts, places = [0], []  # the first row of each row group, and (file, group within it)
        self.rows_of: list[int] = []
        self.text_columns: list[str | None] = []  # of each file
        names: tuple[str, ...] = ()
        for number, path in enumerate(files):
            try:
                file = pq.ParquetFile(path)
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} is not a readable parquet file: {error}") from error
            with file:
                schema, metadata = file.schema_arrow, file.metadata
                features = _features(schema.metadata)
                self.column = _column(schema, features, path, medium)
                label = next((c for c in LABEL_COLUMNS if _names_a_class(schema, c)), None)
                self.text_columns.append(next((c for c in TEXT_COLUMNS if _holds_texts(schema, c)), None))
                rows = metadata.num_rows
                raw += file.read([label])[label].to_pylist() if label else [None] * rows
                names = names or tuple(features.get(label or "", {}).get("names") or ())
                for group in range(metadata.num_row_groups):
                    starts.append(starts[-1] + metadata.row_group(group).num_rows)
                    places.append((number, group))
                self.rows_of.append(rows)
        self.labels, self.classes = number_labels(raw)
        if len(names) >= len(self.classes):
            self.classes = names
        self._starts, self._places = np.asarray(starts), places
        self._first = np.cumsum([0, *self.rows_of])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Record:
        group = int(np.searchsorted(self._starts, i, side="right")) - 1
        contents, texts = self._group(self._places[group])
        row = i - int(self._starts[group])
        found = () if texts is None else captions(texts[row].as_py())
        return Record(contents[row].as_py() or b"", int(self.labels[i]), self.name_of(i), texts=found)

    def name_of(self, i: int) -> str:
        file = int(np.searchsorted(self._first, i, side="right")) - 1
        return f"{self.files[file].stem}/{i - int(self._first[file]):08d}"

    def _group(self, place: tuple[int, int]) -> tuple[Any, Any]:
        """Arrow arrays of a row group: its encoded contents, binaries, and its captions or None."""
        import pyarrow.parquet as pq
        from pyarrow import types

        with self._lock:
            if place in self._cache:
                self._cache.move_to_end(place)
                return self._cache[place]
        text = self.text_columns[place[0]]
        with pq.ParquetFile(self.files[place[0]]) as file:
            table = file.read_row_group(place[1], columns=[self.column, *([text] if text else [])])
        column = table[self.column]
        if types.is_struct(column.type):
            column = column.flatten()[column.type.get_field_index("bytes")]
        group = column, table[text] if text else None
        with self._lock:
            self._cache[place] = group
            while len(self._cache) > 1 and sum(c.nbytes for c, _ in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        return group


def open_parquet(
    name: str, files: list[Path], parts: list[str | None], split: str, holdout: float, medium: Medium = IMAGE
) -> Source:
    """Rows of `files`; `parts` is the split that each file is said to belong to."""
    source = ParquetSource(name, files, medium)
    return select(source, [p for p, n in zip(parts, source.rows_of, strict=True) for _ in range(n)], split, holdout)


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    """The column descriptions that `datasets` leaves in a file's metadata; {} where there are none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {k: v for k, v in features.items() if isinstance(v, dict)} if isinstance(features, dict) else {}


def _names_a_class(schema: Any, column: str) -> bool:
    from pyarrow import types

    if column not in schema.names:
        return False
    kind = schema.field(column).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)


def _holds_texts(schema: Any, column: str) -> bool:
    from pyarrow import types

    if column not in schema.names:
        return False
    kind = schema.field(column).type
    kind = kind.value_type if types.is_list(kind) or types.is_large_list(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind)


def _column(schema: Any, features: dict[str, Any], path: Path, medium: Medium) -> str:
    """The column of `medium`: the one declared as such, else one with a usual name, else the only one of bytes."""
    from pyarrow import types

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    candidates = [f.name for f in schema if holds_bytes(f.type)]
    candidates = [c for c in candidates if features.get(c, {}).get("_type", medium.feature) == medium.feature]
    declared = [c for c in candidates if c in features] or [c for c in candidates if c in medium.columns] or candidates
    if len(declared) != 1:
        raise ValueError(
            f"{path} has {len(declared)} {medium.noun} columns among {', '.join(schema.names)}; "
            f"needed: one of type bytes or struct{{bytes, path}}, called {' or '.join(medium.columns[:2])}"
        )
    return declared[0]
