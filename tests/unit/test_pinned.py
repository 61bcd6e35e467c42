"""Small arithmetic that a slip would change without another test noticing: each of these slips was tried, and found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from helpers import FSQ_SPEC, QUIET, tiny_config, tokenizer_spec
from latticode.core.registry import build
from latticode.core.types import Sampling
from latticode.data.dense import DensePreprocess
from latticode.data.embedded import SETS
from latticode.data.loading import Loader
from latticode.data.media import window
from latticode.data.records import ArraySource, is_held_out
from latticode.data.sources import open_source
from latticode.data.transforms import Preprocess
from latticode.engine import train
from latticode.engine.loop import Average
from latticode.evaluate import evaluate_prior, evaluate_tokenizer

# Training


@pytest.mark.slow
def test_gradients_of_accumulated_parts_are_those_of_the_big_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under plain SGD without clipping; AdamW and clipping hide a factor."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=lr))
    start, after = {}, {}
    for accumulate in (1, 2, 4):
        more = ["steps=1", "ema=0", "optimizer={lr: 0.1, clip: 0, warmup: 0, schedule: constant}"]
        config = tiny_config(FSQ_SPEC, f"batch_size={8 // accumulate}", f"accumulate={accumulate}", *more)
        after[accumulate] = load_file(train(config, tmp_path / str(accumulate), console=QUIET) / "model.safetensors")
        torch.manual_seed(config.seed)
        start = build(config.model).state_dict()
    moved = {name: (weight - start[name]).abs().max() for name, weight in after[1].items()}
    assert max(moved.values()) > 1e-3
    for parts in (2, 4):
        for name, weight in after[1].items():
            torch.testing.assert_close(after[parts][name], weight, rtol=0, atol=1e-6 + 1e-3 * float(moved[name]))


def test_the_average_of_the_weights_forgets_the_first_steps() -> None:
    """Its decay is min(decay, (1 + t) / (10 + t)), worked out here in double precision."""
    model, decay = nn.Linear(1, 1, bias=False), 0.5
    average = Average(model, decay)
    expected = float(model.weight.detach())
    for step in range(20):
        value = float(step * step)
        nn.init.constant_(model.weight, value)
        average.update(step)
        kept = min(decay, (1 + step) / (10 + step))  # 0.1, 2/11, 3/12, ..., 0.5 from step 8
        expected = kept * expected + (1 - kept) * value
        assert float(average.weights()["weight"]) == pytest.approx(expected, rel=1e-5), step


# Data


@pytest.mark.parametrize(("width", "height"), [(3, 3), (2, 4), (5, 2)])
def test_a_random_crop_reaches_every_place(width: int, height: int) -> None:
    values = np.arange(width * height, dtype=np.uint8).reshape(height, width)
    crop = Preprocess(2, 1, crop="random")
    seen = {int(crop(values, np.random.default_rng(seed))[0, 0, 0]) for seed in range(100)}
    assert seen == set(values[: height - 1, : width - 1].flat)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_an_odd_rest_of_a_centred_crop_is_less_on_the_left_and_above(crop: str) -> None:
    """What is evaluated, and what token datasets hold, was cut so."""
    values = np.arange(10, dtype=np.uint8)
    wide, tall = np.stack([values[:5], values[5:]]), np.stack([values[:5], values[5:]], 1)
    preprocess = Preprocess(2, 1, crop=crop)
    assert preprocess(wide)[0].tolist() == [[1, 2], [6, 7]]
    assert preprocess(tall)[0].tolist() == [[1, 6], [2, 7]]


def test_a_random_part_of_a_photograph_reaches_every_place() -> None:
    crop = DensePreprocess(2, crop="inception", area=(4 / 36, 4 / 36), aspect=(1, 1))
    values = np.arange(36, dtype=np.uint8).reshape(6, 6)
    picture = Image.fromarray(values).convert("RGB")
    seen = {int(crop.arrange((picture,), np.random.default_rng(seed))[0, 0, 0]) for seed in range(300)}
    assert seen == set(values[:5, :5].flat)


def test_a_random_window_reaches_every_place() -> None:
    assert {window(7, 4, np.random.default_rng(seed)).start for seed in range(100)} == {0, 1, 2, 3}


NAMES = [f"folder/{i:03d}.png" for i in range(100)]
HELD_OUT = {
    0.1: [f"folder/{i:03d}.png" for i in (0, 6, 10, 11, 15, 25, 37, 79, 85)],
    0.02: ["folder/011.png"],
}
EMBEDDED = {  # how many are held out of each set that has no parts of its own, and the first of them
    "digits": (174, "0016 0031 0040 0044 0045"),
    "faces": (19, "008 016 031 043 050"),
    "moving-digits": (182, "0005 0011 0015 0035 0053"),
    "shapes": (29, "0001 0004 0031 0033 0039"),
    "tones": (23, "i-03 u-04 e-07 a-08 u-09"),
}


def test_what_is_held_out_never_changes() -> None:
    """Runs and token datasets of earlier versions were trained on the rest."""
    for holdout, expected in HELD_OUT.items():
        assert [name for name in NAMES if is_held_out(name, holdout)] == expected
    assert is_held_out("a\udcff.png", 0.1)  # a file name that is not UTF-8
    assert not is_held_out("\u00e4.png", 0.1)


@pytest.mark.parametrize("name", [name for name in SETS if name != "photos"])
def test_what_is_held_out_of_embedded_data_never_changes(name: str) -> None:
    source = open_source(f"embedded:{name}", "test", medium=SETS[name][0])
    names = [source.name_of(i).removeprefix(f"{name}/") for i in range(len(source))]
    count, first = EMBEDDED[name]
    assert (len(names), names[:5]) == (count, first.split())


# Evaluation


@pytest.mark.parametrize("channels", [1, 3])
def test_a_pixel_has_all_its_channels(channels: int) -> None:
    """Bits per pixel are bits over height times width, of colour too."""
    images = np.random.default_rng(0).integers(256, size=(4, 16, 16, 3), dtype=np.uint8)
    source = ArraySource("noise", images, None, (), list("abcd"))
    loader = Loader(source, Preprocess(size=16, channels=channels), batch_size=3)
    tokenizer = build(tokenizer_spec(channels=channels))
    assert tokenizer.grid((16, 16)) == (4, 4)
    result = evaluate_tokenizer(tokenizer, loader)
    assert result["bits_per_pixel"] == pytest.approx(np.log2(12) * 16 / 256)
    prior = build({"type": "maskgit", "vocab": [12], "grid": [4, 4], "width": 8, "depth": 1, "heads": 1})
    result = evaluate_prior(prior, tokenizer, loader, sampling=Sampling(steps=1), samples=1)
    assert result["bits_per_pixel"] == pytest.approx(result["compression_cost"] * 16 / 256)
