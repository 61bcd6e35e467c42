"""UViM (Kolesnikov et al. 2022, arXiv 2205.10337): a base model that solves a dense task where a short code guides it,
and an oracle that writes the code because it sees the label.

With FSQ in place of VQ: arXiv 2309.15505, table 2. The code of an image whose label nobody knows comes from a prior
that looks at the image (`latticode.priors.guide`).

B batch, C channels, h x w the grid of patches, m x n the grid of the code, K codes of a position, D width, E width of
the quantizer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.autoencoders.vit import Positions
from latticode.core.modules import described
from latticode.core.pretrained import Pretrained
from latticode.core.types import Guided
from latticode.dense.tasks import Task
from latticode.nn.transformer import Transformer
from latticode.quantizers.base import Quantizer

DROPOUTS = ("random", "prefix", "none", "all")


class UViM(Pretrained):
    """Dense examples (B, 3 + maps, H, W) int to codes (B, m, n, K) int64; image and codes to the output of `task`.

    Oracle: patches of the label, embedded (one-hot maps summed), with those of the image, and positions; a transformer;
    linear interpolation to the grid of the code; a linear map to the quantizer's width. Latents are standardised over
    their channels (a norm without parameters) before codes that follow the latents wherever they are (VQ and its kin),
    and left as they are before those of a fixed grid (FSQ, LFQ, BSQ). Base model: a linear map of the code's latents,
    linear interpolation to the grid of patches, with the image's patches, and positions; a transformer; a linear head
    that starts at zero. A dropped code is a zero vector in place of the latents.

    Args:
        task: what is predicted, with its losses.
        quantizer: any of the library. The paper's is `VQ(4096, 768, decay=0.995, normalize=True, kmeans=False,
            upkeep="split")`, its commitment loss weighed 0; FSQ's is `FSQ([7, 5, 5, 5, 5])`.
        code: m and n; the code's length is m n, whatever the size of the image.
        patch: side of a patch in pixels.
        side: patches along each side of the training images, for the tables of positions.
        width, heads, mlp: of both transformers; `mlp` is hidden width over width.
        oracle_depth, base_depth: blocks.
        oracle_context, base_context: whether the oracle and the base model see the image.
        dropout: of codes, in training (`passing`): "random", "prefix" (the first codes are kept, so that the code tells
            what matters most first), "none"; or "all", at any time: the base model has to do without an oracle.

    Examples:
        >>> from latticode import FSQ
        >>> from latticode.dense.tasks import Depth
        >>> seeded = torch.manual_seed(0)
        >>> small = {"code": (2, 2), "patch": 8, "side": 2, "width": 16, "heads": 2, "oracle_depth": 1, "base_depth": 1}
        >>> model = UViM(Depth(scale=1000.0, bins=8), FSQ([4, 3]), **small).eval()
        >>> scenes = torch.randint(0, 256, (1, 4, 16, 16), dtype=torch.int32)  # RGB and millimetres
        >>> codes = model.encode(scenes)  # by the oracle, which sees the millimetres
        >>> codes.shape
        torch.Size([1, 2, 2, 1])
        >>> model.solve(model.image(scenes), codes).shape  # logits of 8 bins, by RGB and codes alone
        torch.Size([1, 8, 16, 16])
    """

    guides = True  # its codes can only be used beside an image (`latticode.core.types.Coder`)

    def __init__(
        self,
        task: Task,
        quantizer: Quantizer,
        code: Sequence[int] = (16, 16),
        patch: int = 16,
        side: int = 32,
        width: int = 768,
        heads: int = 12,
        mlp: float = 4.0,
        oracle_depth: int = 6,
        base_depth: int = 12,
        oracle_context: bool = True,
        base_context: bool = True,
        dropout: str = "random",
    ):
        super().__init__()
        if len(code) != 2 or min(code) < 1:
            raise ValueError(f"code must be two numbers >= 1, its rows and columns, got {list(code)}")
        if patch < 1:
            raise ValueError(f"patch must be >= 1 pixel, got {patch}")
        if dropout not in DROPOUTS:
            raise ValueError(f"dropout must be one of {', '.join(DROPOUTS)}, got {dropout!r}")
        self.task, self.quantizer, self.code = task, quantizer, [int(n) for n in code]
        self.patch, self.side, self.width, self.heads, self.mlp = patch, side, width, heads, mlp
        self.oracle_depth, self.base_depth = oracle_depth, base_depth
        self.oracle_context, self.base_context, self.dropout = oracle_context, base_context, dropout
        self.adaptive = math.inf in quantizer.reach

        self.label_patches = nn.Conv2d(sum(task.classes) or task.channels, width, patch, stride=patch)
        # Of one-hot maps one channel in each is on: the usual scale, by all channels, would leave next to nothing.
        inputs = patch**2 * (len(task.classes) or task.channels)
        nn.init.normal_(self.label_patches.weight, std=inputs**-0.5)
        self.oracle_image = nn.Conv2d(3, width, patch, stride=patch) if oracle_context else None
        self.oracle_places = Positions(side, width)
        self.oracle = Transformer(width, oracle_depth, heads, mlp)
        self.to_code, self.from_code = nn.Linear(width, quantizer.dim), nn.Linear(quantizer.dim, width)
        self.base_image = nn.Conv2d(3, width, patch, stride=patch) if base_context else None
        self.base_places = Positions(side, width)
        self.base = Transformer(width, base_depth, heads, mlp)
        self.head = nn.Linear(width, task.channels * patch**2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def channels(self) -> int:
        """Of a dense example: RGB and the label maps."""
        return 3 + self.task.maps

    @property
    def vocab(self) -> tuple[int, ...]:
        """The number of codes of each code slot."""
        return self.quantizer.vocab

    @property
    def radix(self) -> tuple[int, ...] | None:
        """Sizes of the digits of every code, if the quantizer has such."""
        return self.quantizer.radix

    @property
    def bits(self) -> float:
        """Bits per position at a uniform distribution of codes."""
        return self.quantizer.bits

    def grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """The grid of the code of examples of `size`, always `code`. Raises ValueError for a size that patches do not
        fill."""
        if len(size) != 2 or any(n < self.patch or n % self.patch for n in size):
            raise ValueError(f"height and width must be multiples of the patch of {self.patch}, got {tuple(size)}")
        return tuple(self.code)

    def image(self, inputs: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1]: what of examples may be seen by whoever does not know the label."""
        self._check(inputs)
        return self.task.image(inputs)

    def encode(self, inputs: Tensor) -> Tensor:
        """Codes (B, m, n, K), by the oracle, of examples (B, 3 + maps, H, W)."""
        return self.quantizer.encode(self._written(inputs))

    def solve(self, image: Tensor, codes: Tensor | None = None) -> Tensor:
        """Output (B, channels of the task, H, W) for `image` (B, 3, H, W) in [-1, 1], guided by `codes` (B, m, n, K);
        None: by none, as if all were dropped.

        Raises ValueError for an image or codes of another shape or type.
        """
        if image.ndim != 4 or image.shape[1] != 3 or not image.is_floating_point():
            raise ValueError(f"expected a float image (B, 3, H, W), got {described(image)}")
        self.grid(image.shape[2:])
        if codes is None or self.dropout == "all":
            latents = image.new_zeros(len(image), *self.code, self.quantizer.dim)
        else:
            expected = (len(image), *self.code, len(self.vocab))
            if tuple(codes.shape) != expected:
                raise ValueError(f"expected codes {expected} for images {tuple(image.shape)}, got {described(codes)}")
            latents = self.quantizer.decode(codes)
        return self._solved(image, latents)

    def forward(self, inputs: Tensor) -> Guided:
        """What the base model gives for examples (B, 3 + maps, H, W) under the oracle's code, some of it dropped in
        training."""
        quantized = self.quantizer(self._written(inputs))
        keep = passing(len(inputs), self.code, self.dropout if self.training else "none", inputs.device)
        if self.dropout == "all":
            keep = torch.zeros_like(keep)
        latents = torch.where(keep[..., None], quantized.latents, 0.0)
        return Guided(self._solved(self.task.image(inputs), latents), quantized.codes, quantized.losses)

    def _written(self, inputs: Tensor) -> Tensor:
        """The latents (B, m, n, E) that the oracle has for examples."""
        self._check(inputs)
        x_BDhw = self.label_patches(self.task.label(inputs))
        if self.oracle_image is not None:
            x_BDhw = x_BDhw + self.oracle_image(self.task.image(inputs))
        x_BhwD = self.oracle_places(x_BDhw.movedim(1, -1))
        x_BhwD = self.oracle(x_BhwD.flatten(1, 2)).unflatten(1, x_BhwD.shape[1:3])
        z_BmnE = self.to_code(resized(x_BhwD, self.code))
        return F.layer_norm(z_BmnE, z_BmnE.shape[-1:]) if self.adaptive else z_BmnE

    def _solved(self, image: Tensor, latents_BmnE: Tensor) -> Tensor:
        h, w = (n // self.patch for n in image.shape[2:])
        x_BhwD = resized(self.from_code(latents_BmnE), (h, w))
        if self.base_image is not None:
            x_BhwD = x_BhwD + self.base_image(image).movedim(1, -1)
        patches = self.head(self.base(self.base_places(x_BhwD).flatten(1, 2)))  # (B, h w, channels patch^2)
        return F.pixel_shuffle(patches.unflatten(1, (h, w)).movedim(-1, 1), self.patch)

    def _check(self, inputs: Tensor) -> None:
        if inputs.ndim != 4 or inputs.shape[1] != self.channels or inputs.is_floating_point():
            shape = f"(B, {self.channels}, H, W), RGB and {self.task.maps} label maps"
            raise ValueError(f"expected integer examples {shape}, got {described(inputs)}")
        self.grid(inputs.shape[2:])


def passing(count: int, code: Sequence[int], dropout: str, device: torch.device | None = None) -> Tensor:
    """Which codes of `count` images pass: (count, m, n) bool. Draws from torch's global generators.

    Importances of n codes fall along the code, n/(n+1), .., 1/(n+1), and those above t ~ U[0, 1), drawn for each image,
    pass: "prefix". So of an image any number of codes from 0 to n pass, each number as likely. "random": the same,
    shuffled. "none": all pass.
    """
    length = math.prod(code)
    if dropout not in ("random", "prefix"):
        return torch.ones(count, *code, dtype=torch.bool, device=device)
    keep_BN = torch.linspace(1, 0, length + 2, device=device)[1:-1] > torch.rand(count, 1, device=device)
    if dropout == "random":
        keep_BN = keep_BN.gather(1, torch.rand(count, length, device=device).argsort(1))
    return keep_BN.view(count, *code)


def resized(x_BhwD: Tensor, size: Sequence[int]) -> Tensor:
    """(B, *size, D) by linear interpolation along both axes, cell centres at halves; where it shrinks, the mean under a
    triangle as wide as two new cells."""
    for axis, new in enumerate(size, start=1):
        if (old := x_BhwD.shape[axis]) != new:
            centre = (torch.arange(new, device=x_BhwD.device) + 0.5) * (old / new) - 0.5
            distance = (centre[:, None] - torch.arange(old, device=x_BhwD.device)).abs() / max(old / new, 1.0)
            weight = (1 - distance).clamp(min=0)
            weight = (weight / weight.sum(1, keepdim=True)).to(x_BhwD)
            x_BhwD = (weight @ x_BhwD.movedim(axis, -2)).movedim(-2, axis)
    return x_BhwD
