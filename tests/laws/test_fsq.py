"""FSQ against the paper's numbers and formulas."""

from __future__ import annotations

import math

import pytest
import torch

from latticode import FSQ
from latticode.quantizers.fsq import EPS
from latticode.quantizers.levels import TABLE

UNIT_NORMAL = {  # bin probabilities under N(0, 1), three digits
    3: (0.291, 0.418, 0.291),
    4: (0.124, 0.240, 0.313, 0.323),
    5: (0.165, 0.234, 0.202, 0.234, 0.165),
    8: (0.076, 0.137, 0.117, 0.112, 0.117, 0.134, 0.180, 0.127),
}


def shares(fsq: FSQ, count: int = 400_000) -> torch.Tensor:
    digits = fsq.digits(fsq.encode(torch.randn(count, fsq.dim)))
    return torch.stack([(digits[:, 0] == k).float().mean() for k in range(fsq.levels[0])])


def test_notebook_vector() -> None:
    result = FSQ([3, 5, 4])(torch.tensor([0.25, 0.6, -7.0]))
    assert result.latents.tolist() == [0.0, 0.5, -1.0]
    assert result.codes.tolist() == [10]
    assert not result.losses


@pytest.mark.parametrize("levels", [pair[1] for pair in sorted(TABLE.items())], ids=str)
def test_index_round_trip_over_the_whole_book(levels: tuple[int, ...]) -> None:
    fsq = FSQ(list(levels))
    codes = torch.arange(fsq.vocab[0])[:, None]
    assert torch.equal(fsq.index(fsq.digits(codes).float()), codes)
    latents = fsq.decode(codes)
    assert len(latents.unique(dim=0)) == fsq.vocab[0]
    # A code's latent, taken back through the inverse of the bound, encodes to the code.
    positions = fsq.digits(codes).double()
    half = (torch.tensor(levels) - 1) * (1 - EPS) / 2
    offset = (1 - torch.tensor(levels) % 2) / 2
    inside = ((positions - torch.tensor(levels) // 2 + offset) / half).clamp(-1 + 1e-9, 1 - 1e-9)
    z = torch.atanh(inside) - torch.atanh(offset / half)
    assert torch.equal(fsq.encode(z.float()), codes)


@pytest.mark.parametrize("level", range(3, 17))
def test_bound_of_zero_is_zero(level: int) -> None:
    assert FSQ([level]).position(torch.zeros(1)).item() == pytest.approx(level // 2, abs=1e-6)


def test_atanh_shift_is_close_to_the_published_tan() -> None:
    half = 3 * (1 - EPS) / 2
    assert math.atanh(0.5 / half) == pytest.approx(math.tan(0.5 / half), abs=5e-4)


@pytest.mark.parametrize(("level", "low", "high"), [(4, -1.9985, 0.9985), (5, -1.998, 1.998), (8, -3.9965, 2.9965)])
def test_range_before_rounding(level: int, low: float, high: float) -> None:
    ends = FSQ([level]).position(torch.tensor([[-50.0], [50.0]])).flatten() - level // 2
    assert ends.tolist() == pytest.approx([low, high], abs=1e-4)


@pytest.mark.parametrize(("level", "slope"), [(4, 0.666), (5, 0.999), (8, 0.856)])
def test_gradient_at_zero(level: int, slope: float) -> None:
    z = torch.zeros(1, requires_grad=True)
    FSQ([level])(z).latents.sum().backward()
    assert z.grad is not None
    assert z.grad.item() == pytest.approx(slope, abs=1e-3)


@pytest.mark.parametrize("level", UNIT_NORMAL)
def test_bins_under_unit_normal(level: int) -> None:
    assert shares(FSQ([level])).tolist() == pytest.approx(UNIT_NORMAL[level], abs=4e-3)


@pytest.mark.parametrize("bound", ["symmetric", "equal-bins"])
def test_two_levels_are_balanced(bound: str) -> None:
    assert shares(FSQ([2], bound)).tolist() == pytest.approx([0.5, 0.5], abs=4e-3)


@pytest.mark.parametrize("level", range(2, 17))
def test_equal_bins_with_slope_1_6_use_every_bin_alike(level: int) -> None:
    p = shares(FSQ([level], "equal-bins", slope=1.6))
    assert -(p * p.log2()).sum() / math.log2(level) >= 0.9975


@pytest.mark.parametrize("bound", ["symmetric", "equal-bins"])
@pytest.mark.parametrize("level", [2, 3, 4, 7, 8])
def test_symmetric_grids(bound: str, level: int) -> None:
    fsq = FSQ([level], bound)
    grid = fsq.decode(torch.arange(level)[:, None]).flatten()
    torch.testing.assert_close(grid, torch.linspace(-1, 1, level))
    z = torch.randn(1000, 1)
    z = z[((fsq.position(z) + 0.5) % 1 > 1e-4).squeeze(1)]  # off the bin edges
    assert torch.equal(fsq.digits(fsq.encode(-z)), level - 1 - fsq.digits(fsq.encode(z)))


@pytest.mark.parametrize("levels", [[2**31], [2**40, 2**22], [8] * 20, [16] * 15 + [5]], ids=str)
def test_index_is_exact_up_to_63_bits(levels: list[int]) -> None:
    fsq = FSQ(levels, "symmetric")
    size = fsq.vocab[0]
    codes = torch.tensor([[0], [1], [size // 3], [size // 2], [size - 2], [size - 1]])
    digits = fsq.digits(codes)
    basis = [math.prod(levels[:i]) for i in range(len(levels))]
    for row, code in zip(digits.tolist(), codes.flatten().tolist(), strict=True):
        assert sum(d * b for d, b in zip(row, basis, strict=True)) == code
    if max(levels) < 2**24:  # digits travel as float32 there
        assert torch.equal(fsq.index(digits.float()), codes)


def test_no_state_and_no_codebook() -> None:
    fsq = FSQ([8] * 20)
    assert not fsq.state_dict()
    assert not list(fsq.parameters())
    assert sum(b.numel() for b in fsq.buffers()) <= 2 * fsq.dim


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": [1, 5]}, r"levels must be integers >= 3 .* got \[1, 5\]"),
        ({"levels": [2, 5]}, "for L = 2 use bound='symmetric'"),
        ({"levels": []}, "levels must be"),
        ({"levels": [8] * 21}, r"below 2\^63"),
        ({"levels": [8], "bound": "sine"}, "bound must be one of paper, symmetric, equal-bins, got 'sine'"),
        ({"levels": [8], "slope": 0.0}, "slope must be > 0, got 0.0"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FSQ(**arguments)
