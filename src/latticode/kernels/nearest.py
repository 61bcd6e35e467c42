"""Nearest-neighbour search in O(N + K) memory: the tokens x codes matrix never exists, only one tile of it at a time.

|x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), so the nearest code has the greatest score x.c - |c|^2 / 2. Three passes:

1. The scores of a tile are one matrix product; of each block of `BLOCK` codes only the greatest is kept, with an amax,
   because an argmax costs about five times as much on a CPU.
2. The two best blocks of each token are scored again, which names their `FINALISTS` best codes.
3. The finalists are compared in float64. So the answer is the exact one where float32 cannot order two close codes,
   and does not depend on how a matrix product is split for a given number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BLOCK = 32  # codes of which pass 1 remembers only the best
FINALISTS = 4  # codes that pass 3 compares
CPU_TILE = (128, 4096)  # tokens x codes: 2 MiB of scores, which stay in a core's cache
GPU_TILE = (8192, 8192)  # 256 MiB: enough work for one launch


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """For each row of `x` (N, d) the row of `codebook` (K, d) at the least Euclidean distance: (N,) int64.

    Half precision is computed in float32. Both sides are shifted by the mean of the codebook first: a common offset of
    1000 would otherwise leave the scores no digit to tell codes apart.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    centre = codebook.to(dtype).mean(dim=0)
    codes = codebook.to(dtype) - centre
    vectors, offsets = _padded(codes)
    rows, width = CPU_TILE if x.device.type == "cpu" else GPU_TILE
    nearest = torch.empty(len(x), dtype=torch.int64, device=x.device)
    with _full_float32():
        for start in range(0, len(x), rows):
            tile = x[start : start + rows].to(dtype) - centre
            blocks = _best_blocks(tile, vectors, offsets, width)
            nearest[start : start + rows] = _decide(tile, codes, _finalists(tile, vectors, offsets, blocks))
    return nearest


@contextmanager
def _full_float32() -> Iterator[None]:
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
    """`codes` (K, d) padded to whole blocks (P, d), and -|c|^2 / 2 (P,), which is -inf for padding: it never wins."""
    size, dim = codes.shape
    total = -(-size // BLOCK) * BLOCK
    vectors, offsets = codes.new_zeros(total, dim), codes.new_full((total,), -torch.inf)
    vectors[:size] = codes
    offsets[:size] = codes.square().sum(dim=1) / -2
    return vectors, offsets


def _best_blocks(x: Tensor, vectors: Tensor, offsets: Tensor, width: int) -> Tensor:
    """Of each row of `x` (n, d), the two blocks with the greatest scores: (n, 2), or (n, 1) if there is one block."""
    total = len(offsets)
    best = x.new_empty(len(x), total // BLOCK)
    scores = x.new_empty(len(x) * min(width, total))
    for start in range(0, total, width):
        stop = min(start + width, total)
        tile = scores[: len(x) * (stop - start)].view(len(x), stop - start)
        torch.addmm(offsets[start:stop], x, vectors[start:stop].t(), out=tile)
        best[:, start // BLOCK : stop // BLOCK] = tile.view(len(x), -1, BLOCK).amax(dim=-1)
    return best.topk(min(2, best.shape[1]), dim=1).indices


def _finalists(x: Tensor, vectors: Tensor, offsets: Tensor, blocks: Tensor) -> Tensor:
    """Of each row of `x` (n, d), the codes with the greatest scores among its `blocks` (n, b): (n, f), ascending."""
    n, dim = x.shape
    # Whole blocks are gathered, so that each copy is one contiguous run.
    near = vectors.view(-1, BLOCK * dim).index_select(0, blocks.flatten()).view(n, -1, dim)
    scores = (near * x[:, None]).sum(dim=-1) + offsets.view(-1, BLOCK)[blocks].flatten(1)
    places = scores.topk(FINALISTS, dim=1).indices
    return (blocks.gather(1, places // BLOCK) * BLOCK + places % BLOCK).sort(dim=1).values


def _decide(x: Tensor, codes: Tensor, finalists: Tensor) -> Tensor:
    """Of each row of `x` (n, d), the nearest of its `finalists` (n, f) in float64, the first of equals: (n,)."""
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # Apple GPUs have no float64
    finalists = finalists.clamp(max=len(codes) - 1)  # padding, if it came this far, stands for the last code again
    near = codes.index_select(0, finalists.flatten()).view(*finalists.shape, -1).to(exact)
    scores = (near * (x.to(exact)[:, None] - near / 2)).sum(dim=-1)  # x.c - |c|^2 / 2
    return finalists.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
