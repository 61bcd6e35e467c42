"""Scores of a prior: negative log-likelihood in bits per token; gFID, precision, recall and labels of its samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from latticode.core.modules import device_of, evaluating, synchronize
from latticode.core.pretrained import weights_digest
from latticode.core.types import Sampling, first_texts
from latticode.core.values import rounded
from latticode.data.loading import Loader
from latticode.data.passes import Progress, Report, batches_of, count_of
from latticode.evaluate.captions import PROTOCOL, HeldOut
from latticode.evaluate.common import feature_protocol, features_of, rates
from latticode.metrics.classifier import Classifier
from latticode.metrics.features import FeatureNetwork, FeatureSample, FeatureStatistics, precision_recall
from latticode.priors.base import Prior
from latticode.tokenizers.tokenizer import Tokenizer

NEIGHBOURS = 3  # k of precision and recall
REFERENCE = 10_000  # images at most of the reference set of precision and recall, as in ADM's evaluation suite


class Reference:
    """The training images, which samples are measured against. Evaluations that share one look at them only once.

    It does not notice that images change.

    Examples:
        >>> from latticode.data import Loader, Preprocess, open_source
        >>> loader = Loader(open_source("embedded:photos", "test"), Preprocess(size=16), 10, workers=0)
        >>> reference = Reference(loader)
        >>> reference.left == len(loader.source)  # images to look at, which `evaluate_prior` does once
        True
    """

    statistics: FeatureStatistics
    sample: FeatureSample

    def __init__(self, loader: Loader):
        self.loader, self.weights = loader, ""  # of the network that looked

    @property
    def left(self) -> int:
        """How many images there are still to look at."""
        return 0 if self.weights else count_of(self.loader)

    def look(self, features: FeatureNetwork, report: Report) -> None:
        """Take the features, if that is not done yet. Raises ValueError if another network's were taken."""
        if self.weights not in ("", features.weights):
            raise ValueError(f"the reference holds features of another network than {features.name!r}")
        if not self.weights:
            statistics, sample = FeatureStatistics(), FeatureSample(REFERENCE)
            for batch in batches_of(self.loader, None, report):
                rows = features_of(features, batch.inputs)
                statistics.update(rows)
                sample.update(rows)
            self.statistics, self.sample, self.weights = statistics, sample, features.weights


def evaluate_prior(
    prior: Prior,
    tokenizer: Tokenizer,
    loader: Loader,
    *,
    sampling: Sampling,
    seed: int = 0,
    samples: int = 1000,
    features: FeatureNetwork | None = None,
    reference: Reference | None = None,
    classifier: Classifier | None = None,
    label_of: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 100,
    limit: int | None = None,
    protocol: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Negative log-likelihood of the held-out images of `loader` in bits per token, and the quality of samples.

    Args:
        prior: gets the label as its condition where it knows classes, and the first caption where it reads text.
        tokenizer: the one whose codes the prior was trained on.
        loader: held-out (test) images with labels.
        samples: how many to draw, their labels balanced over the classes; `seed` fixes them for any `batch_size`. A
            prior that reads text gets the captions of the held-out images, and is scored by those images' labels.
        features: names the keys `fid_<name>` (gFID), `precision_<name>`, `recall_<name>`; needs `reference`.
        reference: of the training set. The held-out images are measured against it like the samples, by as many of them
            as there are samples if there are, because the number of images biases these numbers.
        classifier: tells whether a sample shows its class. Better not the network behind `features`.
        label_of: codes to logits of their labels, of a prior that was fine-tuned to classify; gives the key `accuracy`.
        limit: stop after this many held-out images.

    Returns compression_cost (negative log-likelihood in bits per token: the mean over tokens of -log2 p),
    compression_cost_uniform (log2 of the vocabulary), bits_per_pixel, bits_per_second (as for tokenizers); fid_,
    precision_, recall_<name> and the same with `_real`; label_accuracy, label_accuracy_shuffled (what it would be on
    average if the samples' labels were shuffled), label_accuracy_real; of a prior that reads text caption_gain_bits
    (per image), caption_accuracy, caption_images (see the protocol); samples, samples_per_second; count, skipped,
    protocol. Raises ValueError for options that do not fit each other and for a loader without images.
    """
    classes, device, uniform = int(prior.classes), device_of(tokenizer), tokenizer.bits
    _check(samples, batch_size, classes, features, reference, classifier)
    more = reference.left if features is not None and reference is not None else 0
    held_out = None if prior.text is None else HeldOut(prior, seed)
    more += count_of(loader, limit) if held_out else 0
    report = Report(progress, count_of(loader, limit) + more + samples)
    real, drawn = _Judge(features, classifier, samples), _Judge(features, classifier, samples)
    bits = seconds = duration = 0.0  # seconds that sampling took, seconds of what was held out
    tokens = area = count = right = labelled_images = 0
    size: tuple[int, ...] = ()
    with evaluating(prior, tokenizer, features, classifier):
        for batch in batches_of(loader, limit, report):
            images, labels = batch.inputs.to(device), batch.labels.to(device)
            codes = tokenizer.encode(images)
            cost = prior.bits(codes, prior.condition(labels, first_texts(batch.texts, len(labels)))).double()
            bits += float(cost.sum())
            if held_out:
                held_out.add(codes, labels, batch.texts, cost)
            size = tuple(images.shape[2:])
            tokens, area = tokens + codes[..., 0].numel(), area + images[:, 0].numel()
            duration += loader.preprocess.seconds(images)
            count += len(images)
            real.update(images, labels)
            if label_of is not None:
                known = labels >= 0
                right += int((label_of(codes[known]).argmax(1) == labels[known]).sum())
                labelled_images += int(known.sum())
        if not count:
            raise ValueError("the loader of held-out images holds none")
        if features is not None and reference is not None:
            reference.look(features, report)
        for first in range(0, samples, batch_size):
            labels, texts = torch.arange(first, min(first + batch_size, samples)), ()
            if held_out:
                labels, texts = held_out.asked(first, len(labels))
            else:
                labels = labels % classes if classes else torch.full_like(labels, -1)
            labels = labels.to(device)
            start = time.perf_counter()
            cond = prior.condition(labels, texts)
            codes = prior.sample(len(labels), cond, sampling=sampling, seed=seed, first=first)
            images = tokenizer.decode(codes, size=size)
            synchronize(device)
            seconds += time.perf_counter() - start
            drawn.update(images, labels)
            report(len(labels))
        captions = held_out.scores(batch_size, device, report) if held_out else {}
    result: dict[str, Any] = {
        "compression_cost": bits / tokens,
        "compression_cost_uniform": uniform,
        **rates(bits, loader.preprocess.medium, area, duration),
        **captions,
    }
    labelled = f"balanced over {classes} classes" if classes else "none"
    if held_out:
        labelled = "of the held-out images whose captions are asked for, in a random order"
    facts: dict[str, Any] = {}
    if features is not None and reference is not None:
        for suffix, judge in (("", drawn), ("_real", real)):
            rows = judge.sample.features
            statistics = FeatureStatistics()
            statistics.update(rows)
            result[f"fid_{features.name}{suffix}"] = statistics.distance(reference.statistics)
            pair = precision_recall(reference.sample.features, rows, NEIGHBOURS)
            result[f"precision_{features.name}{suffix}"], result[f"recall_{features.name}{suffix}"] = pair
        facts = feature_protocol(features, reference.statistics, "the training set") | {
            "real_images": len(real.sample.features),
            "precision_recall": f"k = {NEIGHBOURS}, {len(reference.sample.features)} reference images",
        }
    if labelled_images:
        result["accuracy"] = right / labelled_images
    if classifier is not None:
        result["label_accuracy"], result["label_accuracy_shuffled"] = drawn.accuracy()
        result["label_accuracy_real"], _ = real.accuracy()
        facts["classifier_weights"] = weights_digest(classifier)[:16]
    return result | {
        "samples": samples,
        "samples_per_second": samples / seconds,
        "count": count,
        "skipped": len(loader.skipped),
        "protocol": {
            "compression_cost": "mean over positions of -log2 p in the prior's own decoding order, given the label"
            + (" and the first caption" if held_out else ""),
            "samples": samples,
            "labels": labelled,
            **(PROTOCOL if held_out else {}),
            "sampling": vars(sampling),
            "seed": seed,
            "round": True,
            "images": count,
            "size": list(size),
            **facts,
            **(protocol or {}),
        },
    }


def _check(
    samples: int,
    batch_size: int,
    classes: int,
    features: FeatureNetwork | None,
    reference: Reference | None,
    classifier: Classifier | None,
) -> None:
    least = NEIGHBOURS + 1 if features is not None else 1
    if samples < least or batch_size < 1:
        raise ValueError(f"samples must be >= {least} and batch_size >= 1, got {samples} and {batch_size}")
    if features is not None and reference is None:
        raise ValueError(f"FID under {features.name!r} needs a reference: that of the training set")
    if classifier is not None and classes and classifier.classes != classes:
        raise ValueError(f"the classifier knows {classifier.classes} classes and the prior {classes}")


class _Judge:
    """Looks at images as they are after rounding to 8 bits: their features, and whether they show their label."""

    def __init__(self, features: FeatureNetwork | None, classifier: nn.Module | None, size: int):
        self.features, self.classifier, self.sample = features, classifier, FeatureSample(size)
        self.guesses: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, images: Tensor, labels: Tensor) -> None:
        """Images (B, C, H, W) that should show `labels` (B,); a label of -1 is not judged."""
        if self.features is not None:
            self.sample.update(features_of(self.features, images))
        if self.classifier is not None:
            known = labels >= 0
            guesses = self.classifier(rounded(images[known]).to(device_of(self.classifier))).argmax(1)
            self.guesses.append(guesses.cpu())
            self.labels.append(labels[known].cpu())

    def accuracy(self) -> tuple[float, float] | tuple[None, None]:
        """The share of guesses that are the label, and its mean over all orders of the labels."""
        guesses, labels = torch.cat(self.guesses), torch.cat(self.labels)
        if not len(guesses):
            return None, None
        size = int(torch.cat([guesses, labels]).max()) + 1
        shares = [torch.bincount(column, minlength=size) / len(column) for column in (guesses, labels)]
        return float((guesses == labels).double().mean()), float((shares[0].double() * shares[1]).sum())
