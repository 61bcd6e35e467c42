"""The token dataset: what is written is read, what is damaged or made by another tokenizer is refused."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latticode.data import TokenDataset, TokenLoader, TokenWriter
from latticode.data.token_format import smallest_dtype

SPEC = {"type": "tokenizer", "quantizer": {"type": "fsq", "levels": [8, 5]}}
IDENTITY = {
    "tokenizer": SPEC,
    "tokenizer_hash": "abc123",
    "vocab": (40, 300),
    "preprocess": {"size": 16},
    "classes": ("a", "b"),
}


def make(count: int, grid: tuple[int, ...] = (2, 3), seed: int = 0, vocab: tuple[int, ...] = (40, 300)):
    """codes, labels, names, sizes of `count` records."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(v, (count, *grid), generator=generator) for v in vocab], -1)
    return (
        codes,
        torch.arange(count) % 3 - 1,
        [f"r{seed}-{i}" for i in range(count)],
        [(8, 10 + i) for i in range(count)],
    )


def rows(records: Any, part: slice) -> Any:
    return tuple(field[part] for field in records)


@pytest.fixture
def folder(tmp_path) -> Path:
    """17 records in shards of 5."""
    with TokenWriter(tmp_path / "tokens", **IDENTITY, shard_size=5) as writer:
        records = make(17)
        for start in range(0, 17, 4):
            writer.write(*rows(records, slice(start, start + 4)))
        writer.skip({"bad.png": "empty"})
    return tmp_path / "tokens"


def test_what_is_written_is_read(folder):
    codes, labels, names, sizes = make(17)
    tokens = TokenDataset(folder, expect_hash="abc123", verify=True)
    assert (len(tokens), tokens.grid, tokens.vocab, tokens.classes) == (17, (2, 3), (40, 300), ("a", "b"))
    assert torch.equal(tokens.codes(range(17)), codes)
    assert torch.equal(tokens.labels, labels)
    order = torch.tensor([16, 0, 5, 4, 9, 5])
    assert torch.equal(tokens.codes(order), codes[order])
    assert tokens.codes(order).dtype == torch.int64
    assert torch.equal(tokens[7][0], codes[7])
    assert tokens[7][1] == int(labels[7])
    assert [tokens.name(i) for i in range(17)] == names
    assert [tokens.size(i) for i in range(17)] == sizes
    assert tokens.codes([]).shape == (0, 2, 3, 2)
    assert [shard["count"] for shard in tokens.manifest["shards"]] == [5, 5, 5, 2]
    assert tokens.manifest["skipped"] == {"bad.png": "empty"}
    assert tokens.manifest["tokenizer"] == SPEC
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    ("vocab", "kind"),
    [((256,), "uint8"), ((2, 257), "uint16"), ((65536,), "uint16"), ((65537,), "uint32"), ((2**32 + 1,), "int64")],
)
def test_codes_take_the_smallest_type_and_survive_it(tmp_path, vocab, kind):
    assert smallest_dtype(vocab).name == kind
    codes = torch.tensor([[[v - 1 for v in vocab]], [[0 for _ in vocab]]])
    with TokenWriter(tmp_path, **{**IDENTITY, "vocab": vocab}) as writer:
        writer.write(codes, torch.zeros(2), ["a", "b"], [(1, 1)] * 2)
    assert np.load(tmp_path / "codes-00000.npy").dtype.name == kind
    assert torch.equal(TokenDataset(tmp_path).codes([0, 1]), codes)


@pytest.mark.parametrize("grid", [(), (7,), (2, 3, 4)])
def test_grids_of_any_rank(tmp_path, grid):
    records = make(4, grid)
    with TokenWriter(tmp_path, **IDENTITY, shard_size=3) as writer:
        writer.write(*records)
    tokens = TokenDataset(tmp_path)
    assert tokens.grid == grid
    assert torch.equal(tokens.codes([3, 1]), records[0][[3, 1]])


def test_another_grid_starts_another_shard(tmp_path):
    small, large = make(3, (2, 2)), make(2, (4, 4), seed=1)
    with TokenWriter(tmp_path, **IDENTITY) as writer:
        for records in (small, large, small):
            writer.write(*records)
    tokens = TokenDataset(tmp_path)
    assert [shard["count"] for shard in tokens.manifest["shards"]] == [3, 2, 3]
    assert torch.equal(tokens.codes([3, 4]), large[0])
    assert torch.equal(tokens.codes([6, 1]), small[0][[1, 1]])
    assert torch.equal(tokens[4][0], large[0][1])
    with pytest.raises(ValueError, match=r"2 grids, not one: \[\(2, 2\), \(4, 4\)\]"):
        _ = tokens.grid
    with pytest.raises(ValueError, match="several grids"):
        tokens.codes([0, 3])
    shapes = [tuple(batch.codes.shape) for batch in TokenLoader(tokens, 4).epoch()]
    assert shapes == [(3, 2, 2, 2), (1, 4, 4, 2), (1, 4, 4, 2), (3, 2, 2, 2)]


# Writing


def test_killed_encode_resumes_where_the_last_shard_ended(tmp_path, folder):
    records, target = make(17), tmp_path / "resumed"
    killed = TokenWriter(target, **IDENTITY, shard_size=5)
    killed.write(*rows(records, slice(0, 13)))
    assert killed.written == 10
    del killed
    (target / "codes-00002.npy.tmp").write_bytes(b"half a shard")
    with pytest.raises(ValueError, match="unfinished: 10 records were written; resume"):
        TokenDataset(target)
    with pytest.raises(ValueError, match="already holds tokens; resume"):
        TokenWriter(target, **IDENTITY)
    with TokenWriter(target, **IDENTITY, shard_size=5, resume=True) as writer:
        assert writer.written == 10
        writer.write(*rows(records, slice(10, 17)))
        writer.skip({"bad.png": "empty"})
    for path in sorted(folder.iterdir()):
        assert (target / path.name).read_bytes() == path.read_bytes(), path.name


def test_resuming_nothing_starts_and_resuming_a_finished_one_changes_nothing(tmp_path, folder):
    with TokenWriter(tmp_path / "new", **IDENTITY, resume=True) as writer:
        assert writer.written == 0
    assert len(TokenDataset(tmp_path / "new")) == 0
    before = (folder / "manifest.json").read_bytes()
    with TokenWriter(folder, **IDENTITY, resume=True) as writer:
        assert writer.written == 17
    assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [{"tokenizer_hash": "x"}, {"vocab": (40, 301)}, {"preprocess": {"size": 8}}, {"classes": ()}, {"tokenizer": {}}],
)
def test_resuming_with_another_tokenizer_is_refused(folder, change):
    with pytest.raises(ValueError, match=f"cannot resume .* its {next(iter(change))} is"):
        TokenWriter(folder, **{**IDENTITY, **change}, resume=True)


def test_an_exception_leaves_the_dataset_unfinished(tmp_path):
    codes, labels, names, sizes = make(3)
    with pytest.raises(ValueError, match="one label"), TokenWriter(tmp_path, **IDENTITY) as writer:
        writer.write(codes, labels, names[:1], sizes)
    with pytest.raises(ValueError, match="unfinished: 0 records"):
        TokenDataset(tmp_path)


def test_bad_writes_are_refused(tmp_path):
    codes, labels, names, sizes = make(3)
    writer = TokenWriter(tmp_path / "a", **IDENTITY)
    with pytest.raises(ValueError, match=r"codes must be \(B, \*grid, 2\), got \(3, 2, 3, 1\)"):
        writer.write(codes[..., :1], labels, names, sizes)
    with pytest.raises(ValueError, match="3 codes, 3 labels, 2 names, 3 sizes"):
        writer.write(codes, labels, names[:2], sizes)
    for value in (-1, 40):
        codes[1, 0, 0, 0] = value
        with pytest.raises(ValueError, match=r"outside the vocab: slot 0 has 0\.\.39"):
            writer.write(codes, labels, names, sizes)
    with pytest.raises(ValueError, match="shard_size must be >= 1, got 0"):
        TokenWriter(tmp_path / "b", **IDENTITY, shard_size=0)
    with pytest.raises(ValueError, match="vocab must name"):
        TokenWriter(tmp_path / "b", **{**IDENTITY, "vocab": ()})


# Reading


def test_tokens_of_another_tokenizer_are_refused_with_both(folder):
    with pytest.raises(ValueError, match=r"another tokenizer: abc123 .*levels.*8, 5.* expected def456 .*vq"):
        TokenDataset(folder, expect_hash="def456", expect_spec={"type": "vq"})


@pytest.mark.parametrize("kind", ["codes-00001.npy", "labels-00002.npy", "names-00000.jsonl"])
def test_damaged_shards_are_refused(folder, kind):
    path = folder / kind
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f"{kind} has {len(data) - 1} bytes; the manifest says {len(data)}"):
        TokenDataset(folder)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    TokenDataset(folder)
    with pytest.raises(ValueError, match=f"{kind} is damaged: sha256"):
        TokenDataset(folder, verify=True)
    path.unlink()
    with pytest.raises(ValueError, match=f"{kind} is missing"):
        TokenDataset(folder)


def edit(folder: Path, **changes) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def test_pickled_arrays_and_wrong_shapes_are_refused(folder):
    path = folder / "codes-00003.npy"
    size = path.stat().st_size
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][3]["grid"] = [3, 2]
    edit(folder, shards=manifest["shards"])
    with pytest.raises(ValueError, match=r"holds uint16 \(2, 2, 3, 2\); the manifest says integers \(2, 3, 2, 2\)"):
        TokenDataset(folder)
    np.save(path, np.array([{"any": "object"}], dtype=object), allow_pickle=True)
    manifest["shards"][3]["files"]["codes"]["bytes"] = path.stat().st_size
    assert path.stat().st_size != size
    edit(folder, shards=manifest["shards"])
    with pytest.raises(ValueError, match=r"codes-00003\.npy cannot be read"):
        TokenDataset(folder)


def test_codes_outside_the_vocab_are_refused_when_read(folder):
    edit(folder, vocab=[10, 300])
    tokens = TokenDataset(folder)
    with pytest.raises(ValueError, match=r"outside the vocab: slot 0 has 0\.\.9"):
        tokens.codes(range(17))


def test_manifests_that_make_no_sense_are_refused(folder, tmp_path):
    edit(folder, schema="latticode.tokens/2")
    with pytest.raises(ValueError, match=r"schema 'latticode\.tokens/2'; this version reads 'latticode\.tokens/1'"):
        TokenDataset(folder)
    (folder / "manifest.json").write_text('{"schema": "latticode.tokens/1"}')
    with pytest.raises(ValueError, match="lacks classes, complete, count"):
        TokenDataset(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        TokenDataset(folder)
    with pytest.raises(ValueError, match=r"no token dataset: it has no manifest\.json"):
        TokenDataset(tmp_path)


def test_records_that_do_not_exist_are_index_errors(folder):
    tokens = TokenDataset(folder)
    for bad in (17, -1):
        with pytest.raises(IndexError, match=r"0\.\.16"):
            tokens.codes([bad])
        with pytest.raises(IndexError, match=r"0\.\.16"):
            tokens.name(bad)


# Loading


def test_token_batches_are_resumable_and_sharded(folder):
    tokens = TokenDataset(folder)
    whole = list(islice(TokenLoader(tokens, 6, seed=4).batches(), 9))
    tail = list(islice(TokenLoader(tokens, 6, seed=4).batches(5), 4))
    ranks = [list(islice(TokenLoader(tokens, 3, seed=4, rank=r, world=2).batches(), 9)) for r in range(2)]
    for t, batch in enumerate(whole):
        assert torch.equal(torch.cat([rank[t].codes for rank in ranks]), batch.codes)
        assert torch.equal(torch.cat([rank[t].labels for rank in ranks]), batch.labels)
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(whole[5:], tail, strict=True))
    with pytest.raises(ValueError, match="start must be >= 0"):
        TokenLoader(tokens, 6).batches(-1)


def test_token_epoch_is_everything_in_order(folder):
    tokens = TokenDataset(folder)
    parts = [list(TokenLoader(tokens, 4, rank=r, world=2).epoch()) for r in range(2)]
    assert torch.equal(torch.cat([b.codes for part in parts for b in part]), tokens.codes(range(17)))
    assert torch.equal(torch.cat([b.labels for part in parts for b in part]), tokens.labels)


def test_ragged_shards_hold_every_grid(tmp_path):
    parts = [make(1, (n,), seed=n) for n in (3, 1, 4, 1, 5)]
    with TokenWriter(tmp_path, **IDENTITY, shard_size=3, ragged=True) as writer:
        for codes, labels, _, _ in parts:
            writer.write(codes, labels, [f"r{codes.shape[1]}"], [(8 * codes.shape[1],)])
    tokens = TokenDataset(tmp_path, verify=True)
    assert [shard["count"] for shard in tokens.manifest["shards"]] == [3, 2]
    for i, (codes, labels, _, _) in enumerate(parts):
        assert torch.equal(tokens[i][0], codes[0])
        assert (tokens[i][1], tokens.grid_of(i), tokens.size(i)) == (
            labels[0],
            codes.shape[1:-1],
            (8 * codes.shape[1],),
        )
    assert torch.equal(tokens.codes([3, 1]), torch.cat([parts[3][0], parts[1][0]]))  # of two shards
    with pytest.raises(ValueError, match="4 grids, not one"):
        _ = tokens.grid
    with pytest.raises(ValueError, match=r"several grids: \[\(1,\), \(3,\)\]"):
        tokens.codes([0, 1])
    rows = np.load(tmp_path / "codes-00001.npy")
    np.save(tmp_path / "codes-00001.npy", rows[::-1].reshape(3, 2, 2))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][1]["files"]["codes"]["bytes"] = (tmp_path / "codes-00001.npy").stat().st_size
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"holds .* \(3, 2, 2\); the manifest says integers \(6, 2\)"):
        TokenDataset(tmp_path)


def test_ragged_encoding_resumes(tmp_path):
    parts = [make(1, (n,), seed=n) for n in (3, 1, 4)]
    writer = TokenWriter(tmp_path, **IDENTITY, shard_size=2, ragged=True)
    for codes, labels, names, sizes in parts:
        writer.write(codes, labels, names, sizes)
    del writer  # killed: the third record is lost
    with TokenWriter(tmp_path, **IDENTITY, shard_size=2, ragged=True, resume=True) as writer:
        assert writer.written == 2
        writer.write(*parts[2])
    tokens = TokenDataset(tmp_path)
    assert all(torch.equal(tokens[i][0], codes[0]) for i, (codes, _, _, _) in enumerate(parts))
