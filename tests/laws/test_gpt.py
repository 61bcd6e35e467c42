"""Laws of autoregression: the cache changes nothing, nothing looks ahead, symbols add up to codes."""

from __future__ import annotations

import itertools
import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from helpers import Largest
from latticode import FSQ, LFQ
from latticode.core.types import Conditioning, Sampling
from latticode.nn.rotary import rotary_table
from latticode.priors import GPT, base
from latticode.priors.base import uniforms
from latticode.priors.gpt import State
from latticode.priors.symbols import Digits

SPECS: dict[str, dict[str, Any]] = {
    "plain": {"vocab": [7]},
    "llama": {"vocab": [7], "places": "axial", "style": "llama"},
    "rotary": {"vocab": [7], "places": "rotary"},
    "slots": {"vocab": [7, 4, 5]},
    "slots-in-turn": {"vocab": [7, 4, 5], "inner_depth": 2},
    "digits": {"vocab": [30], "digits": [5, 3, 2]},
    "digits-in-turn": {"vocab": [30, 30], "digits": [5, 3, 2], "inner_depth": 1, "style": "llama", "places": "axial"},
    "residual": {"vocab": [7, 7, 7], "inner_depth": 2, "shared": True},
    "top-bottom": {"vocab": [7, 5, 5, 5, 5], "inner_depth": 2, "shared": True, "tops": 1},
    "two-tops": {"vocab": [7, 4, 6, 5], "inner_depth": 1, "tops": 2, "style": "llama"},
    "top-bottom-digits": {"vocab": [12, 12, 12], "digits": [4, 3], "inner_depth": 1, "tops": 1},
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def small(**changes: Any) -> GPT:
    """In eval mode, with weights far from their initial values."""
    torch.manual_seed(0)
    arguments: dict = {"vocab": [11], "grid": [3, 4], "classes": 2, "width": 16, "depth": 2, "heads": 2} | changes
    prior = GPT(**arguments).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return prior


def random_symbols(prior: GPT, count: int) -> Tensor:
    return torch.stack([torch.randint(size, (count, prior.positions)) for size in prior.symbols.sizes], dim=-1)


# --- the cache


@every_spec
@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("prompt", [0, 5])
def test_logits_with_a_cache_are_those_without(
    spec: dict[str, Any], guidance: float, prompt: int, monkeypatch: pytest.MonkeyPatch
):
    prior, seen = small(**spec), []
    monkeypatch.setattr(base, "filtered", lambda logits, sampling: seen.append(logits) or logits)
    known = torch.full((3, 12, len(prior.vocab)), -1)
    known[:, :prompt] = 3
    labels = torch.tensor([0, 1, -1])
    codes = prior.sample(3, Conditioning(labels), sampling=Sampling(guidance=guidance), known=known.view(3, 3, 4, -1))
    symbols = prior.symbols.split(codes).flatten(1, -2)
    expected, plain = prior.logits(symbols, labels), prior.logits(symbols, torch.full_like(labels, -1))
    slots = len(expected)
    assert len(seen) == (12 - prompt) * slots
    for i, logits in enumerate(seen):
        n, slot = prompt + i // slots, i % slots
        whole = expected[slot][:, n] + guidance * (expected[slot][:, n] - plain[slot][:, n])
        torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)


def test_every_step_of_decoding_has_the_same_shapes():
    """So one compiled graph serves a whole sequence."""
    prior, shapes = small(inner_depth=1, vocab=[7, 4]), []
    original = prior.transformer.step
    prior.transformer.step = lambda *inputs: (
        shapes.append([v.shape for v in inputs if v is not None]) or original(*inputs)
    )  # type: ignore[method-assign]
    prior.sample(2)
    assert len(shapes) == 12
    assert all(each == shapes[0] for each in shapes)


def test_the_cache_is_as_large_as_on_paper():
    """2 (keys, values) x depth x rows x positions x width numbers; guidance doubles the rows."""
    prior, sizes = small(depth=3), []
    original = prior.transformer.cache
    prior.transformer.cache = lambda *shape: sizes.append(original(*shape)) or sizes[-1]  # type: ignore[method-assign]
    prior.sample(5)
    prior.sample(5, Conditioning(torch.zeros(5, dtype=torch.int64)), sampling=Sampling(guidance=1.0))
    assert [t.nbytes for t in sizes] == [rows * 2 * 3 * 12 * 16 * 4 for rows in (5, 10)]


class Step(nn.Module):
    """What a server that knows no Python is given: one step of decoding."""

    def __init__(self, prior: GPT) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, codes: Tensor, labels: Tensor, state: State, u: Tensor) -> tuple[Tensor, State]:
        return self.prior.step(codes, labels, state, u)


@pytest.mark.slow
@every_spec
def test_an_exported_step_decodes_as_the_sampler_does(spec: dict[str, Any]):
    prior, labels = small(**spec), torch.tensor([0, 1, -1])
    state, codes = prior.begin(3), torch.zeros(3, len(prior.vocab), dtype=torch.int64)
    u = uniforms((12, len(prior.symbols.sizes)), 5, 0, 3)
    step = torch.export.export(Step(prior), (codes, labels, state, u[:, 0])).module()
    drawn = []
    for n in range(12):
        codes, state = step(codes, labels, state, u[:, n])
        drawn.append(codes)
    assert torch.equal(torch.stack(drawn, dim=1).view(3, 3, 4, -1), prior.sample(3, Conditioning(labels), seed=5))
    assert not prior.begin(3).cache.any(), "nothing is written to what was given"


# --- order


@every_spec
def test_no_symbol_sees_itself_or_a_later_one(spec: dict[str, Any]):
    """Changing one symbol leaves the logits of its own and of all earlier ones as they are, to the bit."""
    prior = small(**spec)
    symbols, labels = random_symbols(prior, 2), torch.tensor([0, -1])
    sizes = prior.symbols.sizes
    with torch.no_grad():
        before = prior.logits(symbols, labels)
        for n, slot in itertools.product((0, 5, 11), range(len(sizes))):
            changed = symbols.clone()
            changed[:, n, slot] = (changed[:, n, slot] + 1) % sizes[slot]
            after = prior.logits(changed, labels)
            for other, (a, b) in enumerate(zip(before, after, strict=True)):
                below = prior.inner_depth and other > slot and (slot < prior.first or not prior.tops)
                seen = n if below else n + 1  # the first position that may change
                assert torch.equal(a[:, :seen], b[:, :seen])
                assert (a[:, seen:] != b[:, seen:]).any(-1).all()


@every_spec
def test_logits_of_a_prefix_are_those_of_the_whole(spec: dict[str, Any]):
    prior = small(**spec)
    symbols, labels = random_symbols(prior, 2), torch.tensor([0, 1])
    for part, whole in zip(prior.logits(symbols[:, :5], labels), prior.logits(symbols, labels), strict=True):
        torch.testing.assert_close(part, whole[:, :5])


def test_the_label_reaches_the_first_position():
    prior = small()
    symbols = random_symbols(prior, 1).expand(3, -1, -1)
    (logits,) = prior.logits(symbols, torch.tensor([0, 1, -1]))
    assert len(logits[:, 0].unique(dim=0)) == 3


def test_the_class_stands_at_the_origin_and_the_codes_from_one_on():
    cells = [[0, 0], *([y, x] for y in (1, 2, 3) for x in (1, 2, 3, 4))][:12]  # the last code is no input
    torch.testing.assert_close(small(places="axial").rotary, rotary_table(torch.tensor(cells), 8), rtol=0, atol=0)
    line = rotary_table(torch.arange(12)[:, None], 8)
    torch.testing.assert_close(small(places="rotary").rotary, line, rtol=0, atol=0)
    torch.testing.assert_close(small(places="axial", grid=[12]).rotary, line, rtol=0, atol=0)


# --- probabilities


TOYS: dict[str, dict[str, Any]] = {
    "slots": {"vocab": [2, 3, 2], "grid": [2]},
    "slots-in-turn": {"vocab": [2, 3, 2], "grid": [2], "inner_depth": 1},
    "digits": {"vocab": [12], "grid": [2], "digits": [3, 2, 2], "inner_depth": 1, "places": "axial"},
    "residual": {"vocab": [3, 3], "grid": [2, 1], "inner_depth": 1, "shared": True},
    "top-bottom": {"vocab": [3, 2, 2], "grid": [2], "inner_depth": 1, "shared": True, "tops": 1},
}


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_probabilities_sum_to_one_and_are_those_of_samples(toy: dict[str, Any]):
    prior, count = small(**toy, classes=1), 4000
    ranges = [range(size) for size in prior.vocab] * prior.positions
    images = torch.tensor(list(itertools.product(*ranges))).view(-1, *prior.grid, len(prior.vocab))
    p = (-prior.bits(images).double()).exp2()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert p.max() > 3 / len(p), "the distribution must not be the uniform one"
    cells = {tuple(image): i for i, image in enumerate(images.flatten(1).tolist())}
    drawn = prior.sample(count, seed=1).flatten(1).tolist()
    counts = torch.tensor([cells[tuple(image)] for image in drawn]).bincount(minlength=len(p))
    expected = p * count
    often = expected >= 5
    chi = ((counts - expected)[often].square() / expected[often]).sum().item()
    freedom = int(often.sum())
    assert freedom > 8
    assert chi < freedom + 4 * math.sqrt(2 * freedom)


def test_independent_symbols_multiply():
    """Jointly predicted, the second symbol's probability does not depend on the first; in turn, it does."""
    for inner_depth, independent in ((0, True), (1, False)):
        prior = small(vocab=[2, 3], grid=[1], inner_depth=inner_depth)
        p = (-prior.bits(torch.cartesian_prod(torch.arange(2), torch.arange(3))[:, None])).exp2().view(2, 3)
        product = p.sum(1, keepdim=True) * p.sum(0)
        assert torch.allclose(p, product, atol=1e-6) is independent


@every_spec
def test_loss_is_the_mean_of_bits_over_symbols(spec: dict[str, Any]):
    prior = small(**spec, label_dropout=0.0)
    codes, cond = prior.sample(4, seed=2), Conditioning(torch.tensor([0, 1, -1, 0]))
    terms, first, symbols = prior.loss(codes, cond), prior.first, len(prior.symbols.sizes)
    assert set(terms) == {"cross_entropy"} | ({"top_cross_entropy"} if prior.tops else set())
    nats = (symbols - first) * terms["cross_entropy"] + first * terms.get("top_cross_entropy", torch.zeros(()))
    torch.testing.assert_close(nats * prior.positions, prior.bits(codes, cond).mean() * math.log(2))


def test_bottom_codes_are_independent_given_the_top():
    """p(a, b | top) = p(a | top) p(b | top), and both depend on the top; the top's own distribution is the marginal."""
    prior = small(vocab=[3, 2, 4], grid=[1], inner_depth=1, tops=1)
    codes = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(4))
    p = (-prior.bits(codes[:, None])).exp2().view(3, 2, 4)
    given = p / p.sum((1, 2), keepdim=True)
    torch.testing.assert_close(given, given.sum(2, keepdim=True) * given.sum(1, keepdim=True))
    assert (given[0] - given[1]).abs().max() > 0.02
    top = prior.logits(codes[:1, None], torch.tensor([-1]))[0].softmax(-1).flatten()
    torch.testing.assert_close(p.sum((1, 2)), top)


def test_levels_share_a_table_and_a_head():
    prior = small(vocab=[7, 5, 5, 5], inner_depth=1, shared=True, tops=1)
    assert prior.embedding.weight.shape == (7 + 5, 16)
    assert prior.offsets.tolist() == [0, 7, 7, 7]
    assert [head.out_features for head in cast(Any, prior.head.heads)] == [7, 5]
    assert len(cast(Any, small(vocab=[7, 5, 5, 5], inner_depth=1, tops=1).head.heads)) == 4


# --- soft labels


@pytest.mark.parametrize(
    "spec",
    [{"vocab": [6, 4], "inner_depth": 1}, {"vocab": [5]}, {"vocab": [4, 6, 6], "inner_depth": 1, "tops": 1}],
    ids=["in-turn", "plain", "top-bottom"],
)
def test_soft_targets_are_the_mean_over_their_codes(spec: dict[str, Any]):
    """Cross entropy is linear in its target; all mass on the codes is the ordinary loss."""
    prior = small(**spec, label_dropout=0.0, soft_labels=0.5)
    codes = prior.sample(3, seed=1)
    most = max(prior.vocab)
    sharp = torch.nn.functional.one_hot(codes, most).float()
    torch.testing.assert_close(prior.loss(codes, soft=sharp), prior.loss(codes))
    soft = torch.rand(*codes.shape, most) * (torch.arange(most) < torch.tensor(prior.vocab)[:, None])
    soft /= soft.sum(-1, keepdim=True)
    logits = prior.logits(codes.flatten(1, 2), torch.full((3,), -1))
    pairs = zip(logits, soft.flatten(1, 2).unbind(-2), strict=True)
    each = torch.stack([-(q[..., : p.shape[-1]] * p.log_softmax(-1)).sum(-1).mean() for p, q in pairs])
    terms = prior.loss(codes, soft=soft)
    torch.testing.assert_close(terms["cross_entropy"], each[prior.tops :].mean())
    if prior.tops:
        torch.testing.assert_close(terms["top_cross_entropy"], each[: prior.tops].mean())


def test_soft_targets_of_another_shape_are_refused():
    prior, codes = small(vocab=[6, 4]), torch.zeros(2, 3, 4, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4, 2, 6\), got \(2, 3, 4, 2, 4\)"):
        prior.loss(codes, soft=torch.zeros(2, 3, 4, 2, 4))
    with pytest.raises(ValueError, match=r"need no digits and shape"):
        small(vocab=[6, 6], digits=[3, 2]).loss(codes, soft=torch.zeros(2, 3, 4, 2, 6))


def test_training_hides_labels():
    prior, seen = small(label_dropout=0.25), []
    original = prior.logits
    prior.logits = lambda symbols, labels, *rest: seen.append(labels) or original(symbols, labels, *rest)  # type: ignore[method-assign]
    prior.loss(torch.zeros(4000, 3, 4, 1, dtype=torch.int64), Conditioning(torch.ones(4000, dtype=torch.int64)))
    assert (seen[0] == -1).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert seen[0].unique().tolist() == [-1, 1]


# --- digits


def test_digits_are_those_of_the_quantizers():
    codes = torch.randint(1000, (5, 2, 3, 1))
    assert torch.equal(Digits([1000], [8, 5, 5, 5]).split(codes), FSQ([8, 5, 5, 5]).digits(codes))
    codes = torch.randint(2**18, (5, 1))
    groups = Digits([2**18], [512, 512]).split(codes)
    assert torch.equal(groups, LFQ(18, factors=2).encode(LFQ(18).decode(codes)))


@pytest.mark.parametrize(("vocab", "sizes"), [([7, 4, 5], None), ([30], [5, 3, 2]), ([2**40, 2**40], [2**20, 2**20])])
def test_split_and_join_are_inverse(vocab: list[int], sizes: list[int] | None):
    digits = Digits(vocab, sizes)
    codes = torch.stack([torch.randint(size, (50, 2)) for size in vocab], dim=-1)
    codes[0], codes[1] = 0, torch.tensor(vocab) - 1
    symbols = digits.split(codes)
    assert symbols.shape == (50, 2, len(digits.sizes))
    assert (symbols >= 0).all()
    assert (symbols < torch.tensor(digits.sizes)).all()
    assert torch.equal(digits.join(symbols), codes)
    hidden = codes.clone()
    hidden[3, 1, 0] = -1
    per_code = len(digits.sizes) // len(vocab)
    changed = (digits.split(hidden) != symbols).nonzero().tolist()
    assert changed == [[3, 1, j] for j in range(per_code)]
    assert (digits.split(hidden)[3, 1, :per_code] == -1).all()


@pytest.mark.parametrize("inner_depth", [0, 2])
def test_a_large_vocabulary_has_no_large_softmax(inner_depth: int):
    """2^18 codes as two digits of 512: 1024 rows of embedding, 1024 logits, and nothing of 2^18 anywhere."""
    prior = GPT([2**18], [4, 4], digits=[512, 512], width=32, depth=2, heads=2, inner_depth=inner_depth)
    blocks = 12 * 32**2 + 13 * 32
    assert sum(p.numel() for p in prior.parameters()) < 2 * 1024 * 33 + (2 + inner_depth) * blocks + 1000
    codes = torch.randint(2**18, (2, 4, 4, 1))
    with Largest() as largest:
        prior.loss(codes)["cross_entropy"].backward()
        prior.bits(codes)
        drawn = prior.sample(2)
    assert largest.numel <= 1024 * 32 < 2**18
    prior.check_codes(drawn)


@pytest.mark.parametrize(("depth", "inner_depth", "millions"), [(12, 4, 480), (24, 4, 821), (42, 6, 1388)])
def test_rq_transformer_is_this_class(depth: int, inner_depth: int, millions: int):
    """The published sizes, width 1536, within one table of codes: theirs is the tokenizer's, 256 wide and projected."""
    with torch.device("meta"):
        prior = GPT([16384] * 4, [8, 8], 1000, 1536, depth, 24, inner_depth=inner_depth, shared=True)
    table = 16384 * 1536 / 1e6
    assert sum(p.numel() for p in prior.parameters()) / 1e6 - table == pytest.approx(millions, rel=0.01)


# --- sampling


def test_a_prompt_is_read_and_what_lies_behind_is_not():
    prior = small(vocab=[7, 4], inner_depth=1)
    generator = torch.Generator().manual_seed(1)
    codes = torch.stack([torch.randint(v, (1, 3, 4), generator=generator) for v in prior.vocab], dim=-1)
    free, behind, ahead = (torch.full_like(codes, -1) for _ in range(3))
    behind[:, 2] = codes[:, 2]
    ahead[:, 0] = codes[:, 0]
    plain = prior.sample(8)
    assert torch.equal(prior.sample(8, known=free.expand(8, -1, -1, -1)), plain)
    assert torch.equal(prior.sample(8, known=behind.expand(8, -1, -1, -1))[:, :2], plain[:, :2])
    assert not torch.equal(prior.sample(8, known=ahead.expand(8, -1, -1, -1))[:, 1:], plain[:, 1:])
    part = torch.full_like(codes, -1)  # one slot of one position
    part[:, 1, 2, 0] = codes[:, 1, 2, 0]
    result = prior.sample(8, known=part.expand(8, -1, -1, -1))
    assert (result[:, 1, 2, 0] == codes[:, 1, 2, 0]).all()
    assert torch.equal(result.flatten(1, 2)[:, :6], plain.flatten(1, 2)[:, :6])


def test_prompts_of_different_length_do_not_disturb_each_other():
    prior = small()
    codes = prior.sample(3, seed=4)
    known = codes.clone().flatten(1, 2)
    known[0, 2:], known[1, 9:] = -1, -1  # the third is complete
    known = known.view(codes.shape)
    together = prior.sample(3, known=known)
    alone = [prior.sample(1, known=known[i : i + 1], first=i) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together[2], codes[2])


def test_guidance_runs_the_second_branch_only_when_asked():
    prior, rows = small(), []
    original = prior.transformer.step
    prior.transformer.step = lambda x, *rest: rows.append(len(x)) or original(x, *rest)  # type: ignore[method-assign]
    cond = Conditioning(torch.tensor([0, 1]))
    plain = prior.sample(2, cond)
    assert set(rows) == {2}
    rows.clear()
    strong = prior.sample(2, cond, sampling=Sampling(guidance=3.0))
    assert set(rows) == {4}
    assert not torch.equal(plain, strong)
    assert torch.equal(prior.sample(2, cond, sampling=Sampling(guidance=-1.0)), prior.sample(2))
    assert torch.equal(prior.sample(2, sampling=Sampling(guidance=3.0)), prior.sample(2)), "no label, no effect"


def test_temperature_zero_takes_the_likeliest_symbol():
    prior = small(vocab=[7, 4], inner_depth=1)
    codes = prior.sample(2, sampling=Sampling(temperature=0.0))
    likeliest = torch.stack([p.argmax(-1) for p in prior.logits(codes.flatten(1, 2), torch.tensor([-1, -1]))], dim=-1)
    assert torch.equal(codes.flatten(1, 2), likeliest)


def test_steps_noise_and_schedule_have_no_meaning():
    prior = small()
    other = Sampling(steps=3, noise=0.0, schedule="linear")
    assert torch.equal(prior.sample(4, sampling=other), prior.sample(4))


@pytest.mark.parametrize(
    "spec",
    [{"vocab": [12]}, {"vocab": [12], "digits": [4, 3], "inner_depth": 1, "places": "axial", "style": "llama"}],
    ids=["codes", "digits"],
)
@pytest.mark.slow
def test_an_overfitted_prior_reproduces_its_images(spec: dict[str, Any]):
    torch.manual_seed(0)
    prior = GPT(**spec, grid=[3, 3], classes=2, width=32, depth=2, heads=2, dropout=0.0, label_dropout=0.5)
    images, labels = torch.randint(12, (2, 3, 3, 1)), torch.tensor([0, 1])
    images[:, 0, 0] = torch.tensor([[3], [8]])  # the first code tells which image it is
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(120):
        rows = torch.arange(16) % 2
        optimizer.zero_grad()
        prior.loss(images[rows], Conditioning(labels[rows]))["cross_entropy"].backward()
        optimizer.step()
    rows = torch.arange(8) % 2
    cool = Sampling(temperature=0.3)
    assert torch.equal(prior.sample(8, Conditioning(labels[rows]), sampling=cool), images[rows])
    assert (prior.bits(images, Conditioning(labels)) < 2).all()
    assert (prior.bits(images, Conditioning(1 - labels)) > 4).all(), "the other class's image"
    free = prior.sample(16, sampling=cool, seed=2)
    shares = [(free == image).all((1, 2, 3)).float().mean().item() for image in images]
    assert min(shares) > 0.1, "without a label it is one image or the other"
    assert sum(shares) == 1
    known = torch.full_like(images, -1)
    known[:, 0, 0] = images[:, 0, 0]
    assert torch.equal(prior.sample(2, known=known, sampling=cool), images)


def test_bad_arguments_are_named():
    for name in ("dropout", "label_dropout"):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\), got 1.5"):
            small(**{name: 1.5})
    with pytest.raises(ValueError, match=r"unknown places 'axis'; valid: learned, rotary, axial"):
        small(places="axis")
    with pytest.raises(ValueError, match=r"unknown style 'bert' of a transformer; valid: gpt, llama"):
        small(style="bert")
    with pytest.raises(ValueError, match=r"inner_depth must be >= 0 .* got -1"):
        small(inner_depth=-1)
    for vocab, digits in (([1000], [8, 5, 5]), ([8, 9], [2, 4]), ([8], [])):
        with pytest.raises(ValueError, match=r"digits must multiply to the codes of each slot, got \["):
            small(vocab=vocab, digits=digits)
    with pytest.raises(ValueError, match=r"digits must multiply .* got \[-2, -4\] = 8 for \[8\]"):
        small(vocab=[8], digits=[-2, -4])
    for wrong in ({"vocab": [8, 9], "inner_depth": 1}, {"vocab": [8, 8]}):
        with pytest.raises(ValueError, match=r"shared needs symbols of one size, got \[8, 9\]|inner_depth >= 1, got 0"):
            small(shared=True, **wrong)
    with pytest.raises(ValueError, match=r"shared and tops need inner_depth >= 1, got 0"):
        small(vocab=[8, 8], tops=1)
    for tops in (-1, 2):
        with pytest.raises(ValueError, match=rf"tops must leave one of the 2 codes of a position, got {tops}"):
            small(vocab=[8, 8], inner_depth=1, tops=tops)
    for soft in (-0.5, math.inf):
        with pytest.raises(ValueError, match=rf"soft_labels must be a temperature >= 0 .* got {soft}"):
            small(soft_labels=soft)
    with pytest.raises(ValueError, match=r"distributions over whole codes, got digits \[4, 2\]"):
        small(vocab=[8], digits=[4, 2], soft_labels=0.5)
    with pytest.raises(ValueError, match=r"head width divisible by 4 .* got 6"):
        small(places="axial", width=12)
