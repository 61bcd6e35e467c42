"""Nested mappings: dotted keys, and what differs between two of them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Container[str] = ()) -> str:
    """The keys in which two nested mappings differ with both values, at most five; those in `free` may."""
    there, now = dict(flat(old)), dict(flat(new))
    keys = [k for k in sorted(there.keys() | now.keys()) if there.get(k) != now.get(k) and k not in free]
    return "; ".join(f"{k}: {there.get(k)!r} there, {now.get(k)!r} now" for k in keys[:5])


def flat(value: Mapping[str, Any], joint: str = ".") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings under their keys, with `joint` between them; an empty mapping has none."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from ((f"{key}{joint}{rest}", leaf) for rest, leaf in flat(inner, joint))
        else:
            yield key, inner
