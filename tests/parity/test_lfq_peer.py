"""LFQ and BSQ against vector-quantize-pytorch, where that is right.

Where it is wrong, beside what the tests show: under torch.distributed it all-reduces the mean distribution, throws the
result away and divides its own by the world size, so its batch entropy is that of one rank's share, and not of a
distribution. And it holds (tokens, codes) several times over.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from latticode.quantizers.binary import BSQ, LFQ, Binary

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the import of a peer warns of is not ours to see to
    peer = pytest.importorskip("vector_quantize_pytorch")


def reversed_bits(codes: Tensor, dim: int) -> Tensor:
    """Theirs have the last channel fastest."""
    return sum((codes >> i & 1) << (dim - 1 - i) for i in range(dim))  # type: ignore[return-value]


def theirs(z: Tensor, temperature: float, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    module = peer.LFQ(dim=z.shape[-1], codebook_size=2 ** z.shape[-1], commitment_loss_weight=1.0, **options)
    out, losses = module(z[None], inv_temperature=1 / temperature, return_loss_breakdown=True)
    diversity = z.shape[-1] * math.log(2) - losses.batch_entropy
    found = {"commitment": losses.commitment, "sample_entropy": losses.per_sample_entropy, "diversity": diversity}
    return out, found


@pytest.mark.parametrize(
    ("ours", "options"),
    [
        (LFQ(6, temperature=0.5), {}),
        (LFQ(6, temperature=0.25, scale=0.5), {"codebook_scale": 0.5}),
        (BSQ(6, temperature=0.3), {"spherical": True}),
    ],
    ids=str,
)
def test_codes_latents_losses_and_gradients(ours: Binary, options: dict[str, Any]):
    """At temperatures that leave few probabilities below its clamp of 1e-5."""
    z = torch.randn(80, 6, generator=torch.Generator().manual_seed(0)).mul(0.3).requires_grad_()
    (latents, codes, _), expected = theirs(z, ours.temperature, **options)
    out = ours(z)
    assert torch.equal(out.codes[:, 0], reversed_bits(codes[0].long(), 6))
    torch.testing.assert_close(out.latents, latents[0])
    slope = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))
    pairs = [((out.latents * slope).sum(), (latents[0] * slope).sum())]
    pairs += [(out.losses[name], expected[name]) for name in expected]
    for mine, its in pairs:
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)
        gradients = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (mine, its)]
        assert (gradients[0] - gradients[1]).abs().max() < 1e-3 * gradients[1].abs().max()


def test_at_the_default_temperature():
    z = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    (_, codes, _), expected = theirs(z, 0.01)
    out = LFQ(8)(z)
    assert torch.equal(out.codes[:, 0], reversed_bits(codes[0].long(), 8))
    torch.testing.assert_close(dict(out.losses), expected, rtol=1e-4, atol=1e-4)


def test_its_clamp_stops_the_diversity_from_2_to_the_17():
    """ln(max(p, 1e-5)) is a constant where all p are below: its entropy is too small and has no gradient; ours has."""
    dim = 17
    z = torch.randn(6, dim, generator=torch.Generator().manual_seed(0)).mul(2e-4).requires_grad_()
    _, its = theirs(z, 0.01)
    bits = torch.arange(2**dim)[:, None] >> torch.arange(dim) & 1
    logits = 2 * (z.double() @ (2.0 * bits - 1).double().t()) / 0.01
    mean = logits.softmax(dim=-1).mean(dim=0)
    exact = dim * math.log(2) + (mean * mean.log()).sum()
    ours = LFQ(dim)(z).losses["diversity"]
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (ours, its["diversity"], exact)]
    assert ours.item() == pytest.approx(exact.item(), abs=1e-5)
    assert (gradients[0] - gradients[2]).abs().max() < 1e-5 * gradients[2].abs().max()
    assert its["diversity"] > 0.25 + exact
    assert gradients[1].abs().max() < 1e-2 * gradients[2].abs().max()
