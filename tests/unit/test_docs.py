"""The documentation is true: its Python runs, its commands and links exist, and everything public has a docstring."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer
import yaml

from latticode.cli import app
from latticode.core.registry import build
from latticode.engine.config import complete, load_config, recipe_names

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md")))]
LINKING = [*PAGES, *(path.name for path in sorted(ROOT.glob("*.md")) if path.name not in PAGES)]
HERE = re.compile(
    r"https://(?:github\.com/latticode/latticode/(?:blob|raw|tree)|raw\.githubusercontent\.com/latticode/latticode)/main/"
)
GENERATED = {"changelog.md", "contributing.md"}  # pages that docs/hooks/site.py makes of files in the root


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The code of a page's fenced blocks of one language; those of lists and tabs are indented."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", read(page), flags=re.DOTALL | re.MULTILINE)
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def load(name: str) -> ModuleType:
    """A module of docs/hooks, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


package = load("package")
diagrams = load("diagrams")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_code_of_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks(page, "python"))
    if "runs/fsq-tokenizer" in code:
        build(complete(load_config("fsq-tokenizer", ["data.source=photos/"]), classes=0).model).save_pretrained(
            Path("runs/fsq-tokenizer")
        )
    exec(compile(code, page, "exec"), {"__name__": page})


def commands(page: str) -> Iterator[list[str]]:
    """The words of every latticode command in a page's shell blocks; comments, pipes and variables left out."""
    for block in [code for language in ("bash", "sh") for code in blocks(page, language)]:
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:^|\s|-m )latticode ([a-z]+\b.*)", line)
            if match and "$(" not in line:
                yield shlex.split(match[1], comments=True)


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_exist(page: str) -> None:
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for words in commands(page):
        verb, *others = words
        assert verb in verbs, f"{page}: latticode {verb}"
        options = {name for parameter in verbs[verb].params for name in parameter.opts} | {"--help"}
        used = [word.split("=")[0] for word in others if re.fullmatch(r"--[a-z-]+|-[a-z]", word)]
        assert not set(used) - options, f"{page}: latticode {verb} has no {sorted(set(used) - options)}"
        if verb == "train" and re.fullmatch(r"[a-z0-9-]+", others[0]):
            assert others[0] in recipe_names(), f"{page}: no recipe {others[0]}"


def test_the_readme_lists_every_verb() -> None:
    listed = re.findall(r"^\| `([a-z]+)` \|", read("README.md"), flags=re.MULTILINE)
    assert sorted(listed) == sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", LINKING)
def test_links_of_a_page_lead_somewhere(page: str) -> None:
    """Files, and headings of pages; addresses of this repository as files of this tree."""
    for target in re.findall(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)", re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)):
        local = HERE.sub("", target)
        if re.match(r"[a-z]+:", local):
            continue
        name, _, anchor = local.partition("#")
        base = ROOT if local != target else (ROOT / page).parent
        path = (base / name).resolve() if name else ROOT / page
        generated = path.parent == ROOT / "docs" and path.name in GENERATED
        made = path.is_relative_to(ROOT / "docs" / "api") or path.is_relative_to(ROOT / "docs" / "tutorials")
        assert path.exists() or generated or made, f"{page} links to {target}"
        if anchor and path.suffix == ".md" and path.exists():
            assert anchor in anchors(path), f"{page} links to {target}"


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as MkDocs and GitHub make them of plain ones."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)).strip().lower()
        found.add(re.sub(r"\s+", "-", plain))
    return found


def test_links_of_the_readme_are_absolute() -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", read("README.md"))
    assert [target for target in targets if not target.startswith("https://")] == []


def test_the_navigation_names_every_page() -> None:
    listed = set(re.findall(r"^ +- (?:[^:\n]+: )?([\w/-]+\.md)$", read("mkdocs.yml"), flags=re.MULTILINE))
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert listed - GENERATED == pages


def test_hooks_of_the_site_exist() -> None:
    lines = [line for line in read("mkdocs.yml").splitlines() if line.startswith(("hooks:", "extra_css:"))]
    named = [name for line in lines for names in yaml.safe_load(line).values() for name in names]
    assert [name for name in named if not any((base / name).is_file() for base in (ROOT, ROOT / "docs"))] == []


def test_everything_public_has_a_docstring() -> None:
    missing = {name.path for name in package.public_names() if not name.documented}
    assert not missing


def test_arguments_of_a_docstring_exist() -> None:
    """Each name before a colon in an `Args:` section is a parameter; `a, b: ...` are several."""
    unknown = [f"{path}: {name}" for path, name in described_arguments()]
    assert unknown == []


def described_arguments() -> Iterator[tuple[str, str]]:
    """What an `Args:` section describes that its class or function does not take."""
    for module in package.modules():
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", ast.get_docstring(node) or "", re.DOTALL | re.MULTILINE)
            taken = set(parameters(node))
            if section and taken:
                for names in re.findall(r"^    ([\w*, ]+)(?: \([^)]*\))?:", section[1], re.MULTILINE):
                    for name in names.split(","):
                        if name.strip(" *") not in taken:
                            yield f"{module.name}.{node.name}", name.strip()


def parameters(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Parameters of a function, or of a class's `__init__`; of one without, its annotated fields."""
    if isinstance(node, ast.ClassDef):
        inits = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        if not inits:
            return [ast.unparse(n.target) for n in node.body if isinstance(n, ast.AnnAssign)]
        return parameters(inits[0])
    spec = node.args
    every = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
    return [argument.arg for argument in every]


def test_every_room_is_drawn() -> None:
    drawn = diagrams.rooms()
    for room in package.rooms():
        assert f">{room}<" in drawn
        assert package.of_room(room)[0].summary, f"{room}/__init__.py has no docstring"
