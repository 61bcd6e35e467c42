"""Two processes are one process on the joined batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from latticode.core import registry
from latticode.quantizers import Quantizer

WORLD = 2
STEPS = 3
ROWS = (10, 50)  # of each rank: unequal
SPECS: list[dict[str, Any]] = [
    {"type": "vq", "size": 16, "dim": 3, "decay": 0.5, "restart": 0.9},
    {"type": "vq", "size": 16, "dim": 3, "decay": 0.5, "restart": 0.9, "normalize": True},
    {"type": "vq", "size": 16, "dim": 3, "decay": 0.5, "restart": 0.9, "update": "gradient"},
    {"type": "vq", "size": 64, "dim": 3, "decay": 0.5, "restart": 0.5},  # more codes than tokens
    {"type": "vq", "size": 64, "dim": 3, "decay": 0.5, "upkeep": "online"},
    {"type": "vq", "size": 64, "dim": 3, "decay": 0.5, "upkeep": "split"},
    {"type": "vq", "size": 64, "dim": 3, "decay": 0.5, "upkeep": "online", "normalize": True, "entropy": 0.5},
    {"type": "vq", "size": 16, "dim": 3, "decay": 0.5, "update": "gradient", "affine": True, "entropy": 0.5},
    {"type": "simvq", "size": 16, "dim": 3, "entropy": 0.5},
    {"type": "lfq", "dim": 3, "temperature": 1.0},
    {"type": "bsq", "dim": 3},
    {"type": "residual", "stages": {"type": "vq", "size": 8, "dim": 3, "decay": 0.5, "restart": 0.5}, "depth": 3},
    {
        "type": "residual",
        "stages": [{"type": "lfq", "dim": 3, "temperature": 1.0}, {"type": "vq", "size": 8, "dim": 3}],
    },
    {
        "type": "hierarchical",
        "fanout": 3,
        "top": {"type": "vq", "size": 8, "dim": 1},
        "bottom": {"type": "lfq", "dim": 1},
    },
]


def batch(step: int) -> Tensor:
    """All tokens of step `step`; in step 1 those of the first rank are all broken, so that it takes part with none."""
    tokens = torch.randn(sum(ROWS), 3, generator=torch.Generator().manual_seed(step))
    if step == 1:
        tokens[: ROWS[0]] = torch.nan
    return tokens


def train(rank: int | None) -> list[dict[str, Tensor]]:
    """Of each spec after `STEPS` steps, on the tokens of `rank` or on all for None: state, codes, losses, gradients."""
    rows = slice(None) if rank is None else slice(ROWS[0] * rank, ROWS[0] + ROWS[1] * rank)
    results = []
    for spec in SPECS:
        torch.manual_seed(0)
        quantizer = registry.build(spec)
        torch.manual_seed(100 * (rank or 0))  # the draws of rank 0 must win
        start = {f"start of {key}": value.clone() for key, value in quantizer.state_dict().items()}
        codes, losses, gradients = zip(*(one_step(quantizer, batch(step)[rows]) for step in range(STEPS)), strict=True)
        empty = quantizer(torch.zeros(0, 3)[: 5 * (rank or 0)])  # a step without tokens on any rank
        assert len(empty.codes) == 0
        history = {"codes": torch.stack(codes), "losses": torch.stack(losses), "gradients": torch.stack(gradients)}
        results.append({**quantizer.state_dict(), **history, **start})
    return results


def one_step(quantizer: Quantizer, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (N, K), losses (L,) and the gradient (N, D) of their sum."""
    out = quantizer(tokens.requires_grad_())
    losses = torch.stack(list(out.losses.values()))
    return out.codes, losses.detach(), torch.autograd.grad(losses.sum(), tokens)[0]


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    try:
        torch.save(train(rank), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spawn(_worker, (os.fspath(tmp_path),), nprocs=WORLD)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]
    for spec, single, first, second in zip(SPECS, train(None), *ranks, strict=True):
        assert torch.equal(torch.cat([first["codes"], second["codes"]], dim=1), single["codes"]), spec
        assert torch.equal(first["losses"], second["losses"]), spec
        torch.testing.assert_close(first["losses"], single["losses"])
        gradients = torch.cat([first["gradients"], second["gradients"]], dim=1) / WORLD  # as training averages them
        torch.testing.assert_close(gradients, single["gradients"], atol=1e-6, rtol=1e-4)
        for key in single:
            if key not in ("codes", "losses", "gradients"):
                assert torch.equal(first[key], second[key]), (spec, key)
                torch.testing.assert_close(first[key], single[key])
            if key.endswith("count") and not key.startswith("start"):
                assert not torch.equal(single[key], single[f"start of {key}"]), (spec, key)
