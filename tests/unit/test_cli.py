"""The command line as a user meets it: the whole road on tiny runs, and one clear message for every mistake."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import FSQ_SPEC, QUIET, TINY, tiny_config, tiny_tokenizer
from latticode import cli
from latticode.engine import train


def run(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["latticode", *map(str, words)])
    try:
        cli.main()
        code = 0
    except SystemExit as leave:
        code = int(leave.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def read(path: Path) -> tuple[np.ndarray, dict]:
    with Image.open(path) as image:
        return np.asarray(image).astype(int), json.loads(image.info.get("latticode", "{}"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("cli") / "tokenizer")


@pytest.fixture
def latticode(monkeypatch, capsys):
    return lambda *words: run(monkeypatch, capsys, *words)


@pytest.mark.slow
def test_the_whole_road(latticode, tokenizer, tmp_path) -> None:
    tokens, pictures, prior = tmp_path / "tokens", tmp_path / "pictures", tmp_path / "prior"
    code, _, err = latticode("encode", tokenizer, "embedded:digits", tokens, "--split", "test")
    assert code == 0, err
    manifest = json.loads((tokens / "manifest.json").read_text())
    assert manifest["vocab"] == [12]
    assert manifest["preprocess"]["resize"] == "bicubic"
    code, _, err = latticode("decode", tokenizer, tokens, pictures)
    assert code == 0, err
    files = sorted(pictures.iterdir())
    assert len(files) == manifest["count"]
    assert read(files[0])[0].shape == (8, 8)

    tiny = ["steps=2", "log_every=1", "batch_size=8", "prior.width=16", "prior.depth=1", "prior.heads=2"]
    code, _, err = latticode("train", "maskgit", f"tokenizer={tokenizer}", *tiny, "--out", prior)
    assert code == 0, err
    assert (prior / "report.html").is_file()
    code, _, err = latticode("sample", prior, "--count", 5, "--label", 3, "--guidance", 2, "--steps", 3, "--seed", 7)
    assert code == 0, err
    _, settings = read(prior / "samples" / "sample-00000.png")
    assert (settings["seed"], settings["label"], settings["guidance"], settings["steps"]) == (7, 3, 2.0, 3)
    small = tmp_path / "again"
    latticode(
        "sample",
        prior,
        "--count",
        5,
        "--label",
        3,
        "--guidance",
        2,
        "--steps",
        3,
        "--seed",
        7,
        "--batch-size",
        2,
        "-o",
        small,
    )
    for index in range(5):
        pair = [read(f / f"sample-{index:05d}.png")[0] for f in (prior / "samples", small)]
        assert (pair[0] == pair[1]).all()
    code, _, err = latticode("sample", prior, "--count", 5, "--seed", 8)
    assert code == 2
    assert "samples of other settings" in err
    files = sorted((prior / "samples").glob("sample-*"))
    words = ["--box", "0,0,4,4", "--label", 2, "--label", 5, "--top-k", 4, "--count", 2]
    code, out, err = latticode("edit", prior, files[0], tmp_path / "edited", *words)
    assert code == 0, err
    assert "2 variants" in out
    _, settings = read(tmp_path / "edited" / "sample-00001.png")
    assert (settings["label"], settings["box"], settings["top_k"]) == (5, [0, 0, 4, 4], 4)
    (tmp_path / "lines.txt").write_text("a shoe\n\na coat\n")
    code, _, err = latticode("sample", prior, "--texts", tmp_path / "lines.txt", "-o", tmp_path / "texts")
    assert code == 2
    assert "reads no text, got 'a shoe'" in err
    code, _, err = latticode("edit", prior, files[0], tmp_path / "edited", "--box", "1,2,3")
    assert code == 2
    assert "--box needs four integers with commas between, got '1,2,3'" in err

    classifier = tmp_path / "classifier"
    code, _, err = latticode("train", "classifier", *TINY[:4], "steps=2", "classifier.width=4", "--out", classifier)
    assert code == 0, err
    code, _, err = latticode("evaluate", prior, "--own-size")
    assert code == 2
    assert "of tokenizers" in err
    code, out, err = latticode("evaluate", tokenizer, "--perceptual", classifier, "--limit", 20)
    assert code == 0, err
    assert "perceptual_classifier" in out
    code, out, err = latticode(
        "evaluate",
        prior,
        "--features",
        classifier,
        "--classifier",
        classifier,
        "--samples",
        20,
        "--limit",
        20,
        "--top-p",
        0.9,
    )
    assert code == 0, err
    result = json.loads((prior / "evaluation.json").read_text())
    assert result["protocol"]["feature_network"] == "classifier"
    assert result["protocol"]["sampling"]["top_p"] == 0.9
    assert result["compression_cost"] > 0
    assert "fid_classifier" in out
    for folder in (tokenizer, classifier):
        code, _, err = latticode("evaluate", folder, "--limit", 30)
        assert code == 0, err
    assert json.loads((tokenizer / "evaluation.json").read_text())["protocol"]["split"] == "test"


@pytest.mark.parametrize("crop", ["center", "random"])
def test_photographs_keep_their_own_size(latticode, tmp_path, crop) -> None:
    tokenizer = train(tiny_config(FSQ_SPEC, f"data.crop={crop}"), tmp_path / "tokenizer", console=QUIET)
    photos, tokens, back = tmp_path / "photos", tmp_path / "tokens", tmp_path / "back"
    photos.mkdir()
    generator = np.random.default_rng(0)
    for name, size in {"a": (9, 14), "b": (20, 20), "c": (9, 14)}.items():
        Image.fromarray(generator.integers(0, 255, size, np.uint8)).save(photos / f"{name}.png")
    (photos / "broken.png").write_bytes(b"not an image")
    code, _, err = latticode("encode", tokenizer, photos, tokens, "--own-size")
    assert code == 0, err
    assert "skipped broken.png" in err
    code, _, err = latticode("decode", tokenizer, tokens, back)
    assert code == 0, err
    assert [read(f)[0].shape for f in sorted(back.iterdir())] == [(9, 14), (20, 20), (9, 14)]


@pytest.mark.slow
def test_photographs_in_tiles(latticode, tokenizer, tmp_path) -> None:
    """Scored without resizing; the token dataset decodes to what the score is of."""
    photos, tokens, back = tmp_path / "photos", tmp_path / "tokens", tmp_path / "back"
    photos.mkdir()
    generator = np.random.default_rng(0)
    sizes = {"a": (38, 50), "b": (16, 17)}
    images = {name: generator.integers(0, 255, size, np.uint8) for name, size in sizes.items()}
    for name, image in images.items():
        Image.fromarray(image).save(photos / f"{name}.png")
    code, _, err = latticode("evaluate", tokenizer, photos, "--split", "all", "--own-size", "--tile", 32)
    assert code == 0, err
    result = json.loads((tokenizer / "evaluation.json").read_text())
    assert result["protocol"]["sizes"] == [[1, 16, 17], [1, 38, 50]]
    assert (result["protocol"]["tile"], result["protocol"]["preprocessing"]["size"]) == (32, None)
    assert result["bits_per_pixel"] == pytest.approx(np.log2(12) * (10 * 13 + 4 * 5) / (38 * 50 + 16 * 17))

    code, _, err = latticode("encode", tokenizer, photos, tokens, "--own-size", "--tile", 32)
    assert code == 0, err
    assert json.loads((tokens / "manifest.json").read_text())["preprocess"]["tile"] == 32
    code, _, err = latticode("decode", tokenizer, tokens, back, "--tile", 32)
    assert code == 0, err
    mse = [((read(f)[0] - x) ** 2).mean() for f, x in zip(sorted(back.iterdir()), images.values(), strict=True)]
    assert result["psnr"] == pytest.approx(np.mean([10 * np.log10(255**2 / m) for m in mse]))
    latticode("decode", tokenizer, tokens, tmp_path / "whole")
    assert (read(next(back.glob("*a.png")))[0] != read(next((tmp_path / "whole").glob("*a.png")))[0]).any()


def test_levels(latticode) -> None:
    code, out, _ = latticode("levels", "--bits", 12)
    assert code == 0
    assert "[7, 5, 5, 5, 5]" in out
    assert "4,375" in out
    assert latticode("levels", "--size", 4096)[1] == out


def test_recipes_are_listed(latticode) -> None:
    code, out, _ = latticode("recipes")
    assert code == 0
    for name in ("fsq-tokenizer", "maskgit", "classifier"):
        assert re.search(rf"^{name}\s+\S", out, re.MULTILINE)


@pytest.mark.parametrize(
    "words", [[], ["train"], ["encode"], ["decode"], ["sample"], ["edit"], ["evaluate"], ["levels"], ["demo"]]
)
def test_help_reads(latticode, words) -> None:
    code, out, _ = latticode(*words, "--help")
    assert code == 0
    assert "Usage" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "fsq-tokenizer", "stesp=1"], "unknown key 'stesp'; nearest: steps"),
        (["train", "fsq-tokenizer", "data.source=nowhere"], "unknown source 'nowhere'"),
        (["train", "nothing"], "no recipe 'nothing'"),
        (["train", "maskgit"], "a prior needs a trained tokenizer"),
        (["levels"], "bits"),
        (["levels", "--bits", "0.1"], "0.1"),
        (["encode", "nowhere", "embedded:digits", "out"], "nowhere is not the folder of a run"),
        (["encode", "RUN", "embedded:digit", "out"], "embedded are"),
        (["encode", "RUN", "embedded:digits", "out", "--device", "tpu9"], "no device 'tpu9'"),
        (["decode", "RUN", "nowhere", "out"], "nowhere is no token dataset"),
        (["sample", "RUN"], "is the run of a tokenizer; a prior's is needed"),
        (["evaluate", "RUN", "--perceptual", "nowhere"], "nowhere holds no model.safetensors"),
        (["evaluate", "RUN", "--own-size", "--tile", "6"], "got tile 6"),
        (["evaluate", "RUN", "--features", "nowhere"], "nowhere holds no model.safetensors"),
        (["evaluate", "RUN", "--features", "inception"], "feature network 'inception' cannot be had"),
        (["sample", "RUN", "--count", "0"], "Invalid value for '--count'"),
        (["edit", "RUN", "nowhere.png", "out", "--box", "0,0,1,1"], "is the run of a tokenizer; a prior's is needed"),
    ],
)
def test_one_clear_message_and_exit_code_2(latticode, tokenizer, tmp_path, monkeypatch, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = latticode(*[tokenizer if word == "RUN" else word for word in words])
    assert code == 2
    assert message in re.sub(r"\s+", " ", err)
    assert "Traceback" not in err


def test_tokens_of_another_tokenizer_are_refused(latticode, tokenizer, tmp_path) -> None:
    other = tiny_tokenizer(tmp_path / "other")
    from latticode import load

    model = load(other)
    next(model.parameters()).data += 1
    model.save_pretrained(other)
    latticode("encode", tokenizer, "embedded:digits", tmp_path / "tokens", "--split", "test")
    code, _, err = latticode("decode", other, tmp_path / "tokens", tmp_path / "out")
    assert code == 2
    assert "made by another tokenizer" in err
