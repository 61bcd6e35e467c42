"""Examples in docstrings run, and every public class of the rooms listed here has one."""

from __future__ import annotations

import ast
import doctest
import importlib
from pathlib import Path

import pytest
import torch

import latticode

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


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_run(name: str) -> None:
    torch.manual_seed(0)
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize("name", sorted(name for name in SOURCES if name.startswith(ROOMS)))
def test_every_public_class_has_an_example(name: str) -> None:
    for node in ast.parse(SOURCES[name].read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        if issubclass(getattr(importlib.import_module(name), node.name), Exception):
            continue
        assert "Examples:\n" in (ast.get_docstring(node) or ""), f"{name}.{node.name}"
