"""Shared by all tests: one thread, one seed, and `--quick`, which chooses the tests of `make check`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import zoo

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "leave out tests marked slow, and of the cases of a test that differ by a spec all that bring no new class"
    parser.addoption("--quick", action="store_true", help=help)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: left out by --quick: trains, starts processes, or takes a second")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        kept = list(quick(items))
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


def quick(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Those that are not slow; of the cases of a test that differ only by a spec, the first with each class.

    A case is kept if its spec names a registered class that no case before it did: the first FSQ and no other, but a
    tokenizer for each class of encoder.
    """
    seen: dict[Any, set[str]] = {}
    for item in items:
        if item.get_closest_marker("slow"):
            continue
        if isinstance(item, pytest.Function) and (case := getattr(item, "callspec", None)):
            specs = {name: spec for name, value in case.params.items() if (spec := spec_of(value, item.module))}
            if specs:
                others = tuple(id(value) for name, value in case.params.items() if name not in specs)
                before = seen.setdefault((item.parent, item.originalname, others), set())
                new = zoo.types(list(specs.values())) - before
                before |= new
                if not new:
                    continue
        yield item


def spec_of(value: Any, module: Any) -> Any:
    """The spec that a parameter of a test is, or names in a table of specs: of its module or of the zoo."""
    if isinstance(value, str):
        tables = [table for table in (*vars(module).values(), zoo.SPECS) if isinstance(table, dict)]
        return next((table[value] for table in tables if zoo.types(table.get(value))), None)
    return value if zoo.types(value) else None


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
