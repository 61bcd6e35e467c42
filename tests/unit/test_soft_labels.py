"""Codes drawn by their distance on their way from the tokenizer to the loss of a prior."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from helpers import QUIET, tiny_config, tiny_tokenizer, tokenizer_spec
from latticode import load
from latticode.core import registry
from latticode.core.types import CodeBatch
from latticode.engine import load_config, train
from latticode.engine.config import ConfigError, RunConfig
from latticode.engine.feed import open_feed
from latticode.engine.objectives import PriorObjective
from latticode.tokenizers.tokenizer import Tokenizer

STAGES = {"type": "residual", "stages": {"type": "vq", "size": 16, "dim": 3}, "depth": 2}
SHORT = ("steps=4", "batch_size=4", "log_every=2", "save_every=2", "picture_every=4", "data.workers=0")
WEIGHTS = "weights={mse: 1, l1: 0.2, commitment: 0.25}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_config(STAGES, WEIGHTS), tmp_path_factory.mktemp("stages"), console=QUIET)


def prior_config(tokenizer: Path, *overrides: str, soft: object = 0.01) -> RunConfig:
    spec = "prior={type: gpt, width: 16, depth: 1, heads: 2, inner_depth: 1, shared: true, "
    return load_config("gpt", [f"tokenizer={tokenizer}", f"{spec}soft_labels: {soft}}}", *SHORT, *overrides])


def test_a_tokenizer_draws_codes_of_images(tokenizer: Path) -> None:
    model = load(tokenizer)
    images = torch.rand(3, 1, 8, 8) * 2 - 1
    codes, p = model.soften(images, 1e-9)
    assert torch.equal(codes, model.encode(images))
    assert p.shape == (*codes.shape, 16)
    warm = model.soften(images, 1e6).p
    assert not warm.requires_grad
    torch.testing.assert_close(warm, torch.full_like(warm, 1 / 16), atol=1e-3, rtol=0)


def test_tokenizers_without_distances_are_refused(tmp_path: Path) -> None:
    plain: Tokenizer = registry.build(tokenizer_spec())
    with pytest.raises(ValueError, match="from those of vq, simvq or residual, not of FSQ"):
        plain.soften(torch.zeros(1, 1, 8, 8), 0.5)
    config = prior_config(tiny_tokenizer(tmp_path / "tokenizer"), "prior.shared=false")
    with pytest.raises(ValueError, match="not of FSQ"):
        train(config, tmp_path / "run", console=QUIET)
    top = {**tokenizer_spec(STAGES, 4), "encoder": {**tokenizer_spec(STAGES, 4)["encoder"], "multipliers": [1, 2]}}
    top["decoder"] = {**top["decoder"], "multipliers": [1, 2]}
    top["encoder"]["blocks"] = top["decoder"]["blocks"] = [0, 1]
    tower = registry.build({**tokenizer_spec(STAGES), "type": "hierarchical_tokenizer", "top": top})
    with pytest.raises(ValueError, match="codes of several grids cannot be drawn"):
        tower.soften(torch.zeros(1, 1, 8, 8), 0.5)


def test_every_look_draws_anew_and_names_what_from(tokenizer: Path, tmp_path: Path) -> None:
    console, cpu = Console(quiet=True), torch.device("cpu")
    feed = open_feed(prior_config(tokenizer), tmp_path / "a", cpu, console)
    looks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        looks.append(next(feed.batches(3)))
    assert not (tmp_path / "a" / "tokens").exists(), "nothing is kept: the next look is another"
    for batch in looks:
        assert batch.soft is not None
        assert batch.soft.shape == (*batch.codes.shape, 16)
        torch.testing.assert_close(batch.soft.sum(-1), torch.ones(batch.codes.shape))
        assert (batch.soft.gather(-1, batch.codes[..., None]) > 0).all()
    assert torch.equal(looks[0].codes, looks[1].codes)
    assert not torch.equal(looks[0].codes, looks[2].codes)
    hard = next(open_feed(prior_config(tokenizer, soft=0.0), tmp_path / "b", cpu, console).batches(3))
    assert hard.soft is None


def test_the_objective_hands_the_distributions_to_the_loss() -> None:
    prior = registry.build(
        {"type": "gpt", "vocab": [5, 4], "grid": [2], "width": 16, "depth": 1, "heads": 2, "soft_labels": 1.0}
    ).eval()
    codes = torch.randint(4, (3, 2, 2))
    soft = torch.rand(3, 2, 2, 5).softmax(-1) * (torch.arange(5) < torch.tensor([5, 4])[:, None])
    ((_, terms),) = PriorObjective().turns(prior, CodeBatch(codes, torch.full((3,), -1), soft=soft), 0)
    assert torch.equal(terms["cross_entropy"], prior.loss(codes, soft=soft)["cross_entropy"])
    assert not torch.equal(terms["cross_entropy"], prior.loss(codes)["cross_entropy"])


@pytest.mark.slow
def test_training_on_draws_resumes_exactly(tokenizer: Path, tmp_path: Path) -> None:
    whole = train(prior_config(tokenizer), tmp_path / "whole", console=QUIET)
    parts = train(prior_config(tokenizer, "steps=2"), tmp_path / "parts", console=QUIET)
    train(prior_config(tokenizer), parts, resume=True, console=QUIET)
    hard = train(prior_config(tokenizer, soft=0.0), tmp_path / "hard", console=QUIET)
    states = [load(run).state_dict() for run in (whole, parts, hard)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    assert any(not torch.equal(states[0][name], value) for name, value in states[2].items())


def test_the_temperature_is_no_ramp(tokenizer: Path, tmp_path: Path) -> None:
    config = prior_config(tokenizer, soft="{from: 0.5, to: 0.1}")
    with pytest.raises(ConfigError, match="soft_labels cannot be a ramp"):
        train(config, tmp_path / "run", console=QUIET)
