"""Every fast kernel equals its specification."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from helpers import Largest
from latticode import kernels
from latticode.kernels import nearest_code, reference, tiles


@pytest.fixture(autouse=True, params=["fast", "portable"])
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    with kernels.use(request.param):
        yield


def draw(n: int, k: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)


# K around multiples of a block and of a tile, N around multiples of a tile
@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 65, 4095, 4097, 9000])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (127, 3), (129, 8), (300, 64)])
def test_equals_the_specification(n: int, k: int, d: int):
    x, codebook = draw(n, k, d)
    codes = nearest_code(x, codebook)
    assert codes.shape == (n,)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, reference.nearest_code(x, codebook))


@pytest.mark.parametrize("offset", [1000.0, -3e4])
def test_common_offset_costs_no_accuracy(offset: float):
    x, codebook = (t.double() + offset for t in draw(500, 3000, 8))
    x, codebook = x.float(), codebook.float()
    assert torch.equal(nearest_code(x, codebook), reference.nearest_code(x, codebook))


def test_separates_codes_that_float32_scores_cannot():
    """Pairs of codes 1e-6 apart: their scores differ by less than float32 holds, their float64 distances do not."""
    x, codebook = draw(400, 200, 16)
    pairs = torch.stack([codebook, codebook * (1 + 1e-6)], dim=1).flatten(0, 1)
    assert torch.equal(nearest_code(x, pairs), reference.nearest_code(x, pairs))


@pytest.mark.parametrize("ties", [5, 400])
def test_separates_near_ties_over_many_blocks(ties: int):
    """All ties lie at distance 1 of one token, up to float32 rounding, and in blocks of their own."""
    x, codebook = draw(8, 4096, 16)
    codebook[:ties] = x[0] + torch.nn.functional.normalize(codebook[:ties], dim=1)
    codebook = codebook.view(-1, 8, 16).transpose(0, 1).reshape(-1, 16)  # neighbours move 512 rows apart
    assert torch.equal(nearest_code(x, codebook), reference.nearest_code(x, codebook))


def test_clusters_far_apart_and_codes_far_away_cost_no_accuracy():
    x, codebook = draw(300, 1000, 8)
    sides = torch.tensor([-1e4, 1e4])
    apart = x + sides[torch.arange(300) % 2, None], codebook + sides[torch.arange(1000) % 2, None]
    assert torch.equal(nearest_code(*apart), reference.nearest_code(*apart))
    codebook[500] *= 1e7
    assert torch.equal(nearest_code(x, codebook), reference.nearest_code(x, codebook))


def test_tokens_that_float32_leaves_open_are_searched_in_float64(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tiles, "CROWD", -1)
    monkeypatch.setattr(tiles, "CPU_TILE", (32, 128))
    x, codebook = draw(100, 1000, 8)
    near = codebook.repeat_interleave(2, dim=0) * torch.tensor([1.0, 1 + 1e-6]).repeat(1000)[:, None]
    assert torch.equal(nearest_code(x, near), reference.nearest_code(x, near))


@pytest.mark.parametrize("d", [1, 8, 256])
@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
def test_the_margin_bounds_the_rounding_of_scores(d: int, offset: float):
    """Of two codes of any score, with the first no farther in truth, the first's computed score is not far below."""
    x, codes = draw(200, 300, d)
    x, centre = x * torch.logspace(-3, 3, 200)[:, None] + offset, torch.full((d,), offset)
    codes = codes + offset
    distances = (x.double()[:, None] - codes.double()).square().sum(dim=2)
    low, near = x - centre, codes - centre
    scores = low @ near.t() - near.square().sum(dim=1) / 2
    chosen, best = scores.argmax(dim=1), distances.argmin(dim=1)
    rows = torch.arange(200)
    top = scores[rows, chosen]
    margin = tiles.margin(low, top, near.norm(dim=1).amax())
    assert (top - scores[rows, best] <= margin).all()
    # and every score is as exact as the margin of its own rank claims: half of it for each of the two
    truth = (
        low.double().square().sum(dim=1)[:, None] - (low.double()[:, None] - near.double()).square().sum(dim=2)
    ) / 2
    assert ((scores[rows, chosen] - truth[rows, chosen]).abs() <= margin / 2).all()
    assert ((scores[rows, best] - truth[rows, best]).abs() <= margin / 2).all()


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
def test_scale_of_the_data_does_not_matter(scale: float):
    x, codebook = (t * scale for t in draw(200, 100, 4))
    assert torch.equal(nearest_code(x, codebook), reference.nearest_code(x, codebook))


def test_tokens_do_not_depend_on_each_other():
    x, codebook = draw(300, 500, 8)
    codes = nearest_code(x, codebook)
    assert torch.equal(torch.cat([nearest_code(row[None], codebook) for row in x]), codes)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    assert torch.equal(nearest_code(x[order], codebook), codes[order])


def test_rows_that_are_not_finite_touch_no_other():
    x, codebook = draw(200, 70, 8)
    broken = x.clone()
    broken[3, 2], broken[100] = torch.nan, torch.inf
    codes = nearest_code(broken, codebook)
    kept = broken.isfinite().all(dim=1)
    assert torch.equal(codes[kept], nearest_code(x, codebook)[kept])
    assert 0 <= codes.min() <= codes.max() < 70


def test_of_two_equal_codes_the_first_is_taken():
    x, codebook = draw(50, 100, 4)
    assert torch.equal(nearest_code(x, torch.cat([codebook, codebook])), reference.nearest_code(x, codebook))


def test_equal_codes_give_one_of_them():
    x, _ = draw(50, 1, 4)
    codes = nearest_code(x, torch.ones(70, 4))
    assert 0 <= codes.min() <= codes.max() < 70


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened(dtype: torch.dtype):
    x, codebook = (t.to(dtype) for t in draw(64, 100, 8))
    expected = nearest_code(x.float(), codebook.float())
    assert torch.equal(nearest_code(x, codebook), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nearest_code(x.float(), codebook.float()), expected)


def test_no_tokens_and_strided_tokens():
    x, codebook = draw(40, 10, 4)
    assert nearest_code(x[:0], codebook).shape == (0,)
    assert torch.equal(nearest_code(x.t().contiguous().t()[::2], codebook), nearest_code(x[::2], codebook))


def test_no_tensor_grows_with_tokens_times_codes(monkeypatch: pytest.MonkeyPatch):
    """The greatest allocation is one tile or one of the inputs, whatever N times K is."""
    monkeypatch.setattr(tiles, "CPU_TILE", (32, 128))
    x, codebook = draw(2000, 2000, 4)
    with Largest() as largest:
        nearest_code(x, codebook)
    assert 32 * 128 <= largest.numel <= codebook.numel() + 64 * 4  # padded to whole blocks


def test_exported_it_is_plain_operators():
    x, codebook = draw(50, 100, 8)

    class Search(torch.nn.Module):
        def forward(self, x: Tensor, codebook: Tensor) -> Tensor:
            return nearest_code(x, codebook)

    n = torch.export.Dim("n")
    program = torch.export.export(Search(), (x, codebook), dynamic_shapes={"x": {0: n}, "codebook": None})
    assert "latticode" not in str(program.graph)
    x, _ = draw(77, 1, 8, seed=1)
    assert torch.equal(program.module()(x, codebook), nearest_code(x, codebook))
    assert torch.equal(tiles.traced(x.bfloat16(), codebook), nearest_code(x.bfloat16(), codebook))


@pytest.mark.slow
def test_triton_kernel_equals_the_specification():
    """In a process of its own: Triton's interpreter must be asked for before Triton is first imported."""
    pytest.importorskip("triton")
    script = """
        import torch
        from latticode.kernels import nearest, nearest_triton, reference

        torch.set_num_threads(1)
        for n, k, d in ((0, 5, 3), (1, 1, 1), (63, 65, 3), (65, 128, 32), (130, 200, 70)):
            x, codebook = torch.randn(n, d) + 100, torch.randn(k, d) + 100
            assert torch.equal(nearest_triton.nearest_code(x, codebook), reference.nearest_code(x, codebook)), (n, k, d)

            offsets = torch.randn(k)
            top, second, place = nearest_triton.two_best(x, codebook, offsets)
            scores = torch.cat([x @ codebook.t() + offsets, torch.full((n, 1), -torch.inf)], dim=1)
            values, places = scores.topk(2, dim=1)
            torch.testing.assert_close(top, values[:, 0])
            torch.testing.assert_close(second, values[:, 1])
            assert (place == places[:, 0]).float().mean() > 0.95 or n == 0  # two scores may differ by a rounding

        # what it must leave to the exact path: near ties within and across tiles, what is not finite
        codebook = torch.randn(150, 8)
        codebook = torch.cat([codebook, codebook * (1 + 1e-6)])
        x = torch.randn(100, 8).bfloat16()
        assert torch.equal(nearest_triton.nearest_code(x, codebook), reference.nearest_code(x, codebook))
        x[3, 2], x[50] = torch.nan, torch.inf
        assert torch.equal(nearest_triton.nearest_code(x, codebook), nearest.tiled(x, codebook))
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_switch_selects_and_restores(monkeypatch: pytest.MonkeyPatch):
    x, codebook = draw(5, 7, 3)
    monkeypatch.setitem(kernels._NEAREST, "reference", lambda x, codebook: torch.full((len(x),), 6))
    with kernels.use("reference"):
        assert (nearest_code(x, codebook) == 6).all()
    assert torch.equal(nearest_code(x, codebook), reference.nearest_code(x, codebook))
    with pytest.raises(ValueError, match="fast, portable, reference, got 'slow'"), kernels.use("slow"):
        pass


def test_matrix_precision_of_the_process_is_left_alone():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        x, codebook = draw(200, 300, 32)
        assert torch.equal(nearest_code(x, codebook), reference.nearest_code(x, codebook))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("x", "codebook"),
    [
        (torch.zeros(3, 4), torch.zeros(5, 3)),
        (torch.zeros(4), torch.zeros(5, 4)),
        (torch.zeros(3, 4), torch.zeros(0, 4)),
        (torch.zeros(3, 4, dtype=torch.int64), torch.zeros(5, 4)),
    ],
)
def test_refuses_what_does_not_fit(x: Tensor, codebook: Tensor):
    with pytest.raises(ValueError, match="nearest_code expects float x"):
        nearest_code(x, codebook)


@pytest.mark.parametrize("k", [5, 33, 300])
@pytest.mark.parametrize("value", [1e30, -3e38])
def test_rows_near_overflow_get_a_code_that_exists(k: int, value: float):
    x, codebook = draw(20, k, 8)
    broken = x.clone()
    broken[3], broken[7, 2] = value, value
    codes = nearest_code(broken, codebook)
    kept = torch.arange(20) % 4 != 3
    assert torch.equal(codes[kept], nearest_code(x, codebook)[kept])
    assert 0 <= codes.min() <= codes.max() < k
