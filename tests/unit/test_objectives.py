"""Two players under one loop: who moves when, exact resuming, fine-tuning, and what is said when it goes wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers import FSQ_SPEC, QUIET, VQ_SPEC, tiny_config, tokenizer_spec
from latticode import load
from latticode.core.pretrained import read_spec, save_tensors
from latticode.core.registry import SpecError, build
from latticode.core.types import Batch
from latticode.engine import ConfigError, RunConfig, TrainingError, train
from latticode.engine.checkpoint import STATE
from latticode.engine.config import to_yaml
from latticode.engine.finetune import Parts
from latticode.engine.loop import Average
from latticode.engine.objectives import Adversarial, ReconstructionObjective
from latticode.losses.adversarial import ADVERSARIAL_LOSSES
from latticode.metrics.classifier import Classifier
from latticode.viz.report import write_report

DISCRIMINATOR = {"type": "patch_discriminator", "width": 4, "layers": 1, "groups": 2}
WEIGHTS = {"mse": 1, "l1": 0.2, "discriminator": 1, "r1": 1, "lecam": 0.1, "adversarial": 0.5}
TWO = {"r1_every": 2, "lecam": True}


def gan_config(*more: str, quantizer: dict[str, Any] = FSQ_SPEC, **adversarial: Any) -> RunConfig:
    spec = {"type": "adversarial", "discriminator": DISCRIMINATOR, **TWO, **adversarial}
    weights = WEIGHTS | ({"commitment": 0.25} if quantizer["type"] == "vq" else {})
    overrides = [f"objective.adversarial={json.dumps(spec)}", f"weights={json.dumps(weights)}"]
    return tiny_config(FSQ_SPEC, f"tokenizer={tokenizer_spec(quantizer)}", *overrides, *more)


def gan(folder: Path, *more: str, resume: bool = False, **settings: Any) -> Path:
    return train(gan_config(*more, **settings), folder, resume=resume, console=QUIET)


def state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / STATE)


def part(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in state(folder).items() if k.startswith(prefix)}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def moved(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(not torch.equal(a[k], b[k]) for k in a)


def logged(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


MODEL, DISCRIMINATOR_STATE = "module/model/", "module/objective/adversarial.discriminator."


@pytest.mark.slow
def test_until_the_discriminator_is_heard_the_tokenizer_trains_as_without(tmp_path) -> None:
    plain = train(tiny_config(), tmp_path / "plain", console=QUIET)
    later = gan(tmp_path / "later", start=9)
    warming = gan(tmp_path / "warming", start=1, warmup=9)
    heard = gan(tmp_path / "heard", start=1, warmup=2)
    assert same(part(later, MODEL), part(plain, MODEL))
    assert same(part(warming, MODEL), part(plain, MODEL))
    assert not same(part(heard, MODEL), part(plain, MODEL))
    assert not part(later, "optimizer/discriminator/")
    assert moved(part(warming, DISCRIMINATOR_STATE), part(later, DISCRIMINATOR_STATE))
    assert logged(later)[-2]["train/discriminator"] == logged(later)[-2]["train/adversarial"] == 0
    assert json.loads((heard / "run.json").read_text())["discriminator_from"] == 3
    assert [line["step"] for line in logged(heard) if "val/psnr" in line] == [3, 4]  # a look where it joins
    assert logged(heard)[-2].keys() >= {"train/adaptive_weight", "train/logits_real", "train/logits_fake"}


@pytest.mark.parametrize("quantizer", [FSQ_SPEC, VQ_SPEC], ids=["fsq", "vq"])
@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.slow
def test_interrupted_and_resumed_ends_with_the_same_two_players(tmp_path, monkeypatch, quantizer, stop) -> None:
    settings: dict[str, Any] = {"quantizer": quantizer, "start": 1, "warmup": 1, "ramp": 2}
    whole = gan(tmp_path / "whole", **settings)
    calls, turns = 0, ReconstructionObjective.turns

    def signalled(self, model, batch, step):
        nonlocal calls
        calls += 1
        if calls == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return turns(self, model, batch, step)

    monkeypatch.setattr(ReconstructionObjective, "turns", signalled)
    with pytest.raises(TrainingError, match=f"interrupted at step {stop} of 4, saved"):
        gan(tmp_path / "cut", **settings)
    monkeypatch.setattr(ReconstructionObjective, "turns", turns)
    torch.manual_seed(99)
    assert same(state(gan(tmp_path / "cut", resume=True, **settings)), state(whole))


@pytest.mark.slow
def test_two_ranks_equal_one_process_with_the_double_batch(tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text(to_yaml(gan_config(start=1)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    result = subprocess.run(
        [*launcher, "-m", "latticode.cli", "train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    one = gan(tmp_path / "one", "batch_size=8", start=1)
    ours, theirs = state(one), state(tmp_path / "two")
    for name, tensor in ours.items():
        if name.startswith("module/"):
            torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(tmp_path, precision) -> None:
    run = gan(tmp_path, f"precision={precision}", start=0)
    assert all(v.isfinite().all() for v in state(run).values())
    assert 0 < logged(run)[-2]["train/adaptive_weight"] < 1e4


@pytest.mark.parametrize("side", ["discriminator", "generator"])
def test_a_loss_of_either_player_that_is_not_finite_is_named_and_the_last_checkpoint_kept(
    tmp_path, monkeypatch, side
) -> None:
    calls, loss = 0, ADVERSARIAL_LOSSES["hinge"]

    def failing(*logits):
        nonlocal calls
        calls += 1
        return getattr(loss, side)(*logits) * (float("nan") if calls == 3 else 1)

    monkeypatch.setitem(ADVERSARIAL_LOSSES, "hinge", loss._replace(**{side: failing}))
    named = "adaptive_weight, adversarial, discriminator" if side == "discriminator" else "adaptive_weight, adversarial"
    with pytest.raises(TrainingError, match=f"loss term {named} was not finite at step 3;"):
        gan(tmp_path, start=0)
    assert all(v.isfinite().all() for v in state(tmp_path).values())
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


def objective_and_batch(**adversarial: Any) -> tuple[ReconstructionObjective, Any, Batch]:
    objective = ReconstructionObjective(["mse"], adversarial=Adversarial(build(DISCRIMINATOR), **adversarial))
    labels = torch.zeros(4, dtype=torch.int64)
    return objective, build(tokenizer_spec(FSQ_SPEC, 3)), Batch(torch.rand(4, 3, 16, 16), labels, labels)


def test_one_forward_is_shared_and_every_turn_moves_its_own_player() -> None:
    objective, model, batch = objective_and_batch(lecam=True)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    turns = objective.turns(model, batch, 0)
    player, terms = next(turns)
    assert player == "discriminator"
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert any(p.grad is not None for p in objective.parameters())
    player, terms = next(turns)
    assert (player, sorted(terms)) == ("tokenizer", ["adversarial", "mse"])
    terms["adversarial"].backward()
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert len(calls) == 1


def test_warm_up_and_ramp() -> None:
    objective, model, batch = objective_and_batch(start=2, warmup=3, ramp=4, adaptive=False)
    turns = [dict(objective.turns(model, batch, step)) for step in range(11)]
    values = [float(turn["tokenizer"]["adversarial"].detach()) for turn in turns]
    assert values[:5] == [0] * 5
    assert values[5:] == pytest.approx([values[-1] * share for share in (0.25, 0.5, 0.75, 1, 1, 1)])


def test_lazy_r1_is_the_same_on_average() -> None:
    objective, model, batch = objective_and_batch(start=1, r1_every=3)
    terms = [dict(objective.turns(model, batch, step))["discriminator"]["r1"] for step in range(1, 7)]
    assert [bool(t > 0) for t in terms] == [True, False, False] * 2
    every, *_ = objective_and_batch(r1_every=1)
    every.load_state_dict(objective.state_dict())
    always = dict(every.turns(model, batch, 0))["discriminator"]["r1"]
    torch.testing.assert_close(torch.stack(terms).mean(), always)


def test_the_adaptive_weight_follows_the_weights_of_the_recipe() -> None:
    objective, model, batch = objective_and_batch()
    noted = []
    for weight in (1.0, 3.0):
        objective.weights = {"mse": weight}
        dict(objective.turns(model, batch, 0))
        noted.append(objective.notes["adaptive_weight"])
    torch.testing.assert_close(noted[1], 3 * noted[0])


@pytest.mark.slow
def test_every_player_has_its_optimizer(tmp_path) -> None:
    config = gan_config("optimizers={discriminator: {lr: 1e-9, betas: [0.5, 0.9]}}")
    discriminator = config.optimizers["discriminator"]
    assert (discriminator.lr, discriminator.betas, discriminator.final) == (1e-9, (0.5, 0.9), config.optimizer.final)
    still = train(config, tmp_path / "still", console=QUIET)
    start = gan(tmp_path / "start", "steps=2", start=9)
    for name, tensor in part(start, DISCRIMINATOR_STATE).items():
        torch.testing.assert_close(part(still, DISCRIMINATOR_STATE)[name], tensor, rtol=0, atol=1e-7)
    assert not same(part(still, MODEL), part(start, MODEL))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizers={discriminator: {lrr: 1}}"], r"unknown key 'optimizers\.discriminator\.lrr'; nearest: lr"),
        (["optimizers={discriminator: {lr: 0}}"], r"optimizers\.discriminator\.lr: .*greater than 0, got 0"),
        (
            ["optimizers={discriminators: {lr: 1}}"],
            "optimizers: no player 'discriminators'; nearest: discriminator; valid: discriminator, tokenizer",
        ),
        (["weights={mse: 1, l1: 0.2, discriminator: 1, r1: 1, lecam: 1}"], "no weight for the loss terms adversarial"),
        (["objective.adversarial.r1_every=0"], "weights r1 name no loss term"),
        (["objective.adversarial.loss=wasserstein"], "unknown adversarial loss 'wasserstein'.*hinge, non_saturating"),
        (["objective.adversarial.start=-1"], "start must be >= 0 steps, got -1"),
        (["objective.adversarial.discriminator={type: patch}"], "unknown type 'patch'; nearest: .*patch_discriminator"),
        (["train_only=[decoder]"], "train_only freezes what is already trained: give init_from=RUN too"),
        (["init_from=nowhere"], r"init_from: nowhere holds no model\.safetensors"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_what_could(tmp_path, overrides, message) -> None:
    with pytest.raises((ConfigError, SpecError), match=message):
        gan(tmp_path, *overrides)


def test_a_decoder_without_a_last_layer_needs_a_fixed_weight(tmp_path) -> None:
    palette = ["tokenizer={type: palette, size: 4}", "objective.terms=[mse]"]
    weights = "weights={mse: 1, codebook: 1, commitment: 0, discriminator: 1, r1: 1, lecam: 1, adversarial: 1}"
    with pytest.raises(ValueError, match=r"has no last_layer, so give adversarial\.adaptive=false"):
        gan(tmp_path / "a", *palette, weights)
    gan(tmp_path / "b", *palette, weights, "objective.adversarial.adaptive=false", "steps=1")


def test_a_perceptual_distance_trains_and_is_named_but_not_saved(tmp_path) -> None:
    run = Classifier(3, 1, 4).save_pretrained(tmp_path / "classifier")
    more = [
        f"objective.perceptual={{type: features, run: {run}}}",
        f"weights={json.dumps(WEIGHTS | {'perceptual': 1})}",
    ]
    trained = gan(tmp_path / "run", *more, start=1)
    assert logged(trained)[-2]["train/perceptual"] > 0
    assert json.loads((trained / "run.json").read_text())["perceptual"].startswith(f"features of {run}, SHA-256 ")
    assert not [k for k in state(trained) if "perceptual" in k]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A run with a discriminator and a codebook that moves by running averages."""
    return gan(tmp_path_factory.mktemp("source") / "run", quantizer=VQ_SPEC, start=0)


@pytest.mark.slow
def test_fine_tuning_moves_what_it_is_told_to_and_nothing_else(tmp_path, source) -> None:
    frozen = gan(tmp_path / "a", f"init_from={source}", "train_only=[decoder, post_quant_conv]", quantizer=VQ_SPEC)
    ours, theirs = load(frozen).state_dict(), load(source).state_dict()
    for name, tensor in ours.items():
        tuned = name.startswith(("decoder.", "post_quant_conv."))
        assert torch.equal(tensor, theirs[name]) != tuned, name
    free = gan(tmp_path / "b", f"init_from={source}", quantizer=VQ_SPEC)
    assert not torch.equal(
        load(free).quantizer.vectors(), load(source).quantizer.vectors()
    )  # else frozen proves nothing
    assert logged(free)[0].keys() == {"step", "val/psnr"}  # what it starts from is looked at
    assert logged(free)[0]["step"] == 0


def test_frozen_parts_stay_frozen_after_a_look() -> None:
    model = build(tokenizer_spec(VQ_SPEC))
    parts = Parts(model, ["decoder.conv_out"])
    parts.train()
    expected = {name for name, module in model.named_modules() if module.training}
    assert expected == {"", "decoder", "decoder.conv_out"}
    with Average(model, 0.9).applied():
        assert not any(module.training for module in model.modules())
    assert {name for name, module in model.named_modules() if module.training} == expected
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "decoder.conv_out.weight",
        "decoder.conv_out.bias",
    }


def test_what_fine_tuning_refuses(tmp_path, source) -> None:
    with pytest.raises(
        ConfigError, match=r"train_only: no parameters under 'decoer'; nearest: decoder, .*valid: decoder, encoder, "
    ):
        gan(tmp_path / "a", f"init_from={source}", "train_only=[decoer]", quantizer=VQ_SPEC)
    with pytest.raises(ConfigError, match=r"holds another model: quantizer\.size: 16 there, 8 now$"):
        gan(tmp_path / "b", f"init_from={source}", quantizer=VQ_SPEC | {"size": 8})
    with pytest.raises(ValueError, match=r"has a frozen last layer, so give adversarial\.adaptive=false"):
        gan(tmp_path / "c", f"init_from={source}", "train_only=[encoder]", quantizer=VQ_SPEC)


@pytest.mark.slow
def test_a_saved_spec_that_leaves_defaults_out_is_the_same_model(tmp_path, source) -> None:
    spec = read_spec(source)
    del spec["quantizer"]["restart"]
    old = tmp_path / "old"
    save_tensors(old / "model.safetensors", load(source).state_dict(), {"schema": 1, "spec": spec})
    gan(tmp_path / "run", f"init_from={old}", "steps=1", quantizer=VQ_SPEC)


@pytest.mark.slow
def test_a_gan_goes_on_with_its_discriminator(tmp_path, source) -> None:
    start = f"init_from={source}"
    before = part(source, DISCRIMINATOR_STATE)
    waiting = gan(tmp_path / "a", start, "steps=1", quantizer=VQ_SPEC, start=9)
    assert same(part(waiting, DISCRIMINATOR_STATE), before)
    fresh = gan(
        tmp_path / "b", start, "steps=1", quantizer=VQ_SPEC, start=9, discriminator=DISCRIMINATOR | {"width": 6}
    )
    assert part(fresh, DISCRIMINATOR_STATE).keys() == before.keys()
    saved = load(source).save_pretrained(tmp_path / "saved")  # a model without a run has no discriminator
    again = gan(tmp_path / "c", f"init_from={saved}", "steps=1", quantizer=VQ_SPEC, start=9)
    assert not same(part(again, DISCRIMINATOR_STATE), before)


@pytest.mark.slow
def test_a_fine_tuned_run_resumes_without_its_source(tmp_path, monkeypatch, source) -> None:
    more = [f"init_from={source}", "train_only=[decoder]", "optimizer.schedule=constant"]
    whole = gan(tmp_path / "whole", *more, quantizer=VQ_SPEC)
    cut = gan(tmp_path / "cut", *more, "steps=2", quantizer=VQ_SPEC)
    monkeypatch.setattr("latticode.engine.loop.start_from", None)
    assert same(state(gan(cut, *more, resume=True, quantizer=VQ_SPEC)), state(whole))


@pytest.mark.parametrize(
    ("looks", "said"),
    [
        (
            {500: 24.0, 1000: 25.5, 2000: 25.25},
            "0.25 dB worse than before the discriminator moved the tokenizer (from step 1,000",
        ),
        ({900: 24.0, 2000: 25.25}, "1.25 dB better than before .*: 24.00 dB at step 900, 25.25 dB at step 2,000"),
        ({1500: 24.0, 2000: 25.25}, "is not known from before step 1,000"),
        ({500: 24.0, 1000: 25.5}, None),
    ],
)
def test_the_report_says_what_the_discriminator_did_to_reconstructions(tmp_path, looks, said) -> None:
    (tmp_path / "run.json").write_text('{"discriminator_from": 1000}')
    lines = [json.dumps({"step": step, "val/psnr": value}) + "\n" for step, value in looks.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    page = write_report(tmp_path).read_text()
    if said is None:
        assert "Since the discriminator joined" not in page
    else:
        first, _, rest = said.partition(".*")
        assert first in page
        assert rest in page
