"""Every shipped recipe trains two steps on embedded data, at its own architecture in a debug size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers import QUIET, tiny_config, tiny_tokenizer
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
CHANNELS = dict.fromkeys(("width", "bottom_width", "latent", "hidden", "in_channels", "out_channels"), 32)
DEPTHS = dict.fromkeys(("depth", "bottom_depth", "encoder_depth", "decoder_depth"), 4)
MOST = {**CHANNELS, **DEPTHS, "dim": 32, "size": 1024, "length": 32, "heads": 4, "blocks": 1}
MOST_DATA = {"size": 64, "frames": 5, "length": 2048}


def debug(value: Any, most: dict[str, int], limit: int | None = None) -> Any:
    """A spec with no number above `most` of its key: what fitted, because the numbers were equal, still fits."""
    if isinstance(value, dict):
        return {key: debug(inner, most, most.get(key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [debug(inner, most, limit) for inner in value]
    return min(value, limit) if type(value) is int and limit is not None else value


def source_for(recipe: dict[str, Any]) -> str:
    """The embedded data of the kind that a recipe is for; a prior's recipe leaves that to its tokenizer."""
    data = recipe["data"]
    images = "photos" if data.get("channels") == 3 else "digits"
    kind = "dense" if recipe.get("prior", {}).get("type") == "guide" else data.get("kind", "image")
    return {"audio": "tones", "video": "moving-digits", "dense": "shapes"}.get(kind, images)


def captioned(folder: Path) -> Path:
    """Grey pictures, each with a caption beside it."""
    for i in range(8):
        path = folder / ("test" if i < 2 else "train") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 30 * i).save(path)
        path.with_suffix(".txt").write_text(f"the grey number {i}")
    return folder


def tokens_for(prior: dict[str, Any], folder: Path) -> Path:
    """A tokenizer whose codes the prior can take: of two levels, in equal stages, of a label, or one a position."""
    if prior["type"] == "guide":
        spec = "{type: uvim, task: {type: colorization}, quantizer: {type: fsq, levels: [4, 3]}, code: [2, 2], "
        spec += "patch: 16, side: 4, width: 16, heads: 2, oracle_depth: 1, base_depth: 1}"
        data = "data={kind: dense, source: 'embedded:shapes', size: 64}"
        return train(load_config("uvim-colorization-small", [*SHORT, data, f"tokenizer={spec}"]), folder, console=QUIET)
    book = {"type": "vq", "size": 16, "dim": 3}
    if prior.get("tops") or prior["type"] in ("muse", "two_level"):
        quantizer = {"type": "hierarchical", "top": book, "bottom": {**book, "size": 12}, "fanout": 4}
    elif prior.get("shared"):
        quantizer = {"type": "residual", "stages": book, "depth": 3}
    else:
        return tiny_tokenizer(folder)
    return train(tiny_config(quantizer, "weights={mse: 1, l1: 0.2, commitment: 0.25}"), folder, console=QUIET)


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.slow
def test_recipe(name, tmp_path) -> None:
    recipe = read_recipe(name)
    parts = {key: debug(recipe[key], MOST) for key in ("tokenizer", "prior", "objective") if recipe.get(key)}
    parts["data"] = debug(recipe["data"], MOST_DATA)
    overrides = [f"{key}={part}" for key, part in parts.items()]
    overrides += [*SHORT, f"data.source=embedded:{source_for(recipe)}"]
    objective = recipe["objective"]
    if "perceptual" in objective:
        judge = Classifier(2, recipe["data"]["channels"], 4).save_pretrained(tmp_path / "classifier")
        overrides.append(f"objective.perceptual={{type: features, run: {judge}}}")
    if "adversarial" in objective:
        overrides += ["objective.adversarial.start=0", "objective.adversarial.warmup=0"]
    if "prior" in recipe:
        overrides.append(f"tokenizer={tokens_for(recipe['prior'], tmp_path / 'tokenizer')}")
    if recipe.get("prior", {}).get("text"):
        overrides.append(f"data.source={captioned(tmp_path / 'captioned')}")
    config = load_config(name, overrides)
    load(train(config, tmp_path / "run", console=QUIET))
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size
    assert config.about
