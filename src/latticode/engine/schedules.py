"""Schedules of loss weights and of a model's numbers: a ramp may stand where a recipe has either of them.

So a KL weight warms up or a temperature is annealed. A ramp is a pure function of the step, so a resumed run needs no
memory of it. The learning rate's own schedule is in `latticode.engine.loop.learning_rate`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import nn

from latticode.core import registry
from latticode.core.registry import Spec, SpecError


class Ramp(BaseModel):
    """`{from: a, to: b, steps: n, shape: linear}`: a at step 0, b at step n and from then on; or along half a cosine.

    Without `steps` it takes the whole run.

    Examples:
        >>> ramp = Ramp.model_validate({"from": 0.0, "to": 1.0, "steps": 10})
        >>> [ramp.at(step, steps=100) for step in (0, 5, 10, 50)]
        [0.0, 0.5, 1.0, 1.0]
    """

    model_config = ConfigDict(extra="forbid")

    start: float = Field(alias="from", allow_inf_nan=False)
    end: float = Field(alias="to", allow_inf_nan=False)
    steps: PositiveInt | None = None
    shape: Literal["linear", "cosine"] = "linear"

    def at(self, step: int, steps: int) -> float:
        """The value of `step` in a run of `steps`."""
        done = min(1.0, step / (self.steps or steps))
        share = done if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * done))
        return (1 - share) * self.start + share * self.end  # exact at both ends


RAMP_KEYS = [field.alias or name for name, field in Ramp.model_fields.items()]


def is_ramp(value: Any) -> bool:
    """Whether `value` is meant as a ramp, right or wrong."""
    return isinstance(value, Mapping) and "type" not in value and any(key in value for key in RAMP_KEYS)


def ramps_in(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """The ramps in the spec `value` with their dotted keys, e.g. `tokenizer.quantizer.temperature`.

    Raises SpecError for one in place of anything but an argument that is a floating-point number.
    """
    if isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from ramps_in(inner, f"{key}.{index}")
    elif is_ramp(value):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if is_ramp(inner) and "type" in value and name not in (valid := _numbers(value)):
                raise SpecError(f"{key}.{name} cannot be a ramp{registry.nearest(name, valid)}")
            yield from ramps_in(inner, f"{key}.{name}")


def _numbers(spec: Mapping[str, Any]) -> list[str]:
    parameters = registry.parameters_of(registry.resolve(spec["type"]))
    return [name for name, p in parameters.items() if str(p.annotation) in ("float", "float | None")]


def at_end(value: Any, end: str) -> Any:
    """`value` with the number at the `end` ("from" or "to") of every ramp in the ramp's place."""
    if isinstance(value, list | tuple):
        return [at_end(inner, end) for inner in value]
    if is_ramp(value):
        return float(value[end])
    return {key: at_end(inner, end) for key, inner in value.items()} if isinstance(value, Mapping) else value


def check_movable(spec: Spec, keys: list[str]) -> None:
    """Raise SpecError if the ramps under `keys` in a model's spec move what is settled when the model is built.

    That is so if the model built at the ramps' start and then moved to their end is not the one that is built there.
    Raises what the constructor raises for a number at either end.
    """
    models: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        for end in ("from", "to"):
            torch.manual_seed(0)
            models.append(registry.build(at_end(spec, end)))
    moved, built = models
    for key in keys:
        place, name = owner(moved, key)
        setattr(place, name, getattr(*owner(built, key)))
    if not _same(moved, built):
        raise SpecError(f"{', '.join(keys)} cannot be a ramp: it settles how a model is built, and is not read later")


def _same(a: nn.Module, b: nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return (
        [_plain(module) for module in a.modules()] == [_plain(module) for module in b.modules()]
        and one.keys() == two.keys()
        and all(torch.equal(one[key], two[key]) for key in one)
    )


def _plain(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str)}


def owner(model: nn.Module, key: str) -> tuple[Any, str]:
    """The module in `model`, and its attribute, that a `key` of a configuration names: `tokenizer.quantizer.scale`."""
    *path, name = key.split(".")[1:]
    place: Any = model
    for part in path:
        place = place[int(part)] if part.isdigit() else getattr(place, part)
    return place, name


class Schedules:
    """Sets what the ramps of a run move: `weights`, which is the same dict always, and numbers of `model`.

    Args:
        ramps: by their keys in the configuration.
        weights: numbers and ramps.
        model: its class keeps its arguments as attributes, as all of the registry do.
        steps: of the run.

    Examples:
        >>> ramp = {"from": 0.0, "to": 1.0}
        >>> ramps = {"weights.kl": Ramp.model_validate(ramp)}
        >>> schedules = Schedules(ramps, weights={"mse": 1.0, "kl": ramp}, model=nn.Identity(), steps=100)
        >>> values = schedules.set(step=25)
        >>> schedules.weights
        {'mse': 1.0, 'kl': 0.25}
    """

    def __init__(self, ramps: Mapping[str, Ramp], weights: Mapping[str, Any], model: nn.Module, steps: int):
        self.ramps, self.steps = ramps, steps
        self.weights: dict[str, float] = at_end(weights, "from")
        self.places = {key: owner(model, key) for key in ramps if not key.startswith("weights.")}

    def set(self, step: int) -> dict[str, float]:
        """Set everything to its value at `step`; returns the values by key."""
        values = {key: ramp.at(step, self.steps) for key, ramp in self.ramps.items()}
        for key, value in values.items():
            if key in self.places:
                setattr(*self.places[key], value)
            else:
                self.weights[key.partition(".")[2]] = value
        return values
