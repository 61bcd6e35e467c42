"""What is wrong with the codes of a trained run, by its numbers, and what to change.

A tokenizer quantizes held-out examples; what its quantizers are given and what they choose is taken apart down to the
quantizers that others are made of (`Part`), and each is held against the thresholds below. The thresholds are ours:
they pass a unit-normal latent under every bound, and the share of evenly used levels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from latticode import figures
from latticode.data import Loader
from latticode.evaluate.common import Progress, Report, batches_of, count_of, device_of, evaluating
from latticode.files import replacing, write_text
from latticode.metrics.codes import CodeStatistics, entropy_bits
from latticode.quantizers import BSQ, FSQ, LFQ, VQ, Grouped, Hierarchical, Projected, Quantizer, Residual, SimVQ
from latticode.quantizers.levels import recommend
from latticode.quantizers.residual import listed, units
from latticode.runs import open_tokenizer, open_whole, watched

DIAGNOSIS = "diagnosis.json"
LATENTS = 2**16  # tokens whose latents are kept, drawn from all; of codes all are counted
EDGE = 0.95  # of the activation: beyond, tanh passes less than a tenth of the gradient
DEAD = 0.1  # bits of a channel's levels
NARROW = 0.25  # standard deviation at the activation's input, where a unit normal under slope 2 has 1
CORRELATED = 0.95  # |correlation| of two channels
WIDE, TINY = 10.0, 0.1  # size of latents against the values that signs stand for
FAR = 3.0  # spread of latents against that of the codes they choose
LEAST_USAGE, LEAST_PERPLEXITY = 0.5, 0.1  # of what as many tokens could use
PER_CODE = 5  # tokens; with fewer the usage is bounded by them
BOUNDS = (("paper", 2.0), ("symmetric", 2.0), ("symmetric", 1.6), ("equal-bins", 2.0), ("equal-bins", 1.6))


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


@dataclass
class Part:
    """A quantizer that is made of no others, and what it was given and chose."""

    name: str  # "quantizer", "top.quantizer", "quantizer.stages[2]", or of a shared one "quantizer.stages slot 2"
    quantizer: Quantizer
    codes: CodeStatistics
    latents: list[Tensor] = field(default_factory=list)  # (n, D) float32, of a share of the tokens

    def change(self, **values: Any) -> str:
        """Overrides of its spec in a run's config, which a quantizer that is used several times has one of. Items of
        lists have no override: there the name says where."""
        path = f"tokenizer.{self.name.split()[0]}"
        if "[" in path:
            return f"in {path}: " + " ".join(f"{key}={value}" for key, value in values.items())
        return " ".join(f"{path}.{key}={value}" for key, value in values.items())


def leaves(
    name: str, quantizer: Quantizer, z: Tensor, codes: Tensor
) -> Iterator[tuple[str, Quantizer, Tensor, Tensor]]:
    """(name, quantizer, its latents (..., D), its codes (..., K)) for every innermost quantizer in `quantizer`.

    `z` (..., D) is finite and `codes` (..., K) are those of it.
    """
    if isinstance(quantizer, Projected):
        inner = nn.functional.linear(z, quantizer.project_in.weight, quantizer.project_in.bias)
        yield from leaves(f"{name}.quantizer", quantizer.quantizer, inner, codes)
    elif isinstance(quantizer, Grouped):
        parts, start, slot = listed(quantizer.quantizers, quantizer.groups), 0, 0
        for i, one in enumerate(parts):
            run, chosen = z[..., start : start + one.dim], codes[..., slot : slot + len(one.vocab)]
            inner = _item(f"{name}.quantizers", i, quantizer.groups)
            yield from leaves(inner, one, run, chosen)
            start, slot = start + one.dim, slot + len(one.vocab)
    elif isinstance(quantizer, Hierarchical):
        slots = len(quantizer.top.vocab)
        children = z.unflatten(-1, (quantizer.fanout, -1))
        yield from leaves(f"{name}.top", quantizer.top, children.mean(-2), codes[..., :slots])
        left = children - quantizer.top.decode(codes[..., :slots])[..., None, :]
        chosen = codes[..., slots:].unflatten(-1, (quantizer.fanout, -1))
        yield from leaves(f"{name}.bottom", quantizer.bottom, left, chosen)
    elif isinstance(quantizer, Residual):
        stages, slot = listed(quantizer.stages, quantizer.depth), 0
        limit = z.new_tensor(stages[0].reach)
        residual = limit * torch.tanh(z / limit) if quantizer.soft_clamp else z
        for i, (stage, scale) in enumerate(zip(stages, units(stages)[0], strict=True)):
            left = residual if slot == 0 else residual - quantizer.decode(codes[..., :slot])
            chosen = codes[..., slot : slot + len(stage.vocab)]
            inner = _item(f"{name}.stages", i, quantizer.depth)
            yield from leaves(inner, stage, left / z.new_tensor(scale), chosen)
            slot += len(stage.vocab)
    else:
        yield name, quantizer, z, codes


def _item(name: str, i: int, shared: int | None) -> str:
    return f"{name}[{i}]" if shared is None else f"{name} slot {i}"


class Evidence:
    """The parts of the quantizers inside a model, filled by its forward passes while `watching`."""

    def __init__(self, model: nn.Module, share: float = 1.0, seed: int = 0):
        """`share` of the tokens have their latents kept, drawn by `seed`."""
        self.parts: dict[str, Part] = {}
        self.share, self.invalid, self.tokens = share, 0, 0
        self._generator = torch.Generator().manual_seed(seed)
        quantizers = {name: one for name, one in model.named_modules() if isinstance(one, Quantizer)}
        outer = {n: q for n, q in quantizers.items() if not any(n.startswith(f"{other}.") for other in quantizers)}
        self._outer = {name or "quantizer": one for name, one in outer.items()}

    def add(self, name: str, quantizer: Quantizer, z: Tensor, codes: Tensor) -> None:
        """Tokens `z` (..., D) of the quantizer `name`, and the `codes` (..., K) that it gave them."""
        z, codes = z.flatten(0, -2).float(), codes.flatten(0, -2)
        valid = (codes >= 0).all(-1) & z.isfinite().all(-1)
        self.tokens, self.invalid = self.tokens + len(z), self.invalid + int((~valid).sum())
        for part_name, one, values, chosen in leaves(name, quantizer, z[valid], codes[valid]):
            part = self.parts.setdefault(part_name, Part(part_name, one, CodeStatistics(one.vocab)))
            part.codes.update(chosen)
            values = values.flatten(0, -2).cpu()
            some = torch.randperm(len(values), generator=self._generator)[: math.ceil(self.share * len(values))]
            part.latents.append(values[some])

    def watch(self) -> list[Any]:
        """Hooks that `add` what the quantizers see, to be removed."""

        def hook(name: str) -> Any:
            return lambda module, given, result: self.add(name, module, given[0], result.codes)

        return [one.register_forward_hook(hook(name)) for name, one in self._outer.items()]


def gather(model: nn.Module, loader: Loader, limit: int | None = None, progress: Progress | None = None) -> Evidence:
    """What the quantizers of `model` make of the examples of `loader`, at most `limit` of them."""
    report, evidence = Report(progress, count_of(loader, limit)), Evidence(model)
    hooks = evidence.watch()
    try:
        with evaluating(model):
            for batch in batches_of(loader, limit, report):
                before = evidence.tokens
                model(batch.inputs.to(device_of(model)))
                if before == 0:  # the first batch says how many there will be
                    whole = evidence.tokens * max(1, report.total) / len(batch.inputs)
                    evidence.share = min(1.0, LATENTS / max(whole, 1))
    finally:
        for hook in hooks:
            hook.remove()
    return evidence


def measure(part: Part) -> dict[str, Any]:
    """The numbers of a part: usage, perplexity, entropy_bits, size, tokens, possible, the codes that as many even
    tokens would use; spread, of latents against chosen codes (codebooks); channels, of each its mean, std and, where a
    channel has levels of its own, levels, histogram, entropy_bits, saturated, drive (std at the activation's input);
    correlation, the greatest between two such channels, and of which."""
    statistics, one = part.codes.compute(), part.quantizer
    # Of several slots usage and perplexity are means, so what they could be is that of one.
    x, size, tokens = torch.cat(part.latents).double(), max(part.codes.vocab), part.codes.positions
    result: dict[str, Any] = {
        "part": part.name,
        "type": type(one).__name__,
        "size": size,
        "tokens": tokens,
        "possible": -math.expm1(tokens * math.log1p(-1 / size)) if size > 1 else 1.0,
        **{name: statistics[name] for name in ("usage", "perplexity", "entropy_bits")},
    }
    std, mean = x.std(0, correction=0), x.mean(0)
    result["channels"] = [
        {"channel": i, "mean": m, "std": s} for i, (m, s) in enumerate(zip(mean.tolist(), std.tolist(), strict=True))
    ]
    if isinstance(one, VQ | SimVQ):
        codes = one.encode(x.to(torch.float32).to(_device(one)))
        chosen = one.decode(codes).double().cpu()
        placed = nn.functional.normalize(x, dim=-1) if getattr(one, "normalize", False) else x
        spread = float(chosen.std(0, correction=0).square().sum().sqrt())
        result["spread"] = float(placed.std(0, correction=0).square().sum().sqrt()) / spread if spread else None
    if isinstance(one, FSQ | LFQ | BSQ):
        levels = one.levels if isinstance(one, FSQ) else [2] * one.dim
        histograms = part.codes.level_histograms(levels)
        for channel, level, counts, column in zip(result["channels"], levels, histograms, x.T, strict=True):
            channel |= {"levels": level, "histogram": counts, "entropy_bits": entropy_bits(torch.tensor(counts))}
            if isinstance(one, FSQ):
                drive = column * (one.slope / 2)
                edge = level / (level - 1) if one.bound == "clamp" else math.atanh(EDGE)
                channel["drive"] = float(drive.std(correction=0))
                channel["saturated"] = float((drive.abs() > edge).double().mean())
        result["correlation"] = _correlation(x)
    return result


def _correlation(x: Tensor) -> dict[str, Any]:
    """The greatest |correlation| of two columns of `x` (N, D) that vary, and which."""
    moved = x - x.mean(0)
    length = moved.norm(dim=0)
    moved = torch.where(length > 1e-9 * x.norm(dim=0), moved / length.clamp(min=1e-300), 0.0)
    table = (moved.T @ moved).abs().triu(1)
    place = int(table.argmax())
    return {"value": float(table.max()), "channels": [place // len(table), place % len(table)]}


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
    best = max(bounds(one.levels, torch.cat(part.latents)), key=lambda row: row["entropy_bits"])
    if (best["bound"], best["slope"]) == (one.bound, one.slope):
        return ["more steps, or another seed: no other bound is more even on these latents"]
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
        change.append(part.change(levels=list(recommend(size=enough).levels)))
    elif isinstance(one, LFQ | BSQ):
        change += ["weights.diversity=0.5", part.change(dim=round(math.log2(enough)))]
    elif " slot " in part.name:  # a size that suits one use may be too small for another
        change.append(f"one for each use: a list as {part.name.split()[0]}, without the number of uses")
    else:
        change.append(part.change(size=enough))
    return change


def _without(part: Part, channel: int) -> str:
    one = part.quantizer
    if isinstance(one, FSQ):
        return part.change(levels=[n for i, n in enumerate(one.levels) if i != channel])
    return part.change(dim=one.dim - 1)


def bounds(
    levels: list[int], latents: Tensor, candidates: Iterable[tuple[str, float]] = BOUNDS
) -> list[dict[str, Any]]:
    """What each of `candidates` makes of `latents` (N, D) measured on a run: bound, slope, entropy_bits of the index,
    usage and channels, the entropy of each channel's levels."""
    rows = []
    for bound, slope in candidates:
        quantizer = FSQ(levels, bound, slope, factors=len(levels) if math.prod(levels) >= 2**63 else 1)
        statistics = CodeStatistics(quantizer.vocab)
        statistics.update(quantizer.encode(latents.float()))
        numbers, histograms = statistics.compute(), statistics.level_histograms(levels)
        rows.append(
            {
                "bound": bound,
                "slope": slope,
                "entropy_bits": numbers["entropy_bits"],
                "usage": numbers["usage"],
                "channels": [entropy_bits(torch.tensor(counts)) for counts in histograms],
            }
        )
    return rows


def diagnose(
    run: Path,
    source: str | None = None,
    split: str = "test",
    *,
    limit: int | None = None,
    device: str = "auto",
    console: Console,
) -> dict[str, Any]:
    """Say what is wrong with the codes of `run` on `split` of `source` (default: its own data).

    Returns findings, notes, parts (`measure`) and protocol, and writes them to diagnosis.json with diagnosis.svg beside
    it. Raises ValueError for runs without a tokenizer and for data that give no valid token.
    """
    config, evidence = observe(run, source, split, limit=limit, device=device, console=console)
    parts = list(evidence.parts.values())
    if not any(part.codes.positions for part in parts):
        raise ValueError(f"no valid codes in {evidence.tokens} tokens of {run}: the latents are not finite")
    measured = [measure(part) for part in parts]
    found = [f for part, numbers in zip(parts, measured, strict=True) for f in findings(part, numbers)]
    if evidence.invalid:
        share = evidence.invalid / evidence.tokens
        text = f"{evidence.invalid} of {evidence.tokens} tokens are not finite"
        found.insert(0, Finding("invalid", "", [], share, 0.0, text, ["optimizer.clip=1.0"]))
    result = {
        "findings": [asdict(finding) for finding in found],
        "notes": [note for numbers in measured for note in _notes(numbers)],
        "parts": measured,
        "protocol": {
            "source": source or config.data.source,
            "split": split,
            "limit": limit,
            "tokens": evidence.tokens,
            "latents": f"of {evidence.share:.2%} of the tokens, drawn by a fixed seed; codes of all",
            "preprocessing": config.data.preprocess().record(),
            "ema": config.ema,
            "run": run.name,
        },
    }
    write_text(run / DIAGNOSIS, json.dumps(result, indent=2, allow_nan=False) + "\n")
    with replacing((run / DIAGNOSIS).with_suffix(".svg")) as temporary:
        temporary.write_bytes(figures.svg(figures.code_panels(_panels(parts, measured))))
    return result


def recommended(
    run: Path,
    source: str | None = None,
    split: str = "test",
    *,
    size: int | None = None,
    bits: float | None = None,
    limit: int | None = None,
    device: str = "auto",
    console: Console,
) -> dict[str, Any]:
    """Levels and bound for `size` or `bits` (default: as many codes as now) by the latents of `run`, an FSQ's.

    Returns levels, bound and slope; rows, what each bound makes of the latents (`bounds`) at those `measured` levels:
    the recommended ones if the run has as many channels, else the run's own; idle, the channels that are dead or repeat
    another; evidence, a sentence. Raises ValueError for a run with more or other quantizers than one FSQ.
    """
    config, found = observe(run, source, split, limit=limit, device=device, console=console)
    kinds = [type(part.quantizer).__name__ for part in found.parts.values()]
    if kinds != ["FSQ"]:
        raise ValueError(f"levels are recommended by the latents of one FSQ; {run} has {', '.join(kinds) or 'none'}")
    (part,) = found.parts.values()
    one: Any = part.quantizer
    own = math.prod(one.levels)
    levels = list(recommend(size=own if size is None and bits is None else size, bits=bits).levels)
    if size is None and bits is None or math.prod(levels) == own:
        levels = list(one.levels)
    measured = levels if len(levels) == one.dim else list(one.levels)
    latents, now = torch.cat(part.latents), (one.bound, one.slope)
    rows = bounds(measured, latents, dict.fromkeys([now, *BOUNDS]))
    best = max(rows, key=lambda row: row["entropy_bits"])  # of equal ones the run's own
    idle = [i for f in findings(part, measure(part)) if f.kind in ("dead", "correlated") for i in f.channels[-1:]]
    return {
        "levels": levels,
        "bound": best["bound"],
        "slope": best["slope"],
        "measured": measured,
        "rows": rows,
        "idle": idle,
        "evidence": f"{len(latents):,} latents of {run.name} on {split} of {source or config.data.source}, trained with "
        f"levels {one.levels} under the {one.bound} bound of slope {one.slope:g}. Entropy and usage say how evenly codes "
        "are spent, not how well they reconstruct, and latents move when they are trained under another bound.",
    }


def observe(
    run: Path, source: str | None, split: str, *, limit: int | None, device: str, console: Console
) -> tuple[Any, Evidence]:
    """The config of `run` and what its quantizers make of `split` of `source` (default: its own data)."""
    config, tokenizer = open_tokenizer(run, device)
    loader = open_whole(config, source or config.data.source, split)
    with watched(console, f"diagnose {run.name}") as watch:
        return config, gather(tokenizer, loader, limit, watch)


def _notes(numbers: dict[str, Any]) -> list[str]:
    if numbers["tokens"] >= PER_CODE * numbers["size"]:
        return []
    return [
        f"{numbers['part']}: {numbers['tokens']:,} tokens cannot use more than {numbers['possible']:.1%} of "
        f"{numbers['size']:,} codes on average, however even; no defect"
    ]


def show_levels(result: dict[str, Any]) -> Group:
    """What `recommended` found, for a terminal."""
    table = Table("bound", "slope", "entropy", "usage", "entropy of each channel", box=None, pad_edge=False)
    for row in result["rows"]:
        entropy = f"{row['entropy_bits']:.3f} of {math.log2(math.prod(result['measured'])):.3f} bits"
        each = " ".join(f"{bits:.2f}" for bits in row["channels"])
        table.add_row(row["bound"], f"{row['slope']:g}", entropy, f"{row['usage']:.2%}", each)
    lines = [f"levels {result['levels']} bound {result['bound']} slope {result['slope']:g}"]
    if result["measured"] != result["levels"]:
        lines.append(f"other channels than the run's: measured is {result['measured']}, so the bound is a guess")
    if result["idle"]:
        lines.append(f"channels {result['idle']} of the run say nothing of their own: fewer channels would do")
    return Group(*map(escape, lines), table, escape(f"evidence: {result['evidence']}"))


def _panels(parts: list[Part], measured: list[dict[str, Any]]) -> list[tuple[str, list[int], bool]]:
    """Title, counts and whether they are of levels: for each channel with levels, else for the codes of each part."""
    panels: list[tuple[str, list[int], bool]] = []
    for part, numbers in zip(parts, measured, strict=True):
        if "correlation" in numbers:
            for channel in numbers["channels"]:
                title = f"{part.name} {channel['channel']}: {channel['entropy_bits']:.2f} bits"
                panels.append((title, channel["histogram"], True))
        else:
            counts = part.codes.counts()[1].tolist()
            panels.append((f"{part.name}: {numbers['entropy_bits']:.2f} bits", counts, False))
    return panels


def _device(quantizer: nn.Module) -> torch.device:
    return next((t.device for t in [*quantizer.parameters(), *quantizer.buffers()]), torch.device("cpu"))


def show(result: dict[str, Any]) -> Table | str:
    """The findings of `diagnose` for a terminal."""
    if not result["findings"]:
        return "healthy: nothing is wrong with the codes"
    table = Table("finding", "where", "value", "threshold", "what", "try", box=None, pad_edge=False)
    for one in result["findings"]:
        numbers = f"{one['value']:.3g}", f"{one['threshold']:.3g}"
        table.add_row(*map(escape, (one["kind"], one["part"], *numbers, one["text"], "\n".join(one["change"]))))
    return table
