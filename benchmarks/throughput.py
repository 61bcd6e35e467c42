"""Images per second of training, encoding and sampling, the quantizer's share, and what the engine costs.

    python benchmarks/throughput.py data/fashion-mnist > docs/results/throughput.json

Everything is measured in one process, in alternating rounds; compare ratios, since absolute times drift with the
machine. The engine is compared with a bare PyTorch loop that does the same mathematics (clipping, fused AdamW,
average of weights) on the same images.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from latticode.core.registry import build
from latticode.core.types import Conditioning, Sampling
from latticode.data import Loader, open_source
from latticode.engine import load_config, train
from latticode.engine.config import RunConfig, complete
from latticode.priors.maskgit import MaskGIT
from latticode.tokenizers.dataset import encode

ROUNDS, STEPS, IMAGES = 5, 50, 4096
SLOW_ROUNDS = 3  # of what takes tens of seconds a round
QUIET = Console(quiet=True)


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def configuration(recipe: str, source: str, *more: str) -> RunConfig:
    return load_config(recipe, [f"data.source={source}", f"steps={STEPS}", "picture_every=100000", *more])


def bare(config: RunConfig, images: torch.Tensor) -> None:
    """The same training as `train` does for this configuration, by hand."""
    torch.manual_seed(0)
    model = build(config.model)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=config.optimizer.lr, betas=config.optimizer.betas, fused=True)
    average = [p.detach().clone() for p in parameters]
    for step in range(config.steps):
        batch = images[torch.randint(len(images), (config.batch_size,))]
        result = model(batch)
        loss = (result.output - batch).square().mean()
        loss = loss + sum(config.weights[name] * value for name, value in result.losses.items())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for ours, theirs in zip(average, parameters, strict=True):
                ours.lerp_(theirs, 0.002)
        if step % config.log_every == 0:
            loss.item()


def engine_cost(config: RunConfig, images: torch.Tensor) -> dict[str, Any]:
    """Seconds of the engine's step over the bare loop's, start-up and final checkpoint of both left out."""
    ratios, rates = [], []
    for round_ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            pair: dict[str, float] = {}
            for name in ("bare", "engine") if round_ % 2 else ("engine", "bare"):
                if name == "bare":
                    short = config.model_copy(update={"steps": 10})
                    pair[name] = seconds(lambda: bare(config, images)) - seconds(lambda s=short: bare(s, images))
                else:
                    train(config, Path(folder), console=QUIET)
                    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
                    times = {line["step"]: line["seconds"] for line in lines if "seconds" in line}
                    pair[name] = times[config.steps] - times[10]
        ratios.append(pair["engine"] / pair["bare"])
        rates.append((config.steps - 10) * config.batch_size / pair["engine"])
    return {
        "train_images_per_second": statistics.median(rates),
        "engine_over_bare": statistics.median(ratios),
        "engine_over_bare_range": [min(ratios), max(ratios)],
    }


def quantizer_share(model: Any, images: torch.Tensor) -> float:
    """Share of a training step's forward and backward that goes to the quantizer, by running it on its own inputs."""
    model.train()
    with torch.no_grad():
        latents = model._latents(images).contiguous()

    def whole() -> None:
        result = model(images)
        ((result.output - images).square().mean() + sum(result.losses.values())).backward()

    def part() -> None:
        z = latents.clone().requires_grad_()
        result = model.quantizer(z)
        (result.latents.square().mean() + sum(result.losses.values())).backward()

    whole(), part()
    return statistics.median(seconds(part) / seconds(whole) for _ in range(3 * ROUNDS))


def encoding(model: Any, config: RunConfig) -> dict[str, float]:
    """Rate of the whole `encode` (read, transform, network, write) and its ratio to the network alone."""
    model.eval()
    source = open_source(config.data.source, "test")
    rates, ratios = [], []
    for _ in range(SLOW_ROUNDS):
        loader = Loader(source, config.data.preprocess(), 64, workers=config.data.workers)
        with tempfile.TemporaryDirectory() as folder:
            road = seconds(lambda at=folder, take=loader: encode(model, take, Path(at) / "tokens", console=QUIET))
        batches = list(Loader(source, config.data.preprocess(), 64).epoch())
        with torch.inference_mode():
            network = seconds(lambda take=batches: [model.encode(batch.inputs) for batch in take])
        rates.append(len(source) / road)
        ratios.append(road / network)
    return {"encode_images_per_second": statistics.median(rates), "encode_over_network": statistics.median(ratios)}


def sampling(model: Any) -> dict[str, float]:
    prior = MaskGIT(vocab=model.vocab, grid=[8, 8], classes=10, width=128, depth=6, heads=4).eval()
    cond = Conditioning(torch.arange(64) % 10)
    rates: dict[str, list[float]] = {"sample": [], "sample_guided": []}
    for round_ in range(SLOW_ROUNDS):
        for name, guidance in (("sample", 0.0), ("sample_guided", 2.0)):
            settings = Sampling(guidance=guidance)
            took = seconds(lambda s=settings, i=round_: model.decode(prior.sample(64, cond, sampling=s, seed=i)))
            rates[name].append(64 / took)
    return {f"{name}_images_per_second": statistics.median(values) for name, values in rates.items()}


def main(source: str) -> None:
    results: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "rounds": ROUNDS,
        "load": os.getloadavg()[0],
    }
    for recipe in ("fsq-fashion-mnist", "vq-fashion-mnist"):
        config = configuration(recipe, source, "log_every=10")
        config = complete(config, classes=10)
        loader = Loader(open_source(source, "test"), config.data.preprocess(), IMAGES)
        images = next(iter(loader.epoch())).inputs
        model = build(config.model)
        with torch.no_grad():
            model(images[:256])  # k-means
        result: dict[str, Any] = engine_cost(config, images)
        result["quantizer_share_of_training_step"] = quantizer_share(model, images[: config.batch_size])
        result |= encoding(model, config)
        with torch.inference_mode():
            result |= sampling(model.eval())
        results[recipe] = result
    json.dump(results, sys.stdout, indent=2)


if __name__ == "__main__":
    main(sys.argv[1])
