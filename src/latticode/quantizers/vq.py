"""Vector quantization (van den Oord et al. 2017, arXiv 1711.00937): each latent vector becomes its nearest code."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from latticode.kernels import nearest_code
from latticode.quantizers.base import Quantizer, Step, Tokens, Update, token_mean
from latticode.quantizers.codebook import Codebook
from latticode.quantizers.gradients import straight_through

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
            size, dim, learned=update == "gradient", unit=normalize, decay=decay, kmeans=kmeans, restart=restart
        )

    def _quantize(self, tokens: Tokens) -> Step:
        x, target = self._place(tokens.values), self._place(tokens.target)
        if tokens.upkeep:
            self.embedding.upkeep(x, tokens.keep)
        vectors = self.embedding.vectors()
        codes = self._search(x, vectors)
        q = F.embedding(codes, vectors)
        losses = {"commitment": token_mean((target - q.detach()).square(), tokens.keep)}
        if self.update == "gradient":
            losses["codebook"] = token_mean((q - target.detach()).square(), tokens.keep)
        update = Update(self.embedding, x, codes, tokens.keep)
        return Step(straight_through(x, q), codes[..., None], losses, [update])

    def _encode(self, x: Tensor) -> Tensor:
        return self._search(self._place(x), self.embedding.vectors())[..., None]

    def _decode(self, codes: Tensor) -> Tensor:
        return F.embedding(codes[..., 0], self.embedding.vectors())

    def _place(self, x: Tensor) -> Tensor:
        """The points that codes stand for: on the sphere if `normalize`."""
        return F.normalize(x, dim=-1) if self.normalize else x

    def _search(self, x: Tensor, vectors: Tensor) -> Tensor:
        return nearest_code(x.reshape(-1, self.dim), vectors).view(x.shape[:-1])

    def extra_repr(self) -> str:
        return (
            f"update={self.update!r}, decay={self.decay}, normalize={self.normalize}, "
            f"kmeans={self.kmeans}, restart={self.restart}"
        )
