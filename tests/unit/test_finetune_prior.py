"""A prior fine-tuned to classify: one shared loss in two turns, what is told and what is not, and where it ends up."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers import FSQ_SPEC, QUIET, tiny_config
from latticode.core.registry import SpecError
from latticode.core.types import CodeBatch
from latticode.engine import load_config, train
from latticode.engine.checkpoint import STATE
from latticode.engine.objectives import PriorClassificationObjective
from latticode.priors import GPT
from latticode.runs.evaluate import EvaluationRequest, evaluate

SMALL = ["data.workers=0", "batch_size=16", "save_every=20", "picture_every=20", "log_every=20", "steps=20", "ema=0"]
PRIOR = "prior={type: gpt, width: 16, depth: 1, heads: 2, classes: 0}"
JOINT = [
    "objective={type: prior_classification, width: 16}",
    "weights={cross_entropy: 1, classification: 1, head: 1}",
    "optimizer={lr: 1e-2, warmup: 1, schedule: constant}",
]


def small(classes: int = 0) -> tuple[PriorClassificationObjective, GPT, CodeBatch]:
    torch.manual_seed(0)
    prior = GPT([5], [2, 3], classes=classes, width=8, depth=2, heads=2, dropout=0.0, label_dropout=0.0)
    batch = CodeBatch(torch.randint(5, (6, 2, 3, 1)), torch.tensor([0, 1, 2, 0, -1, 1]))
    return PriorClassificationObjective(classes=3, width=8), prior, batch


def gradients(module: torch.nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]


def test_two_turns_are_one_shared_loss():
    objective, prior, batch = small()
    both = torch.nn.ModuleList([copy.deepcopy(objective), copy.deepcopy(prior)])
    ours, theirs = cast(Any, both)
    terms = next(ours.turns(theirs, batch, 0))[1]
    sum(terms.values(), torch.zeros(())).backward()
    players = objective.players(prior)
    assert list(players) == ["prior", "head"]
    for player, turn in objective.turns(prior, batch, 0):
        loss = torch.stack(list(turn.values())).sum()
        loss.backward(inputs=list(players[player].parameters()))
        with torch.no_grad():  # the engine steps between the turns
            for parameter in prior.parameters():
                parameter.add_(1.0)
    for a, b in ((objective, ours), (prior, theirs)):
        torch.testing.assert_close(gradients(a), gradients(b))
    assert all(g.any() for g in gradients(objective))


def test_no_label_reaches_what_classifies():
    objective, prior, batch = small(classes=3)
    other = CodeBatch(batch.codes, batch.labels.roll(1))
    objective.scores(prior, other)
    terms = [dict(objective.turns(prior, b, 0))["prior"] for b in (batch, other)]
    assert terms[0]["cross_entropy"] != terms[1]["cross_entropy"], "the generator is told"
    logits = objective.classify(prior, batch.codes)
    nats = -logits.log_softmax(1)
    for term, labels in zip(terms, (batch.labels, other.labels), strict=True):
        known = labels >= 0
        expected = nats[known].gather(1, labels[known][:, None]).mean()
        torch.testing.assert_close(term["classification"], expected)


def test_images_without_labels_train_the_prior_alone():
    objective, prior, batch = small()
    terms = dict(objective.turns(prior, CodeBatch(batch.codes, torch.full((6,), -1)), 0))
    assert terms["prior"]["classification"] == terms["head"]["head"] == 0
    assert terms["prior"]["cross_entropy"] > 0
    assert objective.scores(prior, CodeBatch(batch.codes, torch.full((6,), -1))) == {}


def test_what_does_not_fit():
    _, prior, _ = small()
    with pytest.raises(SpecError, match=r"objective\.width must be the prior's, 8, got 4"):
        PriorClassificationObjective(3, 4).players(prior)
    with pytest.raises(SpecError, match="classes must be >= 2 to tell apart, got 0"):
        PriorClassificationObjective(0, 8)


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A palette, a GPT over it, and the same fine-tuned."""
    folder = tmp_path_factory.mktemp("runs")
    palette = ["tokenizer={type: palette, size: 4}", "objective.terms=[mse]", "steps=1", "data.size=4"]
    config = tiny_config(FSQ_SPEC, *palette, "weights={mse: 1, codebook: 1, commitment: 0}")
    tokenizer = train(config, folder / "tokenizer", console=QUIET)
    prior = train(load_config("gpt", [*SMALL, PRIOR, f"tokenizer={tokenizer}"]), folder / "gpt", console=QUIET)
    more = [*SMALL, PRIOR, *JOINT, f"tokenizer={tokenizer}", f"init_from={prior}"]
    return tokenizer, prior, train(load_config("gpt", more), folder / "tuned", console=QUIET)


@pytest.mark.slow
def test_held_out_accuracy_is_logged_and_evaluated(runs_of):
    _, prior, tuned = runs_of
    logged = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    looks = {line["step"]: line["val/accuracy"] for line in logged if "val/accuracy" in line}
    assert list(looks) == [0, 20]
    assert logged[-2]["train/classification"] == pytest.approx(logged[-2]["train/head"])
    whole = evaluate(tuned, EvaluationRequest(samples=4), console=QUIET)
    assert json.loads((tuned / "evaluation.json").read_text())["accuracy"] == whole["accuracy"]
    few = evaluate(tuned, EvaluationRequest(samples=4, limit=16), console=QUIET)
    assert few["accuracy"] == pytest.approx(looks[20]), "the log is of the first 16 held-out images"
    assert "accuracy" not in evaluate(prior, EvaluationRequest(samples=4), console=QUIET)


@pytest.mark.slow
def test_the_head_resumes_with_the_prior(runs_of, tmp_path):
    tokenizer, prior, tuned = runs_of
    more = [*SMALL, PRIOR, *JOINT, f"tokenizer={tokenizer}", f"init_from={prior}"]
    train(load_config("gpt", [*more, "steps=7"]), tmp_path / "cut", console=QUIET)
    train(load_config("gpt", more), tmp_path / "cut", resume=True, console=QUIET)
    whole, cut = (load_file(run / STATE) for run in (tuned, tmp_path / "cut"))
    assert any(key.startswith("module/objective/head") for key in whole)
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
