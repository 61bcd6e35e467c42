"""What is particular to SimVQ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from clusters import blobs, entropy, shares
from latticode.quantizers.vq import SimVQ


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_simvq_is_its_formula_and_learns_its_matrix_only():
    quantizer = SimVQ(20, 4, entropy=0.5)
    z = torch.randn(30, 4, requires_grad=True)
    out = quantizer(z)
    codes = quantizer.frozen @ quantizer.transform.weight.t()
    q = codes[torch.cdist(z, codes).argmin(dim=1)]
    expected = {"commitment": F.mse_loss(z, q.detach()), "codebook": F.mse_loss(q, z.detach())}
    torch.testing.assert_close(out.latents, q)
    for name, value in expected.items():
        torch.testing.assert_close(out.losses[name], value)
    p = shares(z, codes, 0.5)
    torch.testing.assert_close(out.losses["sample_entropy"], entropy(p).mean().float())
    assert [name for name, _ in quantizer.named_parameters()] == ["transform.weight"]
    assert list(quantizer.state_dict()) == ["frozen", "transform.weight"]
    for name, at_z in (("commitment", True), ("codebook", False)):
        inputs = (z, quantizer.transform.weight)
        ours = torch.autograd.grad(out.losses[name], inputs, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(expected[name], inputs, retain_graph=True, allow_unused=True)
        assert [g is not None for g in ours] == [at_z, not at_z]
        torch.testing.assert_close(ours, theirs)


def test_one_step_of_simvq_moves_every_code():
    quantizer = SimVQ(1000, 4)
    before = quantizer.vectors().detach()
    quantizer(torch.randn(3, 4)).losses["codebook"].backward()
    torch.optim.SGD(quantizer.parameters(), lr=0.1).step()
    assert (quantizer.vectors() != before).any(dim=1).all()


def test_simvq_decodes_any_subset_bit_for_bit():
    quantizer = SimVQ(513, 24).eval()
    out = quantizer(torch.randn(100, 24))
    assert all(torch.equal(quantizer.decode(out.codes[i : i + 1]), out.latents[i : i + 1]) for i in range(100))


def test_simvq_starts_at_the_published_scale():
    assert SimVQ(2000, 64).frozen.std() == pytest.approx(1 / 8, rel=0.01)


def test_simvq_descends():
    quantizer = SimVQ(64, 3)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(quantizer(blobs(10)[0]).losses["codebook"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_simvq_refuses_bad_arguments():
    wrong: list[dict[str, Any]] = [
        {"size": 0, "dim": 2},
        {"size": 2, "dim": 2, "gradient": "none"},
        {"size": 2, "dim": 2, "entropy": -1},
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="got"):
            SimVQ(**arguments)
