"""What the quantizers of a model are given and what they choose, taken apart and measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from latticode.core.modules import device_of, evaluating
from latticode.data import Loader
from latticode.data.passes import Progress, Report, batches_of, count_of
from latticode.metrics.codes import CodeStatistics, entropy_bits
from latticode.quantizers import BSQ, FSQ, LFQ, VQ, Grouped, Hierarchical, Projected, Quantizer, Residual, SimVQ
from latticode.quantizers.residual import listed, units

LATENTS = 2**16  # tokens whose latents are kept, drawn from all; of codes all are counted
EDGE = 0.95  # of the activation: beyond, tanh passes less than a tenth of the gradient
GAIN = 0.05  # bits of entropy for which another bound is worth naming
BOUNDS = (("paper", 2.0), ("symmetric", 2.0), ("symmetric", 1.6), ("equal-bins", 2.0), ("equal-bins", 1.6))


@dataclass
class Part:
    """A quantizer that is made of no others, and what it was given and chose."""

    name: str  # "quantizer", "top.quantizer", "quantizer.stages[2]", or of a shared one "quantizer.stages slot 2"
    quantizer: Quantizer
    codes: CodeStatistics
    latents: list[Tensor] = field(default_factory=list)  # (n, D) float32, of a share of the tokens

    def change(self, **values: Any) -> str:
        """Overrides of its spec in a run's config, as a shell takes them; a quantizer that is used several times has
        one. Items of lists have no override: there the name says where."""
        path = f"tokenizer.{self.name.split()[0]}"
        words = [f"{key}={value}".replace(" ", "") for key, value in values.items()]
        return f"in {path}: " + " ".join(words) if "[" in path else " ".join(f"{path}.{word}" for word in words)


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
        yield name, quantizer, quantizer.sheared(z) if isinstance(quantizer, FSQ) else z, codes


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


@torch.no_grad()
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
        codes = one.encode(x.to(torch.float32).to(device_of(one)))
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


def better_bound(levels: list[int], now: FSQ, latents: Tensor) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Of `bounds` the row of the most entropy if that is `GAIN` more than under the bound of `now`, else that of `now`;
    and all rows, that of `now` first."""
    rows = bounds(levels, latents, dict.fromkeys([(now.bound, now.slope), *BOUNDS]))
    best = max(rows, key=lambda row: row["entropy_bits"])
    return (best if best["entropy_bits"] > rows[0]["entropy_bits"] + GAIN else rows[0]), rows
