"""FSQ against the authors' code, against the paper's formulas (App. A.1), written out again, and against
vector-quantize-pytorch.

`fsq.npz` holds what the class of google-research/google-research, fsq/fsq.ipynb at 5e78683, gives with JAX 0.10.2 on a
CPU: quantize, codes_to_indexes and the gradient of quantize.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from drawn import close, golden, random_state
from latticode import FSQ

LEVELS = [[5, 3], [8, 8], [8, 6, 5], [8, 5, 5, 5], [7, 5, 5, 5, 5], [8, 8, 8, 6, 5], [8, 8, 8, 5, 5, 5], [4, 16, 9, 2]]


def published(z: np.ndarray, levels: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Codes (..., d) and indices (...), with the published types: constants in float64, arithmetic in float32.

    tanh is rounded from float64, so that it is the same on every machine.
    """
    sizes = np.array(levels, np.float64)
    half = (sizes - 1) * (1 - 1e-3) / 2
    offset = np.where(sizes % 2 == 1, 0.0, 0.5)
    shift = np.tan(offset / half).astype(np.float32)
    moved = np.tanh((z + shift).astype(np.float64)).astype(np.float32)
    codes = np.round(moved * half.astype(np.float32) - offset.astype(np.float32)) / (sizes // 2).astype(np.float32)
    basis = np.cumprod([1, *levels[:-1]])
    digits = (codes * (sizes // 2) + sizes // 2).round().astype(np.int64)
    return codes, (digits * basis).sum(-1)


@pytest.mark.parametrize("levels", [*LEVELS[:-1], [3, 5, 4]], ids=str)
def test_the_authors_code(levels: list[int]) -> None:
    """Codes, latents and gradients for draws of which none lies within rounding of an edge."""
    key, expected = "-".join(map(str, levels)), golden("fsq")
    z = torch.from_numpy(random_state(f"fsq.{key}").standard_normal((200, len(levels))).astype(np.float32) * 2)
    weights = torch.from_numpy(random_state(f"fsq.g.{key}").standard_normal((200, len(levels))).astype(np.float32))
    out = FSQ(levels)(z.requires_grad_())
    assert torch.equal(out.codes[:, 0], expected[f"{key}_codes"])
    close(out.latents, expected[f"{key}_latents"], 1e-6)
    (gradient,) = torch.autograd.grad((out.latents * weights).sum(), z)
    close(gradient, expected[f"{key}_gradient"], 1e-5)


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_codes_and_indices_are_the_published_ones_bit_for_bit(levels: list[int]) -> None:
    z = torch.randn(200_000, len(levels)) * 2
    codes, indices = published(z.numpy(), levels)
    ours = FSQ(levels)(z)
    assert codes.dtype == np.float32
    assert torch.equal(ours.latents, torch.from_numpy(codes))
    assert torch.equal(ours.codes[:, 0], torch.from_numpy(indices))


def peer(levels: list[int], **options: bool) -> Any:
    vqp = pytest.importorskip("vector_quantize_pytorch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return vqp.FSQ(levels, **options)


@pytest.mark.parametrize("levels", [*LEVELS[:5], [2, 3, 4], [16, 2]], ids=str)
def test_symmetric_is_the_peers(levels: list[int]) -> None:
    z = torch.randn(1, 50_000, len(levels), requires_grad=True)
    theirs, indices = peer(levels, preserve_symmetry=True)(z)
    ours = FSQ(levels, "symmetric")(z)
    clear = clear_of_edges(FSQ(levels, "symmetric"), z, 1e-5)
    assert clear.float().mean() > 0.999
    assert torch.equal(ours.codes[..., 0][clear], indices[clear].long())
    torch.testing.assert_close(ours.latents[clear], theirs[clear], atol=1e-6, rtol=0)
    weights = torch.randn_like(z)
    gradients = [torch.autograd.grad((out * weights).sum(), z)[0] for out in (ours.latents, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("levels", LEVELS[:5], ids=str)
def test_paper_is_the_peers_where_its_eps_does_not_matter(levels: list[int]) -> None:
    """The peer stretches the bound by 1 + eps where the paper shrinks it by 1 - eps, and shifts by atanh.

    So every position is off by up to eps (L - 1), and edges move as much, those of odd levels too; the codebook, its
    order and all codes between the edges agree.
    """
    theirs, ours = peer(levels), FSQ(levels)
    every = torch.arange(ours.vocab[0])
    assert torch.equal(theirs.indices_to_codes(every), ours.decode(every[:, None]))
    z = torch.randn(1, 50_000, len(levels))
    _, indices = theirs(z)
    clear = clear_of_edges(ours, z, 1e-3 * (max(levels) - 1) + 1e-4)
    agree = ours.encode(z)[..., 0] == indices.long()
    assert agree[clear].all()
    assert 0.95 < agree.float().mean() < 1
    weights = torch.rand_like(z)
    z.requires_grad_()
    gradients = [torch.autograd.grad((out * weights).sum(), z)[0] for out in (ours(z).latents, theirs(z)[0])]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=3e-3)


def clear_of_edges(fsq: FSQ, z: torch.Tensor, margin: float) -> torch.Tensor:
    """Whether each token (...) of `z` is further than `margin` from all edges, in units of levels."""
    with torch.no_grad():
        width = torch.tensor([level // 2 if fsq.bound == "paper" else (level - 1) / 2 for level in fsq.levels])
        place = (fsq.bounded(z) + 1) * width
    return ((place - place.floor() - 0.5).abs() > margin).all(dim=-1)
