"""Nested mappings: dotted keys, and what differs between two of them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, TypeGuard


def is_mapping(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value of a spec or of JSON is one with keys."""
    return isinstance(value, Mapping)


def is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    """Whether a value of a spec or of JSON is a list or a tuple."""
    return isinstance(value, list | tuple)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], free: Container[str] = ()) -> str:
    """The keys in which two nested mappings differ with both values, at most five; those in `free` may."""
    there, now = dict(flat(old)), dict(flat(new))
    keys = [k for k in sorted(there.keys() | now.keys()) if there.get(k) != now.get(k) and k not in free]
    return "; ".join(f"{k}: {there.get(k)!r} there, {now.get(k)!r} now" for k in keys[:5])


def flat(value: Mapping[str, Any], joint: str = ".") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings under their keys, with `joint` between them; an empty mapping has none."""
    for key, inner in value.items():
        if is_mapping(inner):
            yield from ((f"{key}{joint}{rest}", leaf) for rest, leaf in flat(inner, joint))
        else:
            yield key, inner
