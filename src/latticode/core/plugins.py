"""`register` and plug-ins: how code that is not part of this package adds names to its tables.

There is one concept: `latticode.register(name, thing, kind)`. A script or notebook calls it itself. A package that
others install calls it when it is imported, and names the module that does so as an entry point of the group
`latticode.plugins` in its pyproject.toml:

    [project.entry-points."latticode.plugins"]
    cube = "latticode_cube"

That module is imported once: when a name is asked for that no table has, when a table is listed, and when the command
line starts; never by `import latticode`. A plug-in that fails to import is left out with one `PluginWarning` that names
it. Only code that is installed on this machine, or that the program itself runs, can add a name: neither a checkpoint
nor a configuration can name a module to import.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from importlib import metadata
from typing import Any, Generic, TypeVar

from torch import nn

GROUP = "latticode.plugins"
KINDS = {
    "module": "a class of torch.nn.Module that a spec may name: quantizer, encoder, decoder, prior, objective, ...",
    "loss": "f(output, target) -> scalar, both (B, C, *size) float in [-1, 1]; a name for `objective.terms`",
    "metric": "f(originals, output) -> (B,), both (B, C, *size) float in [-1, 1], or None for data that it does not "
    "know; `evaluate` reports the mean",
    "source": "f(source, split, holdout, medium) -> latticode.data.Source, for `data.source=NAME:anything`",
    "verb": "a function whose annotated parameters Typer turns into a command of `latticode`",
    "recipe": "a path, or a resource of importlib.resources, of a YAML file",
    "study": "f(size) -> (spec of a quantizer of about that many codes, weights of its losses), for `latticode study`",
}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
T = TypeVar("T")
added: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}  # by kind, what was registered
_tables: dict[str, Table[Any]] = {}
_asked = False


class PluginWarning(UserWarning):
    """An installed plug-in, or a name of one, that is left out, and why."""


class Table(MutableMapping[str, T], Generic[T]):
    """The names of one kind: this package's own, and those of `register`.

    A name that is not there, and a listing, load the installed plug-ins first; a name that is there does not.

    Args:
        kind: one of `KINDS`.
        own: this package's names. Plug-ins cannot replace them.

    Examples:
        >>> from latticode.losses import TERMS
        >>> "mse" in TERMS, "no such loss" in TERMS
        (True, False)
    """

    def __init__(self, kind: str, own: Mapping[str, T]):
        self.kind, self.own = kind, dict(own)
        self.added: dict[str, T] = added[kind]
        _tables[kind] = self
        for name in self.own.keys() & self.added.keys():  # registered before the room of this kind was imported
            warnings.warn(
                f"left out: {_taken(kind, name, self.added.pop(name), self.own[name])}", PluginWarning, stacklevel=2
            )

    @property
    def loaded(self) -> dict[str, T]:
        """Without the plug-ins that nobody has needed yet."""
        return {**self.own, **self.added}

    def __getitem__(self, name: str) -> T:
        if name not in self.own and name not in self.added:
            load_plugins()
        return self.own[name] if name in self.own else self.added[name]

    def __setitem__(self, name: str, thing: T) -> None:
        self.own[name] = thing

    def __delitem__(self, name: str) -> None:
        del self.own[name]

    def __iter__(self) -> Iterator[str]:
        load_plugins()
        return iter(self.loaded)

    def __len__(self) -> int:
        load_plugins()
        return len(self.loaded)


def register(name: str, thing: Any, kind: str = "module") -> None:
    """Let specs, recipes and the command line call `thing` by `name`, in this process.

    A saved model holds names, not code: whoever loads it has to register the same name first, or to have a package
    installed that does (see the module's text on entry points). Called again with the same class or function, as a
    notebook does, it changes nothing, and a class that was defined anew takes the place of its former self.

    Args:
        name: letters, digits, `_`, `-` and `.`.
        thing: what `kind` says. A module's class keeps every argument of its constructor as an attribute of the same
            name: from these its spec is read.
        kind: "module", "loss", "metric", "source", "verb", "recipe" or "study" (`KINDS` says what each is).

    Raises:
        ValueError: for another kind, a name that is malformed or taken, and a module that is not a class of one.

    Examples:
        >>> import latticode
        >>> class Coarse(latticode.FSQ):
        ...     pass
        >>> latticode.register("coarse", Coarse)
        >>> latticode.build({"type": "coarse", "levels": [3, 3]}).vocab
        (9,)
        >>> latticode.register("fsq", Coarse)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: the module 'fsq' is there already (latticode.quantizers.fsq:FSQ); choose another name for ...
    """
    if kind not in KINDS:
        raise ValueError(f"no kind {kind!r} to register {name!r} as; kinds: {', '.join(KINDS)}")
    if not _NAME.fullmatch(name):
        raise ValueError(f"a name has letters, digits, '_', '-' and '.' only, got {name!r}")
    if kind == "module" and not (isinstance(thing, type) and issubclass(thing, nn.Module)):
        raise ValueError(f"a module is {KINDS['module']}; got {thing!r} for {name!r}")
    known = _tables[kind].loaded if kind in _tables else added[kind]
    if name in known and address(known[name]) != address(thing):
        raise ValueError(_taken(kind, name, thing, known[name]))
    if kind not in _tables or name not in _tables[kind].own:
        added[kind][name] = thing


def load_plugins() -> None:
    """Import the module of every entry point of the group `latticode.plugins`, once; what fails is left out whole."""
    global _asked
    if _asked:
        return
    _asked = True
    for entry in sorted(metadata.entry_points(group=GROUP)):
        before = {kind: dict(known) for kind, known in added.items()}
        try:
            entry.load()
        except Exception as error:
            for kind, known in before.items():
                added[kind].clear()
                added[kind].update(known)
            package = entry.dist.name if entry.dist else "?"
            what = f"the plug-in {entry.name!r} ({entry.value}) of the package {package} is left out"
            warnings.warn(f"{what}: {type(error).__name__}: {error}", PluginWarning, stacklevel=3)


def _taken(kind: str, name: str, thing: Any, there: Any) -> str:
    return f"the {kind} {name!r} is there already ({address(there)}); choose another name for {address(thing)}"


def address(thing: Any) -> str:
    """Where a class or function stands, "package.module:Name": two of one address are one thing."""
    if isinstance(thing, str) or not hasattr(thing, "__qualname__"):
        return str(thing)
    return f"{thing.__module__}:{thing.__qualname__}"
