"""Every shipped recipe trains two steps on embedded data, at its own architecture in a debug size."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import QUIET, tiny_tokenizer
from latticode import load
from latticode.engine import load_config, train
from latticode.engine.config import read_recipe, recipe_names
from latticode.metrics.classifier import Classifier

SHORT = [
    "steps=2",
    "batch_size=2",
    "log_every=1",
    "save_every=2",
    "picture_every=2",
    "data.workers=0",
    "precision='no'",
]
# No number of a debug size is above these; 32 channels, since 32 groups of a normalisation are the default.
CHANNELS = dict.fromkeys(("width", "latent", "hidden", "in_channels", "out_channels"), 32)
MOST = {**CHANNELS, "dim": 32, "size": 1024, "depth": 4, "heads": 4, "blocks": 1}
MOST_DATA = {"size": 64, "frames": 5, "length": 2048}


def debug(value: Any, most: dict[str, int], limit: int | None = None) -> Any:
    """A spec with no number above `most` of its key: what fitted, because the numbers were equal, still fits."""
    if isinstance(value, dict):
        return {key: debug(inner, most, most.get(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [debug(inner, most, limit) for inner in value]
    return min(value, limit) if type(value) is int and limit is not None else value


def source_for(data: dict[str, Any]) -> str:
    """The embedded data of the kind that a recipe is for; a prior's recipe leaves that to its tokenizer."""
    images = "photos" if data.get("channels") == 3 else "digits"
    return {"audio": "tones", "video": "moving-digits"}.get(data.get("kind", "image"), images)


@pytest.mark.parametrize("name", recipe_names())
def test_recipe(name, tmp_path) -> None:
    recipe = read_recipe(name)
    parts = {key: debug(recipe[key], MOST) for key in ("tokenizer", "prior", "objective") if recipe.get(key)}
    parts["data"] = debug(recipe["data"], MOST_DATA)
    overrides = [f"{key}={part}" for key, part in parts.items()]
    overrides += [*SHORT, f"data.source=embedded:{source_for(recipe['data'])}"]
    objective = recipe["objective"]
    if "perceptual" in objective:
        judge = Classifier(2, recipe["data"]["channels"], 4).save_pretrained(tmp_path / "classifier")
        overrides.append(f"objective.perceptual={{type: features, run: {judge}}}")
    if "adversarial" in objective:
        overrides += ["objective.adversarial.start=0", "objective.adversarial.warmup=0"]
    if "prior" in recipe:
        overrides.append(f"tokenizer={tiny_tokenizer(tmp_path / 'tokenizer')}")
    config = load_config(name, overrides)
    load(train(config, tmp_path / "run", console=QUIET))
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size
    assert config.about
