"""Laws of codes drawn by their distance (RQ-Transformer's stochastic codes and soft labels)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from latticode.quantizers import FSQ, VQ, Quantizer, SimVQ
from latticode.quantizers.implicit import QINCo
from latticode.quantizers.residual import Residual


def codebooks(*sizes: int) -> list[VQ]:
    return [VQ(size, 3, restart=0.0) for size in sizes]


def trained(quantizer: Quantizer) -> Any:
    for _ in range(5):
        quantizer(torch.randn(400, 3))
    return quantizer


SOFTENING: dict[str, Any] = {
    "vq": lambda: VQ(9, 3),
    "unit": lambda: VQ(9, 3, normalize=True),
    "simvq": lambda: SimVQ(9, 3),
    "shared": lambda: Residual(VQ(9, 3, restart=0.0), 3),
    "different": lambda: Residual([*codebooks(9, 5), Residual(codebooks(7, 6))]),
}
every_softening = pytest.mark.parametrize("make", SOFTENING.values(), ids=SOFTENING)


@every_softening
def test_cold_draws_are_the_ordinary_codes(make: Any):
    quantizer = trained(make()).eval()
    z = torch.randn(4, 50, 3)
    codes, p = quantizer.soften(z, 1e-9)
    assert torch.equal(codes, quantizer.encode(z))
    assert codes.dtype == torch.int64
    assert p.shape == (*codes.shape, max(quantizer.vocab))
    torch.testing.assert_close(p.gather(-1, codes[..., None]), torch.ones(*codes.shape, 1))


@every_softening
def test_draws_come_from_the_softmax_over_distances_to_what_is_left(make: Any):
    """Stage by stage behind the codes that were drawn; codes that a smaller codebook has not get nothing."""
    quantizer = trained(make()).eval()
    z = torch.randn(60, 3)
    torch.manual_seed(3)
    codes, p = quantizer.soften(z, 0.5)
    torch.testing.assert_close(p.sum(-1), torch.ones(codes.shape))
    stages = flat_stages(quantizer)
    left = z
    for i, stage in enumerate(stages):
        vectors, placed = stage.vectors(), stage._place(left)
        squared = (placed[:, None] - vectors).square().sum(-1)
        torch.testing.assert_close(p[:, i, : len(vectors)], (-squared / 0.5).softmax(-1), atol=1e-5, rtol=1e-4)
        assert not p[:, i, len(vectors) :].any()
        left = left - vectors[codes[:, i]]
    assert torch.equal(p[:, 0].argmax(-1), quantizer.encode(z)[:, 0]), "the likeliest first code is the ordinary one"
    torch.manual_seed(3)
    assert torch.equal(quantizer.soften(z, 0.5).codes, codes)
    assert (codes != quantizer.encode(z)).any()


def flat_stages(quantizer: Quantizer) -> list[Any]:
    if not isinstance(quantizer, Residual):
        return [quantizer]
    return [one for stage in quantizer._sequence for one in flat_stages(stage)]


def test_draws_have_the_frequencies_that_they_name():
    quantizer = trained(Residual(codebooks(5, 4))).eval()
    z = torch.randn(1, 3).expand(20_000, 3)
    codes, p = quantizer.soften(z, 0.5)
    for first in range(5):
        rows = codes[:, 0] == first
        torch.testing.assert_close(rows.float().mean(), p[0, 0, first], atol=0.012, rtol=0)
        if rows.sum() > 1000:  # given the first code, the second has one distribution
            share = codes[rows, 1].bincount(minlength=4) / rows.sum()
            torch.testing.assert_close(share, p[rows, 1][0, :4], atol=0.04, rtol=0)


def test_softening_moves_nothing_and_leaves_broken_tokens_out():
    quantizer = trained(Residual(codebooks(5, 4)))  # in training mode
    before = copy.deepcopy(quantizer.state_dict())
    z = torch.randn(6, 3, requires_grad=True)
    broken = z.detach().clone()
    broken[2, 1] = torch.nan
    codes, p = quantizer.soften(broken, 0.5)
    assert not p.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert torch.equal((codes == -1).all(-1), torch.arange(6) == 2)
    assert torch.equal(p.any(-1).any(-1), torch.arange(6) != 2)
    assert quantizer.soften(torch.zeros(0, 3), 0.5).p.shape == (0, 2, 5)


def test_what_has_no_codebook_is_refused():
    for stages in ([*codebooks(5), FSQ([5, 4, 3])], [FSQ([5, 4, 3])], [VQ(5, 3), QINCo(5, 3)]):
        name = type(stages[-1]).__name__
        with pytest.raises(ValueError, match=f"stages need a codebook; stage {len(stages) - 1} is {name}"):
            Residual(stages).soften(torch.randn(2, 3), 0.5)
    for temperature in (0.0, -1.0, torch.inf):
        with pytest.raises(ValueError, match=f"temperature must be > 0, got {temperature}"):
            VQ(5, 3).soften(torch.randn(2, 3), temperature)
