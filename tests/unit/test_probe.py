"""A linear probe of a prior's layers: what it is given, what chooses, what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from helpers import FSQ_SPEC, QUIET, tiny_config
from latticode.cli import app
from latticode.core import registry
from latticode.core.types import Conditioning
from latticode.engine import load_config, train
from latticode.priors.base import Prior
from latticode.priors.text import BPE
from latticode.runs.probe import STRENGTHS, probe, probe_layers
from latticode.viz.report import write_report

SMALL = {"vocab": [7], "grid": [3, 4], "width": 16, "depth": 2, "heads": 2}
SPECS: dict[str, dict[str, Any]] = {
    "gpt": {"type": "gpt", "classes": 3, **SMALL},
    "gpt-slots": {"type": "gpt", **SMALL, "vocab": [5, 4], "inner_depth": 1, "places": "axial", "style": "llama"},
    "maskgit": {"type": "maskgit", "classes": 3, **SMALL},
    "dalle": {"type": "dalle", **SMALL, "kernel": 3, "text": {"type": "bpe", "size": 260, "length": 9}},
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
PRIOR = ["data.workers=0", "steps=2", "batch_size=4", "save_every=2", "picture_every=2", "log_every=1"]


def small(spec: dict[str, Any]) -> Prior:
    torch.manual_seed(0)
    prior = registry.build(spec).eval()
    if isinstance(prior.text, BPE):
        prior.text.fit(["a red cat"])
    return prior


def random_codes(prior: Prior, count: int) -> torch.Tensor:
    return torch.stack([torch.randint(size, (count, *prior.grid)) for size in prior.vocab], dim=-1)


# --- features


@every_spec
def test_features_are_of_the_embedding_and_every_block(spec: dict[str, Any]):
    prior = small(spec)
    codes = random_codes(prior, 5)
    layers = prior.features(codes)
    assert [layer.shape for layer in layers] == [(5, 16)] * 3
    for i in range(5):
        for whole, one in zip(layers, prior.features(codes[i : i + 1]), strict=True):
            torch.testing.assert_close(whole[i : i + 1], one)
    assert all(len(layer.unique(dim=0)) == 5 for layer in layers)


@every_spec
def test_gradients_flow_back_from_every_layer(spec: dict[str, Any]):
    prior = small(spec)
    for depth, layer in enumerate(prior.features(random_codes(prior, 2))):
        prior.zero_grad()
        layer.square().sum().backward(retain_graph=True)
        reached = {
            name.split(".")[2] for name, p in prior.named_parameters() if ".blocks." in name and p.grad is not None
        }
        assert reached == {str(i) for i in range(depth)}
        assert any(p.grad is not None for name, p in prior.named_parameters() if "embedding" in name)


@every_spec
def test_features_leave_nothing_behind_and_ask_for_good_codes(spec: dict[str, Any]):
    prior = small(spec)
    codes = random_codes(prior, 2)
    prior.features(codes)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in prior.modules())
    with pytest.raises(ValueError, match="expects integer codes"):
        prior.features(codes.float())
    with pytest.raises(ValueError, match="label 3 is not valid"):
        prior.features(codes, Conditioning(torch.tensor([3, 3])))


def test_a_gpt_s_embedding_is_the_mean_of_what_it_reads():
    prior: Any = small(SPECS["gpt"])
    codes = random_codes(prior, 1)
    read = torch.cat([prior.label.weight[-1:], prior.embedding(codes.flatten()[:-1])]) + prior.place
    torch.testing.assert_close(prior.features(codes)[0][0], read.mean(0))


def test_a_prior_without_features_names_those_that_have():
    prior = small({"type": "pixelcnn", "vocab": [7], "grid": [3, 4], "width": 8, "depth": 1})
    with pytest.raises(ValueError, match=r"a PixelCNN has no features; priors that have: .*gpt, .*maskgit"):
        prior.features(random_codes(prior, 2))


# --- the probe


def layers_of(count: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Noise, then three classes that planes tell apart but for every tenth image, then noise with a little of them."""
    random = np.random.default_rng(seed)
    labels = random.integers(3, size=count)
    corners = 4 * np.eye(3, 5, dtype=np.float32)
    shown = np.where(random.random(count) < 0.1, random.integers(3, size=count), labels)
    noise = random.normal(size=(3, count, 5)).astype(np.float32)
    return [noise[0], corners[shown] + noise[1], 0.2 * corners[labels] + noise[2]], labels


def test_the_layer_that_tells_classes_apart_is_found():
    done: list[int] = []
    result = probe_layers(*layers_of(300, 0), *layers_of(200, 1), progress=done.append)
    assert done == list(range(1, 3 * (len(STRENGTHS) + 1) + 1))
    assert (result["train"], result["held_out"], result["test"]) == (300, 30, 200)
    accuracy = [layer["accuracy"] for layer in result["layers"]]
    assert result["layer"] == 1
    assert result["accuracy"] == accuracy[1]
    assert 0.88 < accuracy[1] < 0.98
    assert accuracy[0] < 0.45 < accuracy[2] < 0.85
    assert 0.25 < result["chance"] < 0.45
    assert all(layer["converged"] for layer in result["layers"])


def test_test_images_choose_nothing():
    train, (test, labels) = layers_of(200, 0), layers_of(100, 1)
    honest = probe_layers(*train, test, labels)
    wrong = probe_layers(*train, test, (labels + 1) % 3)
    assert wrong["layer"] == honest["layer"]
    assert wrong["accuracy"] < 0.1 < honest["accuracy"]
    for a, b in zip(honest["layers"], wrong["layers"], strict=True):
        assert (a["held_out"], a["strength"]) == (b["held_out"], b["strength"])


def test_the_scale_of_a_feature_does_not_matter():
    (train, labels), (test, test_labels) = layers_of(200, 0), layers_of(100, 1)
    scale, shift = np.array([1e-4, 1e-3, 1e-4, 1e-3, 1e-4], np.float32), np.float32(3e-4)
    plain = probe_layers(train, labels, test, test_labels)
    scaled = probe_layers([x * scale + shift for x in train], labels, [x * scale + shift for x in test], test_labels)
    assert [layer["strength"] for layer in scaled["layers"]] == [layer["strength"] for layer in plain["layers"]]
    assert scaled["accuracy"] == pytest.approx(plain["accuracy"], abs=0.02)


def test_one_label_is_not_enough():
    (train, labels), test = layers_of(50, 0), layers_of(20, 1)
    with pytest.raises(ValueError, match="at least 2 labels, got 1"):
        probe_layers(train, np.zeros_like(labels), *test)


# --- runs


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A palette of four greys, so that the tokens are the pixels."""
    palette = ["tokenizer={type: palette, size: 4}", "objective.terms=[mse]", "steps=1"]
    config = tiny_config(FSQ_SPEC, *palette, "weights={mse: 1, codebook: 1, commitment: 0}")
    return train(config, tmp_path_factory.mktemp("tokenizer") / "run", console=QUIET)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory, tokenizer) -> Path:
    config = load_config("gpt", [*PRIOR, f"tokenizer={tokenizer}", "prior={type: gpt, width: 16, depth: 2, heads: 2}"])
    return train(config, tmp_path_factory.mktemp("gpt") / "run", console=QUIET)


@pytest.mark.slow
def test_a_run_is_probed_from_the_command_line(gpt):
    done = CliRunner().invoke(app, ["probe", str(gpt), "--limit", "150"])
    assert done.exit_code == 0, done.output
    result = json.loads((gpt / "probe.json").read_text())
    assert [layer["layer"] for layer in result["layers"]] == [0, 1, 2]
    assert result["train"] == 150
    assert result["accuracy"] > 2 * result["chance"], "the tokens alone tell digits apart better than by chance"
    assert result["protocol"]["source"] == "embedded:digits"
    assert (gpt / "probe.svg").read_bytes().startswith(b"<?xml")
    assert f"layer {result['layer']}: {result['accuracy']:.2%} of {result['test']} test images" in done.output
    assert "Linear probe" in write_report(gpt).read_text()


@pytest.mark.slow
def test_a_probe_repeats_itself_and_the_seed_draws_the_images(gpt):
    first, again, other = (probe(gpt, limit=60, seed=seed, console=QUIET) for seed in (0, 0, 1))
    assert first == again
    assert first["layers"] != other["layers"]


@pytest.mark.slow
def test_what_cannot_be_probed(tmp_path, tokenizer, gpt):
    with pytest.raises(ValueError, match="is the run of a tokenizer; a prior's is needed"):
        probe(tokenizer, console=QUIET)
    with pytest.raises(ValueError, match="a probe needs labels, and embedded:photos has none"):
        probe(gpt, "embedded:photos", console=QUIET)
    config = load_config("gpt", [*PRIOR, f"tokenizer={tokenizer}", "prior={type: pixelcnn, width: 8, depth: 1}"])
    with pytest.raises(ValueError, match="a PixelCNN has no features"):
        probe(train(config, tmp_path / "run", console=QUIET), console=QUIET)
