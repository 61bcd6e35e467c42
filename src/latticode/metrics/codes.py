"""Statistics of codes: codebook usage, dead codes, perplexity, entropy, histograms of FSQ levels.

Codebook collapse shows here: a usage far below 1 and a perplexity far below the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DENSE = 2**18  # codes; the largest vocabulary whose counts are held one by one


class CodeStatistics:
    """Streaming counts of the codes (..., K) of a tokenizer, slot by slot, on the CPU.

    A slot of more than DENSE codes stores only those seen, so memory follows the data and not the vocabulary.

    Examples:
        >>> statistics = CodeStatistics(vocab=[4])
        >>> statistics.update(torch.tensor([[[0], [1]], [[1], [0]]]))  # (B, positions, K)
        >>> scores = statistics.compute()
        >>> scores["usage"], scores["dead"], scores["perplexity"], scores["entropy_bits"]
        (0.5, 2, 2.0, 1.0)
    """

    def __init__(self, vocab: Sequence[int]):
        """`vocab`: the number of codes of each of the K slots, as a quantizer states it."""
        if not vocab or min(vocab) < 1:
            raise ValueError(f"vocab must name at least one slot, each of at least 1 code, got {tuple(vocab)}")
        self.vocab = tuple(vocab)
        self.positions = 0  # that hold a code in every slot
        self.invalid = 0  # positions that hold a -1: the quantizer's input was not a number
        self._counts = [_Dense(size) if size <= DENSE else _Sparse() for size in self.vocab]

    def update(self, codes: Tensor) -> None:
        """Count `codes` (..., K) int64. Raises ValueError for another K and for codes outside the vocabulary."""
        if codes.ndim < 1 or codes.shape[-1] != len(self.vocab) or codes.is_floating_point():
            raise ValueError(f"expected integer codes (..., {len(self.vocab)}), got {tuple(codes.shape)} {codes.dtype}")
        flat = codes.detach().reshape(-1, len(self.vocab)).cpu()
        valid = flat[(flat != -1).all(-1)]
        for slot, size in enumerate(self.vocab):
            column = valid[:, slot]
            if len(column) and (column.min() < 0 or column.max() >= size):
                raise ValueError(
                    f"slot {slot} has {size} codes, got codes from {int(column.min())} to {int(column.max())}"
                )
        for slot, counts in enumerate(self._counts):
            counts.add(valid[:, slot])
        self.positions += len(valid)
        self.invalid += len(flat) - len(valid)

    def merge(self, other: CodeStatistics) -> None:
        """Add what `other` has counted, as if this object had seen it too. Raises ValueError for another vocab."""
        if other.vocab != self.vocab:
            raise ValueError(f"cannot merge counts of vocab {other.vocab} into those of vocab {self.vocab}")
        for slot, counts in enumerate(self._counts):
            values, numbers = other.counts(slot)
            counts.merge(values, numbers)
        self.positions += other.positions
        self.invalid += other.invalid

    def counts(self, slot: int = 0) -> tuple[Tensor, Tensor]:
        """The codes seen in `slot` (M,), ascending, and how often (M,); both int64."""
        return self._counts[slot].seen()

    def level_histograms(self, levels: Sequence[int]) -> list[list[int]]:
        """How often each level of each channel of an FSQ occurs: one list of L_i counts per channel.

        A slot's code is mixed radix over a run of `levels` whose product is its vocabulary, first channel fastest
        (arXiv 2309.15505, App. A.1). Raises ValueError for levels that do not make up the vocabularies.
        """
        histograms: list[list[int]] = []
        for slot, size in enumerate(self.vocab):
            values, numbers = self.counts(slot)
            while size > 1:
                level = levels[len(histograms)] if len(histograms) < len(levels) else 0
                if level < 2 or size % level:
                    raise ValueError(f"levels {list(levels)} do not make up vocabularies of {list(self.vocab)} codes")
                digits = torch.zeros(level, dtype=torch.int64).index_add_(0, values % level, numbers)
                histograms.append(digits.tolist())
                values, size = values // level, size // level
        if len(histograms) != len(levels):
            raise ValueError(f"levels {list(levels)} do not make up vocabularies of {list(self.vocab)} codes")
        return histograms

    def compute(self) -> dict[str, Any]:
        """Numbers over everything seen, and the same for each slot under `slots`.

        usage: codebook usage, the fraction of the codewords that appear at least once (all slots together);
        entropy_bits: of the empirical distribution, per position: the sum over slots;
        perplexity: 2^entropy of a slot, the geometric mean over slots;
        dead: dead codes, which never appear; positions, invalid: positions with a code in every slot, and the others.
        Raises ValueError when no valid code was counted.
        """
        if not self.positions:
            raise ValueError(f"no valid codes were counted ({self.invalid} positions are invalid)")
        slots = []
        for slot, size in enumerate(self.vocab):
            _, numbers = self.counts(slot)
            bits = entropy_bits(numbers)
            slots.append(
                {
                    "vocab": size,
                    "usage": len(numbers) / size,
                    "perplexity": 2**bits,
                    "entropy_bits": bits,
                    "dead": size - len(numbers),
                }
            )
        total = sum(s["entropy_bits"] for s in slots)
        dead = sum(s["dead"] for s in slots)
        return {
            "usage": 1 - dead / sum(self.vocab),
            "perplexity": 2 ** (total / len(slots)),
            "entropy_bits": total,
            "dead": dead,
            "positions": self.positions,
            "invalid": self.invalid,
            "slots": slots,
        }


def entropy_bits(counts: Tensor) -> float:
    """-sum p log2 p of the empirical distribution p = counts / sum(counts); zero counts allowed.

    Examples:
        >>> entropy_bits(torch.tensor([5, 5, 5, 5, 0]))
        2.0
    """
    p = counts[counts > 0].double()
    p = p / p.sum()
    return max(0.0, float(-(p * p.log2()).sum()))


class _Dense:
    def __init__(self, size: int):
        self.table = torch.zeros(size, dtype=torch.int64)

    def add(self, codes: Tensor) -> None:
        self.table += torch.bincount(codes, minlength=len(self.table))

    def merge(self, values: Tensor, numbers: Tensor) -> None:
        self.table[values] += numbers

    def seen(self) -> tuple[Tensor, Tensor]:
        values = self.table.nonzero().squeeze(1)
        return values, self.table[values]


class _Sparse:
    def __init__(self) -> None:
        self.values = self.numbers = torch.zeros(0, dtype=torch.int64)

    def add(self, codes: Tensor) -> None:
        values, numbers = codes.unique(return_counts=True)
        self.merge(values, numbers)

    def merge(self, values: Tensor, numbers: Tensor) -> None:
        joined, place = torch.cat([self.values, values]).unique(return_inverse=True)
        self.numbers = torch.zeros_like(joined).index_add_(0, place, torch.cat([self.numbers, numbers]))
        self.values = joined

    def seen(self) -> tuple[Tensor, Tensor]:
        return self.values, self.numbers
