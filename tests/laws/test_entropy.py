"""Entropies without the tokens x codes matrix equal their specification, in values and in gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, library

from helpers import Largest
from latticode import kernels
from latticode.kernels import entropies


def bits(n: int, dim: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits (n, dim) and weights (n,), some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, generator=generator)
    return torch.randn(n, dim, generator=generator) * scale, weights * (weights > 0.2)


def points(n: int, size: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(n, dim, generator=generator), torch.randn(size, dim, generator=generator)
    return x, codebook, torch.rand(n, generator=generator)


def batch_entropy(logits: Tensor, weights: Tensor) -> Tensor:
    return kernels.entropy(kernels.bernoulli_mixture(logits, weights) / weights.sum())


def assigned(x: Tensor, codebook: Tensor, weights: Tensor, temperature: float = 0.7) -> Tensor:
    """Both results of `soft_assignment`, weighed unevenly."""
    total, mixture = kernels.soft_assignment(x, codebook, temperature, weights)
    slope = torch.linspace(-3, 5, len(mixture), dtype=mixture.dtype)
    return total + (mixture * slope).sum() - 7 * kernels.entropy(mixture / weights.sum())


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The value and its gradients for all inputs but weights, which are the only ones of one axis."""
    inputs = tuple(t.detach().requires_grad_(t.ndim == 2) for t in inputs)
    value = function(*inputs)
    return [value.detach(), *torch.autograd.grad(value.sum(), [t for t in inputs if t.requires_grad])]


def specified(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    with kernels.use("reference"):
        return with_gradients(function, *(t.double() for t in inputs))


def assert_near(ours: list[Tensor], exact: list[Tensor], tolerance: float):
    """Relative to the greatest number of each tensor."""
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max(), ((a - b).abs().max(), b.abs().max())


SINGLE = [(torch.float32, 1e-5), (torch.float64, 1e-11)]


@pytest.mark.parametrize(("dtype", "tolerance"), SINGLE)
@pytest.mark.parametrize("scale", [0.5, 4.0, 40.0, 400.0])  # up to probabilities that underflow
@pytest.mark.parametrize("dim", [1, 2, 3, 8, 9])
def test_batch_entropy_equals_enumeration(dim: int, scale: float, dtype: torch.dtype, tolerance: float):
    logits, weights = bits(100, dim, scale)
    logits[0], logits[1] = 0.0, 90.0
    ours = with_gradients(batch_entropy, logits.to(dtype), weights.to(dtype))
    assert ours[0].dtype == ours[1].dtype == dtype
    assert_near(ours, specified(batch_entropy, logits, weights), tolerance)


def test_nearly_even_codes_keep_the_digits_of_their_gradient():
    """Where all of ln p are about -7.6, and only their differences count."""
    logits, weights = bits(60, 11, 0.3)
    assert_near(with_gradients(batch_entropy, logits, weights), specified(batch_entropy, logits, weights), 3e-6)


def test_weights_get_no_gradient():
    logits, weights = bits(20, 4, 1.0)
    x, codebook, _ = points(20, 5, 3)
    weights.requires_grad_()
    assert not kernels.bernoulli_mixture(logits, weights).requires_grad
    assert not any(part.requires_grad for part in kernels.soft_assignment(x, codebook, 1.0, weights))


@pytest.mark.parametrize(("dtype", "tolerance"), SINGLE)
def test_mixture_equals_enumeration(dtype: torch.dtype, tolerance: float):
    logits, weights = (t.to(dtype) for t in bits(70, 7, 3.0))
    mixture = kernels.bernoulli_mixture(logits, weights)
    with kernels.use("reference"):
        exact = kernels.bernoulli_mixture(logits.double(), weights.double())
    torch.testing.assert_close(mixture.double(), exact, rtol=tolerance, atol=0.0)
    torch.testing.assert_close(mixture.sum(), weights.sum())


def test_the_first_bit_is_the_fastest():
    logits = torch.tensor([[500.0, -500, -500], [-500, -500, 500], [500, 500, -500]])
    mixture = kernels.bernoulli_mixture(logits, torch.tensor([1.0, 2.0, 4.0]))
    assert mixture.tolist() == [0, 1, 0, 4, 2, 0, 0, 0]


@pytest.mark.parametrize("dim", [18, 19])
def test_one_token_has_the_entropy_of_its_bits(dim: int):
    """For 2^18 codes and more, whose probabilities lie below any clamp: the law that two kernels must share."""
    logits = torch.randn(1, dim) * 1.5
    ours = with_gradients(lambda one: batch_entropy(one.expand(3, -1), torch.ones(3)), logits)
    assert_near(ours, with_gradients(kernels.bernoulli_entropy, logits.double()), 1e-5)
    assert ours[0].item() == pytest.approx(kernels.bernoulli_entropy(logits).item(), rel=1e-5)


def test_independent_halves_have_the_sum_of_their_entropies():
    """All pairs of tokens of two sets: H = H_1 + H_2, so 2^18 codes are checked by enumerating 2^9."""
    first, second = bits(12, 9, 3.0)[0], bits(9, 9, 1.0, seed=1)[0]

    def pairs(a: Tensor, b: Tensor) -> Tensor:
        both = torch.cat([a[:, None].expand(-1, len(b), -1), b[None].expand(len(a), -1, -1)], dim=-1).flatten(0, 1)
        return batch_entropy(both, torch.ones(len(both), dtype=both.dtype))

    def apart(a: Tensor, b: Tensor) -> Tensor:
        return sum(batch_entropy(t, torch.ones(len(t), dtype=t.dtype)) for t in (a, b))  # type: ignore[return-value]

    assert_near(with_gradients(pairs, first, second), specified(apart, first, second), 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), SINGLE)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_entropy_of_bits_equals_enumeration(scale: float, dtype: torch.dtype, tolerance: float):
    logits = bits(50, 6, scale)[0]
    ours = with_gradients(kernels.bernoulli_entropy, logits.to(dtype))
    assert ours[0].shape == (50,)
    assert_near(ours, specified(kernels.bernoulli_entropy, logits), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_of_sure_bits_keeps_its_digits(dtype: torch.dtype):
    """Where softplus(l) - l sigmoid(l) would cancel: H = (1 + l) e^-l and dH/dl = -l e^-l for large l."""
    logits = torch.tensor([[50.0], [-50.0], [70.0], [3e38], [-3e38], [torch.inf], [0.0]], dtype=dtype)
    value, gradient = with_gradients(kernels.bernoulli_entropy, logits)
    tail = math.exp(-50), math.exp(-70)
    expected = [51 * tail[0], 51 * tail[0], 71 * tail[1], 0, 0, 0, math.log(2)]
    slopes = [-50 * tail[0], 50 * tail[0], -70 * tail[1], 0, 0, 0, 0]
    torch.testing.assert_close(value.double(), torch.tensor(expected).double(), rtol=2e-6, atol=1e-35)
    torch.testing.assert_close(gradient[:, 0].double(), torch.tensor(slopes).double(), rtol=2e-6, atol=1e-35)


def test_extreme_logits_do_no_harm():
    logits = torch.tensor([[3e38, -3e38, 1.0], [torch.inf, -torch.inf, -2.0], [0.0, 1e-30, 40.0]])
    exact = specified(batch_entropy, logits.clamp(-700, 700), torch.ones(3))
    assert_near(with_gradients(batch_entropy, logits, torch.ones(3)), exact, 1e-5)


def test_entropy_of_a_distribution():
    p = torch.tensor([0.5, 0.0, 0.25, 0.25, 0.0])
    value, gradient = with_gradients(lambda t: kernels.entropy(t[0]), p[None])
    assert value.item() == pytest.approx(1.5 * math.log(2))
    torch.testing.assert_close(gradient[0], torch.where(p > 0, -(p.log() + 1), 0.0))
    assert kernels.entropy(torch.zeros(4)) == 0
    uniform = torch.full((2**16,), 2.0**-16)
    assert kernels.entropy(uniform).item() == pytest.approx(16 * math.log(2), rel=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("temperature", [5.0, 0.7, 0.1])
@pytest.mark.parametrize(("size", "dim"), [(1, 1), (2, 3), (200, 6), (1500, 6)])
@pytest.mark.parametrize("active", ["fast", "portable"])
def test_soft_assignment_equals_enumeration(
    size: int, dim: int, temperature: float, dtype: torch.dtype, tolerance: float, active: str
):
    inputs, function = points(60, size, dim), partial(assigned, temperature=temperature)
    with kernels.use(active):
        ours = with_gradients(function, *(t.to(dtype) for t in inputs))
    exact = specified(function, *inputs)
    assert ours[0].dtype == ours[1].dtype == ours[2].dtype == dtype
    if size > 1:
        assert_near(ours, exact, tolerance)
    else:  # a single code has no entropy and nothing to gain
        assert_near(ours[:1], exact[:1], tolerance)
        assert all((t == 0).all() for t in ours[1:])


def test_threads_make_no_difference():
    x, codebook, weights = points(400, 1500, 6)
    alone = with_gradients(assigned, x, codebook, weights)
    torch.set_num_threads(3)
    try:
        together = with_gradients(assigned, x, codebook, weights)
    finally:
        torch.set_num_threads(1)
    assert_near(together, alone, 1e-6)


def test_a_nan_stays_one():
    x, codebook, weights = points(3, 200, 4)
    x[1, 2] = torch.nan
    for active in ("fast", "portable"):
        with kernels.use(active):
            value, of_x, of_codes = with_gradients(assigned, x, codebook, weights)
        assert value.isnan()
        assert of_codes.isnan().any()
        assert of_x[1].isnan().all()


def test_a_common_offset_costs_soft_assignment_no_accuracy():
    x, codebook, weights = points(60, 200, 6)
    x, codebook = x + 300, codebook + 300
    assert_near(with_gradients(assigned, x, codebook, weights), specified(assigned, x, codebook, weights), 2e-5)


def test_far_tokens_are_assigned_to_one_code():
    x, codebook = torch.tensor([[1e15, 0.0], [-1e4, 3.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    total, mixture = kernels.soft_assignment(x, codebook, 0.01, torch.ones(2))
    assert total < 1e-10
    torch.testing.assert_close(mixture, torch.ones(2))
    assert all(t.isfinite().all() for t in with_gradients(assigned, x, codebook, torch.ones(2)))


CASES = {
    "bits": (lambda logits: kernels.bernoulli_entropy(logits), lambda: bits(90, 6, 3.0)[:1]),
    "mixture": (batch_entropy, lambda: bits(90, 7, 3.0)),
    "assignment": (assigned, lambda: points(90, 40, 5)),
}


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    function, inputs = CASES[request.param]
    return function, inputs()


Case = tuple[Callable[..., Tensor], tuple[Tensor, ...]]


def test_tiles_make_no_difference(case: Case, monkeypatch: pytest.MonkeyPatch):
    whole = with_gradients(case[0], *case[1])
    monkeypatch.setattr(entropies, "CPU_TILE", 1)
    monkeypatch.setattr(entropies, "LEAST", 7)
    for ours, expected in zip(with_gradients(case[0], *case[1]), whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_no_tensor_grows_with_tokens_times_codes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(entropies, "CPU_TILE", 1)
    monkeypatch.setattr(entropies, "LEAST", 16)
    kept: list[Tensor] = []
    logits, weights = bits(1000, 12, 3.0)
    x, codebook, _ = points(1000, 900, 4)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernels.bernoulli_mixture(logits.requires_grad_(), weights)
        assert sum(t.numel() for t in kept) == 1000 * 13
        kernels.soft_assignment(x.requires_grad_(), codebook, 0.5, weights)
        assert sum(t.numel() for t in kept[2:]) == 1000 * 5 + 900 * 4
    logits, x = logits.detach(), x.detach()
    with Largest() as largest:
        mixture = entropies.bernoulli_mixture._init_fn(logits, weights)
        entropies._bernoulli_mixture_backward._init_fn(mixture, logits, weights)
    assert largest.numel == 1000 * 12
    with Largest() as largest:
        total, mixture = entropies.soft_assignment._init_fn(x, codebook, weights, 0.5)
        entropies._soft_assignment_backward._init_fn(total, mixture, x, codebook, weights, 0.5)
    assert largest.numel == 16 * 900


def test_weight_zero_is_as_if_the_token_were_not_there(case: Case):
    function, (x, *rest) = case
    if function not in (batch_entropy, assigned):
        return
    keep = torch.arange(len(x)) % 3 > 0
    x, weights = x.clone(), rest[-1] + 0.1
    expected = with_gradients(function, x[keep], *rest[:-1], weights[keep])
    x[~keep], weights[~keep] = torch.nan, 0.0
    ours = with_gradients(function, x, *rest[:-1], weights)
    assert (ours[1][~keep] == 0).all()
    ours[1] = ours[1][keep]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_no_tokens():
    for dtype in (torch.float32, torch.bfloat16):
        logits, weights = torch.zeros(0, 5, dtype=dtype, requires_grad=True), torch.zeros(0)
        mixture = kernels.bernoulli_mixture(logits, weights)
        assert mixture.dtype == torch.float32
        assert torch.equal(mixture, torch.zeros(32))
        assert kernels.bernoulli_entropy(logits).shape == (0,)
        total, assignment = kernels.soft_assignment(logits, torch.randn(3, 5), 1.0, weights)
        assert total == 0
        assert torch.equal(assignment, torch.zeros(3))
        (gradient,) = torch.autograd.grad(mixture.sum() + total + assignment.sum(), logits)
        assert gradient.shape == (0, 5)


def test_autocast_and_half_precision_change_nothing(case: Case):
    function, inputs = case
    expected = with_gradients(function, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(with_gradients(function, *inputs), expected, strict=True))
    rough = [t.bfloat16() if t.ndim == 2 else t for t in inputs]
    ours, wide = with_gradients(function, *rough), with_gradients(function, *(t.float() for t in rough))
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(ours, wide, strict=True))
    assert ours[0].dtype == torch.float32


def test_strided_inputs(case: Case):
    function, inputs = case
    strided = tuple(torch.stack([t, -t], dim=-1)[..., 0] for t in inputs)
    torch.testing.assert_close(with_gradients(function, *strided), with_gradients(function, *inputs))


@pytest.mark.slow
def test_one_graph(case: Case):
    torch._dynamo.reset()
    function, inputs = case
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for rows in (slice(None), slice(50)):  # the second is compiled for any number of tokens
        some = tuple(t[rows] if len(t) == 90 else t for t in inputs)
        torch.testing.assert_close(with_gradients(compiled, *some), with_gradients(function, *some))


@pytest.mark.slow
def test_operators_keep_their_promises():
    logits, weights = bits(9, 5, 2.0)
    library.opcheck(entropies.bernoulli_entropy, (logits.requires_grad_(),))
    library.opcheck(entropies.bernoulli_mixture, (logits, weights))
    x, codebook, weights = points(9, 7, 3)
    library.opcheck(entropies.soft_assignment, (x.requires_grad_(), codebook.requires_grad_(), weights, 0.5))


def test_the_switch_selects_the_specification(case: Case, monkeypatch: pytest.MonkeyPatch):
    for name in ("bernoulli_entropy", "bernoulli_mixture", "soft_assignment", "entropy"):
        monkeypatch.setattr(entropies, name, None)
    with kernels.use("reference"):
        assert case[0](*case[1]).isfinite().all()
    with pytest.raises(TypeError):
        case[0](*case[1])


def test_refuses_what_does_not_fit():
    ones = torch.ones(3)
    for logits, weights in (
        (torch.zeros(3), ones),
        (torch.zeros(3, 0), ones),
        (torch.zeros(2, 4), ones),
        (torch.zeros(3, 4, dtype=torch.int64), ones),
        (torch.zeros(3, 4), ones.long()),
    ):
        with pytest.raises(ValueError, match=r"bernoulli_mixture expects float tokens .* got \("):
            kernels.bernoulli_mixture(logits, weights)
    for codebook, temperature in ((torch.zeros(2, 3), 1.0), (torch.zeros(0, 4), 1.0), (torch.zeros(2, 4), 0.0)):
        with pytest.raises(ValueError, match=r"a codebook \(K, 4\) with K >= 1 and a temperature > 0, got"):
            kernels.soft_assignment(torch.zeros(3, 4), codebook, temperature, ones)
    with pytest.raises(ValueError, match="bernoulli_entropy expects float tokens"):
        kernels.bernoulli_entropy(torch.zeros(4))
