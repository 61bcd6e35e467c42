"""Laws of masked priors over many codes: logits of a few positions at a time, codes as digits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from helpers import Largest
from latticode import FSQ, LFQ, kernels
from latticode.core import registry
from latticode.core.types import Conditioning, Sampling
from latticode.kernels import vocabulary
from latticode.priors import MAGE, MaskGIT


def small(codes: int, **changes: Any) -> MaskGIT:
    torch.manual_seed(0)
    return MaskGIT([codes], [4, 4], 2, **{"width": 32, "depth": 2, "heads": 2, **changes})


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tiles_change_neither_samples_nor_bits(temperature: float, monkeypatch: pytest.MonkeyPatch):
    """With guidance and temperature of the head's states, or of whole logits."""
    monkeypatch.setattr(vocabulary, "ROWS", 3)
    monkeypatch.setattr(vocabulary, "BLOCK", 50)
    prior = small(300)
    cond = Conditioning(torch.tensor([0, 1, 1, 0]))
    codes = torch.randint(300, (4, 4, 4, 1))
    sampling = Sampling(steps=4, guidance=2.0, temperature=temperature)
    with Largest() as largest:
        sampled, bits = prior.sample(4, cond, sampling=sampling), prior.bits(codes, cond)
    assert largest.numel < 64 * 300, "positions times codes"
    with kernels.use("reference"):
        assert torch.equal(prior.sample(4, cond, sampling=sampling), sampled)
        torch.testing.assert_close(prior.bits(codes, cond), bits)
    one_by_one = prior.sample(4, cond, sampling=replace(sampling, top_k=300))  # leaves none out, but looks for it
    assert torch.equal(one_by_one, sampled)


# --- digits


@pytest.mark.parametrize("inner_depth", [0, 1])
def test_the_loss_is_the_sum_of_the_digits(inner_depth: int):
    """And what a digit is told: the others of its position only where they come in turn, and before it."""
    prior = small(30, digits=[5, 3, 2], inner_depth=inner_depth).eval()
    y, codes = torch.randn(40, prior.width), torch.randint(30, (40,))
    logits = prior.predicted(y, codes)
    assert [part.shape[1] for part in logits] == [5, 3, 2]
    symbols = prior.symbols.split(codes[:, None])
    expected = sum(F.cross_entropy(p, symbols[:, i], label_smoothing=0.1) for i, p in enumerate(logits))
    torch.testing.assert_close(prior.smoothed(y, codes), expected)
    other = prior.predicted(y, prior.symbols.join((symbols + torch.tensor([0, 1, 0])) % torch.tensor([5, 3, 2]))[:, 0])
    same = [torch.equal(a, b) for a, b in zip(logits, other, strict=True)]
    assert same == [True, True, inner_depth == 0]


@pytest.mark.parametrize("kind", [MaskGIT, MAGE])
@pytest.mark.parametrize("inner_depth", [0, 1])
def test_a_large_vocabulary_has_no_large_softmax(kind: type[MaskGIT | MAGE], inner_depth: int):
    """MAGVIT-v2's 2^18 codes as two digits of 512: 1024 rows of embedding, and nothing of 2^18 anywhere."""
    prior = kind([2**18], [4, 4], digits=[512, 512], width=32, depth=2, heads=2, inner_depth=inner_depth)
    assert prior.embedding.weight.shape == (1025, 32)
    codes = torch.randint(2**18, (2, 4, 4, 1))
    with Largest() as largest:
        prior.loss(codes)["cross_entropy"].backward()
        prior.bits(codes)
        drawn = prior.sample(2)
    assert largest.numel <= 1025 * 32
    prior.check_codes(drawn)


@pytest.mark.slow
def test_digits_in_turn_learn_what_independent_ones_cannot():
    """Two digits that always agree: one bit a position in turn, two if each is drawn by itself."""
    costs = {}
    for inner_depth in (0, 1):
        prior = small(4, digits=[2, 2], inner_depth=inner_depth, dropout=0.0, label_smoothing=0.0)
        optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        codes = torch.empty(0)
        for _ in range(150):
            codes = torch.randint(2, (16, 4, 4, 1), generator=generator) * 3
            optimizer.zero_grad()
            prior.loss(codes)["cross_entropy"].backward()
            optimizer.step()
        costs[inner_depth] = prior.bits(codes).mean().item() / 16
        agree = prior.sample(32, seed=1) % 3 == 0
        assert agree.float().mean().item() == (1.0 if inner_depth else pytest.approx(0.5, abs=0.1))
    assert costs == {0: pytest.approx(2, abs=0.1), 1: pytest.approx(1, abs=0.1)}


@pytest.mark.parametrize(
    ("quantizer", "radix"),
    [
        (FSQ([8, 5, 5]), (8, 5, 5)),
        (FSQ([8, 5, 5, 8, 5, 5], factors=2), None),
        (LFQ(18), (512, 512)),
        (LFQ(14), (128, 128)),
        (LFQ(19), (128, 64, 64)),
        (LFQ(4), (16,)),
    ],
)
def test_digits_are_numbered_as_the_quantizer_numbers_its_channels(quantizer: Any, radix: tuple[int, ...] | None):
    assert quantizer.radix == radix
    if radix is None:
        return
    prior = small(math.prod(radix), digits=list(radix))
    symbols = torch.zeros(len(radix), len(radix), dtype=torch.int64) + torch.eye(len(radix), dtype=torch.int64)
    plain, changed = (
        quantizer.decode(torch.zeros(1, 1, dtype=torch.int64)),
        quantizer.decode(prior.symbols.join(symbols)),
    )
    moved = [row.nonzero().flatten().tolist() for row in changed - plain]
    bits = [size.bit_length() - 1 for size in radix]
    firsts = range(len(radix)) if isinstance(quantizer, FSQ) else [sum(bits[:i]) for i in range(len(radix))]
    assert moved == [[first] for first in firsts]


def test_quantizers_of_others_have_the_digits_that_all_have():
    fsq, vq = {"type": "fsq", "levels": [5, 3]}, {"type": "vq", "size": 8, "dim": 2}
    for spec, radix in (
        ({"type": "projected", "dim": 7, "quantizer": fsq}, (5, 3)),
        ({"type": "grouped", "quantizers": fsq, "groups": 2}, (5, 3)),
        ({"type": "residual", "stages": {**fsq, "bound": "clamp"}, "depth": 3}, (5, 3)),
        ({"type": "grouped", "quantizers": [fsq, vq]}, None),
        ({"type": "residual", "stages": [vq, {**vq, "size": 4}]}, None),
        (vq, None),
    ):
        assert registry.build(spec).radix == radix


def test_bad_digits_are_named():
    with pytest.raises(ValueError, match=r"digits must multiply .*, got \[5, 5\] = 25 for \[30\]"):
        small(30, digits=[5, 5])
    with pytest.raises(ValueError, match=r"inner_depth must be >= 0 .* got -1"):
        small(30, inner_depth=-1)
