"""Clips: animations, strips and folders of frames, windows in time, and the way from a tar file to WebP and back."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import encode
from latticode import cli
from latticode.data import VIDEO, Loader, TokenDataset, VideoPreprocess, open_source
from latticode.data.clips import ClipError, save_animation
from latticode.data.records import Record


def clip(count: int, side: int = 8, seed: int = 0) -> np.ndarray:
    """(T, H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def animation(frames: np.ndarray, kind: str) -> bytes:
    pictures = [Image.fromarray(frame) for frame in frames]
    return encode(pictures[0], kind, save_all=True, append_images=pictures[1:], lossless=True)


def strip(frames: np.ndarray) -> bytes:
    return encode(Image.fromarray(np.concatenate(list(frames), 1)))


def frames_of(record: Record, **options) -> np.ndarray:
    return VideoPreprocess(**options).load(record).transpose(1, 2, 3, 0)


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
def test_animations_are_read_frame_by_frame(kind: str) -> None:
    np.testing.assert_array_equal(frames_of(Record(animation(clip(5), kind), 0, "x")), clip(5))


def test_gifs_of_few_colours() -> None:
    frames = np.repeat(np.arange(4, dtype=np.uint8)[:, None, None, None] * 80, 3, 3).repeat(6, 1).repeat(6, 2)
    pictures = [Image.fromarray(frame) for frame in frames]
    data = encode(pictures[0], "GIF", save_all=True, append_images=pictures[1:])
    np.testing.assert_array_equal(frames_of(Record(data, 0, "x")), frames)


def test_strips_and_frames() -> None:
    frames = clip(5)
    np.testing.assert_array_equal(frames_of(Record(strip(frames), 0, "x", 5)), frames)
    files = tuple(encode(Image.fromarray(frame)) for frame in frames)
    np.testing.assert_array_equal(frames_of(Record(files, 0, "x")), frames)
    grey = VideoPreprocess(4, channels=1).load(Record(files, 0, "x"))
    assert grey.shape == (1, 5, 4, 4)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record(b"junk", 0, "x"), "x: not an image"),
        (Record(strip(clip(5)), 0, "x", 3), "x: 40 pixels are not 3 frames"),
        (Record((strip(clip(1)), strip(clip(2))), 0, "x"), "frames of one size, got 8x16 and 8x8"),
        (Record((strip(clip(1)), b"junk"), 0, "x"), "x, frame 1: not an image"),
        (Record(animation(clip(9, 16), "PNG")[:-900], 0, "x"), "x: "),
        (Record((), 0, "x"), "got no frames"),
    ],
)
def test_what_cannot_be_seen_is_named(record: Record, message: str) -> None:
    with pytest.raises(ClipError, match=message):
        VideoPreprocess().load(record)


def test_windows_and_mirrors() -> None:
    frames = np.broadcast_to(np.arange(7, dtype=np.uint8)[None, :, None, None], (1, 7, 2, 2)).copy()
    frames[..., 0] += 100
    pre = VideoPreprocess(2, 3, 1, flip=True)
    assert pre.arrange(frames)[0, :, 0, 1].tolist() == [2, 3, 4]
    seen = {tuple(pre.arrange(frames, np.random.default_rng(i))[0, :, 0, 1] % 100) for i in range(100)}
    assert seen == {(i, i + 1, i + 2) for i in range(5)}
    mirrored = {int(pre.arrange(frames, np.random.default_rng(i))[0, 0, 0, 0]) >= 100 for i in range(20)}
    assert mirrored == {True, False}
    assert pre.arrange(frames[:, :2])[0, :, 0, 1].tolist() == [0, 1, 1]  # the last frame stays
    assert pre.shape == (1, 3, 2, 2)
    assert pre.whole().arrange(frames).shape == frames.shape
    assert (pre.whole().size, pre.own_size().size, pre.whole().flip) == (2, None, False)


def test_the_record_says_what_was_done() -> None:
    pre = VideoPreprocess(64, 9)
    record = json.loads(json.dumps(pre.record()))
    assert record.pop("kind") == "video"
    assert VideoPreprocess.from_record({"kind": "video", **record}) == pre
    with pytest.raises(ValueError, match="preprocessing of image, not video"):
        VideoPreprocess.from_record(record)
    wrong: list[dict[str, Any]] = [{"frames": 0}, {"crop": "random"}, {"fps": 0}, {"size": 0}, {"channels": 2}]
    for bad in wrong:
        with pytest.raises(ValueError, match="must be"):
            VideoPreprocess(**bad)


@pytest.fixture
def tar(tmp_path) -> Path:
    """Five strips of 6 to 10 frames, class in KEY.json; one more lacks a frame."""
    path = tmp_path / "clips.tar"
    with tarfile.open(path, "w") as file:
        for i in range(6):
            about = {"frames": 6 + i, "height": 8, "width": 8, "class": i % 3}
            picture = strip(clip(6 + i - (i == 5), seed=i))
            for name, data in ((f"c{i}.png", picture), (f"c{i}.json", json.dumps(about).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return path


def test_a_tar_of_strips(tar) -> None:
    source = open_source(str(tar), "all", medium=VIDEO)
    assert (len(source), source.classes, source[4].frames) == (6, ("0", "1", "2"), 10)
    loader = Loader(source, VideoPreprocess(), 3)
    batches = list(loader.epoch())
    assert [tuple(b.inputs.shape) for b in batches] == [(1, 3, t, 8, 8) for t in (6, 7, 8, 9, 10)]
    assert [int(b.labels) for b in batches] == [0, 1, 2, 0, 1]
    np.testing.assert_array_equal(((batches[1].inputs[0] + 1) * 127.5).round().permute(1, 2, 3, 0), clip(7, seed=1))
    assert loader.skipped == {"clips/c5": "80 pixels are not 11 frames side by side"}
    with pytest.raises(ValueError, match=r"clips of one batch differ in size \(6x8x8 .*a size and frames"):
        next(loader.batches())
    images = open_source(str(tar), "all")  # the same file as images: each strip is one
    assert (images[0].frames, len(images)) == (0, 6)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_windows_are_a_function_of_seed_and_step(tar, workers: int) -> None:
    def loader() -> Loader:
        return Loader(open_source(str(tar), "all", medium=VIDEO), VideoPreprocess(4, 3, flip=True), 4, workers=workers)

    first = [b.inputs for b in islice(loader().batches(), 6)]
    assert all(x.shape == (4, 3, 3, 4, 4) for x in first)
    again = loader()
    assert all(torch.equal(a, b.inputs) for a, b in zip(first, islice(again.batches(), 6), strict=True))
    assert all(torch.equal(a, b.inputs) for a, b in zip(first[4:], islice(again.batches(4), 2), strict=True))


def test_folders_of_animations_and_of_frames(tmp_path) -> None:
    wave, jump = tmp_path / "wave", tmp_path / "jump" / "one"
    wave.mkdir()
    jump.mkdir(parents=True)
    (wave / "a.webp").write_bytes(animation(clip(3), "WEBP"))
    for i, frame in enumerate(clip(12, seed=1)):
        Image.fromarray(frame).save(jump / f"{i}.png")
    (jump / "notes.txt").write_text("not a frame")
    source = open_source(str(tmp_path), "all", medium=VIDEO)
    assert [(source.name_of(i), source[i].label) for i in range(2)] == [("jump/one", 0), ("wave/a.webp", 1)]
    np.testing.assert_array_equal(frames_of(source[0]), clip(12, seed=1))  # 2.png before 10.png
    np.testing.assert_array_equal(frames_of(source[1]), clip(3))
    alone = open_source(str(jump), "all", medium=VIDEO)
    np.testing.assert_array_equal(frames_of(alone[0]), clip(12, seed=1))
    with pytest.raises(ValueError, match=r"no clips under .*apng, gif, webp, or folders of frames"):
        open_source(str(tmp_path / "empty"), medium=VIDEO) if (tmp_path / "empty").mkdir() is None else None


def test_moving_digits() -> None:
    source = open_source("embedded:moving-digits", "all", medium=VIDEO)
    assert (len(source), source.classes[3]) == (1797, "3")
    frames = frames_of(source[5], channels=1)[..., 0].astype(int)
    assert frames.shape == (12, 32, 32)
    assert len({int(frame.sum()) for frame in frames}) == 1  # the digit never leaves the picture
    assert (frames[1:] != frames[:-1]).any((1, 2)).sum() >= 6  # and moves


def test_written_without_loss(tmp_path) -> None:
    frames = clip(4).transpose(3, 0, 1, 2)
    save_animation(tmp_path / "a.webp", frames, 10)
    record = Record((tmp_path / "a.webp").read_bytes(), 0, "a")
    np.testing.assert_array_equal(frames_of(record, fps=10), clip(4))
    np.testing.assert_array_equal(frames_of(record, fps=20), clip(4).repeat(2, 0))
    np.testing.assert_array_equal(frames_of(record, fps=5), clip(4)[1::2])
    with Image.open(tmp_path / "a.webp") as image:
        image.load()
        assert image.info["duration"] == 100


def test_equal_neighbours_and_odd_rates_come_back(tmp_path) -> None:
    frames = clip(40).repeat(np.arange(40) % 4 + 1, 0)
    save_animation(tmp_path / "a.webp", frames.transpose(3, 0, 1, 2), 30)
    with Image.open(tmp_path / "a.webp") as image:
        assert cast(Any, image).n_frames == 40
    np.testing.assert_array_equal(frames_of(Record((tmp_path / "a.webp").read_bytes(), 0, "a"), fps=30), frames)


def test_an_animation_that_lasts_too_long_is_refused(tmp_path) -> None:
    pictures = [Image.fromarray(frame) for frame in clip(2)]
    data = encode(pictures[0], "GIF", save_all=True, append_images=pictures[1:], duration=600_000)
    with pytest.raises(ClipError, match=r"x: ValueError: more than \d+ frames, \d+ megapixels"):
        VideoPreprocess(fps=1e5).load(Record(data, 0, "x"))


NET = ("width=4", "latent=4", "groups=2")
TINY = [
    "data.source=embedded:moving-digits",
    "data.size=16",
    "data.frames=3",
    "data.workers=0",
    "steps=2",
    "batch_size=2",
    "log_every=1",
    "save_every=2",
    "picture_every=2",
    *(f"tokenizer.{part}.{key}" for part in ("encoder", "decoder") for key in NET),
]


def run(monkeypatch, capsys, *words: object) -> str:
    monkeypatch.setattr(sys, "argv", ["latticode", *map(str, words)])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    printed = capsys.readouterr()
    assert not leave.value.code, printed.err
    return printed.out


@pytest.mark.slow
def test_the_whole_road(tar, tmp_path, monkeypatch, capsys) -> None:
    trained, tokens, restored = tmp_path / "run", tmp_path / "tokens", tmp_path / "restored"
    run(monkeypatch, capsys, "train", "fsq-weizmann", *TINY, "--out", trained)
    with Image.open(trained / "images" / "reconstructions-000002.png") as picture:
        assert picture.width == 3 * 16  # the frames of a clip side by side
    assert "val/temporal_error" in (trained / "metrics.jsonl").read_text()
    assert "5 clips in" in run(monkeypatch, capsys, "encode", trained, tar, tokens)
    dataset = TokenDataset(tokens, verify=True)
    assert [dataset.size(i) for i in range(2)] == [(6, 16, 16), (7, 16, 16)]
    assert [dataset.grid_of(i) for i in range(5)] == [(3, 4, 4)] * 4 + [(4, 4, 4)]
    assert dataset.codes([0, 3]).shape == (2, 3, 4, 4, 1)
    run(monkeypatch, capsys, "decode", trained, tokens, restored)
    files = sorted(restored.iterdir())
    assert files[0].name == "000000-c0.webp"
    with Image.open(files[1]) as picture:
        assert (cast(Any, picture).n_frames, picture.size) == (7, (16, 16))
    run(monkeypatch, capsys, "evaluate", trained, tar, "--split", "all")
    scores = json.loads((trained / "evaluation.json").read_text())
    assert (scores["count"], scores["frames"], scores["skipped"]) == (5, 40, 1)
    assert scores["tokens_per_second"] == pytest.approx(16 * (4 * 3 + 4) / (40 / 25))
    assert "frame to frame" in (trained / "report.html").read_text()
