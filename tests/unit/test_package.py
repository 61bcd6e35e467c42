"""What is installed and uploaded: extras and the errors that name them, bounds and pins, wheels, the source archive."""

from __future__ import annotations

import ast
import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from test_architecture import FENCES, MODULES, imports

from helpers import QUIET, tiny_tokenizer
from latticode import __version__
from latticode.cli.main import VERBS
from latticode.core.extras import EXTRAS, explained, extra_of, load
from latticode.engine import load_config, train

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL: dict[str, list[str]] = PROJECT["optional-dependencies"]
TOOLS = {"all", "dev", "docs"}
INSTALLED_AS = {  # name of import -> of installation, where they differ by more than a hyphen
    "PIL": "pillow",
    "multipart": "python-multipart",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
WITH_TORCH = {"triton"}  # torch brings it where it has a use, and nothing imports it elsewhere


def distribution(module: str) -> str:
    return canonicalize_name(INSTALLED_AS.get(module, module))


def distributions(dependencies: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in dependencies}


CORE = distributions(PROJECT["dependencies"])

# --- extras ---------------------------------------------------------------------------------------------------------


def test_the_table_of_extras_is_that_of_the_project() -> None:
    table = {extra: {distribution(module) for module in modules} for extra, modules in EXTRAS.items()}
    assert table == {extra: distributions(lines) for extra, lines in OPTIONAL.items() if extra not in TOOLS}
    (everything,) = OPTIONAL["all"]
    assert Requirement(everything).extras == EXTRAS.keys()


@pytest.mark.parametrize("module", sorted(FENCES))
def test_a_fenced_dependency_is_of_the_core_or_of_an_extra(module: str) -> None:
    assert module in WITH_TORCH or (distribution(module) in CORE) != (extra_of(module) is not None)


def test_whatever_is_imported_is_installed_by_the_core_or_an_extra() -> None:
    ours = sys.stdlib_module_names | {"latticode"} | WITH_TORCH
    for top in {name.split(".")[0] for path in MODULES for name in imports(path)} - ours:
        assert distribution(top) in CORE or extra_of(top), f"nothing installs {top}"


def test_the_import_of_an_extra_stands_in_a_function_or_a_module_of_one_room() -> None:
    """At the top of a module of a room that the core verbs enter it would ask them for the extra."""
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                extras = {name for name in names if extra_of(name)}
                assert not extras or path.parent.name == "viz", f"{path} imports {', '.join(extras)} at its top"


def test_an_error_names_the_extra() -> None:
    assert extra_of("latticode") is None
    missing = ModuleNotFoundError("No module named 'sklearn'", name="sklearn.svm")
    assert explained(missing, "probe needs").endswith(
        "probe needs sklearn, which is not installed: pip install 'latticode[train]'"
    )
    other = ModuleNotFoundError("No module named 'nowhere'", name="nowhere")
    assert explained(other, "probe needs") == "No module named 'nowhere'"
    assert explained(ImportError("broken"), "probe needs") == "broken"


def test_load_says_what_to_install(monkeypatch) -> None:
    assert load("json", "nothing needs") is json
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ImportError, match=r"sound needs soundfile.*latticode\[audio\]"):
        load("soundfile", "sound needs")


CORE_ONLY = """
import contextlib, io, json, sys
import torch
from latticode.core.extras import EXTRAS

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = {module for modules in EXTRAS.values() for module in modules} - set(sys.modules)
sys.meta_path.insert(0, Blocked())
from latticode import FSQ, cli, load

def run(*words):
    sys.argv, told = ["latticode", *words], io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        cli.main.__globals__["err"].file = told
        try:
            cli.main()
            code = 0
        except SystemExit as leave:
            code = leave.code or 0
    return code, told.getvalue()

assert FSQ([8, 5, 5, 5])(torch.randn(2, 16, 4)).codes.shape == (2, 16, 1)
load(sys.argv[1])
commands = json.loads(sys.argv[2])
print(json.dumps([run(*words) for words in commands]))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with a tokenizer's run, a prior's and five pictures."""
    folder = tmp_path_factory.mktemp("core")
    tiny_tokenizer(folder / "tokenizer")
    tiny = ["steps=2", "log_every=1", "batch_size=8", "prior.width=16", "prior.depth=1", "prior.heads=2"]
    train(load_config("maskgit", [f"tokenizer={folder / 'tokenizer'}", *tiny]), folder / "prior", console=QUIET)
    (folder / "pictures").mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)):
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    return folder


@pytest.mark.slow
def test_the_core_is_enough_for_the_core_and_every_other_verb_names_its_extra(runs) -> None:
    expected = {  # words -> the extra that is asked for, or None where the core is enough
        ("--help",): None,
        ("--version",): None,
        ("recipes",): None,
        ("encode", "tokenizer", "pictures", "tokens"): None,
        ("decode", "tokenizer", "tokens", "decoded"): None,
        ("sample", "prior", "--count", "2", "--out", "samples"): None,
        ("edit", "--help"): None,
        ("predict", "--help"): None,
        ("encode", "tokenizer", "embedded:digits", "digits"): "train",
        ("encode", "tokenizer", "embedded:photos", "photos"): "train",
        ("encode", "tokenizer", "hub:owner/name", "hub"): "train",
        ("train", "fsq-tokenizer", "data.source=pictures"): "train",
        ("evaluate", "tokenizer"): "train",
        ("probe", "tokenizer"): "train",
        ("report", "tokenizer"): "train",
        ("study", "study"): "train",
        ("diagnose", "tokenizer"): "train",
        ("compare", "tokenizer", "tokenizer"): "train",
        ("levels", "1000"): "train",
        ("demo",): "train",
    }
    assert set(VERBS) <= {words[0] for words in expected}
    command = [sys.executable, "-c", CORE_ONLY, str(runs / "tokenizer"), json.dumps(list(expected))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=runs)
    assert done.returncode == 0, done.stderr
    for (words, extra), (code, told) in zip(expected.items(), json.loads(done.stdout), strict=True):
        if extra is None:
            assert code == 0, f"{words}: {told}"
        else:
            assert code == 2, f"{words}: {told}"
            assert f"latticode {words[0]} needs " in told
            assert f"pip install 'latticode[{extra}]'" in told


# --- bounds and pins ------------------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version
    }


def test_every_dependency_has_a_lower_bound() -> None:
    for line in [*PROJECT["dependencies"], *(line for lines in OPTIONAL.values() for line in lines)]:
        requirement = Requirement(line)
        assert requirement.name == "latticode" or any(s.operator == ">=" for s in requirement.specifier), line


def test_what_make_installs_is_pinned_within_the_bounds() -> None:
    pinned = pins()
    (combined, *tools) = OPTIONAL["dev"]
    extras = [line for extra in sorted(Requirement(combined).extras) for line in OPTIONAL[extra]]
    for line in [*PROJECT["dependencies"], *extras, *tools, *OPTIONAL["docs"]]:
        requirement = Requirement(line)
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt has no {requirement.name}"
        assert requirement.specifier.contains(version), f"{line} leaves out the pinned {version}"


def test_the_lowest_versions_are_those_of_the_project() -> None:
    command = [sys.executable, ROOT / "tools" / "lowest.py", "torch==2.13.0"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "torch==2.13.0" in lines
    assert "numpy==1.26" in lines
    named = {line.partition("==")[0] for line in lines}
    assert named >= CORE
    for extra in EXTRAS:
        assert distributions(OPTIONAL[extra]) <= {canonicalize_name(name) for name in named}


# --- what stands beside the code ------------------------------------------------------------------------------------


def test_one_version_everywhere() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    assert __version__ in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", [*sorted(ROOT.glob(".github/**/*.yml")), ROOT / ".pre-commit-config.yaml"], ids=str)
def test_yaml_is_read(path: Path) -> None:
    assert yaml.safe_load(path.read_text())


def test_the_matrix_has_every_python_of_the_classifiers() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    matrix = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    named = [line.rpartition(" :: ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line]
    assert matrix == named


# --- wheels and the source archive ----------------------------------------------------------------------------------

NO_SOURCE = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd", "*.egg-info")
BESIDE = {".git", ".venv", ".hypothesis", ".pytest_cache", ".ruff_cache", "build", "dist", "runs", "site"}
COMPILER = any(map(shutil.which, ("cc", "gcc", "clang", "cl")))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source archive, the wheel of this platform and the pure one, built from a copy of the tree."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for path in ROOT.iterdir():
        if path.is_dir() and path.name not in BESIDE:
            shutil.copytree(path, tree / path.name, ignore=NO_SOURCE)
        elif path.is_file():
            shutil.copy(path, tree)
    for what, native in (("sdist", ""), ("wheel", ""), ("wheel", "0")):
        code = f"from setuptools import build_meta; build_meta.build_{what}({str(out)!r})"
        environment = os.environ | {"LATTICODE_NATIVE": native}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len(list(out.iterdir())) == 3
    return out


def wheel(built: Path, pure: bool) -> Path:
    (found,) = (path for path in built.glob("*.whl") if path.name.endswith("-none-any.whl") == pure)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("pure", [True, False])
def test_a_wheel_is_for_every_python_and_holds_every_file(built, pure) -> None:
    path = wheel(built, pure)
    assert path.name.startswith(f"latticode-{__version__}-py3-none-")
    with zipfile.ZipFile(path) as archive:
        held = {name for name in archive.namelist() if name.startswith("latticode/")}
        about = email.message_from_bytes(archive.read(f"latticode-{__version__}.dist-info/METADATA"))
        tags = archive.read(f"latticode-{__version__}.dist-info/WHEEL").decode()
    source = ROOT / "src"
    wanted = {
        path.relative_to(source).as_posix()
        for path in (source / "latticode").rglob("*")
        if path.suffix in (".py", ".yaml", ".j2", ".typed") and path.is_file()
    }
    libraries = {name for name in held if name.startswith("latticode/kernels/_native.")}
    assert held - libraries == wanted
    assert len(libraries) == (0 if pure or not COMPILER else 1)
    assert f"Root-Is-Purelib: {str(pure).lower()}" in tags
    assert set(about.get_all("Provides-Extra") or []) == OPTIONAL.keys()
    assert about["Requires-Python"] == PROJECT["requires-python"]


@pytest.mark.slow
@pytest.mark.parametrize("pure", [True, False])
def test_a_wheel_runs_where_it_is_unpacked(built, pure, tmp_path) -> None:
    with zipfile.ZipFile(wheel(built, pure)) as archive:
        archive.extractall(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    look = (
        "import latticode; from latticode.kernels import native; print(latticode.__file__, native.available()); "
        "import sys; sys.argv[1:] = ['recipes']; from latticode.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", look], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, _, rest = done.stdout.partition("\n")
    assert first == f"{tmp_path / 'latticode' / '__init__.py'} {not pure and COMPILER}"
    assert "fsq-tokenizer" in rest


@pytest.mark.slow
def test_the_source_archive_has_tests_docs_and_constraints(built) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [
        "Makefile",
        "constraints.txt",
        "setup.py",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "SECURITY.md",
        "CITATION.cff",
    ]
    assert {*wanted, "src/latticode/kernels/native.c", "tests/unit/test_package.py", "tests/conftest.py"} <= held
    assert {"docs/quantizers.md", "tools/lowest.py", "benchmarks/quantizers.py"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyd", ".pyc"))]


@pytest.mark.slow
def test_the_index_would_take_them(built) -> None:
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, sorted(built.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_readme_of_the_index_links_to_addresses(built) -> None:
    with zipfile.ZipFile(wheel(built, True)) as archive:
        about = email.message_from_bytes(archive.read(f"latticode-{__version__}.dist-info/METADATA"))
    page = about.get_payload()
    assert isinstance(page, str)
    assert "](https://github.com/latticode/latticode/blob/main/" in page
    assert "](docs/" not in page
