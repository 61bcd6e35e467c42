"""Writing and reading token datasets; the format is described in `token_format`."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from latticode.core.files import replacing, write_json
from latticode.core.types import Texts
from latticode.data.token_format import (
    FILES,
    MANIFEST,
    SCHEMA,
    check_codes,
    read_manifest,
    sha256,
    smallest_dtype,
)


class UnfinishedError(ValueError):
    """A token dataset whose encoding was cut off; it can be resumed."""


class TokenWriter:
    """Writes a token dataset shard by shard.

    A shard is finished when it holds `shard_size` records or, unless it may be `ragged`, the grid changes; what is not
    in a finished shard is lost if the process dies. With `resume` the writer continues after the last finished shard:
    the caller leaves out the first `written` records. Used as a context manager it closes unless an exception passes
    through.

    Raises ValueError if the folder already holds tokens and `resume` is False, or if what it holds was written with
    another tokenizer, vocab, preprocessing or classes.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> codes = torch.zeros(2, 4, 4, 1, dtype=torch.int64)  # (B, *grid, K)
        >>> about = {"tokenizer": {"type": "mine"}, "tokenizer_hash": "1f3a", "preprocess": {}}
        >>> with TemporaryDirectory() as folder:
        ...     with TokenWriter(folder, vocab=[16], **about) as writer:
        ...         writer.write(codes, torch.tensor([3, 5]), names=["a", "b"], sizes=[(32, 32)] * 2)
        ...     writer.written, len(TokenDataset(folder))
        (2, 2)
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tokenizer: dict[str, Any],
        tokenizer_hash: str,
        vocab: Sequence[int],
        preprocess: dict[str, Any],
        classes: Sequence[str] = (),
        shard_size: int = 16384,
        ragged: bool = False,
        resume: bool = False,
    ):
        if shard_size < 1:
            raise ValueError(f"shard_size must be >= 1, got {shard_size}")
        if not vocab or min(vocab) < 1:
            raise ValueError(f"vocab must name at least one code slot of size >= 1, got {tuple(vocab)}")
        self.folder, self.shard_size, self.vocab = Path(folder), shard_size, tuple(vocab)
        self.ragged = ragged
        self.manifest: dict[str, Any] = {
            "schema": SCHEMA,
            "complete": False,
            "tokenizer": tokenizer,
            "tokenizer_hash": tokenizer_hash,
            "vocab": list(vocab),
            "preprocess": preprocess,
            "classes": list(classes),
            "count": 0,
            "shards": [],
            "skipped": {},
        }
        self._dtype = smallest_dtype(self.vocab)
        self._codes: list[np.ndarray] = []  # one (*grid, K) per record of the unfinished shard
        self._labels: list[int] = []
        self._lines: list[str] = []
        self._captioned = False  # whether one of them has captions
        self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / MANIFEST).exists():
            if not resume:
                raise ValueError(f"{self.folder} already holds tokens; resume, or choose another folder")
            self._take_up(read_manifest(self.folder))
        self._save_manifest()

    @property
    def written(self) -> int:
        """The number of records in finished shards."""
        return self.manifest["count"]

    def write(
        self,
        codes: Tensor,  # (B, *grid, K) int64
        labels: Tensor,  # (B,)
        names: Sequence[str],
        sizes: Sequence[Sequence[int]],  # (H, W), (T, H, W) or (T,) before padding
        texts: Texts = (),  # all captions of each record; () = none at all
    ) -> None:
        """Append B records. Raises ValueError for codes outside `vocab` or of another K, and for unequal lengths."""
        texts = texts or ((),) * len(names)
        if codes.ndim < 2 or codes.shape[-1] != len(self.vocab):
            raise ValueError(f"codes must be (B, *grid, {len(self.vocab)}), got {tuple(codes.shape)}")
        if not len(codes) == len(labels) == len(names) == len(sizes) == len(texts):
            counts = f"{len(codes)} codes, {len(labels)} labels, {len(names)} names, {len(sizes)} sizes"
            raise ValueError(f"one label, name, size and set of texts per record, got {counts}, {len(texts)} texts")
        array = codes.detach().cpu().numpy()
        check_codes(array, self.vocab, "the tokenizer")
        array = array.astype(self._dtype)
        for row, label, name, size, captions in zip(array, labels.tolist(), names, sizes, texts, strict=True):
            if self._codes and self._codes[0].shape != row.shape and not self.ragged:
                self._finish_shard()
            self._codes.append(row)
            self._labels.append(int(label))
            line: dict[str, Any] = {"name": name, "size": [int(n) for n in size]}
            line |= ({"grid": list(row.shape[:-1])} if self.ragged else {}) | (
                {"texts": list(captions)} if captions else {}
            )
            self._captioned |= bool(captions)
            self._lines.append(json.dumps(line))
            if len(self._codes) == self.shard_size:
                self._finish_shard()

    def skip(self, skipped: Mapping[str, str]) -> None:
        """Note records that are not in the dataset, name -> reason."""
        self.manifest["skipped"].update(skipped)

    def close(self) -> None:
        """Finish the last shard and mark the dataset complete."""
        if self._codes:
            self._finish_shard()
        self.manifest["complete"] = True
        self._save_manifest()

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()

    def _take_up(self, old: dict[str, Any]) -> None:
        for key in ("tokenizer_hash", "tokenizer", "vocab", "preprocess", "classes"):
            # compared as JSON: a tuple in a spec comes back as a list
            if json.dumps(old[key], sort_keys=True) != json.dumps(self.manifest[key], sort_keys=True):
                raise ValueError(
                    f"cannot resume {self.folder}: its {key} is {old[key]!r}, not {self.manifest[key]!r}; "
                    "choose another folder"
                )
        self.manifest.update({key: old[key] for key in ("count", "shards", "skipped")})

    def _finish_shard(self) -> None:
        number = len(self.manifest["shards"])
        codes = (
            np.concatenate([c.reshape(-1, c.shape[-1]) for c in self._codes]) if self.ragged else np.stack(self._codes)
        )
        labels, text = np.asarray(self._labels, np.int64), "".join(line + "\n" for line in self._lines)
        writers: dict[str, Callable[[BinaryIO], Any]] = {
            "codes": lambda file: np.save(file, codes, allow_pickle=False),
            "labels": lambda file: np.save(file, labels, allow_pickle=False),
            "names": lambda file: file.write(text.encode()),
        }
        files = {}
        for kind, write in writers.items():
            path = self.folder / FILES[kind].format(number)
            with replacing(path) as temporary, temporary.open("wb") as file:
                write(file)
            files[kind] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        grid, count = None if self.ragged else list(codes.shape[1:-1]), len(labels)
        shard = {"count": count, "grid": grid, "dtype": codes.dtype.name, "files": files}
        self.manifest["shards"].append(shard | ({"texts": True} if self._captioned else {}))
        self.manifest["count"] += count
        self._save_manifest()
        self._codes, self._labels, self._lines, self._captioned = [], [], [], False

    def _save_manifest(self) -> None:
        write_json(self.folder / MANIFEST, self.manifest, indent=1)


class TokenDataset:
    """A finished token dataset, memory-mapped.

    Raises ValueError for an unknown schema, an unfinished or damaged dataset (`verify` also compares checksums), and if
    `expect_hash` is not the hash of the tokenizer that made it; `expect_spec` is for that message.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> codes = torch.zeros(2, 4, 4, 1, dtype=torch.int64)  # (B, *grid, K)
        >>> about = {"tokenizer": {"type": "mine"}, "tokenizer_hash": "1f3a", "preprocess": {}}
        >>> with TemporaryDirectory() as folder:
        ...     with TokenWriter(folder, vocab=[16], **about) as writer:
        ...         writer.write(codes, torch.tensor([3, 5]), names=["a", "b"], sizes=[(32, 32)] * 2)
        ...     tokens = TokenDataset(folder, expect_hash="1f3a", verify=True)
        ...     len(tokens), tokens.codes([1]).shape, tokens[1][1], tokens.name(1), tokens.size(1)
        (2, torch.Size([1, 4, 4, 1]), 5, 'b', (32, 32))
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        expect_hash: str | None = None,
        expect_spec: Mapping[str, Any] | None = None,
        verify: bool = False,
    ):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        made_by, spec = self.manifest["tokenizer_hash"], self.manifest["tokenizer"]
        if expect_hash is not None and expect_hash != made_by:
            ours = f" ({json.dumps(expect_spec)})" if expect_spec is not None else ""
            raise ValueError(
                f"{self.folder} was made by another tokenizer: {made_by} ({json.dumps(spec)}), "
                f"expected {expect_hash}{ours}"
            )
        if not self.manifest["complete"]:
            raise UnfinishedError(
                f"{self.folder} is unfinished: {self.manifest['count']} records were written; resume its encoding"
            )
        self.vocab: tuple[int, ...] = tuple(self.manifest["vocab"])
        self.classes: tuple[str, ...] = tuple(self.manifest["classes"])
        shards = self.manifest["shards"]
        for number, shard in enumerate(shards):
            self._check_files(number, shard["files"], verify)
        self._grids = [None if shard["grid"] is None else tuple(shard["grid"]) for shard in shards]  # None: ragged
        self._starts = [0, *accumulate(shard["count"] for shard in shards)]
        self._lines = lru_cache(maxsize=4)(self._read_lines)
        self._firsts = lru_cache(maxsize=4)(self._read_firsts)
        self._texts = lru_cache(maxsize=None)(self._read_texts)  # all stay: training asks for any in turn
        shapes = [(self._firsts(n)[-1],) if g is None else (shards[n]["count"], *g) for n, g in enumerate(self._grids)]
        self._codes = [self._load("codes", n, (*shape, len(self.vocab))) for n, shape in enumerate(shapes)]
        labels = [self._load("labels", n, (s["count"],)) for n, s in enumerate(shards)]
        self.labels = torch.from_numpy(np.concatenate([*labels, np.empty(0, np.int64)]))  # (N,) int64

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """(codes (*grid, K) int64, label)."""
        return self.codes([i])[0], int(self.labels[i])

    @property
    def grid(self) -> tuple[int, ...]:
        """The grid of all records. Raises ValueError if they have several or there are none."""
        grids = {
            tuple(line["grid"]) if grid is None else grid
            for number, grid in enumerate(self._grids)
            for line in (self._lines(number) if grid is None else [{}])
        }
        if len(grids) != 1:
            raise ValueError(f"{self.folder} has {len(grids)} grids, not one: {sorted(grids)[:4]}")
        return grids.pop()

    def grid_of(self, i: int) -> tuple[int, ...]:
        """The grid of record `i`."""
        grid = self._grids[self._shard(i)]
        return tuple(self._line(i)["grid"]) if grid is None else grid

    def codes(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Codes (n, *grid, K) int64 of the given records, which must have one common grid.

        Raises ValueError for several grids and for codes outside the vocab, IndexError for records that do not exist.
        """
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(wanted) and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(f"records must lie in 0..{len(self) - 1}, got {wanted.min()}..{wanted.max()}")
        shards = np.searchsorted(self._starts, wanted, side="right") - 1
        used = [int(number) for number in np.unique(shards)]
        if any(self._grids[number] is None for number in used):
            grids = {self.grid_of(int(i)) for i in wanted}
        else:
            grids = {self.grid_of(self._starts[number]) for number in used} or {self.grid}
        if len(grids) > 1:
            raise ValueError(f"the records asked of {self.folder} have several grids: {sorted(grids)[:4]}")
        result = np.empty((len(wanted), *grids.pop(), len(self.vocab)), np.int64)
        for number in used:
            rows = shards == number
            places = wanted[rows] - self._starts[number]
            if self._grids[number] is None:
                firsts = self._firsts(number)
                flat = [self._codes[number][firsts[place] : firsts[place + 1]] for place in places]
                result[rows] = np.stack(flat).reshape(-1, *result.shape[1:])
            else:
                result[rows] = self._codes[number][places]
        check_codes(result, self.vocab, str(self.folder))
        return torch.from_numpy(result)

    def texts(self, indices: Sequence[int] | np.ndarray | None = None) -> Texts:
        """All captions of each of the given records (default: of all); () if the dataset has none at all."""
        if not any(shard.get("texts") for shard in self.manifest["shards"]):
            return ()
        places = [(self._shard(int(i)), int(i)) for i in (range(len(self)) if indices is None else indices)]
        return tuple(self._texts(shard)[i - self._starts[shard]] for shard, i in places)

    def captions(self) -> Iterator[str]:
        """All captions of all records."""
        return chain.from_iterable(self.texts())

    def name(self, i: int) -> str:
        """The name of record `i` in its source."""
        return self._line(i)["name"]

    def size(self, i: int) -> tuple[int, ...]:
        """(H, W) of an image, (T, H, W) of a clip or (T,) of a recording, before padding."""
        return tuple(self._line(i)["size"])

    def _shard(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"records must lie in 0..{len(self) - 1}, got {i}")
        return bisect.bisect_right(self._starts, i) - 1

    def _line(self, i: int) -> dict[str, Any]:
        shard = self._shard(i)
        return self._lines(shard)[i - self._starts[shard]]

    def _read_lines(self, number: int) -> list[dict[str, Any]]:
        lines = (self.folder / FILES["names"].format(number)).read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def _read_texts(self, number: int) -> Texts:
        return tuple(tuple(line.get("texts", ())) for line in self._read_lines(number))

    def _read_firsts(self, number: int) -> list[int]:
        """Where the records of a ragged shard begin among its rows, and where the last one ends."""
        return [0, *accumulate(math.prod(line["grid"]) for line in self._lines(number))]

    def _check_files(self, number: int, files: Mapping[str, Any], verify: bool) -> None:
        for kind, pattern in FILES.items():
            path = self.folder / pattern.format(number)
            size = path.stat().st_size if path.is_file() else -1
            if size != files[kind]["bytes"]:
                found = "is missing" if size < 0 else f"has {size} bytes"
                raise ValueError(f"{path} {found}; the manifest says {files[kind]['bytes']} bytes")
            if verify and (found := sha256(path)) != files[kind]["sha256"]:
                raise ValueError(f"{path} is damaged: sha256 {found}, the manifest says {files[kind]['sha256']}")

    def _load(self, kind: str, number: int, shape: tuple[int, ...]) -> np.ndarray:
        path = self.folder / FILES[kind].format(number)
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if array.shape != shape or array.dtype.kind not in "ui":
            raise ValueError(f"{path} holds {array.dtype} {array.shape}; the manifest says integers {shape}")
        return array
