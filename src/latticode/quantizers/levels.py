"""Which FSQ levels to use for a codebook size, and what a unit-normal latent makes of them.

FSQ is Mentzer et al., arXiv 2309.15505. Everything here is arithmetic on the levels: nothing is trained or sampled.
Each channel is independent, so a code's probability is the product of its digits' (`bin_probabilities`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np

from latticode.kernels.grid import BOUNDS, EPS

# Table 1 and App. A.4.1 (whose 2^12 lacks one 5: a misprint, as the main table and the UViM section show).
TABLE: dict[int, tuple[int, ...]] = {
    2**4: (5, 3),
    2**6: (8, 8),
    2**8: (8, 6, 5),
    2**9: (8, 8, 8),
    2**10: (8, 5, 5, 5),
    2**11: (8, 8, 6, 5),
    2**12: (7, 5, 5, 5, 5),
    2**14: (8, 8, 8, 6, 5),
    2**16: (8, 8, 8, 5, 5, 5),
}
LEAST = 5  # the paper's rule: every level >= 5
USUAL = 8  # the widest level of the paper's table
WIDEST = 16
MOST_FINE = 4  # channels of `fine` levels
TOLERANCE = 0.1  # bits; the paper's own table strays this far from its targets (2^12: 4375 codes)
LARGEST_BITS = 62  # the product of levels stays below 2^63, so that an index fits int64
NEVER = 1e-15  # digits less likely than this count as never reached: the normal CDF near 1 is no finer in float64
EXACT_CELLS = 2**20  # up to here `expected_usage` visits every code


@dataclass(frozen=True)
class Recommendation:
    """Levels for a target size. Entropy and usage are those of z ~ N(0, 1), independent in each channel.

    Examples:
        >>> found = recommend(bits=10)
        >>> found.levels, found.size, round(found.bits, 2), found.source
        ((8, 5, 5, 5), 1000, 9.97, "paper's table")
    """

    levels: tuple[int, ...]
    size: int  # codes, the product of the levels
    bits: float  # log2(size)
    entropy: float  # bits of the index, at most `bits`
    usage: float  # expected fraction of the codes that `tokens` tokens hit at least once
    source: str  # "paper's table", "search", "below the rule" (targets under 5), or "few fine channels" (clamp)
    bound: str  # the bound that entropy and usage are for: the paper's leaves one of 2 levels nearly empty
    tokens: int


def recommend(
    size: int | None = None,
    bits: float | None = None,
    *,
    bound: str = "paper",
    slope: float = 2.0,
    tokens: int = 1_000_000,
) -> Recommendation:
    """Levels whose product is near `size` or 2^`bits`: give exactly one of the two.

    The paper's table where it has an entry, else `search`; under the clamp bound `fine`. Raises ValueError for both or
    neither target, for a target below 2 codes or above 2^62, for an unknown bound, and for a slope or token count that
    is not positive.
    """
    target = _target(size, bits)
    if tokens < 1:
        raise ValueError(f"tokens must be >= 1, got {tokens}")
    _check_bound(bound, slope)
    levels, source = _chosen(target, bound)
    if bound == "paper" and min(levels) == 2:
        bound = "symmetric"
    product = math.prod(levels)
    return Recommendation(
        levels=levels,
        size=product,
        bits=math.log2(product),
        entropy=expected_entropy(levels, bound, slope),
        usage=expected_usage(levels, tokens, bound, slope),
        source=source,
        bound=bound,
        tokens=tokens,
    )


def _chosen(target: float, bound: str) -> tuple[tuple[int, ...], str]:
    """Levels and where they are from."""
    if bound == "clamp":
        return fine(target), "few fine channels"
    if target in TABLE:
        return TABLE[int(target)], "paper's table"
    return search(target), "search" if target >= LEAST else "below the rule"


def _target(size: int | None, bits: float | None) -> float:
    """The wanted number of codes; an int (exact) unless it comes from fractional bits."""
    if (size is None) == (bits is None):
        raise ValueError(f"give either size or bits, got size={size} and bits={bits}")
    if size is not None:
        if isinstance(size, bool) or not isinstance(size, int):
            raise ValueError(f"size must be a whole number of codes, got {size!r}")
        if not 2 <= size <= 2**LARGEST_BITS:
            raise ValueError(f"size must lie in [2, 2^{LARGEST_BITS}], got {size}")
        return size
    assert bits is not None
    if not 1 <= bits <= LARGEST_BITS:  # false for NaN too
        raise ValueError(f"bits must lie in [1, {LARGEST_BITS}], got {bits}")
    return 2 ** int(bits) if float(bits).is_integer() else 2.0**bits


def search(target: float) -> tuple[int, ...]:
    """Levels in descending order, each >= 5, whose product is the nearest to `target` in log2.

    Levels 5 to 8 are the paper's and are taken wherever they come within `TOLERANCE`; only in the gaps between few
    channels (8 to 25, 64 to 125, around 560) are levels up to 16 considered. Equal distances: narrower levels, then
    fewer channels. Targets below 5 get one channel of 2, 3, 4 or 5 levels.
    """

    def rank(levels: tuple[int, ...]) -> tuple[float, int, int]:
        return _distance(levels, target), max(USUAL, *levels), len(levels)

    if target < LEAST:
        return min(((level,) for level in range(2, LEAST + 1)), key=rank)
    best = min(filter(None, _usual(target)), key=rank)
    if _distance(best, target) > TOLERANCE:
        best = min(_wide(target), key=rank)
    return best


def fine(target: float) -> tuple[int, ...]:
    """Levels of two to four channels, in descending order and as equal as `target` allows: about 8 each, more of them
    only where four channels of 8 are too few.

    With the clamp bound they reconstruct better than the paper's, which take a fifth and a sixth channel instead
    (docs/results/study.md). Targets below 4 get what `search` gives.
    """
    channels = min(MOST_FINE, max(2, round(math.log2(target) / math.log2(USUAL))))
    low = math.floor(target ** (1 / channels) + 1e-9)
    if low < 2:
        return search(target)
    several = ((low + 1,) * more + (low,) * (channels - more) for more in range(channels + 1))
    return min(several, key=lambda levels: _distance(levels, target))


def _distance(levels: tuple[int, ...], target: float) -> float:
    return abs(math.log2(math.prod(levels) / target))


def _usual(target: float, narrow: tuple[int, ...] = (5, 6, 7)) -> Iterator[tuple[int, ...]]:
    """Every multiset of {5, 6, 7, 8} that can be the nearest: given the 5s, 6s and 7s, only two counts of 8s can."""
    if not narrow:
        count = max(0, math.floor(math.log2(target) / 3))
        yield from ((8,) * count, (8,) * (count + 1))
        return
    level, product, tail = narrow[0], 1, ()
    while product <= target * USUAL:
        yield from (head + tail for head in _usual(target / product, narrow[1:]))
        product, tail = product * level, (*tail, level)


def _wide(target: float, widest: int = WIDEST) -> Iterator[tuple[int, ...]]:
    """Every descending tuple of levels in [5, `widest`] that passes `target` with its last level, if at all."""
    for level in range(LEAST, widest + 1):
        yield (level,)
        if level < target:
            yield from ((level, *rest) for rest in _wide(target / level, level))


def bin_probabilities(level: int, bound: str = "paper", slope: float = 2.0) -> np.ndarray:
    """(level,) float64: the probability of each digit of one channel for z ~ N(0, 1).

    The activation is act(z) = 2 sigmoid(slope z) - 1: slope 2 is tanh, 1.6 is iFSQ's (arXiv 2601.17124); "clamp" has
    clamp(slope z / 2, -1, 1). Raises ValueError for an unknown bound, a slope that is not positive, and level < 2.
    """
    _check_bound(bound, slope)
    if level < 2:
        raise ValueError(f"levels must be >= 2, got {level}")
    inverse = (lambda y: y) if bound == "clamp" else math.atanh
    cuts = [(inverse(y) - shift) * 2 / slope for y, shift in _cuts(level, bound)]
    below = np.array([0.0, *(0.5 * math.erfc(-z / math.sqrt(2)) for z in cuts), 1.0])
    return np.diff(below)


def _cuts(level: int, bound: str) -> Iterator[tuple[float, float]]:
    """For each digit k >= 1 the least activation that reaches it, and what the bound adds to slope z / 2 before it."""
    for k in range(1, level):
        if bound == "equal-bins":  # digit = floor(L (act + 1) / 2)
            yield 2 * k / level - 1, 0.0
        elif bound == "paper":  # digit = round(half act(z + shift) - offset) + floor(L / 2), App. A.1
            half = (level - 1) * (1 - EPS) / 2
            offset = 0.5 if level % 2 == 0 else 0.0
            yield (k - level // 2 - 0.5 + offset) / half, math.tan(offset / half)
        else:  # digit = floor((L - 1)(act + 1) / 2 + 1/2), arXiv 2411.19842
            yield (2 * k - level) / (level - 1), 0.0


def expected_entropy(levels: Sequence[int], bound: str = "paper", slope: float = 2.0) -> float:
    """Bits of the index under z ~ N(0, 1): the sum of the channels' entropies."""
    entropies = {level: _entropy(bin_probabilities(level, bound, slope)) for level in set(levels)}
    return sum(entropies[level] for level in levels)


def _entropy(p: np.ndarray) -> float:
    p = p[p > NEVER]
    return float(-(p * np.log2(p)).sum())


def expected_usage(levels: Sequence[int], tokens: int = 1_000_000, bound: str = "paper", slope: float = 2.0) -> float:
    """The expected fraction of codes hit by `tokens` independent tokens: the mean over codes of 1 - (1 - p)^tokens.

    Exact up to 2^20 codes. Beyond, codes are counted by log p on a grid (`_log_histogram`), within 1e-4 of the value.
    """
    bins = {level: bin_probabilities(level, bound, slope) for level in levels}
    if math.prod(levels) <= EXACT_CELLS:
        p, count = _cells(levels, bins)
    else:
        log_p, count = _log_histogram([bins[level] for level in levels])
        p = np.exp(log_p)
    return float(count @ _hit(p, tokens) / math.prod(levels))


def _cells(levels: Sequence[int], bins: Mapping[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(p, how many codes have it): codes that differ only in the order of equal channels' digits are visited once."""
    p, count = np.ones(1), np.ones(1)
    for level, channels in Counter(levels).items():
        digits = np.array(list(combinations_with_replacement(range(level), channels)))  # (n, channels)
        repeats = (digits[:, :, None] == np.arange(level)).sum(1)  # (n, level)
        factorials = np.array([math.factorial(k) for k in range(channels + 1)], dtype=np.float64)
        p = np.multiply.outer(p, bins[level][digits].prod(1)).ravel()
        count = np.multiply.outer(count, factorials[channels] / factorials[repeats].prod(1)).ravel()
    return p, count


def _hit(p: np.ndarray, tokens: int) -> np.ndarray:
    """1 - (1 - p)^tokens without cancellation; p is held just below 1, which the grid can overstep."""
    return -np.expm1(tokens * np.log1p(-np.minimum(p, 1 - 1e-12)))


def _log_histogram(bins: Sequence[np.ndarray], step: float = 0.005) -> tuple[np.ndarray, np.ndarray]:
    """(log p, number of codes) on a grid of `step` nats: the codes' log p is a sum over channels, so convolve.

    Each digit is shared between its two neighbouring grid points so that its log p is kept on average; what is left is
    a variance of at most step^2 / 4 per channel.
    """
    count, origin = np.ones(1), 0.0
    for p in bins:
        log_p = np.log(p[p > NEVER])
        places = (log_p - log_p.min()) / step
        lower = np.floor(places).astype(np.int64)
        upper_share = places - lower
        spread = np.zeros(len(count) + int(lower.max()) + 1)
        for place, share in zip(lower, upper_share, strict=True):
            spread[place : place + len(count)] += (1 - share) * count
            spread[place + 1 : place + 1 + len(count)] += share * count
        count = spread
        origin += float(log_p.min())
    return origin + step * np.arange(len(count)), count


def _check_bound(bound: str, slope: float) -> None:
    if bound not in BOUNDS:
        raise ValueError(f"unknown bound {bound!r}; valid: {', '.join(BOUNDS)}")
    if not 0 < slope < math.inf:
        raise ValueError(f"slope must be positive and finite, got {slope}")
