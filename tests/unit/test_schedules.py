"""Ramps: their values, what they move, exact resuming, and what is said of a wrong one."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import FSQ_SPEC, QUIET, tiny_config, tokenizer_spec
from latticode import load
from latticode.engine import ConfigError, RunConfig, TrainingError, train
from latticode.engine.checkpoint import STATE
from latticode.engine.objectives import ReconstructionObjective
from latticode.engine.schedules import Ramp

KL = {"from": 0, "to": 0.5, "steps": 2}
TEMPERATURE = {"from": 1, "to": 0.25, "shape": "cosine"}  # over the whole run, of four steps
COOLED = [1, 0.625 + 0.375 * 0.5**0.5, 0.625, 0.625 - 0.375 * 0.5**0.5]


def gumbel(temperature: Any) -> dict[str, Any]:
    return {"type": "gumbel", "size": 8, "dim": 3, "temperature": temperature}


def config(*more: str, quantizer: dict[str, Any] | None = None, kl: Any = KL) -> RunConfig:
    spec, weights = tokenizer_spec(quantizer or gumbel(TEMPERATURE)), {"mse": 1, "l1": 0.2, "kl": kl}
    return tiny_config(
        FSQ_SPEC, f"tokenizer={json.dumps(spec)}", f"weights={json.dumps(weights)}", "log_every=1", *more
    )


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / STATE)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_values() -> None:
    line, wave = (Ramp.model_validate({"from": 1, "to": 0.25, "steps": 80, "shape": s}) for s in ("linear", "cosine"))
    assert [line.at(step, 1) for step in (0, 40, 80, 10**6)] == [1, 0.625, 0.25, 0.25]
    assert [wave.at(step, 1) for step in (0, 20, 40, 60)] == pytest.approx(COOLED)
    assert wave.at(0, 1) == 1
    assert wave.at(80, 1) == wave.at(81, 1) == 0.25
    assert [Ramp.model_validate({"from": 0, "to": 6.6}).at(step, 200) for step in (0, 100, 200)] == [0, 3.3, 6.6]


@pytest.mark.slow
def test_every_step_has_its_values_and_logs_them(tmp_path, monkeypatch) -> None:
    seen, turns = [], ReconstructionObjective.turns

    def watched(self, model, batch, step):
        seen.append((self.weights["kl"], model.quantizer.temperature))
        return turns(self, model, batch, step)

    monkeypatch.setattr(ReconstructionObjective, "turns", watched)
    run = train(config(), tmp_path, console=QUIET)
    assert [kl for kl, _ in seen] == [0, 0.25, 0.5, 0.5]
    assert [temperature for _, temperature in seen] == pytest.approx(COOLED)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [(line["weights.kl"], line["tokenizer.quantizer.temperature"]) for line in lines if "lr" in line]
    assert logged == seen
    assert load(run).quantizer.temperature == seen[-1][1]


@pytest.mark.slow
def test_the_loss_is_weighed_by_them(tmp_path) -> None:
    moved, off = (train(config(kl=kl), tmp_path / str(i), console=QUIET) for i, kl in enumerate((KL, 0)))
    early = [train(config("steps=1", kl=kl), tmp_path / f"early{i}", console=QUIET) for i, kl in enumerate((KL, 0))]
    assert same(state(early[0]), state(early[1]))
    assert not same(state(moved), state(off))


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.slow
def test_interrupted_and_resumed_ends_with_the_same_weights(tmp_path, monkeypatch, stop) -> None:
    whole = train(config(), tmp_path / "whole", console=QUIET)
    calls, turns = 0, ReconstructionObjective.turns

    def signalled(self, model, batch, step):
        nonlocal calls
        calls += 1
        if calls == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return turns(self, model, batch, step)

    monkeypatch.setattr(ReconstructionObjective, "turns", signalled)
    with pytest.raises(TrainingError, match=f"interrupted at step {stop} of 4, saved"):
        train(config(), tmp_path / "cut", console=QUIET)
    monkeypatch.setattr(ReconstructionObjective, "turns", turns)
    cut = train(config(), tmp_path / "cut", resume=True, console=QUIET)
    assert same(state(cut), state(whole))
    assert load(cut).quantizer.temperature == load(whole).quantizer.temperature


@pytest.mark.slow
def test_fine_tuning_goes_on_wherever_the_source_left_a_ramp(tmp_path) -> None:
    source = train(config(), tmp_path / "source", console=QUIET)
    train(config(f"init_from={source}", "steps=1"), tmp_path / "again", console=QUIET)
    with pytest.raises(ConfigError, match=r"holds another model: quantizer\.temperature: 0\.35.* there, 1\.0 now$"):
        train(config(f"init_from={source}", quantizer=gumbel(1.0)), tmp_path / "other", console=QUIET)


def test_a_ramp_in_a_stage(tmp_path) -> None:
    stages = [{"type": "lfq", "dim": 3, "temperature": t} for t in (1.0, {"from": 1, "to": 0.5})]
    weights = "weights={mse: 1, l1: 0.2, commitment: 0.25, sample_entropy: 0.1, diversity: 0.1}"
    run = train(config(weights, quantizer={"type": "residual", "stages": stages}), tmp_path, console=QUIET)
    assert [stage.temperature for stage in load(run).quantizer.stages] == [1.0, 0.625]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["weights.kl={from: 0}"], r"missing key 'weights\.kl\.to'"),
        (["weights.kl={}"], r"missing key 'weights\.kl\.from'\nmissing key 'weights\.kl\.to'"),
        (["weights.kl={from: 0, to: 1, step: 2}"], r"unknown key 'weights\.kl\.step'; nearest: steps.*; valid: from, "),
        (["weights.kl={from: 0, to: 1, steps: 0}"], r"weights\.kl\.steps: .*greater than 0, got 0"),
        (["weights.kl={from: 0, to: much}"], r"weights\.kl\.to: .*number.*, got 'much'"),
        (["weights.kl={from: 0, to: .inf}"], r"weights\.kl\.to: .*finite number, got inf"),
        (["weights.kl={from: 0, to: 1, shape: sine}"], r"weights\.kl\.shape: .*'linear' or 'cosine', got 'sine'"),
        (["weights.kl=much"], r"^weights\.kl: .*number.*, got 'much'$"),
        (["weights.k={from: 0, to: 1}"], "weights k name no loss term"),
        (["tokenizer.quantizer.temperature={to: 1}"], r"missing key 'tokenizer\.quantizer\.temperature\.from'"),
        (["tokenizer.quantizer.temperature.to=0"], r"temperature must be > 0, got 0\.0"),
        (
            ["tokenizer.quantizer.temprature={from: 1, to: 2}"],
            r"tokenizer\.quantizer\.temprature cannot be a ramp; nearest: temperature; valid: temperature",
        ),
        (["tokenizer.quantizer.size={from: 8, to: 9}"], r"quantizer\.size cannot be a ramp; valid: temperature"),
        (["tokenizer.quantizer={from: 8, to: 9}"], r"tokenizer\.quantizer cannot be a ramp; valid: gain"),
        (["objective.perceptual={from: 1, to: 2}"], r"objective\.perceptual cannot be a ramp; valid: none"),
        (
            ["tokenizer.quantizer={type: stochastic_vq, size: 8, dim: 3, variance: {from: 1, to: 2}}"],
            r"tokenizer\.quantizer\.variance cannot be a ramp: it settles how a model is built, and is not read later",
        ),
        (
            [
                "tokenizer.encoder={type: vit_encoder, patch: 4, side: 2, width: 4, heads: 1, depth: 1, latent: 4, "
                "mlp: {from: 1, to: 2}}"
            ],
            r"tokenizer\.encoder\.mlp, tokenizer\.quantizer\.temperature cannot be a ramp: it settles",
        ),
    ],
)
def test_a_wrong_ramp_is_refused_with_what_would_be_right(tmp_path, overrides, message) -> None:
    with pytest.raises(ValueError, match=message):
        train(config(*overrides), tmp_path, console=QUIET)
