"""The table: everything in it resolves, and a spec says all that a module is."""

from __future__ import annotations

import pytest
from torch import nn

from latticode import FSQ
from latticode.core import registry
from latticode.core.registry import SpecError, build, check, spec_of


@pytest.mark.parametrize("name", registry.TABLE)
def test_every_entry_resolves_to_a_module(name: str) -> None:
    cls = registry.resolve(name)
    assert issubclass(cls, nn.Module)
    assert cls.__doc__


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"levels": [8]}, "spec needs a 'type'"),
        ({"type": "fsqq", "levels": [8]}, "unknown type 'fsqq'; nearest: fsq"),
        (
            {"type": "fsq", "level": [8]},
            "unknown key 'level' for type 'fsq'; nearest: levels; valid: bound, factors, feedback, gradient,",
        ),
        ({"type": "fsq"}, "type 'fsq' lacks levels"),
        ({"type": "os:system"}, "unknown type 'os:system'"),
        ({"type": "tokenizer", "encoder": {"type": "x"}, "decoder": {}, "quantizer": {}}, "encoder: unknown type 'x'"),
    ],
)
def test_bad_specs_are_refused(spec: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check(spec)
    with pytest.raises(SpecError):
        build(spec)


def test_a_class_outside_the_table_has_no_spec() -> None:
    with pytest.raises(SpecError, match="Linear is not in the table"):
        spec_of(nn.Linear(1, 1))


def test_a_class_of_the_users_own_joins_the_table(monkeypatch) -> None:
    class Mine(FSQ):
        pass

    monkeypatch.setitem(registry.TABLE, "mine", Mine)
    built = build({"type": "mine", "levels": [4, 4]})
    assert isinstance(built, Mine)
    assert spec_of(built) == {**spec_of(FSQ([4, 4])), "type": "mine"}


def test_the_essence_of_a_spec_does_not_change_with_options_that_nobody_uses() -> None:
    whole = spec_of(build({"type": "fsq", "levels": [8, 5], "bound": "symmetric"}))
    assert whole.keys() > {"type", "levels", "bound"}
    assert registry.essence(whole) == {"type": "fsq", "levels": [8, 5], "bound": "symmetric"}
    grouped = spec_of(build({"type": "grouped", "quantizers": [whole, {**whole, "noise": 0.5}]}))
    essence = registry.essence(grouped)
    assert essence["quantizers"] == [registry.essence(whole), {**registry.essence(whole), "noise": 0.5}]
    assert spec_of(build(essence)) == grouped
