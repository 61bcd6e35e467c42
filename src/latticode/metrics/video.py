"""Metrics of video reconstructions: PSNR and SSIM of every frame, and the error of the changes between frames."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from latticode.core.values import to_uint8
from latticode.metrics import pixels
from latticode.metrics.pixels import PixelMetrics

PROTOCOL: dict[str, Any] = {
    **pixels.PROTOCOL,
    "psnr": pixels.PROTOCOL["psnr"].replace("image", "frame"),
    "psnr_pooled": pixels.PROTOCOL["psnr_pooled"].replace("image", "frame"),
    "temporal_error": "mean |difference| of the changes from frame to frame, 8-bit steps, all frames but the first",
    "temporal_change": "mean |change| from frame to frame of the originals, the temporal error of a standing picture",
}


class VideoMetrics:
    """Streaming PSNR, SSIM and temporal error; every frame counts once, however clips come in batches.

    Examples:
        >>> import torch
        >>> metrics = VideoMetrics()
        >>> clips = torch.zeros(1, 3, 4, 16, 16)  # (B, C, T, H, W)
        >>> metrics.update(clips, clips + 0.1)  # too bright, and as still as the original
        >>> scores = metrics.compute()
        >>> round(scores["psnr"], 1), scores["temporal_error"], scores["frames"], scores["count"]
        (26.5, 0.0, 4, 1)
    """

    shown = ("psnr", "ssim", "temporal_error")
    protocol = PROTOCOL

    def __init__(self) -> None:
        self.frames, self.count = PixelMetrics(), 0
        self._error = self._change = 0.0
        self._steps = 0  # values that have a frame before them

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        """Count clips (B, C, T, H, W), float in [-1, 1], and their reconstructions.

        Raises ValueError for other shapes and for reconstructions that are not finite.
        """
        if inputs.ndim != 5 or inputs.shape != outputs.shape:
            shapes = f"{tuple(inputs.shape)} and {tuple(outputs.shape)}"
            raise ValueError(f"expected clips and reconstructions of one shape (B, C, T, H, W), got {shapes}")
        for true, ours in zip(inputs, outputs, strict=True):  # clip by clip: frames of long clips take memory
            self.frames.update(true.movedim(1, 0), ours.movedim(1, 0))
            change, restored = (to_uint8(x).float().diff(dim=1) for x in (true, ours))
            self._error += float((change - restored).abs().sum())
            self._change += float(change.abs().sum())
            self._steps += change.numel()
        self.count += len(inputs)

    def compute(self) -> dict[str, Any]:
        """psnr and psnr_pooled in dB, ssim, exact (frames), temporal_error and temporal_change in 8-bit steps (None
        without a second frame), frames, count (clips). Raises ValueError when nothing was counted."""
        scores = self.frames.compute()
        return {
            **scores,
            "temporal_error": self._error / self._steps if self._steps else None,
            "temporal_change": self._change / self._steps if self._steps else None,
            "frames": scores["count"],
            "count": self.count,
        }
