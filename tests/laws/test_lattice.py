"""The fast kernels of finite scalar quantization equal their specification, bit for bit on a CPU."""

from __future__ import annotations

import functools
import math
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, library, nn

from latticode import kernels
from latticode.kernels import Lattice, native, reference, to_lattice
from latticode.kernels import lattice as fast
from latticode.kernels.grid import BOUNDS

LATTICES = [
    *(Lattice((8, 5, 5, 5), bound, slope) for bound in BOUNDS for slope in (2.0, 1.6)),
    *(Lattice((2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 16, 17, 14, 15, 8), bound, factors=4) for bound in BOUNDS),
    Lattice((7,), "paper"),
    Lattice((2,), "symmetric", 0.7),
    Lattice((16,) * 20, "symmetric", factors=20),
    Lattice((16,) * 15),
    Lattice((1000, 2), "equal-bins"),
]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {  # of (6, 10, 13, d)
    "tokens": lambda z: z,
    "image": lambda z: z.movedim(-1, 1).contiguous().movedim(1, -1),
    "wide image": lambda z: z.reshape(3, 260, -1).movedim(-1, 1).contiguous().movedim(1, -1),
    "channels first of all": lambda z: z.movedim(-1, 0).contiguous().movedim(0, -1),
    "small image": lambda z: z.reshape(195, 2, 2, -1).movedim(-1, 1).contiguous().movedim(1, -1),
    "gaps": lambda z: z.repeat_interleave(2, dim=1)[:, ::2],
    "transposed": lambda z: z.transpose(0, 2).contiguous().transpose(0, 2),
    "one row": lambda z: z.reshape(1, 780, -1),
}


@pytest.fixture(autouse=True, params=["fast", "portable"])
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with kernels.use(request.param):
        yield


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_what_could_be_compiled_was():
    assert native.available()
    assert kernels._LATTICE["fast"] is native


def draw(lattice: Lattice, *shape: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    return torch.randn(*shape, len(lattice.levels), generator=torch.Generator().manual_seed(seed)) * scale


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, with NaN equal to NaN and -0 not equal to 0."""
    equal = (a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())
    return a.dtype == b.dtype and a.shape == b.shape and bool(equal.all())


def equals_the_specification(z: Tensor, lattice: Lattice) -> bool:
    (latents, codes), (expected, indices) = to_lattice(z, lattice), reference.to_lattice(z, lattice)
    return same(latents, expected) and same(codes, indices)


def edges(lattice: Lattice, channel: int) -> Tensor:
    """Where the digits of a channel change, in float64, and what lies within 40 float32 steps of there."""
    c = [float(constant[channel]) for constant in lattice.channels(torch.device("cpu"))]
    shift, gain, base, zero = c[:4]
    cuts = (torch.arange(lattice.levels[channel] - 1).double() + 0.5 - zero - base) / gain
    x = cuts[cuts.abs() < 1] if lattice.bound == "clamp" else torch.atanh(cuts[cuts.abs() < 1])
    z = ((x - shift) / lattice.alpha).float()
    steps = (torch.arange(-40, 41) * 2.0**-24)[:, None]
    return (z + z.abs().clamp(min=0.1) * steps).flatten()


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few thousand numbers fill several."""
    monkeypatch.setattr(fast, "BLOCK", 4096)


@pytest.mark.parametrize("lattice", LATTICES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_specification_in_every_layout(lattice: Lattice, layout: str):
    z = draw(lattice, 6, 10, 13)
    z[0, 3, 2, 0], z[4, 4, 4, -1], z[5, 9, 12, 0] = torch.nan, torch.inf, -torch.inf
    z = LAYOUTS[layout](z)
    assert equals_the_specification(z, lattice)
    latents, codes = to_lattice(z, lattice)
    assert latents.stride() == torch.empty_like(z).stride()
    assert codes.is_contiguous()
    gradient = draw(lattice, *z.shape[:-1], seed=1)
    ours = fast.to_lattice_backward(gradient, z, lattice)
    torch.testing.assert_close(ours, reference.to_lattice_backward(gradient, z, lattice), atol=3e-6, rtol=1e-5)


def test_axes_of_length_one_do_not_decide_the_layout():
    """One pixel is channels first and last at once; a convolution sums in another order by what the strides say."""
    z = torch.randn(2, 4, 1, 1).movedim(1, -1)
    assert to_lattice(z, LATTICES[0])[0].stride() == (4, 4, 4, 1)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 63, 64, 65, 1023, 1024, 1025, 2048, 5000])
def test_equals_the_specification_around_the_ends_of_blocks(count: int):
    for lattice in LATTICES[:3]:
        assert equals_the_specification(draw(lattice, count), lattice)
        assert equals_the_specification(draw(lattice, 2, count).movedim(-1, 1).contiguous().movedim(1, -1), lattice)


@pytest.mark.parametrize("lattice", LATTICES, ids=str)
def test_digits_are_exact_at_the_edges(lattice: Lattice):
    """Where sigmoid's last place decides, the correctly rounded tanh has the word."""
    for channel in {0, len(lattice.levels) - 1}:
        near = edges(lattice, channel)
        z = torch.zeros(len(near), len(lattice.levels))
        z[:, channel] = near
        assert len(to_lattice(z, lattice)[1].unique(dim=0)) > 1
        assert equals_the_specification(z, lattice)
        assert equals_the_specification(z.t().contiguous().t(), lattice)


@pytest.mark.parametrize("bound", [bound for bound in BOUNDS if bound != "clamp"])
@pytest.mark.parametrize("slope", [2.0, 1.6, 0.7])
def test_the_margin_is_twice_the_error_of_a_position(bound: str, slope: float):
    z = torch.cat([torch.randn(100_000) * scale for scale in (0.3, 1, 4)])[:, None]
    for level in (2, 3, 8, 16, 64):
        lattice = Lattice((level,), bound, slope)
        c, tiles = lattice.channels(z.device), fast._tiles(lattice, 1, 1)
        found = torch.add(tiles.lean, z, alpha=slope).sigmoid_().mul_(tiles.scale).add_(tiles.offset)
        error = found.double() - (lattice.position(z, c).double() + c.zero)
        assert error.abs().max() < fast.MARGIN * level / 2


@pytest.mark.parametrize(("bound", "threads"), [*((bound, 1) for bound in BOUNDS), ("paper", 2)])
def test_same_bits_wherever_a_token_stands(bound: str, threads: int):
    lattice = Lattice((8, 5, 5, 5), bound)
    z, gradient = draw(lattice, 40_001), draw(lattice, 40_001, seed=1)
    quantize = functools.partial(to_lattice, lattice=lattice)
    wanted = (*quantize(z), fast.to_lattice_backward(gradient, z, lattice))

    def seen(pick: Any) -> tuple[Tensor, ...]:
        return (*quantize(pick(z)), fast.to_lattice_backward(pick(gradient), pick(z), lattice))

    torch.set_num_threads(threads)
    try:
        picks: list[Any] = [
            lambda t, i=i, size=size: t[i : i + size] for size in (1, 3, 40, 700, 33_000) for i in (0, 5, 41)
        ]
        picks += [lambda t: t.t().contiguous().t(), lambda t: t[:777].t().contiguous().t(), lambda t: t]
        for pick in picks:
            assert all(same(a, pick(b)) for a, b in zip(seen(pick), wanted, strict=True))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bound", BOUNDS)
def test_arithmetic_is_float32(bound: str, dtype: torch.dtype):
    lattice = Lattice((8, 5, 3), bound, 1.6)
    z = draw(lattice, 2000).to(dtype).requires_grad_()
    wide = z.detach().float().requires_grad_()
    outs = [to_lattice(t, lattice) for t in (z, wide)]
    assert same(outs[0][0], outs[1][0].to(dtype))
    assert same(outs[0][1], outs[1][1])
    gradients = [torch.autograd.grad(out[0].sum(), t)[0] for out, t in zip(outs, (z, wide), strict=True)]
    assert same(gradients[0], gradients[1].to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(to_lattice(wide, lattice)[0], outs[1][0])


@pytest.mark.parametrize("layout", ["tokens", "image", "gaps"])
def test_a_nan_stays_with_its_token_and_infinities_saturate(layout: str):
    lattice = Lattice((8, 5, 5, 5), factors=2)
    z = draw(lattice, 6, 10, 13)
    broken = z.clone()
    broken[2, 3, 4, 1] = torch.nan
    broken[5, 1, 1] = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30])
    latents, codes = to_lattice(LAYOUTS[layout](broken), lattice)
    clean, indices = to_lattice(z, lattice)
    assert codes[2, 3, 4].tolist() == [-1, -1]
    assert latents[2, 3, 4].isnan().tolist() == [False, True, False, False]
    assert latents[5, 1, 1].tolist() == [0.75, -1, 1, -1]
    assert codes[5, 1, 1].tolist() == [7, 4]
    clean[2, 3, 4], clean[5, 1, 1] = latents[2, 3, 4], latents[5, 1, 1]
    indices[2, 3, 4], indices[5, 1, 1] = codes[2, 3, 4], codes[5, 1, 1]
    assert same(latents, clean)
    assert same(codes, indices)
    gradient = fast.to_lattice_backward(torch.ones_like(z), LAYOUTS[layout](broken), lattice)
    assert gradient[2, 3, 4, 1] == 0
    assert gradient.isfinite().all()
    assert (gradient[5, 1, 1] == 0).all()


@pytest.mark.parametrize("lattice", LATTICES, ids=str)
def test_the_gradient_is_that_of_the_bound(lattice: Lattice):
    """Against autograd of the formula in float64."""
    z = draw(lattice, 3000).requires_grad_()
    weights = draw(lattice, 3000, seed=1)
    (ours,) = torch.autograd.grad((to_lattice(z, lattice)[0] * weights).sum(), z)
    wide = z.detach().double().requires_grad_()
    c = [constant.double() for constant in lattice.channels(z.device)]
    x = wide * lattice.alpha + c[0]
    # beyond the ends of the clamp x itself passes what leads back
    bounded = torch.where((x.abs() <= 1) | (weights * x > 0), x, 0.0) if lattice.bound == "clamp" else x.tanh()
    value = (bounded * c[1] + c[2] + c[3] - c[5]) / c[5]
    (theirs,) = torch.autograd.grad((value * weights.double()).sum(), wide)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [fast, native, reference], ids=["fast", "native", "reference"])
def test_the_clamp_passes_gradients_up_to_its_ends_and_back_from_beyond(kernel):
    lattice = Lattice((5,), "clamp")
    above = 1 + 2**-23  # the next float32
    z = torch.tensor([[-above], [-1.0], [0.3], [1.0], [above]])
    for gradient, expected in ((1.0, [0, 1, 1, 1, 1]), (-1.0, [-1, -1, -1, -1, 0])):
        got = kernel.to_lattice_backward(torch.full_like(z, gradient), z, lattice)
        assert got.flatten().tolist() == expected


@pytest.mark.parametrize("gradient", ["expanded", "transposed"])
def test_gradients_of_another_layout(gradient: str):
    lattice = Lattice((8, 5, 5, 5))
    z = draw(lattice, 300)
    above = torch.tensor(2.0).expand(300, 4) if gradient == "expanded" else draw(lattice, 300).t().contiguous().t()
    ours = fast.to_lattice_backward(above, z, lattice)
    assert same(ours, fast.to_lattice_backward(above.contiguous(), z, lattice))


@pytest.mark.parametrize(
    "levels", [(256, 256, 256), (255, 257, 256), (2**16, 2**16), (16,) * 15, (7,) * 22, (2,) * 62, (2**22, 4)], ids=str
)
@pytest.mark.parametrize("layout", ["tokens", "image"])
def test_indices_are_exact_up_to_63_bits(levels: tuple[int, ...], layout: str):
    lattice = Lattice(levels, "clamp")
    places = torch.rand(200, len(levels), dtype=torch.float64)
    places[0], places[1] = 0, 1
    z = LAYOUTS[layout]((places * 2 - 1).float().view(2, 10, 10, -1))
    latents, codes = to_lattice(z, lattice)
    top = torch.tensor(levels) - 1
    digits = ((latents.double() + 1) / 2 * top).round().long().reshape(200, -1).tolist()
    expected = [sum(d * b for d, b in zip(row, lattice.basis, strict=True)) for row in digits]
    assert codes.flatten().tolist() == expected
    assert expected[1] == math.prod(levels) - 1


def test_matrix_precision_of_the_process_does_not_matter():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert equals_the_specification(draw(LATTICES[0], 20_000), LATTICES[0])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_inference_mode_leaves_nothing_behind():
    lattice = Lattice((8, 5, 4, 3, 3), slope=1.234)  # of no other test: its constants are made here
    with torch.inference_mode():
        expected = to_lattice(draw(lattice, 70), lattice)
    z = draw(lattice, 70).requires_grad_()
    latents, codes = to_lattice(z, lattice)
    latents.sum().backward()
    assert same(latents, expected[0])
    assert same(codes, expected[1])


class Module(nn.Module):
    def __init__(self, lattice: Lattice):
        super().__init__()
        self.lattice = lattice

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return to_lattice(z, self.lattice)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tokens", "image"])
def test_compiles_as_one_graph(layout: str):
    torch._dynamo.reset()
    lattice = Lattice((8, 5, 5, 5), factors=2)
    compiled = torch.compile(Module(lattice), backend="aot_eager", fullgraph=True, dynamic=True)
    for seed, rows in ((0, 6), (1, 12)):
        z = LAYOUTS[layout](draw(lattice, rows, 10, 13, seed=seed)).detach().requires_grad_()
        twin = z.detach().requires_grad_()
        (latents, codes), (expected, indices) = compiled(z), to_lattice(twin, lattice)
        assert same(latents, expected)
        assert same(codes, indices)
        assert latents.stride() == expected.stride()
        for out in (latents, expected):
            out.square().sum().backward()
        assert z.grad is not None
        assert twin.grad is not None
        assert same(z.grad, twin.grad)


@pytest.mark.slow
@pytest.mark.parametrize("bound", BOUNDS)
def test_exports_plain_operators(bound: str):
    lattice = Lattice((8, 5, 2), bound, factors=3)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(Module(lattice), (draw(lattice, 6),), dynamic_shapes={"z": batch})
    assert "latticode" not in str(program.graph)
    z = draw(lattice, 50, seed=1)
    latents, codes = program.module()(z)
    assert same(codes, to_lattice(z, lattice)[1])
    torch.testing.assert_close(latents, to_lattice(z, lattice)[0])


@pytest.mark.slow
def test_the_operator_is_registered_as_torch_expects():
    z = draw(LATTICES[0], 2, 5, 5).movedim(-1, 1).contiguous().movedim(1, -1).requires_grad_()
    arguments = ([8, 5, 5, 5], "paper", 2.0, 1)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    library.opcheck(kernels._to_lattice, (z, *arguments), test_utils=checks)
    library.opcheck(kernels._to_lattice_backward, (z.detach(), z.detach(), *arguments), test_utils=checks)


def test_the_switch_selects_the_specification(monkeypatch: pytest.MonkeyPatch):
    lattice = LATTICES[0]
    z = draw(lattice, 50).requires_grad_()
    plain = to_lattice(z, lattice)[0]
    (gradient,) = torch.autograd.grad(plain.sum(), z)
    with kernels.use("reference"):
        latents, _ = to_lattice(z, lattice)
        assert same(latents, plain)
        torch.testing.assert_close(torch.autograd.grad(latents.sum(), z)[0], gradient, atol=3e-6, rtol=1e-5)
        monkeypatch.setattr(reference, "to_lattice", lambda z, lattice: (z + 1, torch.zeros(50, 1).long()))
        assert torch.equal(to_lattice(z, lattice)[0], z + 1)
    assert same(to_lattice(z, lattice)[0], plain)


@pytest.mark.slow
def test_triton_kernels_equal_the_specification():
    """In a process of its own: Triton's interpreter must be asked for before Triton is first imported."""
    pytest.importorskip("triton")
    script = """
        import torch
        from latticode.kernels import Lattice, lattice_triton, reference

        torch.set_num_threads(1)
        lattices = (
            Lattice((8, 5, 5, 5), slope=1.6),
            Lattice((2, 3, 17, 4, 9), "equal-bins", factors=5),
            Lattice((16,) * 12, "symmetric", factors=2),
            Lattice((7,), "clamp", 1.6),
        )
        for lattice in lattices:
            d = len(lattice.levels)
            image = torch.randn(3, d, 5, 7).movedim(1, -1)
            for z in (torch.randn(300, d), image, image[:, ::2], image[:0], image.double(), image.bfloat16()):
                if len(z):
                    z[0, ..., 0], z[1, ..., 0], z[2, ..., -1] = torch.nan, torch.inf, -torch.inf
                # the interpreter cuts to bfloat16 instead of rounding
                near = {"rtol": 1e-2, "atol": 3e-6} if z.dtype == torch.bfloat16 else {"rtol": 1e-6, "atol": 3e-6}
                latents, codes = lattice_triton.to_lattice(z, lattice)
                expected, indices = reference.to_lattice(z, lattice)
                assert torch.equal(codes, indices), lattice
                torch.testing.assert_close(latents, expected, equal_nan=True, **(near | {"atol": 0.0}))
                above = torch.randn_like(z)
                ours = lattice_triton.to_lattice_backward(above, z, lattice)
                torch.testing.assert_close(ours, reference.to_lattice_backward(above, z, lattice), **near)
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"levels": (1, 5)}, r"levels must be integers in 2 .. 4194304, one per channel, got \[1, 5\]"),
        ({"levels": (5, 2**22 + 1)}, "levels must be integers in"),
        ({"levels": (5.0,)}, "levels must be integers in"),
        ({"levels": ()}, "levels must be integers in"),
        ({"levels": (8,) * 21}, r"below 2\^63 to index it, got .* factors=21 gives each channel a code of its own"),
        ({"levels": (8,), "bound": "sine"}, "bound must be one of paper, symmetric, equal-bins, clamp, got 'sine'"),
        ({"levels": (8,), "slope": 0.0}, "slope must be > 0 and finite, got 0.0"),
        ({"levels": (8,), "slope": math.nan}, "slope must be > 0 and finite, got nan"),
        ({"levels": (8, 8, 8), "factors": 2}, "factors must divide the 3 channels, got 2"),
        ({"levels": (8, 8), "factors": 0}, "factors must divide the 2 channels, got 0"),
    ],
)
def test_bad_lattices(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Lattice(**arguments)


@pytest.mark.parametrize("z", [torch.zeros(3, 5), torch.tensor(1.0), torch.zeros(3, 4, dtype=torch.int64)])
def test_refuses_what_does_not_fit(z: Tensor):
    with pytest.raises(ValueError, match=r"to_lattice expects floats \(\.\.\., 4\)"):
        to_lattice(z, Lattice((8, 5, 5, 5)))
