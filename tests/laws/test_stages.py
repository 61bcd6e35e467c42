"""All residual stages of a clamped lattice at once: the specification, what decodes it, and stage after stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, library, nn

from latticode import kernels
from latticode.kernels import Lattice, reference, stages, to_lattices
from latticode.quantizers import FSQ, Residual

LEVELS = [(2,), (9,), (3, 2), (8, 5, 5, 5), (2, 9, 4, 7, 3, 6), (5000, 3), (2,) * 24]


@pytest.fixture(autouse=True, params=["fast", "portable"])
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with kernels.use(request.param):
        yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clamped(*levels: int, factors: int = 1) -> Lattice:
    return Lattice(levels, "clamp", factors=factors)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize("depth", range(1, 9))
def test_equals_the_specification(levels: tuple[int, ...], depth: int):
    for factors in {1, len(levels)}:
        lattice = clamped(*levels, factors=factors)
        z = draw(300, len(levels))
        for got, expected in zip(to_lattices(z, lattice, depth), reference.to_lattices(z, lattice, depth), strict=True):
            assert torch.equal(got, expected)


def test_all_digits_of_all_places_of_a_group():
    for level in range(2, 65):
        (depth, *_) = stages.sizes(clamped(level), 12)
        count = level**depth
        z = (torch.arange(count) - (count - 1) / 2)[:, None] / ((level - 1) * level ** (depth - 1) / 2)
        powers = level ** torch.arange(depth - 1, -1, -1)
        assert torch.equal(to_lattices(z, clamped(level), depth)[1], torch.arange(count)[:, None] // powers % level)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 127, 255, 256, 257, 320, 1000])
def test_every_size_and_place_gives_the_same(count: int, monkeypatch: pytest.MonkeyPatch):
    lattice, z = clamped(8, 5, 5, 5), draw(count, 4)
    expected = reference.to_lattices(z, lattice, 8)
    gradient = draw(count, 4, seed=1)
    back = reference.to_lattices_backward(gradient, z, lattice, 8)
    monkeypatch.setattr(stages, "BLOCK", 1024)
    for got, one in zip(stages.to_lattices(z, lattice, 8), expected, strict=True):
        assert torch.equal(got, one)
    assert torch.equal(stages.to_lattices_backward(gradient, z, lattice, 8), back)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_and_strides(dtype: torch.dtype):
    lattice, z = clamped(8, 5, 5, 5), draw(4, 5, 60).to(dtype).transpose(1, 2)[..., :4].requires_grad_()
    latents, codes = to_lattices(z, lattice, 5)
    expected = reference.to_lattices(z, lattice, 5)
    assert latents.dtype == dtype
    assert torch.equal(latents, expected[0])
    assert torch.equal(codes, expected[1])
    (gradient,) = torch.autograd.grad(latents.sum(), z)
    assert torch.equal(gradient, reference.to_lattices_backward(torch.ones_like(z), z, lattice, 5))


@pytest.mark.parametrize("depth", [1, 2, 5, 8])
def test_the_gradient_is_that_of_the_stages_one_after_another(depth: int):
    z = (draw(2000, 4) * 1.2).requires_grad_()
    stage = FSQ([8, 5, 2, 3], bound="clamp")
    left, total = z, torch.zeros(())
    for i in range(depth):
        scale = torch.tensor(stage.levels) ** -float(i)
        latents = stage(left / scale).latents * scale
        left, total = left - latents, total + latents
    upstream = draw(2000, 4, seed=1)
    ours = to_lattices(z, stage._lattice, depth)[0]
    gradients = [torch.autograd.grad(one, z, upstream)[0] for one in (ours, total)]
    near = (z.detach().abs() - stages.limits(stage._lattice, depth)).abs() < 1e-6
    assert 0.02 < gradients[0].eq(0).float().mean() < 0.6
    torch.testing.assert_close(gradients[0].masked_fill(near, 0.0), gradients[1].masked_fill(near, 0.0))


@pytest.mark.parametrize("kernel", [stages, reference])
def test_the_gradient_passes_up_to_the_limit_itself(kernel: object):
    lattice = clamped(8, 5, 5, 5)
    limit = stages.limits(lattice, 8)
    z = torch.stack([limit, -limit, limit.nextafter(torch.tensor(9.0)), -limit.nextafter(torch.tensor(9.0))])
    got = kernel.to_lattices_backward(torch.ones(4, 4), z, lattice, 8)  # type: ignore[attr-defined]
    assert torch.equal(got, torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None].expand(4, 4))  # back from above


@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2, 9, 4, 7)], ids=str)
def test_stage_after_stage_gives_the_same_but_at_edges(levels: tuple[int, ...]):
    """Dropout takes that path; codes differ only where float32 cannot tell, and then the latents do not."""
    z = draw(20_000, 4).tanh()
    joint = Residual(FSQ(levels, bound="clamp"), 5)
    single = Residual([FSQ(levels, bound="clamp") for _ in range(5)])
    differ = (joint.encode(z) != single.encode(z)).any(dim=1)
    assert differ.float().mean() < 0.005
    error = [(q.decode(q.encode(z)) - z).abs() for q in (joint, single)]
    cell = torch.tensor([n**-5 * n / (n - 1) for n in levels])
    assert (error[0] <= cell * 1.001 + 2e-7).all()
    torch.testing.assert_close(joint(z).latents[~differ], single(z).latents[~differ], atol=2e-7, rtol=0)


@pytest.mark.parametrize("depth", [1, 3, 5, 8])
@pytest.mark.parametrize("factors", [1, 2])
def test_decode_gives_the_latents_and_each_prefix(depth: int, factors: int):
    stage = FSQ([8, 5, 2, 9], bound="clamp", factors=factors)
    quantizer = Residual(stage, depth)
    z = draw(700, 4)
    out = quantizer(z)
    assert torch.equal(quantizer.decode(out.codes), out.latents)
    assert torch.equal(quantizer.encode(z), out.codes)
    total = torch.zeros(700, 4)
    for i in range(depth):
        chunk = out.codes[:, i * factors : (i + 1) * factors]
        total = total + stage.decode(chunk) * torch.tensor([8.0, 5, 2, 9]) ** -i
        short = out.codes.clone()
        short[:, (i + 1) * factors :] = -1
        prefix = quantizer.decode(out.codes[:, : (i + 1) * factors])
        assert torch.equal(quantizer.decode(short), prefix)
        torch.testing.assert_close(prefix, total, atol=3e-7, rtol=1e-6)


def test_broken_and_huge_tokens_touch_no_other():
    lattice, z = clamped(8, 5, 5, 5), draw(100, 4)
    broken = z.clone()
    broken[3, 1], broken[70], broken[99, 0] = torch.nan, torch.inf, 3e38
    kept = torch.ones(100, dtype=torch.bool).index_fill(0, torch.tensor([3, 70]), False)
    for kernel in ("fast", "reference"):
        with kernels.use(kernel):
            latents, codes = to_lattices(broken.requires_grad_(), lattice, 8)
            (gradient,) = torch.autograd.grad(latents[kept].sum() + latents.sum(), broken)
        assert (codes[~kept] == -1).all()
        assert latents[~kept].isnan().all()
        assert (gradient[~kept] == 0).all()
        assert torch.equal(codes[:3], to_lattices(z, lattice, 8)[1][:3])
        assert codes[99].min() >= 0
        assert latents[99, 0] == latents.detach()[kept, 0].max()


def test_masks_and_soft_clamp_and_dropout():
    z, mask = draw(50, 4), torch.arange(50) % 3 > 0
    z[1] = torch.inf
    every: list[dict[str, Any]] = [{}, {"soft_clamp": True}, {"dropout": 1.0}]
    for options in every:
        out = Residual(FSQ([8, 5, 5, 5], bound="clamp"), 4, **options)(z, mask)
        assert (out.latents[~mask] == 0).all()
        assert out.latents[1].isnan().all()
        assert (out.codes[~mask] == -1).all()
        assert (out.codes[1] == -1).all()
        assert (out.codes[2, -1] == -1) == ("dropout" in options)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.quantizer = Residual(FSQ([8, 5, 5, 5], bound="clamp"), 6)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        out = self.quantizer(z)
        return out.latents, out.codes


@pytest.mark.slow
def test_compiles_whole():
    model, z = Model(), draw(77, 4).requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(z), model(z), strict=True):
        assert torch.equal(got, expected)
    gradients = [torch.autograd.grad(one(z)[0].square().sum(), z)[0] for one in (compiled, model)]
    assert torch.equal(*gradients)


@pytest.mark.slow
def test_exported_it_is_plain_operators():
    program = torch.export.export(Model(), (draw(10, 4),), dynamic_shapes={"z": {0: torch.export.Dim("n")}})
    assert "latticode" not in str(program.graph)
    z = draw(77, 4, seed=1)
    for got, expected in zip(program.module()(z), Model()(z), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.slow
def test_operators_keep_their_promises():
    z = draw(6, 4).requires_grad_()
    library.opcheck(kernels._to_lattices, (z, [8, 5, 5, 5], 2, 3))  # type: ignore[arg-type]


def test_refuses_what_is_not_one_even_grid():
    with pytest.raises(ValueError, match=r"floats \(\.\.\., 2\), got \(3, 4\)"):
        to_lattices(draw(3, 4), clamped(3, 3), 2)
    for lattice in (Lattice((3,)), Lattice((3,), "clamp", slope=1.0), clamped(5000, 5000)):
        with pytest.raises(ValueError, match="clamped lattice of up to 16777216 codes"):
            to_lattices(draw(3, len(lattice.levels)), lattice, 2)
