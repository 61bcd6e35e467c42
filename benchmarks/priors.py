"""How much faster sampling is with a cache than without, and MaskGIT's few steps than autoregression without a cache.

    python benchmarks/priors.py > priors.json

Networks of one size with random weights: no time depends on what they have learned. All ways run in one process in
alternating rounds; a ratio is that of one round, so that what else the machine does falls out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from latticode.priors import GPT, MaskGIT
from latticode.priors.base import draw, uniforms
from latticode.types import Sampling


def uncached(prior: GPT, count: int, seed: int) -> Tensor:
    """Codes (count, N): at every position the transformer reads all former ones again; the head, only the last."""
    labels = torch.full((count,), -1, device=prior.device)
    noise = uniforms((prior.positions,), seed, 0, count).to(prior.device)
    codes = torch.zeros(count, 0, dtype=torch.int64, device=prior.device)
    with prior.inference():
        for n in range(prior.positions):
            context = prior.context(prior.embedding(codes), labels)[:, -1]
            (logits,) = prior.head(context, context[:, None])
            codes = torch.cat([codes, draw(logits, noise[:, n])[:, None]], dim=1)
    return codes


def seconds(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=8, help="images in a batch")
    parser.add_argument("--side", type=int, default=16, help="of the grid")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=12, help="of MaskGIT")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the decoding step too")
    options = parser.parse_args()

    torch.manual_seed(0)
    device, grid = torch.device(options.device), [options.side, options.side]
    sizes = {"width": options.width, "depth": options.depth, "heads": max(1, options.width // 64)}
    ar = GPT([options.vocab], grid, **sizes).to(device).eval()
    masked = MaskGIT([options.vocab], grid, **sizes).to(device).eval()
    same = torch.equal(uncached(ar, 1, 0), ar.sample(1).flatten(1))  # unless a draw falls on a rounding error

    count, plain = options.count, ar.transformer.step
    ways: dict[str, Callable[[int], object]] = {
        "uncached": lambda seed: uncached(ar, count, seed),
        "cached": lambda seed: ar.sample(count, seed=seed),
        "maskgit": lambda seed: masked.sample(count, sampling=Sampling(steps=options.steps), seed=seed),
    }
    if options.compile:
        compiled = torch.compile(plain, fullgraph=True)

        def fast(seed: int) -> None:
            ar.transformer.step = compiled
            ar.sample(count, seed=seed)
            ar.transformer.step = plain

        ways["compiled"] = fast
        fast(0)  # compiles
    ways["cached"](0), ways["maskgit"](0)  # the first call of each allocates

    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(options.rounds):
        for name in list(ways)[:: 1 if round_ % 2 else -1]:
            times[name].append(seconds(lambda way=ways[name], seed=round_: way(seed), device))
    ratios = {
        f"uncached_over_{name}": spread([a / b for a, b in zip(times["uncached"], taken, strict=True)])
        for name, taken in times.items()
        if name != "uncached"
    }
    result = {
        "options": vars(options),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "parameters": {
            "gpt": sum(p.numel() for p in ar.parameters()),
            "maskgit": sum(p.numel() for p in masked.parameters()),
        },
        "cached_equals_uncached": same,
        "cache_bytes": ar.transformer.cache(count, ar.positions).nbytes,
        "seconds": {name: spread(taken) for name, taken in times.items()},
        "ratios": ratios,
    }
    json.dump(result, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
