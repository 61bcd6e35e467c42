"""Evaluation of loaded models on loaded data, on one process: every number with its protocol, ready for JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode import tiling
from latticode.data.loading import Loader
from latticode.data.media import AUDIO, IMAGE, Medium
from latticode.losses.perceptual import Perceptual
from latticode.metrics.classifier import Classifier
from latticode.metrics.codes import CodeStatistics
from latticode.metrics.features import FeatureNetwork, FeatureSample, FeatureStatistics, precision_recall
from latticode.outputs import metrics_of, seconds_of
from latticode.priors.base import Prior
from latticode.tokenizer import Tokenizer
from latticode.types import Batch, Conditioning, Sampling
from latticode.values import rounded

Progress = Callable[[int, int], None]  # images done, images in all

NEIGHBOURS = 3  # k of precision and recall
REFERENCE = 10_000  # images at most of the reference set of precision and recall, as in ADM's evaluation suite


def evaluate_tokenizer(
    tokenizer: Tokenizer,
    loader: Loader,
    *,
    features: FeatureNetwork | None = None,
    reference: Loader | None = None,
    perceptual: Perceptual | None = None,
    tile: int | None = None,
    limit: int | None = None,
    protocol: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Reconstruct what `loader` yields and measure it, the codes and, with a feature network, the reconstruction FID.

    Args:
        tokenizer: any; what it returns is compared after rounding to 8 bits (sound: 16).
        loader: images, recordings or clips; one ordered pass over them is made, without augmentation.
        features: names the key `rfid_<name>`.
        reference: a loader of the images that the reconstructions' FID is taken against (the FSQ paper: the training
            set); without it, the originals of the same images.
        perceptual: its mean distance over the images, rounded to 8 bits, is the key `perceptual_<kind>`.
        tile: images longer than this are reconstructed in tiles, see `tiling.encode`.
        limit: stop after this many images.
        protocol: what the caller knows and the numbers depend on: resize filter, crop, EMA on or off, name of the set.
        progress: called with the images done and the images in all.

    Returns psnr, psnr_pooled (dB), ssim, exact for images; for clips also temporal_error and temporal_change; for sound
    si_sdr (dB), mel_distance, stft_distance. Then usage, perplexity, entropy_bits, dead, invalid, slots;
    bits_per_token, bits_per_pixel (not of sound), tokens_per_image or else tokens_per_second and bits_per_second;
    level_histograms (FSQ); rfid_<name>; perceptual_<kind>; count, skipped, protocol. Tokens of positions that lie
    partly or wholly in padding count, pixels of padding do not. Raises ValueError for a loader without records, a
    network that knows images for anything else, and reconstructions that are not finite.
    """
    medium = loader.preprocess.medium
    for network in (features, perceptual):
        if network is not None and medium is not IMAGE:
            raise ValueError(f"{network.name!r} knows images, not {medium.noun}s")
    metrics, codes = metrics_of(loader.preprocess), CodeStatistics(tokenizer.vocab)
    original, restored = FeatureStatistics(), FeatureStatistics()
    tokens, area, seconds, distance = 0, 0, 0.0, 0.0
    sizes: set[tuple[int, ...]] = set()
    more = _count(reference) if features is not None and reference is not None else 0
    report = _Report(progress, _count(loader, limit) + more)
    with _evaluating(tokenizer, features, perceptual):
        for batch in _batches(loader, limit, report):
            images = batch.inputs.to(_device(tokenizer))
            reconstruction = tiling.reconstruct(tokenizer, images, tile)
            metrics.update(images, reconstruction.output)
            codes.update(reconstruction.codes)
            tokens += reconstruction.codes[..., 0].numel()
            area += images[:, 0].numel()
            seconds += seconds_of(loader.preprocess, images)
            sizes.add(tuple(images.shape[1:]))
            if perceptual is not None:
                distance += len(images) * float(perceptual(rounded(reconstruction.output), rounded(images)))
            if features is not None:
                restored.update(_features(features, reconstruction.output))
                if reference is None:
                    original.update(_features(features, images))
        if features is not None and reference is not None:
            for batch in _batches(reference, None, report):
                original.update(_features(features, batch.inputs))
    cut = tile or (tiling.TILE if medium is IMAGE else math.inf)
    result = metrics.compute()
    count = result.pop("count")
    result |= codes.compute()
    del result["positions"]
    result["bits_per_token"] = tokenizer.bits
    result |= _rates(tokenizer.bits * tokens, medium, area, seconds)
    result |= {"tokens_per_second": tokens / seconds} if seconds else {"tokens_per_image": tokens / count}
    levels: Any = getattr(tokenizer.quantizer, "levels", None)
    if levels is not None and tokenizer.vocab == tokenizer.quantizer.vocab:  # not of the upper grids, if any
        result["level_histograms"] = codes.level_histograms(levels)
    if features is not None:
        result[f"rfid_{features.name}"] = restored.distance(original)
    if perceptual is not None:
        result[f"perceptual_{perceptual.kind}"] = distance / count
    return result | {
        "count": count,
        "skipped": len(loader.skipped),
        "protocol": {
            **metrics.protocol,
            "usage": f"share of the codewords that appear at least once over all {count} {medium.noun}s",
            "bits_per_token": "log2 of the vocabulary, per grid position",
            f"{medium.noun}s": count,
            "sizes": [list(size) for size in sorted(sizes)],
            **_feature_protocol(features, original, "the originals" if reference is None else "the reference set"),
            **({} if perceptual is None else {"perceptual": perceptual.name}),
            **({"tile": cut} if any(max(size[1:]) > cut for size in sizes) else {}),
            **(protocol or {}),
        },
    }


def evaluate_prior(
    prior: Prior,
    tokenizer: Tokenizer,
    loader: Loader,
    *,
    sampling: Sampling,
    seed: int = 0,
    samples: int = 1000,
    features: FeatureNetwork | None = None,
    reference: Loader | None = None,
    classifier: Classifier | None = None,
    batch_size: int = 100,
    limit: int | None = None,
    protocol: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compression cost on the held-out images of `loader`, and the quality of samples.

    Args:
        prior: gets the label as its condition where it knows classes.
        tokenizer: the one whose codes the prior was trained on.
        loader: held-out (test) images with labels.
        samples: how many to draw, their labels balanced over the classes; `seed` fixes them for any `batch_size`.
        features: names the keys `fid_<name>`, `precision_<name>`, `recall_<name>`; needs `reference`.
        reference: a loader of the training set. The held-out images are measured against it like the samples, by as
            many of them as there are samples if there are, because the number of images biases these numbers.
        classifier: judges whether a sample shows the label asked for. Better not the network behind `features`.
        limit: stop after this many held-out images.

    Returns compression_cost (bits per token: mean over tokens of -log2 p), compression_cost_uniform (log2 of the
    vocabulary), bits_per_pixel, bits_per_second (as for tokenizers); fid_, precision_, recall_<name> and the same with
    `_real`; label_accuracy and label_accuracy_real; samples, samples_per_second; count, skipped, protocol. Raises
    ValueError for options that do not fit each other and for a loader without images.
    """
    classes, device, uniform = int(prior.classes), _device(tokenizer), tokenizer.bits
    _check(samples, batch_size, classes, features, reference, classifier)
    more = _count(reference) if features is not None and reference is not None else 0
    report = _Report(progress, _count(loader, limit) + more + samples)
    real, drawn = _Judge(features, classifier, samples), _Judge(features, classifier, samples)
    training, training_sample = FeatureStatistics(), FeatureSample(REFERENCE)
    bits = seconds = duration = 0.0  # seconds that sampling took, seconds of what was held out
    tokens = area = count = 0
    size: tuple[int, ...] = ()
    with _evaluating(prior, tokenizer, features, classifier):
        for batch in _batches(loader, limit, report):
            images, labels = batch.inputs.to(device), batch.labels.to(device)
            codes = tokenizer.encode(images)
            bits += float(prior.bits(codes, Conditioning(labels) if classes else None).double().sum())
            size = tuple(images.shape[2:])
            tokens, area = tokens + codes[..., 0].numel(), area + images[:, 0].numel()
            duration += seconds_of(loader.preprocess, images)
            count += len(images)
            real.update(images, labels)
        if not count:
            raise ValueError("the loader of held-out images holds none")
        if features is not None and reference is not None:
            for batch in _batches(reference, None, report):
                rows = _features(features, batch.inputs)
                training.update(rows)
                training_sample.update(rows)
        for first in range(0, samples, batch_size):
            labels = torch.arange(first, min(first + batch_size, samples), device=device)
            labels = labels % classes if classes else torch.full_like(labels, -1)
            start = time.perf_counter()
            condition = Conditioning(labels) if classes else None
            codes = prior.sample(len(labels), condition, sampling=sampling, seed=seed, first=first)
            images = tokenizer.decode(codes, size=size)
            _synchronize(device)
            seconds += time.perf_counter() - start
            drawn.update(images, labels)
            report(len(labels))
    result: dict[str, Any] = {
        "compression_cost": bits / tokens,
        "compression_cost_uniform": uniform,
        **_rates(bits, loader.preprocess.medium, area, duration),
    }
    facts: dict[str, Any] = {}
    if features is not None:
        for suffix, judge in (("", drawn), ("_real", real)):
            rows = judge.sample.features
            statistics = FeatureStatistics()
            statistics.update(rows)
            result[f"fid_{features.name}{suffix}"] = statistics.distance(training)
            pair = precision_recall(training_sample.features, rows, NEIGHBOURS)
            result[f"precision_{features.name}{suffix}"], result[f"recall_{features.name}{suffix}"] = pair
        facts = _feature_protocol(features, training, "the training set") | {
            "real_images": len(real.sample.features),
            "precision_recall": f"k = {NEIGHBOURS}, {len(training_sample.features)} reference images",
        }
    if classifier is not None:
        result |= {"label_accuracy": drawn.accuracy(), "label_accuracy_real": real.accuracy()}
    return result | {
        "samples": samples,
        "samples_per_second": samples / seconds,
        "count": count,
        "skipped": len(loader.skipped),
        "protocol": {
            "compression_cost": "mean over positions of -log2 p in the prior's own decoding order, given the label",
            "samples": samples,
            "labels": f"balanced over {classes} classes" if classes else "none",
            "sampling": vars(sampling),
            "seed": seed,
            "round": True,
            "images": count,
            "size": list(size),
            **facts,
            **(protocol or {}),
        },
    }


def evaluate_classifier(
    classifier: Classifier,
    loader: Loader,
    *,
    limit: int | None = None,
    protocol: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """How often the classifier is right about the labelled images of `loader`.

    Returns accuracy, cross_entropy (nats per image), count (labelled images), skipped, protocol. Raises ValueError for
    a loader without labelled images.
    """
    report = _Report(progress, _count(loader, limit))
    right = count = 0
    nats = 0.0
    with _evaluating(classifier):
        for batch in _batches(loader, limit, report):
            known = batch.labels >= 0
            labels = batch.labels[known].to(_device(classifier))
            logits = classifier(batch.inputs[known].to(labels.device))
            right += int((logits.argmax(1) == labels).sum())
            nats += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
            count += len(labels)
    if not count:
        raise ValueError("the loader holds no labelled images")
    return {
        "accuracy": right / count,
        "cross_entropy": nats / count,
        "count": count,
        "skipped": len(loader.skipped),
        "protocol": {"images": count, **(protocol or {})},
    }


def _rates(bits: float, medium: Medium, area: int, seconds: float) -> dict[str, float]:
    """`bits` per pixel, but not of sound, and per second, but not of images."""
    per_pixel = {} if medium is AUDIO else {"bits_per_pixel": bits / area}
    return per_pixel | ({"bits_per_second": bits / seconds} if seconds else {})


def _check(
    samples: int,
    batch_size: int,
    classes: int,
    features: FeatureNetwork | None,
    reference: Loader | None,
    classifier: Classifier | None,
) -> None:
    least = NEIGHBOURS + 1 if features is not None else 1
    if samples < least or batch_size < 1:
        raise ValueError(f"samples must be >= {least} and batch_size >= 1, got {samples} and {batch_size}")
    if features is not None and reference is None:
        raise ValueError(f"FID under {features.name!r} needs a reference: a loader of the training set")
    if classifier is not None and classes and classifier.classes != classes:
        raise ValueError(f"the classifier knows {classifier.classes} classes and the prior {classes}")


class _Report:
    """Adds up what is done and tells the caller."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, number: int) -> None:
        self.done += number
        if self.progress is not None:
            self.progress(self.done, max(self.total, self.done))


class _Judge:
    """Looks at images as they are after rounding to 8 bits: their features, and whether they show their label."""

    def __init__(self, features: FeatureNetwork | None, classifier: nn.Module | None, size: int):
        self.features, self.classifier, self.sample = features, classifier, FeatureSample(size)
        self.right = self.count = 0

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Images (B, C, H, W) that should show `labels` (B,); a label of -1 is not judged."""
        if self.features is not None:
            self.sample.update(_features(self.features, images))
        if self.classifier is not None:
            known = labels >= 0
            guesses = self.classifier(rounded(images[known]).to(_device(self.classifier))).argmax(1)
            self.right += int((guesses == labels[known].to(guesses.device)).sum())
            self.count += int(known.sum())

    def accuracy(self) -> float | None:
        return self.right / self.count if self.count else None


@contextmanager
def _evaluating(*modules: Any) -> Iterator[None]:
    """Eval mode and inference mode inside; every submodule's own mode is put back afterwards."""
    roots = [m for m in modules if isinstance(m, nn.Module)]
    modes = [(m, m.training) for root in roots for m in root.modules()]
    try:
        for root in roots:
            root.eval()
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _batches(loader: Loader, limit: int | None, report: _Report) -> Iterator[Batch]:
    """The batches of one epoch, cut off after `limit` images; each is reported once it has been used."""
    left = limit
    iterator = iter(loader.epoch())
    try:
        while left is None or left > 0:
            batch = next(iterator, None)
            if batch is None:
                break
            if left is not None:
                batch = Batch(batch.inputs[:left], batch.labels[:left], batch.indices[:left])
                left -= len(batch.inputs)
            yield batch
            report(len(batch.inputs))
    finally:
        if close := getattr(iterator, "close", None):  # a loader's threads end now, not at the next collection
            close()


def _features(network: FeatureNetwork, images: Tensor) -> Tensor:
    return network(images.to(_device(network)))


def _feature_protocol(network: FeatureNetwork | None, statistics: FeatureStatistics, name: str) -> dict[str, Any]:
    if network is None:
        return {}
    return {"feature_network": network.name, "reference": name, "reference_images": statistics.count}


def _device(module: Any) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _count(loader: Loader, limit: int | None = None) -> int:
    """The images of one pass; of a stream only the limit is known."""
    if loader.streaming:
        return limit or 0
    count = len(loader.order.shard())
    return count if limit is None else min(count, limit)
