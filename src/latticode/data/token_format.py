"""The token dataset, version 1: a folder with manifest.json and memory-mappable shards.

    manifest.json        schema, tokenizer spec and hash, vocab, preprocessing, classes, counts, checksums, skipped
    codes-00000.npy      (n, *grid, K), the smallest unsigned type that holds the vocab; one grid per shard. Or, where
                         the manifest says grid null, ragged: (positions of all n records one after another, K)
    labels-00000.npy     (n,) int64, -1 = none
    names-00000.jsonl    {"name": ..., "size": [H, W]} per record; clips [T, H, W], recordings [T];
                         before any padding. With "grid": [h, w] in a ragged shard, and "texts": [...] where the source
                         has captions; the manifest then says texts true of the shard

File names follow from the shard number, so a manifest can point at nothing outside its folder. Every file is written to
a temporary name and renamed, the manifest after the shard it lists: whatever the manifest names is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = "latticode.tokens/1"
MANIFEST = "manifest.json"
FILES = {"codes": "codes-{:05d}.npy", "labels": "labels-{:05d}.npy", "names": "names-{:05d}.jsonl"}


def smallest_dtype(vocab: Sequence[int]) -> np.dtype:
    """The smallest of uint8, uint16, uint32, int64 that holds every code of `vocab`."""
    kinds = (np.uint8, np.uint16, np.uint32, np.int64)
    return np.dtype(next(kind for kind in kinds if max(vocab) - 1 <= np.iinfo(kind).max))


def check_codes(codes: np.ndarray, vocab: Sequence[int], origin: str) -> None:
    """Raise ValueError unless 0 <= codes[..., k] < vocab[k]."""
    for slot, size in enumerate(vocab):
        values = codes[..., slot]
        if values.size and not (values.min() >= 0 and values.max() < size):
            raise ValueError(
                f"codes {values.min()}..{values.max()} of {origin} lie outside the vocab: slot {slot} has 0..{size - 1}"
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a token dataset. Raises ValueError for none, another schema, and missing keys."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no token dataset: it has no {MANIFEST}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema!r}; this version reads {SCHEMA!r}")
    needed = {"complete", "tokenizer", "tokenizer_hash", "vocab", "preprocess", "classes", "count", "shards", "skipped"}
    if missing := needed - set(manifest):
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}")
    return manifest


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
