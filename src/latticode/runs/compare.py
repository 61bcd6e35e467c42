"""Compare evaluations: one table for each protocol, as numbers of different protocols are not comparable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latticode.core.files import read_json
from latticode.core.mappings import differences, flat

OWN = {"run", "ema", "preprocessing.flip"}  # of a model's training: held-out images are not flipped


@dataclass
class Comparable:
    """Evaluations of one protocol by name, and how it differs from the first protocol, empty for that one itself.

    Examples:
        >>> group = Comparable({"images": 100}, "", {"fsq": {"psnr": 27.5}, "vq": {"psnr": 27.0, "usage": 0.4}})
        >>> list(group.rows())
        [('psnr', 27.5, 27.0), ('usage', None, 0.4)]
    """

    protocol: Mapping[str, Any]
    differs: str
    results: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """(number, its value in each evaluation), None where one lacks it."""
        numbers = {name: dict(_numbers(result)) for name, result in self.results.items()}
        for key in dict.fromkeys(key for found in numbers.values() for key in found):
            yield (key, *(found.get(key) for found in numbers.values()))


def compare(paths: Sequence[Path]) -> list[Comparable]:
    """The evaluations of runs (folders with evaluation.json) or of JSON files, grouped by protocol.

    Raises ValueError for fewer than two, for two of one name, for a path without an evaluation, and for a file that is
    none.
    """
    if len(paths) < 2:
        raise ValueError(f"there is something to compare from two evaluations on, got {len(paths)}")
    groups: list[Comparable] = []
    for name, path in zip(_names(paths), paths, strict=True):
        result = _read(path)
        protocol = {key: value for key, value in flat(result["protocol"]) if key not in OWN}
        group = next((group for group in groups if group.protocol == protocol), None)
        if group is None:
            group = Comparable(protocol, differences(groups[0].protocol, protocol) if groups else "")
            groups.append(group)
        group.results[name] = result
    return groups


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many of them as tell the paths apart."""
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        twice = next(path for path in paths if resolved.count(path.resolve()) > 1)
        raise ValueError(f"{twice} is named twice")
    parts = [path.with_suffix("").parts if path.suffix == ".json" else path.parts for path in resolved]
    depth = next(n for n in range(1, 1 + max(map(len, parts))) if len({p[-n:] for p in parts}) == len(parts))
    return ["/".join(part[-depth:]) for part in parts]


def _read(path: Path) -> dict[str, Any]:
    file = path / "evaluation.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no evaluation in {path}; make one with: latticode evaluate {path}")
    content = read_json(file, {})
    if not isinstance(content.get("protocol"), Mapping):
        raise ValueError(f"{file} is not an evaluation: it states no protocol, so nobody knows what it compares with")
    return content


def _numbers(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Single numbers, those of mappings under dotted names; no lists, and not those of each class of a dense task."""
    for key, value in flat({k: v for k, v in result.items() if k not in ("protocol", "classes")}):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


__all__ = ["Comparable", "compare"]
