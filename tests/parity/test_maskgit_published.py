"""MaskGIT's schedules and decoding against the authors' code.

`maskgit.npz` holds what google-research/maskgit at 1db2359 gives with JAX 0.10.2 on a CPU: libml/mask_schedule.py's
fractions, the counts that libml/parallel_decode.py makes of them in 12 steps, its mask_by_random_topk without noise,
and decode (6 steps, choice_temperature 0) with argmax in the place of its categorical draws.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from drawn import golden, random_state
from latticode import MaskGIT, Sampling
from latticode.priors.schedules import ranks, remask_counts

EXPECTED = golden("maskgit")
NAMES = {"uniform": "linear", "pow2": "square", "pow3": "cubic", "pow.5": "root", "log": "log", "exp": "exp"}


@pytest.mark.parametrize("unknown", [16, 64, 256, 1024])
@pytest.mark.parametrize("theirs", NAMES)
def test_counts(theirs: str, unknown: int) -> None:
    """Their last count is 1 where ours is 0: they draw those tokens and leave the loop. Where a product is an integer,
    float32 may fall below it there."""
    counts = remask_counts(unknown, 12, NAMES[theirs])
    off = torch.tensor(counts[:-1]) - EXPECTED[f"count_{theirs}_{unknown}"][: len(counts) - 1]
    assert off.abs().sum() <= 1
    assert off.abs().sum() == 0 or theirs in ("uniform", "pow.5", "log", "exp")


def test_cosine_rounds_in_float32_there() -> None:
    """As `cosine-float32` ours is theirs; the exact cosine differs by one now and then."""
    for unknown in (16, 64, 256, 1024):
        theirs = EXPECTED[f"count_cosine_{unknown}"].tolist()[:-1]
        assert remask_counts(unknown, 12, "cosine-float32")[:-1] == theirs
        assert max(abs(a - b) for a, b in zip(remask_counts(unknown, 12), theirs, strict=False)) <= 1


@pytest.mark.parametrize("count", [1, 5, 15])
def test_the_least_confident_are_masked(count: int) -> None:
    confidence = torch.from_numpy(abs(random_state("maskgit.p").uniform(0.01, 1, (3, 16)))).float()
    assert torch.equal(ranks(confidence) < count, EXPECTED[f"mask_{count}"])


@torch.no_grad()
def test_decoding() -> None:
    """The same tokens after the same six steps, with their logits in the place of the network's."""
    of_position = torch.from_numpy(random_state("maskgit.logits").standard_normal((16, 7))).float() * 3
    of_neighbour = torch.from_numpy(random_state("maskgit.shift").standard_normal((7, 7))).float()
    prior = MaskGIT([7], [16], width=7, depth=1, heads=1).eval()

    def logits(tokens: Tensor, labels: Tensor, at: Tensor, context: Any = None) -> Tensor:
        before = tokens.roll(1, -1)
        known = (before < 7)[..., None]
        return (9 * (of_position + of_neighbour[before.clamp(max=6)] * known))[at]

    prior.states, prior.head = logits, nn.Identity()  # type: ignore[method-assign]
    prior.embedding.weight[:7] = torch.eye(7)
    codes = prior.sample(1, sampling=Sampling(steps=6, noise=0.0, temperature=0.0, schedule="cosine-float32"))
    assert codes.flatten().tolist() == EXPECTED["decoded"][0, -1].tolist()
