"""Examples in docstrings run; what `latticode` exports, every registered class and every public class has one."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path
from typing import is_typeddict

import pytest
import torch

import latticode
from latticode.core import registry

ROOT = Path(latticode.__file__).parent
SOURCES = {
    path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", "."): path for path in ROOT.rglob("*.py")
}
WITH_EXAMPLES = sorted(name for name, path in SOURCES.items() if ">>> " in path.read_text(encoding="utf-8"))
NEEDS_A_DOWNLOAD = {"latticode.priors.text.T5Text"}  # its example is shown and not run
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("latticode"):
            raise
        pytest.skip(f"needs {error.name}")
    result = doctest.testmod(module, optionflags=FLAGS)
    assert result.attempted
    assert not result.failed


def test_every_public_name_has_an_example() -> None:
    exported = {name: getattr(latticode, name) for name in latticode.__all__ if not name.startswith("_")}
    classes = map(registry.resolve, registry.TABLE)
    registered = {cls.__name__: cls for cls in classes if cls.__module__.startswith("latticode.")}  # tests add some
    parser = doctest.DocTestParser()
    things = (exported | registered).items()
    without = {
        f"{thing.__module__}.{name}"
        for name, thing in things
        if not parser.get_examples(getattr(thing, "__doc__", None) or "")
    }
    assert without == NEEDS_A_DOWNLOAD


def test_every_public_class_has_an_example() -> None:
    parser, without = doctest.DocTestParser(), set()
    for name, path in SOURCES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
                continue
            text = ast.get_docstring(node) or ""
            if "Examples:\n" in text and parser.get_examples(text):
                continue
            cls = getattr(importlib.import_module(name), node.name)
            if not issubclass(cls, Exception) and not is_typeddict(cls):
                without.add(f"{name}.{node.name}")
    assert without == NEEDS_A_DOWNLOAD
