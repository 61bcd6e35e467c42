"""Constraints that hold every dependency to the lowest version that pyproject.toml allows.

    python tools/lowest.py > lowest.txt && pip install -c lowest.txt -e '.[dev]'

The tools of `docs` and `dev` are left as they are. An argument `name==version` stands in for a bound that does not
install on a machine: torch==2.13.0.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

DEPENDENCY = re.compile(r"(?P<name>[\w.-]+)(?:\[[\w,-]+\])?>=(?P<lowest>[\w.]+)")
TOOLS = {"docs", "dev"}


def bounds(project: Mapping[str, object], extras: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Name and lowest version of every dependency of `extras` and of the package itself.

    Raises ValueError for a dependency without a lower bound.
    """
    optional = project["optional-dependencies"]
    assert isinstance(optional, dict)
    groups = [project["dependencies"], *(optional[extra] for extra in extras)]
    for dependency in (line for group in groups for line in group):  # type: ignore[attr-defined]
        if dependency.startswith("latticode["):
            continue
        if not (match := DEPENDENCY.match(dependency)):
            raise ValueError(f"{dependency!r} has no lower bound")
        yield match["name"], match["lowest"]


def main(given: Iterable[str]) -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = dict(bounds(project, project["optional-dependencies"].keys() - TOOLS)) | dict(
        word.split("==") for word in given
    )
    print(*(f"{name}=={version}" for name, version in sorted(lowest.items())), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
