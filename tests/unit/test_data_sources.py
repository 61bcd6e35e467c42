"""Every kind of source, and every odd kind of image file, made here."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latticode.data import ImageError, Preprocess, StreamSource, decode_image, open_source, to_float, to_uint8
from latticode.data.records import is_held_out
from latticode.data.transforms import RESIZES

RED = (200, 10, 20)


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(value: int = 0, size: tuple[int, int] = (4, 4)) -> bytes:
    return encode(Image.new("RGB", size, (value, value, value)))


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
        assert (len(source), source[0].name, source[0].image) == (1, "one.png", path.read_bytes())


# Parquet


def test_parquet_reads_across_row_groups_and_files(tmp_path):
    for part, base, count in (("train-00000", 0, 5), ("train-00001", 5, 4), ("test", 100, 3)):
        images = [{"bytes": png(base + i), "path": None} for i in range(count)]
        write_parquet(tmp_path / f"{part}.parquet", images, [(base + i) % 3 for i in range(count)], row_group_size=2)
    train, test = open_source(str(tmp_path)), open_source(str(tmp_path), "test")
    assert [Preprocess()(train[i].image)[0, 0, 0] for i in (8, 0, 4, 5, 7)] == [8, 0, 4, 5, 7]
    assert [train[i].label for i in range(9)] == [i % 3 for i in range(9)]
    assert [Preprocess()(test[i].image)[0, 0, 0] for i in range(3)] == [100, 101, 102]
    assert train.classes == ("0", "1", "2")
    everything = open_source(str(tmp_path), "all")
    assert len(set(names(everything))) == len(everything) == 12


def test_parquet_string_labels_plain_bytes_and_nulls(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", [png(1), None, png(3)], ["dog", None, "cat"])
    source = open_source(str(path), "all")
    assert source.classes == ("cat", "dog")
    assert [source[i].label for i in range(3)] == [1, -1, 0]
    with pytest.raises(ImageError, match="x/00000001: empty"):
        decode_image(source[1].image, source[1].name)


def test_parquet_takes_class_names_from_the_metadata_of_datasets(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = {"picture": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["no", "yes"]}}
    table = pa.table({"mask": [b"1"], "picture": [png()], "label": [1]})
    meta = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(meta), tmp_path / "x.parquet")
    source = open_source(str(tmp_path), "all")
    assert (source.classes, source[0].label, source[0].image) == (("no", "yes"), 1, png())


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
    assert [Preprocess()(source[i].image)[0, 0, 0] for i in (5, 0, 3, 1)] == [5, 0, 3, 1]
    assert len(source._cache) == 1


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
    found = [(r.name, r.label, r.image) for r in (source[i] for i in range(len(source)))]
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
    np.testing.assert_array_equal(test[2].image, arrays["t10k"][2])


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
    images = np.stack([source[i].image for i in range(len(source))])
    assert (images.shape, images.min(), images.max()) == ((1797, 8, 8), 0, 255)
    assert sorted({source[i].label for i in range(len(source))}) == list(range(10))


def test_embedded_photos_hold_out_whole_photographs():
    train, test = (names(open_source("embedded:photos", split)) for split in ("train", "test"))
    assert test == ["astronaut.png", "china.jpg"]
    assert not set(train) & set(test)
    assert len(train) == 6
    for i in range(2):
        record = open_source("embedded:photos", "test")[i]
        assert decode_image(record.image, record.name).mode == "RGB"


def test_embedded_faces():
    source = open_source("embedded:faces", "all")
    assert (len(source), source[0].label, source[199].label) == (200, 0, 1)
    assert source[0].image.shape == (25, 25)


@pytest.fixture(params=[None, "x.png"], ids=["struct of bytes", "image feature"])
def hub_folder(request, tmp_path, monkeypatch) -> str:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
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
    assert [(Preprocess()(test[i].image)[0, 0, 0], test[i].label) for i in (3, 0)] == [(53, 1), (50, 0)]
    assert train.name_of(0) == "train/00000000"


def test_hub_stream(hub_folder):
    source = open_source(f"hub:{hub_folder}?streaming", "test")
    assert isinstance(source, StreamSource)
    values = [(i, Preprocess()(record.image)[0, 0, 0], record.label) for i, record in source.records()]
    assert values == [(i, 50 + i, i % 2) for i in range(10)]
    everything = open_source(f"hub:{hub_folder}?streaming", "all")
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
    with pytest.raises(ValueError, match=r"'embedded:cats': embedded are digits, faces, photos\. Valid forms: .*hub:"):
        open_source("embedded:cats")
    with pytest.raises(ValueError, match=f"nearest folder that exists is '{tmp_path}'"):
        open_source(str(tmp_path / "no" / "such"))
    with pytest.raises(ValueError, match="no images under"):
        open_source(str(tmp_path))
    with pytest.raises(ValueError, match=r"no reader for \.txt"):
        open_source(str(write(tmp_path / "a.txt", b"")))
    with pytest.raises(ValueError, match="the pattern matches no file"):
        open_source(str(tmp_path / "*.tar"))
    with pytest.raises(ValueError, match="split must be one of train, test, all, got 'val'"):
        open_source("embedded:digits", "val")
    with pytest.raises(ValueError, match="holdout must lie strictly between 0 and 1, got 1"):
        open_source("embedded:digits", holdout=1)


# Odd images


def oriented() -> bytes:
    """2 wide, 1 high, left red, right black, to be shown turned by 90 degrees clockwise (orientation 6)."""
    image = Image.new("RGB", (16, 8))
    image.paste(RED, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image, "PNG", exif=exif)


def animated() -> bytes:
    frames = [Image.new("RGB", (6, 6), colour) for colour in (RED, (0, 255, 0))]
    return encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)


def palette(transparent: bool) -> bytes:
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, *RED])
    return encode(image, "PNG", **({"transparency": 1} if transparent else {}))


ODD = {
    "palette": (palette(False), RED),
    "transparent palette": (palette(True), (255, 255, 255)),
    "transparent palette with alphas": (
        encode(Image.open(io.BytesIO(palette(False))), "PNG", transparency=bytes([0, 255])),
        RED,
    ),
    "alpha": (encode(Image.new("RGBA", (4, 4), (200, 0, 0, 51))), (244, 204, 204)),
    "grey alpha": (encode(Image.new("LA", (4, 4), (0, 51))), (204, 204, 204)),
    "transparent colour": (encode(Image.new("RGB", (4, 4), RED), transparency=RED), (255, 255, 255)),
    "16-bit": (encode(Image.fromarray(np.full((4, 4), 25700, np.uint16))), (100, 100, 100)),
    "16-bit tiff": (encode(Image.fromarray(np.full((4, 4), 65535, np.uint16)), "TIFF"), (255, 255, 255)),
    "32-bit tiff": (encode(Image.fromarray(np.full((4, 4), 25700, np.int32)), "TIFF"), (100, 100, 100)),
    "float tiff": (encode(Image.fromarray(np.full((4, 4), 0.4, np.float32)), "TIFF"), (102, 102, 102)),
    "1-bit": (encode(Image.new("1", (4, 4), 1)), (255, 255, 255)),
    "grey": (encode(Image.new("L", (4, 4), 77)), (77, 77, 77)),
    "cmyk": (encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "animated": (animated(), RED),
    "array": (np.full((4, 4), 77, np.uint8), (77, 77, 77)),
    "array with channel": (np.full((4, 4, 1), 77, np.uint8), (77, 77, 77)),
    "16-bit array": (np.full((4, 4), 25700, np.uint16), (100, 100, 100)),
    "bool array": (np.ones((4, 4), np.bool_), (255, 255, 255)),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_become_8_bit_grey_or_colour(kind):
    data, colour = ODD[kind]
    image = decode_image(data)
    assert image.mode in ("L", "RGB")
    np.testing.assert_allclose(Preprocess()(data).reshape(3, -1).T.astype(int), [colour] * image.width * image.height)
    assert Preprocess(channels=1)(data).shape == (1, image.height, image.width)


def test_cmyk_jpeg_is_close_to_its_colour():
    pixels = Preprocess()(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(pixels[:, 8, 8].astype(int) - [255, 0, 0]).max() <= 3


def test_exif_orientation_is_applied():
    image = decode_image(oriented())
    assert image.size == (8, 16)
    assert image.getpixel((4, 2)) == RED
    assert image.getpixel((4, 13)) == (0, 0, 0)


def giant_header() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD = {
    "empty": (b"", "empty"),
    "noise": (b"no image at all", "not an image, or of an unknown format$"),
    "truncated jpeg": (encode(Image.effect_noise((64, 64), 80), "JPEG")[:600], "truncated"),
    "truncated png": (encode(Image.effect_noise((64, 64), 80))[:900], "truncated|broken|Truncated"),
    "gigantic": (giant_header(), "40000x30000 is more than 200 megapixels"),
    "float array": (np.full((4, 4), 3.0), "float64 pixels from 3.0 to 3.0"),
    "nan array": (np.full((4, 4), np.nan), "float64 pixels from nan"),
    "array of 5 channels": (np.zeros((4, 4, 5), np.uint8), r"\(4, 4, 5\)"),
    "array without pixels": (np.zeros((0, 4), np.uint8), "no pixels|Error"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_are_refused_with_name_and_reason(kind):
    data, reason = BAD[kind]
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError, match=f"holiday: .*({reason})"):
        decode_image(data, "holiday")
    assert limit == Image.MAX_IMAGE_PIXELS


# Preprocessing


def gradient(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.tile(np.linspace(0, 255, width).astype(np.uint8), (height, 1)))


def test_own_size_is_kept_and_channels_come_first():
    assert Preprocess()(gradient(7, 5)).shape == (3, 5, 7)
    assert Preprocess(channels=1)(Image.new("RGB", (7, 5), (0, 255, 0)))[0, 0, 0] == 150  # luma of ITU-R 601


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (20, 20), (10, 6), (1, 300), (8, 8)])
def test_every_shape_becomes_the_asked_square(resize, width, height):
    for crop in ("center", "random", "squash"):
        pixels = Preprocess(8, resize=resize, crop=crop)(gradient(width, height), np.random.default_rng(0))
        assert (pixels.shape, pixels.dtype) == ((3, 8, 8), np.uint8)


def test_shrinking_is_antialiased_and_box_is_the_mean():
    stripes = np.tile(np.array([[0, 255]], np.uint8), (16, 8))
    for resize in ("bicubic", "bilinear", "lanczos", "box"):
        assert np.abs(Preprocess(4, 1, resize)(stripes).astype(int) - 127).max() < 40
    values = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    means = values.reshape(4, 4, 4, 4).mean((1, 3))
    assert np.abs(Preprocess(4, 1, "box")(values)[0] - means).max() <= 1  # PIL rounds after each axis


def test_center_crop_equals_resizing_first():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64), np.uint8))
    whole = np.asarray(image.resize((32, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(Preprocess(16, 1)(image)[0], whole[:, 8:24])


def test_random_crop_cuts_windows_out_of_the_image_as_it_is():
    values = np.random.default_rng(0).integers(0, 256, (20, 30))
    crop = Preprocess(8, 1, crop="random")
    seen = set()
    for seed in range(20):
        pixels = crop(values.astype(np.uint8), np.random.default_rng(seed))[0]
        places = [(y, x) for y in range(13) for x in range(23) if (values[y : y + 8, x : x + 8] == pixels).all()]
        assert len(places) == 1
        seen.add(places[0])
    assert len(seen) > 10
    np.testing.assert_array_equal(crop(values.astype(np.uint8))[0], values[6:14, 11:19])


def test_flip_needs_a_generator_and_happens_half_the_time():
    image, plain = gradient(8, 8), Preprocess(8, 1)(gradient(8, 8))
    flips = [
        not np.array_equal(Preprocess(8, 1, flip=True)(image, np.random.default_rng(s)), plain) for s in range(100)
    ]
    assert 30 < sum(flips) < 70
    np.testing.assert_array_equal(Preprocess(8, 1, flip=True)(image), plain)


def test_record_round_trips_through_json_and_is_strict():
    preprocess = Preprocess(32, 1, "lanczos", "random", flip=True)
    record = json.loads(json.dumps(preprocess.record()))
    assert Preprocess.from_record(record) == preprocess
    assert record["range"] == "[-1, 1]"
    with pytest.raises(ValueError, match="unknown preprocessing keys sise; valid: size"):
        Preprocess.from_record({**record, "sise": 3})
    with pytest.raises(ValueError, match=r"value range must be '\[-1, 1\]', got '\[0, 1\]'"):
        Preprocess.from_record({**record, "range": "[0, 1]"})


@pytest.mark.parametrize(
    "bad", [{"size": 0}, {"channels": 2}, {"resize": "cubic"}, {"crop": "left"}, {"crop": "random"}]
)
def test_bad_preprocessing_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Preprocess(**bad)


def test_every_pixel_value_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    values = to_float(pixels)
    assert (values.min(), values.max(), values.dtype) == (-1, 1, torch.float32)
    assert torch.equal(to_uint8(values), pixels)
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0])).tolist() == [0, 255, 128]
