"""The innermost quantizers of a model, each with what it was given and chose: how its kind is measured, what may be
wrong with it and what then to change. `KINDS` says which class of quantizer is which kind of part.

The thresholds are ours: levels that a unit-normal latent uses under the paper's bound pass, but for L = 2.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latticode.core.modules import device_of
from latticode.diagnose.bounds import GAIN, better_bound
from latticode.metrics.codes import CodeStatistics, entropy_bits
from latticode.quantizers import BSQ, FSQ, LFQ, VQ, Quantizer, SimVQ
from latticode.quantizers.levels import recommend

EDGE = 0.95  # of the activation: beyond, tanh passes less than a tenth of the gradient
DEAD = 0.1  # bits of a channel's levels
NARROW = 0.25  # standard deviation at the activation's input, where a unit normal under slope 2 has 1
CORRELATED = 0.95  # |correlation| of two channels
WIDE, TINY = 10.0, 0.1  # size of latents against the values that signs stand for
FAR = 3.0  # spread of latents against that of the codes they choose


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a part of a quantizer.

    Examples:
        >>> change = ["tokenizer.quantizer.slope=9"]
        >>> finding = Finding("narrow", "quantizer", [1], 0.1, NARROW, "channel 1 is too narrow", change)
        >>> f"{finding.text}: {finding.value} < {finding.threshold}; try {finding.change[0]}"
        'channel 1 is too narrow: 0.1 < 0.25; try tokenizer.quantizer.slope=9'
    """

    kind: str  # invalid, dead, saturated, narrow, unbalanced, wide, correlated or collapsed
    part: str  # where in the tokenizer, as `Part.name`
    channels: list[int]  # of the part, or none if it is about its codes
    value: float
    threshold: float
    text: str
    change: list[str]  # overrides to try, each by itself


class Symptom(NamedTuple):
    """What is wrong with one channel: a `Finding` less its place.

    Examples:
        >>> symptom = Symptom("dead", 0.02, DEAD, "is dead: 0.02 of 2.32 bits", ["tokenizer.quantizer.levels=[5]"])
        >>> symptom.value < symptom.threshold
        True
    """

    kind: str
    value: float
    threshold: float
    text: str
    change: Sequence[str]


@dataclass
class Part:
    """A quantizer that is made of no others, with what it was given and chose; of a kind that nothing is known of.

    Examples:
        >>> part = part_of("quantizer", VQ(512, 32))
        >>> part.change(size=256), part.change(update="ema", restart=0.1)
        ('tokenizer.quantizer.size=256', 'tokenizer.quantizer.update=ema tokenizer.quantizer.restart=0.1')
        >>> part_of("quantizer.stages[2]", VQ(512, 32)).change(size=256)  # no override reaches into a list
        'in tokenizer.quantizer.stages[2]: size=256'
    """

    name: str  # "quantizer", "top.quantizer", "quantizer.stages[2]", or of a shared one "quantizer.stages slot 2"
    quantizer: Any
    codes: CodeStatistics
    latents: list[Tensor] = field(default_factory=list)  # (n, D) float32, of a share of the tokens

    def change(self, **values: Any) -> str:
        """Overrides of its spec in a run's config, as a shell takes them; a quantizer that is used several times has
        one. Items of lists have no override: there the name says where."""
        path = f"tokenizer.{self.name.split()[0]}"
        words = [f"{key}={value}".replace(" ", "") for key, value in values.items()]
        return f"in {path}: " + " ".join(words) if "[" in path else " ".join(f"{path}.{word}" for word in words)

    def seen(self, z: Tensor) -> Tensor:
        """What of its latents `z` (..., D) is looked at."""
        return z

    def measured(self, x: Tensor, channels: list[dict[str, Any]]) -> dict[str, Any]:
        """Numbers of this kind, of latents `x` (N, D) float64; those of single channels are added to `channels`."""
        return {}

    def defects(self, numbers: dict[str, Any]) -> list[Finding]:
        """What is wrong with its channels or its codebook, by `measure`."""
        return []

    def revived(self, bits: float) -> list[str]:
        """What may help a collapsed codebook that spends `bits`, less what is set already."""
        enough = _enough(bits)
        if " slot " in self.name:  # a size that suits one use may be too small for another
            return [f"one for each use: a list as tokenizer.{self.name.split()[0]}, without the number of uses"]
        return [self.change(size=enough)]


class Channels(Part):
    """A quantizer whose channels have levels of their own.

    Examples:
        >>> from latticode.diagnose.evidence import measure
        >>> part, z = part_of("quantizer", FSQ([3, 5])), torch.randn(1000, 2) * torch.tensor([0.01, 1.0])
        >>> part.codes.update(part.quantizer.encode(z))
        >>> part.latents.append(z)
        >>> [(finding.kind, finding.channels) for finding in part.defects(measure(part))]
        [('dead', [0])]
    """

    @property
    @abstractmethod
    def levels(self) -> list[int]:
        """Of each channel."""

    def measured(self, x: Tensor, channels: list[dict[str, Any]]) -> dict[str, Any]:
        levels = self.levels
        histograms = self.codes.level_histograms(levels)
        for channel, level, counts, column in zip(channels, levels, histograms, x.T, strict=True):
            channel |= {"levels": level, "histogram": counts, "entropy_bits": entropy_bits(torch.tensor(counts))}
            channel |= self._driven(column, level)
        return {"correlation": _correlation(x)}

    def defects(self, numbers: dict[str, Any]) -> list[Finding]:
        found = []
        for channel in numbers["channels"]:
            if symptom := self._symptom(channel):
                kind, value, threshold, text, change = symptom
                i = channel["channel"]
                found.append(Finding(kind, self.name, [i], value, threshold, f"channel {i} {text}", list(change)))
        ill = {i for f in found for i in f.channels}
        pair = numbers["correlation"]
        if pair["value"] > CORRELATED and not ill & set(pair["channels"]):
            text = f"channels {pair['channels'][0]} and {pair['channels'][1]} say the same"
            change = [self._without(pair["channels"][1])]
            found.append(Finding("correlated", self.name, pair["channels"], pair["value"], CORRELATED, text, change))
        return found

    def _symptom(self, channel: dict[str, Any]) -> Symptom | None:
        """The first of dead, wide or saturated, narrow and unbalanced."""
        level, share = channel["levels"], max(channel["histogram"]) / sum(channel["histogram"])
        if channel["entropy_bits"] < DEAD:
            text = f"is dead: its levels carry {channel['entropy_bits']:.2f} of {math.log2(level):.2f} bits"
            return Symptom("dead", channel["entropy_bits"], DEAD, text, [self._without(channel["channel"])])
        if symptom := self._misfit(channel):
            return symptom
        if share > level**-0.5:  # -log2 of it is less than half the bits of the channel
            text = f"is unbalanced: one of its {level} levels takes {share:.0%}"
            return Symptom("unbalanced", share, level**-0.5, text, self._balanced())
        return None

    def _driven(self, column: Tensor, level: int) -> dict[str, Any]:
        """More numbers of a channel's latents `column` (N,)."""
        return {}

    def _misfit(self, channel: dict[str, Any]) -> Symptom | None:
        """Latents that are too wide or too narrow for their levels."""
        return None

    @abstractmethod
    def _balanced(self) -> list[str]:
        """What may make the use of a channel's levels more even."""

    @abstractmethod
    def _without(self, channel: int) -> str:
        """The override that leaves out a channel."""


class Grid(Channels):
    """An FSQ.

    Examples:
        >>> part = part_of("quantizer", FSQ([8, 5]))
        >>> type(part).__name__, part.levels, part.revived(bits=3.0)
        ('Grid', [8, 5], ['tokenizer.quantizer.levels=[5,3]'])
    """

    @property
    def levels(self) -> list[int]:
        return self.quantizer.levels

    def seen(self, z: Tensor) -> Tensor:
        """What is bounded."""
        return self.quantizer.sheared(z)

    def _driven(self, column: Tensor, level: int) -> dict[str, Any]:
        """Standard deviation at the activation's input, and the share that it leaves next to no gradient."""
        drive = column * (self.quantizer.slope / 2)
        edge = level / (level - 1) if self.quantizer.bound == "clamp" else math.atanh(EDGE)
        return {"drive": float(drive.std(correction=0)), "saturated": float((drive.abs() > edge).double().mean())}

    def _misfit(self, channel: dict[str, Any]) -> Symptom | None:
        most = (1 + 2 / channel["levels"]) / 2  # half way from what the two end levels hold if all are used evenly
        even = [self.change(slope=f"{2 / max(channel['std'], 1e-9):.2g}")]
        if channel["saturated"] > most:
            text = f"saturates its bound: {channel['saturated']:.0%} of it lie at the ends, std {channel['std']:.3g}"
            return Symptom("saturated", channel["saturated"], most, text, even)
        if channel["drive"] < NARROW:
            text = f"is too narrow for its bound: std {channel['std']:.3g} at slope {self.quantizer.slope:g}"
            return Symptom("narrow", channel["drive"], NARROW, text, even)
        return None

    def _balanced(self) -> list[str]:
        best, _ = better_bound(self.levels, self.quantizer, torch.cat(self.latents))
        if (best["bound"], best["slope"]) == (self.quantizer.bound, self.quantizer.slope):
            return [f"more steps: no other bound spends {GAIN:g} bits more on these latents"]
        return [self.change(bound=best["bound"], slope=best["slope"])]

    def _without(self, channel: int) -> str:
        return self.change(levels=[n for i, n in enumerate(self.levels) if i != channel])

    def revived(self, bits: float) -> list[str]:
        return [self.change(levels=list(recommend(size=_enough(bits), bound=self.quantizer.bound).levels))]


class Signs(Channels):
    """A BSQ, and what it shares with LFQ: two levels in every channel.

    Examples:
        >>> part = part_of("quantizer", BSQ(8))
        >>> type(part).__name__, part.levels, part.revived(bits=3.0)
        ('Signs', [2, 2, 2, 2, 2, 2, 2, 2], ['weights.diversity=0.5', 'tokenizer.quantizer.dim=4'])
    """

    @property
    def levels(self) -> list[int]:
        return [2] * self.quantizer.dim

    def _balanced(self) -> list[str]:
        return ["weights.diversity=0.5"]

    def _without(self, channel: int) -> str:
        return self.change(dim=self.quantizer.dim - 1)

    def revived(self, bits: float) -> list[str]:
        return ["weights.diversity=0.5", self.change(dim=round(math.log2(_enough(bits))))]


class ScaledSigns(Signs):
    """An LFQ, whose signs stand for values of one size.

    Examples:
        >>> part = part_of("quantizer", LFQ(8))
        >>> isinstance(part, ScaledSigns), part.quantizer.scale
        (True, 1.0)
    """

    def _misfit(self, channel: dict[str, Any]) -> Symptom | None:
        size = math.hypot(channel["mean"], channel["std"]) / self.quantizer.scale
        if TINY <= size <= WIDE:
            return None
        kind, threshold = ("wide", WIDE) if size > WIDE else ("narrow", TINY)
        text = f"has latents {size:.3g} times as large as the signs that stand for them"
        change = self.change(scale=f"{size * self.quantizer.scale:.2g}")
        return Symptom(kind, size, threshold, text, [change, "weights.commitment=1.0"])


class Vectors(Part):
    """A SimVQ, and what it shares with VQ: a codebook of vectors.

    Examples:
        >>> part = part_of("quantizer", SimVQ(16, 4))
        >>> isinstance(part, Vectors), part.defects({"spread": 10.0})[0].text
        (True, 'latents spread 10 times as wide as the codes they choose')
    """

    def measured(self, x: Tensor, channels: list[dict[str, Any]]) -> dict[str, Any]:
        """spread, that of latents against that of the codes they choose."""
        one = self.quantizer
        chosen = one.decode(one.encode(x.to(torch.float32).to(device_of(one)))).double().cpu()
        spread = _spread(chosen)
        return {"spread": _spread(self._placed(x)) / spread if spread else None}

    def _placed(self, x: Tensor) -> Tensor:
        """Latents where they are compared with the codes."""
        return x

    def defects(self, numbers: dict[str, Any]) -> list[Finding]:
        spread = numbers["spread"]
        if spread is None or spread <= FAR:
            return []
        text = f"latents spread {spread:.3g} times as wide as the codes they choose"
        return [Finding("wide", self.name, [], spread, FAR, text, self._nearer())]

    def _nearer(self) -> list[str]:
        """What may bring latents and codes together."""
        return ["weights.commitment=1.0"]

    def revived(self, bits: float) -> list[str]:
        narrow = [self.change(dim=8)] if self.quantizer.dim > 8 else []
        return [*narrow, *super().revived(bits)]


class LearnedVectors(Vectors):
    """A VQ.

    Examples:
        >>> part = part_of("quantizer", VQ(16, 4, update="gradient"))
        >>> isinstance(part, LearnedVectors), part.revived(bits=3.0)[0]
        (True, 'tokenizer.quantizer.update=ema')
    """

    def _placed(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) if self.quantizer.normalize else x

    def _nearer(self) -> list[str]:
        return [*super()._nearer(), *([] if self.quantizer.normalize else [self.change(normalize="true")])]

    def revived(self, bits: float) -> list[str]:
        one = self.quantizer
        change = [self.change(update="ema")] if one.update != "ema" else []
        change += [self.change(restart=0.1)] if one.upkeep == "restart" and one.restart < 0.1 else []
        change += [self.change(upkeep="online")] if one.upkeep != "online" else []
        change += [self.change(normalize="true")] if not one.normalize and not one.affine else []
        return [*change, *super().revived(bits)]


KINDS: dict[type[Quantizer], type[Part]] = {
    FSQ: Grid,
    LFQ: ScaledSigns,
    BSQ: Signs,
    VQ: LearnedVectors,
    SimVQ: Vectors,
}


def part_of(name: str, quantizer: Quantizer) -> Part:
    """The part of a quantizer by the nearest class of `KINDS`."""
    kind = next((KINDS[cls] for cls in type(quantizer).__mro__ if cls in KINDS), Part)
    return kind(name, quantizer, CodeStatistics(quantizer.vocab))


def _enough(bits: float) -> int:
    """Twice the codes that `bits` spend, a power of two."""
    return 2 ** max(1, math.ceil(bits) + 1)


def _spread(x: Tensor) -> float:
    return float(x.std(0, correction=0).square().sum().sqrt())


def _correlation(x: Tensor) -> dict[str, Any]:
    """The greatest |correlation| of two columns of `x` (N, D) that vary, and which."""
    moved = x - x.mean(0)
    length = moved.norm(dim=0)
    moved = torch.where(length > 1e-9 * x.norm(dim=0), moved / length.clamp(min=1e-300), 0.0)
    table = (moved.T @ moved).abs().triu(1)
    place = int(table.argmax())
    return {"value": float(table.max()), "channels": [place // len(table), place % len(table)]}
