"""Examples in docstrings run; what `latticode` exports, every registered class and every public class of some rooms has
one."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest
import torch

import latticode
from latticode.core import registry

ROOT = Path(latticode.__file__).parent
SOURCES = {
    path.relative_to(ROOT.parent).with_suffix("").as_posix().replace("/", "."): path for path in ROOT.rglob("*.py")
}
WITH_EXAMPLES = sorted(name for name, path in SOURCES.items() if ">>> " in path.read_text(encoding="utf-8"))
ROOMS = (  # whose public classes all have an example; exceptions aside
    *("latticode.autoencoders", "latticode.core.plugins", "latticode.core.pretrained"),
    *(f"latticode.tokenizers.{name}" for name in ("foreign", "hierarchical", "palette", "tokenizer")),
    *("latticode.losses", "latticode.nn.conv", "latticode.nn.discriminator"),
    *(f"latticode.metrics.{name}" for name in ("audio", "classifier", "codes", "dense", "features", "pixels", "video")),
    *("latticode.engine.objectives", "latticode.engine.schedules", "latticode.engine.tally"),
    *(
        f"latticode.data.{name}"
        for name in ("coco", "decoding", "dense", "embedded", "folders", "hub", "idx", "loading")
    ),
    *(f"latticode.data.{name}" for name in ("order", "parquet", "records", "sources", "synthetic", "tokens")),
    *(f"latticode.data.{name}" for name in ("token_format", "webdataset")),
)
NEEDS_A_DOWNLOAD = {"T5Text"}
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
    without = {name for name, thing in things if not parser.get_examples(getattr(thing, "__doc__", None) or "")}
    assert without == NEEDS_A_DOWNLOAD


@pytest.mark.parametrize("name", sorted(name for name in SOURCES if name.startswith(ROOMS)))
def test_every_public_class_has_an_example(name: str) -> None:
    for node in ast.parse(SOURCES[name].read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        if issubclass(getattr(importlib.import_module(name), node.name), Exception):
            continue
        assert "Examples:\n" in (ast.get_docstring(node) or ""), f"{name}.{node.name}"
