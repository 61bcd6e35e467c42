"""What LFQ and BSQ promise beyond the laws of every quantizer."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latticode.core import distributed
from latticode.quantizers.binary import BSQ, LFQ, Binary
from latticode.quantizers.residual import Residual

LN2 = math.log(2)


def latents(n: int, dim: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) * scale


def losses_and_gradients(quantizer: Binary, z: Tensor, mask: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    z = z.detach().requires_grad_()
    losses = quantizer(z, mask).losses
    return {name: (loss.detach(), torch.autograd.grad(loss, z, retain_graph=True)[0]) for name, loss in losses.items()}


def enumerated(quantizer: Binary, z: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The definition, in float64, code by code."""
    z = z.detach().double().requires_grad_()
    u = F.normalize(z, dim=-1) if isinstance(quantizer, BSQ) else z
    size: Any = quantizer.dim**-0.5 if isinstance(quantizer, BSQ) else quantizer.scale
    bits = [[code >> i & 1 for i in range(quantizer.dim)] for code in range(2**quantizer.dim)]
    codebook = (2 * torch.tensor(bits, dtype=torch.float64) - 1) * size
    log_p = (-(u[:, None] - codebook).square().sum(-1) / quantizer.temperature).log_softmax(-1)
    mean = log_p.exp().mean(0)
    nearest = codebook[log_p.argmax(-1)]
    losses = {
        "commitment": (u - nearest).square().mean(),
        "sample_entropy": -(log_p.exp() * log_p).sum(-1).mean(),
        "diversity": quantizer.dim * LN2 + torch.special.xlogy(mean, mean.clamp(min=1e-300)).sum(),
    }
    return {name: (loss.detach(), torch.autograd.grad(loss, z, retain_graph=True)[0]) for name, loss in losses.items()}


CASES = [
    (LFQ(1, temperature=0.5), 1.0),
    (LFQ(3, scale=0.3, temperature=2.0), 1.0),
    (LFQ(8), 0.02),
    (LFQ(10, temperature=0.1), 1.0),
    (BSQ(2), 1.0),
    (BSQ(3, temperature=0.1), 5.0),
    (BSQ(10, temperature=0.02), 0.1),
]


@pytest.mark.parametrize(("quantizer", "scale"), CASES, ids=lambda value: str(value)[:40])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_losses_equal_the_enumeration(quantizer: Binary, scale: float, dtype: torch.dtype, tolerance: float):
    z = latents(60, quantizer.dim, scale)
    ours, exact = losses_and_gradients(quantizer.to(dtype), z.to(dtype)), enumerated(quantizer, z)
    quantizer.to(torch.float32)
    assert list(ours) == list(exact)
    for name, (loss, gradient) in ours.items():
        assert loss.dtype == dtype
        expected, slope = exact[name]
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance, abs=tolerance), name
        assert (gradient - slope).abs().max() <= tolerance * slope.abs().max(), name


@pytest.mark.parametrize("kind", [LFQ, BSQ])
def test_losses_are_the_same_in_eval_mode(kind: type[LFQ | BSQ]):
    quantizer, z = kind(7), latents(40, 7)
    expected = quantizer(z).losses
    torch.testing.assert_close(quantizer.eval()(z).losses, expected)


def test_the_entropies_span_their_range():
    sure = LFQ(4)(latents(100, 4).sign() * 3).losses
    assert sure["sample_entropy"] < 1e-30
    assert sure["commitment"] == 4
    undecided = LFQ(4)(torch.zeros(100, 4)).losses
    assert undecided["sample_entropy"].item() == pytest.approx(4 * LN2)
    assert undecided["diversity"].item() == pytest.approx(0, abs=1e-6)
    assert LFQ(4)(torch.ones(100, 4)).losses["diversity"].item() == pytest.approx(4 * LN2)


@pytest.mark.parametrize("dim", [18, 19])
def test_no_code_is_too_rare_for_a_gradient(dim: int):
    """All pairs of two sets of tokens: H = H_1 + H_2, so 2^18 codes of probability 4e-6 follow from 2^9."""
    first, second = latents(10, 9, 0.002), latents(12, dim - 9, 0.004, seed=1)
    pairs = torch.cat([first[:, None].expand(-1, 12, -1), second[None].expand(10, -1, -1)], -1).flatten(0, 1)
    loss, gradient = losses_and_gradients(LFQ(dim), pairs)["diversity"]
    apart = [enumerated(LFQ(part.shape[1]), part)["diversity"] for part in (first, second)]
    assert loss.item() == pytest.approx(sum(one.item() for one, _ in apart), abs=1e-5)
    gradients = gradient.double().view(10, 12, dim)
    for summed, (_, expected) in zip((gradients[..., :9].sum(1), gradients[..., 9:].sum(0)), apart, strict=True):
        assert (summed - expected).abs().max() < 1e-5 * expected.abs().max()


def test_groups_are_the_sum_of_their_parts():
    z = latents(200, 7, 0.01)
    losses, exact = LFQ(7, entropy_groups=3)(z).losses, LFQ(7)(z).losses
    parts = [LFQ(len(run))(z[:, run]).losses["diversity"] for run in ([0, 1, 2], [3, 4], [5, 6])]
    torch.testing.assert_close(losses["diversity"], torch.stack(parts).sum())
    assert losses["diversity"] < exact["diversity"]  # an upper bound of the entropy
    torch.testing.assert_close(losses["sample_entropy"], exact["sample_entropy"])


def test_groups_serve_any_number_of_bits():
    quantizer = LFQ(100, entropy_groups=10, factors=2)
    z = latents(20, 100, 0.1).requires_grad_()
    out = quantizer(z)
    assert torch.equal(quantizer.decode(out.codes), out.latents)
    assert out.codes.max() > 2**48
    (gradient,) = torch.autograd.grad(out.losses["diversity"], z)
    assert (gradient != 0).any(dim=0).all()


@pytest.mark.parametrize("kind", [LFQ, BSQ])
def test_the_first_channel_is_the_fastest_bit(kind: type[LFQ | BSQ]):
    z = torch.tensor([[3.0, -1, -0.1], [-3, -2, 0.5], [2, 3, -1], [0.0, -0.0, 1e-30], [0, 0, 0]])
    out = kind(3)(z)
    assert out.codes[:, 0].tolist() == [1, 4, 3, 4, 0]
    assert torch.equal(out.latents > 0, z > 0)
    expected = 1 if kind is LFQ else 3**-0.5
    torch.testing.assert_close(out.latents.abs(), torch.full((5, 3), float(expected)))


def test_factors_split_the_code():
    whole, split = LFQ(12), LFQ(12, factors=3)
    assert split.vocab == (16, 16, 16)
    z = latents(100, 12)
    codes = split.encode(z)
    assert torch.equal((codes * torch.tensor([1, 2**4, 2**8])).sum(-1), whole.encode(z)[:, 0])
    assert torch.equal(split.decode(codes), whole.decode(whole.encode(z)))
    torch.testing.assert_close(split(z).losses, whole(z).losses)


def test_a_code_of_62_bits_keeps_them_all():
    quantizer = LFQ(62, entropy_groups=62, scale=0.7).eval()
    z = torch.cat([latents(100, 62), torch.ones(1, 62), -torch.ones(1, 62)])
    codes = quantizer.encode(z)
    assert codes[-2:, 0].tolist() == [2**62 - 1, 0]
    assert torch.equal(quantizer.decode(codes), torch.where(z > 0, 0.7, -0.7))


@pytest.mark.parametrize("kind", [LFQ, BSQ])
def test_the_gradient_of_the_latents_passes_straight_through(kind: type[LFQ | BSQ]):
    z = latents(30, 5).requires_grad_()
    slope = latents(30, 5, seed=1)
    (ours,) = torch.autograd.grad((kind(5)(z).latents * slope).sum(), z)
    u = z if kind is LFQ else F.normalize(z, dim=-1)
    torch.testing.assert_close(ours, torch.autograd.grad((u * slope).sum(), z)[0])


def test_bsq_does_not_depend_on_the_length():
    z = latents(50, 6)
    expected = BSQ(6)(z)
    torch.testing.assert_close(expected.latents.norm(dim=-1), torch.ones(50))
    for scale in (1e-4, 1e37):
        out = BSQ(6)(z * scale)
        assert torch.equal(out.codes, expected.codes)
        torch.testing.assert_close(out.losses, expected.losses)


def test_bsq_is_safe_at_zero():
    z = torch.stack([torch.zeros(4), torch.full((4,), -1e-45), torch.full((4,), 1e-30), torch.tensor([0, 0, 1e-4, 0])])
    for loss, gradient in losses_and_gradients(BSQ(4), z).values():
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 1e7
    assert BSQ(4)(z).codes[:, 0].tolist() == [0, 0, 15, 4]


def test_huge_latents_keep_finite_entropies():
    z = torch.tensor([[3e38, -3e38, 1e-40], [1.0, -2.0, 3.0], [-1e20, 0.0, 0.0]])
    for quantizer in (LFQ(3), LFQ(3, scale=1e30, temperature=1e-6), BSQ(3, temperature=1e-9)):
        results = losses_and_gradients(quantizer, z)
        for name in ("sample_entropy", "diversity"):
            assert all(value.isfinite().all() for value in results[name]), name


def test_a_mask_leaves_the_other_tokens():
    z, mask = latents(50, 6, 0.02), torch.arange(50) % 3 > 0
    broken = torch.where(mask[:, None], z, torch.nan)
    ours, expected = losses_and_gradients(LFQ(6), broken, mask), losses_and_gradients(LFQ(6), z[mask])
    for name, (loss, gradient) in ours.items():
        torch.testing.assert_close(loss, expected[name][0])
        torch.testing.assert_close(gradient[mask], expected[name][1])
        assert (gradient[~mask] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [LFQ, BSQ])
def test_the_entropies_spread_tokens_evenly(kind: type[LFQ | BSQ]):
    """From a start where most tokens share one code."""
    quantizer = kind(4, temperature=0.3)
    z = (latents(16, 4, 0.1) + 0.4).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.03)
    for _ in range(300):
        optimizer.zero_grad()
        losses = quantizer(z).losses
        (losses["sample_entropy"] + 2 * losses["diversity"]).backward()
        optimizer.step()
    assert quantizer(z).losses["diversity"] < 0.1
    assert len(quantizer.encode(z).unique()) >= 13  # of 16


def test_residual_signs_are_one_even_grid():
    """n stages at scales s, s/2, s/4, ..: 2^n levels at equal distances that serve +- 2 s."""
    residual = Residual(LFQ(1, scale=3.0), depth=3).eval()
    z = torch.linspace(-5.99, 5.99, 800)[:, None]
    out = residual(z)
    levels = out.latents.unique()
    torch.testing.assert_close(levels, torch.arange(-5.25, 6, 1.5))
    assert (out.latents - z).abs().max() <= 0.75
    clamped = Residual(LFQ(1, scale=3.0), depth=3, soft_clamp=True).eval()
    assert clamped(torch.tensor([[1e4]])).latents.item() == 5.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "got dim=0"),
        ({"dim": 6, "factors": 4}, "got dim=6 and factors=4"),
        ({"dim": 6, "factors": 0}, "got dim=6 and factors=0"),
        ({"dim": 63, "entropy_groups": 9}, "factors of 1 to 62 bits, got dim=63 and factors=1"),
        ({"dim": 6, "temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"dim": 6, "entropy_groups": 7}, r"entropy_groups must be in 1 \.\. 6, got 7"),
        ({"dim": 25}, r"25 bits in 1 group\(s\) .*entropy_groups=2 or more"),
        ({"dim": 50, "entropy_groups": 2}, "entropy_groups=3 or more"),
    ],
)
@pytest.mark.parametrize("kind", [LFQ, BSQ])
def test_refuses_bad_arguments(kind: type[Binary], arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_lfq_refuses_a_bad_scale():
    for scale in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=f"scale must be > 0, got {scale}"):
            LFQ(4, scale=scale)


class UnknownSumError(Exception):
    """A rank has come to a sum that the others have not added to yet."""


def on_ranks(quantizer: Binary, parts: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """`losses_and_gradients` of each rank's part of a batch: ranks start over until every collective sum is known.

    `tests/laws/test_distributed_quantizers.py` has real processes.
    """
    sums: list[list[Tensor]] = []
    pending: list[list[Tensor]] = []

    def run(part: Tensor) -> dict[str, Any]:
        known = iter(sums)

        def all_sum(tensors: list[Tensor]) -> list[Tensor]:
            for total in known:
                return total
            pending.append(list(tensors))
            raise UnknownSumError

        monkeypatch.setattr(distributed, "all_sum", all_sum)
        return losses_and_gradients(quantizer, part)

    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "world_size", lambda: len(parts))
    while True:
        try:
            return [run(part) for part in parts]
        except UnknownSumError:
            for part in parts[1:]:
                with contextlib.suppress(UnknownSumError):
                    run(part)
        sums.append([torch.stack(same).sum(0) for same in zip(*pending, strict=True)])
        pending.clear()


@pytest.mark.parametrize("quantizer", [LFQ(6), LFQ(6, entropy_groups=2), BSQ(6, temperature=0.1)], ids=str)
@pytest.mark.parametrize("empty", [False, True])
def test_ranks_have_the_losses_of_one_process(quantizer: Binary, empty: bool, monkeypatch: pytest.MonkeyPatch):
    z = latents(60, 6, 0.02)
    if empty:
        z[:10] = torch.nan  # the first rank takes part without a token
    expected = losses_and_gradients(quantizer, z)
    ranks = on_ranks(quantizer, list(z.split([10, 30, 20])), monkeypatch)
    for name, (loss, gradient) in expected.items():
        assert all(torch.equal(one[name][0], ranks[0][name][0]) for one in ranks)
        torch.testing.assert_close(ranks[0][name][0], loss)
        averaged = torch.cat([one[name][1] for one in ranks]) / 3  # as training averages gradients
        torch.testing.assert_close(averaged, gradient, rtol=1e-4, atol=1e-6)
