"""UViM: a code of a fixed length that guides a base model, its dropout, a second stage that never sees the label."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import QUIET
from kinds import EYE, FSQ, ONE_CODE, SIZES, VQ, Kinds, both, examples, guide, latents_of, relabelled, uvim
from latticode import load
from latticode.core import registry
from latticode.core.types import Batch, CodeBatch, Conditioning, Sampling
from latticode.dense.uvim import DROPOUTS, UViM, passing, resized
from latticode.engine import ConfigError, load_config, train
from latticode.engine.feed import _encoding
from latticode.engine.objectives import GuidedObjective, PriorObjective
from latticode.priors import Guide
from latticode.priors.base import draw, filtered, uniforms
from zoo import SPECS


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.TABLE, "kinds", Kinds)


def test_one_code_quantizers_are_all_here():
    names = {n for n, entry in registry.TABLE.items() if str(entry).startswith("latticode.quantizers.")}
    assert names == ONE_CODE.keys() | {spec["type"] for spec in SPECS.values()}
    assert {"fsq", "vq", "simvq", "lfq", "bsq", "gumbel", "stochastic_vq", "projected"} <= ONE_CODE.keys()


@pytest.mark.parametrize("quantizer", ONE_CODE.values(), ids=ONE_CODE)
@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
def test_the_code_has_its_length_whatever_the_size(quantizer: dict[str, Any], size: tuple[int, int]):
    model, inputs = uvim(quantizer), examples(3, *size)
    codes = model.encode(inputs)
    assert codes.shape == (3, 2, 3, 1)
    assert codes.shape[1:3] == model.grid(size)
    assert int(codes.min()) >= 0
    assert int(codes.max()) < model.vocab[0]
    result = model(inputs)
    assert torch.equal(result.codes, codes)
    assert result.output.shape == (3, 4, *size)
    torch.testing.assert_close(model.solve(model.image(inputs), codes), result.output)
    assert model.bits == pytest.approx(math.log2(model.vocab[0]))


@pytest.mark.parametrize(
    "spec", [{"type": "residual", "stages": VQ, "depth": 2}, {"type": "grouped", "quantizers": FSQ, "groups": 2}]
)
def test_several_codes_of_a_position_fit_too(spec: dict[str, Any]):
    model, inputs = uvim(spec), examples(2)
    assert model.encode(inputs).shape == (2, 2, 3, 2)
    assert guide(model, image_dropout=0.1).sample(2).shape == (2, 2, 3, 2)


@both
@pytest.mark.parametrize("dropout", DROPOUTS)
def test_dropped_codes_are_zero_vectors(quantizer: dict[str, Any], dropout: str):
    model, inputs = uvim(quantizer, dropout=dropout).train(), examples(6)
    torch.manual_seed(3)
    keep = passing(6, [2, 3], dropout)
    torch.manual_seed(3)
    latents = latents_of(model, lambda: model(inputs))
    if dropout == "all":
        assert not latents.any()
        return
    assert not latents[~keep].any()
    assert latents[keep].any(-1).all() or quantizer is FSQ  # whose middle code is the zero vector
    assert keep.all() if dropout == "none" else not keep.all()
    assert latents_of(model.eval(), lambda: model(inputs)).any(-1).float().mean() > 0.8, (
        "none is dropped after training"
    )


def test_a_missing_code_is_a_dropped_code():
    model, inputs = uvim(dropout="none"), examples(2)
    assert not latents_of(model, lambda: model.solve(model.image(inputs))).any()
    unguided = uvim(dropout="all")
    unguided.load_state_dict(model.state_dict())
    floor = model.solve(model.image(inputs), None)
    assert torch.equal(unguided(inputs).output, floor)
    assert torch.equal(unguided.solve(model.image(inputs), model.encode(inputs)), floor)
    assert not torch.equal(model(inputs).output, floor)


def test_prefixes_keep_the_order_and_random_sets_do_not():
    prefix, random = (passing(4000, [3, 4], mode).flatten(1) for mode in ("prefix", "random"))
    assert (prefix[:, 1:] <= prefix[:, :-1]).all()
    assert not (random[:, 1:] <= random[:, :-1]).all()
    for kept in (prefix, random):  # importance 1 - k / 13 > t with t uniform: 0 to 12 of 12 codes, each as often
        share = kept.sum(1).bincount(minlength=13) / 4000
        torch.testing.assert_close(share, torch.full((13,), 1 / 13), atol=0.02, rtol=0)
    torch.testing.assert_close(random.float().mean(0), torch.full((12,), 0.5), atol=0.03, rtol=0)
    torch.testing.assert_close(prefix.float().mean(0), torch.linspace(1, 0, 14)[1:-1], atol=0.03, rtol=0)
    assert passing(4000, [1, 1], "random").float().mean().item() == pytest.approx(0.5, abs=0.03)


def test_training_sees_the_full_code_and_none():
    """The ceiling and the floor that are reported, `solve` with all codes and with none."""
    for code in ([1, 1], [2, 3], [4, 4]):
        kept = passing(2000, code, "random").flatten(1)
        assert kept.all(1).any()
        assert not kept.any(1).all()


@both
def test_results_do_not_depend_on_the_batch(quantizer: dict[str, Any]):
    model, inputs = uvim(quantizer), examples(5)
    prior, image = guide(model), model.image(inputs)
    codes, output = model.encode(inputs), model.solve(image, model.encode(inputs))
    greedy = prior.sample(5, Conditioning(images=image), sampling=Sampling(temperature=0.0))
    for i in range(5):
        assert torch.equal(model.encode(inputs[i : i + 1])[0], codes[i])
        torch.testing.assert_close(model.solve(image[i : i + 1], codes[i : i + 1])[0], output[i])
        alone = prior.sample(1, Conditioning(images=image[i : i + 1]), sampling=Sampling(temperature=0.0))
        assert torch.equal(alone[0], greedy[i])
    assert len(codes.unique()) > 3
    assert len(greedy.unique(dim=0)) > 1


def test_switches_of_the_context_are_what_they_say():
    inputs, other = examples(3), torch.cat([examples(3, seed=1)[:, :3], examples(3)[:, 3:]], 1)
    seeing, blind = uvim(), uvim(oracle_context=False, base_context=False)
    assert not torch.equal(seeing.encode(inputs), seeing.encode(other))
    assert torch.equal(blind.encode(inputs), blind.encode(other))
    assert not torch.equal(blind.encode(inputs), blind.encode(relabelled(inputs)))
    codes = seeing.encode(inputs)
    images = seeing.image(inputs), seeing.image(other)
    assert not torch.equal(*(seeing.solve(image, codes) for image in images))
    assert torch.equal(*(blind.solve(image, codes) for image in images))


def test_the_first_output_is_zero_and_latents_are_standardised_for_free_codes_only():
    for quantizer in (FSQ, VQ):
        spec = {"type": "uvim", "task": {"type": "kinds"}, "quantizer": quantizer, **SIZES}
        fresh, inputs = registry.build(spec), examples()
        assert not fresh(inputs).output.any()
        latents = fresh._written(inputs)
        spread = latents.var(-1, unbiased=False)
        assert torch.allclose(spread, torch.ones(()), atol=1e-2) == (quantizer is VQ)


@pytest.mark.parametrize("new", [(4, 4), (16, 3), (8, 8), (1, 11), (7, 20)])
def test_resizing_is_linear_interpolation(new: tuple[int, int]):
    x = torch.randn(2, 8, 8, 5)
    expected = F.interpolate(x.movedim(-1, 1), size=new, mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(resized(x, new), expected.movedim(1, -1))


@both
def test_a_spec_and_a_state_rebuild_the_model(tmp_path: Path, quantizer: dict[str, Any]):
    model, inputs = uvim(quantizer, dropout="prefix", base_context=False), examples()
    again = UViM.from_pretrained(model.save_pretrained(tmp_path))
    assert registry.spec_of(again) == registry.spec_of(model)
    assert again.fingerprint() == model.fingerprint()
    assert torch.equal(again(inputs).output, model(inputs).output)
    assert json.loads((tmp_path / "config.json").read_text())["dropout"] == "prefix"


@pytest.mark.parametrize(
    "task",
    [
        {"type": "kinds"},
        {"type": "depth", "scale": 1, "bins": 8},
        {"type": "panoptic", "categories": 4, "things": [1], "instances": 3, "void": 4},
        {"type": "colorization"},
    ],
    ids=lambda task: task["type"],
)
def test_the_second_stage_never_sees_the_label(task: dict[str, Any]):
    """Whatever the label is, the codes, bits and predictions that are made from the image are the same."""
    model = uvim(task=task)
    inputs = examples()
    if task["type"] == "panoptic":
        inputs = torch.cat([inputs, inputs[:, 3:]], 1)
    if task["type"] == "colorization":
        inputs = inputs[:, :3]  # the label is the photograph: here another one of the same grey
        red, green, blue = inputs.split(1, 1)
        other = ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).expand(-1, 3, -1, -1)
    else:
        other = torch.cat([inputs[:, :3], (inputs[:, 3:] + 1) % 5], 1)
    assert not torch.equal(model.encode(inputs), model.encode(other)), "the oracle does"

    class Fixed:
        def __init__(self, inputs: Tensor):
            self.inputs = inputs

        def batches(self, start: int) -> Any:
            yield Batch(self.inputs, torch.full((4,), -1), torch.arange(4))

    one, two = (next(_encoding(cast(Any, Fixed(x)), model, torch.device("cpu"), 0.0)(0)) for x in (inputs, other))
    assert one.images is not None
    assert two.images is not None
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.codes, model.encode(inputs))
    prior = guide(model)
    codes = [prior.sample(4, Conditioning(images=batch.images), seed=2) for batch in (one, two)]
    assert torch.equal(*codes)
    assert torch.equal(
        prior.bits(one.codes, Conditioning(images=one.images)), prior.bits(one.codes, Conditioning(images=two.images))
    )
    assert torch.equal(model.solve(one.images, codes[0]), model.solve(two.images, codes[1]))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("inner_depth", [0, 1])
def test_cached_decoding_is_decoding_without_a_cache(temperature: float, inner_depth: int):
    model = uvim()
    prior, images, sampling = (
        guide(model, inner_depth=inner_depth),
        model.image(examples(3)),
        Sampling(temperature=temperature),
    )
    codes = prior.sample(3, Conditioning(images=images), sampling=sampling, seed=5)
    u, plain = uniforms((6, 1), 5, 0, 3), torch.zeros(3, 6, 1, dtype=torch.int64)
    condition = prior.check_condition(Conditioning(images=images), 3)
    states, none = prior.states(condition), torch.full((3,), -1)
    with torch.no_grad():
        for n in range(6):
            (logits,) = prior.logits(plain, none, states)
            plain[:, n, 0] = draw(filtered(logits[:, n], sampling), u[:, n, 0])
    assert torch.equal(codes.view(3, 6, 1), plain)
    assert len(codes.unique()) > 3 or temperature == 0


def test_guidance_leads_away_from_the_blind_guess():
    model = uvim()
    prior, images = guide(model, image_dropout=0.2), model.image(examples(8))
    cond = Conditioning(images=images)
    plain, led = (prior.sample(8, cond, sampling=Sampling(guidance=w), seed=1) for w in (0.0, 6.0))
    gains = [(prior.bits(codes) - prior.bits(codes, cond)).mean() for codes in (plain, led)]
    assert gains[1] > gains[0]
    assert torch.equal(prior.sample(8, seed=1), prior.sample(8, sampling=Sampling(guidance=6.0), seed=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :3], r"\(B, 4, H, W\), RGB and 1 label maps, got \(4, 3, 16, 16\) int32"),
        (lambda x: x.float(), r"expected integer examples .* got \(4, 4, 16, 16\) float32"),
        (lambda x: x[0], r"got \(4, 16, 16\) int32"),
        (lambda x: x[..., :14], r"multiples of the patch of 4, got \(16, 14\)"),
        (lambda x: x[..., :0], r"multiples of the patch of 4, got \(16, 0\)"),
    ],
    ids=["channels", "dtype", "axes", "size", "empty"],
)
def test_bad_examples_are_refused_with_their_values(change: Any, message: str):
    model = uvim()
    for method in (model, model.encode, model.image):
        with pytest.raises(ValueError, match=message):
            method(change(examples()))


def test_bad_arguments_are_refused_with_their_values():
    model = uvim()
    image, codes = model.image(examples(2)), model.encode(examples(2))
    for wrong, message in (
        ((image[:, :1], codes), r"float image \(B, 3, H, W\), got \(2, 1, 16, 16\) float32"),
        ((image.int(), codes), r"got \(2, 3, 16, 16\) int32"),
        ((image[..., :15], codes), r"multiples of the patch of 4, got \(16, 15\)"),
        ((image, codes[:1]), r"expected codes \(2, 2, 3, 1\) for images \(2, 3, 16, 16\), got \(1, 2, 3, 1\) int64"),
        ((image, codes + 45), "codes must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            model.solve(*wrong)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"code": [2]}, r"code must be two numbers >= 1, .* got \[2\]"),
        ({"code": [0, 2]}, r"got \[0, 2\]"),
        ({"patch": 0}, "patch must be >= 1 pixel, got 0"),
        ({"dropout": "some"}, "dropout must be one of random, prefix, none, all, got 'some'"),
    ]
    for changes, message in refused:
        with pytest.raises(ValueError, match=message):
            uvim(**changes)


def test_a_guide_refuses_what_it_cannot_see():
    model = uvim()
    prior, codes, images = guide(model), model.encode(examples(2)), model.image(examples(2))
    with pytest.raises(ValueError, match="needs an image for each of 2 codes: image_dropout is 0"):
        prior.loss(codes)
    for wrong, message in (
        (images[:1], r"float images \(2, 3, H, W\), one for each code, got \(1, 3, 16, 16\) float32"),
        (images[:, :1], r"got \(2, 1, 16, 16\)"),
        (images.int(), r"got \(2, 3, 16, 16\) int32"),
        (images[0], r"got \(3, 16, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            prior.bits(codes, Conditioning(images=wrong))
    with pytest.raises(ValueError, match="3 channels, got in_channels=4"):
        guide(model, encoder={**EYE, "in_channels": 4})
    with pytest.raises(ValueError, match=r"image_dropout must be in \[0, 1\), got 1"):
        guide(model, image_dropout=1)
    blind = registry.build({"type": "gpt", "vocab": model.vocab, "grid": [2, 3], "width": 16, "depth": 1, "heads": 2})
    with pytest.raises(ValueError, match=r"GPT sees no images, got \(2, 3, 16, 16\)"):
        blind.bits(codes, Conditioning(images=images))


@both
def test_the_objectives_are_the_losses_of_task_and_quantizer_and_of_the_code(quantizer: dict[str, Any]):
    model, inputs = uvim(quantizer, dropout="none").train(), examples()
    batch = Batch(inputs, torch.full((4,), -1), torch.arange(4))
    ((player, terms),) = GuidedObjective().turns(model, batch, 0)
    assert player == "tokenizer"
    assert terms.keys() == {"kinds"} | ({"commitment"} if quantizer is VQ else set())
    terms["kinds"].backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == [], "the oracle learns by the base model's loss alone"
    model.eval()
    torch.testing.assert_close(model.task.losses(model(inputs).output, inputs)["kinds"], terms["kinds"], atol=1, rtol=1)
    prior = guide(model)
    codes = CodeBatch(model.encode(inputs), batch.labels, images=model.image(inputs))
    ((player, terms),) = PriorObjective().turns(prior, codes, 0)
    assert player == "prior"
    bits = prior.bits(codes.codes, Conditioning(images=codes.images)).mean() / 6
    torch.testing.assert_close(terms["cross_entropy"] / math.log(2), bits)


def config(folder: Path, *more: str) -> Any:
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "data: {source: 'embedded:shapes', kind: dense, maps: [sem.png], size: 16, workers: 0}\n"
        "objective: {type: guided}\nweights: {kinds: 1}\n"
        "steps: 4\nbatch_size: 4\nlog_every: 2\nsave_every: 2\npicture_every: 4\noptimizer: {warmup: 0, lr: 0.003}\n"
    )
    return load_config(str(recipe), more)


def stage_one(quantizer: dict[str, Any], **changes: Any) -> str:
    spec = {"type": "uvim", "task": {"type": "kinds"}, "quantizer": quantizer, **SIZES, **changes}
    return f"tokenizer={json.dumps(spec)}"


@pytest.mark.slow
@both
def test_both_stages_train_on_one_loop(tmp_path: Path, quantizer: dict[str, Any]):
    """A user's task, from data to predictions."""
    weights = ["weights={kinds: 1, commitment: 0}"] if quantizer is VQ else []
    run = train(config(tmp_path, stage_one(quantizer), *weights), tmp_path / "one", console=QUIET)
    model = load(run)
    assert isinstance(model, UViM)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("val/accuracy" in line for line in lines)
    assert (run / "images" / "predictions-000004.png").is_file()
    spec = {"type": "guide", "encoder": {**EYE, "side": 4}, "width": 16, "depth": 1, "heads": 2}
    second = [f"tokenizer={run}", f"prior={json.dumps(spec)}", "objective={type: prior}", "weights={cross_entropy: 1}"]
    whole = train(config(tmp_path, *second), tmp_path / "two", console=QUIET)
    prior = load(whole)
    assert isinstance(prior, Guide)
    assert prior.vocab == list(model.vocab)
    assert prior.grid == [2, 3]
    assert not (whole / "tokens").exists()
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert any({"val/accuracy", "val/compression_cost"} <= line.keys() for line in lines)
    assert (whole / "images" / "predictions-000004.png").is_file()
    codes = prior.sample(2, Conditioning(images=model.image(examples(2))), sampling=Sampling(temperature=0.0))
    assert model.solve(model.image(examples(2)), codes).shape == (2, 4, 16, 16)


def test_a_second_stage_starts_from_parts_of_another_run(tmp_path: Path):
    run = train(config(tmp_path, stage_one(FSQ), "steps=1"), tmp_path / "one", console=QUIET)
    spec = {"type": "guide", "encoder": EYE, "width": 16, "depth": 1, "heads": 2}
    second = [f"tokenizer={run}", f"prior={json.dumps(spec)}", "objective={type: prior}", "weights={cross_entropy: 1}"]
    first = train(config(tmp_path, *second, "steps=3"), tmp_path / "two", console=QUIET)
    still = [*second, "steps=1", "optimizer.lr=1e-12", "ema=0", "seed=5"]
    parts = [f"init_parts={{encoder: '{first}', transformer: '{first}:transformer'}}"]
    taken, fresh = (
        load(train(config(tmp_path, *still, *p), tmp_path / n, console=QUIET)) for n, p in (("a", parts), ("b", []))
    )
    theirs = load(first)
    for name, ours in taken.encoder.state_dict().items():
        torch.testing.assert_close(ours, theirs.encoder.state_dict()[name])
    assert not torch.equal(fresh.encoder.head.weight, theirs.encoder.head.weight)
    for where, message in (
        (f"{first}:transformer", r"init_parts\.encoder=.*:transformer does not fit: "),
        (f"{first}:eye", r"init_parts\.encoder=.*:eye: .*`eye`"),
        (f"{tmp_path}/nowhere", r"init_parts\.encoder=.*nowhere: .*holds no model\.safetensors"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(config(tmp_path, *still, f"init_parts={{encoder: '{where}'}}"), tmp_path / "c", console=QUIET)


def test_a_code_that_sees_the_label_guides():
    """Pictures of noise, new in every step, with labels that have nothing to do with them: only the code can tell."""
    quantizer = {"type": "fsq", "levels": [8, 5, 5, 5]}
    sizes = {**SIZES, "code": [2, 2], "width": 32}
    model = registry.build({"type": "uvim", "task": {"type": "kinds"}, "quantizer": quantizer, **sizes}).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def drawn(seed: int) -> Tensor:
        inputs = examples(16, 8, 8, seed)
        kinds = torch.randint(4, (16, 1, 2, 2), generator=torch.Generator().manual_seed(seed))
        return torch.cat([inputs[:, :3], kinds.repeat_interleave(4, 2).repeat_interleave(4, 3)], 1)

    for step in range(1, 60):
        inputs = drawn(step)
        loss = model.task.losses(model(inputs).output, inputs)["kinds"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    inputs = drawn(0)
    image, scores = model.image(inputs), []
    for codes in (model.encode(inputs), None):
        metrics = model.task.metrics()
        metrics.update(model.task.predict(model.solve(image, codes), image), inputs)
        scores.append(metrics.compute()["accuracy"])
    assert scores[0] > 0.95
    assert scores[1] < 0.4
