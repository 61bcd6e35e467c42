"""Every public name has an example in its docstring, and every example of a docstring runs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import latticode
from latticode.core import registry

# Public names without an example. Nothing may be added; who writes an example takes its name out, and in the end this
# and what is said of it are gone.
# fmt: off
MISSING = frozenset(
    [
        "BSQ", "ChannelDim", "Conditioning", "FSQ", "Grouped", "Gumbel", "Hierarchical", "LFQ", "Projected",
        "QINCo", "Quantizer", "Residual", "Sampling", "SimVQ", "StochasticVQ", "T5Text", "VQ",
        "accumulating",
    ]
)
# fmt: on
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(latticode.__path__, "latticode.")
    if not module.name.rpartition(".")[2].startswith("_")
)


def public() -> dict[str, object]:
    """What `latticode` exports and every registered class, by name."""
    exported = {name: getattr(latticode, name) for name in latticode.__all__ if not name.startswith("_")}
    return {**exported, **{cls.__name__: cls for cls in map(registry.resolve, registry.TABLE)}}


def test_every_public_name_has_an_example() -> None:
    parser = doctest.DocTestParser()
    without = {name for name, thing in public().items() if not parser.get_examples(thing.__doc__ or "")}
    assert without <= MISSING, f"without an example: {', '.join(sorted(without - MISSING))}"
    assert without >= MISSING, f"has an example, so take it out of MISSING: {', '.join(sorted(MISSING - without))}"


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("latticode"):
            raise
        pytest.skip(f"needs {error.name}")
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    output: list[str] = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)
