"""FSQ against the paper's formulas (App. A.1), written out again in float64 with the published tan shift."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latticode import FSQ

LEVELS = [[5, 3], [8, 8], [8, 6, 5], [8, 5, 5, 5], [7, 5, 5, 5, 5], [8, 8, 8, 6, 5], [8, 8, 8, 5, 5, 5], [4, 16, 9]]


def published(z: np.ndarray, levels: list[int], shift: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, indices and the bounded values before rounding."""
    sizes = np.array(levels, np.float64)
    half = (sizes - 1) * (1 - 1e-3) / 2
    offset = np.where(sizes % 2 == 1, 0.0, 0.5)
    moved = {"tan": np.tan, "atanh": np.arctanh}[shift](offset / half)
    bounded = half * np.tanh(z + moved) - offset
    codes = np.round(bounded) / (sizes // 2)
    basis = np.cumprod([1, *levels[:-1]])
    return codes, ((codes * (sizes // 2) + sizes // 2) * basis).sum(-1).astype(np.int64), bounded


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize(("shift", "most"), [("atanh", 0.0), ("tan", 2e-3)])
def test_codes_and_indices(levels: list[int], shift: str, most: float) -> None:
    """Equal off the bin edges; the tan shift moves the edges of even levels by a hair, as the authors say it does."""
    z = torch.randn(100_000, len(levels)) * 2
    codes, indices, bounded = published(z.double().numpy(), levels, shift)
    clear = (np.abs(bounded - np.floor(bounded) - 0.5) > 1e-5).all(-1)
    ours = FSQ(levels)(z)
    same = (ours.codes[:, 0].numpy() == indices)[clear]
    assert clear.mean() > 0.999
    assert 1 - same.mean() <= most
    if not most:
        np.testing.assert_allclose(ours.latents.numpy()[clear], codes[clear], atol=1e-6)
