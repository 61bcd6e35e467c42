"""The vectors of a learned codebook and what keeps them alive: k-means start, EMA statistics, restart, clustering and
splitting. What freezes them, and what activation checkpointing needs: forward passes that are replayed as they were.

Every function sees the tokens of its own rank and gives the result of one process on the tokens of all ranks in rank
order. All ranks must call it, those without tokens too. Only finite tokens may be passed.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn

from latticode.core import distributed, modes
from latticode.core.freezing import Freezable
from latticode.kernels import nearest_code

UPKEEPS = ("restart", "online", "split")
LLOYD_STEPS = 10
EPS = 1e-5  # of the Laplace smoothing
JITTER = 1e-3  # of the data's standard deviation, between copies of one token; of the code, between its two halves
ANCHOR_TILE = 2**20  # code-token pairs compared at once
REPLAYS = 4  # forward passes between two steps that can be replayed; each remembers K vectors


@dataclass
class Pass:
    """A forward pass in training, as a replay of it has to be.

    Examples:
        >>> Pass(mark=torch.tensor([1.0, 2.0])).draws is None  # before an upkeep has drawn
        True
    """

    mark: Tensor  # by which it is known: two sums over the tokens
    vectors: Tensor | None = None  # (K, D), what it coded with
    draws: tuple[Tensor, Tensor] | None = None  # the state of torch's CPU generator before and after the upkeep


class Codebook(Freezable):
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

    `requires_grad_(False)`, here or on any quantizer or model of the library around it, keeps all as it is; `freeze`
    does so for some of the codes. A code is frozen where its count is infinite.

    A forward pass that runs inside a backward pass is a replay, by activation checkpointing: it codes with the vectors
    of the pass that it repeats, and moves nothing. Eager mode only: `torch.compile` sees to its own recomputation.

    Examples:
        >>> from latticode import VQ
        >>> quantizer = VQ(8, 2)  # a published book of 4 codes, and 4 new ones
        >>> with torch.no_grad():
        ...     _ = quantizer.embedding.weight[:4].copy_(torch.eye(4)[:, :2])
        >>> quantizer.embedding.freeze(range(4))
        >>> _ = quantizer(torch.randn(100, 2))  # k-means and averages move the other codes only
        >>> torch.equal(quantizer.embedding.weight[:4], torch.eye(4)[:, :2])
        True
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
        self._passes: deque[Pass] = deque(maxlen=REPLAYS)  # of this step, that may be replayed
        self._current: Pass | None = None
        self._replaying = self._replayed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_passes": deque(maxlen=REPLAYS), "_current": None}

    @property
    def learned(self) -> bool:
        """Whether the vectors are a parameter."""
        return isinstance(self.weight, nn.Parameter)

    @property
    def still(self) -> bool:
        """Whether nothing may move it now: it is frozen, or this is a replay."""
        return self._replaying or not self.moves or (self.learned and not self.weight.requires_grad)

    def vectors(self) -> Tensor:
        """(K, D), in float32 at least, of length 1 if `unit`; differentiable."""
        weight = self.weight
        if self._replaying and self._current is not None and self._current.vectors is not None:
            weight = self._current.vectors + (weight - weight.detach())
        elif self.learned and self.training:
            weight = weight.clone()  # the next forward pass may revive codes before the backward pass of this one
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return _unit(weight) if self.unit else weight

    @torch.no_grad()
    def freeze(self, codes: Sequence[int] | Tensor) -> None:
        """Keep the vectors of `codes`, numbers in 0 .. K-1, as they are from now on; the others stay in training.

        Tokens may still choose them. What is frozen is part of the state, and so is saved and loaded.

        Raises:
            ValueError: for other numbers, or a book that an optimizer moves: its momentum and decay know no single
                codes.
        """
        if self.learned:
            raise ValueError("single codes can be frozen where averages move them, not an optimizer: update='ema'")
        numbers = codes.tolist() if isinstance(codes, Tensor) else list(codes)
        if wrong := [code for code in numbers if not 0 <= code < len(self.count)]:
            raise ValueError(f"codes must lie in 0 .. {len(self.count) - 1}, got {wrong}")
        rows = torch.tensor(numbers, dtype=torch.int64, device=self.count.device)
        self.total[rows] = self.weight[rows]
        self.count[rows] = torch.inf

    @torch.no_grad()
    def unfreeze(self) -> None:
        """Let all codes move again that `freeze` has stopped, each with the mean number of tokens of the others."""
        frozen = self.count.isinf()
        if frozen.any():
            others = self.count[~frozen]
            self.count[frozen] = others.mean() if len(others) else 1.0
            self.total[frozen] = self.weight[frozen] * self.count[frozen, None]

    @torch.no_grad()
    def upkeep(self, tokens: Tensor, keep: Tensor) -> None:
        """Initialize the vectors from those of `tokens` (..., D) that `keep` (...), or revive the dead ones from them.

        To be called before the tokens are quantized, so that their codes decode to their latents.
        """
        if self._replaying:
            self._repeat_draws()
        # Within one accumulated batch only the first part may change a code.
        elif (self.kmeans or self.restart > 0 or self.upkeep_by == "online") and not self._held and not self.still:
            before = torch.get_rng_state() if self._current is not None else None
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
            if self._current is not None and before is not None:
                self._current.draws = before, torch.get_rng_state()

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
        if self._current is not None:
            self._current.vectors = self.weight.detach().clone()
            self._passes.append(self._current)
        if self._held is not None:
            self._held.append((count, total))
            return
        frozen = self.count.isinf()
        weight = torch.where(count.any() & ~frozen, 1 - self.decay, 0.0).to(self.count)
        self.count.copy_(torch.where(frozen, self.count, self.count.lerp(count.to(self.count), weight)))
        self.total.lerp_(total.to(self.total), weight[:, None].to(self.total))
        if not self.learned:
            counts = torch.where(frozen, 0.0, self.count)
            n = counts.sum()
            smoothed = (counts + EPS) / (n + len(counts) * EPS) * n
            mean = self.total / smoothed[:, None]
            mean = _unit(mean) if self.unit else mean
            self.weight.copy_(torch.where((count[:, None] > 0) & ~frozen[:, None], mean, self.weight))

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

    def begin(self, mark: Tensor | None, replay: bool) -> None:
        """A forward pass begins, known by `mark` (2,); None: it will not be replayed."""
        self._replaying = replay
        if replay:
            self._replayed = True
            self._current = None if mark is None else self._recalled(mark)
        else:
            if self._replayed:  # the passes before were those of another step
                self._passes.clear()
                self._replayed = False
            self._current = None if mark is None else Pass(mark)

    def end(self) -> None:
        """A forward pass is over, or was broken off."""
        self._replaying, self._current = False, None

    def _recalled(self, mark: Tensor) -> Pass | None:
        """The pass that had the tokens of `mark`. None if it is not known."""
        if len(self._passes) < 2:
            return self._passes[0] if self._passes else None
        marks = torch.stack([one.mark for one in self._passes])
        return self._passes[int((marks - mark).abs().sum(dim=1).nan_to_num(torch.inf).argmin())]

    def _repeat_draws(self) -> None:
        """Leave torch's CPU generator as the upkeep of the pass did, if it was where that began."""
        draws = None if self._current is None else self._current.draws
        if draws is not None and torch.equal(draws[0], torch.get_rng_state()):
            torch.set_rng_state(draws[1])

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, {self.weight.shape[1]}"


@contextmanager
def passing(books: Sequence[Codebook], tokens: Tensor) -> Generator[None]:
    """Around the forward pass, in training and in eager mode, of the module that `books` are parts of.

    Raises RuntimeError inside a transform of `torch.func`, which can move none.
    """
    if modes.transformed(tokens) and any(not book.still for book in books):
        raise RuntimeError(
            "torch.func transforms pure functions, and a quantizer in training moves its codebooks: call eval() or "
            "requires_grad_(False) on it first"
        )
    replay = modes.in_backward()
    # The first pass of a checkpoint is one without gradients, or one with hooks on what is saved for the backward pass.
    first = not torch.is_grad_enabled() or modes.hooks_on_saved()
    mark = None
    if books and (replay or first):
        mark = torch.stack([tokens.detach().sum(), tokens.detach().square().sum()])
    for book in books:
        book.begin(mark, replay)
    try:
        yield
    finally:
        for book in books:
            book.end()


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
    free = count.isfinite()
    dead = free & (count < restart * (count[free].mean() if upkeep == "restart" else 1 - decay))
    if initialized and upkeep != "online" and not dead.any():
        return
    if initialized and upkeep == "split":
        split(weight, count, total, restart * (1 - decay), unit=unit)
        return
    tokens = tokens[keep]
    if not initialized:
        rows = free.nonzero().squeeze(1)
        vectors, fresh = kmeans(tokens, len(rows), unit=unit)
        if not fresh.any():
            return
        initialized.fill_(True)
    elif upkeep == "online":
        rows, vectors = cluster(tokens, weight.to(tokens), count, decay)
        fresh = count[rows]
    else:
        rows = dead.nonzero().squeeze(1)
        vectors = draw(tokens, len(rows))
        rows = rows[: len(vectors)]
        # Left as they were, the averages would move the vector back to where it died.
        fresh = count[free].mean().expand(len(rows))
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
    free = count.isfinite()
    share = count.double() / count[free].double().sum()
    pull = torch.exp(-10 * int(free.sum()) / (1 - decay) * share - 1e-3)
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
    rich = [(-n, code) for code, n in enumerate(counts) if least <= n < math.inf]
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
