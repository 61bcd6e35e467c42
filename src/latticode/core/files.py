"""Files that are whole or not there, and JSON that is what its reader expects."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latticode.core.mappings import is_mapping


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """Yields a temporary name beside `path`, to be written to; afterwards it is flushed to disk and takes the place of
    `path`. A reader sees the old file or the new one, and an exception leaves the old one and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("r+b") as file:  # Windows flushes no handle that is open for reading only
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`text` in UTF-8, atomically (`replacing`)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """`value` as JSON, atomically. Raises ValueError for NaN and infinity, which JSON has not."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def read_json(path: Path, needs: Mapping[str, type | tuple[type, ...]] | None = None) -> Any:
    """The JSON in a file; with `needs` an object that has these keys with values of these types.

    Raises ValueError that names the file and what is wrong with it, FileNotFoundError where there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # broken JSON, broken UTF-8, nesting without end
        raise ValueError(f"{path} is not JSON: {error}") from None
    if needs is None:
        return content
    if not is_mapping(content):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    for key, kind in needs.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if key not in content or not isinstance(content[key], kinds):
            expected = " or ".join(k.__name__ for k in kinds)
            got = f"{content[key]!r:.80}" if key in content else "nothing"
            raise ValueError(f"{path} needs {key!r}, {expected}, got {got}")
    return content
