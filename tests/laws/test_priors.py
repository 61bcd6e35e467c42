"""Laws of every registered prior: one more row in CASES, and a new prior is held to all of them."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from latticode.core import registry
from latticode.core.types import Conditioning, Sampling
from latticode.priors.base import Prior, check_sampling, draw, filtered, guided, gumbel, uniforms
from latticode.priors.text import BPE

SMALL = {"width": 16, "depth": 2, "heads": 2}
TWO_LEVEL = {**SMALL, "attention": 1, "bottom_width": 16, "bottom_depth": 2}
GPT = {"type": "gpt", "grid": [4, 3], **SMALL}
TEXT = {"type": "bpe", "size": 264, "length": 4}
CAPTIONS = ("", "a red cat", "a cat", "a red")
READER = {"type": "text_encoder", "bpe": TEXT, "width": 8, "depth": 1, "heads": 2}
MUSE = {"type": "muse", **SMALL, "bottom_width": 16, "bottom_depth": 2, "encoder_depth": 1}
MAGE = {**SMALL, "decoder_depth": 1}
CONTEXTUAL = {"type": "contextual_rq", "grid": [4, 3], "inner_depth": 1, **SMALL}
EYE = {"type": "vit_encoder", "latent": 6, "patch": 4, "width": 8, "depth": 1, "heads": 2, "side": 2}
GUIDE = {"type": "guide", "encoder": EYE, "dropout": 0.1, "image_dropout": 0.2, **SMALL}
CASES: dict[str, dict[str, Any]] = {
    "gpt": {**GPT, "vocab": [7]},
    "gpt-classes": {**GPT, "vocab": [7], "classes": 3},
    "gpt-llama": {**GPT, "vocab": [7], "classes": 3, "places": "axial", "style": "llama"},
    "gpt-llamagen": {**GPT, "vocab": [7], "classes": 3, "places": "llamagen", "style": "llama"},
    "gpt-line": {**GPT, "vocab": [5], "grid": [9], "classes": 2, "places": "rotary"},
    "gpt-slots": {**GPT, "vocab": [7, 4, 5], "classes": 2},
    "gpt-slots-in-turn": {**GPT, "vocab": [7, 4, 5], "classes": 2, "inner_depth": 1},
    "gpt-one-slot-in-turn": {**GPT, "vocab": [9], "inner_depth": 1},
    "gpt-digits": {**GPT, "vocab": [30], "digits": [5, 3, 2]},
    "gpt-digits-in-turn": {**GPT, "vocab": [30], "digits": [5, 3, 2], "inner_depth": 2, "places": "axial"},
    "gpt-digits-of-slots": {**GPT, "vocab": [6, 6], "digits": [3, 2], "classes": 1, "inner_depth": 1},
    "gpt-residual": {**GPT, "vocab": [7, 7, 7], "classes": 3, "inner_depth": 2, "shared": True},
    "gpt-residual-published": {**GPT, "vocab": [7, 7], "inner_depth": 1, "shared": True, "norm_between": False},
    "gpt-top-bottom": {**GPT, "vocab": [7, 5, 5], "classes": 2, "inner_depth": 2, "shared": True, "tops": 1},
    "contextual": {**CONTEXTUAL, "vocab": [7]},
    "contextual-slots": {**CONTEXTUAL, "vocab": [7, 4, 5], "classes": 3},
    "contextual-residual": {**CONTEXTUAL, "vocab": [7, 7, 7], "classes": 3, "shared": True, "style": "llama"},
    "contextual-digits": {**CONTEXTUAL, "vocab": [30], "grid": [9], "digits": [5, 3, 2], "classes": 2},
    "maskgit": {"type": "maskgit", "vocab": [7], "grid": [4, 3], **SMALL},
    "maskgit-classes": {"type": "maskgit", "vocab": [7], "grid": [4, 3], "classes": 3, **SMALL},
    "maskgit-line": {"type": "maskgit", "vocab": [5], "grid": [9], "classes": 2, **SMALL},
    "maskgit-video": {"type": "maskgit", "vocab": [5], "grid": [2, 3, 2], **SMALL},
    "maskgit-digits": {"type": "maskgit", "vocab": [30], "grid": [4, 3], "digits": [5, 3, 2], "classes": 2, **SMALL},
    "maskgit-digits-in-turn": {
        "type": "maskgit",
        "vocab": [30],
        "grid": [9],
        "digits": [5, 6],
        "inner_depth": 1,
        **SMALL,
    },
    "maskgit-text": {"type": "maskgit", "vocab": [7], "grid": [4, 3], "text": READER, **SMALL},
    "maskgit-both": {"type": "maskgit", "vocab": [7], "grid": [4, 3], "classes": 2, "text": READER, **SMALL},
    "muse": {**MUSE, "vocab": [5, 7, 7, 7, 7], "grid": [2, 3]},
    "muse-classes": {**MUSE, "vocab": [7] * 10, "grid": [2, 2], "classes": 3},
    "muse-text": {**MUSE, "vocab": [5, 7, 7, 7, 7], "grid": [2, 3], "text": READER, "bottom_width": 24},
    "muse-both": {**MUSE, "vocab": [5, 7, 7, 7, 7], "grid": [2, 3], "classes": 2, "text": READER},
    "mage": {"type": "mage", "vocab": [7], "grid": [4, 3], **MAGE},
    "mage-classes": {"type": "mage", "vocab": [7], "grid": [9], "classes": 3, **MAGE},
    "mage-digits": {"type": "mage", "vocab": [12], "grid": [9], "digits": [3, 4], **MAGE},
    "pixelcnn": {"type": "pixelcnn", "vocab": [7], "grid": [4, 3], **SMALL},
    "pixelcnn-classes": {"type": "pixelcnn", "vocab": [7], "grid": [4, 3], "classes": 3, "kernel": 5, **SMALL},
    "pixelsnail": {"type": "pixelcnn", "vocab": [7], "grid": [4, 3], "classes": 3, "attention": 1, **SMALL},
    "two-level": {"type": "two_level", "vocab": [5, 7, 7, 7, 7], "grid": [2, 3], **TWO_LEVEL},
    "two-level-classes": {"type": "two_level", "vocab": [7] * 10, "grid": [2, 2], "classes": 3, **TWO_LEVEL},
    "guide": {**GUIDE, "vocab": [7], "grid": [4, 3]},
    "guide-digits": {**GUIDE, "vocab": [6], "grid": [9], "digits": [2, 3], "inner_depth": 1},
    "guide-slots-in-turn": {**GUIDE, "vocab": [7, 7], "grid": [9], "inner_depth": 1, "shared": True},
    "dalle": {"type": "dalle", "vocab": [7], "grid": [4, 3], "text": TEXT, "kernel": 3, **SMALL, "depth": 3},
    "dalle-line": {"type": "dalle", "vocab": [5], "grid": [9], "text": TEXT, "kernel": 3, **SMALL},
}
every_prior = pytest.mark.parametrize("spec", CASES.values(), ids=CASES)


def build(spec: dict[str, Any], **changes: Any) -> Prior:
    """A prior with weights far from their initial values: at those, every distribution is almost uniform. What it
    reads captions with has learned those of `CAPTIONS`."""
    prior = registry.build({**spec, **changes})
    for module in prior.modules():
        if isinstance(module, BPE):
            module.fit(CAPTIONS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
    return prior


def random_codes(prior: Prior, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randint(v, (count, *prior.grid), generator=generator) for v in prior.vocab], dim=-1)


def conditioning(prior: Prior, count: int) -> Conditioning:
    """Every class and 'none' in turn, captions to a prior that reads them, and images to one that sees."""
    texts = None if prior.text is None else tuple(CAPTIONS[i % len(CAPTIONS)] for i in range(count))
    images = uniforms((3, 8, 8), 7, 0, count) * 2 - 1 if prior.sees else None
    return Conditioning(torch.arange(count) % (prior.classes + 1) - 1, texts, images)


def test_cases_cover_every_registered_prior():
    registered = {name for name in registry.TABLE if issubclass(registry.resolve(name), Prior)}
    assert registered == {spec["type"] for spec in CASES.values()}


@every_prior
def test_a_spec_and_a_state_rebuild_the_prior(spec: dict[str, Any]):
    prior = build(spec)
    again = registry.build(registry.spec_of(prior))
    again.load_state_dict(prior.state_dict())
    assert registry.spec_of(again) == registry.spec_of(prior)
    codes, cond = random_codes(prior, 4), conditioning(prior, 4)
    assert torch.equal(prior.bits(codes, cond), again.bits(codes, cond))


@every_prior
@pytest.mark.parametrize("assign", [False, True])
def test_a_prior_built_on_the_meta_device_is_what_is_loaded_into_it(spec: dict[str, Any], assign: bool):
    """What follows from constructor arguments is in no state: it must not be lost with the memory."""
    prior = build(spec).eval()
    with torch.device("meta"):
        loaded = registry.build(spec).eval()
    with torch.no_grad():
        for tensor in [*loaded.to_empty(device="cpu").parameters(), *loaded.buffers()]:
            tensor.fill_(77)
    loaded.load_state_dict(prior.state_dict(), assign=assign)
    codes, cond, found = random_codes(prior, 3), conditioning(prior, 3), []
    for each in (prior, loaded):
        torch.manual_seed(4)
        found.append({**each.loss(codes, cond), "bits": each.bits(codes, cond), "sample": each.sample(3, cond)})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert dict(prior.named_buffers()).keys() == prior.state_dict().keys() - dict(prior.named_parameters()).keys()


@every_prior
def test_loss_is_a_finite_scalar_that_reaches_every_parameter(spec: dict[str, Any]):
    prior = build(spec)
    terms = prior.loss(random_codes(prior, 32), conditioning(prior, 32))
    assert all(term.ndim == 0 and math.isfinite(term.item()) for term in terms.values())
    sum(terms.values(), torch.zeros(())).backward()
    assert [name for name, p in prior.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_prior
def test_loss_draws_from_the_global_generator_alone(spec: dict[str, Any]):
    prior, losses = build(spec), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        losses.append(prior.loss(random_codes(prior, 4))["cross_entropy"].item())
    assert losses[0] == losses[1] != losses[2]


@every_prior
def test_samples_lie_in_the_vocabulary(spec: dict[str, Any]):
    prior = build(spec)
    codes = prior.sample(5, conditioning(prior, 5), sampling=Sampling(steps=4), seed=1)
    assert codes.shape == (5, *prior.grid, len(prior.vocab))
    assert codes.dtype == torch.int64
    prior.check_codes(codes)
    assert len(codes.unique()) > 1
    assert prior.sample(0).shape == (0, *prior.grid, len(prior.vocab))


@every_prior
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(steps=3, guidance=1.5), Sampling(temperature=0.7, top_k=3, top_p=0.9, steps=5)]
)
def test_a_sample_depends_on_its_seed_and_number_alone(spec: dict[str, Any], sampling: Sampling):
    prior = build(spec)
    cond = conditioning(prior, 4)
    state = torch.get_rng_state()
    whole = prior.sample(4, cond, sampling=sampling, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    halves = [prior.sample(2, cond.take(slice(i, i + 2)), sampling=sampling, seed=5, first=i) for i in (0, 2)]
    assert torch.equal(whole, torch.cat(halves))
    assert not torch.equal(whole, prior.sample(4, cond, sampling=sampling, seed=6))


@every_prior
def test_known_codes_are_kept_and_the_rest_is_filled(spec: dict[str, Any]):
    prior = build(spec)
    codes = random_codes(prior, 6)
    hidden = torch.rand(codes.shape, generator=torch.Generator().manual_seed(2)) < torch.tensor(
        [0.0, 0.1, 0.5, 0.5, 0.9, 1.0]
    ).view(-1, *[1] * (codes.ndim - 1))
    known = codes.masked_fill(hidden, -1)
    result = prior.sample(6, known=known, sampling=Sampling(steps=5))
    assert torch.equal(result[~hidden], codes[~hidden])
    prior.check_codes(result)
    assert torch.equal(known, codes.masked_fill(hidden, -1))
    strided = known.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(prior.sample(6, known=strided, sampling=Sampling(steps=5)), result)
    halves = [prior.sample(3, known=known[i : i + 3], sampling=Sampling(steps=5), first=i) for i in (0, 3)]
    assert torch.equal(result, torch.cat(halves))


@every_prior
def test_options_that_a_prior_does_not_use_change_nothing(spec: dict[str, Any]):
    prior, options = build(spec), vars(Sampling(steps=3, guidance=1.0))
    cond = conditioning(prior, 4)
    others = {int: lambda value: value + 1, float: lambda value: value / 2, str: lambda value: "linear"}
    unused = {name: others[type(value)](value) for name, value in options.items() if name not in prior.uses}
    assert prior.uses <= options.keys()
    plain = prior.sample(4, cond, sampling=Sampling(**options), seed=5)
    assert torch.equal(plain, prior.sample(4, cond, sampling=Sampling(**options | unused), seed=5))


@every_prior
def test_bits_are_finite_positive_and_tell_images_apart(spec: dict[str, Any]):
    prior = build(spec)
    bits = prior.bits(random_codes(prior, 6), conditioning(prior, 6))
    assert bits.shape == (6,)
    assert bits.isfinite().all()
    assert (bits > 0).all()
    assert len(bits.unique()) == 6


@every_prior
def test_a_uniform_prior_needs_log2_of_the_vocabulary(spec: dict[str, Any]):
    prior = build(spec)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.zero_()
    expected = prior.positions * sum(math.log2(size) for size in prior.vocab)
    torch.testing.assert_close(prior.bits(random_codes(prior, 3)), torch.full((3,), expected))


@every_prior
@pytest.mark.parametrize(("vocab", "grid"), [(3, [2, 2]), (2, [9])])
def test_probabilities_sum_to_one(spec: dict[str, Any], vocab: int, grid: list[int]):
    """2^-bits over all images, on a grid small enough to enumerate; groups of one and of several positions."""
    if len(spec["vocab"]) != 1 or spec.get("digits"):
        pytest.skip("enumerates one code of any number per position")
    prior = build(spec, vocab=[vocab], grid=grid)
    images = torch.tensor(list(itertools.product(range(vocab), repeat=prior.positions))).view(-1, *grid, 1)
    for label in range(-1, prior.classes):
        bits = prior.bits(images, Conditioning(torch.full((len(images),), label)))
        assert bits.std() > 0.2, "the distribution must not be the uniform one"
        torch.testing.assert_close((-bits.double()).exp2().sum().item(), 1.0, atol=1e-5, rtol=0)


@every_prior
@pytest.mark.parametrize("training", [True, False])
def test_sampling_and_bits_ignore_and_restore_the_mode(spec: dict[str, Any], training: bool):
    prior = build(spec).train(training)
    codes = random_codes(prior, 2)
    assert torch.equal(prior.bits(codes), prior.bits(codes))
    assert not prior.bits(codes).requires_grad
    prior.sample(1, sampling=Sampling(steps=1))
    assert all(module.training is training for module in prior.modules())


@every_prior
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
@pytest.mark.parametrize("frozen", [0, 1], ids=["in-eval", "in-training"])
def test_every_submodule_keeps_its_own_mode(
    spec: dict[str, Any], frozen: int, fails: bool, monkeypatch: pytest.MonkeyPatch
):
    """A part that was set to another mode than the rest is in it still, whatever was called and however that ended."""
    prior = build(spec).train(not frozen)
    next(m for m in prior.modules() if isinstance(m, nn.Dropout)).train(bool(frozen))
    next(m for m in prior.modules() if isinstance(m, nn.Sequential | nn.ModuleList)).train(bool(frozen))
    modes = {name: module.training for name, module in prior.named_modules()}
    assert len(set(modes.values())) == 2
    codes, cond, seen = random_codes(prior, 2), conditioning(prior, 2), []
    if fails:

        def broken(*_: Any) -> Any:
            seen.append({module.training for module in prior.modules()})
            raise ArithmeticError

        for name in ("_terms", "_nats", "_draw"):
            monkeypatch.setattr(prior, name, broken)
    for call in (
        lambda: prior.loss(codes, cond),
        lambda: prior.bits(codes, cond),
        lambda: prior.sample(2, cond, sampling=Sampling(steps=1, guidance=1.0)),
    ):
        with pytest.raises(ArithmeticError) if fails else nullcontext():
            call()
        assert {name: module.training for name, module in prior.named_modules()} == modes
    assert seen in ([], [{True, False}, {False}, {False}])


@every_prior
def test_forward_is_the_loss(spec: dict[str, Any]):
    prior = build(spec)
    codes, cond = random_codes(prior, 4), conditioning(prior, 4)
    terms = []
    for call in (prior.loss, prior):
        torch.manual_seed(1)
        terms.append(call(codes, cond))
    assert terms[0] == terms[1]


@every_prior
def test_soft_targets_are_for_those_that_learn_from_them(spec: dict[str, Any]):
    prior = build(spec)
    codes = random_codes(prior, 2)
    if not hasattr(prior, "soft_labels"):
        with pytest.raises(ValueError, match=r"learns from codes alone, got soft targets \(2, "):
            prior.loss(codes, conditioning(prior, 2), soft=torch.zeros(*codes.shape, max(prior.vocab)))


INTEGERS = (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32)


@every_prior
def test_codes_of_every_integer_type_are_taken(spec: dict[str, Any]):
    """A token dataset stores uint8 or uint16."""
    prior = build(spec).eval()
    codes, cond = random_codes(prior, 3), conditioning(prior, 3)

    def answers(codes: torch.Tensor) -> list[torch.Tensor]:
        torch.manual_seed(4)
        return [*prior.loss(codes, cond).values(), prior.bits(codes, cond), prior.sample(3, known=codes)]

    expected = answers(codes)
    for dtype in INTEGERS:
        assert all(torch.equal(*pair) for pair in zip(expected, answers(codes.to(dtype)), strict=True)), dtype
    with pytest.raises(ValueError, match=r"expects codes in \[0"):
        prior.loss(torch.full_like(codes, max(prior.vocab)).to(torch.uint16), cond)


@every_prior
def test_no_images_have_no_loss_and_cost_nothing(spec: dict[str, Any]):
    prior = build(spec)
    codes, cond = random_codes(prior, 0), conditioning(prior, 0)
    with pytest.raises(ValueError, match=r"has no loss of no images, got codes \(0, "):
        prior.loss(codes, cond)
    assert prior.bits(codes, cond).shape == (0,)
    assert prior.sample(0, cond, sampling=Sampling(guidance=1.0)).shape == codes.shape


@every_prior
def test_bad_input_is_refused_with_its_values(spec: dict[str, Any]):
    prior = build(spec)
    codes = random_codes(prior, 2)
    high, low = torch.tensor([0, prior.classes]), torch.tensor([-2, -1])
    for label, labels in ((prior.classes, high), (-2, low)):
        for call in (
            lambda c: prior.sample(2, c),
            lambda c: prior.bits(codes, c),
            lambda c: prior.loss(codes, c),
        ):
            with pytest.raises(ValueError, match=f"label {label} is not valid"):
                call(Conditioning(labels))
    with pytest.raises(ValueError, match=r"one label for each of 2 images"):
        prior.sample(2, Conditioning(torch.full((3,), -1)))
    for wrong in (codes[..., 0], codes[:, :1], codes.float(), codes.transpose(1, -1)):
        with pytest.raises(ValueError, match="expects integer codes"):
            prior.loss(wrong)
    for value in (-1, max(prior.vocab)):
        with pytest.raises(ValueError, match=r"expects codes in \[0"):
            prior.bits(codes.fill_(value))
    with pytest.raises(ValueError, match=r"expects codes in \[-1"):
        prior.sample(2, known=codes.fill_(-2))
    with pytest.raises(ValueError, match="known codes of 3 images, got 2"):
        prior.sample(3, known=codes.fill_(-1))
    with pytest.raises(ValueError, match="seed, first and count must be >= 0"):
        prior.sample(1, seed=-1)


@every_prior
def test_broken_weights_do_not_sample(spec: dict[str, Any]):
    prior = build(spec)
    with torch.no_grad():
        next(prior.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        prior.sample(1)


@pytest.mark.parametrize(
    "changes",
    [{"vocab": []}, {"vocab": [0]}, {"grid": []}, {"grid": [4, 0]}, {"classes": -1}],
    ids=lambda changes: str(changes),
)
@every_prior
def test_bad_sizes_are_refused(spec: dict[str, Any], changes: dict[str, Any]):
    if next(iter(changes)) not in registry.parameters_of(registry.resolve(spec["type"])):
        pytest.skip("takes no such argument")
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be"):
        registry.build({**spec, **changes})


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"temperature": -1.0},
        {"noise": -0.1},
        {"guidance": math.nan},
        {"guidance_schedule": "exp"},
        {"top_k": -1},
        {"top_p": 0.0},
    ],
    ids=lambda options: str(options),
)
def test_bad_sampling_options_are_named(options: dict[str, Any]):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be .*, got"):
        check_sampling(Sampling(**options))


def test_draws_follow_the_distribution():
    p = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0])
    u = (torch.arange(10_000) + 0.5) / 10_000
    drawn = draw(p.log().expand(10_000, 5), u)
    torch.testing.assert_close(drawn.bincount(minlength=5) / 10_000, p, atol=2e-4, rtol=0)
    edges = draw(p.log().expand(2, 5), torch.tensor([0.0, 1 - 2**-24]))
    assert edges.tolist() == [0, 3], "a token of probability 0 is never drawn at the upper end"
    assert draw(p.flip(0).log()[None], torch.zeros(1)).tolist() == [1], "nor at the lower one"


def test_filters_keep_what_they_say():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()

    def kept(**options: Any) -> list[int]:
        return filtered(logits, Sampling(**options)).isfinite().nonzero().flatten().tolist()

    assert kept() == kept(top_k=4) == kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_k=2) == [2, 3]
    assert kept(top_p=0.35) == [3]
    assert kept(top_p=0.6) == [2, 3]
    assert kept(top_p=0.75) == [1, 2, 3]
    assert kept(temperature=0.0) == [3]
    torch.testing.assert_close(filtered(logits, Sampling(temperature=0.5)).softmax(-1), (2 * logits).softmax(-1))


def test_guidance_is_a_line_through_both_predictions():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0])
    assert torch.equal(guided(a, b, 0.0), a)
    assert torch.equal(guided(a, b, -1.0), b)
    assert guided(a, b, 2.0).tolist() == [3.0, -2.0]


def test_gumbel_noise_has_its_mean_and_is_finite():
    u = (torch.arange(100_000) + 0.5) / 100_000
    assert gumbel(u).mean().item() == pytest.approx(0.5772, abs=1e-3)
    assert gumbel(torch.tensor([0.0, 1 - 2**-24])).isfinite().all()


def test_noise_streams_differ_by_seed_and_number():
    rows = [uniforms((16,), seed, first, 1)[0] for seed in range(4) for first in range(4)]
    assert len({tuple(row.tolist()) for row in rows}) == 16
    assert torch.equal(uniforms((16,), 2, 1, 3), torch.stack(rows[9:12]))
