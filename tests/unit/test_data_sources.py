"""Every kind of source, made here."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from helpers import encode
from latticode.data import ImageError, Preprocess, StreamSource, open_source
from latticode.data.records import Record, is_held_out


def png(value: int = 0, size: tuple[int, int] = (4, 4)) -> bytes:
    return encode(Image.new("RGB", size, (value, value, value)))


def pixel(record: Record) -> int:
    """Of the first channel, the first."""
    return int(Preprocess().arrange(Preprocess().load(record))[0, 0, 0])


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, images: list, labels: list | None = None, **options) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"image": images} | ({"label": labels} if labels is not None else {})
    pq.write_table(pa.table(columns), path, **options)
    return path


def write_idx(path: Path, array: np.ndarray, magic: int | None = None, cut: int = 0) -> Path:
    header = struct.pack(f">{1 + array.ndim}I", magic or 0x800 + array.ndim, *array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data[: len(data) - cut]) if path.suffix == ".gz" else data[: len(data) - cut])
    return path


def names(source) -> list[str]:
    return [source.name_of(i) for i in range(len(source))]


# Splits


def test_hold_out_depends_on_the_name_alone_and_has_the_asked_size():
    held = [is_held_out(f"record {i}", 0.2) for i in range(5000)]
    assert abs(sum(held) / 5000 - 0.2) < 0.02
    assert is_held_out("record 7", 0.2) <= is_held_out("record 7", 0.5), "a larger part contains the smaller"


def test_split_of_an_unsplit_folder_is_a_stable_partition(tmp_path):
    for i in range(60):
        write(tmp_path / f"{i:02d}.png", png(i))
    train, test = (names(open_source(str(tmp_path), split, holdout=0.3)) for split in ("train", "test"))
    assert sorted(train + test) == names(open_source(str(tmp_path), "all"))
    assert 8 <= len(test) <= 28
    write(tmp_path / "new.png", png())
    assert set(test) <= set(names(open_source(str(tmp_path), "test", holdout=0.3)))


def test_empty_split_says_what_to_do(tmp_path):
    write(tmp_path / "a.png", png())
    split = "train" if is_held_out("a.png", 0.5) else "test"
    with pytest.raises(ValueError, match=r"split .* is empty: it has 1 records.*'all'"):
        open_source(str(tmp_path), split, holdout=0.5)


# Folders


def test_folder_labels_are_the_folders_under_the_root(tmp_path):
    for path in ("dog/b.png", "cat/deep/a.jpg", "cat/c.png", "loose.png", "cat/notes.txt", ".hidden/x.png"):
        write(tmp_path / path, png(7))
    source = open_source(str(tmp_path), "all")
    assert source.classes == ("cat", "dog")
    assert [(r.name, r.label) for r in (source[i] for i in range(len(source)))] == [
        ("cat/c.png", 0),
        ("cat/deep/a.jpg", 0),
        ("dog/b.png", 1),
        ("loose.png", -1),
    ]


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder_with_split_folders_numbers_classes_over_all_splits(tmp_path, test):
    for path in ("train/b/1.png", "train/c/2.png", f"{test}/a/3.png", f"{test}/c/4.png"):
        write(tmp_path / path, png())
    train, held = open_source(str(tmp_path)), open_source(str(tmp_path), "test")
    assert train.classes == held.classes == ("a", "b", "c")
    assert [train[i].label for i in range(2)] == [1, 2]
    assert [held[i].label for i in range(2)] == [0, 2]
    assert len(open_source(str(tmp_path), "all")) == 4


def test_class_called_training_is_a_class(tmp_path):
    for path in ("trains/1.png", "tests/2.png"):
        write(tmp_path / path, png())
    assert open_source(str(tmp_path), "all").classes == ("tests", "trains")


def test_folder_with_a_link_to_itself_ends(tmp_path):
    write(tmp_path / "a" / "1.png", png())
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert names(open_source(str(tmp_path), "all")) == ["a/1.png"]


def test_single_image_is_in_every_split(tmp_path):
    path = write(tmp_path / "one.png", png(9))
    for split in ("train", "test", "all"):
        source = open_source(str(path), split)
        assert (len(source), source[0].name, source[0].content) == (1, "one.png", path.read_bytes())


# Parquet


def test_parquet_reads_across_row_groups_and_files(tmp_path):
    for part, base, count in (("train-00000", 0, 5), ("train-00001", 5, 4), ("test", 100, 3)):
        images = [{"bytes": png(base + i), "path": None} for i in range(count)]
        write_parquet(tmp_path / f"{part}.parquet", images, [(base + i) % 3 for i in range(count)], row_group_size=2)
    train, test = open_source(str(tmp_path)), open_source(str(tmp_path), "test")
    assert [pixel(train[i]) for i in (8, 0, 4, 5, 7)] == [8, 0, 4, 5, 7]
    assert [train[i].label for i in range(9)] == [i % 3 for i in range(9)]
    assert [pixel(test[i]) for i in range(3)] == [100, 101, 102]
    assert train.classes == ("0", "1", "2")
    everything = open_source(str(tmp_path), "all")
    assert len(set(names(everything))) == len(everything) == 12


def test_parquet_string_labels_plain_bytes_and_nulls(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [png(1), None, png(3)], ["dog", None, "cat"])
    source = open_source(str(path), "all")
    assert source.classes == ("cat", "dog")
    assert [source[i].label for i in range(3)] == [1, -1, 0]
    with pytest.raises(ImageError, match="x/00000001: empty"):
        Preprocess().load(source[1])


def test_parquet_takes_class_names_from_the_metadata_of_datasets(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {"picture": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["no", "yes"]}}
    table = pa.table({"mask": [b"1"], "picture": [png()], "label": [1]})
    meta = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(meta), tmp_path / "x.parquet")
    source = open_source(str(tmp_path), "all")
    assert (source.classes, source[0].label, source[0].content) == (("no", "yes"), 1, png())


def test_parquet_without_an_image_column_lists_its_columns(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="0 image columns among text, label"):
        open_source(str(tmp_path))
    write(tmp_path / "x.parquet", b"not parquet")
    with pytest.raises(ValueError, match=r"x\.parquet is not a readable parquet file"):
        open_source(str(tmp_path))


def test_parquet_cache_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("latticode.data.parquet.CACHE_BYTES", 1)
    path = write_parquet(tmp_path / "x.parquet", [png(i) for i in range(6)], row_group_size=2)
    source = open_source(str(path), "all")
    assert [pixel(source[i]) for i in (5, 0, 3, 1)] == [5, 0, 3, 1]
    assert len(cast(Any, source)._cache) == 1


# WebDataset


def test_tar_groups_members_by_stem_and_picks_the_image(tmp_path):
    members = {
        "a/1.seg.png": png(99),
        "a/1.jpg": b"jpeg of 1",
        "a/1.cls": b"2\n",
        "a/2.json": json.dumps({"label": 0, "other": [1]}).encode(),
        "a/2.png": png(2),
        "b/1.png": png(3),
        "notes.txt": b"no image",
        "a/3.left.png": png(4),
    }
    path = write_tar(tmp_path / "shard.tar", members)
    source = open_source(str(path), "all")
    found = [(r.name, r.label, r.content) for r in (source[i] for i in range(len(source)))]
    assert found == [
        ("shard/a/1", 2, b"jpeg of 1"),
        ("shard/a/2", 0, png(2)),
        ("shard/b/1", -1, png(3)),
        ("shard/a/3", -1, png(4)),
    ]
    assert source.classes == ("0", "1", "2")


def test_tar_shards_split_by_name_and_glob(tmp_path):
    for name in ("train-0", "train-1", "val-0"):
        write_tar(tmp_path / f"{name}.tar", {f"{i}.png": png(i) for i in range(3)} | {"0.cls": name.encode()})
    train, test = open_source(str(tmp_path)), open_source(str(tmp_path), "test")
    assert (len(train), len(test)) == (6, 3)
    assert train.classes == test.classes == ("train-0", "train-1", "val-0")
    assert test[0].label == 2
    assert len(open_source(str(tmp_path / "train-*.tar"), "all")) == 6


def test_folder_with_a_test_part_only_cannot_train_but_the_file_can(tmp_path):
    path = write_tar(tmp_path / "test.tar", {f"{i}.png": png(i) for i in range(30)})
    assert len(open_source(str(tmp_path), "test")) == 30
    with pytest.raises(ValueError, match="'test' split only"):
        open_source(str(tmp_path), "train")
    assert 0 < len(open_source(str(path), "train")) < 30


@pytest.mark.parametrize("damage", ["cut", "gzip", "noise"])
def test_damaged_tar_is_refused(tmp_path, damage):
    path = write_tar(tmp_path / "x.tar", {"1.png": png(), "2.png": encode(Image.effect_noise((64, 64), 50))})
    data = path.read_bytes()
    path.write_bytes({"cut": data[:2048], "gzip": gzip.compress(data), "noise": b"x" * 2000}[damage])
    with pytest.raises(ValueError, match=r"x\.tar is (truncated|not a readable)"):
        open_source(str(path))


# idx


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_folder(tmp_path, suffix):
    rng = np.random.default_rng(0)
    arrays = {part: rng.integers(0, 256, (n, 5, 6), np.uint8) for part, n in (("train", 7), ("t10k", 4))}
    for part, images in arrays.items():
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", np.arange(len(images), dtype=np.uint8))
    train, test = open_source(str(tmp_path)), open_source(str(tmp_path), "test")
    assert (len(train), len(test), len(open_source(str(tmp_path), "all"))) == (7, 4, 11)
    assert train.classes == test.classes == tuple("0123456")
    assert (train[6].label, train[6].name, test[2].name) == (6, "train/000006", "test/000002")
    np.testing.assert_array_equal(test[2].content, arrays["t10k"][2])


@pytest.mark.parametrize("damage", ["magic", "short", "header", "gzip", "labels"])
def test_damaged_idx_is_refused_by_name(tmp_path, damage):
    images, path = np.zeros((3, 4, 4), np.uint8), tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(path, images, magic=0x801 if damage == "magic" else None, cut={"short": 5, "header": 60}.get(damage, 0))
    if damage == "gzip":
        path.write_bytes(path.read_bytes()[:-9])
    if damage == "labels":
        write_idx(tmp_path / "train-labels-idx1-ubyte.gz", np.zeros(2, np.uint8))
    reason = {"magic": "magic 0x801", "short": "43 values", "header": "truncated", "gzip": "cannot be read"}
    with pytest.raises(ValueError, match=reason.get(damage, "3 train images but 2 labels")):
        open_source(str(tmp_path), "all")


def test_idx_without_labels_or_test_part(tmp_path):
    write_idx(tmp_path / "train-images.idx3-ubyte", np.zeros((40, 2, 2), np.uint8))
    train, test = open_source(str(tmp_path)), open_source(str(tmp_path), "test")
    assert len(train) + len(test) == 40
    assert (train.classes, train[0].label) == ((), -1)


# Embedded and Hub


def test_embedded_digits():
    source = open_source("embedded:digits", "all")
    assert (len(source), source.classes) == (1797, tuple("0123456789"))
    images = np.stack([np.asarray(source[i].content) for i in range(len(source))])
    assert (images.shape, images.min(), images.max()) == ((1797, 8, 8), 0, 255)
    assert sorted({source[i].label for i in range(len(source))}) == list(range(10))


def test_embedded_photos_hold_out_whole_photographs():
    train, test = (names(open_source("embedded:photos", split)) for split in ("train", "test"))
    assert test == ["astronaut.png", "china.jpg"]
    assert not set(train) & set(test)
    assert len(train) == 6
    for i in range(2):
        record = open_source("embedded:photos", "test")[i]
        assert Preprocess().load(record).mode == "RGB"


def test_embedded_faces():
    source = open_source("embedded:faces", "all")
    assert (len(source), source[0].label, source[199].label) == (200, 0, 1)
    assert np.asarray(source[0].content).shape == (25, 25)


@pytest.fixture(params=[None, "x.png"], ids=["struct of bytes", "image feature"])
def hub_folder(request, tmp_path, monkeypatch) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    for part, base in (("train", 0), ("test", 50)):
        images = [{"bytes": png(base + i), "path": request.param} for i in range(10)]
        table = pa.table({"image": images, "label": [i % 2 for i in range(10)]})
        (tmp_path / "data").mkdir(exist_ok=True)
        meta = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(meta), tmp_path / "data" / f"{part}.parquet")
    return str(tmp_path / "data")


def test_hub_dataset(hub_folder):
    train, test = open_source(f"hub:{hub_folder}"), open_source(f"hub:{hub_folder}", "test")
    assert (len(train), len(test), train.classes) == (10, 10, ("a", "b"))
    assert [(pixel(test[i]), test[i].label) for i in (3, 0)] == [(53, 1), (50, 0)]
    assert train.name_of(0) == "train/00000000"


def test_hub_stream(hub_folder):
    source = open_source(f"hub:{hub_folder}?streaming", "test")
    assert isinstance(source, StreamSource)
    values = [(i, pixel(record), record.label) for i, record in source.records()]
    assert values == [(i, 50 + i, i % 2) for i in range(10)]
    everything = open_source(f"hub:{hub_folder}?streaming", "all")
    assert isinstance(everything, StreamSource)
    assert [i for i, _ in everything.records()] == list(range(20))
    assert [record.name for _, record in everything.records()] == [everything.name_of(i) for i in range(20)]
    with pytest.raises(TypeError, match="streamed"):
        len(source)


def test_hub_failures_are_one_clear_error(monkeypatch, hub_folder):
    import datasets

    def no_network(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nlong story")

    with pytest.raises(ValueError, match="unknown option stream; valid: streaming"):
        open_source(f"hub:{hub_folder}?stream")
    monkeypatch.setattr(datasets, "load_dataset", no_network)
    with pytest.raises(
        ValueError, match=r"'hub:owner/name' could not be loaded.*Couldn't reach.*Hub\); check the name"
    ):
        open_source("hub:owner/name")


# What is no source


def test_unknown_sources_are_refused_with_the_valid_forms(tmp_path):
    with pytest.raises(
        ValueError,
        match=r"embedded are digits, faces, moving-digits, photos, shapes, tones\. Valid forms: .*hub:",
    ):
        open_source("embedded:cats")
    with pytest.raises(ValueError, match=f"nearest folder that exists is '{tmp_path}'"):
        open_source(str(tmp_path / "no" / "such"))
    with pytest.raises(ValueError, match="no images under"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match=r"no reader of images for \.txt"):
        open_source(str(write(tmp_path / "a.txt", b"")))
    with pytest.raises(ValueError, match="the pattern matches no file"):
        open_source(str(tmp_path / "*.tar"))
    with pytest.raises(ValueError, match="split must be one of train, test, all, got 'val'"):
        open_source("embedded:digits", "val")
    with pytest.raises(ValueError, match="holdout must lie strictly between 0 and 1, got 1"):
        open_source("embedded:digits", holdout=1)
