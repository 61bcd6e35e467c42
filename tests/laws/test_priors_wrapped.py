"""Laws of every registered prior under PyTorch's wrappers: DDP, FSDP2, `torch.compile`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_priors import CASES, build, conditioning, every_prior, random_codes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from latticode.core.types import Sampling
from latticode.nn.transformer import Block


@pytest.fixture(name="group", scope="module")
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One process that is a whole group."""
    file: Path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def learned(module: nn.Module, *inputs: Any) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The losses, and the gradients of their sum."""
    torch.manual_seed(3)
    terms: dict[str, Tensor] = module(*inputs)
    sum(terms.values(), torch.zeros(())).backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return terms, [g.full_tensor() if hasattr(g, "full_tensor") else g for g in gradients]  # type: ignore[operator]


@every_prior
@pytest.mark.slow
def test_a_wrapped_prior_learns_and_samples_as_it_does_alone(spec: dict[str, Any], group: None):
    prior, sampling = build(spec), Sampling(steps=3, guidance=1.0)
    codes, cond = random_codes(prior, 3), conditioning(prior, 3)
    replicated, sharded = DistributedDataParallel(copy.deepcopy(prior)), copy.deepcopy(prior)
    for module in [] if prior.sees else list(sharded.modules()):  # cross attention is read outside of its block
        if isinstance(module, Block):
            fully_shard(module)
    fully_shard(sharded)
    for name in ("loss", "bits", "sample"):
        register_fsdp_forward_method(sharded, name)
    terms, gradients = learned(prior, codes, cond)
    for wrapped in (replicated, sharded):
        found = learned(wrapped, codes, cond)
        assert found[0] == terms
        torch.testing.assert_close(found[1], gradients)
    assert torch.equal(sharded.bits(codes, cond), prior.bits(codes, cond))
    drawn = [each.sample(3, cond, sampling=sampling, seed=2) for each in (prior, sharded)]
    assert torch.equal(*drawn)


COMPILED = (  # one of each class; to read captions is work for the host, which no graph holds
    "gpt-digits-in-turn",
    "gpt-top-bottom",
    "contextual-slots",
    "maskgit-classes",
    "muse-classes",
    "mage-classes",
    "pixelsnail",
    "two-level-classes",
    "guide",
)


@pytest.mark.parametrize("spec", [CASES[name] for name in COMPILED], ids=COMPILED)
@pytest.mark.slow
def test_the_loss_is_one_graph(spec: dict[str, Any]):
    prior = build(spec)
    codes, cond = random_codes(prior, 3), conditioning(prior, 3)
    torch.compiler.reset()
    compiled = torch.compile(prior.loss, fullgraph=True, backend="eager")
    found = []
    for loss in (prior.loss, compiled):
        torch.manual_seed(3)
        found.append(loss(codes, cond))
    torch.testing.assert_close(found[1], found[0])
