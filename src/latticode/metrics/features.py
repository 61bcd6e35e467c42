"""Fréchet distance (FID), precision and recall over a named feature network.

Of reconstructions against their originals the FID is called rFID, of generated samples against real images gFID.

A feature distance means nothing without its network, so a `FeatureNetwork` carries its name and every number is
reported under it.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latticode.core.pretrained import weights_digest
from latticode.core.values import rounded, to_uint8
from latticode.metrics.classifier import Classifier

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
CHUNK = 2**23  # entries of a block of a distance matrix: 64 MiB in float64


class FeatureNetwork(nn.Module):
    """Images (B, C, H, W), float in [-1, 1] -> features (B, F), under a name. They are rounded to 8 bits first.

    `weights`, a part of their SHA-256, tells networks of one name apart.

    Examples:
        >>> network = FeatureNetwork("classifier", Classifier(classes=10, channels=3, width=4))
        >>> network(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 16])
    """

    def __init__(self, name: str, network: nn.Module):
        """`network` has `features(images)` for float images in [-1, 1]."""
        super().__init__()
        self.name, self.network = name, network.eval().requires_grad_(False)
        self.weights = weights_digest(network)[:16]

    def forward(self, images: Tensor) -> Tensor:
        return self.network.features(rounded(images))  # type: ignore[operator]


class FeatureNetworkError(ValueError):
    """A feature network that cannot be had here; the message says what to install and where to put the weights."""


def feature_network(
    name: str, path: str | Path | None = None, device: torch.device | str | None = None
) -> FeatureNetwork:
    """The feature network `name`, on `device` if given.

    "classifier": the penultimate features of the `Classifier` saved in the folder `path`.
    "inception": the 2048 pooled features of the Inception graph of 2015 that FID is defined on, through torch-fidelity;
    `path` is its weights file, by default where torch-fidelity itself keeps it. Nothing is downloaded.
    Raises ValueError for another name, FeatureNetworkError where the network cannot be had.
    """
    if name == "classifier":
        if path is None:
            raise FeatureNetworkError("the feature network 'classifier' needs the folder of a trained Classifier")
        return FeatureNetwork(name, Classifier.from_pretrained(path)).to(device)
    if name == "inception":
        return FeatureNetwork(name, _Inception(path)).to(device)
    raise ValueError(f"unknown feature network {name!r}; valid: classifier, inception")


class _Inception(nn.Module):
    def __init__(self, path: str | Path | None):
        super().__init__()
        weights = Path(path) if path is not None else Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
        try:
            module: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ImportError:
            module = None
        missing = [
            *([] if module else ["the package torch-fidelity is not installed"]),
            *([] if weights.is_file() else [f"there is no file {weights}"]),
        ]
        if missing:
            raise FeatureNetworkError(
                f"the feature network 'inception' cannot be had: {' and '.join(missing)}. Install "
                f"latticode[perceptual], download {INCEPTION_URL} and put it there, "
                "or use the feature network 'classifier'"
            )
        self.extractor = module.FeatureExtractorInceptionV3("inception", ["2048"], str(weights))

    def features(self, images: Tensor) -> Tensor:
        pixels = to_uint8(images)
        return self.extractor(pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels)[0]


class FeatureStatistics:
    """Streaming mean (F,) and covariance (F, F) of features, in float64, on the CPU.

    Batches are centred before they are added (Chan, Golub & LeVeque 1983), so a large mean costs no precision and the
    split into batches does not matter.

    Examples:
        >>> real, shifted = FeatureStatistics(), FeatureStatistics()
        >>> features = torch.tensor([[0.0], [2.0]])
        >>> real.update(features)
        >>> shifted.update(features + 3)
        >>> real.distance(shifted)
        9.0
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._scatter = torch.zeros(0, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add features (B, F). Raises ValueError for another F and for values that are not finite."""
        features = _matrix(features)
        if not len(features):
            return
        mean = features.mean(0)
        centred = features - mean
        self._add(len(features), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> None:
        """Add what `other` has seen."""
        if other.count:
            self._add(other.count, other._mean, other._scatter)

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.count:
            self.count, self._mean, self._scatter = count, mean, scatter
            return
        if mean.shape != self._mean.shape:
            raise ValueError(f"expected features of width {len(self._mean)}, got {len(mean)}")
        total = self.count + count
        delta = mean - self._mean
        self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.count * count / total)
        self._mean = self._mean + delta * (count / total)
        self.count = total

    def compute(self) -> tuple[Tensor, Tensor]:
        """Mean (F,) and unbiased covariance (F, F). Raises ValueError for fewer than 2 rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, got {self.count}")
        return self._mean, self._scatter / (self.count - 1)

    def distance(self, other: FeatureStatistics) -> float:
        """The Fréchet distance between the two sets."""
        return frechet_distance(*self.compute(), *other.compute())


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) in float64, at least 0 (Heusel et al. 2017, eq. 6).

    The trace of the root is taken as the sum of the singular values of S1^(1/2) S2^(1/2): the same number, and exact
    for singular covariances too, where the eigenvalues of the product S1 S2 lose half of their digits.

    Examples:
        >>> frechet_distance(torch.zeros(2), torch.eye(2), torch.tensor([3.0, 4.0]), torch.eye(2))
        25.0
    """
    mean1, cov1, mean2, cov2 = (t.detach().cpu().double() for t in (mean1, cov1, mean2, cov2))
    if mean1.shape != mean2.shape or cov1.shape != cov2.shape or cov1.shape != (*mean1.shape, *mean1.shape):
        shapes = [tuple(t.shape) for t in (mean1, cov1, mean2, cov2)]
        raise ValueError(f"expected means (F,) and covariances (F, F) of one width, got {shapes}")
    root = torch.linalg.svdvals(_root(cov1) @ _root(cov2)).sum()
    return max(0.0, float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * root))


def _root(cov: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def precision_recall(reference: Tensor, samples: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of `samples` (M, F) against `reference` (N, F).

    Kynkäänniemi et al. 2019, eq. 1 and 2. Each set's manifold is the union of balls around its points that reach to the
    k-th nearest other point of the set. Precision: the share of samples in the manifold of the reference; recall: the
    reverse. Distances are taken block by block, no N x M matrix is held. Raises ValueError unless both sets hold more
    than k points.

    Examples:
        >>> grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
        >>> precision_recall(grid, grid[:8])  # half of the reference: all of it true, and half of it there
        (1.0, 0.75)
    """
    reference, samples = _matrix(reference), _matrix(samples)
    if k < 1 or min(len(reference), len(samples)) <= k:
        raise ValueError(f"k must be >= 1 and below both set sizes {len(reference)} and {len(samples)}, got {k}")
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(f"expected features of one width, got {reference.shape[1]} and {samples.shape[1]}")
    centre = reference.mean(0)  # short vectors keep the distances exact
    reference, samples = reference - centre, samples - centre
    precision = _covered(samples, reference, _radii(reference, k))
    recall = _covered(reference, samples, _radii(samples, k))
    return precision, recall


def _radii(points: Tensor, k: int) -> Tensor:
    """Squared distance (N,) of each of `points` (N, F) to its k-th nearest other."""
    radii = []
    for rows in torch.arange(len(points)).split(max(1, CHUNK // len(points))):
        distances = _squared_distances(points[rows], points)
        distances[torch.arange(len(rows)), rows] = torch.inf
        radii.append(distances.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    """The share of `points` (M, F) that lie in a ball around one of `centres` (N, F) with squared `radii` (N,)."""
    blocks = points.split(max(1, CHUNK // len(centres)))
    return sum(int((_squared_distances(b, centres) <= radii).any(1).sum()) for b in blocks) / len(points)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(M, N) of (M, F) and (N, F) in float64; differences below the rounding error of the expanded square are 0."""
    norms = a.square().sum(1, keepdim=True) + b.square().sum(1)
    squared = norms - 2 * (a @ b.T)
    return squared.where(squared > 1e-13 * norms, 0.0)


class FeatureSample:
    """A uniform random sample of at most `size` of the features that pass by, the same for the same seed and order.

    Examples:
        >>> sample = FeatureSample(size=3)
        >>> for batch in torch.arange(20.0).view(4, 5, 1):  # four batches of five features of width 1
        ...     sample.update(batch)
        >>> sample.features.shape
        torch.Size([3, 1])
    """

    def __init__(self, size: int, seed: int = 0):
        self.size = size
        self.features = torch.zeros(0, 0)  # (n <= size, F)
        self._keys = torch.zeros(0, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)

    def update(self, features: Tensor) -> None:
        """Offer features (B, F): those with the `size` smallest random keys of all stay."""
        keys = torch.rand(len(features), generator=self._generator, dtype=torch.float64)
        features = features.detach().cpu()
        if len(self._keys):
            keys, features = torch.cat([self._keys, keys]), torch.cat([self.features, features])
        if len(keys) > self.size:
            kept = keys.topk(self.size, largest=False).indices
            keys, features = keys[kept], features[kept]
        self._keys, self.features = keys, features


def _matrix(features: Tensor) -> Tensor:
    if features.ndim != 2:
        raise ValueError(f"expected features (B, F), got {tuple(features.shape)}")
    features = features.detach().cpu().double()
    if not features.isfinite().all():
        raise ValueError("features hold values that are not finite")
    return features
