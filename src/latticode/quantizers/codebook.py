"""The vectors of a learned codebook and what keeps them alive: k-means start, EMA statistics, restart, clustering and
splitting.

Every function sees the tokens of its own rank and gives the result of one process on the tokens of all ranks in rank
order. All ranks must call it, those without tokens too. Only finite tokens may be passed.
"""

from __future__ import annotations

import heapq

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from latticode.core import distributed
from latticode.kernels import nearest_code

UPKEEPS = ("restart", "online", "split")
LLOYD_STEPS = 10
EPS = 1e-5  # of the Laplace smoothing
JITTER = 1e-3  # of the data's standard deviation, between copies of one token; of the code, between its two halves
ANCHOR_TILE = 2**20  # code-token pairs compared at once


class Codebook(nn.Module):
    """K vectors of width D with an EMA of the number and the sum of the tokens that chose each.

    Args:
        size: K.
        dim: D.
        learned: the vectors are a parameter for the optimizer; else a buffer that `absorb` moves.
        unit: the vectors have length 1.
        decay: of both averages, per step.
        kmeans: start from k-means over the first tokens; else from N(0, 1).
        upkeep: what happens to codes that are hardly used. "restart": one whose count is below the fraction `restart`
            of the mean count becomes a random token; "online": they are drawn to tokens, the more, the less they are
            used (see `cluster`); "split": one that has fewer tokens, in a sum that decays, than `restart` becomes one
            half of the code that has the most (see `split`).
        restart: see there; 0 = never.
    """

    weight: Tensor  # (K, D)
    count: Tensor  # (K,), tokens per step
    total: Tensor  # (K, D), the sum of these tokens
    initialized: Tensor  # () bool

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        learned: bool,
        unit: bool,
        decay: float,
        kmeans: bool,
        upkeep: str,
        restart: float,
    ):
        super().__init__()
        self.unit, self.decay, self.kmeans, self.upkeep_by, self.restart = unit, decay, kmeans, upkeep, restart
        weight = _unit(torch.randn(size, dim)) if unit else torch.randn(size, dim)
        if learned:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)
        seen = 1 - decay if upkeep == "split" else 1.0  # one token ever, so that codes without any are soon split off
        self.register_buffer("count", torch.full((size,), seen))
        self.register_buffer("total", weight * seen)
        self.register_buffer("initialized", torch.tensor(not kmeans))
        self._held: list[tuple[Tensor, Tensor]] | None = None

    def vectors(self) -> Tensor:
        """(K, D), in float32 at least, of length 1 if `unit`; differentiable."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return _unit(weight) if self.unit else weight

    @torch.no_grad()
    def upkeep(self, tokens: Tensor, keep: Tensor) -> None:
        """Initialize the vectors from those of `tokens` (..., D) that `keep` (...), or revive the dead ones from them.

        To be called before the tokens are quantized, so that their codes decode to their latents.
        """
        # Within one accumulated batch only the first part may change a code.
        if (self.kmeans or self.restart > 0 or self.upkeep_by == "online") and not self._held:
            _upkeep(
                tokens.detach().reshape(-1, tokens.shape[-1]),
                keep.reshape(-1),
                self.weight.detach(),
                self.count,
                self.total,
                self.initialized,
                self.unit,
                self.upkeep_by,
                self.restart,
                self.decay,
            )

    @torch.no_grad()
    def statistics(self, tokens: Tensor, codes: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Of each code the number (K,) and the sum (K, D) of the tokens (..., D) that `keep` (...) and chose it."""
        size, flat = len(self.weight), tokens.detach().reshape(-1, tokens.shape[-1])
        rows = torch.where(keep.reshape(-1), codes.reshape(-1), size)  # one row more takes what does not count
        count = tokens.new_zeros(size + 1).index_add_(0, rows, flat.new_ones(len(flat)))
        return count[:size], tokens.new_zeros(size + 1, flat.shape[1]).index_add_(0, rows, flat)[:size]

    @torch.no_grad()
    def absorb(self, count: Tensor, total: Tensor) -> None:
        """Move the averages by the statistics of all ranks, and the vectors with them unless learned.

        c_k = sum_k / n_k, with n_k Laplace-smoothed, (n_k + eps) / (n + K eps) n (arXiv 1711.00937, App. A.1). Codes
        that no token chose stay exactly where they are: smoothing a count of nothing would draw them to the origin.
        A step without any token leaves the averages alone.
        """
        if self._held is not None:
            self._held.append((count, total))
            return
        weight = torch.where(count.any(), 1 - self.decay, 0.0)
        self.count.lerp_(count.to(self.count), weight.to(self.count))
        self.total.lerp_(total.to(self.total), weight.to(self.total))
        if not isinstance(self.weight, nn.Parameter):
            n = self.count.sum()
            smoothed = (self.count + EPS) / (n + len(self.count) * EPS) * n
            mean = self.total / smoothed[:, None]
            mean = _unit(mean) if self.unit else mean
            self.weight.copy_(torch.where(count[:, None] > 0, mean, self.weight))

    def hold(self) -> None:
        """Collect what `absorb` is given until `release`."""
        self._held = []

    def release(self) -> None:
        """Absorb all that was collected as one step."""
        held, self._held = self._held, None
        if held:
            self.absorb(
                torch.stack([count for count, _ in held]).sum(0), torch.stack([total for _, total in held]).sum(0)
            )

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, {self.weight.shape[1]}"


@library.custom_op("latticode::codebook_upkeep", mutates_args=("weight", "count", "total", "initialized"))
def _upkeep(
    tokens: Tensor,
    keep: Tensor,
    weight: Tensor,
    count: Tensor,
    total: Tensor,
    initialized: Tensor,
    unit: bool,
    upkeep: str,
    restart: float,
    decay: float,
) -> None:
    """An operator of its own, since it decides by the data: torch.compile need not look inside."""
    dead = count < restart * (count.mean() if upkeep == "restart" else 1 - decay)
    if initialized and upkeep != "online" and not dead.any():
        return
    if initialized and upkeep == "split":
        split(weight, count, total, restart * (1 - decay), unit=unit)
        return
    tokens = tokens[keep]
    if not initialized:
        vectors, fresh = kmeans(tokens, len(weight), unit=unit)
        if not fresh.any():
            return
        rows = torch.arange(len(weight), device=weight.device)
        initialized.fill_(True)
    elif upkeep == "online":
        rows, vectors = cluster(tokens, weight.to(tokens), count, decay)
        fresh = count[rows]
    else:
        rows = dead.nonzero().squeeze(1)
        vectors = draw(tokens, len(rows))
        rows = rows[: len(vectors)]
        # Left as they were, the averages would move the vector back to where it died.
        fresh = count.mean().expand(len(rows))
    vectors = _unit(vectors) if unit else vectors
    weight[rows] = vectors.to(weight)
    count[rows] = fresh.to(count)
    total[rows] = (vectors * fresh[:, None]).to(total)


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
        count, total = _assigned(tokens, nearest_code(tokens, centres), size)
        means = total / count.clamp(min=1)[:, None]
        centres = torch.where(count[:, None] > 0, _unit(means) if unit else means, centres)
    return centres, _assigned(tokens, nearest_code(tokens, centres), size)[0]


def draw(tokens: Tensor, size: int) -> Tensor:
    """`size` random tokens of all ranks (size, D), distinct while they last and then jittered copies; (0, D) of none.

    Draws from torch's global CPU generator; the draw of rank 0 counts.
    """
    offset, n = _census(tokens)
    if n == 0:
        return tokens[:0]
    order = torch.randperm(n)
    order = order[torch.arange(size) % n].to(tokens.device)
    distributed.broadcast(order)
    # Each rank fills in the rows that it holds; their sum over ranks is the selection, and no rank sends all it has.
    mine = (order >= offset) & (order < offset + len(tokens))
    rows = tokens.new_zeros(size, tokens.shape[1])
    rows[mine] = tokens[order[mine] - offset]
    rows = distributed.all_sum([rows])[0]
    if size > n:
        noise = torch.randn(size - n, tokens.shape[1]).to(tokens)
        rows[n:] += distributed.broadcast(noise) * _jitter(tokens, n)
    return rows


def cluster(tokens: Tensor, vectors: Tensor, count: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """The codes (r,) that are used too little, and where among `tokens` of all ranks to move them: (r, D).

    c_k <- (1 - a_k) c_k + a_k t_k with a_k = exp(-10 N_k K / (1 - decay) - 1e-3), N_k the share of tokens that chose
    code k, on running average: close to 1 for a code that is hardly chosen, 0 for one of average use (online clustered
    codebook, arXiv 2307.15139). The anchor t_k is one random token of the batch, drawn with probability
    softmax over tokens of -|t - c_k|^2 (the "probrandom" choice of the authors' code). So it depends on the scale of
    the latents how close an anchor is. Codes that float32 would not see moving are left out. Without tokens none moves.

    Draws from torch's global CPU generator; the draw of rank 0 counts.
    """
    share = count.double() / count.double().sum()
    pull = torch.exp(-10 * len(count) / (1 - decay) * share - 1e-3)
    rows = (pull > torch.finfo(torch.float32).eps).nonzero().squeeze(1)
    if len(rows) == 0 or _census(tokens)[1] == 0:
        return rows[:0], vectors[:0]
    uniform = distributed.broadcast(torch.rand(len(rows), dtype=torch.float64).to(tokens.device))
    anchors = _anchors(tokens, vectors[rows], uniform)
    return rows, torch.lerp(vectors[rows], anchors, pull[rows, None].to(anchors))


def split(weight: Tensor, count: Tensor, total: Tensor, least: float, *, unit: bool) -> None:
    """Split codes, in place, until no count is below `least` (Linde, Buzo and Gray 1980; UViM, arXiv 2205.10337).

    The code with the lowest count becomes a copy of the one with the highest, times noise from U(1 - 1e-3, 1 + 1e-3) in
    each channel, and each gets half of its count and total. It ends too when no code is left whose halves would have
    enough. Draws from torch's global CPU generator; the draw of rank 0 counts.
    """
    counts = count.tolist()
    rich = [(-n, code) for code, n in enumerate(counts) if n >= least]
    poor = sorted((n, code) for code, n in enumerate(counts) if n < least)
    heapq.heapify(rich)
    noise = 1 + JITTER * (2 * torch.rand(len(poor), weight.shape[1]) - 1)
    noise = distributed.broadcast(noise.to(weight.device)).cpu().to(total.dtype)
    origin, share = list(range(len(counts))), [1.0] * len(counts)
    factor = torch.ones(total.shape, dtype=total.dtype)
    for (_, code), around in zip(poor, noise, strict=True):
        if not rich or -rich[0][0] < 2 * least:
            break
        n, most = rich[0]
        heapq.heapreplace(rich, (n / 2, most))
        heapq.heappush(rich, (n / 2, code))
        origin[code], factor[code] = origin[most], factor[most] * around
        share[code] = share[most] = share[most] / 2
    rows, factor = torch.tensor(origin, device=weight.device), factor.to(weight.device)
    halves = torch.tensor(share, dtype=count.dtype, device=weight.device)
    vectors = weight[rows] * factor.to(weight)
    copied = (rows != torch.arange(len(rows), device=rows.device))[:, None]
    weight.copy_(torch.where(copied, _unit(vectors) if unit else vectors, weight))
    total.copy_(total[rows] * factor * halves[:, None].to(total))
    count.copy_(count[rows] * halves)


def _anchors(tokens: Tensor, vectors: Tensor, uniform: Tensor) -> Tensor:
    """For each row c of `vectors` (r, D) a token t of all ranks, of probability softmax(-|t - c|^2): (r, D).

    The one at which the cumulative probability, in rank order, passes `uniform` (r,) in [0, 1).
    """
    middle = vectors.mean(dim=0)
    x, centres = (tokens - middle).clamp(-1e15, 1e15), vectors - middle  # so that squares stay finite
    offsets = -x.square().sum(dim=1)

    def closeness(tile: Tensor) -> Tensor:
        """-|t - c|^2 but for a constant of each code, (tile, n)."""
        return torch.addmm(offsets, centres[tile], x.t(), alpha=2)

    tiles = torch.arange(len(vectors), device=x.device).split(max(ANCHOR_TILE // max(len(x), 1), 1))
    rank, ranks = distributed.rank(), distributed.world_size()
    mass = x.new_zeros(ranks, len(vectors))  # log of the sum over each rank's tokens
    if ranks > 1:
        for tile in tiles:
            mass[rank, tile] = closeness(tile).logsumexp(dim=1)
        (mass,) = distributed.all_sum([mass])
    passed = mass.double().softmax(dim=0).cumsum(dim=0)
    passed = F.pad(passed / passed[-1], (0, 0, 1, 0))  # (ranks + 1, r), from 0 to exactly 1
    owner = (passed[1:] <= uniform).sum(dim=0)
    anchors = torch.zeros_like(vectors)
    for tile in tiles:
        tile = tile[owner[tile] == rank]
        if len(tile):
            low, high = passed[rank, tile], passed[rank + 1, tile]
            left = ((uniform[tile] - low) / (high - low)).to(x)[:, None]
            inside = closeness(tile).softmax(dim=1).cumsum(dim=1)
            anchors[tile] = tokens[torch.searchsorted(inside, left, right=True).squeeze(1).clamp(max=len(x) - 1)]
    return distributed.all_sum([anchors])[0]


def _census(tokens: Tensor) -> tuple[int, int]:
    """Where this rank's tokens start among all, and how many all are."""
    counts = torch.zeros(distributed.world_size(), dtype=torch.float64, device=tokens.device)
    counts[distributed.rank()] = len(tokens)
    (counts,) = distributed.all_sum([counts])
    return int(counts[: distributed.rank()].sum()), int(counts.sum())


def _jitter(tokens: Tensor, n: int) -> Tensor:
    """The scale of noise between copies of a token, for each channel (D,); `n` is the number of tokens of all ranks."""
    wide = tokens.double()
    first, second = distributed.all_sum([wide.sum(dim=0), wide.square().sum(dim=0)])
    mean = first / n
    deviation = (second / n - mean.square()).clamp(min=0).sqrt()
    # Data without spread still need copies that float32 can tell apart.
    return (JITTER * torch.maximum(deviation, JITTER * (1 + mean.abs()))).to(tokens.dtype)


def _assigned(tokens: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of all ranks, for each code the number (size,) and the sum (size, D) of its tokens."""
    count = torch.bincount(codes, minlength=size).to(tokens.dtype)
    total = tokens.new_zeros(size, tokens.shape[1]).index_add_(0, codes, tokens)
    count, total = distributed.all_sum([count, total])
    return count, total


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)
