"""Scores of a classifier: accuracy and cross entropy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

from latticode.core.modules import device_of, evaluating
from latticode.data.loading import Loader
from latticode.data.passes import Progress, Report, batches_of, count_of
from latticode.metrics.classifier import Classifier


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
    report = Report(progress, count_of(loader, limit))
    right = count = 0
    nats = 0.0
    with evaluating(classifier):
        for batch in batches_of(loader, limit, report):
            known = batch.labels >= 0
            labels = batch.labels[known].to(device_of(classifier))
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
