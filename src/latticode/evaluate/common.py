"""Shared by the evaluations: rates per pixel and second, features of images, and the protocol of a feature network."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from latticode.core.modules import device_of
from latticode.data.media import AUDIO, Medium
from latticode.metrics.features import FeatureNetwork, FeatureStatistics


def rates(bits: float, medium: Medium, area: int, seconds: float) -> dict[str, float]:
    """`bits` per pixel, but not of sound, and per second, but not of images."""
    per_pixel = {} if medium is AUDIO else {"bits_per_pixel": bits / area}
    return per_pixel | ({"bits_per_second": bits / seconds} if seconds else {})


def features_of(network: FeatureNetwork, images: Tensor) -> Tensor:
    """Features (B, D) of `images` on the network's device."""
    return network(images.to(device_of(network)))


def feature_protocol(network: FeatureNetwork | None, statistics: FeatureStatistics, name: str) -> dict[str, Any]:
    """What a Frechet distance depends on: network, weights, reference set and its size."""
    if network is None:
        return {}
    about = {"feature_network": network.name, "feature_weights": network.weights}
    return {**about, "reference": name, "reference_images": statistics.count}
