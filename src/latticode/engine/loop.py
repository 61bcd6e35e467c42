"""The one training loop: turns of players, one step counter, everything random a pure function of (seed, step).

Accelerate gives devices, process groups and mixed precision. Gradients are averaged over ranks by one packed
all-reduce per turn instead of wrapping modules in DistributedDataParallel: a turn may call any method of any module,
and every rank takes the same turns, so nothing can hang on an unused parameter.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn

from latticode.core import distributed, registry
from latticode.core.files import write_text
from latticode.core.modules import keeping_modes
from latticode.core.pretrained import save_model
from latticode.core.progress import progress, tell_skipped
from latticode.core.registry import nearest
from latticode.engine.checkpoint import cut_lines, load_state, save_state, saved_step
from latticode.engine.config import (
    ConfigError,
    OptimizerConfig,
    RunConfig,
    check_resumed,
    complete,
    to_yaml,
    with_digits,
)
from latticode.engine.feed import learn_vocabulary, open_feed
from latticode.engine.finetune import Parts, parts_from, start_from
from latticode.engine.given import GIVEN
from latticode.engine.monitor import Monitor
from latticode.engine.objectives import Objective
from latticode.engine.schedules import Schedules, check_movable
from latticode.engine.tally import Tally, TrainingError, TrainingStoppedError
from latticode.quantizers import accumulating

if TYPE_CHECKING:
    from accelerate import Accelerator


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of `step`: linear warm-up, then constant or a cosine down to `final` times the peak."""
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    if config.schedule == "constant":
        return config.lr * warm
    done = max(0.0, (step - config.warmup) / max(steps - config.warmup, 1))
    return config.lr * warm * (config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def weigh(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The weighted sum. Raises ConfigError for a term without a weight."""
    unweighted = sorted(terms.keys() - weights.keys())
    if unweighted:
        raise ConfigError(f"no weight for the loss terms {', '.join(unweighted)}; weights: {dict(weights)}")
    return torch.stack([weights[name] * value for name, value in terms.items()]).sum()


def settings_of(config: RunConfig, players: Iterable[str]) -> dict[str, OptimizerConfig]:
    """Every player's optimizer. Raises ConfigError for settings of one that does not play."""
    for name in config.optimizers:
        if name not in players:
            raise ConfigError(f"optimizers: no player {name!r}{nearest(name, players)}")
    return {name: config.optimizers.get(name, config.optimizer) for name in players}


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of everything random in a step; rank 0 draws the same however many ranks there are."""
    return ((seed * 4096 + rank) * 2**32 + step) % 2**63


class Average:
    """Exponential moving average of a model's parameters; its buffers are taken as they are.

    The decay ramps up as (1 + t) / (10 + t), so that the first steps are forgotten.

    Examples:
        >>> model = nn.Linear(1, 1, bias=False).requires_grad_(False)
        >>> average = Average(model.apply(lambda part: nn.init.zeros_(part.weight)), decay=0.999)
        >>> _ = model.weight.fill_(1.0)
        >>> average.update(step=0)  # the decay is still 0.1
        >>> with average.applied():
        ...     print(round(float(model.weight), 4))
        0.9
        >>> float(model.weight)
        1.0
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.tensors = {k: p.detach().clone() for k, p in model.named_parameters()} if decay else {}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights after step `step`; its decay grows from 0.1 to the full one."""
        if self.decay:
            decay = min(self.decay, (1 + step) / (10 + step))
            for ours, theirs in zip(self.tensors.values(), self.model.parameters(), strict=True):
                ours.lerp_(theirs, 1 - decay)

    def weights(self) -> dict[str, Tensor]:
        """The model's state with averaged parameters."""
        return self.model.state_dict() | self.tensors

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with averaged weights and in eval mode, for the time of the block."""
        raw = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.weights())
        with keeping_modes(self.model):
            self.model.eval()
            try:
                yield
            finally:
                self.model.load_state_dict(raw)


class Interrupt:
    """Turns Ctrl-C and SIGTERM into a flag, so that a step is finished and saved before the run ends.

    `raised` is what all ranks agreed on last; a signal that comes later is kept for the next time.

    Examples:
        >>> with Interrupt(torch.device("cpu")) as interrupt:
        ...     signal.raise_signal(signal.SIGINT)  # Ctrl-C
        ...     print("the step goes on, then:", interrupt.on_any_rank())
        the step goes on, then: True
    """

    def __init__(self, device: torch.device):
        self.device = device

    def __enter__(self) -> Interrupt:
        self.raised = self._told = False
        self._previous: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._set)
            except ValueError:  # not in the main thread, where signals never arrive
                break
        return self

    def _set(self, *_: Any) -> None:
        self._told = True

    def on_any_rank(self) -> bool:
        """Whether any rank was told to stop: ranks that left at different steps would wait for each other for ever."""
        told = self._told
        if distributed.is_distributed():
            told = bool(distributed.all_sum([torch.tensor(float(told), device=self.device)])[0])
        self.raised = told
        return told

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def train(
    config: RunConfig,
    folder: Path,
    *,
    data: Any = None,
    held_out: Any = None,
    resume: bool = False,
    console: Console | None = None,
) -> Path:
    """Train what `config` describes and return `folder`, which then holds the run.

    Args:
        config: of `load_config`.
        folder: of the run; must not hold one yet, unless `resume`.
        data: a torch Dataset or DataLoader to train on (`latticode.engine.given` says what it may yield), where
            `config.data.source` is "given:NAME", NAME for people to read; None: the examples are those of the source.
        held_out: likewise, what to look at while training; None: nothing of `data` is looked at.
        resume: go on where the last checkpoint of an interrupted run was. It ends with the very weights that it would
            have had, provided that `data` are the same.
        console: for the progress bar; default is standard error.

    Raises ConfigError for what cannot be run, TrainingError for a loss that is not finite, its subclass
    TrainingStoppedError if it was interrupted.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if (data is not None) != config.data.source.startswith(GIVEN):
        got = "none" if data is None else type(data).__name__
        raise ConfigError(f"data.source={GIVEN}NAME goes with train(data=...), got {config.data.source!r} and {got}")
    console = console or Console(stderr=True)
    if saved_step(folder) and not resume:  # a run that failed in its very first step is no run
        raise ConfigError(f"{folder} already holds a run; resume it with --resume or choose another folder")
    AcceleratorState._reset_state()  # it would hold the first run of a process to its precision for all others
    accelerator = Accelerator(mixed_precision=config.precision, gradient_accumulation_steps=1)
    main = accelerator.is_main_process
    given = None if data is None else (data, held_out)
    feed = open_feed(config, folder, accelerator.device, console if main else Console(quiet=True), given)
    config = complete(config, classes=len(feed.classes), vocab=feed.vocab, grid=feed.grid)
    ramps = config.ramps
    if moved := [key for key in ramps if not key.startswith("weights.")]:
        check_movable(config.spec, moved)

    torch.manual_seed(config.seed)
    model = registry.build(with_digits(config.model, feed.radix)).to(accelerator.device)
    objective: Objective = registry.build(config.objective).to(accelerator.device)
    schedules = Schedules(ramps, config.weights, model, config.steps)
    objective.weights = schedules.weights
    parts = Parts(model, config.train_only)
    players = objective.players(model)
    if not saved_step(folder):
        parts_from(config.init_parts, model)
    if config.init_from and not saved_step(folder):
        for name, restored in start_from(Path(config.init_from), model, objective, players, moved).items():
            if main:
                told = "goes on from" if restored else "starts afresh, not from"
                console.print(f"{name}: {told} {config.init_from}", markup=False, soft_wrap=True)
    if not saved_step(folder):
        learn_vocabulary(model, feed)
    for tensor in [*model.parameters(), *model.buffers(), *objective.parameters(), *objective.buffers()]:
        distributed.broadcast(tensor.data)
    settings = settings_of(config, players)
    optimizers = {
        name: accelerator.prepare(
            torch.optim.AdamW(
                (p for p in player.parameters() if p.requires_grad),
                lr=settings[name].lr,
                betas=settings[name].betas,
                weight_decay=settings[name].weight_decay,
                fused=True,
            )
        )
        for name, player in players.items()
    }
    average = Average(model, config.ema)
    modules = {"model": model, "objective": objective}
    start, seconds = 0, 0.0
    if saved_step(folder):
        check_resumed(config, folder)
        metadata = load_state(folder, modules, optimizers, average.tensors)
        start, seconds = metadata["step"], metadata["seconds"]
    if main:
        write_text(folder / "config.yaml", to_yaml(config))
        cut_lines(folder / "metrics.jsonl", start)
    monitor = Monitor(config, folder, feed, start) if main else None
    began = time.monotonic()

    def save(step: int) -> None:
        if main:
            metadata = {"step": step, "seconds": seconds + time.monotonic() - began}
            save_state(folder, modules, optimizers, average.tensors, metadata)
            save_model(model, folder, average.weights())

    def look(step: int) -> None:
        assert monitor is not None
        with average.applied():
            monitor.watch(step, model, objective)

    parts.train()
    objective.train()
    batches = feed.batches(start * config.accumulate)
    images = config.batch_size * config.accumulate * distributed.world_size()
    tally = Tally()
    with (
        Interrupt(accelerator.device) as interrupt,
        progress(
            console if main else Console(quiet=True), f"train {config.kind}", config.steps, scale=images, start=start
        ) as advance,
    ):
        if start == 0:
            save(0)
            if monitor and config.init_from:
                look(0)
        for step in range(start, config.steps):
            torch.manual_seed(step_seed(config.seed, step, distributed.rank()))
            rates, done = {n: learning_rate(s, step, config.steps) for n, s in settings.items()}, step + 1
            moving = schedules.set(step)
            with accumulating(model):
                for micro in range(config.accumulate):
                    last = micro == config.accumulate - 1
                    batch = next(batches).to(accelerator.device)
                    seen: set[str] = set()
                    with accelerator.autocast():
                        for player, terms in objective.turns(model, batch, step):
                            parameters = [p for p in players[player].parameters() if p.requires_grad]
                            loss = weigh(terms, schedules.weights) / config.accumulate
                            if loss.requires_grad:
                                accelerator.backward(loss, inputs=parameters)
                                if last:
                                    clip = settings[player].clip
                                    _step(accelerator, optimizers[player], parameters, rates[player], clip)
                            seen |= terms.keys()
                            tally.add(terms, done, 1 / config.accumulate)
                    tally.add(objective.notes, done, 1 / config.accumulate)
                    if unused := sorted(config.weights.keys() - seen):
                        raise ConfigError(
                            f"weights {', '.join(unused)} name no loss term; terms: {', '.join(sorted(seen))}"
                        )
            average.update(step)
            tally.steps += 1
            final = interrupt.on_any_rank() or done == config.steps
            if final or done % config.log_every == 0 or done % config.save_every == 0:
                means = tally.means()
                advance(done, **means)
                if done % config.log_every == 0 or done == config.steps:
                    tally.clear()
                    if monitor:
                        elapsed = seconds + time.monotonic() - began
                        train_means = {f"train/{k}": v for k, v in means.items()}
                        speed = (done - start) * images / (time.monotonic() - began)
                        rate = next(iter(rates.values()))  # the trained model's
                        pace = {"seconds": elapsed, "images_per_second": speed}
                        monitor.log(done, {**train_means, "lr": rate, **moving, **pace})
            else:
                advance(done)
            if monitor and (done in (config.steps, objective.discriminator_from) or done % config.picture_every == 0):
                look(done)
            if final or done % config.save_every == 0:
                save(done)
            if interrupt.raised and done < config.steps:
                accelerator.wait_for_everyone()  # a rank that left early would have its launcher end the one that saves
                raise TrainingStoppedError(f"interrupted at step {done} of {config.steps}, saved; go on with --resume")
    if monitor:
        tell_skipped(console, feed.skipped)
        facts: dict[str, Any] = {
            "skipped": len(feed.skipped),
            "device": str(accelerator.device),
            "processes": distributed.world_size(),
            "torch": torch.__version__,
            **objective.facts,
        }
        monitor.close(model, seconds + time.monotonic() - began, facts)
    accelerator.wait_for_everyone()
    return folder


def _step(accelerator: Accelerator, optimizer: Any, parameters: Sequence[Tensor], rate: float, clip: float) -> None:
    """Average the gradients over ranks, clip, set the rate, step, forget the gradients."""
    if distributed.is_distributed():
        # A parameter without a gradient on one rank may have one on another: every rank sends all of them.
        gradients = distributed.all_sum([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient / distributed.world_size()
    if clip:
        accelerator.unscale_gradients(optimizer)
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()


__all__ = ["TrainingError", "TrainingStoppedError", "learning_rate", "train"]
