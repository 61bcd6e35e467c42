"""Weights and inputs of parity tests, drawn from NumPy's frozen legacy generator seeded with a tensor's name, so that a
reference that ran elsewhere had the same ones; and the golden files with what it gave."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).with_name("parity")


def random_state(name: str) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(name.encode()))


def normal(name: str, shape: tuple[int, ...], deviation: float = 1.0, mean: float = 0.0) -> Tensor:
    return torch.from_numpy(random_state(name).standard_normal(shape) * deviation + mean).float()


def uniform(name: str, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(random_state(name).uniform(-1, 1, shape)).float()


def integers(name: str, high: int, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(random_state(name).randint(0, high, shape)).long()


def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """A weight: N(0, 1 / inputs) for a matrix or kernel, N(0, 0.1^2) for a vector, around 1 for the scale of a norm."""
    if len(shape) > 1:
        return normal(name, shape, float(np.prod(shape[1:])) ** -0.5)
    return normal(name, shape, 0.1, 1.0 if name.endswith("weight") else 0.0)


def golden(name: str) -> dict[str, Tensor]:
    """What the reference gave, tensor by tensor (tests/parity/NAME.npz)."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def close(ours: Tensor, theirs: Tensor, atol: float = 1e-5) -> None:
    """Equal shapes and equal numbers within `atol`; a reference that is constant proves nothing and fails."""
    assert theirs.numel() == 1 or theirs.double().std() > 0
    torch.testing.assert_close(ours.detach(), theirs, rtol=0, atol=atol)


def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """`module` in eval mode with all of `tensors`, reshaped to its own shapes; strict."""
    state = module.state_dict()
    assert state.keys() == tensors.keys(), state.keys() ^ tensors.keys()
    module.load_state_dict({key: tensors[key].view(value.shape) for key, value in state.items()})
    return module.eval()
