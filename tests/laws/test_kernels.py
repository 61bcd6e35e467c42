"""Every fast kernel equals its specification."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latticode import kernels
from latticode.kernels import nearest, nearest_code, reference


def draw(n: int, k: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


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


@pytest.mark.parametrize("scale", [1e-12, 1e12])
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
    monkeypatch.setattr(nearest, "CPU_TILE", (32, 128))
    x, codebook = draw(2000, 2000, 4)
    with Largest() as largest:
        nearest.nearest_code(x, codebook)
    assert 32 * 128 <= largest.numel <= 32 * 2 * nearest.BLOCK * 4  # the two blocks that are gathered


def test_the_switch_selects_and_restores(monkeypatch: pytest.MonkeyPatch):
    x, codebook = draw(5, 7, 3)
    monkeypatch.setitem(kernels._NEAREST, "reference", lambda x, codebook: torch.full((len(x),), 6))
    with kernels.use("reference"):
        assert (nearest_code(x, codebook) == 6).all()
    assert torch.equal(nearest_code(x, codebook), reference.nearest_code(x, codebook))
    with pytest.raises(ValueError, match="fast, reference, got 'slow'"), kernels.use("slow"):
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
