"""MkDocs hooks: pages made from the tree (reference, tutorials, changelog, contributing), and links that leave docs/.

Whatever the package, `examples/` or the test of the architecture gain appears on the site without an edit here.
"""

from __future__ import annotations

import ast
import posixpath
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))

import diagrams
import package

ROOT = package.ROOT
SOURCE = "https://github.com/latticode/latticode/blob/main"
WIDE = 10  # columns of a table that takes the room of the table of contents
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and put those of the reference and the tutorials into the navigation."""
    reference = dict(_reference())
    tutorials = dict(_tutorials())
    pages = {
        **reference,
        **tutorials,
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
    }
    for uri, text in pages.items():
        root = uri in ("changelog.md", "contributing.md")  # their links start at the root of the tree, not in docs/
        files.append(File.generated(config, uri, content=_moved(text) if root else text))
    config.nav = _filled(config.nav or [], {"API": list(reference), "TUTORIALS": list(tutorials)})
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what a page asks for by `<!-- name -->`; lead links out of docs/ to the repository."""
    made = {"rooms": diagrams.rooms, "tensor": diagrams.tensor, "floors": _floors, "tutorials": _list_of_tutorials}
    for name, make in made.items():
        if f"<!-- {name} -->" in markdown:
            markdown = markdown.replace(f"<!-- {name} -->", make())
    columns = max((line.count("|") - 1 for line in markdown.splitlines() if line.startswith("|")), default=0)
    page.meta["hide"] = ["navigation", "toc"] if page.is_homepage else ["toc"] * (columns >= WIDE)
    return LINK.sub(lambda match: _outward(match, page.file.src_uri), markdown)


def _outward(match: re.Match[str], uri: str) -> str:
    """A link that leaves docs/ as a link to the repository. Raises PluginError if it leads nowhere."""
    opening, target, anchor = match.groups()
    if re.match(r"[a-z]+:|/", target):
        return match[0]
    inside = posixpath.normpath(posixpath.join("docs", posixpath.dirname(uri), target))
    if inside.startswith("docs/"):
        return match[0]
    if not (ROOT / inside).exists():
        raise PluginError(f"{uri} links to {target}, which is not in the repository")
    return f"{opening}{SOURCE}/{inside}{anchor or ''}"


def _moved(text: str) -> str:
    """A page of the tree's root with its links as of a page in docs/."""

    def moved(match: re.Match[str]) -> str:
        opening, target, anchor = match.groups()
        if re.match(r"[a-z]+:|/", target):
            return match[0]
        known = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
        inner = target.removeprefix("docs/") if target.startswith("docs/") else known.get(target, f"../{target}")
        return f"{opening}{inner}{anchor or ''}"

    return LINK.sub(moved, text)


def _reference() -> Iterator[tuple[str, str]]:
    """The pages of the API reference: all public names first, then one page for each room."""
    rows = []
    for name, path in sorted(package.exported().items(), key=lambda item: item[0].lower()):
        if not name.startswith("_"):
            rows.append(f"| [`{name}`][{path}] | `{path.rsplit('.', 1)[0]}` |")
    rooms = [f"| [`{room}`]({room}.md) | {package.of_room(room)[0].summary} |" for room in reversed(package.rooms())]
    yield (
        "api/index.md",
        "\n".join(
            [
                "# API reference",
                "",
                "Everything public, read from the source: a page for each room (package), a section for each module.",
                "What begins with an underscore is private.",
                "",
                "## `from latticode import ...`",
                "",
                "These names are stable.",
                "",
                "| name | defined in |",
                "|---|---|",
                *rows,
                "",
                "## Rooms",
                "",
                "| room | what is in it |",
                "|---|---|",
                *rooms,
            ]
        ),
    )
    for room in package.rooms():
        first, *others = package.of_room(room)
        lines = [f"# {room}", "", f"::: {first.name}", "    options:", "      show_root_heading: false"]
        lines += ["      show_root_toc_entry: false"]
        if others:  # a package's own page is its docstring and what it defines itself
            own = [
                n.name for n in first.tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name[0] != "_"
            ]
            lines += [f"      members: {own or 'false'}"]
        for module in others:
            if module.path.name != "__main__.py":
                lines += ["", f"::: {module.name}"]
        yield f"api/{room}.md", "\n".join(lines) + "\n"


def _tutorials() -> Iterator[tuple[str, str]]:
    """A page for each example: its docstring as prose, its code behind. A folder with a pyproject.toml is a package."""
    examples = ROOT / "examples"
    for path in sorted(examples.iterdir(), key=lambda p: (p.is_dir(), p.name)) if examples.is_dir() else []:
        uri = f"tutorials/{path.stem.replace('_', '-')}.md"
        if path.suffix == ".py":
            yield uri, _tutorial(path)
        elif (path / "pyproject.toml").is_file():
            yield uri, _project(path)


def _tutorial(path: Path) -> str:
    """The page of a program. The first paragraph of its docstring is the page's title and first sentence."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    prose = ast.get_docstring(tree) or path.stem
    body = "".join(text.splitlines(keepends=True)[tree.body[0].end_lineno :]).lstrip()  # what follows the docstring
    where = path.relative_to(ROOT).as_posix()
    return f"# {_title(path)}\n\n{prose}\n\nThe file is [`{where}`](../../{where}).\n\n```python\n{body}```\n"


def _project(folder: Path) -> str:
    """The page of a package: what its pyproject.toml says of it, then its files."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    where = folder.relative_to(ROOT).as_posix()
    parts = [f"# {_title(folder)}\n", f"{project['description']}. The package is [`{where}`](../../{where}).\n"]
    kinds = {".toml": "toml", ".py": "python", ".yaml": "yaml"}
    found = [path for path in folder.rglob("*") if path.suffix in kinds and "build" not in path.parts]
    for path in sorted(found, key=lambda p: (list(kinds).index(p.suffix), p)):
        text = path.read_text(encoding="utf-8")
        parts.append(f"## `{path.relative_to(folder).as_posix()}`\n\n```{kinds[path.suffix]}\n{text}```\n")
    return "\n".join(parts)


def _title(path: Path) -> str:
    """The name of an example, in words."""
    return f"Plug-in: {path.name}" if path.is_dir() else path.stem.replace("_", " ").capitalize()


def _list_of_tutorials() -> str:
    """A line for each example, for the page that lists them: its title and the first sentence below it."""
    lines = []
    for uri, text in _tutorials():
        title, first = re.findall(r"^# (.+)\n+(.+(?:\n.+)*)", text)[0]
        lines.append(f"- [{title}]({uri.removeprefix('tutorials/')}): {package.summary(first)}.")
    return "\n".join(lines)


def _floors() -> str:
    """The table of the rooms: floor, room, size, what it imports."""
    lines = ["| floor | room | modules | lines | imports |", "|---|---|---|---|---|"]
    arrows = 0
    for number, floor in reversed(list(enumerate(package.layers()))):
        for room in floor:
            below = package.imported(room)
            arrows += len(below)
            files = package.of_room(room)
            length = sum(len(m.path.read_text(encoding="utf-8").splitlines()) for m in files)
            lines.append(f"| {number} | [{room}](api/{room}.md) | {len(files)} | {length:,} | {', '.join(below)} |")
    return "\n".join([*lines, "", f"{len(package.rooms())} rooms on {len(package.layers())} floors, {arrows} arrows."])


def _filled(nav: list[Any], pages: dict[str, list[str]]) -> list[Any]:
    """The navigation with a list of pages in the place of each of their names."""
    filled: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            filled += [
                {title: _filled(value, pages) if isinstance(value, list) else value} for title, value in entry.items()
            ]
        else:
            filled += pages.get(entry, [entry])
    return filled
