"""A run is read once, refuses what it is not, and a request what cannot be drawn; what encodes is a `Coder`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import QUIET, TINY, tiny_tokenizer
from latticode.core.registry import build
from latticode.core.types import Coder
from latticode.data import AudioPreprocess, Preparation, Preprocess, Record, VideoPreprocess
from latticode.engine import load_config, train
from latticode.engine.config import ConfigError
from latticode.runs import open as opening
from latticode.runs.evaluate import evaluate
from latticode.runs.open import Run
from latticode.runs.sample import sample
from latticode.sampling.request import Request
from latticode.tokenizers.palette import Palette


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("runs") / "tokenizer")


@pytest.fixture(scope="module")
def prior(tokenizer) -> Path:
    small = ["steps=1", "batch_size=4", "prior.width=16", "prior.depth=1", "prior.heads=2"]
    return train(load_config("maskgit", [f"tokenizer={tokenizer}", *small]), tokenizer.parent / "prior", console=QUIET)


@pytest.fixture(scope="module")
def classifier(tokenizer) -> Path:
    config = load_config("classifier", [*TINY[:5], "steps=1", "classifier.width=4"])
    return train(config, tokenizer.parent / "classifier", console=QUIET)


def test_models_are_read_once_and_only_if_they_are_needed(prior, tmp_path, monkeypatch) -> None:
    read, real = [], opening.load_model
    monkeypatch.setattr(opening, "load_model", lambda folder: (read.append(folder.name), real(folder))[1])
    run = Run.open(str(prior), "cpu")
    assert run.tokenizer.encode(torch.zeros(1, 1, 8, 8)).shape == (1, 2, 2, 1)
    assert read == ["tokenizer"]
    sample(run, tmp_path / "samples", Request(count=2), console=QUIET)
    evaluate(run, console=QUIET)
    assert sorted(read) == ["prior", "tokenizer"]
    assert Run.open(run) is run


def test_runs_of_other_kinds_are_refused_by_name(tokenizer, prior, classifier, tmp_path) -> None:
    opened = {path.name: Run.open(path, "cpu") for path in (tokenizer, prior, classifier)}
    for name, run in opened.items():
        for kind in {"prior", "classifier"} - {name}:
            with pytest.raises(ValueError, match=f"{name} is the run of a {name}; a {kind}'s is needed"):
                getattr(run, kind)
        with pytest.raises(ValueError, match=f"run of a {type(run.model).__name__}; one of a uvim"):
            _ = run.uvim
    with pytest.raises(ValueError, match="run of a classifier; a tokenizer's is needed"):
        _ = opened["classifier"].coder
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        Run.open(tmp_path)
    with pytest.raises(ValueError, match="no device 'abacus'"):
        Run.open(tokenizer, "abacus")


@pytest.mark.parametrize("given", [{"count": 0}, {"batch_size": 0}, {"keep_best": 0.5}, {"score": len}])
def test_a_request_that_cannot_be_drawn(given) -> None:
    with pytest.raises(ValueError, match=r"must be >= 1|rejection needs"):
        Request(**given)


def test_what_encodes_is_a_coder() -> None:
    size = {"width": 16, "heads": 2, "oracle_depth": 1, "base_depth": 1, "patch": 8, "side": 2, "code": [2, 2]}
    uvim = build(
        {"type": "uvim", "task": {"type": "colorization"}, "quantizer": {"type": "fsq", "levels": [4]}, **size}
    )
    images = torch.zeros(2, 3, 16, 16)
    for coder, inputs, guides in ((Palette(4), images, False), (uvim, images.int(), True)):
        assert isinstance(coder, Coder)
        assert coder.guides == guides == (coder.image(inputs) is not None)
        assert coder.encode(inputs).shape == (2, *coder.grid(inputs.shape[2:]), len(coder.vocab))
    assert not isinstance(torch.nn.Identity(), Coder)


@pytest.mark.parametrize(
    ("preprocess", "shape", "seconds"),
    [
        (Preprocess(8), (3, 8, 8), 0.0),
        (Preprocess(8, channels=1), (1, 8, 8), 0.0),
        (AudioPreprocess(100, channels=2), (2, 50), 1.0),
        (VideoPreprocess(8, fps=10.0), (3, 5, 8, 8), 1.0),
    ],
    ids=str,
)
def test_what_is_saved_is_read_again(preprocess: Preparation, shape, seconds, tmp_path) -> None:
    steps = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape))
    values = steps / 127.5 - 1
    path = preprocess.save(tmp_path / "one", values, {"made": "here"})
    again = preprocess.arrange(preprocess.load(Record(path.read_bytes(), -1, path.name)))
    if again.dtype == np.uint8:
        assert (again == steps.numpy()).all()
    else:
        np.testing.assert_allclose(again, values.numpy(), atol=2**-15)
    assert preprocess.seconds(torch.stack([values, values])) == pytest.approx(seconds)
