"""FSQ against the paper's numbers and formulas."""

from __future__ import annotations

import math

import pytest
import torch

from latticode import FSQ
from latticode.kernels.grid import BOUNDS, EPS
from latticode.quantizers.gradients import rotation
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
    assert torch.equal(fsq.index(fsq.digits(codes)), codes)
    latents = fsq.decode(codes)
    assert len(latents.unique(dim=0)) == fsq.vocab[0]
    # A code's latent, taken back through the inverse of the bound, encodes to the code.
    positions = fsq.digits(codes).double()
    half = (torch.tensor(levels) - 1) * (1 - EPS) / 2
    offset = (1 - torch.tensor(levels) % 2) / 2
    inside = ((positions - torch.tensor(levels) // 2 + offset) / half).clamp(-1 + 1e-9, 1 - 1e-9)
    z = torch.atanh(inside) - torch.tan(offset / half)
    assert torch.equal(fsq.encode(z.float()), codes)


@pytest.mark.parametrize("level", range(2, 17))
def test_bound_of_zero_is_near_zero(level: int) -> None:
    """Exactly for odd levels; within what the published tan is off from atanh for even ones, and for 2 not at all."""
    zero = FSQ([level]).bounded(torch.zeros(1)).item() * (level // 2)
    assert zero == pytest.approx(-0.043 if level == 2 else 0.0, abs=(1 - level % 2) * 5e-4 + 1e-6)


def test_two_published_levels_are_not_balanced() -> None:
    assert shares(FSQ([2])).tolist() == pytest.approx([0.059, 0.941], abs=2e-3)


@pytest.mark.parametrize(("level", "low", "high"), [(4, -1.9985, 0.9985), (5, -1.998, 1.998), (8, -3.9965, 2.9965)])
def test_range_before_rounding(level: int, low: float, high: float) -> None:
    ends = FSQ([level]).bounded(torch.tensor([[-50.0], [50.0]])).flatten() * (level // 2)
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


@pytest.mark.parametrize("bound", ["symmetric", "equal-bins", "clamp"])
@pytest.mark.parametrize("level", [2, 3, 4, 7, 8])
def test_symmetric_grids(bound: str, level: int) -> None:
    fsq = FSQ([level], bound)
    grid = fsq.decode(torch.arange(level)[:, None]).flatten()
    torch.testing.assert_close(grid, torch.linspace(-1, 1, level))
    z = torch.randn(1000, 1)
    place = (fsq.bounded(z) + 1) * (level - 1) / 2
    z = z[((place - 0.5 - (place - 0.5).round()).abs() > 1e-4).squeeze(1)]  # off the bin edges
    assert torch.equal(fsq.digits(fsq.encode(-z)), level - 1 - fsq.digits(fsq.encode(z)))


@pytest.mark.parametrize("level", [2, 3, 8, 17])
def test_clamp_leaves_the_grid_and_what_lies_on_it_alone(level: int) -> None:
    fsq = FSQ([level], "clamp")
    grid = fsq.decode(torch.arange(level)[:, None])
    assert torch.equal(fsq(grid).latents, grid)
    z = torch.linspace(-1, 1, 1001)[:, None]
    assert (fsq(z).latents - z).abs().max() <= 1 / (level - 1) + 1e-6


@pytest.mark.parametrize("levels", [[2**20] * 3, [2**22, 2, 2**22, 2**17], [8] * 20, [16] * 15 + [5]], ids=str)
def test_index_is_exact_up_to_63_bits(levels: list[int]) -> None:
    fsq = FSQ(levels, "symmetric")
    size = fsq.vocab[0]
    codes = torch.tensor([[0], [1], [size // 3], [size // 2], [size - 2], [size - 1]])
    digits = fsq.digits(codes)
    basis = [math.prod(levels[:i]) for i in range(len(levels))]
    for row, code in zip(digits.tolist(), codes.flatten().tolist(), strict=True):
        assert sum(d * b for d, b in zip(row, basis, strict=True)) == code
    assert torch.equal(fsq.index(digits), codes)


@pytest.mark.parametrize("factors", [1, 2, 3, 6])
def test_factors_cut_the_channels_into_runs(factors: int) -> None:
    levels = [8, 3, 5, 2, 4, 7]
    whole, fsq = FSQ(levels), FSQ(levels, factors=factors)
    run = 6 // factors
    assert fsq.vocab == tuple(math.prod(levels[i : i + run]) for i in range(0, 6, run))
    assert fsq.bits == pytest.approx(whole.bits)
    z = torch.randn(200, 6)
    assert torch.equal(fsq(z).latents, whole(z).latents)
    digits = whole.digits(whole.encode(z))
    assert torch.equal(fsq.digits(fsq.encode(z)), digits)
    assert torch.equal(fsq.index(digits), fsq.encode(z))
    if factors == 6:
        assert torch.equal(fsq.encode(z), digits)


def test_digits_for_more_than_63_bits() -> None:
    fsq = FSQ([16] * 20, factors=20)
    z = torch.randn(100, 20)
    out = fsq(z)
    assert out.codes.shape == (100, 20)
    assert torch.equal(fsq.decode(out.codes), out.latents)


@pytest.mark.parametrize("bound", BOUNDS)
def test_contraction_is_half_the_distance_of_neighbours(bound: str) -> None:
    """As a share of the reach of the grid, from which the width of what is left follows."""
    levels = [2, 3, 4, 7, 8]
    fsq = FSQ(levels, bound)
    for channel, (share, reach) in enumerate(zip(fsq.contraction, fsq.reach, strict=True)):
        digits = torch.zeros(levels[channel], len(levels), dtype=torch.int64)
        digits[:, channel] = torch.arange(levels[channel])
        spacing = fsq.decode(fsq.index(digits))[:, channel].diff()
        assert spacing.tolist() == pytest.approx([2 * share * reach] * len(spacing), abs=1e-6)


@pytest.mark.parametrize("bound", BOUNDS)
def test_noise_draws_three_ways(bound: str) -> None:
    """Of the samples, p keep the bounded value twice, (1 - p) p the hard one, and 1 - p get one bin of noise."""
    fsq, hard = FSQ([8, 3], bound, noise=0.3), FSQ([8, 3], bound)
    z = (torch.randn(4000, 2) / 2).clamp(-1, 1)[:, None].expand(-1, 25, -1).contiguous()
    out, sure, bounded = fsq(z), hard(z), hard.bounded(z)
    assert torch.equal(out.codes, sure.codes)
    soft = torch.isclose(out.latents, bounded).flatten(1).all(1)
    rounded = (out.latents == sure.latents).flatten(1).all(1)
    noisy = ~(soft | rounded)
    assert [part.float().mean().item() for part in (soft, rounded, noisy)] == pytest.approx([0.09, 0.21, 0.7], abs=0.03)
    noise = (out.latents - bounded)[noisy]
    for channel, level in enumerate(fsq.levels):
        half = (level // 2 if bound == "paper" else (level - 1) / 2) ** -1 / 2
        drawn = noise[..., channel]
        assert drawn.abs().max() == pytest.approx(half, rel=1e-3)
        assert drawn.mean().item() == pytest.approx(0, abs=half / 50)
        assert drawn.square().mean().item() == pytest.approx(half**2 / 3, rel=0.02)
    assert torch.equal(fsq.eval()(z).latents, sure.latents)


def test_noise_keeps_the_gradient_of_the_bound() -> None:
    fsq, hard = FSQ([8, 3, 5], noise=0.5), FSQ([8, 3, 5])
    z = torch.randn(300, 3)
    z[7, 1] = torch.nan
    gradients = []
    for one in (fsq, hard):
        leaf = z.clone().requires_grad_()
        latents = one(leaf).latents
        gradients.append(torch.autograd.grad(latents[~z.isnan()].sum(), leaf)[0][~z.isnan()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_gradient_may_pass_the_rounding_by_rotation(bound: str) -> None:
    turned, straight = FSQ([8, 3, 5], bound, gradient="rotation"), FSQ([8, 3, 5], bound)
    z, weight = torch.randn(200, 3), torch.randn(200, 3)
    a, b = (z.clone().requires_grad_() for _ in range(2))
    out, plain = turned(a), straight(a)
    assert torch.equal(out.latents, plain.latents)
    assert torch.equal(out.codes, plain.codes)
    bounded = straight.bounded(b.detach()).requires_grad_()
    (behind,) = torch.autograd.grad((rotation(bounded, plain.latents.detach()) * weight).sum(), bounded)
    found = torch.autograd.grad((out.latents * weight).sum(), a)[0]
    torch.testing.assert_close(found, torch.autograd.grad(straight(b).latents, b, behind)[0])
    assert not torch.allclose(found, torch.autograd.grad((plain.latents * weight).sum(), a)[0])
    turned.eval()
    given = torch.autograd.grad((turned(a).latents * weight).sum(), a)[0]
    torch.testing.assert_close(given, torch.autograd.grad((straight(a).latents * weight).sum(), a)[0])


@pytest.mark.parametrize("shape", [(3,), (50, 3), (4, 5, 6, 3), (0, 3)])
def test_noise_takes_any_rank_and_type(shape: tuple[int, ...]) -> None:
    fsq = FSQ([8, 3, 5], noise=0.5)
    out = fsq(torch.randn(shape).bfloat16())
    assert out.latents.dtype == torch.bfloat16
    assert out.latents.shape == shape
    torch.manual_seed(1)
    first = fsq(torch.ones(shape)).latents
    torch.manual_seed(1)
    assert torch.equal(fsq(torch.ones(shape)).latents, first)


def test_layout_of_the_latents_is_that_of_z() -> None:
    image = torch.randn(2, 4, 8, 8)
    latents = FSQ([8, 5, 5, 5])(image.movedim(1, -1)).latents
    assert latents.movedim(-1, 1).is_contiguous()


def test_no_state_and_no_codebook() -> None:
    fsq = FSQ([8] * 20)
    assert not fsq.state_dict()
    assert not list(fsq.parameters())
    assert sum(b.numel() for b in fsq.buffers()) <= 2 * fsq.dim


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": [1, 5]}, r"levels must be integers in 2 .. 4194304, one per channel, got \[1, 5\]"),
        ({"levels": []}, "levels must be"),
        ({"levels": [8] * 21}, r"below 2\^63"),
        ({"levels": [8], "bound": "sine"}, "bound must be one of paper, symmetric, equal-bins, clamp, got 'sine'"),
        ({"levels": [8], "slope": 0.0}, "slope must be > 0 and finite, got 0.0"),
        ({"levels": [8, 8, 8], "factors": 2}, "factors must divide the 3 channels, got 2"),
        ({"levels": [8], "noise": 1.5}, "noise is a probability, got 1.5"),
        ({"levels": [8], "gradient": "turn"}, "gradient must be one of straight-through, rotation, diveq, got 'turn'"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FSQ(**arguments)


@pytest.mark.parametrize("gradient", ["straight-through", "rotation"])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_channel_beyond_the_clamp_comes_back(gradient: str, noise: float) -> None:
    torch.manual_seed(0)
    fsq, z = FSQ([9, 9], "clamp", gradient=gradient, noise=noise), torch.full((8, 2), 3.0, requires_grad=True)
    optimizer = torch.optim.SGD([z], lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        fsq(z).latents.sub(0.25).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(fsq.eval()(z).latents, torch.full((8, 2), 0.25), atol=0.26, rtol=0)
