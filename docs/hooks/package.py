"""What the documentation knows of the package: its rooms, their layers, its public names. Read from the source, so that
nothing is imported and nothing forgotten."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "latticode"
EXTERNAL = {  # methods that a base class of another library documents, and calls
    "forward",  # torch.nn.Module: what the class docstring says of its input and output
    "backward",
    "setup_context",
    "extra_repr",
    "render",  # rich.progress.ProgressColumn
}


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    name: str  # dotted, with the package: latticode.core.files
    path: Path
    tree: ast.Module = field(repr=False, compare=False)

    @property
    def room(self) -> str:
        return self.name.split(".")[1] if "." in self.name else ""

    @property
    def summary(self) -> str:
        """The first sentence of the module's docstring, without its full stop."""
        return summary(ast.get_docstring(self.tree))


@dataclass(frozen=True)
class Name:
    """A public class, function or method."""

    path: str  # latticode.core.files.write_json
    documented: bool


def summary(docstring: str | None) -> str:
    """The first sentence of a docstring, without its full stop."""
    paragraph = " ".join((docstring or "").split("\n\n")[0].split())
    return paragraph.split(". ")[0].rstrip(".:")


@cache
def modules() -> tuple[Module, ...]:
    """All public modules, packages first, in the order of their names."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py"), key=lambda p: (p.parent, p.name != "__init__.py", p.name)):
        parts = [p for p in path.relative_to(PACKAGE).with_suffix("").parts if p != "__init__"]
        if not any(part.startswith("_") for part in parts):
            found.append(Module(".".join(["latticode", *parts]), path, ast.parse(path.read_text(encoding="utf-8"))))
    return tuple(found)


@cache
def layers() -> tuple[tuple[str, ...], ...]:
    """Rooms row by row, the lowest first, as the test of the architecture has them."""
    tree = ast.parse((ROOT / "tests" / "unit" / "test_architecture.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS":
            rows = [[ast.literal_eval(e) for e in row.elts] for row in node.value.elts]  # type: ignore[attr-defined]
            return tuple(tuple(room for room in row if (PACKAGE / room).is_dir()) for row in rows)
    raise ValueError("tests/unit/test_architecture.py has no LAYERS")


def rooms() -> list[str]:
    """The packages inside latticode, the lowest layer first."""
    placed = [room for row in layers() for room in row]
    there = {m.room for m in modules() if m.path.name == "__init__.py" and m.room}
    if there != set(placed):
        raise ValueError(f"in no layer: {sorted(there - set(placed))}; no package: {sorted(set(placed) - there)}")
    return placed


def of_room(room: str) -> list[Module]:
    """The modules of a room, its `__init__` first."""
    return [m for m in modules() if m.room == room]


def imported(room: str) -> list[str]:
    """The rooms that a room imports, the lowest first."""
    names = set()
    for module in of_room(room):
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("latticode"):
                dotted = [f"latticode.{a.name}" for a in node.names] if node.module == "latticode" else [node.module]
                names.update(str(name).split(".")[1] for name in dotted)
            elif isinstance(node, ast.Import):
                names.update(a.name.split(".")[1] for a in node.names if a.name.startswith("latticode."))
    return [other for other in rooms() if other in names - {room}]


def exported() -> dict[str, str]:
    """What `from latticode import ...` gives: each public name and where it is defined, as a dotted path."""
    return _resolved(next(m for m in modules() if m.name == "latticode"))


@cache
def _resolved(module: Module) -> dict[str, str]:
    """The names that a module imports from the package, each with the path where it is defined."""
    known = {m.name: m for m in modules()}
    paths: dict[str, str] = {}
    for node in module.tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("latticode."):
            source = known.get(str(node.module))
            onward = _resolved(source) if source and source is not module and source.path.name == "__init__.py" else {}
            for alias in node.names:
                paths[alias.asname or alias.name] = onward.get(alias.name, f"{node.module}.{alias.name}")
    return paths


def public_names() -> Iterator[Name]:
    """Every public class, function and method of every public module.

    A method counts as documented where the method of a base class that it overrides is, or where another library calls
    it (`EXTERNAL`).
    """
    classes = {
        f"{module.name}.{node.name}": (module, node)
        for module in modules()
        for node in module.tree.body
        if isinstance(node, ast.ClassDef)
    }
    for module in modules():
        for node in _definitions(module.tree):
            path = f"{module.name}.{node.name}"
            yield Name(path, ast.get_docstring(node) is not None)
            if not isinstance(node, ast.ClassDef):
                continue
            for method in _definitions(node):
                said = ast.get_docstring(method) is not None or method.name in EXTERNAL
                yield Name(f"{path}.{method.name}", said or _inherits(path, method.name, classes))


def _definitions(scope: ast.Module | ast.ClassDef) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Public classes and functions of a scope; of a property its getter."""
    for node in scope.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        if not any(ast.unparse(d).endswith((".setter", "overload")) for d in node.decorator_list):
            yield node


def _inherits(path: str, method: str, classes: dict[str, tuple[Module, ast.ClassDef]]) -> bool:
    """Whether a base class inside the package documents a method."""
    module, node = classes[path]
    for base in node.bases:
        name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
        above = next((p for p in (f"{module.name}.{name}", _resolved(module).get(name, "")) if p in classes), None)
        if above is None:
            continue
        said = any(d.name == method and ast.get_docstring(d) for d in _definitions(classes[above][1]))
        if said or _inherits(above, method, classes):
            return True
    return False
