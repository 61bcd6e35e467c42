"""What version 0.1 wrote goes on loading: old names of types, keys, recipes, loss terms and parts of saved states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from helpers import FSQ_SPEC, QUIET, VQ_SPEC, tiny_config, tokenizer_spec
from latticode.core import registry, renamed
from latticode.core.pretrained import load_tensors, read_spec, save_tensors
from latticode.core.registry import SpecError, build, check, spec_of
from latticode.engine import RunConfig, load_config, train
from latticode.engine.checkpoint import STATE
from latticode.engine.config import read_recipe, recipe_names, validate
from latticode.viz.report import write_report

PATCH = {"width": 4, "layers": 1, "groups": 2}
OLD = {  # of each type: a spec of 0.1
    "patch_critic": {"type": "patch_critic", **PATCH},
    "stylegan_critic": {"type": "stylegan_critic", "width": 4, "multipliers": [1, 2]},
    "period_critic": {"type": "period_critic", "period": 3, "width": 2},
    "spectrum_critic": {"type": "spectrum_critic", "window": 64, "width": 4},
    "critics": {"type": "critics", "critics": [{"type": "period_critic", "width": 2}, {"type": "spectrum_critic"}]},
}
WEIGHTS = {"mse": 1, "l1": 0.2, "critic": 1, "adversarial": 0.5}


@pytest.mark.parametrize("old", renamed.TYPES)
def test_an_old_type_is_built_and_saved_under_its_new_name(old: str) -> None:
    check(OLD[old])
    module = build({"type": "adversarial", "critic": OLD[old]}).discriminator
    assert type(module) is registry.resolve(old) is registry.resolve(renamed.TYPES[old])
    spec = spec_of(module)
    assert spec["type"] == renamed.TYPES[old]
    assert "critic" not in json.dumps(spec)


def test_no_old_name_is_also_one_of_today() -> None:
    assert not renamed.TYPES.keys() & registry.TABLE.keys()
    assert set(renamed.TYPES.values()) <= registry.TABLE.keys()
    assert not renamed.RECIPES.keys() & set(recipe_names())
    for kind, keys in renamed.KEYS.items():
        parameters = registry.parameters_of(registry.resolve(kind))
        assert not keys.keys() & parameters.keys()
        assert set(keys.values()) <= parameters.keys()


def test_old_names_are_offered_to_nobody() -> None:
    with pytest.raises(SpecError) as caught:
        check({"type": "patch_critik"})
    assert "patch_critic" not in str(caught.value)


@pytest.mark.parametrize(("old", "new"), renamed.RECIPES.items())
def test_a_recipe_is_found_by_its_old_name(old: str, new: str) -> None:
    assert read_recipe(old) == read_recipe(new)


def gan_config(old: bool, *more: str) -> RunConfig:
    """The same run in the words of 0.1, or in those of today."""
    critic = "critic" if old else "discriminator"
    spec = {"type": "adversarial", critic: {"type": f"patch_{critic}", **PATCH}, "ramp": 2}
    weights = {critic if key == "critic" else key: value for key, value in WEIGHTS.items()}
    overrides = [f"objective.adversarial={json.dumps(spec)}", f"weights={json.dumps(weights)}"]
    overrides += [f"optimizers={{{critic}: {{lr: 5e-4}}}}", f"tokenizer={tokenizer_spec(FSQ_SPEC)}"]
    return tiny_config(FSQ_SPEC, *overrides, *more)


def test_a_recipe_in_old_words_is_the_same_run() -> None:
    assert gan_config(old=True) == gan_config(old=False)


@pytest.mark.parametrize("name", ["vqgan-cifar10", "vqgan-imagenet", "bsq-scenes64"])
def test_an_override_in_old_words_changes_the_recipe_of_today(name: str) -> None:
    changes = ("objective.adversarial.{}.width=7", "weights.{}=0.125", "optimizers.{}.lr=0.5")
    old, new = (load_config(name, [text.format(word) for text in changes]) for word in ("critic", "discriminator"))
    assert old == new
    assert old.objective["adversarial"]["discriminator"]["width"] == 7
    assert old.objective["adversarial"]["discriminator"]["type"] in registry.TABLE
    assert old.weights["discriminator"] == 0.125
    assert old.optimizers["discriminator"].lr == 0.5


def test_a_model_with_an_old_spec_loads(tmp_path: Path) -> None:
    spec = tokenizer_spec(VQ_SPEC)
    model = build(spec)
    spec["quantizer"]["online"] = spec["quantizer"].pop("upkeep", "restart") == "online"
    save_tensors(tmp_path / "model.safetensors", model.state_dict(), {"schema": 1, "spec": spec})
    assert spec_of(build(read_spec(tmp_path))) == spec_of(model)


def aged(folder: Path) -> None:
    """Turn a run of today into one that 0.1 wrote."""
    tensors, metadata = load_tensors(folder / STATE)
    old = {key.replace("discriminator", "critic"): tensor for key, tensor in tensors.items()}
    assert old.keys() != tensors.keys()
    save_tensors(folder / STATE, old, metadata)
    for name in ("config.yaml", "metrics.jsonl", "run.json"):
        path = folder / name
        if path.exists():
            path.write_text(path.read_text().replace("discriminator", "critic"))


@pytest.mark.slow
def test_a_run_of_0_1_is_resumed_and_ends_as_it_would_have(tmp_path: Path) -> None:
    cut = train(gan_config(False, "steps=2", "optimizer.schedule=constant"), tmp_path / "cut", console=QUIET)
    same = train(gan_config(False, "optimizer.schedule=constant"), tmp_path / "same", console=QUIET)
    aged(cut)
    assert "critic" in (cut / "config.yaml").read_text()
    train(gan_config(True, "optimizer.schedule=constant"), cut, resume=True, console=QUIET)
    ours, expected = load_file(cut / STATE), load_file(same / STATE)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)
    assert not any("critic" in key for key in ours)
    assert any(key.startswith("optimizer/discriminator/") for key in ours)


def test_fine_tuning_goes_on_with_the_discriminator_of_a_run_of_0_1(tmp_path: Path) -> None:
    source = train(gan_config(False), tmp_path / "source", console=QUIET)
    aged(source)
    later = {"start": 9, "type": "adversarial", "discriminator": {"type": "patch_discriminator", **PATCH}}
    more = [f"init_from={source}", "steps=1", f"objective.adversarial={json.dumps(later)}"]
    tuned = train(gan_config(False, *more), tmp_path / "tuned", console=QUIET)
    ours, theirs = load_file(tuned / STATE), load_file(source / STATE)
    kept = [key for key in ours if key.startswith("module/objective/adversarial.discriminator.")]
    assert kept
    assert all(torch.equal(ours[key], theirs[key.replace("discriminator", "critic")]) for key in kept)


def test_several_discriminators_keep_their_state() -> None:
    module = nn.ModuleDict({"adversarial": build({"type": "adversarial", "critic": OLD["critics"]})})
    for key in module.state_dict():
        old = f"module/objective/{key}".replace("discriminators", "critics").replace("discriminator", "critic")
        assert renamed.state_key(old) == f"module/objective/{key}"


def test_the_model_of_a_run_is_left_alone() -> None:
    assert renamed.state_key("module/model/critic.weight") == "module/model/critic.weight"
    assert validate({**read_recipe("fsq-cifar10"), "about": "critic"}).about == "critic"


@pytest.mark.slow
def test_the_report_of_a_run_of_0_1_has_the_names_of_today(tmp_path: Path) -> None:
    run = train(gan_config(False, "log_every=1", "picture_every=1"), tmp_path / "run", console=QUIET)
    (run / "tensorboard").rename(tmp_path / "away")
    now = write_report(run).read_text()
    aged(run)
    (run / "config.yaml").unlink()
    old = write_report(run).read_text()
    assert "Since the discriminator joined" in old
    assert "critic" not in old
    assert old.count("discriminator") == now.partition('id="configuration"')[0].count("discriminator")
