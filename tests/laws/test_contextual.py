"""Laws of the contextual RQ-Transformer: what is hidden, what a position sees, and that every pass visits all once."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latticode.core.types import Conditioning, Sampling
from latticode.priors import ContextualRQ, contextual
from latticode.priors.contextual import partition

FREE = torch.tensor([-1])


def small(**changes: Any) -> ContextualRQ:
    """In eval mode, with weights far from their initial values."""
    torch.manual_seed(0)
    arguments: dict = {"vocab": [7, 7, 7], "grid": [4, 4], "classes": 2, "width": 16, "depth": 2, "heads": 2}
    prior = ContextualRQ(**(arguments | changes)).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return prior


def spy(prior: ContextualRQ) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Records what the network over positions is shown: symbols, hidden positions, labels."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    original = prior.context

    def context(symbols: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
        calls.append((symbols.clone(), hidden.clone(), labels.clone()))
        return original(symbols, hidden, labels)

    prior.context = context  # type: ignore[method-assign]
    return calls


# --- partitions


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 12, 40])
def test_parts_are_balanced_and_hold_every_open_position_once(parts: int):
    u = torch.rand(200, 12, generator=torch.Generator().manual_seed(0))
    open_ = torch.rand(200, 12, generator=torch.Generator().manual_seed(1)) < torch.linspace(0, 1, 200)[:, None]
    part = partition(u, open_, parts)
    assert torch.equal(part >= 0, open_)
    for row, mask in zip(part, open_, strict=True):
        sizes = row[mask].bincount()
        assert len(sizes) == min(parts, int(mask.sum()))
        if len(sizes):
            assert sizes.max() - sizes.min() <= 1
            assert sizes.min() >= 1


def test_parts_have_no_favourites():
    part = partition(torch.rand(20_000, 6, generator=torch.Generator().manual_seed(0)), torch.ones(20_000, 6) > 0, 3)
    share = torch.stack([(part == i).float().mean(0) for i in range(3)])
    torch.testing.assert_close(share, torch.full((3, 6), 1 / 3), atol=0.02, rtol=0)


# --- sampling


@pytest.mark.parametrize("steps", [1, 4, 16, 64])
def test_every_pass_visits_every_open_position_exactly_once(steps: int, monkeypatch: pytest.MonkeyPatch):
    prior, visits = small(), []
    original = prior._generate
    monkeypatch.setattr(prior, "_generate", lambda *inputs: visits.append(inputs[3].clone()) or original(*inputs))
    known = prior.sample(3, seed=9).flatten(1, 2)
    known[0], known[1, 5:] = -1, -1
    known[2, 3, 1] = -1  # one code of one position
    open_ = (known < 0).any(-1)
    visits.clear()
    calls = spy(prior)
    result = prior.sample(3, known=known.view(3, 4, 4, 3), sampling=Sampling(steps=steps, revisions=2, revise_steps=3))
    draft, rounds = min(steps, 16), 3
    assert len(visits) == draft + 2 * rounds
    for start, length in ((0, draft), (draft, rounds), (draft + rounds, rounds)):
        assert torch.equal(torch.stack(visits[start : start + length]).sum(0), open_.long())
    assert not torch.equal(torch.stack(visits[draft : draft + 3]), torch.stack(visits[draft + 3 :])), "drawn anew"
    left = open_.clone()
    for at, (_, hidden, _) in zip(visits[:draft], calls, strict=False):  # the draft: from nothing to all
        assert torch.equal(hidden, left)
        left &= ~at
    assert not left.any()
    for at, (_, hidden, _) in zip(visits[draft:], calls[draft:], strict=True):  # a revision: given all the others
        assert torch.equal(hidden, at)
    assert torch.equal(result.flatten(1, 2)[known >= 0], known[known >= 0])


def test_a_revision_sees_what_was_drafted_and_revised_before():
    prior = small()
    calls = spy(prior)
    result = prior.sample(2, sampling=Sampling(steps=2, revisions=1, revise_steps=4))
    drafted = prior.sample(2, sampling=Sampling(steps=2)).flatten(1, 2)
    current = drafted.clone()
    for (_, hidden, _), (after, _, _) in itertools.pairwise(calls[2:6]):
        assert torch.equal(after[~hidden], current[~hidden]), "only what is hidden changes"
        current = after
    first = calls[2][0]
    assert torch.equal(first, drafted)
    assert (result.flatten(1, 2) != drafted).any()


@pytest.mark.parametrize("sampling", [Sampling(steps=3, revisions=2), Sampling(steps=5, revisions=1, guidance=1.5)])
def test_revised_samples_depend_on_seed_and_number_alone(sampling: Sampling):
    prior, cond = small(), Conditioning(torch.tensor([0, 1, -1, 0]))
    whole = prior.sample(4, cond, sampling=sampling, seed=5)
    alone = [prior.sample(1, cond.take(slice(i, i + 1)), sampling=sampling, seed=5, first=i) for i in range(4)]
    assert torch.equal(whole, torch.cat(alone))
    known = whole.clone()
    known[0], known[1, 2:], known[3] = -1, -1, -1  # rows with different numbers of parts
    together = prior.sample(4, cond, sampling=sampling, known=known)
    alone = [
        prior.sample(1, cond.take(slice(i, i + 1)), sampling=sampling, first=i, known=known[i : i + 1])
        for i in range(4)
    ]
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together[2], whole[2])


def test_guidance_acts_on_revisions_alone_where_there_are_any():
    prior, cond = small(), Conditioning(torch.tensor([0, 1]))
    calls = spy(prior)
    prior.sample(2, cond, sampling=Sampling(steps=3, guidance=2.0))
    assert [labels.tolist() for *_, labels in calls] == [[0, 1, -1, -1]] * 3
    calls.clear()
    strong = prior.sample(2, cond, sampling=Sampling(steps=3, revisions=1, guidance=2.0))
    assert [len(labels) for *_, labels in calls] == [2, 2, 2, 4, 4]
    assert not torch.equal(strong, prior.sample(2, cond, sampling=Sampling(steps=3, revisions=1)))
    none = Sampling(steps=3, guidance=-1.0)
    assert torch.equal(prior.sample(2, cond, sampling=none), prior.sample(2, sampling=Sampling(steps=3)))
    assert torch.equal(prior.sample(2, sampling=Sampling(steps=3, guidance=9.0)), prior.sample(2, sampling=none))


def test_noise_and_schedules_have_no_meaning():
    prior = small()
    other = Sampling(noise=0.0, schedule="linear")
    assert torch.equal(prior.sample(2, sampling=other), prior.sample(2))


def test_temperature_zero_takes_the_likeliest_symbols():
    prior = small(vocab=[7, 4])
    codes = prior.sample(2, sampling=Sampling(steps=1, temperature=0.0)).flatten(1, 2)
    all_ = torch.ones(2, 16, dtype=torch.bool)
    logits = prior.logits(codes, all_, FREE.expand(2), all_)
    assert torch.equal(codes.flatten(0, 1), torch.stack([p.argmax(-1) for p in logits], -1))


# --- what a position sees


def test_a_position_sees_known_positions_and_its_own_former_codes():
    """Not what is hidden, not its own later codes; but known positions behind it as well as before it."""
    prior = small()
    codes = torch.randint(7, (1, 16, 3))
    hidden = torch.zeros(1, 16, dtype=torch.bool)
    hidden[0, [4, 9]] = True
    at = torch.zeros_like(hidden)
    at[0, 4] = True
    with torch.no_grad():
        before = prior.logits(codes, hidden, FREE, at)
        for n, slot in itertools.product(range(16), range(3)):
            changed = codes.clone()
            changed[0, n, slot] = (changed[0, n, slot] + 1) % 7
            same = [torch.equal(a, b) for a, b in zip(before, prior.logits(changed, hidden, FREE, at), strict=True)]
            if n == 4:
                assert same == [other <= slot for other in range(3)]
            else:
                assert same == [n == 9] * 3


def test_training_hides_whole_positions_and_asks_for_them(monkeypatch: pytest.MonkeyPatch):
    prior = small(label_dropout=0.25, dropout=0.0)
    calls = spy(prior)
    codes = torch.randint(7, (3000, 4, 4, 3))
    asked: list[Tensor] = []
    original = contextual.nats
    monkeypatch.setattr(contextual, "nats", lambda p, s, soft: asked.append(s) or original(p, s, soft))
    prior.loss(codes, Conditioning(torch.ones(3000, dtype=torch.int64)))
    ((symbols, hidden, labels),) = calls
    assert torch.equal(asked[0], symbols[hidden])
    assert hidden.sum(1).min() >= 1
    share = hidden.float().mean().item()
    assert share == pytest.approx(2 / math.pi + 0.5 / 16, abs=0.02), "the mean of cos(pi / 2 r), rounded up"
    assert (labels == -1).float().mean().item() == pytest.approx(0.25, abs=0.03)
    half = small(min_masked=0.45)
    calls = spy(half)
    half.loss(codes[:500])
    assert calls[0][1].sum(1).min() == 8, "ceil(0.45 * 16)"


def test_loss_is_the_mean_of_nats_over_hidden_symbols():
    """With one position, which is then always hidden, that is `bits`."""
    prior = small(grid=[1], label_dropout=0.0, dropout=0.0)
    codes = torch.randint(7, (8, 1, 3))
    nats = prior.loss(codes)["cross_entropy"] * 3
    torch.testing.assert_close(nats, prior.bits(codes).mean() * math.log(2))
    sharp = torch.nn.functional.one_hot(codes, 7).float()
    torch.testing.assert_close(prior.loss(codes, soft=sharp)["cross_entropy"] * 3, nats)
    even = prior.loss(codes, soft=torch.full((8, 1, 3, 7), 1 / 7))["cross_entropy"]
    everywhere = torch.ones(8, 1, dtype=torch.bool)
    logits = prior.logits(codes, everywhere, FREE.expand(8), everywhere)
    torch.testing.assert_close(even, -torch.stack([p.log_softmax(-1).mean() for p in logits]).mean())


# --- probabilities


@pytest.mark.parametrize(
    "toy",
    [
        {"vocab": [3, 2], "grid": [2, 2]},
        {"vocab": [3, 3], "grid": [3], "shared": True},
        {"vocab": [6], "grid": [4], "digits": [3, 2]},
    ],
    ids=["slots", "residual", "digits"],
)
def test_probabilities_sum_to_one(toy: dict[str, Any]):
    prior = small(**toy, classes=1)
    ranges = [range(size) for size in prior.vocab] * prior.positions
    images = torch.tensor(list(itertools.product(*ranges))).view(-1, *prior.grid, len(prior.vocab))
    for label in (-1, 0):
        p = (-prior.bits(images, Conditioning(torch.full((len(images),), label))).double()).exp2()
        assert p.sum().item() == pytest.approx(1, abs=1e-5)
        assert p.max() > 3 / len(p), "the distribution must not be the uniform one"


def test_samples_of_one_position_at_a_time_follow_the_model():
    """A draft of one position after another, in a random order, is a mixture of the orders' distributions."""
    prior, count = small(vocab=[3, 2], grid=[2], classes=0), 4000
    images = torch.tensor(list(itertools.product(range(3), range(2), repeat=2))).view(-1, 2, 2)
    p = torch.zeros(len(images))
    with torch.no_grad():
        for order in ((0, 1), (1, 0)):
            hidden, nats = torch.ones(len(images), 2, dtype=torch.bool), torch.zeros(len(images))
            for n in order:
                at = torch.zeros_like(hidden)
                at[:, n] = True
                logits = prior.logits(images, hidden, FREE.expand(len(images)), at)
                pairs = zip(logits, images[:, n].unbind(-1), strict=True)
                nats += sum(torch.nn.functional.cross_entropy(a, b, reduction="none") for a, b in pairs)
                hidden &= ~at
            p += (-nats).exp() / 2
    cells = {tuple(image): i for i, image in enumerate(images.flatten(1).tolist())}
    drawn = torch.tensor([cells[tuple(image)] for image in prior.sample(count, seed=1).flatten(1).tolist()])
    expected = p * count
    chi = ((drawn.bincount(minlength=len(p)) - expected).square() / expected)[expected >= 5].sum().item()
    freedom = int((expected >= 5).sum())
    assert freedom > 20
    assert chi < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.slow
def test_an_overfitted_prior_reproduces_its_images():
    torch.manual_seed(0)
    prior = ContextualRQ(
        [9, 9], [3, 3], classes=2, width=32, depth=2, heads=2, inner_depth=1, dropout=0.0, label_dropout=0.5
    )
    images, labels = torch.randint(9, (2, 3, 3, 2)), torch.tensor([0, 1])
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(150):
        rows = torch.arange(16) % 2
        optimizer.zero_grad()
        prior.loss(images[rows], Conditioning(labels[rows]))["cross_entropy"].backward()
        optimizer.step()
    rows = torch.arange(8) % 2
    cool = Sampling(steps=9, temperature=0.3, revisions=1)
    assert torch.equal(prior.sample(8, Conditioning(labels[rows]), sampling=cool), images[rows])
    assert (prior.bits(images, Conditioning(labels)) < 3).all()
    assert (prior.bits(images, Conditioning(1 - labels)) > 4).all(), "the other class's image"
    known = torch.full_like(images, -1)
    known[:, 2] = images[:, 2]  # behind what is generated
    assert torch.equal(prior.sample(2, known=known, sampling=cool), images)


def test_bad_arguments_are_named():
    for name in ("dropout", "label_dropout"):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\), got 1.5"):
            small(**{name: 1.5})
    with pytest.raises(ValueError, match=r"min_masked must be in \[0, 1\], got -0.1"):
        small(min_masked=-0.1)
    with pytest.raises(ValueError, match=r"shared needs symbols of one size, got \[7, 5\]"):
        small(vocab=[7, 5], shared=True)
    with pytest.raises(ValueError, match="depth must be >= 1, got 0"):
        small(inner_depth=0)
    with pytest.raises(ValueError, match=r"soft_labels must be a temperature >= 0 .* got -1"):
        small(soft_labels=-1)
    for wrong in (Sampling(revisions=-1), Sampling(revise_steps=0)):
        with pytest.raises(ValueError, match=r"revisions must be >= 0 and revise_steps >= 1, got (-1 and 2|0 and 0)"):
            small().sample(1, sampling=wrong)
    with pytest.raises(ValueError, match=r"soft targets need shape"):
        small().loss(torch.zeros(1, 4, 4, 3, dtype=torch.int64), soft=torch.zeros(1, 4, 4, 3, 5))
