"""Scores of a dense task (UViM): predictions by the oracle's code (the ceiling), by the prior's, and by none (the
floor)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latticode.core.modules import device_of, evaluating
from latticode.core.types import Sampling
from latticode.data.loading import Loader
from latticode.data.passes import Progress, Report, batches_of, count_of
from latticode.dense.uvim import UViM
from latticode.evaluate.common import feature_protocol, features_of
from latticode.metrics.codes import CodeStatistics
from latticode.metrics.features import FeatureNetwork, FeatureStatistics
from latticode.priors.base import Prior

GREEDY = Sampling(temperature=0.0)
PROTOCOL = {
    "ceiling": "predictions by the code of the oracle, which sees the label",
    "predicted": "predictions by the code that the prior gives for the image alone",
    "floor": "predictions without a code",
    "usage": "share of the codewords that appear at least once in the oracle's codes of all images",
}


def evaluate_dense(
    uvim: UViM,
    loader: Loader,
    *,
    prior: Prior | None = None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    features: FeatureNetwork | None = None,
    limit: int | None = None,
    protocol: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score predictions for the examples of `loader` as `uvim.task` does, at the examples' size.

    Args:
        uvim: the base model, with its oracle.
        loader: dense examples; one ordered pass over them is made, without augmentation.
        prior: of the oracle's codes; without it there is a ceiling and a floor only.
        sampling, seed: how it gives codes; by default the likeliest one after another.
        features: of a task whose prediction is RGB: Fréchet distances of every other picture (the first, the third,
            ...) to the originals of the rest, so that no prediction is compared with its own original.
        limit: stop after this many images.
        protocol: what the caller knows and the numbers depend on.
        progress: called with the images done and the images in all.

    Returns scores, for every metric its numbers by how the code came about (`ceiling`, `predicted`, `floor`; of Fréchet
    distances also `real`, of the originals); of panoptic segments classes, by how and class; usage, perplexity,
    entropy_bits, dead, invalid, slots and, of FSQ, level_histograms of the oracle's codes; bits_per_token,
    tokens_per_image; of a prior compression_cost (bits per token of the oracle's codes) and code_accuracy (share of its
    codes that are the oracle's); count, skipped, protocol. Raises ValueError for a loader without records and for
    features of predictions that are no pictures.
    """
    task, device = uvim.task, device_of(uvim)
    ways = ("ceiling", *(("predicted",) if prior is not None else ()), "floor")
    metrics = {way: task.metrics() for way in ways}
    seen = {way: FeatureStatistics() for way in (*ways, "real", "reference")}
    codes = CodeStatistics(uvim.vocab)
    bits, right, tokens, count = 0.0, 0, 0, 0
    report = Report(progress, count_of(loader, limit))
    with evaluating(uvim, prior, features):
        for batch in batches_of(loader, limit, report):
            inputs = batch.inputs.to(device)
            image, own = uvim.image(inputs), uvim.encode(inputs)
            codes.update(own)
            tokens += own[..., 0].numel()
            guides: dict[str, Tensor | None] = {"ceiling": own, "floor": None}
            if prior is not None:
                cond = prior.condition(images=image)
                bits += float(prior.bits(own, cond).double().sum())
                found = prior.sample(len(own), cond, sampling=sampling, seed=seed, first=count)
                right += int((found == own).sum())
                guides["predicted"] = found
            rest = (torch.arange(count, count + len(inputs)) % 2).bool()
            for way in ways:
                prediction = task.predict(uvim.solve(image, guides[way]), image)
                metrics[way].update(prediction, inputs)
                if features is not None:
                    seen[way].update(features_of(features, _pictures(prediction, features)[~rest]))
            if features is not None:
                originals = task.label(inputs)
                seen["real"].update(features_of(features, originals[~rest]))
                seen["reference"].update(features_of(features, originals[rest]))
            count += len(inputs)
    if not count:
        raise ValueError("the loader holds no examples")
    results = {way: metrics[way].compute() for way in ways}
    kinds = {name: [results[way].pop(name, None) for way in ways] for name in ("classes", "count")}
    scores = {name: {way: results[way][name] for way in ways} for name in results["floor"]}
    facts: dict[str, Any] = {}
    if features is not None:
        distances = {way: seen[way].distance(seen["reference"]) for way in (*ways, "real")}
        scores[f"fid_{features.name}"] = distances
        others = "the originals of every other held-out image, which are not among those predicted"
        facts = feature_protocol(features, seen["reference"], others)
    result: dict[str, Any] = {"scores": scores}
    if kinds["classes"][0] is not None:
        result["classes"] = dict(zip(ways, kinds["classes"], strict=True))
    result |= codes.compute()
    del result["positions"]
    levels = getattr(uvim.quantizer, "levels", None)
    if levels is not None:
        result["level_histograms"] = codes.level_histograms(levels)
    result |= {"bits_per_token": uvim.bits, "tokens_per_image": tokens / count}
    if prior is not None:
        result |= {"compression_cost": bits / tokens, "code_accuracy": right / (tokens * len(uvim.vocab))}
        facts |= {
            "sampling": vars(sampling),
            "seed": seed,
            "compression_cost": "mean over positions of -log2 p, oracle's codes",
        }
    return result | {
        "count": count,
        "skipped": len(loader.skipped),
        "protocol": {
            **metrics["floor"].protocol,
            **{key: text for key, text in PROTOCOL.items() if key in (*ways, "usage")},
            "images": count,
            "scored": kinds["count"][0],
            **facts,
            **(protocol or {}),
        },
    }


def _pictures(prediction: Tensor, features: FeatureNetwork) -> Tensor:
    if prediction.shape[1] != 3 or not prediction.is_floating_point():
        raise ValueError(f"{features.name!r} knows pictures, and the task predicts {tuple(prediction.shape[1:])}")
    return prediction
