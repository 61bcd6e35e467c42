"""Vector quantization (van den Oord et al. 2017, arXiv 1711.00937): each latent vector becomes its nearest code."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from latticode.kernels import nearest_code
from latticode.quantizers.base import Quantizer
from latticode.quantizers.codebook import Codebook
from latticode.quantizers.gradients import straight_through
from latticode.types import Quantized

UPDATES = ("ema", "gradient")


class VQ(Quantizer):
    """A learned codebook of `size` vectors of width `dim`.

    Losses, unweighted: `commitment`, mean (z - sg(q))^2, usually weighed 0.25; with update "gradient" also `codebook`,
    mean (q - sg(z))^2, weighed 1. In training the batch is quantized with the codebook as it is, and only then are the
    averages moved; k-means and restarts come before, so codes always decode to the latents returned with them.

    Args:
        size: K, the number of codes.
        dim: D, the width of latents and codes.
        update: "ema" moves the codes to the running mean of their tokens; "gradient" leaves them to the optimizer.
        decay: of the running averages, per training step, in [0, 1).
        normalize: scale latents and codes to length 1, so that the nearest code is the one of the greatest cosine
            (ViT-VQGAN, arXiv 2110.04627); for low `dim`.
        kmeans: start from k-means over the first training batch; else from N(0, 1).
        restart: a code chosen by fewer tokens, on average, than this fraction of the mean over codes is dead and
            becomes a random token of the batch; in [0, 1), 0 = never. A fraction, since the number of tokens that a
            live code gets depends on batch and codebook size.

    Arithmetic is float32 under any autocast (float64 for a float64 module); latents have z's dtype, `decode` the
    module's. A token with a NaN or infinity has code -1 and NaN latents, gets no gradient, and touches neither losses
    nor codebook. Under torch.distributed all ranks must run each training step; the codebook is that of one process on
    the joined batch. Random draws come from torch's global CPU generator.

    Raises:
        ValueError: for arguments outside the above.
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        update: str = "ema",
        decay: float = 0.99,
        normalize: bool = False,
        kmeans: bool = True,
        restart: float = 0.1,
    ):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"size and dim must be >= 1, got {size} and {dim}")
        if update not in UPDATES:
            raise ValueError(f"update must be one of {', '.join(UPDATES)}, got {update!r}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if not 0 <= restart < 1:
            raise ValueError(f"restart is a fraction of the mean count and must be in [0, 1), got {restart}")
        self.size, self.dim, self.vocab = size, dim, (size,)
        self.update, self.decay, self.normalize, self.kmeans, self.restart = update, decay, normalize, kmeans, restart
        self.embedding = Codebook(
            size, dim, learned=update == "gradient", unit=normalize, decay=decay, initialized=not kmeans
        )

    def forward(self, z: Tensor) -> Quantized:
        """Latents (..., D) in z's dtype, codes (..., 1), and the losses, which are 0 where there is no finite token."""
        self._check_latents(z)
        with torch.autocast(z.device.type, enabled=False):
            x, finite = self._prepare(z)
            tokens = x.detach()[finite] if self.training else None
            if tokens is not None:
                self._maintain(tokens)
            vectors = self.embedding.vectors()
            codes = self._search(x, finite, vectors)
            q = F.embedding(codes.clamp(min=0), vectors)
            losses = {"commitment": _mean_square(x - q.detach(), finite)}
            if self.update == "gradient":
                losses["codebook"] = _mean_square(q - x.detach(), finite)
            latents = straight_through(x, q.masked_fill(~finite[..., None], torch.nan)).to(z.dtype)
            if tokens is not None:
                self.embedding.accumulate(tokens, codes[finite])
            return Quantized(latents, codes[..., None], losses)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        self._check_latents(z)
        with torch.autocast(z.device.type, enabled=False):
            return self._search(*self._prepare(z), self.embedding.vectors())[..., None]

    def decode(self, codes: Tensor) -> Tensor:
        self._check_codes(codes)
        return F.embedding(codes[..., 0].long(), self.embedding.vectors()).to(self.embedding.weight.dtype)

    def _prepare(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens in the codebook's arithmetic (..., D), zero where not finite, and which are finite (...)."""
        x = z.to(torch.promote_types(self.embedding.weight.dtype, torch.float32))
        finite = x.isfinite().all(dim=-1)
        x = torch.where(finite[..., None], x, 0.0)
        return F.normalize(x, dim=-1) if self.normalize else x, finite

    def _search(self, x: Tensor, finite: Tensor, vectors: Tensor) -> Tensor:
        """Codes (...) of tokens (..., D); -1 where not finite."""
        codes = nearest_code(x.reshape(-1, self.dim), vectors).view(finite.shape)
        return codes.masked_fill(~finite, -1)

    def _maintain(self, tokens: Tensor) -> None:
        if not self.embedding.initialized:
            self.embedding.initialize(tokens)
        elif self.restart > 0:
            self.embedding.revive(tokens, self.restart)

    def extra_repr(self) -> str:
        return (
            f"update={self.update!r}, decay={self.decay}, normalize={self.normalize}, "
            f"kmeans={self.kmeans}, restart={self.restart}"
        )


def _mean_square(difference: Tensor, finite: Tensor) -> Tensor:
    """The mean of the squares of `difference` (..., D) over the finite tokens (...); 0 if there are none."""
    squares = torch.where(finite[..., None], difference, 0.0).square()
    return squares.sum() / (finite.sum() * difference.shape[-1]).clamp(min=1)
