"""Numbers to findings: what is wrong with a part of a quantizer, by which threshold, and what to change.

The thresholds are ours: levels that a unit-normal latent uses under the paper's bound pass, but for L = 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from latticode.diagnose.evidence import GAIN, Part, better_bound
from latticode.quantizers import BSQ, FSQ, LFQ, VQ, SimVQ
from latticode.quantizers.levels import recommend

DEAD = 0.1  # bits of a channel's levels
NARROW = 0.25  # standard deviation at the activation's input, where a unit normal under slope 2 has 1
CORRELATED = 0.95  # |correlation| of two channels
WIDE, TINY = 10.0, 0.1  # size of latents against the values that signs stand for
FAR = 3.0  # spread of latents against that of the codes they choose
LEAST_USAGE, LEAST_PERPLEXITY = 0.5, 0.1  # of what as many tokens could use
PER_CODE = 5  # tokens; with fewer the usage is bounded by them


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a part of a quantizer."""

    kind: str  # invalid, dead, saturated, narrow, unbalanced, wide, correlated or collapsed
    part: str  # where in the tokenizer, as `Part.name`
    channels: list[int]  # of the part, or none if it is about its codes
    value: float
    threshold: float
    text: str
    change: list[str]  # overrides to try, each by itself


def findings(part: Part, numbers: dict[str, Any]) -> list[Finding]:
    """What is wrong with a part, by its `measure`. A cause hides what follows from it: the least used codes are told
    only where no channel explains them."""
    one = part.quantizer
    if isinstance(one, FSQ | LFQ | BSQ):
        found = [f for channel in numbers["channels"] if (f := _of_channel(part, channel)) is not None]
        ill = {i for f in found for i in f.channels}
        pair = numbers["correlation"]
        if pair["value"] > CORRELATED and not ill & set(pair["channels"]):
            text = f"channels {pair['channels'][0]} and {pair['channels'][1]} say the same"
            change = [_without(part, pair["channels"][1])]
            found.append(Finding("correlated", part.name, pair["channels"], pair["value"], CORRELATED, text, change))
    else:
        found = _of_codebook(part, numbers)
    return found or _collapsed(part, numbers)


def _of_channel(part: Part, channel: dict[str, Any]) -> Finding | None:
    """The first of dead, wide or saturated, narrow and unbalanced."""
    one, i, level = part.quantizer, channel["channel"], channel["levels"]
    share = max(channel["histogram"]) / sum(channel["histogram"])

    def say(kind: str, value: float, threshold: float, text: str, *change: str) -> Finding:
        return Finding(kind, part.name, [i], value, threshold, f"channel {i} {text}", list(change))

    if channel["entropy_bits"] < DEAD:
        text = f"is dead: its levels carry {channel['entropy_bits']:.2f} of {math.log2(level):.2f} bits"
        return say("dead", channel["entropy_bits"], DEAD, text, _without(part, i))
    if isinstance(one, FSQ):
        most = (1 + 2 / level) / 2  # half way from what the two end levels hold if all are used evenly to everything
        even = part.change(slope=f"{2 / max(channel['std'], 1e-9):.2g}")
        if channel["saturated"] > most:
            text = f"saturates its bound: {channel['saturated']:.0%} of it lie at the ends, std {channel['std']:.3g}"
            return say("saturated", channel["saturated"], most, text, even)
        if channel["drive"] < NARROW:
            text = f"is too narrow for its bound: std {channel['std']:.3g} at slope {one.slope:g}"
            return say("narrow", channel["drive"], NARROW, text, even)
    elif isinstance(one, LFQ):
        size = math.hypot(channel["mean"], channel["std"]) / one.scale
        if not TINY <= size <= WIDE:
            kind, threshold = ("wide", WIDE) if size > WIDE else ("narrow", TINY)
            text = f"has latents {size:.3g} times as large as the signs that stand for them"
            change = part.change(scale=f"{size * one.scale:.2g}")
            return say(kind, size, threshold, text, change, "weights.commitment=1.0")
    if share > level**-0.5:  # -log2 of it is less than half the bits of the channel
        text = f"is unbalanced: one of its {level} levels takes {share:.0%}"
        return say("unbalanced", share, level**-0.5, text, *_balance(part))
    return None


def _balance(part: Part) -> list[str]:
    one = part.quantizer
    if not isinstance(one, FSQ):
        return ["weights.diversity=0.5"]
    best, _ = better_bound(one.levels, one, torch.cat(part.latents))
    if (best["bound"], best["slope"]) == (one.bound, one.slope):
        return [f"more steps: no other bound spends {GAIN:g} bits more on these latents"]
    return [part.change(bound=best["bound"], slope=best["slope"])]


def _of_codebook(part: Part, numbers: dict[str, Any]) -> list[Finding]:
    spread = numbers.get("spread")
    if spread is None or spread <= FAR:
        return []
    change = ["weights.commitment=1.0"]
    if isinstance(part.quantizer, VQ) and not part.quantizer.normalize:
        change.append(part.change(normalize="true"))
    text = f"latents spread {spread:.3g} times as wide as the codes they choose"
    return [Finding("wide", part.name, [], spread, FAR, text, change)]


def _collapsed(part: Part, numbers: dict[str, Any]) -> list[Finding]:
    most = numbers["possible"]
    usage, even = numbers["usage"] / most, numbers["perplexity"] / (most * numbers["size"])
    for name, value, threshold in (("usage", usage, LEAST_USAGE), ("perplexity", even, LEAST_PERPLEXITY)):
        if value < threshold:
            text = (
                f"the codebook is collapsed: {numbers['usage']:.2%} of {numbers['size']:,} codes are used, the "
                f"perplexity is {numbers['perplexity']:.3g}; {name} is {value:.2%} of what {numbers['tokens']:,} "
                "tokens allow"
            )
            return [Finding("collapsed", part.name, [], value, threshold, text, _revive(part, numbers))]
    return []


def _revive(part: Part, numbers: dict[str, Any]) -> list[str]:
    """What may help a collapsed codebook, less what is set already."""
    one = part.quantizer
    enough = 2 ** max(1, math.ceil(numbers["entropy_bits"]) + 1)  # twice what is spent
    change: list[str] = []
    if isinstance(one, VQ):
        change += [part.change(update="ema")] if one.update != "ema" else []
        change += [part.change(restart=0.1)] if one.upkeep == "restart" and one.restart < 0.1 else []
        change += [part.change(upkeep="online")] if one.upkeep != "online" else []
        change += [part.change(normalize="true")] if not one.normalize and not one.affine else []
    if isinstance(one, VQ | SimVQ) and one.dim > 8:
        change.append(part.change(dim=8))
    if isinstance(one, FSQ):
        change.append(part.change(levels=list(recommend(size=enough, bound=one.bound).levels)))
    elif isinstance(one, LFQ | BSQ):
        change += ["weights.diversity=0.5", part.change(dim=round(math.log2(enough)))]
    elif " slot " in part.name:  # a size that suits one use may be too small for another
        change.append(f"one for each use: a list as tokenizer.{part.name.split()[0]}, without the number of uses")
    else:
        change.append(part.change(size=enough))
    return change


def _without(part: Part, channel: int) -> str:
    one = part.quantizer
    if isinstance(one, FSQ):
        return part.change(levels=[n for i, n in enumerate(one.levels) if i != channel])
    return part.change(dim=one.dim - 1)


def notes(numbers: dict[str, Any]) -> list[str]:
    if numbers["tokens"] >= PER_CODE * numbers["size"]:
        return []
    return [
        f"{numbers['part']}: {numbers['tokens']:,} tokens cannot use more than {numbers['possible']:.1%} of "
        f"{numbers['size']:,} codes on average, however even; no defect"
    ]
