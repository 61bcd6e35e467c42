"""Latents and codes of every quantizer in a model, collected over held-out examples down to the innermost ones,
measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from latticode.core.modules import device_of, evaluating
from latticode.data import Loader
from latticode.data.passes import Progress, Report, batches_of, count_of
from latticode.diagnose.parts import Part, part_of
from latticode.quantizers import Quantizer

LATENTS = 2**16  # tokens whose latents are kept, drawn from all; of codes all are counted


def leaves(
    name: str, quantizer: Quantizer, z: Tensor, codes: Tensor
) -> Iterator[tuple[str, Quantizer, Tensor, Tensor]]:
    """(name, quantizer, its latents (..., D), its codes (..., K)) for every innermost quantizer in `quantizer`.

    `z` (..., D) is finite and `codes` (..., K) are those of it.
    """
    inner = list(quantizer.inner(z, codes))
    if not inner:
        yield name, quantizer, z, codes
    for place, one, latents, chosen in inner:
        yield from leaves(f"{name}.{place}", one, latents, chosen)


class Evidence:
    """The parts of the quantizers inside a model, filled by its forward passes while `watching`.

    Examples:
        >>> import torch
        >>> from latticode import FSQ
        >>> quantizer, z = FSQ([3, 3]).eval(), torch.tensor([[0.0, 1.0], [torch.nan, 0.0]])
        >>> evidence = Evidence(quantizer)
        >>> evidence.add("quantizer", quantizer, z, quantizer.encode(z))
        >>> evidence.tokens, evidence.invalid, list(evidence.parts)
        (2, 1, ['quantizer'])
    """

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
            part = self.parts.setdefault(part_name, part_of(part_name, one))
            part.codes.update(chosen)
            values = part.seen(values).flatten(0, -2).cpu()
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
    return result | part.measured(x, result["channels"])
