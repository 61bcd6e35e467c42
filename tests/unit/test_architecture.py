"""The structure of the house, read from the imports: layers, fences, and what `import latticode` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import latticode

ROOT = Path(latticode.__file__).parent
LAYERS = [  # a row imports rows above it in this list, and itself
    {"core", "version"},
    {"kernels", "nn"},
    {"losses"},
    {"quantizers", "autoencoders", "data"},
    {"tokenizers", "priors", "metrics", "viz"},
    {"dense", "sampling"},
    {"engine", "evaluate"},
    {"runs"},
    {"study", "diagnose"},
    {"cli"},
]
FENCES = {  # heavy dependency -> where alone it may be imported
    "accelerate": {"engine"},
    "triton": {"kernels"},
    "tokenizers": {"priors"},
    "transformers": {"priors", "sampling"},
    "datasets": {"data"},
    "pyarrow": {"data"},
    "sklearn": {"data", "runs"},
    "skimage": {"data"},
    "torchmetrics": {"metrics"},
    "torch_fidelity": {"metrics"},
    "pydantic": {"engine"},
    "yaml": {"engine"},
    "tensorboard": {"engine"},
    "matplotlib": {"viz"},
    "jinja2": {"viz"},
    "typer": {"cli"},
    "fastapi": {"serve"},
    "onnx": {"export"},
    "huggingface_hub": {"export"},
}
LIGHT = {"torch", "numpy", "safetensors"}
MODULES = sorted(ROOT.rglob("*.py"))


def unit(module: str) -> str:
    """The row entry that a dotted module belongs to: latticode.engine.loop -> engine."""
    return module.split(".")[1] if "." in module else "__init__"


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["latticode", *(p for p in parts if p != "__init__")])


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"relative import in {path}"
            names = [f"latticode.{a.name}" for a in node.names] if node.module == "latticode" else [node.module]
            yield from names


@pytest.mark.parametrize(
    "path", [p for p in MODULES if dotted(p) not in ("latticode", "latticode.__main__")], ids=dotted
)
def test_layers_and_fences(path: Path) -> None:
    here = unit(dotted(path))
    row = next((i for i, names in enumerate(LAYERS) if here in names), None)
    assert row is not None, f"{here} stands in no layer"
    below = set().union(*LAYERS[:row], {here})
    for name in imports(path):
        top = name.split(".")[0]
        if top == "latticode":
            assert unit(name) in below, f"{name} is not below {here}"
        assert here in FENCES.get(top, {here}), f"{top} is fenced to {FENCES[top]}, not for {here}"


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 500


def test_import_stays_light() -> None:
    heavy = sorted((set(FENCES) | {"rich", "PIL", "scipy", "pandas"}) - LIGHT)
    loaded = f"set({heavy}) & set(sys.modules)"
    code = f"import sys, torch; before = {loaded}; import latticode; print({loaded} - before)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"
