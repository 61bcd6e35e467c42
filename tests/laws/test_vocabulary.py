"""Laws of the softmax head over many codes: its loss, its costs and its draws are those of whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import Largest
from latticode import kernels
from latticode.kernels import native, vocabulary
from latticode.kernels.vocabulary import invert

every_kernel = pytest.mark.parametrize(
    "kernel",
    ["portable", pytest.param("fast", marks=pytest.mark.skipif(not native.available(), reason="no C compiler"))],
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 positions, 16 codes a block."""
    monkeypatch.setattr(vocabulary, "ROWS", 8)
    monkeypatch.setattr(vocabulary, "BLOCK", 16)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def head(positions: int, codes: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, weights, biases, the true codes."""
    generator = torch.Generator().manual_seed(0)
    y, weight = torch.randn(positions, 6, generator=generator), torch.randn(codes, 6, generator=generator)
    bias = torch.randn(codes, generator=generator)
    return y * scale, weight, bias, torch.randint(codes, (positions,), generator=generator)


def with_gradients(inputs: tuple[Tensor, ...], smoothing: float) -> tuple[Tensor, ...]:
    y, weight, bias, codes = inputs
    leaves = y, weight, bias = [t.clone().requires_grad_() for t in (y, weight, bias)]
    loss = kernels.head_cross_entropy(y, weight, bias, codes, smoothing)
    return loss, *torch.autograd.grad(loss * 3, leaves)


def exact(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.double() if t.is_floating_point() else t for t in inputs)


SHAPES = [(9, 40), (61, 40), (24, 48), (100, 16)]


@every_kernel
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, 30.0])  # up to probabilities that underflow
@pytest.mark.parametrize(("positions", "codes"), SHAPES)
def test_the_loss_and_its_gradients(
    positions: int, codes: int, scale: float, smoothing: float, kernel: str, threads: int
):
    inputs = head(positions, codes, scale)
    with kernels.use("reference"):
        expected = with_gradients(exact(*inputs), smoothing)
    with kernels.use(kernel):
        ours = with_gradients(inputs, smoothing)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6 * scale)


@every_kernel
@pytest.mark.parametrize(("positions", "codes"), SHAPES)
def test_costs_and_draws(positions: int, codes: int, kernel: str, threads: int):
    """A draw is that of whole logits, but where u lies within rounding of two codes; its ln p is its own."""
    y, weight, bias, true = head(positions, codes)
    u = torch.rand(positions, generator=torch.Generator().manual_seed(1))
    log_p = F.linear(*exact(y, weight, bias)).log_softmax(1)
    with kernels.use(kernel):
        nats = kernels.head_nats(y, weight, bias, true)
        drawn, of_drawn = kernels.head_draw(y, weight, bias, u)
    torch.testing.assert_close(-nats.double(), log_p.gather(1, true[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_drawn.double(), log_p.gather(1, drawn[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    after = log_p.exp().cumsum(1).gather(1, drawn[:, None])[:, 0]
    before = after - of_drawn.double().exp()
    assert (before - 1e-6 <= u).all()
    assert (u <= after + 1e-6).all()


@every_kernel
@pytest.mark.parametrize("u", [0.0, 1 - 2**-24])
def test_the_ends_of_the_distribution(u: float, kernel: str):
    """The first and the last code that have a probability; one beyond a block's end has none."""
    y, weight, bias, _ = head(12, 40)
    with kernels.use(kernel):
        drawn, _ = kernels.head_draw(y, weight, bias, torch.full((12,), u))
    assert drawn.tolist() == [39 if u else 0] * 12


@every_kernel
def test_draws_follow_the_distribution(kernel: str):
    y, weight, bias, _ = head(1, 40)
    u = (torch.arange(4000) + 0.5) / 4000  # every share of [0, 1) alike
    with kernels.use(kernel):
        drawn, _ = kernels.head_draw(y.expand(4000, -1), weight, bias, u)
    found = torch.bincount(drawn, minlength=40) / 4000
    torch.testing.assert_close(found, F.linear(y, weight, bias)[0].softmax(0), rtol=0, atol=3e-4)


@pytest.mark.slow
@every_kernel
def test_no_tensor_grows_with_positions_times_codes(kernel: str):
    y, weight, bias, codes = head(300, 200)
    with kernels.use(kernel), Largest() as largest:
        kernels.head_nats(y, weight, bias, codes)
        kernels.head_draw(y, weight, bias, torch.rand(300))
        kernels.head_cross_entropy(y.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), codes).backward()
    assert largest.numel <= 300 * 7, "the states, with a one behind each; a tile of 8 positions has 13 blocks of 16"
    with torch.autocast("cpu", dtype=torch.bfloat16), Largest() as largest:
        kernels.head_cross_entropy(y, weight, bias, codes)
    assert largest.numel == 300 * 200, "half precision takes PyTorch's plain path"


@every_kernel
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_is_seen(place: int, kernel: str):
    *inputs, codes = y, weight, bias, _ = head(61, 40)
    inputs[place].view(-1)[0] = torch.nan
    with kernels.use(kernel):
        assert not kernels.head_cross_entropy(y, weight, bias, codes).isfinite()
        assert not kernels.head_nats(y, weight, bias, codes).isfinite().all()
        assert not kernels.head_draw(y, weight, bias, torch.rand(61))[1].isfinite().all()


def test_a_frozen_head_gets_no_gradient():
    y, weight, bias, codes = head(61, 40)
    assert not kernels.head_cross_entropy(y, weight, bias, codes).requires_grad
    kernels.head_cross_entropy(y.requires_grad_(), weight, bias, codes).backward()
    assert y.grad is not None


@pytest.mark.slow
def test_one_graph():
    torch._dynamo.reset()
    inputs = head(61, 40)
    compiled = torch.compile(kernels.head_cross_entropy, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), kernels.head_cross_entropy(*inputs))


def test_inversion_leaves_what_it_has_not_used():
    masses, u = (
        torch.tensor([[0.0, 2, 0, 6, 0]]).double().expand(5, -1),
        torch.tensor([0.0, 0.125, 0.25, 0.5, 1 - 2**-40]),
    )
    found, rest = invert(masses, u.double())
    assert found.tolist() == [1, 1, 3, 3, 3]
    torch.testing.assert_close(rest, torch.tensor([0, 0.5, 0, 1 / 3, 1]).double())
