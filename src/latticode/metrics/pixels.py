"""Metrics of image reconstructions: PSNR and SSIM, on the 8-bit images that would be stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from latticode.core.values import to_uint8

CAP = 100.0  # dB. An image that is restored exactly has no finite PSNR: it counts as this, and is counted in `exact`
WINDOW = 11  # px, the Gaussian window of SSIM
STRIP = 2**22  # numbers that are compared at once: large photographs go strip by strip

PROTOCOL: dict[str, Any] = {
    "round": True,
    "psnr": f"mean over images of the image's own PSNR, data range 255, capped at {CAP:g} dB",
    "psnr_pooled": f"PSNR of the mean squared error over all images, data range 255, capped at {CAP:g} dB",
    "ssim": f"Gaussian window {WINDOW}, sigma 1.5, data range 1.0, windows inside the image, mean over channels",
}


def mse_8bit(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Mean squared error (B,) in squared 8-bit steps, float64, of uint8 images (B, C, H, W)."""
    total = images.new_zeros(len(images), dtype=torch.float64)
    for a, b in _strips(images, reconstructions):
        total += (a.double() - b.double()).square().sum((1, 2, 3))
    return total / images[0].numel()


def psnr(mse: Tensor) -> Tensor:
    """10 log10(255^2 / mse) in dB, at most CAP; `mse` in squared 8-bit steps."""
    return (20 * math.log10(255) - 10 * mse.log10()).clamp(max=CAP)


def ssim(images: Tensor, reconstructions: Tensor) -> Tensor:
    """Structural similarity (B,) of uint8 images (B, C, H, W) of at least WINDOW px (Wang et al. 2004, section III.B).

    Averaged over the windows that lie inside the image, as in the paper: torchmetrics averages over padded ones too. In
    float32 (float64 takes 15 times as long on a CPU): good to about 2e-5, the error of a bright flat region.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    margin = WINDOW // 2
    total = images.new_zeros(len(images), dtype=torch.float64)
    for a, b in _strips(images, reconstructions, 2 * margin):
        _, full = structural_similarity_index_measure(
            b.float() / 255, a.float() / 255, data_range=1.0, reduction="none", return_full_image=True
        )
        assert isinstance(full, Tensor)
        total += full[..., margin:-margin, margin:-margin].double().sum((1, 2, 3))
    _, channels, height, width = images.shape
    return total / (channels * (height - 2 * margin) * (width - 2 * margin))


def _strips(images: Tensor, reconstructions: Tensor, shared: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Both (B, C, H, W), some rows at a time, the last `shared` of which come again in the next strip."""
    height = images.shape[2]
    step = max(1, STRIP // (images.numel() // height))
    for start in range(0, height - shared, step):
        rows = slice(start, start + step + shared)
        yield images[:, :, rows], reconstructions[:, :, rows]


class PixelMetrics:
    """Streaming PSNR and SSIM over batches of any size; the split into batches does not change the result.

    Examples:
        >>> metrics = PixelMetrics()
        >>> images = torch.zeros(2, 3, 16, 16)
        >>> metrics.update(images, images + 0.1)
        >>> scores = metrics.compute()
        >>> round(scores["psnr"], 1), scores["ssim"] > 0.9, scores["count"]
        (26.5, True, 2)
    """

    shown = ("psnr", "ssim")  # while training
    protocol = PROTOCOL

    def __init__(self) -> None:
        self.count = 0
        self.exact = 0
        self._psnr = self._mse = self._ssim = 0.0
        self._small = False  # some image was below the SSIM window

    def update(self, images: Tensor, reconstructions: Tensor) -> None:
        """Count images (B, C, H, W), float in [-1, 1], and their reconstructions.

        Raises ValueError for other shapes and for reconstructions that are not finite.
        """
        if images.ndim != 4 or images.shape != reconstructions.shape:
            raise ValueError(
                f"expected images and reconstructions of one shape (B, C, H, W), "
                f"got {tuple(images.shape)} and {tuple(reconstructions.shape)}"
            )
        if not len(images):
            return
        if not reconstructions.isfinite().all():
            raise ValueError("reconstructions hold values that are not finite; they have no PSNR")
        true, restored = to_uint8(images), to_uint8(reconstructions)
        mse = mse_8bit(true, restored)
        self.count += len(images)
        self.exact += int((mse == 0).sum())
        self._psnr += float(psnr(mse).sum())
        self._mse += float(mse.sum())
        if min(images.shape[2:]) < WINDOW:
            self._small = True
        else:
            self._ssim += float(ssim(true, restored).sum())

    def compute(self) -> dict[str, Any]:
        """psnr and psnr_pooled in dB, ssim (None if an image was smaller than the window), count, exact.

        psnr and psnr_pooled are at most CAP; `exact` says how many images are equal to the last 8-bit step. Raises
        ValueError when nothing was counted.
        """
        if not self.count:
            raise ValueError("no images were counted")
        return {
            "psnr": self._psnr / self.count,
            "psnr_pooled": float(psnr(torch.tensor(self._mse / self.count, dtype=torch.float64))),
            "ssim": None if self._small else self._ssim / self.count,
            "count": self.count,
            "exact": self.exact,
        }
