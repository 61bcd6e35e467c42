"""Every shipped recipe trains two steps on embedded data, at its own architecture."""

from __future__ import annotations

import pytest

from helpers import QUIET, tiny_tokenizer
from latticode import load
from latticode.engine import load_config, train
from latticode.engine.config import recipe_names

COLOUR = ("fsq-tokenizer", "vq-tokenizer", "fsq-cifar10", "vq-cifar10")
SHORT = ["steps=2", "batch_size=2", "log_every=1", "save_every=2", "picture_every=2", "data.workers=0"]


@pytest.mark.parametrize("name", recipe_names())
def test_recipe(name, tmp_path) -> None:
    source = "photos" if name in COLOUR else "digits"
    overrides = [*SHORT, f"data.source=embedded:{source}"]
    if name.startswith("maskgit"):
        overrides.append(f"tokenizer={tiny_tokenizer(tmp_path / 'tokenizer')}")
    config = load_config(name, overrides)
    load(train(config, tmp_path / "run", console=QUIET))
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size
    assert config.about
