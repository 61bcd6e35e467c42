"""Shared by all tests: one thread, one seed, and `--quick`, which chooses the tests of `make check`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import zoo
from latticode.core import plugins

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "leave out tests marked slow, and cases of a test that bring no value, or class in a spec, that is new"
    parser.addoption("--quick", action="store_true", help=help)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        kept = list(quick(items))
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


def quick(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Those that are not slow; of the cases of one test, those that bring something new.

    That is a value of a parameter that no case before it had or, where the value is a spec, a registered class: of the
    laws of all quantizers the first FSQ and no other, and of those of all tokenizers one with each class of encoder.
    """
    seen: dict[Any, set[Any]] = {}
    for item in items:
        if item.get_closest_marker("slow"):
            continue
        case = getattr(item, "callspec", None)
        if isinstance(item, pytest.Function) and case is not None:
            before = seen.setdefault((item.parent, item.originalname), set())
            new = {(name, one) for name, value in case.params.items() for one in parts(value, item.module)} - before
            before |= new
            if not new:
                continue
        yield item


def parts(value: Any, module: Any) -> set[Any]:
    """The classes in a spec, or in the spec that a name stands for in a table of the test's module or of the zoo; of
    any other value of a parameter itself."""
    tables = [table for table in (*vars(module).values(), zoo.SPECS) if isinstance(table, dict)]
    named = [table.get(value) for table in tables] if isinstance(value, str) else []
    return next((found for spec in (value, *named) if (found := zoo.types(spec))), {id(value)})


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
