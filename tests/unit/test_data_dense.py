"""Photographs with label maps: whatever happens to the one happens to the other. All of them are made here."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import encode
from latticode.data import DensePreprocess, ImageError, Loader, Record, Source, open_source
from latticode.data.records import ArraySource
from latticode.engine import ConfigError, load_config

H, W = 40, 60
SEGMENTS = {3: (0, 1), 70_000: (1, 0)}


def numbers(seed: int, most: int = 65536) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, most, (H, W)).astype(np.int32)


def coloured(ids: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 whose red and green tell the number."""
    return np.stack([ids & 255, ids >> 8, np.full_like(ids, 7)], -1).astype(np.uint8)


def told(inputs: torch.Tensor) -> torch.Tensor:
    return inputs[..., 0, :, :] + 256 * inputs[..., 1, :, :]


class Coloured(Source):
    """Photographs whose colours are their labels, with the maps "a.png" and, the same plus one, "b.png"."""

    name, classes = "coloured", ()

    def __init__(self, count: int = 6, most: int = 65536):
        self.count, self.most = count, most

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Record:
        ids = numbers(i, self.most)
        return Record(coloured(ids), -1, self.name_of(i), maps={"a.png": ids, "b.png": ids + 1})

    def name_of(self, i: int) -> str:
        return f"c{i}"


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def opened(source: Path | str, preprocess: DensePreprocess, split: str = "all") -> Loader:
    return Loader(open_source(str(source), split, medium=preprocess.medium), preprocess, 4)


# Together


@pytest.mark.parametrize("size", [None, 16, (40, 60), (23, 31), (80, 64)], ids=str)
@pytest.mark.parametrize("crop", ["squash", "center", "inception"])
def test_a_pixels_labels_follow_its_colour(crop, size):
    if size is None and crop == "inception":
        pytest.skip("needs a size")
    preprocess = DensePreprocess(size, ("a.png", "b.png"), "nearest", crop, flip=size is not None)
    loader = Loader(Coloured(), preprocess, 4, seed=3)
    for batch in (*islice(loader.batches(), 6), *loader.epoch()):
        assert batch.inputs.dtype == torch.int32
        assert batch.inputs.shape[1:] == (preprocess.shape or (5, H, W))
        assert torch.equal(batch.inputs[:, 3], told(batch.inputs))
        assert torch.equal(batch.inputs[:, 4], told(batch.inputs) + 1)


@pytest.mark.parametrize("crop", ["squash", "center", "inception"])
@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
def test_smoothed_photographs_and_their_labels_keep_in_step(crop, resize):
    """The border between black and white is at the border between the labels, to the pixel that is neither."""
    label = np.zeros((H, W), np.uint8)
    label[H // 3 :, W // 2 :] = 1
    record = Record(np.repeat(label[..., None] * np.uint8(255), 3, 2), -1, "half", maps={"a.png": label})
    for size in (11, 16, (80, 120), (57, 33)):
        preprocess = DensePreprocess(size, ("a.png",), resize, crop)
        for seed in range(5):
            values = preprocess.arrange(preprocess.load(record), np.random.default_rng(seed))
            grey = values[0]
            assert set(np.unique(values[3])) <= {0, 1}
            assert (grey[values[3] == 1] >= 127 - 64).all()
            assert (grey[values[3] == 0] <= 128 + 64).all()


def test_flips_mirror_everything_and_nothing_else():
    plain = Loader(Coloured(), DensePreprocess(20, ("a.png", "b.png")), 6)
    flipped = Loader(Coloured(), DensePreprocess(20, ("a.png", "b.png"), flip=True), 6, seed=1)
    examples = next(iter(plain.epoch())).inputs
    mirrored = []
    for batch in islice(flipped.batches(), 4):
        for values, index in zip(batch.inputs, batch.indices, strict=True):
            mirrored.append(torch.equal(values, examples[index].flip(-1)))
            assert mirrored[-1] or torch.equal(values, examples[index])
    assert 0 < sum(mirrored) < len(mirrored)


@pytest.mark.parametrize("crop", ["squash", "center", "inception"])
def test_labels_are_only_ever_numbers_that_were_there(crop):
    rare = np.asarray([0, 1, 255, 256, 40_000, 65_535, 1_000_000, 2**31 - 1])
    ids = rare[numbers(0, len(rare))].astype(np.int32)
    preprocess = DensePreprocess((27, 90), ("a.png",), "bicubic", crop)
    loaded = preprocess.load(Record(np.zeros((H, W, 3), np.uint8), -1, "rare", maps={"a.png": ids}))
    for seed in range(5):
        assert set(np.unique(preprocess.arrange(loaded, np.random.default_rng(seed))[3])) <= set(rare)


def test_inception_takes_parts_of_the_asked_size_in_training_and_everything_in_evaluation():
    preprocess = DensePreprocess(16, ("a.png",), "nearest", "inception", area=(0.2, 0.4), aspect=(0.5, 2))
    boxes = [preprocess._box(200, 300, np.random.default_rng(seed)) for seed in range(200)]
    sides = np.asarray([(right - left, bottom - top) for left, top, right, bottom in boxes])
    assert (np.abs(sides.prod(1) / 60_000 - 0.3) <= 0.11).all()
    assert np.ptp(sides.prod(1)) > 8_000
    aspects = sides[:, 0] / sides[:, 1]
    assert aspects.min() < 0.6
    assert aspects.max() > 1.7
    assert aspects.min() > 0.49
    assert aspects.max() < 2.05
    assert min(box[0] for box in boxes) < 10
    assert max(box[2] for box in boxes) > 190
    too_wide = DensePreprocess(16, crop="inception", area=(0.9, 1), aspect=(9, 10))
    assert too_wide._box(200, 300, np.random.default_rng(0)) == (0, 0, 200, 300)  # no such part fits

    squashed = next(iter(Loader(Coloured(), DensePreprocess(16, ("a.png",), "nearest"), 6).epoch())).inputs
    loader = Loader(Coloured(), preprocess, 6, seed=5)
    assert torch.equal(next(iter(loader.epoch())).inputs, squashed)
    first, second = (batch.inputs for batch in islice(loader.batches(), 2))
    assert not torch.equal(first, second)  # an epoch each, with parts of its own
    assert torch.equal(next(loader.batches(1)).inputs, second)


def test_center_keeps_the_aspect():
    preprocess = DensePreprocess((20, 20), ("a.png",), "nearest", "center")
    values = preprocess.arrange(preprocess.load(Coloured()[0]))
    assert np.array_equal(values[3], numbers(0)[1::2, 11:50:2])
    assert preprocess._box(1000, 3, None) == (498, 0, 501, 3)
    assert DensePreprocess((1, 500), crop="center")._box(3, 900, None) == (0, 449, 3, 450)


# Sources


def photograph(ids: np.ndarray) -> bytes:
    return encode(Image.fromarray(coloured(ids)))


def pair(key: str, seed: int, extension: str = "png") -> dict[str, bytes]:
    ids = numbers(seed)
    depth = encode(Image.fromarray(ids.astype(np.uint16)))
    return {f"{key}.{extension}": photograph(ids), f"{key}.depth.png": depth, f"{key}.json": b"{}"}


def check_pairs(loader: Loader, names: list[str]) -> None:
    batches = list(loader.epoch())
    assert not loader.skipped
    assert [loader.source.name_of(int(i)) for batch in batches for i in batch.indices] == names
    inputs = torch.cat([batch.inputs for batch in batches])
    for i, values in enumerate(inputs):
        assert torch.equal(values[3], torch.from_numpy(numbers(i))), "16 bits survive"
        assert torch.equal(told(values), values[3])


@pytest.mark.parametrize("extension", ["png", "rgb.png"])
def test_tars_hold_photographs_with_their_maps(tmp_path, extension):
    for shard in range(2):
        members = {k: v for i in range(3) for k, v in pair(f"k{i}", 3 * shard + i, extension).items()}
        # the order within a sample does not matter
        write_tar(tmp_path / f"{shard}.tar", dict(reversed(members.items())) if shard == 2 else members)
    loader = opened(tmp_path, DensePreprocess(maps=("depth.png",)))
    check_pairs(loader, [f"{shard}/k{i}" for shard in range(2) for i in range(3)])


def test_the_photograph_is_what_is_no_map_whatever_comes_first(tmp_path):
    members = dict(reversed(pair("a", 0, "view.png").items()))
    check_pairs(opened(write_tar(tmp_path / "one.tar", members), DensePreprocess(maps=(".DEPTH.png",))), ["one/a"])


def test_folders_hold_photographs_beside_their_maps(tmp_path):
    for folder, key, seed in (("train", "a", 1), ("train", "b.c", 2), ("test", "z", 0)):
        for name, data in pair(f"{folder}/{key}", seed).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
    preprocess = DensePreprocess(maps=("depth.png",))
    check_pairs(opened(tmp_path, preprocess), ["test/z.png", "train/a.png", "train/b.c.png"])
    check_pairs(opened(tmp_path, preprocess, "test"), ["test/z.png"])
    check_pairs(opened(tmp_path / "test" / "z.png", preprocess), ["z.png"])
    assert len(open_source(str(tmp_path), "all")) == 6  # as plain images, maps are images


def test_without_maps_any_source_of_images_serves():
    loader = opened("embedded:faces", DensePreprocess(8))
    batch = next(iter(loader.epoch()))
    assert batch.inputs.shape == (4, 3, 8, 8)
    assert batch.inputs.max() > 200
    assert len(opened("embedded:shapes", DensePreprocess(8)).source) == 300


def test_captions_and_maps_lie_side_by_side(tmp_path):
    members = {**pair("a", 0), "a.txt": b"a view\n"}
    record = open_source(
        str(write_tar(tmp_path / "a.tar", members)), "all", medium=DensePreprocess(maps=["depth.png"]).medium
    )[0]
    assert record.texts == ("a view",)
    assert list(record.maps) == ["depth.png"]
    assert not open_source(str(tmp_path / "a.tar"), "all")[0].maps


def test_sources_without_maps_say_so(tmp_path):
    medium = DensePreprocess(maps=("depth.png",)).medium
    for source in ("embedded:photos", "hub:some/one"):
        with pytest.raises(ValueError, match=rf"{source}' has no label maps \(depth.png\); they are read from folders"):
            open_source(source, medium=medium)
    with pytest.raises(ValueError, match="embedded:tones holds recordings, not images"):
        open_source("embedded:tones", medium=medium)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match="has no label maps"):
        open_source(str(tmp_path), medium=medium)
    write_tar(tmp_path / "cut.tar", {"a.png": b"1", "a.depth.png": b"2" * 20_000})
    data = (tmp_path / "cut.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(data[: data.index(b"a.depth.png") + 600])
    with pytest.raises(ValueError, match=r"cut.tar is (truncated|not a readable)"):
        open_source(str(tmp_path / "cut.tar"), medium=medium)


# What is wrong


def depth_file(array: np.ndarray, kind: str = "PNG") -> bytes:
    return encode(Image.fromarray(array), kind)


BAD = {
    "missing": (None, r"it has no a.png, only other.png"),
    "another size": (np.zeros((H, W - 1), np.uint8), r"a.png is 59x40, the image 60x40"),
    "turned": (np.zeros((W, H), np.uint8), r"a.png is 40x60, the image 60x40"),
    "too large": (np.full((H, W), 11, np.uint8), r"a.png holds 11..11, valid are 0..10"),
    "negative": (np.full((H, W), -3, np.int32), r"a.png holds -3..-3, valid are 0..10"),
    "colour": (photograph(numbers(0)), r"a.png: a label map is one channel of integers, got uint8 \(40, 60, 3\)"),
    "floats": (depth_file(np.ones((H, W), np.float32), "TIFF"), r"a.png: .* integers, got float32 \(40, 60\)"),
    "junk": (b"junk", r"a.png: not an image, or of an unknown format"),
    "cut": (depth_file(np.ones((H, W), np.uint16))[:60], r"a.png: \w+: "),
    "empty": (b"", r"a.png: empty"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_label_map_is_refused_naming_file_and_values(kind):
    stored, message = BAD[kind]
    maps = {"other.png": np.zeros((H, W), np.uint8)} | ({} if stored is None else {"a.png": stored})
    record = Record(np.zeros((H, W, 3), np.uint8), -1, "street/7.jpg", maps=maps)
    with pytest.raises(ImageError, match=f"^street/7.jpg: {message}"):
        DensePreprocess(maps=("a.png",), largest=(10,)).load(record)


def test_bad_label_maps_are_skipped_counted_and_named(tmp_path):
    members = {k: v for i in range(4) for k, v in pair(f"k{i}", i).items()}
    del members["k1.depth.png"]
    members["k2.depth.png"] = members["k2.depth.png"][:100]
    loader = opened(write_tar(tmp_path / "s.tar", members), DensePreprocess(maps=("depth.png",)))
    assert [batch.indices.tolist() for batch in loader.epoch()] == [[0, 3]]
    assert set(loader.skipped) == {"s/k1", "s/k2"}
    assert loader.skipped["s/k1"] == "it has no depth.png, nor another label map"
    assert loader.skipped["s/k2"].startswith("depth.png: ")
    assert next(loader.batches()).inputs.shape == (4, 4, H, W)  # training takes their neighbours
    with pytest.raises(ValueError, match=r"no image of .*' can be read; the first, .*: it has no dept.png, nor"):
        next(opened(tmp_path, DensePreprocess(maps=("dept.png",))).batches())


def test_palettes_are_numbers_and_narrow_integers_too():
    palette = Image.fromarray(np.full((H, W), 3, np.uint8)).convert("P")
    palette.putpalette([200, 10, 20] * 256)
    for stored in (encode(palette), depth_file(np.full((H, W), 3, np.int32), "TIFF"), np.full((H, W), 3, np.uint16)):
        record = Record(np.zeros((H, W, 3), np.uint8), -1, "p", maps={"a.png": stored})
        preprocess = DensePreprocess(maps=("a.png",))
        assert (preprocess.arrange(preprocess.load(record))[3] == 3).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (1, 2, 3)}, r"size must be one number or two, height and width, >= 1, got \(1, 2, 3\)"),
        ({"size": 0}, "size must be"),
        ({"crop": "random"}, "crop must be one of squash, center, inception, got 'random'"),
        ({"crop": "inception"}, "crop 'inception' needs a size"),
        ({"resize": "spline"}, "resize must be one of"),
        ({"area": (0.5, 2)}, "area must be two numbers, 0 < low <= high <= 1, got 0.5, 2"),
        ({"aspect": (2, 1)}, "aspect must be two numbers, 0 < low <= high, got 2, 1"),
        ({"maps": ("a.png", ".a.png")}, "maps must be different endings of pictures"),
        ({"maps": ("depth",)}, "maps must be different endings of pictures, such as depth.png, got depth"),
        ({"maps": ("a.png",), "largest": (1, 2)}, r"largest needs one number for each of the 1 maps, got \[1, 2\]"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        DensePreprocess(**settings)


def test_its_description_gives_it_back():
    preprocess = DensePreprocess([20, 30], ["a.png"], crop="inception", flip=True, largest=[9])
    record = json.loads(json.dumps(preprocess.record()))
    assert record["kind"] == "dense"
    assert record["maps"] == ["a.png"]
    assert DensePreprocess.from_record(record) == preprocess
    assert json.loads(json.dumps(DensePreprocess(8).record()))["kind"] == "dense"  # where any image will do, too
    assert preprocess.channels == 4
    assert preprocess.shape == (4, 20, 30)
    assert preprocess.windowed
    assert preprocess.own_size() == DensePreprocess(None, ["a.png"], largest=[9])
    assert not preprocess.whole().flip
    assert preprocess.medium.maps == ("a.png",)


# COCO


def segments_png(ids: np.ndarray) -> bytes:
    return encode(Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)))


def write_coco(root: Path, split: str, ids: np.ndarray, segments: list[dict], photos: str = "{split}2017") -> None:
    (root / "annotations" / f"panoptic_{split}2017").mkdir(parents=True, exist_ok=True)
    (folder := root / photos.format(split=split)).mkdir(parents=True)
    (folder / "7.jpg").write_bytes(encode(Image.new("RGB", ids.shape[::-1])))
    (root / "annotations" / f"panoptic_{split}2017" / "7.png").write_bytes(segments_png(ids))
    content = {
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "categories": [
            {"id": 90, "name": "sky", "isthing": 0},
            {"id": 1, "name": "cat", "isthing": 1},
            {"id": 33, "name": "dog", "isthing": 1},
        ],
        "annotations": [{"image_id": 7, "file_name": "7.png", "segments_info": segments}],
    }
    (root / "annotations" / f"panoptic_{split}2017.json").write_text(json.dumps(content))


IDS = np.asarray([[0, 5, 5, 70_000], [3_000_000, 3_000_000, 256, 256]])
LISTED = [
    {"id": 5, "category_id": 33},
    {"id": 70_000, "category_id": 1},
    {"id": 3_000_000, "category_id": 90},
    {"id": 256, "category_id": 1, "iscrowd": 1},
]
BOTH = ("sem.png", "inst.png")


@pytest.mark.parametrize("photos", ["{split}2017", "annotations/{split}2017", "pictures-{split}"])
def test_coco_panoptic_annotations(tmp_path, photos):
    write_coco(tmp_path, "train", IDS, LISTED, photos)
    write_coco(tmp_path, "val", IDS[:, ::-1], LISTED, photos)
    train, val = (opened(tmp_path, DensePreprocess(maps=BOTH), split) for split in ("train", "test"))
    inputs = next(iter(train.epoch())).inputs
    assert inputs[0, 3].tolist() == [[3, 1, 1, 0], [2, 2, 3, 3]]  # by category id: cat, dog, sky; void behind them
    assert inputs[0, 4].tolist() == [[0, 1, 1, 2], [0, 0, 0, 0]]  # things only, no crowds
    assert torch.equal(next(iter(val.epoch())).inputs, inputs.flip(-1))
    assert [train.source.name_of(0), val.source.name_of(0)] == ["panoptic_train2017/7.jpg", "panoptic_val2017/7.jpg"]
    only = opened(tmp_path / "annotations" / "panoptic_val2017.json", DensePreprocess(maps=("inst.png",)))
    assert torch.equal(next(iter(only.epoch())).inputs[:, 3], inputs[:, 4].flip(-1))
    both = opened(tmp_path, DensePreprocess(maps=BOTH))
    assert len(both.source) == 2


def test_what_is_wrong_with_coco_annotations_is_said(tmp_path):
    write_coco(tmp_path, "val", IDS, LISTED[1:])
    loader = opened(tmp_path, DensePreprocess(maps=BOTH))
    with pytest.raises(ValueError, match=r"segments 5 are in the PNG but not in the JSON file"):
        next(loader.batches())
    (tmp_path / "annotations" / "panoptic_val2017" / "7.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"first, panoptic_val2017/7.jpg: sem.png: segments: not an image"):
        next(opened(tmp_path, DensePreprocess(maps=BOTH)).batches())
    for maps in (("depth.png",), ()):
        with pytest.raises(ValueError, match=r"has the label maps sem.png and inst.png for .* got (depth.png|none)"):
            opened(tmp_path / "annotations" / "panoptic_val2017.json", DensePreprocess(maps=maps))
    write_coco(tmp_path, "train", IDS, [{"id": 5, "category_id": 4}])
    with pytest.raises(ValueError, match=r"train2017.json is not a panoptic .* of category 4, which it does not list"):
        opened(tmp_path, DensePreprocess(maps=BOTH))
    (tmp_path / "annotations" / "panoptic_train2017.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a panoptic annotation file of COCO: KeyError: 'categories'"):
        opened(tmp_path, DensePreprocess(maps=BOTH))
    (tmp_path / "annotations" / "panoptic_train2017.json").unlink()
    (tmp_path / "val2017" / "7.jpg").unlink()
    with pytest.raises(ValueError, match=r"first, panoptic_val2017/7.jpg: FileNotFoundError"):
        next(opened(tmp_path, DensePreprocess(maps=BOTH)).batches())
    (tmp_path / "train2017" / "7.jpg").unlink()
    (tmp_path / "val2017").rmdir()
    with pytest.raises(ValueError, match=r"its first photograph 7.jpg is in no folder beside it"):
        opened(tmp_path, DensePreprocess(maps=BOTH))


def test_coco_files_of_one_set_have_the_same_categories(tmp_path):
    write_coco(tmp_path, "val", IDS, LISTED)
    write_coco(tmp_path, "train", IDS, LISTED)
    path = tmp_path / "annotations" / "panoptic_val2017.json"
    path.write_text(path.read_text().replace('"cat"', '"cow"'))
    with pytest.raises(ValueError, match=r"val2017.json .*its categories are not those of the other files"):
        opened(tmp_path, DensePreprocess(maps=BOTH))


# Made-up scenes, and runs


def test_shapes_are_whole_scenes():
    preprocess = DensePreprocess(maps=("depth.png", "sem.png", "inst.png"))
    loader = opened("embedded:shapes", preprocess)
    found = set()
    for i in range(8):
        depth, semantic, instance = preprocess.arrange(preprocess.load(loader.source[i]))[3:]
        assert ((depth == 0) == (semantic == 4)).all()
        assert depth.max() < 10_000
        assert ((instance > 0) == np.isin(semantic, (2, 3))).all()
        for number in np.unique(instance[instance > 0]):
            assert len(np.unique(semantic[instance == number])) == 1
        found |= set(np.unique(semantic))
    assert found == {0, 1, 2, 3, 4}
    again = open_source("embedded:shapes", "all", medium=preprocess.medium)[3]
    assert np.array_equal(np.asarray(again.content), np.asarray(loader.source[3].content))
    train, test = (opened("embedded:shapes", preprocess, split).source for split in ("train", "test"))
    assert len(train) + len(test) == 300
    assert len(test) > 15


def test_a_recipe_asks_for_dense_data():
    dense = "data={kind: dense, source: 'embedded:shapes', size: [24, 32], maps: [sem.png, inst.png], flip: true}"
    data = load_config("fsq-tokenizer", [dense]).data
    assert data.channels == 5
    preprocess = data.preprocess()
    assert preprocess == DensePreprocess((24, 32), BOTH, flip=True)
    assert data.model_dump(mode="json")["size"] == [24, 32]
    with pytest.raises(ConfigError, match=r"data: crop 'inception' needs a size"):
        load_config("fsq-tokenizer", [dense, "data.size=null", "data.crop=inception"]).data.preprocess()
    with pytest.raises(ConfigError, match=r"unknown key 'data.map'; nearest: maps"):
        load_config("fsq-tokenizer", [dense, "data.map=[a.png]"])


def test_other_sources_give_records_without_maps():
    plain = ArraySource("plain", np.zeros((2, H, W, 3), np.uint8), None, (), ["a", "b"])
    with pytest.raises(ValueError, match=r"a: it has no a.png, nor another label map"):
        next(Loader(plain, DensePreprocess(8, ("a.png",)), 2).batches())


def test_what_is_kept_in_memory_is_decoded_once():
    loader = Loader(Coloured(), DensePreprocess(8, ("a.png",), crop="inception"), 6)
    next(loader.batches())
    kept = loader._decoder._loaded
    assert len(kept) == 6
    assert not any(record.maps or record.content for _, record in kept.values())
