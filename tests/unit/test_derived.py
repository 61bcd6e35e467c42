"""Tensors that constructor arguments determine are real, whatever mode they were first asked for in."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from latticode.core.derived import derived

CPU = torch.device("cpu")


@derived
def squares(count: int) -> Tensor:
    return torch.arange(count).float().square()


MODES: dict[str, Any] = {
    "plain": nullcontext,
    "inference": torch.inference_mode,
    "no-grad": torch.no_grad,
    "fake": FakeTensorMode,
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize(("name", "count"), [*zip(MODES, range(11, 16), strict=True)])
def test_what_is_kept_serves_every_mode(name: str, count: int) -> None:
    with MODES[name]():
        first = squares(count, device=CPU)
        assert first.shape == (count,)
        assert first.device.type == "cpu"
    later = squares(count, device=CPU)
    assert type(later) is Tensor
    assert not later.is_inference()
    assert torch.equal(later, torch.arange(count) ** 2.0)
    assert later is squares(count, device=CPU), "made once"
    weight = torch.ones(count, requires_grad=True)
    (weight * later).sum().backward()  # saved for the backward pass, as a rotary table is
    assert squares(count, device=torch.device("meta")).is_meta


def test_a_transform_keeps_nothing_of_its_own() -> None:
    x = torch.ones(2, 5)
    (gradient,) = torch.func.vmap(torch.func.grad(lambda row: (row * squares(5, device=CPU)).sum()))(x)[:1]
    assert gradient.tolist() == [0.0, 1.0, 4.0, 9.0, 16.0]
    assert squares(5, device=CPU).tolist() == gradient.tolist()


def test_a_graph_holds_it_as_a_constant() -> None:
    compiled = torch.compile(lambda x: x + squares(7, device=x.device), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(7)), 1 + torch.arange(7) ** 2.0)


def test_modules_that_ask_for_it_can_be_copied() -> None:
    from latticode.priors import GPT

    prior = GPT([8], [2, 2], width=16, depth=1, heads=2, places="axial").eval()
    codes = torch.zeros(1, 2, 2, 1, dtype=torch.int64)
    for other in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
        assert torch.equal(other.bits(codes), prior.bits(codes))
