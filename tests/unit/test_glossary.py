"""The glossary names only what is there, and every name that has changed."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from latticode.core import registry, renamed
from latticode.engine.config import recipe_names

PAGE = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text(encoding="utf-8")
NOW, _, OLD = PAGE.partition("## Names of version 0.1")


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every row of the tables in `text`, but for the heads."""
    for line in text.splitlines():
        if line.startswith("| ") and not line.startswith(("| term ", "| 0.1 ")):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`(latticode(?:\.\w+)+)`", PAGE))))
def test_what_it_points_at_is_there(path: str) -> None:
    assert pkgutil.resolve_name(path) is not None


def test_every_term_has_a_sentence_and_a_place() -> None:
    found = list(rows(NOW))
    assert len(found) > 60
    for cells in found:
        assert len(cells) == 3, cells
        assert all(cells), cells
        assert "`latticode." in cells[2], cells
        assert len(cells[1].split()) >= 4, cells
        assert cells[1].endswith((".", "`")), cells


def test_types_and_recipes_in_it_are_known() -> None:
    for word in re.findall(r"`(\w+_(?:discriminator|encoder|decoder))`", PAGE):
        assert word in registry.TABLE
    listed = {name for cells in rows(OLD) for name in re.findall(r"`(uvim-[\w-]+)`", cells[1])}
    assert listed <= set(recipe_names())


def test_it_lists_every_name_that_has_changed() -> None:
    old = {cell for cells in rows(OLD) for cell in re.findall(r"`([\w/ :-]+)`", cells[0])}
    new = {cell for cells in rows(OLD) for cell in re.findall(r"`([\w/ :-]+)`", cells[1])}
    keys = {key: value for names in renamed.KEYS.values() for key, value in names.items()}
    for names in (renamed.TYPES, keys, renamed.TERMS, renamed.RECIPES, renamed.FACTS, renamed.METRICS):
        assert names.keys() <= old
        assert set(names.values()) <= new
