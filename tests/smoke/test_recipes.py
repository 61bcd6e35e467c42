"""Every shipped recipe trains two steps on embedded data, at its own architecture."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import QUIET, tiny_tokenizer
from latticode import load
from latticode.engine import load_config, train
from latticode.engine.config import read_recipe, recipe_names
from latticode.metrics.classifier import Classifier

SHORT = ["steps=2", "batch_size=2", "log_every=1", "save_every=2", "picture_every=2", "data.workers=0"]


def source_for(data: dict[str, Any]) -> str:
    """The embedded data of the kind that a recipe is for; a prior's recipe leaves that to its tokenizer."""
    images = "photos" if data.get("channels") == 3 else "digits"
    return {"audio": "tones", "video": "moving-digits"}.get(data.get("kind", "image"), images)


@pytest.mark.parametrize("name", recipe_names())
def test_recipe(name, tmp_path) -> None:
    recipe = read_recipe(name)
    overrides = [*SHORT, f"data.source=embedded:{source_for(recipe.get('data', {}))}"]
    objective = recipe["objective"]
    if "perceptual" in objective:
        judge = Classifier(2, recipe["data"]["channels"], 4).save_pretrained(tmp_path / "classifier")
        overrides.append(f"objective.perceptual={{type: features, run: {judge}}}")
    if "adversarial" in objective:
        overrides += ["objective.adversarial.start=0", "objective.adversarial.warmup=0"]
    if name.endswith("-imagenet"):  # its own architecture but for the width, and the size that a stride of 16 allows
        overrides += ["tokenizer.encoder.width=32", "tokenizer.decoder.width=32", "data.size=32"]
    if "prior" in recipe:
        overrides.append(f"tokenizer={tiny_tokenizer(tmp_path / 'tokenizer')}")
    config = load_config(name, overrides)
    load(train(config, tmp_path / "run", console=QUIET))
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size
    assert config.about
