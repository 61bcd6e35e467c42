"""The examples run and do what they promise; a plug-in that is installed is everywhere that its names should be."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"
SOURCE = Path(importlib.util.find_spec("latticode").origin).parents[1]  # type: ignore[union-attr, arg-type]


def python(*arguments: str, path: tuple[Path, ...] = (), check: bool = True) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, with `path` importable."""
    folders = os.pathsep.join(map(str, (*path, SOURCE)))
    environment = os.environ | {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    result = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.mark.usefixtures("unregistered")
def test_a_quantizer_and_an_autoencoder_of_ones_own(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import own_quantizer

    assert own_quantizer.main(100, tmp_path) > 18  # dB; 300 steps give 25


def test_lightning(tmp_path) -> None:
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed; the example was last run with 2.6.6")
    python(str(EXAMPLES / "lightning_module.py"), "--steps", "20", "--out", str(tmp_path), path=(EXAMPLES,))
    loading = f"import own_quantizer, latticode; print(latticode.load({str(tmp_path)!r}).vocab)"
    assert python("-c", loading, path=(EXAMPLES,)).stdout == "(729,)\n"


def test_own_data_and_more_steps_of_it(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import own_data

    own_data.main(3, tmp_path)
    own_data.main(5, tmp_path, resume=True)
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 5
    assert (tmp_path / "images" / "reconstructions-000005.png").is_file()


# The plug-in, installed as a stranger would


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip has installed the plug-in to, from a copy and without a network."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed")
    folder = tmp_path_factory.mktemp("plugin")
    copy = shutil.copytree(EXAMPLES / "latticode-cube", folder / "source")
    quiet = ("--quiet", "--disable-pip-version-check", "--no-deps", "--no-index", "--no-build-isolation")
    python("-m", "pip", "install", *quiet, "--target", str(folder / "site"), str(copy))
    return folder / "site"


VERBS = """
import sys
from latticode.cli import main
for line in sys.argv[1:]:
    print("$", line, flush=True)
    sys.argv = ["latticode", *line.split()]
    try:
        main()
    except SystemExit as end:
        assert not end.code, line
"""


@pytest.fixture(scope="module")
def shown(site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A run of the plug-in's recipe on its own source, and what the verbs of the command line print, by verb."""
    run = tmp_path_factory.mktemp("runs") / "cube"
    lines = [
        f"train cube-digits steps=2 batch_size=4 data.source=checkers:40 --out {run}",
        f"evaluate {run}",
        f"diagnose {run}",
        "recipes",
        "cube 1000",
        "--help",
    ]
    printed = python("-c", VERBS, *lines, path=(site,)).stdout
    parts = [part.partition("\n") for part in printed.split("$ ")[1:]]
    return run, {line.split()[0]: text for line, _, text in parts}


def test_the_plug_in_trains_by_recipe_and_loads(shown, site: Path) -> None:
    run, _ = shown
    spec = json.loads((run / "run.json").read_text())
    assert spec["steps"] == 2
    assert {"train/mse", "train/huber"} <= json.loads((run / "metrics.jsonl").read_text().splitlines()[0]).keys()
    loading = f"""
import sys, torch, latticode
assert "latticode_cube" not in sys.modules, "a plug-in is imported where it is needed only"
tokenizer = latticode.load({str(run)!r})
again = latticode.load(tokenizer.save_pretrained({str(run.parent / "saved")!r}))
images = torch.rand(2, 1, 16, 16)
assert torch.equal(again.encode(images), tokenizer.encode(images))
print(type(again.quantizer).__name__, latticode.build({{"type": "cube", "side": 3, "dim": 2}}).vocab)
"""
    assert python("-c", loading, path=(site,)).stdout == "Cube (9,)\n"


def test_the_plug_in_is_evaluated_and_diagnosed(shown) -> None:
    run, printed = shown
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert 0 < evaluation["worst_error"] <= 2
    assert evaluation["protocol"]["source"] == "checkers:40"
    diagnosis = json.loads((run / "diagnosis.json").read_text())
    (part,) = diagnosis["parts"]
    assert part["type"] == "Cube"
    assert "worst_error" in printed["evaluate"]


def test_the_plug_in_is_studied(site: Path, tmp_path: Path) -> None:
    small = "data.size=16 data.channels=1 data.workers=0 batch_size=4"
    line = f"study checkers:40 {small} --quantizers fsq,cube --sizes 64 --steps 1 --out {tmp_path}"
    python("-c", VERBS, line, path=(site,))
    rows = (tmp_path / "study.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["quantizer", "fsq", "cube"]


def test_the_plug_in_is_in_recipes_and_help(shown) -> None:
    _, printed = shown
    assert "cube-digits" in printed["recipes"]
    assert "Say which cube has about SIZE codes" in printed["--help"]
    assert printed["cube"] == "side=4 dim=5: 1024 codes\n"


def test_without_the_plug_in_its_model_is_refused_and_nothing_is_imported(shown, site: Path) -> None:
    run, _ = shown
    bare = run.parent / "bare"  # the code is importable, but no installed package says so
    shutil.copytree(site / "latticode_cube", bare / "latticode_cube", dirs_exist_ok=True)
    loading = f"""
import sys, latticode, latticode.core.registry
before = set(sys.modules)
try:
    latticode.load({str(run)!r})
except ValueError as error:
    print(error)
new = {{name for name in set(sys.modules) - before if not name.startswith(("latticode.", "torch.", "importlib"))}}
print(sorted(name for name in new if name.partition(".")[0] not in sys.stdlib_module_names))
"""
    message, imported = python("-c", loading, path=(bare,)).stdout.splitlines()
    assert message.startswith("quantizer: unknown type 'cube'; ")
    assert "call latticode.register('cube', TheClass) first; if it is another package's, install that" in message
    assert imported == "[]"
    refused = python("-m", "latticode", "evaluate", str(run), "embedded:digits", path=(bare,), check=False)
    assert refused.returncode == 2
    assert "unknown type 'cube'" in refused.stderr


def installed(folder: Path, name: str, code: str) -> None:
    """A package by hand: a module and the metadata that an installer writes."""
    (folder / f"{name}.py").write_text(code)
    about = folder / f"{name}-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (about / "entry_points.txt").write_text(f"[latticode.plugins]\n{name} = {name}\n")


def test_a_broken_plug_in_is_named_once_and_breaks_nothing_else(tmp_path) -> None:
    installed(tmp_path, "broken", "import latticode, nowhere")
    installed(
        tmp_path,
        "greedy",
        "import latticode\nlatticode.register('half', latticode.FSQ)\nlatticode.register('vq', latticode.FSQ)\n",
    )
    installed(
        tmp_path,
        "odd",
        "import latticode\nlatticode.register('odd', lambda x: x, 'verb')\n"
        "def strange(x: 'Nowhere'): ...\nlatticode.register('strange', strange, 'verb')\n",
    )
    installed(
        tmp_path,
        "whole",
        "import latticode\nclass Whole(latticode.FSQ): ...\n"
        "latticode.register('whole', Whole)\n"
        "def greet():\n    'Greet the world.'\n    print('hello')\nlatticode.register('greet', greet, 'verb')\n",
    )
    result = python("-m", "latticode", "greet", path=(tmp_path,))
    assert result.stdout == "hello\n"
    warned = result.stderr.strip().splitlines()
    assert len(warned) == 3, warned
    assert warned[0].startswith("warning: the plug-in 'broken' (broken) of the package broken is left out: ")
    assert warned[0].endswith("No module named 'nowhere'")
    assert "the module 'vq' is there already (latticode.quantizers.vq:VQ)" in warned[1]
    assert warned[2].startswith("warning: the verb 'strange' of odd:strange is left out: ")
    building = """
import warnings, latticode
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(latticode.build({"type": "whole", "levels": [3]}).vocab)
    try:
        latticode.build({"type": "half", "levels": [3]})
    except ValueError as error:
        print(str(error)[:24])
print(len(caught))
"""
    assert python("-c", building, path=(tmp_path,)).stdout == "(3,)\nspec: unknown type 'half\n2\n"


def test_importing_latticode_imports_no_plug_in(tmp_path) -> None:
    installed(tmp_path, "slow", "raise SystemExit('imported')")
    ours = 'import latticode; latticode.build({"type": "fsq", "levels": [3]}); latticode.FSQ([3])'
    python("-c", ours, path=(tmp_path,))
