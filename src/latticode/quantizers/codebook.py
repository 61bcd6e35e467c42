"""The vectors of a learned codebook and what keeps them alive: k-means start, EMA statistics, restart of dead codes.

Every function sees the tokens of its own rank and gives the result of one process on the tokens of all ranks in rank
order. All ranks must call it, those without tokens too. Only finite tokens may be passed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode import distributed
from latticode.kernels import nearest_code

LLOYD_STEPS = 10
EPS = 1e-5  # of the Laplace smoothing
JITTER = 1e-3  # of the data's standard deviation, between copies of one token


class Codebook(nn.Module):
    """K vectors of width D with an EMA of the number and the sum of the tokens that chose each.

    Args:
        size: K.
        dim: D.
        learned: the vectors are a parameter for the optimizer; else a buffer that `accumulate` moves.
        unit: the vectors have length 1.
        decay: of both averages, per step.
        initialized: False if `initialize` shall set the vectors from data.
    """

    weight: Tensor  # (K, D)
    count: Tensor  # (K,), tokens per step
    total: Tensor  # (K, D), the sum of these tokens
    initialized: Tensor  # () bool

    def __init__(self, size: int, dim: int, *, learned: bool, unit: bool, decay: float, initialized: bool):
        super().__init__()
        self.unit, self.decay = unit, decay
        weight = _unit(torch.randn(size, dim)) if unit else torch.randn(size, dim)
        if learned:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        self.register_buffer("count", torch.ones(size))
        self.register_buffer("total", weight.clone())
        self.register_buffer("initialized", torch.tensor(initialized))

    def vectors(self) -> Tensor:
        """(K, D), in float32 at least, of length 1 if `unit`; differentiable."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return _unit(weight) if self.unit else weight

    @torch.no_grad()
    def initialize(self, tokens: Tensor) -> None:
        """Vectors and statistics from k-means over `tokens` (n, D); nothing if no rank has any."""
        centres, count = kmeans(tokens, len(self.weight), unit=self.unit)
        if int(count.sum()) > 0:
            self._set(torch.arange(len(centres), device=centres.device), centres, count)
            self.initialized.fill_(True)

    @torch.no_grad()
    def revive(self, tokens: Tensor, threshold: float) -> None:
        """Replace each code whose count is below `threshold` times the mean count by a random one of `tokens` (n, D).

        Its statistics start at the mean count of that token: left as they were, the next average would move the vector
        back to where it died.
        """
        mean = self.count.mean()
        dead = (self.count < threshold * mean).nonzero().squeeze(1)
        if len(dead):
            fresh = draw(tokens, len(dead))
            if len(fresh):
                self._set(dead, _unit(fresh) if self.unit else fresh, mean.expand(len(dead)))

    @torch.no_grad()
    def accumulate(self, tokens: Tensor, codes: Tensor) -> None:
        """Move the averages by `tokens` (n, D) that chose `codes` (n,), and the vectors with them unless learned.

        c_k = sum_k / n_k, with n_k Laplace-smoothed, (n_k + eps) / (n + K eps) n (arXiv 1711.00937, App. A.1). Codes
        that no token chose stay exactly where they are: smoothing a count of nothing would draw them to the origin.
        """
        count, total = _statistics(tokens, codes, len(self.weight))
        if not count.any():
            return
        self.count.lerp_(count.to(self.count), 1 - self.decay)
        self.total.lerp_(total.to(self.total), 1 - self.decay)
        if not isinstance(self.weight, nn.Parameter):
            n = self.count.sum()
            smoothed = (self.count + EPS) / (n + len(self.count) * EPS) * n
            mean = self.total / smoothed[:, None]
            mean = _unit(mean) if self.unit else mean
            self.weight.copy_(torch.where(count[:, None] > 0, mean, self.weight))

    def _set(self, rows: Tensor, vectors: Tensor, count: Tensor) -> None:
        self.weight[rows] = vectors.to(self.weight)
        self.count[rows] = count.to(self.count)
        self.total[rows] = (vectors * count[:, None]).to(self.total)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, {self.weight.shape[1]}"


def kmeans(tokens: Tensor, size: int, *, unit: bool = False, steps: int = LLOYD_STEPS) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from `size` random distinct tokens: centres (size, D) and their numbers of tokens (size,).

    With fewer tokens than centres the rest are copies with a little noise, so that no two centres are equal and none
    lies where there is no data. Without any token all is zero. `unit` keeps the centres at length 1 (spherical
    k-means).
    """
    centres = draw(tokens, size)
    if not len(centres):
        return tokens.new_zeros(size, tokens.shape[1]), tokens.new_zeros(size)
    centres = _unit(centres) if unit else centres
    for _ in range(steps):
        count, total = _statistics(tokens, nearest_code(tokens, centres), size)
        means = total / count.clamp(min=1)[:, None]
        centres = torch.where(count[:, None] > 0, _unit(means) if unit else means, centres)
    return centres, _statistics(tokens, nearest_code(tokens, centres), size)[0]


def draw(tokens: Tensor, size: int) -> Tensor:
    """`size` random tokens of all ranks (size, D), distinct while they last and then jittered copies; (0, D) of none.

    Draws from torch's global CPU generator; the draw of rank 0 counts.
    """
    offset, n, moments = _census(tokens)
    if n == 0:
        return tokens[:0]
    order = torch.randperm(n)
    order = order[torch.arange(size) % n].to(tokens.device)
    noise = torch.randn(max(size - n, 0), tokens.shape[1]).to(tokens)
    distributed.broadcast(order)
    distributed.broadcast(noise)
    # Each rank fills in the rows that it holds; their sum over ranks is the selection, and no rank sends all it has.
    mine = (order >= offset) & (order < offset + len(tokens))
    rows = tokens.new_zeros(size, tokens.shape[1])
    rows[mine] = tokens[order[mine] - offset]
    rows = distributed.all_sum([rows])[0]
    rows[n:] += noise * moments
    return rows


def _census(tokens: Tensor) -> tuple[int, int, Tensor]:
    """Where this rank's tokens start among all, how many all are, and the scale of a jitter for each channel (D,)."""
    counts = tokens.new_zeros(distributed.world_size(), dtype=torch.float64)
    counts[distributed.rank()] = len(tokens)
    wide = tokens.double()
    counts, first, second = distributed.all_sum([counts, wide.sum(dim=0), wide.square().sum(dim=0)])
    n = counts.sum().clamp(min=1)
    mean = first / n
    deviation = (second / n - mean.square()).clamp(min=0).sqrt()
    # Data without spread still need copies that float32 can tell apart.
    scale = JITTER * torch.maximum(deviation, JITTER * (1 + mean.abs()))
    return int(counts[: distributed.rank()].sum()), int(counts.sum()), scale.to(tokens.dtype)


def _statistics(tokens: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of all ranks, for each code the number (size,) and the sum (size, D) of its tokens."""
    count = torch.bincount(codes, minlength=size).to(tokens.dtype)
    total = tokens.new_zeros(size, tokens.shape[1]).index_add_(0, codes, tokens)
    count, total = distributed.all_sum([count, total])
    return count, total


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)
