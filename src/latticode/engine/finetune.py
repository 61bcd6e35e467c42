"""Training that starts from another run, and of parts of a model only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latticode.core import registry
from latticode.core.mappings import differences
from latticode.core.pretrained import load_model
from latticode.engine.checkpoint import STATE, read_state
from latticode.engine.config import ConfigError, RunConfig


def start_from(
    run: Path, model: nn.Module, objective: nn.Module, players: Mapping[str, nn.Module], moved: Iterable[str]
) -> dict[str, bool]:
    """Give `model` the (averaged) weights of `run`, and every other player its own if the run trained the very same.

    The run, or folder of `save_pretrained`, must hold a model of the same spec, but for the numbers that ramps move:
    `moved` are their keys in the configuration. Returns for every other player whether it goes on from the run's; it
    starts afresh where the run had none or one of other shapes. Raises ConfigError naming the keys in which the specs
    differ.
    """
    try:
        source = load_model(run)
    except OSError as error:
        raise ConfigError(f"init_from: {error}") from None
    # not the spec in the file: it lacks arguments that came later, which the model that was built from it has
    free = {key.partition(".")[2] for key in moved}
    if differ := differences(registry.spec_of(source), registry.spec_of(model), free=free):
        raise ConfigError(f"init_from={run} holds another model: {differ}")
    model.load_state_dict(source.state_dict())
    saved = read_state(run)[0] if (run / STATE).is_file() else {}
    paths = {module: path for path, module in objective.named_modules()}
    return {name: _restore(module, saved, paths[module]) for name, module in players.items() if module is not model}


def trained_objective(run: Path, config: RunConfig) -> Any:
    """The objective of `run` in eval mode, with what it has trained of its own, e.g. a head or a discriminator."""
    objective = registry.build(config.objective)
    prefix = "module/objective/"
    saved = read_state(run)[0]
    objective.load_state_dict({k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)})
    return objective.eval()


def parts_from(parts: Mapping[str, str], model: nn.Module) -> None:
    """Give parts of `model` the (averaged) weights of parts of other runs or folders of `save_pretrained`.

    {"encoder": "RUN"} takes the part of the same name, {"encoder": "RUN:classifier.trunk"} another one. Raises
    ConfigError for a run or part that is not there and for weights that do not fit.
    """
    for name, source in parts.items():
        run, _, path = source.partition(":")
        try:
            theirs = load_model(Path(run)).get_submodule(path or name).state_dict()
            ours = model.get_submodule(name)
        except (OSError, AttributeError) as error:
            raise ConfigError(f"init_parts.{name}={source}: {error}") from None
        old, new = ({k: list(v.shape) for k, v in state.items()} for state in (theirs, ours.state_dict()))
        if differ := differences(old, new):
            raise ConfigError(f"init_parts.{name}={source} does not fit: {differ}")
        ours.load_state_dict(theirs)


def _restore(module: nn.Module, saved: Mapping[str, Tensor], path: str) -> bool:
    prefix = f"module/objective/{path}."
    state = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
    fits = {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in module.state_dict().items()}
    if fits:
        module.load_state_dict(state)
    return fits


class Parts:
    """The parts of `model` that are trained: those named by `prefixes`, e.g. `decoder`, or all if there are none.

    The others are frozen: their parameters take no gradient and their modules stay in eval mode, so that neither a
    codebook's running averages nor a norm's statistics move. Raises ConfigError for a name that is no part of the model
    or has nothing to train.

    Examples:
        >>> model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "decoder": nn.Linear(2, 2)})
        >>> Parts(model, ["decoder"]).train()
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['decoder.weight', 'decoder.bias']
        >>> model["encoder"].training, model["decoder"].training
        (False, True)
    """

    def __init__(self, model: nn.Module, prefixes: Sequence[str]):
        self.model, self.prefixes = model, prefixes
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        for prefix in prefixes:
            if not any(_inside(name, prefix) for name in names):
                valid = dict.fromkeys(name.partition(".")[0] for name in names)
                raise ConfigError(f"train_only: no parameters under {prefix!r}{registry.nearest(prefix, valid)}")
        if prefixes:
            for name, parameter in model.named_parameters():
                if not any(_inside(name, prefix) for prefix in prefixes):
                    parameter.requires_grad_(False)

    def train(self) -> None:
        """Training mode for the trained parts and whatever holds them."""
        self.model.train()
        for name, module in self.model.named_modules():
            if self.prefixes and name and not any(_inside(name, p) or _inside(p, name) for p in self.prefixes):
                module.training = False


def _inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
