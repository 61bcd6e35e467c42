"""Codes as symbols of small alphabets (digits), and the three heads that predict the S symbols of a position.

Codes are split into symbols where one softmax over all of them would be too large. M positions of a batch, S symbols of
a position, K codes of a position, D width. Symbols of one level, which are neighbours, share an embedding and a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.core.derived import derived
from latticode.nn.transformer import Transformer, initialise

Choose = Callable[[int, Tensor], Tensor]  # slot and logits (M, size) to the embedding (M, D) of what was chosen there


class Digits(nn.Module):
    """Codes (..., K) to symbols (..., S) and back: each code in mixed radix, the first digit fastest.

    That is how FSQ numbers its grid and LFQ its bits, so `sizes` [8, 5, 5, 5] are FSQ's levels and [512, 512] are two
    groups of 9 bits. A negative code is unknown, and so are all its digits, which are -1.

    Args:
        vocab: the number of codes of each of the K code slots.
        sizes: of the digits of every code; None keeps codes whole. Raises ValueError unless their product is each
            entry of `vocab`.

    Examples:
        >>> import torch
        >>> digits = Digits([1000], [8, 5, 5, 5])
        >>> digits.split(torch.tensor([[999], [-1]]))
        tensor([[ 7,  4,  4,  4],
                [-1, -1, -1, -1]])
        >>> digits.join(torch.tensor([[7, 4, 4, 4]]))
        tensor([[999]])
    """

    def __init__(self, vocab: Sequence[int], sizes: Sequence[int] | None) -> None:
        super().__init__()
        if sizes is not None and (min(sizes, default=0) < 1 or any(math.prod(sizes) != size for size in vocab)):
            product = math.prod(sizes)
            raise ValueError(f"digits must multiply to the codes of each slot, got {sizes} = {product} for {vocab}")
        self.sizes = list(vocab) if sizes is None else [*sizes] * len(vocab)  # of the S alphabets
        self.per_code = len(self.sizes) // len(vocab)
        self._digits = self.sizes[: self.per_code]  # of each code
        self._base = [math.prod(self._digits[:i]) for i in range(self.per_code)]

    def split(self, codes: Tensor) -> Tensor:
        """Digits (..., K * digits per code) of `codes` (..., K), the first fastest; -1 of a code of -1."""
        known = codes >= 0
        if self.per_code == 1:
            return torch.where(known, codes, -1)
        digits = [codes // base % size for base, size in zip(self._base, self._digits, strict=True)]
        return torch.where(known[..., None], torch.stack(digits, dim=-1), -1).flatten(-2)

    def join(self, symbols: Tensor) -> Tensor:
        """Codes (..., K) of digits (..., K * digits per code): the inverse of `split`."""
        digits = torch.unflatten(symbols, -1, (-1, self.per_code)).unbind(-1)
        return torch.stack([digit * base for digit, base in zip(digits, self._base, strict=True)]).sum(0)


def levels_of(sizes: Sequence[int], shared: bool, tops: int = 0) -> list[int]:
    """How many symbols each level has: one; with `shared` the first `tops` and all others, or all of them for 0.

    Raises ValueError for symbols of different `sizes` in one level.
    """
    levels = [count for count in (tops, len(sizes) - tops) if count] if shared else [1] * len(sizes)
    rest = list(sizes)
    for count in levels:
        one, rest = rest[:count], rest[count:]
        if len(set(one)) > 1:
            raise ValueError(f"shared needs symbols of one size, got {one}")
    return levels


def table_of(sizes: Sequence[int], levels: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """The rows of one table of embeddings for all symbols, and the S rows where the alphabet of each begins."""
    starts: list[int] = []
    rows = slot = 0
    for count in levels:
        starts += [rows] * count
        rows += sizes[slot]
        slot += count
    return rows, tuple(starts)


@derived
def offsets(starts: Sequence[int]) -> Tensor:
    """(S,) int64: what is added to a symbol to find its row in the table of `table_of`."""
    return torch.tensor(starts)


def nats(logits: Sequence[Tensor], symbols: Tensor, soft: Tensor | None = None, *, smoothing: float = 0.0) -> Tensor:
    """Cross entropy (..., S) of `symbols` (..., S), or of distributions `soft` (..., S, C) in their place, under S
    `logits` (..., size), with label smoothing."""
    found: list[Tensor] = []
    for slot, p in enumerate(logits):
        target = symbols[..., slot] if soft is None else soft[..., slot, : p.shape[-1]].movedim(-1, 1)
        found.append(F.cross_entropy(p.float().movedim(-1, 1), target, reduction="none", label_smoothing=smoothing))
    return torch.stack(found, dim=-1)


def check_soft(temperature: float, digits: Sequence[int] | None) -> None:
    """Raise ValueError for a temperature of soft labels that is negative, and for > 0 together with digits."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"soft_labels must be a temperature >= 0 (0 = the codes themselves), got {temperature}")
    if temperature and digits is not None:
        raise ValueError(f"soft_labels are distributions over whole codes, got digits {list(digits)} too")


def check_targets(soft: Tensor, codes: Tensor, symbols: Digits) -> None:
    """Raise ValueError unless `soft` is (*`codes`, C), with C the largest alphabet of whole codes."""
    expected = (*codes.shape, max(symbols.sizes))
    if symbols.per_code > 1 or tuple(soft.shape) != expected:
        whole = "" if symbols.per_code == 1 else "no digits and "
        raise ValueError(f"soft targets need {whole}shape {expected}, got {tuple(soft.shape)}")


class Joint(nn.Module):
    """The symbols of a position are independent given what came before it: one linear head for all.

    Examples:
        >>> head = Joint([8, 5], width=16)
        >>> [logits.shape[-1] for logits in head(torch.randn(3, 16), torch.randn(3, 2, 16))]
        [8, 5]
    """

    def __init__(self, sizes: Sequence[int], width: int) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.head = nn.Linear(width, sum(sizes))
        self.apply(initialise)

    def forward(self, context_MD: Tensor, embedded_MSD: Tensor) -> list[Tensor]:
        """Logits (M, size) of each symbol; `embedded_MSD` is not looked at."""
        return list(self.head(context_MD).split(self.sizes, dim=-1))

    def generate(self, context_MD: Tensor, choose: Choose) -> Tensor:
        """The sum (M, D) of the embeddings of what `choose` chose, symbol by symbol."""
        slots = enumerate(self.head(context_MD).split(self.sizes, dim=-1))
        return torch.stack([choose(slot, logits) for slot, logits in slots]).sum(0)


class Sequential(nn.Module):
    """Each symbol given the former ones of its position: RQ-Transformer's depth transformer (2203.01941, 3.2.2).

    Its input is the context at the first symbol and the sum of the embeddings of all former symbols at the others. The
    stages of a residual quantizer with one codebook are one level.

    Examples:
        >>> head = Sequential([8, 8], 16, depth=1, heads=2, mlp=2.0, dropout=0.0, style="gpt", levels=[2])
        >>> states, former = torch.randn(3, 16), torch.randn(3, 2, 16)
        >>> one, two = head(states, former), head(states, former + torch.tensor([[0.0], [1.0]]))
        >>> torch.equal(one[1], two[1])  # no symbol sees itself or what comes later
        True
        >>> with torch.no_grad():  # by what `choose` takes, here nothing, to the sum of its embeddings
        ...     head.generate(states, choose=lambda slot, logits: torch.zeros(3, 16)).shape
        torch.Size([3, 16])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        width: int,
        depth: int,
        heads: int,
        mlp: float,
        dropout: float,
        style: str,
        levels: Sequence[int],
    ) -> None:
        super().__init__()
        self.level = [level for level, count in enumerate(levels) for _ in range(count)]  # of each slot
        self.slot = nn.Parameter(torch.empty(len(sizes), width))
        self.transformer = Transformer(width, depth, heads, mlp, dropout, style)
        self.heads = nn.ModuleList(nn.Linear(width, sizes[self.level.index(i)]) for i in range(len(levels)))
        self.heads.apply(initialise)
        nn.init.normal_(self.slot, std=width**-0.5)

    def forward(self, context_MD: Tensor, embedded_MSD: Tensor) -> list[Tensor]:
        """Logits (M, size) of each symbol given the embeddings of the position's symbols."""
        x_MSD = torch.cat([context_MD[:, None], embedded_MSD[:, :-1].cumsum(1)], dim=1) + self.slot
        y_MSD = self.transformer(x_MSD, is_causal=True)
        return [self._head(slot)(y_MD) for slot, y_MD in enumerate(y_MSD.unbind(1))]

    def generate(self, context_MD: Tensor, choose: Choose) -> Tensor:
        """The sum (M, D) of the embeddings of what `choose` chose, symbol by symbol."""
        slots = len(self.slot)
        cache, at = self.transformer.cache(len(context_MD), slots), torch.arange(slots, device=context_MD.device)
        x_MD, total_MD = context_MD, torch.zeros_like(context_MD)
        for slot in range(slots):
            y_M1D = self.transformer.step((x_MD + self.slot[slot])[:, None], cache, at[slot : slot + 1])
            x_MD = total_MD = total_MD + choose(slot, self._head(slot)(y_M1D[:, 0]))
        return total_MD

    def _head(self, slot: int) -> nn.Module:
        return self.heads[self.level[slot]]


class TopBottom(Sequential):
    """The first `tops` symbols one after another, then all others at once, independent given these: HQ-Transformer's
    head (You et al., NeurIPS 2022; there one top code and the four bottom codes below it).

    Its input is as that of `Sequential` up to the first of the others, and the same at all of these, which see each
    other's places.

    Examples:
        >>> head = TopBottom([8] * 5, 16, 1, 2, 2.0, 0.0, "gpt", [1, 4], tops=1)  # one code and the four below it
        >>> [logits.shape for logits in head(torch.randn(3, 16), torch.randn(3, 5, 16))] == [(3, 8)] * 5
        True
    """

    def __init__(self, sizes: Sequence[int], *inner: Any, tops: int) -> None:
        super().__init__(sizes, *inner)
        self.tops = tops

    def forward(self, context_MD: Tensor, embedded_MSD: Tensor) -> list[Tensor]:
        """Logits (M, size) of each symbol given the embeddings of the position's first symbols."""
        given_MTD = torch.cat([context_MD[:, None], embedded_MSD[:, : self.tops].cumsum(1)], dim=1)
        y_MSD = self._outputs(given_MTD)
        return [self._head(slot)(y_MD) for slot, y_MD in enumerate(y_MSD.unbind(1))]

    def generate(self, context_MD: Tensor, choose: Choose) -> Tensor:
        """The sum (M, D) of the embeddings of what `choose` chose. Nothing is cached: with one symbol at the top that
        is one of six places run twice."""
        given, total_MD = [context_MD], torch.zeros_like(context_MD)
        for slot in range(self.tops):
            y_MTD = self.transformer(torch.stack(given, dim=1) + self.slot[: slot + 1], is_causal=True)
            total_MD = total_MD + choose(slot, self._head(slot)(y_MTD[:, -1]))
            given.append(total_MD)
        y_MSD = self._outputs(torch.stack(given, dim=1))
        for slot in range(self.tops, len(self.slot)):
            total_MD = total_MD + choose(slot, self._head(slot)(y_MSD[:, slot]))
        return total_MD

    def _outputs(self, given_MTD: Tensor) -> Tensor:
        """Of all slots (M, S, D), given the inputs of the first ones and of the first of the others."""
        slots, device = len(self.slot), given_MTD.device
        inputs_MSD = given_MTD[:, reads(slots, self.tops, device=device)] + self.slot
        return self.transformer(inputs_MSD, sees(slots, self.tops, device=device))


@derived
def reads(slots: int, tops: int) -> Tensor:
    """(S,): the input of each slot of `TopBottom`."""
    return torch.arange(slots).clamp(max=tops)


@derived
def sees(slots: int, tops: int) -> Tensor:
    """(S, S) bool: which inputs each slot of `TopBottom` may attend to."""
    at = torch.arange(slots)
    return (at <= at[:, None]) | (at[:, None] >= tops)
