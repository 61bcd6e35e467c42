"""Every shipped recipe trains two steps on embedded data, at its own architecture."""

from __future__ import annotations

import pytest

from helpers import QUIET, tiny_tokenizer
from latticode import load
from latticode.engine import load_config, train
from latticode.engine.config import recipe_names

SHORT = ["steps=2", "batch_size=2", "log_every=1", "save_every=2", "picture_every=2", "data.workers=0"]


@pytest.mark.parametrize("name", recipe_names())
def test_recipe(name, tmp_path) -> None:
    source = "photos" if "fsq-tokenizer" in name or "cifar" in name or "imagenet" in name else "digits"
    overrides = [*SHORT, f"data.source=embedded:{source}"]
    if name.startswith("maskgit"):
        overrides.append(f"tokenizer={tiny_tokenizer(tmp_path / 'tokenizer')}")
    config = load_config(name, overrides)
    if "imagenet" in name:
        pytest.skip("paper-size: its schema is validated, a step needs more memory than a test may take")
    load(train(config, tmp_path / "run", console=QUIET))
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size
    assert config.about
