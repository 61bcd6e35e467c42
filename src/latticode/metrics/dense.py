"""Metrics of dense tasks: depth estimation, panoptic segmentation, colorization, classes of pixels.

Each is made with `truth`, a function from examples (B, 3 + maps, H, W) to what a perfect prediction would be, at the
size that examples have: `latticode.dense.tasks` has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from latticode.core.values import to_uint8
from latticode.metrics.pixels import PROTOCOL as PIXELS
from latticode.metrics.pixels import PixelMetrics

Truth = Callable[[Tensor], Tensor]


class DepthMetrics:
    """Errors of depth in metres, over the pixels whose true depth is above `low` and below `high`.

    Every number is taken for each image and then averaged over images (as UViM's RMSE); an image without such a pixel
    is left out. `truth`: (B, 1, H, W) metres, 0 where not measured.

    Examples:
        >>> metrics = DepthMetrics(truth=lambda inputs: inputs[:, 3:] / 1000)  # a label map in millimetres
        >>> inputs = torch.full((2, 4, 8, 8), 2000)
        >>> metrics.update(torch.full((2, 1, 8, 8), 2.5), inputs)
        >>> scores = metrics.compute()
        >>> scores["rmse"], scores["abs_rel"], scores["delta1"], scores["count"]
        (0.5, 0.25, 0.0, 2)
    """

    shown = ("rmse", "abs_rel", "delta1")
    names = ("rmse", "abs_rel", "log10", "delta1", "delta2", "delta3")

    def __init__(self, truth: Truth, low: float = 1e-3, high: float = 10.0):
        self.truth, self.low, self.high = truth, low, high
        self.count = 0
        self._sums = torch.zeros(len(self.names), dtype=torch.float64)
        self.protocol = {
            "depth": f"mean over images of each image's own number, over pixels of more than {low:g} and less than "
            f"{high:g} m at the size of the examples",
            "rmse": "m",
            "abs_rel": "|d - t| / t",
            "log10": "|log10 d - log10 t|",
            "delta1": "share of pixels with max(d / t, t / d) < 1.25; delta2, delta3: < 1.25^2, 1.25^3",
        }

    def update(self, prediction: Tensor, inputs: Tensor) -> None:
        """Raises ValueError for predictions (B, 1, H, W) of another shape than the truth and for those not above 0."""
        truth = _same_shape(prediction, self.truth(inputs))
        for found, true in zip(prediction.double(), truth.double(), strict=True):
            valid = (true > self.low) & (true < self.high)
            if not valid.any():
                continue
            d, t = found[valid], true[valid]
            if not (d > 0).all():
                raise ValueError(f"depth must be above 0 m, got a prediction of {float(d.min()):g}")
            ratio = torch.maximum(d / t, t / d)
            numbers = [(d - t).square().mean().sqrt(), ((d - t).abs() / t).mean(), (d.log10() - t.log10()).abs().mean()]
            numbers += [(ratio < 1.25**k).double().mean() for k in (1, 2, 3)]
            self._sums += torch.stack(numbers).cpu()
            self.count += 1

    def compute(self) -> dict[str, Any]:
        """rmse (m), abs_rel, log10, delta1 .. delta3, and count, the images that they are of; None of no images."""
        means = (self._sums / self.count).tolist() if self.count else [None] * len(self.names)
        return {**dict(zip(self.names, means, strict=True)), "count": self.count}


class PanopticMetrics:
    """Panoptic, segmentation and recognition quality (Kirillov et al., arXiv 1801.00868, eq. 1 and 2), by torchmetrics.

    A prediction and the truth are (B, 2, H, W), class and instance. Pixels of a class that is not among `names`, and
    those of things without an instance (0), are void in the truth and ignored; so is a predicted segment that is mostly
    void.

    Args:
        truth: from examples to true classes and instances.
        names: of the classes 0 .. C - 1.
        things: numbers of those that have instances.

    Examples:
        >>> metrics = PanopticMetrics(lambda inputs: inputs[:, 3:], names=["floor", "ball"], things=[1])
        >>> inputs = torch.zeros(1, 5, 8, 8, dtype=torch.int64)
        >>> inputs[:, 3:, :4] = 1  # the upper half is ball number 1
        >>> metrics.update(inputs[:, 3:], inputs)
        >>> metrics.compute()["pq"]
        1.0
    """

    shown = ("pq", "sq", "rq")

    def __init__(self, truth: Truth, names: Sequence[str], things: Sequence[int]):
        from torchmetrics.detection import PanopticQuality

        self.truth, self.names, self.things = truth, tuple(names), sorted(things)
        self.stuff = sorted(set(range(len(names))) - set(things))
        self.count = 0
        self._quality = PanopticQuality(set(self.things), set(self.stuff), return_sq_and_rq=True, return_per_class=True)
        self.protocol = {
            "pq": "panoptic quality at the size of the examples: segments of one class match above an IoU of 0.5, void "
            "is ignored, mean over the classes that occur in the truth or the predictions",
            "sq": "mean IoU of matches",
            "rq": "matches / (matches + half of what is left over on both sides)",
        }

    def update(self, prediction: Tensor, inputs: Tensor) -> None:
        """Raises ValueError for predictions of another shape than the truth."""
        classes, instances = _same_shape(prediction, self.truth(inputs)).cpu().unbind(1)
        lost = torch.isin(classes, torch.tensor(self.things)) & (instances == 0)
        classes = classes.masked_fill(lost, len(self.names))  # which is no class
        self._quality.update(prediction.cpu().movedim(1, -1), torch.stack([classes, instances], -1))
        self.count += len(classes)

    def compute(self) -> dict[str, Any]:
        """pq, sq, rq (0..1), pq_things, pq_stuff, count, and classes: for each class that occurs its pq, sq, rq, and
        how many segments are in the truth (`segments`) and in the predictions (`predicted`). None of no classes."""
        quality = self._quality
        state = (quality.true_positives, quality.false_positives, quality.false_negatives)
        matched, spare, missed = (counts.long() for counts in state)  # type: ignore[operator]
        order = self.things + self.stuff  # of torchmetrics
        rows = quality.compute().reshape(-1, 3)  # (C, 3): pq, sq, rq
        occurs = (matched + spare + missed) > 0
        is_thing = torch.arange(len(order)) < len(self.things)

        def mean(chosen: Tensor, column: int) -> float | None:
            return float(rows[chosen, column].mean()) if chosen.any() else None

        classes = {
            self.names[number]: {
                **dict(zip(("pq", "sq", "rq"), rows[place].tolist(), strict=True)),
                "segments": int(matched[place] + missed[place]),
                "predicted": int(matched[place] + spare[place]),
            }
            for place, number in sorted(enumerate(order), key=lambda pair: pair[1])
            if occurs[place]
        }
        return {
            "pq": mean(occurs, 0),
            "sq": mean(occurs, 1),
            "rq": mean(occurs, 2),
            "pq_things": mean(occurs & is_thing, 0),
            "pq_stuff": mean(occurs & ~is_thing, 0),
            "count": self.count,
            "classes": classes,
        }


class ColorizationMetrics:
    """Of colorization: PSNR against the true colours, and the colourfulness of predictions and originals.

    RGB (B, 3, H, W) in [-1, 1].

    Examples:
        >>> metrics = ColorizationMetrics(truth=lambda inputs: inputs)
        >>> photographs = torch.rand(2, 3, 16, 16) * 2 - 1
        >>> metrics.update(photographs.mean(1, keepdim=True).expand(-1, 3, -1, -1), photographs)  # predicted grey
        >>> scores = metrics.compute()
        >>> scores["colourfulness"], scores["colourfulness_real"] > 50
        (0.0, True)
    """

    shown = ("psnr", "colourfulness")
    protocol: ClassVar = {
        "psnr": PIXELS["psnr"],
        "colourfulness": "M3 of Hasler and Suesstrunk 2003, of the 8-bit picture, mean over images",
        "colourfulness_real": "of the originals",
        "round": True,
    }

    def __init__(self, truth: Truth):
        self.truth = truth
        self._pixels = PixelMetrics()
        self._sums = torch.zeros(2, dtype=torch.float64)

    def update(self, prediction: Tensor, inputs: Tensor) -> None:
        """Raises ValueError for predictions of another shape than the truth and for those that are not finite."""
        truth = _same_shape(prediction, self.truth(inputs))
        self._pixels.update(truth, prediction)
        self._sums += torch.stack([colourfulness(to_uint8(x)).sum().cpu() for x in (prediction, truth)])

    def compute(self) -> dict[str, Any]:
        """psnr (dB), colourfulness, colourfulness_real, count. Raises ValueError when nothing was counted."""
        scores = self._pixels.compute()
        predicted, real = (self._sums / scores["count"]).tolist()
        return {
            "psnr": scores["psnr"],
            "colourfulness": predicted,
            "colourfulness_real": real,
            "count": scores["count"],
        }


class ClassMetrics:
    """The share of pixels that are predicted as a perfect model would; `known` (B, 1, H, W) bool says which count.

    Examples:
        >>> metrics = ClassMetrics(truth=lambda inputs: inputs[:, 3:], known=lambda inputs: inputs[:, 3:] < 255)
        >>> inputs = torch.zeros(1, 4, 2, 2, dtype=torch.int64)
        >>> inputs[0, 3] = torch.tensor([[0, 1], [1, 255]])  # 255: no label
        >>> metrics.update(torch.ones(1, 1, 2, 2, dtype=torch.int64), inputs)
        >>> round(metrics.compute()["accuracy"], 3)
        0.667
    """

    shown = ("accuracy",)
    protocol: ClassVar = {"accuracy": "share of all pixels with a label whose prediction is right"}

    def __init__(self, truth: Truth, known: Truth):
        self.truth, self.known = truth, known
        self.count = self._right = self._pixels = 0

    def update(self, prediction: Tensor, inputs: Tensor) -> None:
        """Raises ValueError for predictions of another shape than the truth."""
        known = self.known(inputs)
        right = (prediction == _same_shape(prediction, self.truth(inputs))).all(1, keepdim=True)
        self._right += int((right & known).sum())
        self._pixels += int(known.sum())
        self.count += len(prediction)

    def compute(self) -> dict[str, Any]:
        """accuracy, None where no pixel had a label, and count, the images."""
        return {"accuracy": self._right / self._pixels if self._pixels else None, "count": self.count}


def colourfulness(images: Tensor) -> Tensor:
    """Colourfulness M3 (B,) float64 of uint8 RGB (B, 3, H, W), 0 of grey: deviation and mean of the opponent colours
    R - G and (R + G) / 2 - B (Hasler & Suesstrunk 2003, Measuring colourfulness in natural images)."""
    red, green, blue = images.double().flatten(2).unbind(1)
    opponent = torch.stack([red - green, (red + green) / 2 - blue])  # (2, B, H W)
    spread, centre = opponent.var(-1, correction=0).sum(0).sqrt(), opponent.mean(-1).square().sum(0).sqrt()
    return spread + 0.3 * centre


def _same_shape(prediction: Tensor, truth: Tensor) -> Tensor:
    if prediction.shape != truth.shape:
        raise ValueError(f"expected predictions {tuple(truth.shape)}, as the truth is, got {tuple(prediction.shape)}")
    return truth
