"""What stands at one position of a grid, as S symbols of small alphabets, and two ways to predict them.

Codes are split into symbols where one softmax over all of them would be too large. M positions of a batch, S symbols of
a position, K codes of a position, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

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
    """

    def __init__(self, vocab: Sequence[int], sizes: Sequence[int] | None) -> None:
        super().__init__()
        if sizes is not None and (min(sizes, default=0) < 1 or any(math.prod(sizes) != size for size in vocab)):
            product = math.prod(sizes)
            raise ValueError(f"digits must multiply to the codes of each slot, got {sizes} = {product} for {vocab}")
        self.sizes = list(vocab) if sizes is None else [*sizes] * len(vocab)  # of the S alphabets
        self.per_code = len(self.sizes) // len(vocab)
        base = torch.tensor([1, *([] if sizes is None else sizes[:-1])]).cumprod(0)
        self.register_buffer("base", base, persistent=False)
        self.register_buffer("radix", torch.tensor(self.sizes).view(len(vocab), -1), persistent=False)

    base: Tensor
    radix: Tensor

    def split(self, codes: Tensor) -> Tensor:
        digits = codes[..., None] // self.base % self.radix
        return digits.masked_fill(codes[..., None] < 0, -1).flatten(-2)

    def join(self, symbols: Tensor) -> Tensor:
        return (symbols.unflatten(-1, (-1, self.per_code)) * self.base).sum(-1)


class Joint(nn.Module):
    """The symbols of a position are independent given what came before it: one linear head for all."""

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

    Its input is the context at the first symbol and the sum of the embeddings of all former symbols at the others. With
    `shared`, all slots have one alphabet and one head, as the stages of a residual quantizer with one codebook.
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
        shared: bool,
    ) -> None:
        super().__init__()
        self.shared = shared
        self.slot = nn.Parameter(torch.empty(len(sizes), width))
        self.transformer = Transformer(width, depth, heads, mlp, dropout, style)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in (sizes[:1] if shared else sizes))
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
        return self.heads[0 if self.shared else slot]
