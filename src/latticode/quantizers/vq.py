"""Vector quantization (van den Oord et al. 2017, arXiv 1711.00937) and SimVQ: each latent becomes its nearest code."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode import kernels
from latticode.core import distributed
from latticode.core.types import Softened
from latticode.quantizers.base import Loss, Quantizer, Step, Tokens, Update, token_mean, without_autocast
from latticode.quantizers.codebook import UPKEEPS, Codebook
from latticode.quantizers.gradients import ESTIMATORS, check_estimator, straight_through, synchronized

UPDATES = ("ema", "gradient")


class Found(NamedTuple):
    """The nearest codes of some tokens.

    Examples:
        >>> tokens, book = torch.tensor([[0.9, 0.1]]), torch.eye(2)
        >>> codes = kernels.nearest_code(tokens, book)
        >>> q = F.embedding(codes, book)
        >>> Found(codes, q, straight_through(tokens, q), {}).codes
        tensor([0])
    """

    codes: Tensor  # (...) int64
    quantized: Tensor  # (..., D), their vectors, differentiable in the codebook
    latents: Tensor  # (..., D), the same with the gradient of the tokens
    losses: dict[str, Loss]


class Softening(Quantizer, ABC):
    """A quantizer that can draw its codes by their distance.

    Examples:
        >>> quantizer, z = VQ(8, 2, kmeans=False).eval(), torch.randn(100, 2)
        >>> isinstance(quantizer, Softening)
        True
        >>> codes, p = quantizer.soften(z, temperature=1e-4)  # nearly cold: the nearest codes
        >>> torch.equal(p.argmax(-1), quantizer.encode(z))
        True
    """

    @torch.no_grad()
    def soften(self, z: Tensor, temperature: float) -> Softened:
        """Codes (..., K) of `z` (..., D), each drawn from p = softmax(-|r - c|^2 / temperature), and p (..., K, C).

        r is what there is to quantize: z, or what the codes drawn for earlier stages have left of it (RQ-Transformer,
        arXiv 2203.01941, section 3.2.3). The likeliest code is that of `encode` as long as the earlier ones are. Draws
        from torch's global generators; moves nothing. Where z is not finite codes are -1 and p is 0.

        Raises ValueError for a temperature that is not > 0, and for a stage without a codebook.
        """
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self._check_latents(z)
        with without_autocast(z.device.type):
            tokens = self._tokens(z, None)
            codes, p = self._soften(tokens.values, temperature)
            gone = ~tokens.keep[..., None]
            return Softened(codes.masked_fill(gone, -1), p.masked_fill(gone[..., None], 0.0))

    @abstractmethod
    def _soften(self, x: Tensor, temperature: float) -> Softened:
        """As `soften`, of clean tokens."""


class NearestCode(Softening):
    """A quantizer with one code, the nearest row of `vectors()`, and the losses that need no more than these.

    Examples:
        >>> quantizer, z = SimVQ(8, 2).eval(), torch.randn(5, 2)
        >>> isinstance(quantizer, NearestCode)
        True
        >>> torch.equal(quantizer.encode(z)[:, 0], torch.cdist(z, quantizer.vectors()).argmin(1))
        True
    """

    size: int  # K
    gradient: str
    entropy: float | None
    learned: bool  # by gradients

    @abstractmethod
    def vectors(self) -> Tensor:
        """The codes (K, D), in float32 at least, differentiable where they are learned."""

    def _place(self, x: Tensor) -> Tensor:
        """The points that codes stand for."""
        return x

    def _find(self, placed: Tokens) -> Found:
        """The nearest codes of tokens that `_place` has seen."""
        x, target, keep = placed.values, placed.target, placed.keep
        vectors = self.vectors()
        codes = self._search(x, vectors)
        q = F.embedding(codes, vectors)
        losses = {"commitment": token_mean((target - q.detach()).square(), keep)}
        if self.learned:
            losses["codebook"] = token_mean((q - target.detach()).square(), keep)
        if self.entropy is not None:
            losses |= self._entropies(target, vectors, keep)
        estimate = ESTIMATORS[self.gradient] if self.training else straight_through
        return Found(codes, q, estimate(x, q), losses)

    def _entropies(self, x: Tensor, vectors: Tensor, keep: Tensor) -> dict[str, Loss]:
        """The two halves of MaskGIT's regulariser, mean_n H(p_n) - H(mean_n p_n) + ln K, p_n = softmax(-d^2 / tau).

        In training the mean is over the tokens of all ranks.
        """
        assert self.entropy is not None
        weights = keep.reshape(-1).to(x.dtype)
        if not self.learned:
            vectors = vectors.clone()  # the averages move the codebook in place before the backward pass needs it
        total, mixture = kernels.soft_assignment(x.reshape(-1, self.dim), vectors, self.entropy, weights)
        count = weights.sum()
        mixed, n = distributed.joined([mixture, count]) if self.training else (mixture, count)
        gap = math.log(self.size) - kernels.entropy(mixed / n.clamp(min=1))
        some = (n > 0).to(gap)
        return {"sample_entropy": (total, count), "diversity": (gap.clamp(min=0) * some, some)}

    def _encode(self, x: Tensor) -> Tensor:
        return self._search(self._place(x), self.vectors())[..., None]

    def _decode(self, codes: Tensor) -> Tensor:
        return F.embedding(codes[..., 0], self.vectors())

    def _soften(self, x: Tensor, temperature: float) -> Softened:
        vectors = self.vectors()
        middle = vectors.mean(dim=0)  # seen from there, a common offset costs no digits
        flat, around = self._place(x).reshape(-1, self.dim) - middle, vectors - middle
        scores = flat @ around.t() - around.square().sum(dim=-1) / 2  # -|x - c|^2 / 2 but for what all codes share
        p = ((scores - scores.amax(dim=-1, keepdim=True)) * (2 / temperature)).softmax(dim=-1)
        codes = torch.multinomial(p, 1)
        return Softened(codes.view(*x.shape[:-1], 1), p.view(*x.shape[:-1], 1, self.size))

    def _search(self, x: Tensor, vectors: Tensor) -> Tensor:
        return kernels.nearest_code(x.reshape(-1, self.dim), vectors).view(x.shape[:-1])


class VQ(NearestCode):
    """A learned codebook of `size` vectors of width `dim`.

    Losses, unweighted: `commitment`, mean (z - sg(q))^2 with sg for no gradient, which keeps the encoder near its codes
    and is usually weighed 0.25, as in the paper; with update "gradient" also `codebook`, mean (q - sg(z))^2, weighed 1;
    with `entropy` also `sample_entropy`, the mean over tokens of H(p_n) in nats, and `diversity`,
    ln K - H(mean of p_n), both >= 0 and usually weighed alike, 0.1 (MaskGIT). p_n is the softmax over
    codes of -|z_n - c|^2 / tau. In training the batch is quantized with the codebook as it is, and only then are the
    averages moved; k-means and restarts come before, so codes always decode to the latents returned with them.

    Args:
        size: K, the number of codes.
        dim: D, the width of latents and codes.
        update: "ema" moves the codes to the running mean of their tokens; "gradient" leaves them to the optimizer.
        gradient: how it passes the lookup in training, a name in `gradients.ESTIMATORS`: "straight-through",
            "rotation" or "diveq", with which the latents are only near the codes in training and which needs update
            "gradient". In eval mode it is straight-through.
        sync: this share of the gradient of the latents goes to their codes too (synchronized update of Huh et al.
            2023, arXiv 2305.08842); needs update "gradient".
        affine: codes are exp(log_scale) * c + shift with learned (D,) vectors shared by all, so that codes without
            tokens follow the latents (Huh et al. 2023); needs update "gradient" and codes of free length.
        decay: of the running averages, per training step, in [0, 1).
        normalize: scale latents and codes to length 1, so that the nearest code is the one of the greatest cosine
            (ViT-VQGAN, arXiv 2110.04627); for low `dim`.
        kmeans: start from k-means over the first training batch; else from N(0, 1).
        upkeep: what happens to codes that are hardly used. "restart": one becomes a random token of the batch;
            "online": each is drawn towards a token of the batch the more, the less it is used (`codebook.cluster`; CVQ,
            arXiv 2307.15139); "split": one becomes half of the code that is used the most (`codebook.split`; UViM,
            arXiv 2205.10337, with `decay` 0.995, `normalize` and no `kmeans`).
        restart: how little that is; in [0, 1), 0 = never. Of "restart": this fraction of the mean over codes, of tokens
            on average, since the number that a live code gets depends on batch and codebook size. Of "split": so many
            tokens in a sum that decays, which is the average over 1 - `decay`. "online" has no use for it.
        entropy: the temperature tau of the entropy losses, in squared units of the latents; None: no such losses.

    Raises:
        ValueError: for arguments outside the above.

    Examples:
        >>> quantizer = VQ(512, 8)
        >>> out = quantizer(torch.randn(4, 100, 8))
        >>> out.codes.shape, list(out.losses)
        (torch.Size([4, 100, 1]), ['commitment'])
        >>> loss = 0.25 * out.losses["commitment"]  # beside what the decoder loses
    """

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        update: str = "ema",
        gradient: str = "straight-through",
        sync: float = 0.0,
        affine: bool = False,
        decay: float = 0.99,
        normalize: bool = False,
        kmeans: bool = True,
        upkeep: str = "restart",
        restart: float = 0.1,
        entropy: float | None = None,
    ):
        super().__init__()
        _check(size, dim, gradient, entropy)
        if update not in UPDATES:
            raise ValueError(f"update must be one of {', '.join(UPDATES)}, got {update!r}")
        if not 0 <= sync < math.inf:
            raise ValueError(f"sync must be >= 0, got {sync}")
        for name, used in (("gradient='diveq'", gradient == "diveq"), (f"sync={sync}", sync > 0), ("affine", affine)):
            if used and update != "gradient":
                raise ValueError(f"{name} sends a gradient to the codes, so it needs update='gradient', got {update!r}")
        if affine and normalize:
            raise ValueError("affine moves codes off the sphere that normalize keeps them on; choose one")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if not 0 <= restart < 1:
            raise ValueError(f"restart is a fraction of the mean count and must be in [0, 1), got {restart}")
        if upkeep not in UPKEEPS:
            raise ValueError(f"upkeep must be one of {', '.join(UPKEEPS)}, got {upkeep!r}")
        self.size, self.dim, self.vocab = size, dim, (size,)
        self.update, self.gradient, self.sync, self.affine = update, gradient, sync, affine
        self.decay, self.normalize, self.kmeans, self.restart = decay, normalize, kmeans, restart
        self.upkeep, self.entropy, self.learned = upkeep, entropy, update == "gradient"
        self.embedding = Codebook(
            size, dim, learned=self.learned, unit=normalize, decay=decay, kmeans=kmeans, upkeep=upkeep, restart=restart
        )
        if affine:
            self.log_scale, self.shift = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def vectors(self) -> Tensor:
        vectors = self.embedding.vectors()
        return vectors * self.log_scale.to(vectors).exp() + self.shift.to(vectors) if self.affine else vectors

    def _quantize(self, tokens: Tokens) -> Step:
        placed, updates = tokens.through(self._place), []
        if tokens.upkeep:
            self.embedding.upkeep(self._raw(placed.values), tokens.keep)
        found = self._find(placed)
        latents = synchronized(found.latents, found.quantized, self.sync) if self.sync else found.latents
        if self.training:
            updates = [Update(self.embedding, self._raw(placed.values), found.codes, tokens.keep)]
        return Step(latents, found.codes[..., None], found.losses, updates)

    def _place(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.normalize else x

    @torch.no_grad()
    def _raw(self, x: Tensor) -> Tensor:
        """The vectors that `embedding` would have to hold for codes at `x`."""
        return (x - self.shift.to(x)) * (-self.log_scale.to(x)).exp() if self.affine else x

    def extra_repr(self) -> str:
        names = ("update", "gradient", "sync", "affine", "decay", "normalize", "kmeans", "upkeep", "restart", "entropy")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class SimVQ(NearestCode):
    """`size` codes C W of width `dim`: C is frozen noise, only the (D, D) matrix W is learned (arXiv 2411.02038).

    Each step of W moves every code, so none dies and there are no statistics to keep. C ~ N(0, 1/D); W starts as a
    linear layer of PyTorch does. Losses, unweighted: `codebook`, mean (q - sg(z))^2, weighed 1, `commitment`, mean
    (z - sg(q))^2, usually weighed 0.25, and with `entropy` those of `VQ`.

    Args:
        size: K, the number of codes.
        dim: D, the width of latents and codes.
        gradient: as for `VQ`.
        entropy: as for `VQ`.
        bias: whether W has one, which moves all codes alike; the authors' code has it, the paper's formula has not.

    Raises:
        ValueError: for arguments outside the above.

    Examples:
        >>> quantizer = SimVQ(1024, 8)
        >>> out = quantizer(torch.randn(100, 8))
        >>> loss = out.losses["codebook"] + 0.25 * out.losses["commitment"]
        >>> [name for name, _ in quantizer.named_parameters()]
        ['transform.weight']
    """

    learned = True
    frozen: Tensor  # (K, D)

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        gradient: str = "straight-through",
        entropy: float | None = None,
        bias: bool = False,
    ):
        super().__init__()
        _check(size, dim, gradient, entropy)
        self.size, self.dim, self.vocab = size, dim, (size,)
        self.gradient, self.entropy, self.bias = gradient, entropy, bias
        self.register_buffer("frozen", torch.randn(size, dim) * dim**-0.5)
        self.transform = nn.Linear(dim, dim, bias=bias)

    def vectors(self) -> Tensor:
        # All of them, also for a few codes to decode: a matrix product rounds by its shape, and they would differ.
        bias = self.transform.bias.to(self._arithmetic) if self.bias else None
        return F.linear(self.frozen.to(self._arithmetic), self.transform.weight.to(self._arithmetic), bias)

    def _quantize(self, tokens: Tokens) -> Step:
        found = self._find(tokens)
        return Step(found.latents, found.codes[..., None], found.losses)

    def extra_repr(self) -> str:
        return f"{self.size}, {self.dim}, gradient={self.gradient!r}, entropy={self.entropy}, bias={self.bias}"


def _check(size: int, dim: int, gradient: str, entropy: float | None) -> None:
    if size < 1 or dim < 1:
        raise ValueError(f"size and dim must be >= 1, got {size} and {dim}")
    check_estimator(gradient)
    if entropy is not None and not 0 < entropy < math.inf:
        raise ValueError(f"entropy is a temperature and must be > 0, or None, got {entropy}")
