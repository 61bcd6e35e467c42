"""How much faster sampling is with a cache than without, and MaskGIT's few steps than autoregression without a cache.

    python benchmarks/priors.py > priors.json
    python benchmarks/priors.py --llamagen LlamaGen   # beside the sampler of a clone of FoundationVision/LlamaGen

Networks of one size with random weights: no time depends on what they have learned. All ways run in one process in
alternating rounds; a ratio is that of one round, so that what else the machine does falls out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from latticode.core.types import Conditioning, Sampling
from latticode.priors import GPT, MaskGIT
from latticode.priors.base import draw, uniforms


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


def llamagen(folder: Path, ours: GPT, count: int, guidance: float) -> Callable[[int], object]:
    """The sampler of LlamaGen at `folder` around a network of the size of `ours`, with random weights too."""
    sys.path.insert(0, str(folder))
    generate = importlib.import_module("autoregressive.models.generate").generate
    module = importlib.import_module("autoregressive.models.gpt")
    sizes = {"dim": ours.width, "n_layer": ours.depth, "n_head": ours.heads, "vocab_size": ours.vocab[0]}
    sizes |= {"num_classes": ours.classes, "block_size": ours.positions, "cls_token_num": 1, "model_type": "c2i"}
    network = module.Transformer(module.ModelArgs(**sizes)).to(ours.device).eval()
    torch.nn.init.normal_(network.output.weight, std=0.02)  # zeros at first
    labels = torch.arange(count, device=ours.device)
    return lambda seed: generate(
        network, labels, ours.positions, cfg_scale=1 + guidance, temperature=1.0, top_k=0, top_p=1.0, sample_logits=True
    )


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
    parser.add_argument("--llamagen", type=Path, help="folder of a clone; both are then LlamaGen's kind of network")
    parser.add_argument("--guidance", type=float, default=0.0, help="of the comparison with LlamaGen")
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
    if options.llamagen:
        llama = GPT([options.vocab], grid, 1000, places="axial", style="llama", **sizes).to(device).eval()
        asked, sampling = Conditioning(torch.arange(count)), Sampling(guidance=options.guidance)
        ways = {
            "llamagen": llamagen(options.llamagen, llama, count, options.guidance),
            "ours": lambda seed: llama.sample(count, asked, sampling=sampling, seed=seed),
        }
    for way in ways.values():
        way(0)  # the first call of each allocates

    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(options.rounds):
        for name in list(ways)[:: 1 if round_ % 2 else -1]:
            times[name].append(seconds(lambda way=ways[name], seed=round_: way(seed), device))
    slow = next(iter(times))
    ratios = {
        f"{slow}_over_{name}": spread([a / b for a, b in zip(times[slow], taken, strict=True)])
        for name, taken in times.items()
        if name != slow
    }
    result = {
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
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
