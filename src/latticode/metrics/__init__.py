"""Metrics: pixels (PSNR, SSIM), codes (usage, perplexity), features (Fréchet distance, precision and recall)."""

from latticode.metrics.classifier import Classifier
from latticode.metrics.codes import CodeStatistics, entropy_bits
from latticode.metrics.features import (
    FeatureNetwork,
    FeatureNetworkError,
    FeatureSample,
    FeatureStatistics,
    feature_network,
    frechet_distance,
    precision_recall,
)
from latticode.metrics.pixels import PixelMetrics

__all__ = [
    "Classifier",
    "CodeStatistics",
    "FeatureNetwork",
    "FeatureNetworkError",
    "FeatureSample",
    "FeatureStatistics",
    "PixelMetrics",
    "entropy_bits",
    "feature_network",
    "frechet_distance",
    "precision_recall",
]
