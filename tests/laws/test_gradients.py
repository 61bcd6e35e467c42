"""What a gradient estimator returns, and what gradient passes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latticode.quantizers import VQ
from latticode.quantizers.gradients import ESTIMATORS, diveq, rotation, straight_through, synchronized

EXACT = [name for name in ESTIMATORS if name != "diveq"]


def through(name: str, z: Tensor, q: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """The latents, and the gradient that `upstream` becomes at `z`."""
    z = z.clone().requires_grad_()
    out = ESTIMATORS[name](z, q)
    return out.detach(), torch.autograd.grad(out, z, upstream)[0]


def turn(z: Tensor, q: Tensor) -> Tensor:
    """The matrix (D, D) that turns z onto q in their plane, by sine and cosine of the angle, and leaves the rest."""
    a, b = F.normalize(z, dim=0), F.normalize(q, dim=0)
    side = F.normalize(b - (a @ b) * a, dim=0)
    cos, sin = a @ b, side @ b
    plane = (cos - 1) * (torch.outer(a, a) + torch.outer(side, side))
    return torch.eye(len(z), dtype=z.dtype) + plane + sin * (torch.outer(side, a) - torch.outer(a, side))


@pytest.mark.parametrize("name", EXACT)
def test_the_value_is_the_code_bit_for_bit(name: str):
    z, q = 1000 * torch.randn(50, 4), 1e-3 * torch.randn(50, 4)
    assert torch.equal(through(name, z, q, torch.ones(50, 4))[0], q)
    assert torch.equal(through(name, 1e-3 * z, 1e3 * q, torch.ones(50, 4))[0], 1e3 * q)


def test_straight_through_passes_the_gradient():
    upstream = torch.randn(50, 4)
    assert torch.equal(through("straight-through", torch.randn(50, 4), torch.randn(50, 4), upstream)[1], upstream)


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_rotation_is_the_rotation_and_the_scale_of_the_norms(dim: int):
    z, q, upstream = torch.randn(3, 20, dim, dtype=torch.float64)
    gradient = through("rotation", z, q, upstream)[1]
    for i in range(20):
        matrix = turn(z[i], q[i])
        torch.testing.assert_close(matrix @ z[i] * q[i].norm() / z[i].norm(), q[i])  # the matrix is the right one
        torch.testing.assert_close(gradient[i], matrix.t() @ upstream[i] * q[i].norm() / z[i].norm())


def test_rotation_keeps_the_angle_between_latent_and_gradient():
    z, q, upstream = torch.randn(3, 100, 5)
    gradient = through("rotation", z, q, upstream)[1]
    torch.testing.assert_close(F.cosine_similarity(gradient, z), F.cosine_similarity(upstream, q), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("z", "q"),
    [
        (torch.zeros(3), torch.ones(3)),
        (torch.ones(3), torch.zeros(3)),
        (torch.zeros(3), torch.zeros(3)),
        (torch.full((3,), 1e-30), torch.ones(3)),
        (torch.ones(3), torch.full((3,), 1e-30)),
        (torch.ones(3), -2 * torch.ones(3)),
        (torch.ones(3), torch.tensor([-1.0, -1.0, -1.0 - 1e-6])),
        (torch.ones(1), -torch.ones(1)),
        (torch.full((3,), 1e30), torch.full((3,), 2e30)),
    ],
)
def test_rotation_is_straight_through_where_there_is_none(z: Tensor, q: Tensor):
    upstream = torch.randn_like(z)
    out, gradient = through("rotation", z, q, upstream)
    assert torch.equal(out, q)
    assert torch.equal(gradient, upstream)


def test_rotation_of_nearly_opposite_vectors_is_still_a_rotation():
    z = torch.tensor([1.0, 0.0])
    for angle in (0.01, 0.1, 1.0):
        q = torch.tensor([-torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))])
        upstream = torch.tensor([0.6, 0.8])
        assert through("rotation", z, q, upstream)[1].norm() == pytest.approx(1, abs=1e-2)


def test_rotation_gives_the_code_no_gradient():
    q = torch.randn(5, 3, requires_grad=True)
    assert rotation(torch.randn(5, 3, requires_grad=True), q).grad_fn is not None
    (gradient,) = torch.autograd.grad(rotation(torch.randn(5, 3, requires_grad=True), q).sum(), q, allow_unused=True)
    assert gradient is None


def test_diveq_steps_the_exact_distance_in_a_noisy_direction():
    z, q = torch.randn(2, 1000, 4, dtype=torch.float64)
    out = diveq(z, q)
    torch.testing.assert_close((out - z).norm(dim=-1), (q - z).norm(dim=-1))
    assert (out != q).any(dim=-1).all()
    assert torch.equal(diveq(z, z), z)  # no distance, no noise


@pytest.mark.parametrize("variance", [1e-3, 1e-4])
def test_diveq_is_around_the_code_by_its_noise(variance: float):
    """Far from z, a step of length r turns by v / r across: q + v less its part along the step, to first order."""
    z, q = torch.zeros(200_000, 3, dtype=torch.float64), torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    off = diveq(z, q.expand_as(z), variance) - q
    torch.testing.assert_close(off.mean(dim=0), torch.tensor([-variance / 3, 0, 0]).double(), atol=2e-4, rtol=0)
    torch.testing.assert_close(off[:, 1:].var(dim=0), torch.full((2,), variance).double(), atol=0, rtol=0.02)


def test_the_gradient_of_diveq_is_that_of_the_length():
    z, q, upstream = torch.randn(3, 30, 4, dtype=torch.float64)
    inputs = [z.requires_grad_(), q.requires_grad_()]
    to_z, to_q = torch.autograd.grad(diveq(z, q, 1e-14), inputs, upstream)
    e = F.normalize((q - z).detach(), dim=-1)
    along = e * (e * upstream).sum(dim=-1, keepdim=True)
    torch.testing.assert_close(to_q, along, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(to_z, upstream - along, atol=1e-5, rtol=1e-5)
    to_z, to_q = torch.autograd.grad(diveq(z, q), inputs, upstream)
    torch.testing.assert_close(to_z + to_q, upstream)  # whatever the noise: only the difference of both is turned


def test_the_gradient_of_diveq_is_finite_where_latent_and_code_meet():
    z = torch.randn(5, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(diveq(z, z.detach().clone()).sum(), z)
    assert torch.equal(gradient, torch.ones(5, 3))


def test_synchronized_passes_a_share_of_the_gradient_to_the_code():
    z, q, upstream = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    out = synchronized(straight_through(z, q), q, 0.25)
    assert torch.equal(out, q)
    to_z, to_q = torch.autograd.grad(out, (z, q), upstream)
    assert torch.equal(to_z, upstream)
    assert torch.equal(to_q, 0.25 * upstream)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_vq_uses_the_estimator_in_training_and_the_code_itself_in_eval(name: str):
    quantizer = VQ(16, 3, update="gradient", gradient=name, kmeans=False, restart=0.0)
    z, upstream = torch.randn(40, 3), torch.randn(40, 3)
    x = z.clone().requires_grad_()
    torch.manual_seed(5)
    out = quantizer(x)
    q = quantizer.decode(out.codes)
    (gradient,) = torch.autograd.grad(out.latents, x, upstream, retain_graph=True)
    torch.manual_seed(5)
    expected, expected_gradient = through(name, z, q.detach(), upstream)
    torch.testing.assert_close(out.latents, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    quantizer.eval()
    assert torch.equal(quantizer(x).latents, q)
    assert torch.equal(torch.autograd.grad(quantizer(x).latents, x, upstream)[0], upstream)
