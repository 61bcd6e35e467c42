"""The level chooser: its probabilities are FSQ's, its search is exact, its usage is the definition."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement

import numpy as np
import pytest
import torch

from latticode.kernels.grid import BOUNDS
from latticode.quantizers import levels as chooser
from latticode.quantizers.fsq import FSQ
from latticode.quantizers.levels import bin_probabilities, expected_entropy, expected_usage, fine, recommend, search

# fact sheet A.3: computed once by other code, to three digits
PROBABILITIES = {
    3: [0.291, 0.418, 0.291],
    4: [0.124, 0.240, 0.313, 0.323],
    5: [0.165, 0.234, 0.202, 0.234, 0.165],
    8: [0.076, 0.137, 0.117, 0.112, 0.117, 0.134, 0.180, 0.127],
}
ENTROPIES = {3: 1.562, 4: 1.919, 5: 2.304, 6: 2.542, 7: 2.788, 8: 2.966, 16: 3.966}


@pytest.mark.parametrize("level", PROBABILITIES)
def test_probabilities_are_the_papers(level):
    assert bin_probabilities(level) == pytest.approx(PROBABILITIES[level], abs=1e-3)


@pytest.mark.parametrize("level", ENTROPIES)
def test_entropies_are_the_papers(level):
    assert expected_entropy([level]) == pytest.approx(ENTROPIES[level], abs=1e-3)


def test_equal_bins_with_slope_1_6_are_nearly_uniform():
    for level in range(2, 17):
        assert expected_entropy([level], "equal-bins", 1.6) >= 0.9975 * math.log2(level)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("slope", [2.0, 1.6])
def test_probabilities_are_those_of_fsq(bound, slope):
    levels = list(range(2, 17))
    quantizer = FSQ(levels, bound=bound, slope=slope)
    n = 100_000
    z = torch.randn(n, len(levels), generator=torch.Generator().manual_seed(0))
    digits = quantizer.digits(quantizer.encode(z))
    for channel, level in enumerate(levels):
        p = bin_probabilities(level, bound, slope)
        seen = np.bincount(digits[:, channel].numpy(), minlength=level) / n
        assert p.sum() == pytest.approx(1)
        assert (abs(seen - p) < 5 * np.sqrt(p * (1 - p) / n)).all()


@pytest.mark.parametrize("size", chooser.TABLE)
def test_the_papers_table(size):
    by_size, by_bits = recommend(size=size), recommend(bits=math.log2(size))
    assert by_size == by_bits
    assert by_size.source == "paper's table"
    assert abs(by_size.bits - math.log2(size)) < chooser.TOLERANCE
    FSQ(by_size.levels)


@pytest.mark.parametrize("target", [25, 33, 60, 128, 350, 1001, 5000, 8192, 77_777, 2**17, 2**20, 10**6 + 1])
def test_search_is_exact(target):
    """Against every multiset of {5, .., 8} with up to nine channels."""
    products = [math.prod(c) for n in range(1, 10) for c in combinations_with_replacement((5, 6, 7, 8), n)]
    found = search(target)
    nearest = min(abs(math.log2(p / target)) for p in products)
    assert abs(math.log2(math.prod(found) / target)) == pytest.approx(nearest, abs=1e-12)
    assert list(found) == sorted(found, reverse=True)


@pytest.mark.parametrize("target", [90, 100, 560])
def test_gaps_are_filled_by_wider_levels(target):
    found = search(target)
    assert math.prod(found) == target
    assert max(found) == min(max(c) for n in (1, 2, 3, 4) for c in combinations_with_replacement(range(5, 17), n)
                             if math.prod(c) == target)  # fmt: skip


@pytest.mark.parametrize("size", range(2, 17))
def test_small_targets(size):
    found = recommend(size=size)
    assert found.levels == ((5, 3) if size == 16 else (size,))
    assert (found.source == "below the rule") == (size < 5)
    assert found.bound == ("symmetric" if size == 2 else "paper")


@pytest.mark.parametrize("target", [*range(4, 70), 100, 1000, 4096, 65536, 2.0**10.5, 2**24])
def test_fine_levels_are_the_nearest_equal_ones(target):
    def distance(levels):
        return abs(math.log2(math.prod(levels) / target))

    levels = fine(target)
    channels = min(4, max(2, round(math.log2(target) / 3)))
    equal = [(low + 1,) * more + (low,) * (channels - more) for low in range(2, 99) for more in range(channels)]
    assert levels in equal
    assert distance(levels) == min(map(distance, equal))


def test_fine_levels_below_four_codes():
    assert [fine(target) for target in (2, 3, 3.5)] == [(2,), (3,), (4,)]


@pytest.mark.parametrize("bits", [5, 7, 10.5, 13, 15, 17, 20, 24.3, 32, 40, 48.8, 61.99, 62])
def test_every_target_gets_usable_levels(bits):
    found = recommend(bits=bits)
    assert all(5 <= level <= 8 for level in found.levels)
    assert found.size == math.prod(found.levels) < 2**63
    assert abs(found.bits - bits) < chooser.TOLERANCE
    assert 0 < found.entropy <= found.bits
    assert 0 < found.usage <= 1
    FSQ(found.levels)


@pytest.mark.parametrize("tokens", [1, 1000, 1_000_000])
@pytest.mark.parametrize("levels", [[3], [8, 5, 5, 5], [5, 8, 6, 8, 8], [4] * 6])
def test_usage_is_its_definition(levels, tokens):
    p = np.ones(1)
    for level in levels:
        p = np.multiply.outer(p, bin_probabilities(level)).ravel()
    direct = (1 - (1 - p) ** tokens).mean()
    assert expected_usage(levels, tokens) == pytest.approx(direct, rel=1e-9)


@pytest.mark.parametrize("tokens", [1000, 1_000_000])
@pytest.mark.parametrize("levels", [(8, 8, 8, 6, 5), (8,) * 6, (7, 6, 5, 5, 5, 5, 5)])
def test_usage_of_large_codebooks_is_near_the_exact_one(levels, tokens, monkeypatch):
    exact = expected_usage(levels, tokens)
    monkeypatch.setattr(chooser, "EXACT_CELLS", 0)
    assert expected_usage(levels, tokens) == pytest.approx(exact, rel=1e-4)


def test_digits_that_are_never_reached_count_as_unused(monkeypatch):
    assert bin_probabilities(8, slope=0.05)[0] == 0
    assert 0 < expected_entropy([8], slope=0.05) < 2
    exact = expected_usage([8, 8], 10, slope=0.05)
    monkeypatch.setattr(chooser, "EXACT_CELLS", 0)
    assert expected_usage([8, 8], 10, slope=0.05) == pytest.approx(exact, rel=1e-4)
    assert exact < 0.2


def test_usage_of_fsq_itself():
    quantizer = FSQ([8, 5, 5, 5])
    codes = quantizer.encode(torch.randn(2000, 4, generator=torch.Generator().manual_seed(1)))
    assert len(codes.unique()) / 1000 == pytest.approx(expected_usage([8, 5, 5, 5], 2000), abs=0.02)


@pytest.mark.parametrize(
    ("call", "number"),
    [
        ({}, "None"),
        ({"size": 64, "bits": 6}, "64"),
        ({"size": 1}, "1"),
        ({"size": -5}, "-5"),
        ({"size": 2**62 + 1}, str(2**62 + 1)),
        ({"size": 10.5}, "10.5"),
        ({"size": True}, "True"),
        ({"bits": 62.5}, "62.5"),
        ({"bits": 0.5}, "0.5"),
        ({"bits": math.nan}, "nan"),
        ({"bits": 8, "bound": "tight"}, "tight"),
        ({"bits": 8, "slope": 0.0}, "0.0"),
        ({"bits": 8, "tokens": 0}, "0"),
    ],
)
def test_nonsense_is_refused_with_its_numbers(call, number):
    with pytest.raises(ValueError, match=number):
        recommend(**call)


def test_level_two():
    assert bin_probabilities(2) == pytest.approx([0.059, 0.941], abs=1e-3)
    assert bin_probabilities(2, "symmetric") == pytest.approx([0.5, 0.5])
    with pytest.raises(ValueError, match="got 1"):
        bin_probabilities(1, "symmetric")
