"""The plan of a study: quantizers and sizes, the jobs they make, and the number of steps that a budget pays for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from latticode.core.files import read_json, write_json
from latticode.core.mappings import differences
from latticode.core.plugins import Table
from latticode.core.registry import build, nearest
from latticode.data import IMAGE
from latticode.engine.config import (
    ConfigError,
    RunConfig,
    complete,
    load_config,
    override,
    read_recipe,
    validate,
    with_digits,
)
from latticode.engine.feed import open_loader
from latticode.quantizers.levels import recommend
from latticode.runs.open import network_of

RECIPES = {"tokenizer": "study", "prior": "study-prior"}
PRIOR_SHARE = 0.5  # of the budget
OWN = (  # keys that the study sets
    *("tokenizer.quantizer", "tokenizer.feedback", "steps", "seed", "data.source"),
    *("prior.tokenizer", "prior.steps", "prior.seed", "prior.data.source"),
)
LARGEST = 2**24
PLAN, LISTS = "study.json", ("sizes", "quantizers", "overrides")  # and what of it must be lists

Spec = dict[str, Any]


class Choice(NamedTuple):
    """What a study changes from one quantizer to the next.

    Examples:
        >>> choice("fsq", 1000)
        Choice(spec={'type': 'fsq', 'levels': [8, 5, 5, 5], 'bound': 'paper'}, weights={}, feedback=False)
    """

    spec: Spec
    weights: dict[str, float]  # of its losses
    feedback: bool = False  # of the tokenizer


def _fsq(size: int, bound: str = "paper") -> Choice:
    found = recommend(size=size, bound=bound)
    return Choice({"type": "fsq", "levels": list(found.levels), "bound": found.bound}, {})


def _fed_fsq(size: int) -> Choice:
    spec = _fsq(size, "clamp").spec
    return Choice({**spec, "feedback": True}, {}, feedback=True)


def _even_fsq(level: int, size: int) -> Choice:
    """Channels of `level` levels each, as many as come nearest to `size`; of two levels, one bound leaves one empty."""
    channels = max(1, round(math.log(size) / math.log(level)))
    return Choice({"type": "fsq", "levels": [level] * channels, "bound": "symmetric" if level == 2 else "paper"}, {})


def _vq(size: int) -> Choice:
    """The VQ of the FSQ paper, MaskGIT's: learned by gradients, with the entropy losses, without restarts."""
    spec = {"type": "vq", "size": size, "dim": 8, "update": "gradient", "entropy": 0.01}
    weights = {"codebook": 1.0, "commitment": 0.06, **_entropies(0.004)}
    return Choice({**spec, "kmeans": False, "restart": 0.0}, weights)


def _vq_ema(size: int) -> Choice:
    return Choice({"type": "vq", "size": size, "dim": 8, "update": "ema"}, {"commitment": 0.06})


def _simvq(size: int) -> Choice:
    return Choice({"type": "simvq", "size": size, "dim": 32}, {"codebook": 1.0, "commitment": 0.25})


def _lfq(size: int) -> Choice:
    return Choice({"type": "lfq", "dim": _whole_bits("lfq", size)}, {"commitment": 0.06, **_entropies(0.004)})


def _bsq(size: int) -> Choice:
    return Choice({"type": "bsq", "dim": _whole_bits("bsq", size)}, {"commitment": 0.0, **_entropies(0.02)})


def _entropies(weight: float) -> dict[str, float]:
    return {"sample_entropy": weight, "diversity": weight}


def _whole_bits(name: str, size: int) -> int:
    if size.bit_count() != 1:
        raise ValueError(f"{name} has one bit a channel, so its size must be a power of two, got {size}")
    return size.bit_length() - 1


# name -> size -> choice; the weights are beside a squared error of weight 1 on pixels in [-1, 1] and within 0.1 dB of
# the best of those tried on CIFAR-10 at 256 codes (docs/log.md)
STUDIED: dict[str, Callable[[int], Choice]] = {
    "fsq": _fsq,
    "fsq-clamp": partial(_fsq, bound="clamp"),
    "fsq-feedback": _fed_fsq,
    **{f"fsq-{level}": partial(_even_fsq, level) for level in range(2, 17)},
    "vq": _vq,
    "vq-ema": _vq_ema,
    "simvq": _simvq,
    "lfq": _lfq,
    "bsq": _bsq,
}
QUANTIZERS: Table[Callable[[int], Choice | tuple[Spec, dict[str, float]]]] = Table("study", STUDIED)


def choice(name: str, size: int) -> Choice:
    """Of a quantizer without changes; one that another package registers gives (spec, weights)."""
    made = QUANTIZERS[name](size)
    return made if isinstance(made, Choice) else Choice(*made)


def variant(name: str, size: int) -> Choice:
    """A quantizer, or one with changes: "vq-ema+gradient=rotation+weights.commitment=0.1+tokenizer.feedback=true".

    Raises ValueError for an unknown quantizer, a change that is none, and what its constructor refuses.
    """
    base, *changes = name.split("+")
    if base not in QUANTIZERS:
        raise ValueError(f"no quantizer {base!r} to study{nearest(base, QUANTIZERS)}")
    spec, weights, feedback = choice(base, size)
    changed = override({**spec, "weights": weights, "tokenizer": {"feedback": feedback}}, changes)
    weights, tokenizer = changed.pop("weights"), changed.pop("tokenizer")
    feedback = tokenizer.pop("feedback")
    if tokenizer or not isinstance(feedback, bool):
        raise ValueError(f"of the tokenizer a quantizer may change feedback=true|false, got {name}")
    if changes:
        build(changed)
    return Choice(changed, weights, feedback)


class Job(NamedTuple):
    """One training of a study.

    Examples:
        >>> Job("fsq", 256, seed=0).name
        'fsq-256-0'
    """

    quantizer: str
    size: int  # that was asked for; FSQ's levels come near it
    seed: int

    @property
    def name(self) -> str:
        """The name of the job's run folder."""
        return f"{self.quantizer}-{self.size}-{self.seed}"


@dataclass(frozen=True)
class Cost:
    """Seconds of one job on this machine.

    Examples:
        >>> between({"16": (10.0, 0.25), "256": (20.0, 0.5)}, size=136)  # half way between two that were measured
        Cost(fixed=15.0, step=0.375)
        >>> steps_for(100.0, [Cost(fixed=10.0, step=0.5), Cost(fixed=10.0, step=0.5)])
        80
    """

    fixed: float  # to begin, to evaluate, to encode a prior's images
    step: float


@dataclass(frozen=True)
class Plan:
    """What OUT/study.json holds. `costs` are measured at two sizes of each quantizer, and of its prior, if at all.

    Examples:
        >>> plan = Plan("embedded:photos", sizes=(16, 64), quantizers=("fsq", "vq"), seeds=1, steps=100)
        >>> [job.name for job in plan.jobs]
        ['fsq-16-0', 'vq-16-0', 'fsq-64-0', 'vq-64-0']
        >>> plan.tokenizer_config(plan.jobs[0]).steps
        100
    """

    source: str
    sizes: tuple[int, ...]
    quantizers: tuple[str, ...]
    seeds: int
    prior: bool = False
    features: str | None = None  # classifier run of the FIDs
    samples: int = 1000  # drawn from each prior
    limit: int | None = None  # held-out images at most that a job is evaluated on
    recipe: str = RECIPES["tokenizer"]
    overrides: tuple[str, ...] = ()
    budget: float | None = None  # seconds
    steps: int = 0  # 0: not known yet
    prior_steps: int = 0
    costs: Mapping[str, Mapping[str, Mapping[str, tuple[float, float]]]] | None = None  # kind, quantizer, size

    def __post_init__(self) -> None:
        for name in self.quantizers:
            for size in self.sizes:
                variant(name, size)
        if self.seeds < 1:
            raise ValueError(f"seeds must be >= 1, got {self.seeds}")
        for text in self.overrides:
            key = text.partition("=")[0]
            if any(key == own or key.startswith(f"{own}.") for own in OWN):
                raise ValueError(f"the study itself sets {key}, so it cannot be overridden; it sets {', '.join(OWN)}")

    @property
    def jobs(self) -> list[Job]:
        """Seed by seed and size by size, so that what is done early is already a picture of the whole."""
        seeds, sizes = range(self.seeds), self.sizes
        return [Job(name, size, seed) for seed in seeds for size in sizes for name in self.quantizers]

    def tokenizer_config(self, job: Job) -> RunConfig:
        """The run of a job's tokenizer. An override of a weight that a quantizer has no loss for is for the others."""
        spec, weights, feedback = variant(job.quantizer, job.size)
        recipe = read_recipe(self.recipe)
        content = override(recipe, [text for text in self.overrides if not text.startswith("prior.")])
        foreign = {key for name in QUANTIZERS for key in choice(name, 16).weights} - weights.keys()
        own = {key: value for key, value in content["weights"].items() if key not in foreign}
        if not isinstance(content.get("tokenizer"), dict):
            raise ConfigError(f"recipe {self.recipe!r} trains no tokenizer, so there is nothing to give quantizers to")
        content["tokenizer"] |= {"quantizer": spec, **({"feedback": True} if feedback else {})}
        content["data"]["source"] = self.source
        content |= {"weights": weights | own, "seed": job.seed, "steps": max(self.steps, 1)}
        return _warmed(validate(content))

    def prior_config(self, job: Job, tokenizer: Path) -> RunConfig:
        """The run of a prior over the tokens of `tokenizer`, a run."""
        own = [_of_run(text) for text in self.overrides if text.startswith("prior.")]
        more = [f"tokenizer={json.dumps(str(tokenizer))}", f"seed={job.seed}", f"steps={max(self.prior_steps, 1)}"]
        return _warmed(load_config(RECIPES["prior"], [*own, *more], self.tokenizer_config(job)))

    def check(self) -> None:
        """Raise ConfigError or ValueError, before anything trains, for what tokenizers, priors or the network of the
        FIDs would refuse, and for data without an example."""
        first = self.tokenizer_config(self.jobs[0])
        data = first.data
        next(open_loader(first, data.split, batch_size=first.batch_size).batches())
        next(open_loader(first, "test", batch_size=1).epoch(), None)
        preprocess = data.preprocess()
        if self.features is not None and preprocess.medium is IMAGE:
            try:
                network_of(self.features, "cpu")(torch.zeros(1, *(preprocess.shape or (preprocess.channels, 64, 64))))
            except ValueError as error:
                raise ValueError(f"{self.features} cannot judge the images of this study: {error}") from None
        for job in (Job(name, size, 0) for name in self.quantizers for size in {self.sizes[0], self.sizes[-1]}):
            tokenizer = complete(self.tokenizer_config(job), classes=0)
            if self.prior:
                with torch.device("meta"):
                    quantizer = build(tokenizer.model["quantizer"])
                    run = self.prior_config(job, Path("tokenizer"))
                    prior = complete(run, classes=0, vocab=quantizer.vocab, grid=[4, 4])
                    build(with_digits(prior.model, quantizer.radix))

    def estimate(self, job: Job) -> float:
        """Seconds of a job as far as they are known; else 1 for every job."""
        if self.costs is None:
            return 1.0
        steps = {"tokenizer": self.steps, "prior": self.prior_steps}
        costs = {kind: between(measured[job.quantizer], job.size) for kind, measured in self.costs.items()}
        return sum(cost.fixed + cost.step * steps[kind] for kind, cost in costs.items())

    def write(self, folder: Path) -> None:
        """Write the plan as `folder`/study.json."""
        write_json(folder / PLAN, asdict(self))


def _of_run(text: str) -> str:
    """An override of the priors as their run has it: `prior.batch_size=32` is the run's own, `prior.width=96` its
    prior's."""
    rest = text.removeprefix("prior.")
    return rest if re.split(r"[.=]", rest, maxsplit=1)[0] in RunConfig.model_fields else text


def _warmed(config: RunConfig) -> RunConfig:
    """Warm-up takes a tenth of a short run at the most."""
    warmup = min(config.optimizer.warmup, config.steps // 10)
    return config.model_copy(update={"optimizer": config.optimizer.model_copy(update={"warmup": warmup})})


def read_plan(folder: Path) -> Plan | None:
    """The plan of the study in `folder`, if there is one. Raises ValueError for a file that is none."""
    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        content = read_json(path, dict.fromkeys(LISTS, list))
        lists = {key: tuple(content[key]) for key in LISTS}
        return Plan(**{**content, **lists})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is not the plan of a study: {error}") from None


def check_same(old: Plan, new: Plan) -> None:
    """Raise ValueError if `new` asks for another study than `old`; what `new` leaves open agrees."""
    left_open = {"budget", "costs"} | {key for key in ("steps", "prior_steps") if not getattr(new, key)}
    there, now = ({k: v for k, v in asdict(plan).items() if k not in left_open} for plan in (old, new))
    if changes := differences(there, now):
        raise ValueError(f"the plan there is of another study; choose another folder with --out: {changes}")


def between(measured: Mapping[str, Sequence[float]], size: int) -> Cost:
    """The cost at `size`, on the line through those at two sizes: searches and entropies are linear in it."""
    points = sorted((int(at), Cost(*cost)) for at, cost in measured.items())
    (low, first), (high, last) = points[0], points[-1]
    share = (size - low) / (high - low) if high > low else 0.0
    return Cost(first.fixed + share * (last.fixed - first.fixed), first.step + share * (last.step - first.step))


def steps_for(seconds: float, costs: Iterable[Cost]) -> int:
    """The largest number of steps that every job can take in `seconds` of all. Raises ValueError if it is 0."""
    costs = list(costs)
    fixed, step = sum(cost.fixed for cost in costs), sum(cost.step for cost in costs)
    steps = math.floor((seconds - fixed) / step)
    if steps < 1:
        raise ValueError(
            f"{len(costs)} jobs need {fixed:.0f} s to begin and to be evaluated and {step:.2f} s for a step of each, "
            f"and {seconds:.0f} s are left: raise --budget, or ask for fewer sizes, quantizers or seeds"
        )
    return steps


def planned(plan: Plan, seconds: float) -> Plan:
    """`plan` with as many steps as its costs and `seconds` allow."""
    assert plan.costs is not None
    shares = {"tokenizer": 1 - PRIOR_SHARE, "prior": PRIOR_SHARE} if plan.prior else {"tokenizer": 1.0}
    steps = {
        kind: steps_for(seconds * share, (between(plan.costs[kind][job.quantizer], job.size) for job in plan.jobs))
        for kind, share in shares.items()
    }
    return replace(plan, steps=steps["tokenizer"], prior_steps=steps.get("prior", 0))


def parse_sizes(text: str) -> tuple[int, ...]:
    """Ascending sizes of "2^4..2^16", all powers of two from one to the other, or of a list, "16,64,2^8"."""
    first, dots, last = text.partition("..")
    if dots:
        low, high = _size(first, text), _size(last, text)
        sizes = [2**bits for bits in range(LARGEST.bit_length()) if low <= 2**bits <= high]
    else:
        sizes = [_size(part, text) for part in text.split(",")]
    if not sizes:
        raise ValueError(f"no power of two lies in the sizes {text}")
    return tuple(sorted(set(sizes)))


def _size(text: str, whole: str) -> int:
    found = re.fullmatch(r"(?:2\^)?(\d{1,9})", text.strip())
    number = int(found[1]) if found else 0
    size = 2 ** min(number, 64) if "^" in text else number
    if not 2 <= size <= LARGEST:
        raise ValueError(f"sizes are numbers from 2 to 2^24, as 2^4..2^16 or 16,64,256; got {text!r} in {whole!r}")
    return size


def parse_budget(text: str) -> float:
    """Seconds of "90s", "30m", "2h", "1h30m"."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip())
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    if not (total := 3600 * hours + 60 * minutes + seconds):
        raise ValueError(f"a budget is a time as 90s, 30m or 1h30m, got {text!r}")
    return float(total)


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of "i/n", the i-th of n parts from 1 on."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    index, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= index <= count:
        raise ValueError(f"a shard is i/n with i from 1 to n, got {text!r}")
    return index, count


__all__ = [
    "QUANTIZERS",
    "Cost",
    "Job",
    "Plan",
    "check_same",
    "parse_budget",
    "parse_shard",
    "parse_sizes",
    "planned",
    "read_plan",
    "steps_for",
    "variant",
]
