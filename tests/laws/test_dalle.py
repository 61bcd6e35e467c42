"""Laws of one stream of text and image: masks, order, cache, and what is counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latticode.core.types import Conditioning, Sampling
from latticode.priors import base
from latticode.priors.dalle import DALLE, KINDS, kind_of, sparse_mask
from latticode.priors.text import BPE

CAPTIONS = ("a red cat", "a cat", "", "a red")
LENGTH, POSITIONS = 5, 12
every_kind = pytest.mark.parametrize("kind", [*KINDS, "mixed"])


def small(kind: str = "mixed", **changes: Any) -> DALLE:
    """In eval mode, with weights far from their initial values; all layers of one kind of mask, or as in the paper."""
    torch.manual_seed(0)
    bpe = BPE(size=264, length=LENGTH)
    bpe.fit(CAPTIONS)
    arguments: dict = {"vocab": [11], "grid": [3, 4], "width": 16, "depth": 3, "heads": 2, "kernel": 3} | changes
    prior = DALLE(text=bpe, **arguments).eval()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    if kind != "mixed":
        prior.kinds = [kind] * prior.depth
    return prior


def tokens(prior: DALLE) -> tuple[Tensor, Tensor]:
    return prior.text(CAPTIONS), torch.randint(prior.vocab[0], (len(CAPTIONS), prior.positions))


def told(*texts: str) -> Conditioning:
    return Conditioning(texts=texts)


# --- masks


def test_masks_are_those_of_the_paper():
    """On 4 x 4 as in figure 11: how far back the token at row 2, column 1 sees, and the last row's first."""

    def back(kind: str, position: int) -> list[int]:
        row = sparse_mask(kind, 6, 16, 4, 3)[7 + position]
        assert row[:7].all(), "all text is seen"
        return [position - int(i) for i in row[7:].nonzero()][::-1]

    assert back("row", 9) == back("row", 12) == [0, 1, 2, 3, 4]
    assert back("column", 9) == [0, 4, 8]
    assert back("column", 12) == [0, 4, 8, 12]
    assert back("convolution", 9) == back("convolution", 12) == [0, 1, 3, 4, 5]
    for kind in KINDS:
        mask = sparse_mask(kind, 6, 16, 4, 3)
        assert torch.equal(mask, mask.tril())
        assert torch.equal(mask[:7], torch.ones(7, 22, dtype=torch.bool).tril()), "text is causal"


def test_layers_are_those_of_the_paper():
    kinds = [kind_of(layer, 64) for layer in range(1, 65)]
    assert kinds[:6] == ["row", "column", "row", "row", "row", "column"]
    assert [i for i, kind in enumerate(kinds, 1) if kind == "column"] == list(range(2, 64, 4))
    assert [i for i, kind in enumerate(kinds, 1) if kind == "convolution"] == [64]
    assert small().kinds == ["row", "column", "convolution"]


# --- order


@every_kind
def test_no_token_sees_itself_or_a_later_one(kind: str):
    """Changing one token leaves the logits of its own and of all earlier slots as they are, to the bit."""
    prior = small(kind)
    ids, codes = tokens(prior)
    with torch.no_grad():
        before = prior.logits(ids, codes)
        for n in (0, 5, 10):
            changed = codes.clone()
            changed[:, n] = (changed[:, n] + 1) % 11
            text, image = prior.logits(ids, changed)
            assert torch.equal(text, before[0])
            assert torch.equal(image[:, : n + 1], before[1][:, : n + 1])
            assert (image[:, n + 1] != before[1][:, n + 1]).any(-1).all()
        for n in (0, LENGTH - 1):
            changed = ids.clone()
            changed[:, n] = (changed[:, n] + 1) % 264
            text, image = prior.logits(changed, codes)
            assert torch.equal(text[:, : n + 1], before[0][:, : n + 1])
            assert (image != before[1]).any(-1).all(), "all of the image sees all of the text"


def test_every_layer_has_its_own_mask():
    """With one layer, the last position depends on the text and on what its mask shows, and on nothing else."""
    for kind, seen in (("row", {6, 7, 8, 9, 10}), ("column", {2, 6, 10}), ("convolution", {5, 6, 7, 9, 10})):
        prior = small(kind, depth=1)
        ids, codes = tokens(prior)
        with torch.no_grad():
            before = prior.logits(ids, codes)[1][:, -1]
            for n in range(POSITIONS - 1):
                changed = codes.clone()
                changed[:, n] = (changed[:, n] + 1) % 11
                same = torch.equal(prior.logits(ids, changed)[1][:, -1], before)
                assert same is (n not in seen), (kind, n)


@every_kind
@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("prompt", [0, 5])
def test_logits_with_a_cache_are_those_without(
    kind: str, guidance: float, prompt: int, monkeypatch: pytest.MonkeyPatch
):
    prior, seen = small(kind), []
    monkeypatch.setattr(base, "filtered", lambda logits, sampling: seen.append(logits) or logits)
    known = torch.full((4, 12), -1)
    known[:, :prompt] = 3
    codes = prior.sample(4, told(*CAPTIONS), sampling=Sampling(guidance=guidance), known=known.view(4, 3, 4, 1))
    with torch.no_grad():
        _, expected = prior.logits(prior.text(CAPTIONS), codes.flatten(1))
        _, plain = prior.logits(prior.text([""] * 4), codes.flatten(1))
    assert len(seen) == 12 - prompt
    for n, logits in enumerate(seen, prompt):
        whole = expected[:, n] + guidance * (expected[:, n] - plain[:, n])
        torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)


def test_every_step_of_decoding_has_the_same_shapes():
    prior, shapes = small(), []
    original = prior.context
    prior.context = lambda x, at, cache: shapes.append((x.shape, at.shape, cache.shape)) or original(x, at, cache)  # type: ignore[method-assign]
    prior.sample(2, told("a cat", "a red"), sampling=Sampling(guidance=1.0))
    assert shapes[0][0] == (4, 1 + LENGTH, 16), "the text is read at once"
    assert len(shapes) == 12
    assert all(each == shapes[1] for each in shapes[1:])
    assert shapes[1] == ((4, 1, 16), (1,), (3, 2, 4, 2, LENGTH + 12, 8))


# --- text


def test_every_padding_position_has_its_own_token():
    prior = small()
    ids, codes = tokens(prior)
    logits = prior.logits(ids, codes)[1]
    logits[1].sum().backward()
    count = int((ids[1] > 0).sum())
    assert 0 < count < LENGTH
    assert prior.padding.grad is not None
    assert prior.padding.grad.any(1).tolist() == [False] * count + [True] * (LENGTH - count)


def test_the_loss_of_the_text_counts_its_tokens_and_its_end():
    prior = small(text_dropout=0.0)
    codes = torch.randint(11, (4, 3, 4, 1))
    terms = prior.loss(codes, told(*CAPTIONS))
    ids = prior.text(CAPTIONS)
    nats = -prior.logits(ids, codes.flatten(1))[0].log_softmax(-1)
    each = []
    for row, spent in zip(ids.tolist(), nats, strict=True):
        used = sum(i > 0 for i in row)
        each += [spent[n, row[n]] for n in range(min(used + 1, LENGTH) if used else 0)]
    torch.testing.assert_close(terms["text_cross_entropy"], torch.stack(each).mean())
    torch.testing.assert_close(
        terms["cross_entropy"] * POSITIONS, prior.bits(codes, told(*CAPTIONS)).mean() * math.log(2)
    )
    assert prior.loss(codes)["text_cross_entropy"] == 0


def test_training_hides_texts():
    prior, seen = small(text_dropout=0.25, depth=1), []
    original = prior.logits
    prior.logits = lambda ids, codes: seen.append(ids) or original(ids, codes)  # type: ignore[method-assign]
    prior.loss(torch.zeros(2000, 3, 4, 1, dtype=torch.int64), told(*["a cat"] * 2000))
    assert (seen[0] == 0).all(1).float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert len(seen[0].unique(dim=0)) == 2


def test_a_text_changes_what_is_drawn_and_guidance_moves_it_further():
    prior = small()
    codes = torch.randint(11, (1, 3, 4, 1))
    bits = [prior.bits(codes, told(text)).item() for text in CAPTIONS]
    assert len(set(bits)) == len(CAPTIONS)
    plain, red, far = (
        prior.sample(8, told(*[text] * 8), sampling=Sampling(guidance=w), seed=1)
        for text, w in (("", 2.0), ("a red", 0.0), ("a red", 2.0))
    )
    assert torch.equal(plain, prior.sample(8, seed=1))
    assert not torch.equal(plain, red)
    assert not torch.equal(red, far)


def test_what_it_refuses():
    prior = small()
    with pytest.raises(ValueError, match="classes must be 0, DALL-E is told texts and not labels, got 3"):
        small(classes=3)
    with pytest.raises(ValueError, match="one code per position, got 2"):
        small(vocab=[3, 3])
    with pytest.raises(ValueError, match="kernel must be odd and >= 1, got 4"):
        small(kernel=4)
    with pytest.raises(ValueError, match="text_dropout must be in"):
        small(text_dropout=1.0)
    with pytest.raises(ValueError, match="one text for each of 2 images, got 1"):
        prior.sample(2, told("a cat"))
    with pytest.raises(ValueError, match=r"has 1\d tokens, and at most 5 are read"):
        prior.sample(1, told("blue giraffe"))
    with pytest.raises(ValueError, match="label 0 is not valid; valid: only -1"):
        prior.sample(1, Conditioning(torch.zeros(1, dtype=torch.int64)))
