"""Nearest-neighbour search in O(N + K) memory: the tokens x codes matrix never exists, only one tile of it at a time.

|x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), so the nearest code has the greatest score x.c - |c|^2 / 2. Three passes:

1. The scores of a tile are one matrix product; of each block of 8 to 64 codes only the greatest is kept, with an amax,
   because an argmax costs about five times as much on a CPU. Codes run down the tile and tokens across it, since an
   amax over rows is vectorised.
2. The blocks whose best score is within rounding error of the token's best are scored again, which names codes.
3. The codes within rounding error of the best are compared in float64, by their distances.

Pass 2 and 3 keep all that a rigorous bound on the rounding error (`margin`) cannot exclude: about one block and one
code per token. So the answer is that of float64. Tokens with more than `CROWD` such blocks (codes that are equal, or
lie in clusters far apart for their width), or with none (overflow), are few in practice and searched in float64 alone.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCKS = (8, 16, 32, 64)  # codes of which pass 1 remembers only the best
CROWD = 16  # blocks of one token that pass 2 looks into
CPU_TILE = (512, 1024)  # tokens x codes: 2 MiB of scores, which stay in a core's cache
GPU_TILE = (8192, 8192)  # 256 MiB: enough work for one launch


def traced(x: Tensor, codebook: Tensor) -> Tensor:
    """`tiled` in three operators that every exporter and runtime knows; the N x K scores exist."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    centre = codebook.to(dtype).mean(dim=0)
    codes = codebook.to(dtype) - centre
    return torch.addmm(codes.square().sum(dim=1) / -2, x.to(dtype) - centre, codes.t()).argmax(dim=1)


def tiled(x: Tensor, codebook: Tensor) -> Tensor:
    """The three passes of this module, in PyTorch on any device.

    Half precision is computed in float32. Both sides are shifted by the mean of the codebook first: a common offset of
    1000 would otherwise leave the scores no digit to tell codes apart.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    centre = codebook.to(dtype).mean(dim=0)
    vectors, offsets = _padded(codebook.to(dtype) - centre)
    reach = vectors.norm(dim=-1).amax()
    rows, width = CPU_TILE if x.device.type == "cpu" else GPU_TILE
    pieces = max(1, rows * width // vectors[0].numel())  # blocks gathered at once: no more numbers than one tile
    nearest = torch.full((len(x),), -1, device=x.device)
    with full_float32():
        for start in range(0, len(x), rows):
            tile = x[start : start + rows]
            centred = tile.to(dtype) - centre
            best, scores = _best_of_blocks(centred, vectors, offsets, width)
            top = best.amax(dim=0)
            # An overflow makes the margin infinite, but not so that padding, of score -inf, may win.
            least = (top - margin(centred, top, reach)).clamp(min=torch.finfo(dtype).min)
            pairs = _near_blocks(best, least)
            if scores is None:
                found = [(part, _scores(centred, vectors, offsets, part)) for part in pairs.split(pieces)]
            else:
                found = [(pairs, scores[pairs[:, 0], :, pairs[:, 1]])]
            hits = [_near_codes(least, part, of_codes) for part, of_codes in found]
            nearest[start : start + rows] = _decide(tile, codebook, torch.cat(hits), pieces * vectors.shape[1])
    left = (nearest < 0).nonzero().squeeze(1)
    for part in left.split(rows):
        nearest[part] = _search_exactly(x[part], codebook, centre, width)
    return nearest


@contextmanager
def full_float32() -> Generator[None, None, None]:
    """No TF32 and no bf16 inside matrix products, whatever a training script has set for its network."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
        previous = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, precision in zip(backends, previous, strict=True):
                backend.fp32_precision = precision
    else:  # torch before 2.9
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)


def _padded(codes: Tensor) -> tuple[Tensor, Tensor]:
    """`codes` (K, d) in blocks (b, B, d), and -|c|^2 / 2 (b, B), which is -inf for padding: it never wins.

    Per token pass 1 leaves K / B numbers to compare and pass 2 gathers B d, so the best B grows with sqrt(K / d).
    """
    size, dim = codes.shape
    block = max([BLOCKS[0], *(b for b in BLOCKS if b * b * dim <= size)])
    vectors = codes.new_zeros(-(-size // block), block, dim)
    offsets = codes.new_full(vectors.shape[:2], -torch.inf)
    vectors.view(-1, dim)[:size] = codes
    offsets.view(-1)[:size] = codes.square().sum(dim=1) / -2
    return vectors, offsets


def _best_of_blocks(x: Tensor, vectors: Tensor, offsets: Tensor, width: int) -> tuple[Tensor, Tensor | None]:
    """The greatest score in each block of `vectors` (b, B, d) for each row of `x` (n, d): (b, n).

    And all scores (b, B, n), if they fit one tile.
    """
    (count, block, dim), n = vectors.shape, len(x)
    step = width // block
    best = x.new_empty(count, n)
    scores = x.new_empty(min(step, count), block, n)
    for start in range(0, count, step):
        some = slice(start, start + step)
        tile = scores[: len(vectors[some])]
        torch.addmm(offsets[some].reshape(-1, 1), vectors[some].view(-1, dim), x.t(), out=tile.view(-1, n))
        torch.amax(tile, dim=1, out=best[some])
    return best, scores if count <= step else None


def margin(x: Tensor, top: Tensor, reach: Tensor) -> Tensor:
    """How far below the best computed score `top` (n,) the nearest code's own may lie, for rows of `x` (n, d): (n,).

    A dot product of length d computed in any order is off by at most d u / (1 - d u) times the sum of its absolute
    terms (Higham, Accuracy and Stability of Numerical Algorithms, eq. 3.5), here |x| r + r^2 / 2 for a code of length
    r; a few u more come from centring, and d u r^2 / 2 from |c|^2 / 2. With eps = 2 u, two such errors together stay
    below (d + 8) eps (|x| r + r^2).

    The length r of neither code need be known: both are within |x| + |x - c| of the centre, where the distance of the
    best is sqrt(|x|^2 - 2 top), or `reach`, the longest of all. A quarter more covers the rounding of this function up
    to d = 65536. Underflow adds less than the smallest normal number per operation.
    """
    kind = torch.finfo(x.dtype)
    norm = torch.linalg.vector_norm(x, dim=1)
    r = 1.25 * torch.minimum(norm + (norm.square() - 2 * top).clamp(min=0).sqrt(), reach)
    return (x.shape[1] + 8) * (kind.eps * (norm * r + r.square()) + 8 * kind.tiny)


def _near_blocks(best: Tensor, least: Tensor) -> Tensor:
    """The pairs (p, 2) of block and token where `best` (b, n) reaches `least` (n,), without crowded tokens."""
    near = best >= least
    pairs = near.nonzero()
    if len(pairs) > best.shape[1]:
        pairs = (near & (near.sum(dim=0) <= CROWD)).nonzero()
    return pairs


def _scores(x: Tensor, vectors: Tensor, offsets: Tensor, pairs: Tensor) -> Tensor:
    """The scores (p, B) of the codes of each of `pairs` (p, 2) of block and row of `x` (n, d)."""
    blocks, tokens = pairs.unbind(dim=1)
    # Whole blocks are gathered, so that each copy is one contiguous run.
    return torch.baddbmm(offsets[blocks, :, None], vectors.index_select(0, blocks), x[tokens, :, None]).squeeze(2)


def _near_codes(least: Tensor, pairs: Tensor, scores: Tensor) -> Tensor:
    """The pairs (h, 2) of token and code with a score of `least` (n,) or more, of the `scores` (p, B) of `pairs`."""
    blocks, tokens = pairs.unbind(dim=1)
    pair, place = (scores >= least[tokens, None]).nonzero().unbind(dim=1)
    return torch.stack([tokens[pair], blocks[pair] * scores.shape[1] + place], dim=1)


def _decide(x: Tensor, codebook: Tensor, hits: Tensor, at_once: int) -> Tensor:
    """Of each row of `x` (n, d), the nearest of its codes in `hits` (h, 2), the first of equals, or -1 without any."""
    size = len(codebook)
    tokens, codes = hits.unbind(dim=1)
    nearest = codes.new_full((len(x),), -1).scatter_(0, tokens, codes)
    if len(tokens) == len(x) and bool((nearest >= 0).all()):
        return nearest  # each has one code, and nothing else could be nearer
    number = torch.bincount(tokens, minlength=len(x))
    rivals = number[tokens] > 1
    tokens, codes = tokens[rivals], codes[rivals]
    if not len(tokens):
        return nearest
    exact = _exact(x)
    distances = torch.cat(
        [
            (x[token].to(exact) - codebook[code].to(exact)).square().sum(dim=1)
            for token, code in zip(tokens.split(at_once), codes.split(at_once), strict=True)
        ]
    )
    least = distances.new_full((len(x),), torch.inf).scatter_reduce(0, tokens, distances, "amin")
    first = torch.full_like(nearest, size).scatter_reduce(
        0, tokens, codes.where(distances == least[tokens], size), "amin"
    )
    return torch.where(number > 1, first.where(first < size, -1), nearest)


def _search_exactly(x: Tensor, codebook: Tensor, centre: Tensor, width: int) -> Tensor:
    """`nearest_code` of a few rows `x` (n, d) with scores in float64: (n,)."""
    exact = _exact(x)
    x = x.to(exact) - centre.to(exact)
    best, nearest = x.new_full((len(x),), -torch.inf), torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for start in range(0, len(codebook), width):
        codes = codebook[start : start + width].to(exact) - centre.to(exact)
        score, code = torch.addmm(codes.square().sum(dim=1) / -2, x, codes.t()).max(dim=1)
        nearest = torch.where(score > best, code + start, nearest)
        best = torch.maximum(best, score)
    return nearest


def _exact(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # Apple GPUs have no float64
