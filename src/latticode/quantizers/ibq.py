"""Index back-propagation quantization (IBQ): every code gets a gradient at every token."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode import kernels
from latticode.core import distributed
from latticode.quantizers.base import Loss, Quantizer, Step, Tokens, token_mean
from latticode.quantizers.stochastic import hard_choice


class IBQ(Quantizer):
    """Codes by the greatest inner product, straight through the softmax of all of them (Shi et al., arXiv 2412.02692).

    With logits l_k = <z, c_k> and p = softmax(l) (section 3.2), the one-hot index is onehot(argmax l) - sg(p) + p and
    the latents are it times the codebook: exactly the chosen code, with the gradient of sum_k p_k sg(c_k) to z and to
    all codes, and that of the lookup to the chosen one. So the whole codebook moves with the encoder, and codes that
    nobody chooses do not die. Training takes O(N K) memory by nature.

    Losses, unweighted, q the chosen code: `commitment`, mean (z - sg(q))^2, weighed 1 by the authors; `codebook`, mean
    (q - sg(z))^2, 0.25; `double_quantization`, mean (q_p - z)^2 with the latents q_p and their gradient, 1. With
    `entropy` also `sample_entropy`, the mean over tokens of H(softmax(l / tau)) in nats, and `diversity`, ln K - H(mean
    of these softmaxes), both >= 0 and weighed 0.05.

    Args:
        size: K, the number of codes; they start from N(0, 1).
        dim: D, the width of latents and codes; the authors take 256.
        entropy: the temperature tau of the entropy losses, the authors' 0.01; None: no such losses.

    Raises:
        ValueError: for arguments outside the above.

    Examples:
        >>> import torch
        >>> from latticode import IBQ
        >>> _ = torch.manual_seed(0)
        >>> quantizer = IBQ(64, 8)
        >>> out = quantizer(torch.randn(2, 5, 8))
        >>> out.codes.shape, sorted(out.losses)
        (torch.Size([2, 5, 1]), ['codebook', 'commitment', 'double_quantization'])
        >>> out.latents.sum().backward()
        >>> bool(quantizer.embedding.grad.any(dim=1).all())  # every code
        True
    """

    def __init__(self, size: int, dim: int, *, entropy: float | None = None):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"size and dim must be >= 1, got {size} and {dim}")
        if entropy is not None and not 0 < entropy < math.inf:
            raise ValueError(f"entropy is a temperature and must be > 0, or None, got {entropy}")
        self.size, self.dim, self.vocab, self.entropy = size, dim, (size,), entropy
        self.embedding = nn.Parameter(torch.randn(size, dim))

    def _quantize(self, tokens: Tokens) -> Step:
        x, target, keep = tokens.values, tokens.target, tokens.keep
        vectors = self.embedding.to(x)
        logits = self._logits(x)
        codes = logits.argmax(dim=-1)
        q, latents = F.embedding(codes, vectors), hard_choice(logits.softmax(dim=-1), codes, vectors)
        aimed = logits if target is x else self._logits(target)
        through = latents if target is x else hard_choice(aimed.softmax(dim=-1), codes, vectors)
        losses = {
            "commitment": token_mean((target - q.detach()).square(), keep),
            "codebook": token_mean((q - target.detach()).square(), keep),
            "double_quantization": token_mean((through - target).square(), keep),
        }
        if self.entropy is not None:
            losses |= self._entropies(aimed / self.entropy, keep)
        return Step(latents, codes[..., None], losses)

    def _entropies(self, logits: Tensor, keep: Tensor) -> dict[str, Loss]:
        """mean_n H(p_n) and ln K - H(mean_n p_n), p_n = softmax(logits); in training over the tokens of all ranks."""
        log_p = logits.log_softmax(dim=-1)
        p = torch.where(keep[..., None], log_p.exp(), 0.0)
        total, count = -(p * log_p).sum(), keep.sum().to(p.dtype)
        sums = [p.reshape(-1, self.size).sum(dim=0), count]
        mixture, n = distributed.joined(sums) if self.training else sums
        gap = math.log(self.size) - kernels.entropy(mixture / n.clamp(min=1))
        some = (n > 0).to(gap)
        return {"sample_entropy": (total, count), "diversity": (gap.clamp(min=0) * some, some)}

    def _encode(self, x: Tensor) -> Tensor:
        return self._logits(x).argmax(dim=-1, keepdim=True)

    def _decode(self, codes: Tensor) -> Tensor:
        return F.embedding(codes[..., 0], self.embedding.to(self._arithmetic))

    def _logits(self, x: Tensor) -> Tensor:
        """<x, c_k> (..., K) of `x` (..., D)."""
        return F.linear(x, self.embedding.to(x))

    def extra_repr(self) -> str:
        return f"{self.size}, {self.dim}, entropy={self.entropy}"
