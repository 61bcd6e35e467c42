"""Run folders as the command line uses them: open what was trained, and score it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from latticode.core import registry
from latticode.core.files import write_text
from latticode.core.pretrained import load_model
from latticode.core.progress import watched
from latticode.core.types import Sampling
from latticode.dense.uvim import UViM
from latticode.engine.checkpoint import STATE
from latticode.engine.config import RunConfig, read_run
from latticode.engine.feed import open_loader
from latticode.engine.finetune import trained_objective
from latticode.engine.objectives import PriorClassificationObjective
from latticode.evaluate import Reference, evaluate_classifier, evaluate_dense, evaluate_prior, evaluate_tokenizer
from latticode.losses.perceptual import LPIPS, FeatureDistance
from latticode.metrics.features import FeatureNetwork
from latticode.priors.base import Prior
from latticode.runs.open import greedy_unless_asked, network_of, note_unused, open_model, open_whole, pick_device


def evaluate(
    run: Path,
    source: str | None = None,
    split: str = "test",
    *,
    own_size: bool = False,
    tile: int | None = None,
    features: str | None = None,
    perceptual: str | None = None,
    classifier: Path | None = None,
    samples: int = 1000,
    limit: int | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    references: dict[str, Reference] | None = None,
    device: str = "auto",
    console: Console,
) -> dict[str, Any]:
    """Score the run on `split` of `source` (default: its own data), write `evaluation.json` and return it.

    `own_size` and `tile` as for encoding and `perceptual`, "lpips" or the folder of a classifier's run, are for
    tokenizers. Runs of dense tasks, of either stage, are scored as `evaluate_dense` says; the codes of stage II are the
    likeliest unless `sampling` is not the default. Calls that share `references` look at a training set only once, and
    do not notice that it changes. Raises ValueError for what does not fit the run.
    """
    config = read_run(run).on(source)
    if config.kind != "tokenizer" and (own_size or perceptual):
        raise ValueError(f"own sizes and perceptual distances are of tokenizers; {run} is the run of a {config.kind}")
    place = pick_device(device)
    if config.kind == "tokenizer":
        loader = open_whole(config, config.data.source, split, own_size=own_size)
    else:
        loader = open_loader(config, split, batch_size=64)
    network = None
    if features is not None:
        network = network_of(features, place)
    protocol = {
        "source": config.data.source,
        "split": split,
        "preprocessing": loader.preprocess.record(),
        "augmentation": "none: nothing is flipped, and of crop 'random' the centred window is taken",
        "ema": config.ema,
        "run": run.name,
    }
    model = load_model(run).to(place)
    coder = load_model(run / "tokenizer").to(place) if config.kind == "prior" else model
    dense = isinstance(coder, UViM)
    if dense and (own_size or perceptual or tile or classifier):
        raise ValueError(f"own sizes, tiles, perceptual distances and classifiers are not for dense tasks, as of {run}")
    if config.kind == "prior":
        sampling = greedy_unless_asked(sampling) if dense else sampling
        note_unused(model, sampling, console)
    with watched(console, f"evaluate {run.name}") as watch:
        shared: dict[str, Any] = {"limit": limit, "protocol": protocol, "progress": watch}
        if dense:
            prior = model if config.kind == "prior" else None
            result = evaluate_dense(
                coder, loader, prior=prior, sampling=sampling, seed=seed, features=network, **shared
            )
        elif config.kind == "tokenizer":
            eyes = None
            if perceptual is not None:
                eyes = (LPIPS() if perceptual == "lpips" else FeatureDistance(perceptual)).to(place)
            result = evaluate_tokenizer(model, loader, features=network, perceptual=eyes, tile=tile, **shared)
        elif config.kind == "classifier":
            result = evaluate_classifier(model, loader, **shared)
        else:
            result = evaluate_prior(
                model,
                coder,
                loader,
                features=network,
                reference=_reference(config, network, {} if references is None else references) if network else None,
                classifier=open_model(classifier, "classifier", device)[1] if classifier else None,
                samples=samples,
                sampling=sampling,
                seed=seed,
                label_of=_head(run, config, model),
                **shared,
            )
    write_text(run / "evaluation.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def _reference(config: RunConfig, network: FeatureNetwork, known: dict[str, Reference]) -> Reference:
    key = f"{network.weights} {config.data.model_dump_json()}"
    if key not in known:
        known[key] = Reference(open_loader(config, "train", batch_size=64))
    return known[key]


def _head(run: Path, config: RunConfig, prior: Prior) -> Callable[[Tensor], Tensor] | None:
    """Codes to logits of labels, where a prior was trained with a head and the training's state is still there."""
    trained = issubclass(registry.resolve(config.objective["type"]), PriorClassificationObjective)
    if not trained or not (run / STATE).is_file():
        return None
    return partial(trained_objective(run, config).to(prior.device).classify, prior)
