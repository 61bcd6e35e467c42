"""Reconstruction losses on pixels, by name.

(output, target), both (B, C, H, W) in [-1, 1], to a scalar mean over everything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

PIXEL_TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "mse": F.mse_loss}
