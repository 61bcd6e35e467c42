"""Metrics: pixels (PSNR, SSIM), audio, video, codes (usage, dead codes, perplexity), features (rFID, gFID), dense."""

from latticode.metrics.audio import AudioMetrics
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
from latticode.metrics.video import VideoMetrics

__all__ = [
    "AudioMetrics",
    "Classifier",
    "CodeStatistics",
    "FeatureNetwork",
    "FeatureNetworkError",
    "FeatureSample",
    "FeatureStatistics",
    "PixelMetrics",
    "VideoMetrics",
    "entropy_bits",
    "feature_network",
    "frechet_distance",
    "precision_recall",
]
