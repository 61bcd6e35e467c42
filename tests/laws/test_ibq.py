"""Index back-propagation quantization against its definition, written out with one-hot vectors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from latticode import IBQ, VQ


def written_out(z: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """arXiv 2412.02692, section 3.2, over dense one-hot vectors (N, K)."""
    soft = (z @ codebook.t()).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), len(codebook)).to(z)
    latents = (hard - soft.detach() + soft) @ codebook
    q = hard @ codebook
    losses = {
        "commitment": (z - q.detach()).square().mean(),
        "codebook": (q - z.detach()).square().mean(),
        "double_quantization": (latents - z).square().mean(),
    }
    return latents, losses


def test_values_and_gradients_are_those_of_the_definition() -> None:
    quantizer = IBQ(20, 6).double()
    z = torch.randn(50, 6, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(50, 6, dtype=torch.float64)
    out = quantizer(z)
    latents, losses = written_out(z, quantizer.embedding)
    torch.testing.assert_close(out.latents, latents)
    assert out.losses.keys() == losses.keys()
    for ours, theirs in [((out.latents * towards).sum(), (latents * towards).sum())] + [
        (out.losses[name], losses[name]) for name in losses
    ]:
        torch.testing.assert_close(ours, theirs)
        inputs = [z, quantizer.embedding]
        got, wanted = (
            torch.autograd.grad(value, inputs, retain_graph=True, materialize_grads=True) for value in (ours, theirs)
        )
        for a, b in zip(got, wanted):
            torch.testing.assert_close(a, b)


def test_every_code_gets_a_gradient_where_vq_moves_the_chosen_ones() -> None:
    z = torch.randn(4, 8)
    for quantizer, all_of_them in ((IBQ(64, 8), True), (VQ(64, 8, update="gradient", kmeans=False), False)):
        out = quantizer(z)
        (out.latents.square().sum() + sum(out.losses.values())).backward()
        (gradient,) = [p.grad for p in quantizer.parameters()]
        assert gradient is not None
        assert bool(gradient.any(dim=1).all()) == all_of_them


def test_entropies_are_those_of_the_softmax_of_the_logits() -> None:
    quantizer, z = IBQ(12, 5, entropy=0.3), torch.randn(40, 5)
    losses = quantizer(z).losses
    p = (z @ quantizer.embedding.t() / 0.3).softmax(-1)
    entropies = torch.distributions.Categorical(p).entropy()
    torch.testing.assert_close(losses["sample_entropy"], entropies.mean())
    mixed = torch.distributions.Categorical(p.mean(0)).entropy()
    torch.testing.assert_close(losses["diversity"], math.log(12) - mixed)
    torch.stack(list(losses.values())).sum().backward()
    assert quantizer.embedding.grad is not None
    assert quantizer.embedding.grad.isfinite().all()


def test_a_sharp_temperature_stays_finite() -> None:
    quantizer = IBQ(12, 5, entropy=1e-4)
    z = (100 * torch.randn(40, 5)).requires_grad_()
    losses = quantizer(z).losses
    gradients = torch.autograd.grad(torch.stack(list(losses.values())).sum(), (z, quantizer.embedding))
    assert all(value.isfinite().all() for value in (*losses.values(), *gradients))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0, "dim": 2}, "size and dim must be >= 1, got 0 and 2"),
        ({"size": 2, "dim": 2, "entropy": 0}, "entropy is a temperature and must be > 0, or None, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IBQ(**arguments)
