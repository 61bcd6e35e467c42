"""Laws of Muse: two masked levels are one prior, the fine is told the coarse, and both the same label and text."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latticode.core.types import Conditioning, Sampling
from latticode.priors import MaskGIT, Muse
from latticode.priors.grids import packed, unpacked
from latticode.priors.schedules import remask_counts
from latticode.priors.text import BPE, TextEncoder

WORDS = ("", "red", "blue", "red cat")


def reader(width: int = 8) -> TextEncoder:
    bpe = BPE(264, 3)
    bpe.fit(WORDS)
    return TextEncoder(bpe, width, 1, 2)


def small(scale: float = 0.2, **changes: Any) -> Muse:
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 2, "bottom_width": 16, "bottom_depth": 2, "encoder_depth": 1, "heads": 2}
    arguments: dict[str, Any] = {"vocab": [5, 7, 7, 7, 7], "grid": [2, 3], "classes": 2} | sizes | changes
    prior = Muse(**arguments)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return prior


def random_codes(prior: Muse, count: int) -> Tensor:
    return torch.stack([torch.randint(size, (count, *prior.grid)) for size in prior.vocab], dim=-1)


def spy(prior: Muse) -> dict[str, list[tuple[Tensor, Tensor, Tensor, Any]]]:
    """Records what both levels are asked: tokens, labels, positions, context."""
    calls: dict[str, list[tuple[Tensor, Tensor, Tensor, Any]]] = {"top": [], "bottom": []}
    for name, seen in calls.items():
        level = getattr(prior, name)

        def states(tokens: Any, labels: Any, at: Any, context: Any = None, ask=level.states, seen=seen) -> Tensor:
            seen.append((tokens.clone(), labels.clone(), at.clone(), context))
            return ask(tokens, labels, at, context)

        level.states = states
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(("vocab", "grid"), [([2] * 5, [1, 2]), ([3, 2, 2, 2, 2], [1, 1]), ([3, 4], [2, 1])])
@pytest.mark.parametrize("text", [False, True])
def test_two_levels_sum_to_one(vocab: list[int], grid: list[int], text: bool):
    prior = small(vocab=vocab, grid=grid, text=reader() if text else None)
    slots = [range(size) for size in vocab * math.prod(grid)]
    images = torch.tensor(list(itertools.product(*slots))).view(-1, *grid, len(vocab))
    for label, word in [(-1, ""), (1, ""), *([(-1, "red"), (0, "blue")] if text else [])]:
        cond = Conditioning(torch.full((len(images),), label), (word,) * len(images))
        bits = prior.bits(images, cond)
        assert bits.std() > 0.2, "the distribution must not be the uniform one"
        torch.testing.assert_close((-bits.double()).exp2().sum().item(), 1.0, atol=1e-5, rtol=0)


def test_the_top_is_a_maskgit_and_does_not_see_the_bottom():
    prior = small().eval()
    peer = MaskGIT([5], [2, 3], 2, width=16, depth=2, heads=2)
    peer.load_state_dict(prior.top.state_dict())
    codes, cond = random_codes(prior, 3), Conditioning(torch.tensor([0, 1, -1]))
    other = packed(codes[..., 0], unpacked(random_codes(prior, 3), 2)[1], 2)
    asked = spy(prior)
    for images in (codes, other):
        prior.bits(images, cond)
    half = len(asked["top"]) // 2
    for ours, theirs in zip(asked["top"][:half], asked["top"][half:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))
        assert ours[3] is None
    sampling = Sampling(steps=4)
    top = prior.sample(3, cond, sampling=sampling, seed=3)[..., :1]
    known = torch.full((3, 2, 3, 5), -1)
    known[..., 1:] = codes[..., 1:]
    assert torch.equal(prior.sample(3, cond, sampling=sampling, seed=3, known=known)[..., :1], top)
    assert cond.labels is not None
    nats = prior.top.group_nats(codes[..., 0].flatten(1), cond.labels).sum(1)
    torch.testing.assert_close(nats / math.log(2), peer.bits(codes[..., :1], cond))


def test_the_bottom_is_told_every_top_code():
    prior = small().eval()
    codes = random_codes(prior, 1)
    top, bottom = (level.flatten(1) for level in unpacked(codes, 2))
    labels, at = torch.tensor([-1]), torch.ones_like(bottom, dtype=torch.bool)
    tokens = torch.full_like(bottom, prior.bottom.mask_token)
    before = prior.bottom.predicted(prior.bottom.states(tokens, labels, at, prior._below(top, None)))[0]
    for n in range(6):
        changed = top.clone()
        changed[:, n] = (changed[:, n] + 1) % 5
        after = prior.bottom.predicted(prior.bottom.states(tokens, labels, at, prior._below(changed, None)))[0]
        assert ((after - before).abs().amax(-1) > 1e-4).all(), "at every position"


@pytest.mark.parametrize(("bottom_steps", "fewer"), [(1 / 3, 2), (1.0, 6), (0.01, 1), (1.5, 9)])
def test_each_level_takes_its_own_number_of_steps(bottom_steps: float, fewer: int):
    prior = small(bottom_steps=bottom_steps)
    calls = spy(prior)
    prior.sample(2, sampling=Sampling(steps=6))
    for name, positions, steps in (("top", 6, 6), ("bottom", 24, fewer)):
        counts = [positions, *remask_counts(positions, steps)][:-1]
        assert [at.sum(1).tolist() for _, _, at, _ in calls[name]] == [[n, n] for n in counts]


def test_levels_draw_from_different_noise():
    prior = small(0.0, classes=0, vocab=[7, 7], grid=[4, 4], bottom_steps=1.0)  # r = 1: as many positions
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.zero_()
    codes = prior.sample(8, sampling=Sampling(steps=1))
    assert (codes[..., 0] == codes[..., 1]).float().mean() < 0.5


def test_training_hides_label_and_text_from_both_levels_at_once():
    prior = small(text=reader(), label_dropout=0.25)
    calls, count = spy(prior), 400
    read: list[list[str]] = []
    prior.text.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))  # type: ignore[union-attr]
    prior.loss(random_codes(prior, count), Conditioning(torch.ones(count).long(), ("red cat",) * count))
    (top,), (bottom,), (texts,) = calls["top"], calls["bottom"], read
    assert torch.equal(top[1], bottom[1])
    assert (top[1] == -1).float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert [label == 1 for label in top[1].tolist()] == [text == "red cat" for text in texts]


def test_guidance_acts_on_both_levels_and_keeps_the_top():
    prior = small(text=reader())
    cond = Conditioning(torch.tensor([0, -1]), ("red", "blue"))
    calls = spy(prior)
    strong = prior.sample(2, cond, sampling=Sampling(guidance=3.0, steps=3))
    for _, labels, _, context in calls["top"] + calls["bottom"]:
        assert labels.tolist() == [0, -1, -1, -1]
        words = context.mask[:, -4:].sum(1).tolist()  # after a start token
        assert words[0] > 1
        assert words[1] > 1
        assert words[2:] == [1, 1], "a text of no words"
    states = prior.eval()._below(strong[..., 0].flatten(1), None).states
    for _, _, _, context in calls["bottom"]:
        torch.testing.assert_close(context.states[:, :6], states.repeat(2, 1, 1))
        assert context.mask[:, :6].all()
        assert context.mask.shape[1] == 6 + 1 + 3
    weak = prior.sample(2, cond, sampling=Sampling(guidance=-1.0, steps=3))
    assert torch.equal(weak, prior.sample(2, sampling=Sampling(steps=3)))


def test_losses_are_those_of_both_levels():
    prior = small(dropout=0.0, label_smoothing=0.2)
    calls, codes = spy(prior), random_codes(prior, 4)
    terms = prior.loss(codes)
    assert list(terms) == ["top_cross_entropy", "cross_entropy"]
    for name, level, grid in zip(("top", "bottom"), terms.values(), unpacked(codes, 2), strict=True):
        tokens, labels, at, context = calls[name][0]
        log_p = (
            getattr(prior, name).predicted(getattr(prior, name).states(tokens, labels, at, context))[0].log_softmax(-1)
        )
        true = log_p.gather(-1, grid.flatten(1)[at][:, None])[:, 0]
        torch.testing.assert_close(level, -(0.8 * true + 0.2 * log_p.mean(-1)).mean())
        assert torch.equal(tokens[~at], grid.flatten(1)[~at])


def test_features_are_those_of_the_top():
    prior = small(text=reader()).eval()
    codes, cond = random_codes(prior, 2), Conditioning(torch.tensor([0, -1]), ("red", ""))
    features = prior.features(codes, cond)
    assert [tuple(f.shape) for f in features] == [(2, 16)] * 3
    other = packed(codes[..., 0], unpacked(random_codes(prior, 2), 2)[1], 2)
    assert all(torch.equal(a, b) for a, b in zip(features, prior.features(other, cond), strict=True))
    assert features[-1].requires_grad


@pytest.mark.slow
def test_an_overfitted_prior_paints_what_the_caption_says():
    """Two images of which captions alone tell which is meant; the fine level has nothing else to know it by."""
    prior = small(
        0.0, classes=0, text=reader(16), width=32, bottom_width=32, depth=1, bottom_depth=1,
        dropout=0.0, label_smoothing=0.0, label_dropout=0.0,
    )  # fmt: skip
    images = random_codes(prior, 2)
    images[1, ..., 0] = images[0, ..., 0]  # the same top
    optimizer = torch.optim.AdamW(prior.parameters(), lr=5e-3, weight_decay=0.0)
    rows, texts = torch.arange(16) % 2, ("red", "blue") * 8
    for _ in range(120):
        optimizer.zero_grad()
        sum(prior.loss(images[rows], Conditioning(texts=texts)).values(), torch.zeros(())).backward()
        optimizer.step()
    cool = Sampling(temperature=0.3)
    assert torch.equal(prior.sample(8, Conditioning(texts=texts[:8]), sampling=cool), images[rows[:8]])
    assert (prior.bits(images, Conditioning(texts=texts[:2])) < 4).all()
    assert (prior.bits(images, Conditioning(texts=texts[1:3])) > 20).all(), "the other's caption"


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"Muse models codes of sizes \[top, bottom \* r \* r\], got 3: \[5, 7, 7\]"):
        small(vocab=[5, 7, 7])
    with pytest.raises(ValueError, match=r"Muse models grids of two axes, got 1 \(grid \[4\]\)"):
        small(grid=[4])
    with pytest.raises(ValueError, match="bottom_steps must be > 0, got 0"):
        small(bottom_steps=0)
    with pytest.raises(ValueError, match=r"label_dropout must be in \[0, 1\), got 1"):
        small(label_dropout=1)
    with pytest.raises(ValueError, match=r"'a cat that sits' has \d+ tokens, and at most 3 are read"):
        small(text=reader()).sample(1, Conditioning(texts=("a cat that sits",)))
