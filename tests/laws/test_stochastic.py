"""What is particular to quantizers that draw their codes: Gumbel and StochasticVQ."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latticode.core import registry
from latticode.core.pretrained import load_model, save_tensors, weights_digest
from latticode.quantizers.stochastic import Gumbel, StochasticVQ, gumbel_like


def logits_of(quantizer: Gumbel, z: Tensor) -> Tensor:
    return z @ quantizer.logits.weight.t() + quantizer.logits.bias


def posterior(quantizer: StochasticVQ, z: Tensor) -> Tensor:
    """softmax(-|z - c|^2 / (2 v)) over codes (N, K), in float64 without any trick."""
    squares = (z.double()[:, None] - quantizer.embedding.double()).square().sum(dim=-1)
    return (-squares / (2 * quantizer.log_variance.double().exp())).softmax(dim=-1)


def divergence(p: Tensor) -> Tensor:
    """From the uniform distribution, in nats, of each row of `p`."""
    return (p * (p * p.shape[-1]).log()).sum(dim=-1)


def test_the_noise_has_the_moments_of_gumbel():
    noise = gumbel_like(torch.empty(400_000))
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.5772, abs=0.01)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_gumbel_draws_its_codes_from_the_softmax_of_the_logits():
    quantizer = Gumbel(5, 3)
    z = torch.randn(3)
    codes = quantizer(z.expand(100_000, 3)).codes[:, 0]
    frequency = torch.bincount(codes, minlength=5) / 100_000
    torch.testing.assert_close(frequency, logits_of(quantizer, z).softmax(dim=0), atol=0.01, rtol=0)


@pytest.mark.parametrize("quantizer", [Gumbel(6, 3), StochasticVQ(6, 3)])
def test_the_limits_of_the_temperature(quantizer: Gumbel | StochasticVQ):
    z = torch.randn(200, 3)
    quantizer.temperature = 1e-5
    out = quantizer(z)
    torch.testing.assert_close(out.latents, quantizer.decode(out.codes), atol=1e-2, rtol=0)
    quantizer.temperature = 1e6
    mean = quantizer.embedding.mean(dim=0).expand(200, 3)
    torch.testing.assert_close(quantizer(z).latents, mean, atol=1e-4, rtol=0)


@pytest.mark.parametrize("quantizer", [Gumbel(6, 3, temperature=0.7), StochasticVQ(6, 3, temperature=0.7)])
def test_soft_latents_lie_among_the_codes_and_move_all_of_them(quantizer: Gumbel | StochasticVQ):
    z = torch.randn(50, 3, requires_grad=True)
    out = quantizer(z)
    assert (out.latents <= quantizer.embedding.amax(dim=0)).all()
    assert (out.latents >= quantizer.embedding.amin(dim=0)).all()
    gradients = torch.autograd.grad(out.latents.square().sum(), [z, *quantizer.parameters()])
    assert all(gradient.isfinite().all() and (gradient != 0).any() for gradient in gradients)
    assert (gradients[1 + [name for name, _ in quantizer.named_parameters()].index("embedding")] != 0).all()


def test_soft_gumbel_is_its_formula():
    quantizer = Gumbel(6, 3, temperature=0.7)
    z = torch.randn(50, 3)
    torch.manual_seed(3)
    out = quantizer(z)
    torch.manual_seed(3)
    drawn = logits_of(quantizer, z) + gumbel_like(torch.empty(50, 6))
    torch.testing.assert_close(out.latents, (drawn / 0.7).softmax(dim=1) @ quantizer.embedding)
    assert torch.equal(out.codes[:, 0], drawn.argmax(dim=1))


def test_hard_gumbel_is_exact_with_the_gradient_of_the_soft_weights():
    quantizer = Gumbel(6, 3, temperature=0.7, hard=True)
    z, upstream = torch.randn(50, 3, requires_grad=True), torch.randn(50, 3)
    torch.manual_seed(3)
    out = quantizer(z)
    assert torch.equal(out.latents, quantizer.decode(out.codes))
    torch.manual_seed(3)
    weights = ((logits_of(quantizer, z) + gumbel_like(torch.empty(50, 6))) / 0.7).softmax(dim=1)
    to_z, to_codes = torch.autograd.grad(out.latents, (z, quantizer.embedding), upstream)
    (expected,) = torch.autograd.grad(weights @ quantizer.embedding.detach(), z, upstream)
    torch.testing.assert_close(to_z, expected)
    torch.testing.assert_close(to_codes, torch.zeros(6, 3).index_add_(0, out.codes[:, 0], upstream))


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_in_eval_mode_is_the_greatest_logit(hard: bool):
    quantizer = Gumbel(6, 3, hard=hard).eval()
    z = torch.randn(50, 3, requires_grad=True)
    out = quantizer(z)
    codes = logits_of(quantizer, z).argmax(dim=1)
    assert torch.equal(out.codes[:, 0], codes)
    assert torch.equal(out.latents, quantizer.embedding[codes])
    (gradient,) = torch.autograd.grad(out.latents.sum(), z)
    assert (gradient != 0).any()


@pytest.mark.parametrize("training", [False, True])
def test_the_divergence_of_gumbel_is_exact(training: bool):
    quantizer = Gumbel(7, 3).train(training)
    z = torch.randn(2, 20, 3, requires_grad=True)
    mask = torch.rand(2, 20) < 0.5
    expected = divergence(logits_of(quantizer, z[mask]).softmax(dim=-1)).mean()
    loss = quantizer(z, mask).losses["kl"]
    torch.testing.assert_close(loss, expected)
    inputs = (z, quantizer.logits.weight)
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs))
    with torch.no_grad():
        quantizer.logits.weight.zero_()
        quantizer.logits.bias.fill_(3.0)
    assert quantizer(z).losses["kl"].item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        quantizer.logits.bias[0] = 1e4
    assert quantizer(z).losses["kl"].item() == pytest.approx(math.log(7))


def test_gumbel_learns_to_tell_tokens_apart():
    quantizer = Gumbel(16, 2, temperature=0.5)
    centres = torch.tensor([[2.0, 2.0], [2.0, -2.0], [-2.0, 2.0], [-2.0, -2.0]])
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        F.mse_loss(quantizer(centres.repeat(16, 1)).latents, centres.repeat(16, 1)).backward()
        optimizer.step()
    out = quantizer.eval()(centres)
    assert len(out.codes.unique()) == 4
    assert F.mse_loss(out.latents, centres) < 0.1 * centres.var()


def test_stochastic_vq_draws_from_its_posterior_and_takes_the_nearest_in_eval_mode():
    quantizer = StochasticVQ(5, 3, variance=0.8)
    z = torch.randn(3)
    codes = quantizer(z.expand(100_000, 3)).codes[:, 0]
    frequency = torch.bincount(codes, minlength=5) / 100_000
    torch.testing.assert_close(frequency, posterior(quantizer, z[None])[0].float(), atol=0.01, rtol=0)
    quantizer.eval()
    z = torch.randn(50, 3, requires_grad=True)
    out = quantizer(z)
    assert torch.equal(out.codes[:, 0], torch.cdist(z, quantizer.embedding).argmin(dim=1))
    assert torch.equal(out.latents, quantizer.decode(out.codes))
    assert torch.equal(torch.autograd.grad(out.latents.sum(), z)[0], torch.ones(50, 3))


@pytest.mark.parametrize("training", [False, True])
def test_the_losses_of_stochastic_vq_are_the_published_ones(training: bool):
    quantizer = StochasticVQ(9, 4, variance=0.5).train(training)
    z = torch.randn(2, 20, 4, requires_grad=True)
    mask = torch.rand(2, 20) < 0.5
    out = quantizer(z, mask)
    p = posterior(quantizer, z[mask])
    square = (z[mask] - out.latents[mask].detach()).square().sum(dim=-1)
    expected = {
        "kl": divergence(p).mean().float(),
        "kl_continuous": (square / (2 * quantizer.log_variance.exp())).mean(),
    }
    assert list(out.losses) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(out.losses[name], value)
        ours = torch.autograd.grad(out.losses[name], quantizer.log_variance, retain_graph=True)
        if name == "kl" or not training:  # in training the latents of the other depend on the variance as well
            theirs = torch.autograd.grad(value, quantizer.log_variance, retain_graph=True)
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    inputs = (z, quantizer.embedding)
    ours = torch.autograd.grad(out.losses["kl"], inputs, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(expected["kl"], inputs), atol=1e-6, rtol=1e-4)


def test_the_divergence_runs_from_zero_for_any_code_to_ln_k_for_one():
    quantizer = StochasticVQ(9, 4, variance=1e8)
    assert 0 <= quantizer(torch.randn(50, 4)).losses["kl"] < 1e-4
    sure = StochasticVQ(9, 4, variance=1e-8)(torch.randn(50, 4))
    assert sure.losses["kl"].item() == pytest.approx(math.log(9))


def test_an_offset_common_to_latents_and_codes_changes_no_draw():
    quantizer = StochasticVQ(9, 4)
    z = torch.randn(100, 4)
    torch.manual_seed(1)
    near = quantizer(z)
    with torch.no_grad():
        quantizer.embedding.add_(1000)
    torch.manual_seed(1)
    far = quantizer(z + 1000)
    torch.testing.assert_close(far.latents - 1000, near.latents, atol=2e-3, rtol=0)
    torch.testing.assert_close(dict(far.losses), dict(near.losses), atol=1e-2, rtol=1e-3)


def test_the_variance_falls_as_reconstruction_improves():
    """Self-annealing: the noise of a soft code costs reconstruction, so its likelihood pulls the variance down."""
    quantizer = StochasticVQ(8, 2, variance=4.0)
    z = torch.randn(256, 2)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        out = quantizer(z)
        (100 * F.mse_loss(out.latents, z) + out.losses["kl"] + out.losses["kl_continuous"]).backward()
        optimizer.step()
    assert quantizer.log_variance.exp() < 1.0


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (Gumbel, {"size": 0, "dim": 2}, "got 0 and 2"),
        (Gumbel, {"size": 2, "dim": 2, "temperature": 0.0}, "temperature must be > 0, got 0.0"),
        (StochasticVQ, {"size": 2, "dim": 0}, "got 2 and 0"),
        (StochasticVQ, {"size": 2, "dim": 2, "temperature": -1.0}, "got -1.0"),
        (StochasticVQ, {"size": 2, "dim": 2, "variance": 0.0}, "variance must be > 0, got 0.0"),
    ],
)
def test_refuses_bad_arguments(cls: type, arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        cls(**arguments)


def test_a_variance_saved_as_a_scalar_still_loads(tmp_path: Path):
    """As version 0.1 did; and what a token dataset remembers of such a tokenizer stays the same."""
    quantizer = StochasticVQ(6, 2, variance=0.3)
    old = {**quantizer.state_dict(), "log_variance": torch.tensor(math.log(0.3))}
    twin = StochasticVQ(6, 2)
    twin.load_state_dict(old)
    assert torch.equal(twin.log_variance, quantizer.log_variance)
    assert twin.log_variance.shape == (1,)
    save_tensors(tmp_path / "model.safetensors", old, {"schema": 1, "spec": registry.spec_of(quantizer)})
    assert torch.equal(load_model(tmp_path).log_variance, quantizer.log_variance)

    class Old(torch.nn.Module):
        def state_dict(self, **_: Any) -> dict[str, Tensor]:  # type: ignore[override]
            return old

    assert weights_digest(Old()) == weights_digest(quantizer)
