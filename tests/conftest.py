"""Shared by all tests: one thread, so that results and times do not depend on the machine's load."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from latticode.core import plugins

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unregistered() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = {kind: dict(known) for kind, known in plugins.added.items()}
    yield
    for kind, known in before.items():
        plugins.added[kind].clear()
        plugins.added[kind].update(known)
