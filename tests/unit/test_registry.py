"""The table: everything in it resolves, and a spec says all that a module is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import latticode
from latticode import FSQ
from latticode.core import plugins, registry
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


class Mine(nn.Module):
    """A module as a user writes it."""

    in_channels = latent = stride = out_channels = 1

    def __init__(self, width: int = 3, kind: object = "a"):
        super().__init__()
        self.width, self.kind = width, kind


def test_an_unregistered_class_is_told_what_to_do(tmp_path) -> None:
    tokenizer = latticode.Tokenizer(Mine(), FSQ([4, 3]), Mine())
    with pytest.raises(
        SpecError,
        match=r"Mine is not in the table, so no file can name it. Call latticode.register\('mine', Mine\) before it is "
        r"saved and again wherever it is loaded",
    ):
        tokenizer.save_pretrained(tmp_path)
    assert [registry.snake(type(name, (), {})) for name in ("MyEncoder", "STFTLoss", "VQ", "MyVQ2D")] == [
        "my_encoder",
        "stft_loss",
        "vq",
        "my_vq2_d",
    ]


@pytest.mark.usefixtures("unregistered")
def test_a_registered_class_is_saved_and_loaded(tmp_path) -> None:
    latticode.register("mine", Mine)
    latticode.register("mine", Mine)
    model = latticode.Tokenizer(Mine(5), FSQ([4, 3]), Mine())
    assert latticode.load(model.save_pretrained(tmp_path)).encoder.width == 5
    again = type("Mine", (Mine,), {"__module__": Mine.__module__, "__qualname__": Mine.__qualname__})
    latticode.register("mine", again)  # a cell of a notebook is run again
    assert type(build({"type": "mine"})) is again


@pytest.mark.usefixtures("unregistered")
@pytest.mark.parametrize(
    ("name", "thing", "kind", "message"),
    [
        ("fsq", Mine, "module", "the module 'fsq' is there already .latticode.quantizers.fsq:FSQ.; choose another"),
        ("mine", Mine(), "module", "a module is a class of torch.nn.Module .*; got Mine"),
        ("mine", "os:system", "module", "a module is a class of torch.nn.Module .*; got 'os:system' for 'mine'"),
        ("my mine", Mine, "module", "a name has letters, digits, '_', '-' and '.' only, got 'my mine'"),
        ("mine", Mine, "quantizer", "no kind 'quantizer' to register 'mine' as; kinds: module, loss, metric"),
        ("mse", lambda a, b: a, "loss", "the loss 'mse' is there already"),
        ("hub", lambda *a: a, "source", "the source 'hub' is there already"),
        ("train", lambda: None, "verb", "the verb 'train' is there already"),
        ("fsq-cifar10", "mine.yaml", "recipe", "the recipe 'fsq-cifar10' is there already"),
        ("vq-ema", lambda size: size, "study", "the study 'vq-ema' is there already"),
    ],
)
def test_what_cannot_be_registered(name, thing, kind, message) -> None:
    import latticode.cli.main
    import latticode.study

    with pytest.raises(ValueError, match=message):
        latticode.register(name, thing, kind)


@pytest.mark.usefixtures("unregistered")
def test_a_name_that_came_before_its_table_does_not_replace_ours(monkeypatch) -> None:
    monkeypatch.setattr(plugins, "_tables", {})
    latticode.register("mse", min, "loss")
    latticode.register("new", max, "loss")
    with pytest.warns(plugins.PluginWarning, match="left out: the loss 'mse' is there already"):
        table = plugins.Table("loss", {"mse": sum})
    assert table["mse"] is sum
    assert table["new"] is max
    assert list(table) == ["mse", "new"]


@pytest.mark.usefixtures("unregistered")
def test_arguments_that_no_spec_can_hold_are_named() -> None:
    latticode.register("mine", Mine)
    with pytest.raises(SpecError, match=r"Mine.kind is a dtype; a spec holds numbers, strings, booleans, None, lists"):
        spec_of(Mine(kind=torch.float32))
    lost = Mine()
    del lost.width
    with pytest.raises(SpecError, match="Mine takes 'width' and keeps no attribute of this name"):
        spec_of(lost)


def test_the_essence_of_a_spec_does_not_change_with_options_that_nobody_uses() -> None:
    whole = spec_of(build({"type": "fsq", "levels": [8, 5], "bound": "symmetric"}))
    assert whole.keys() > {"type", "levels", "bound"}
    assert registry.essence(whole) == {"type": "fsq", "levels": [8, 5], "bound": "symmetric"}
    grouped = spec_of(build({"type": "grouped", "quantizers": [whole, {**whole, "noise": 0.5}]}))
    essence = registry.essence(grouped)
    assert essence["quantizers"] == [registry.essence(whole), {**registry.essence(whole), "noise": 0.5}]
    assert spec_of(build(essence)) == grouped
