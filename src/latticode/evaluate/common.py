"""What the evaluations share: passes over a loader, progress, and numbers that several of them give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from latticode.data.loading import Loader
from latticode.data.media import AUDIO, Medium
from latticode.metrics.features import FeatureNetwork, FeatureStatistics
from latticode.types import Batch

Progress = Callable[[int, int], None]  # images done, images in all


def rates(bits: float, medium: Medium, area: int, seconds: float) -> dict[str, float]:
    """`bits` per pixel, but not of sound, and per second, but not of images."""
    per_pixel = {} if medium is AUDIO else {"bits_per_pixel": bits / area}
    return per_pixel | ({"bits_per_second": bits / seconds} if seconds else {})


class Report:
    """Adds up what is done and tells the caller."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, number: int) -> None:
        self.done += number
        if self.progress is not None:
            self.progress(self.done, max(self.total, self.done))


@contextmanager
def evaluating(*modules: Any) -> Iterator[None]:
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


def batches_of(loader: Loader, limit: int | None, report: Report) -> Iterator[Batch]:
    """The batches of one epoch, cut off after `limit` images; each is reported once it has been used."""
    left = limit
    iterator = iter(loader.epoch())
    try:
        while left is None or left > 0:
            batch = next(iterator, None)
            if batch is None:
                break
            if left is not None:
                inputs, labels, indices = batch.inputs[:left], batch.labels[:left], batch.indices[:left]
                batch = replace(batch, inputs=inputs, labels=labels, indices=indices, texts=batch.texts[:left])
                left -= len(batch.inputs)
            yield batch
            report(len(batch.inputs))
    finally:
        if close := getattr(iterator, "close", None):  # a loader's threads end now, not at the next collection
            close()


def features_of(network: FeatureNetwork, images: Tensor) -> Tensor:
    return network(images.to(device_of(network)))


def feature_protocol(network: FeatureNetwork | None, statistics: FeatureStatistics, name: str) -> dict[str, Any]:
    if network is None:
        return {}
    about = {"feature_network": network.name, "feature_weights": network.weights}
    return {**about, "reference": name, "reference_images": statistics.count}


def device_of(module: Any) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_of(loader: Loader, limit: int | None = None) -> int:
    """The images of one pass; of a stream only the limit is known."""
    if loader.streaming:
        return limit or 0
    count = len(loader.order.shard())
    return count if limit is None else min(count, limit)
