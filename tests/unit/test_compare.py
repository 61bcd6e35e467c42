"""Evaluations side by side, and somebody else's tokenizer under our protocol."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from helpers import QUIET, tiny_tokenizer
from latticode.cli import app
from latticode.evaluate import evaluate_tokenizer
from latticode.runs.compare import compare
from latticode.runs.evaluate import EvaluationRequest, evaluate
from latticode.runs.open import Run
from latticode.tokenizers.foreign import Foreign


def write(path, protocol, **numbers):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**numbers, "histogram": [1, 2], "protocol": protocol}))
    return path


def test_one_protocol_one_table(tmp_path) -> None:
    a = write(tmp_path / "a" / "evaluation.json", {"split": "test", "run": "a", "ema": 0.9}, psnr=20.0, count=8)
    b = write(tmp_path / "b.json", {"split": "test", "run": "b", "ema": 0.0}, psnr=21.5, rfid=1, count=8)
    (group,) = compare([a.parent, b])
    assert list(group.results) == ["a", "b"]
    assert list(group.rows()) == [("psnr", 20.0, 21.5), ("count", 8, 8), ("rfid", None, 1)]
    printed = CliRunner().invoke(app, ["compare", str(a.parent), str(b)]).output
    assert "21.5" in printed
    assert "all under one protocol" in printed


def test_other_protocols_stand_apart_and_it_is_said_why(tmp_path) -> None:
    shared = {"images": 8, "preprocessing": {"size": 32, "flip": True}}
    a = write(tmp_path / "a.json", {"split": "test", **shared}, psnr=20.0)
    b = write(tmp_path / "b.json", {"split": "train", **shared}, psnr=30.0)
    c = write(tmp_path / "c.json", {"split": "test", "images": 8, "preprocessing": {"size": 32, "flip": False}}, psnr=1)
    first, second = compare([a, b, c])
    assert list(first.results) == ["a", "c"]  # flips are of the training
    assert list(second.results) == ["b"]
    assert (first.differs, second.differs) == ("", "split: 'test' there, 'train' now")
    printed = CliRunner().invoke(app, ["compare", str(a), str(b)]).output
    assert "not comparable with the first table: split: 'test' there, 'train' now" in printed
    assert "all under one protocol" not in printed


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path) -> None:
    paths = [tmp_path / place / "gpt" / "evaluation.json" for place in ("grey", "colour")]
    for path in paths:
        path.parent.mkdir(parents=True)
        write(path, {"split": "test"}, psnr=1.0)
    (group,) = compare([path.parent for path in paths])
    assert list(group.results) == ["grey/gpt", "colour/gpt"]


def test_what_is_no_evaluation(tmp_path) -> None:
    good = write(tmp_path / "good.json", {"split": "test"}, psnr=1.0)
    (tmp_path / "cut.json").write_text('{"psnr": 1')
    (tmp_path / "bare.json").write_text('{"psnr": 1}')
    for path, message in (
        (tmp_path, "no evaluation in .*latticode evaluate"),
        (tmp_path / "cut.json", "is not JSON"),
        (tmp_path / "bare.json", "states no protocol"),
        (good, "named twice"),
    ):
        with pytest.raises(ValueError, match=message):
            compare([good, path])
    with pytest.raises(ValueError, match="from two evaluations on, got 1"):
        compare([good])


def test_a_foreign_tokenizer_gets_the_numbers_that_it_would_get_here(tmp_path) -> None:
    run = tiny_tokenizer(tmp_path / "run")
    opened = Run.open(run, "cpu")
    ours, tokenizer = evaluate(opened, EvaluationRequest(limit=20), console=QUIET), opened.tokenizer
    theirs = Foreign(
        lambda images: tokenizer.encode(images)[..., 0],
        lambda codes: tokenizer.decode(codes[..., None]),
        tokenizer.vocab[0],
        int(tokenizer.strides[0]),
        tokenizer.channels,
        tokenizer,
    )
    loader = opened.whole()
    result = evaluate_tokenizer(theirs, loader, limit=20)
    numbers = {key: value for key, value in ours.items() if isinstance(value, float)}
    assert {"psnr", "usage", "bits_per_pixel"} <= numbers.keys()
    assert {key: result[key] for key in numbers} == pytest.approx(numbers)
    assert result["slots"] == ours["slots"]


def test_a_foreign_tokenizer_has_to_keep_its_word() -> None:
    images = torch.zeros(2, 3, 7, 8)  # padded to 8 x 8

    def foreign(codes, output=images):
        return Foreign(lambda x: codes, lambda c: output, (4, 5), 4)

    codes = torch.zeros(2, 2, 2, 2, dtype=torch.int64)
    good = foreign(codes, torch.zeros(2, 3, 8, 8))
    assert good(images).output.shape == images.shape
    with pytest.raises(ValueError, match=r"integer codes \(2, 2, 2, 2\) .* got \(2, 2, 2\) int64"):
        foreign(codes[..., 0]).encode(images)
    with pytest.raises(ValueError, match=r"got .* float32"):
        foreign(codes.float()).encode(images)
    with pytest.raises(ValueError, match=r"codes 0 .. \[4, 4\] where vocab is \(4, 5\)"):
        foreign(torch.stack([codes[0], codes[1] + 4])).encode(images)
    with pytest.raises(ValueError, match=r"images \(2, 3, 8, 8\), got \(2, 3, 4, 4\)"):
        foreign(codes, torch.zeros(2, 3, 4, 4))(images)
    with pytest.raises(ValueError, match="must be >= 1"):
        Foreign(lambda x: x, lambda x: x, 0, 4)
