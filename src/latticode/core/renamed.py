"""Names of version 0.1 that are different now, so that its models, run folders and recipes go on loading.

One place knows the old names. Whatever reads a file or a recipe passes its names through here; everything behind that,
and everything that is written, has the names of today. `docs/glossary.md` lists them for people.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from latticode.core.mappings import is_list, is_mapping

TYPES = {  # of specs
    "patch_critic": "patch_discriminator",
    "stylegan_critic": "stylegan_discriminator",
    "period_critic": "period_discriminator",
    "spectrum_critic": "stft_discriminator",
    "critics": "multi_discriminator",
}
KEYS = {  # of specs, by their type of today
    "adversarial": {"critic": "discriminator"},
    "multi_discriminator": {"critics": "discriminators"},
}
TERMS = {"critic": "discriminator"}  # loss terms and players: keys of `weights` and `optimizers`
RECIPES = {
    "uvim-colour-small": "uvim-colorization-small",
    "uvim-colour-small-guide": "uvim-colorization-small-guide",
    "uvim-imagenet-colour": "uvim-imagenet-colorization",
    "uvim-imagenet-colour-guide": "uvim-imagenet-colorization-guide",
}
FACTS = {"critic_from": "discriminator_from"}  # of run.json
METRICS = {"train/critic": "train/discriminator"}  # of metrics.jsonl
STATE = (  # of training/state.safetensors
    (re.compile(r"^optimizer/critic/"), "optimizer/discriminator/"),
    (re.compile(r"^(module/objective/adversarial\.)critic\."), r"\1discriminator."),
    (re.compile(r"^(module/objective/adversarial\.discriminator\.)critics\."), r"\1discriminators."),
)


def renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`values` under today's `names` (old -> new). Where both the old and the new key stand, the later one overrides.

    Examples:
        >>> renamed({"mse": 1.0, "critic": 0.5}, TERMS)
        {'mse': 1.0, 'discriminator': 0.5}
        >>> renamed({"discriminator": {"lr": 1e-3, "warmup": 9}, "critic": {"lr": 1e-4}}, TERMS)
        {'discriminator': {'lr': 0.0001, 'warmup': 9}}
    """
    result: dict[str, Any] = {}
    for key, value in values.items():
        new = names.get(key, key)
        result[new] = _over(result[new], value) if new in result else value
    return result


def spec(value: Any) -> Any:
    """A spec, and the specs inside it, with the names of today.

    Examples:
        >>> spec({"type": "adversarial", "critic": {"type": "patch_critic", "width": 8}})
        {'type': 'adversarial', 'discriminator': {'type': 'patch_discriminator', 'width': 8}}
    """
    if is_list(value):
        return [spec(inner) for inner in value]
    if not is_mapping(value):
        return value
    result: dict[str, Any] = {key: spec(inner) for key, inner in value.items()}
    kind = result.get("type")
    if not isinstance(kind, str):
        return result
    result["type"] = kind = TYPES.get(kind, kind)
    if kind == "vq" and "online" in result:  # became one value of `upkeep`
        result["upkeep"] = "online" if result.pop("online") else "restart"
    return renamed(result, KEYS.get(kind, {}))


def recipe(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a recipe, or of a run's config.yaml, with the names of today."""
    result = {key: value if key in ("weights", "optimizers") else spec(value) for key, value in content.items()}
    for key in ("weights", "optimizers"):
        if isinstance(result.get(key), Mapping):
            result[key] = renamed(result[key], TERMS)
    return result


def state_key(key: str) -> str:
    """The name of a tensor in a training state, as it is today.

    Examples:
        >>> state_key("module/objective/adversarial.critic.main.0.weight")
        'module/objective/adversarial.discriminator.main.0.weight'
    """
    for pattern, new in STATE:
        key = pattern.sub(new, key)
    return key


def _over(value: Any, change: Any) -> Any:
    """`value` with `change` laid over it: key by key, unless `change` is a whole spec or no mapping."""
    if not is_mapping(value) or not is_mapping(change) or "type" in change:
        return change
    return {**value, **{key: _over(value.get(key), inner) for key, inner in change.items()}}
