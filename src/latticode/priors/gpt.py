"""Autoregression over codes in raster order: VQGAN's GPT (2012.09841), VIM (2110.04627), LlamaGen (2406.06525), and
RQ-Transformer (2203.01941) and HQ-Transformer (NeurIPS 2022) with several symbols per position.

B batch, N positions, K codes of a position, S symbols of a position, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.core.derived import derived
from latticode.core.types import Sampling
from latticode.nn.rotary import check_pairs, grid_coordinates, rotary_table
from latticode.nn.transformer import Transformer
from latticode.priors.base import (
    DEFAULT,
    IN_ORDER,
    Chooser,
    Condition,
    Prior,
    check_rates,
    draw,
    filtered,
    means,
    recorded,
)
from latticode.priors.symbols import (
    Digits,
    Joint,
    Sequential,
    TopBottom,
    check_soft,
    check_targets,
    levels_of,
    nats,
    offsets,
    table_of,
)

SPAN = 64  # attention reads the cache up to the next multiple: half the work in the mean, and few shapes to compile
PLACES = ("learned", "rotary", "axial", "llamagen")


class State(NamedTuple):
    """How far an image is decoded (`GPT.step`).

    Examples:
        >>> state = State(cache=torch.zeros(2, 2, 1, 4, 16, 8), at=torch.tensor([3]))  # three positions are decoded
        >>> state._replace(at=state.at + 1).at
        tensor([4])
    """

    cache: Tensor  # (depth, 2, B, H, N, E), keys and values of the positions before
    at: Tensor  # (1,) int64, the position that comes next


class GPT(Prior):
    """A causal transformer reads the class, then position by position, and predicts the symbols of the next one.

    The input of a position is the sum of its symbols' embeddings. RQ-Transformer over a residual quantizer with one
    codebook is `GPT(vocab, grid, depth=24, inner_depth=4, shared=True, soft_labels=0.5)`, HQ-Transformer over two
    levels of codes `GPT(vocab, grid, inner_depth=4, shared=True, tops=1)`; a code of a large vocabulary becomes small
    symbols with `digits`, so that 2^18 codes cost two softmaxes over 512.

    Args:
        vocab: the number of codes of each of the K code slots.
        grid: positions along each axis.
        classes: 0 = unconditional.
        width, depth, heads, mlp: of the transformer; `mlp` is hidden width over width.
        dropout: on the embeddings and on each branch.
        label_dropout: probability that training drops the label, for classifier-free guidance.
        places: how positions are told apart. "learned": a vector is added to each; "rotary": queries and keys are
            turned by the place in the sequence; "axial": by the coordinates in the grid; "llamagen":
            the same, but queries and keys of the class are zeroed, as in LlamaGen's code.
        style: "gpt" or "llama", of the blocks (`latticode.nn.transformer.Block`).
        digits: sizes of the digits into which each code is split, first digit fastest, or None for whole codes; they
            must multiply to each entry of `vocab`. FSQ's levels or powers of 2 for groups of LFQ's bits.
        inner_depth: blocks of the transformer that predicts the symbols of a position one after another; 0: they are
            independent given the past, one linear head each.
        shared: one embedding and one head for all symbols of a position, which must have equal sizes; with `tops` one
            for the codes at the top and one for the others.
        tops: so many codes of a position come one after another, and all others at once given these; the loss then has
            the term `top_cross_entropy` for the first and `cross_entropy` for the others. 0: no such split.
        soft_labels: the temperature of the distributions by their distance from which training draws its codes and
            which are the targets in their place (2203.01941, section 3.2.3), for a tokenizer that can `soften`; 0: the
            targets are the tokenizer's codes.
        norm_between: whether a norm stands between the transformer over positions and that within a position; False,
            which needs `inner_depth`, is the authors' RQ-Transformer.

    Examples:
        >>> import torch
        >>> from latticode import Conditioning, Sampling
        >>> prior = GPT([64], [4, 4], classes=10, width=32, depth=2, heads=4)
        >>> codes, cond = torch.randint(64, (2, 4, 4, 1)), Conditioning(torch.tensor([3, 7]))
        >>> prior.loss(codes, cond)["cross_entropy"].backward()  # nats per symbol
        >>> prior.bits(codes, cond).shape  # negative log-likelihood of each image
        torch.Size([2])
        >>> prompt = codes.clone()
        >>> prompt[:, 2:] = -1  # the lower half is to be generated
        >>> drawn = prior.sample(2, cond, sampling=Sampling(guidance=1.5, top_k=20), seed=1, known=prompt)
        >>> bool((drawn[:, :2] == codes[:, :2]).all())
        True
    """

    uses, causal = IN_ORDER, True
    attends: int = 0  # width of the states that the transformer attends to beside the codes, of a subclass (`states`)

    def __init__(
        self,
        vocab: Sequence[int],
        grid: Sequence[int],
        classes: int = 0,
        width: int = 256,
        depth: int = 6,
        heads: int = 8,
        mlp: float = 4.0,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
        places: str = "learned",
        style: str = "gpt",
        digits: Sequence[int] | None = None,
        inner_depth: int = 0,
        shared: bool = False,
        tops: int = 0,
        soft_labels: float = 0.0,
        norm_between: bool = True,
    ) -> None:
        super().__init__(vocab, grid, classes)
        check_rates(dropout=dropout, label_dropout=label_dropout)
        if places not in PLACES:
            raise ValueError(f"unknown places {places!r}; valid: {', '.join(PLACES)}")
        if inner_depth < 0:
            raise ValueError(f"inner_depth must be >= 0 (0 = symbols are independent), got {inner_depth}")
        self.width, self.depth, self.heads, self.mlp = width, depth, heads, mlp
        self.dropout, self.label_dropout = dropout, label_dropout
        self.places, self.style = places, style
        self.digits = None if digits is None else list(digits)
        check_soft(soft_labels, digits)
        if (shared or tops) and not inner_depth:
            raise ValueError(f"shared and tops need inner_depth >= 1, got {inner_depth}")
        if not norm_between and not inner_depth:
            raise ValueError("norm_between=False needs inner_depth >= 1: one linear head alone needs the norm")
        if not 0 <= tops < len(self.vocab):
            raise ValueError(f"tops must leave one of the {len(self.vocab)} codes of a position, got {tops}")
        self.inner_depth, self.shared, self.tops, self.soft_labels = inner_depth, shared, tops, soft_labels
        self.norm_between = norm_between
        self.symbols = Digits(self.vocab, self.digits)
        sizes = self.symbols.sizes
        self.first = tops * self.symbols.per_code  # symbols at the top
        levels = levels_of(sizes, shared, self.first)

        self.label = nn.Embedding(self.classes + 1, width)  # the last is 'no label'
        rows, self.starts = table_of(sizes, levels)
        self.embedding = nn.Embedding(rows, width)
        self.place = nn.Parameter(torch.empty(self.positions, width)) if places == "learned" else None
        if places != "learned":
            check_pairs(width // heads, len(self._axes))
        self.drop = nn.Dropout(dropout)
        self.transformer = Transformer(width, depth, heads, mlp, dropout, style, self.attends, norm_between)
        inner = (sizes, width, inner_depth, heads, mlp, dropout, style, levels)
        if not inner_depth:
            self.head = Joint(sizes, width)
        else:
            self.head = TopBottom(*inner, tops=self.first) if tops else Sequential(*inner)
        nn.init.normal_(self.label.weight, std=width**-0.5)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        if self.place is not None:
            nn.init.normal_(self.place, std=width**-0.5)

    @property
    def offsets(self) -> Tensor:
        """Where the symbols of each slot start in the table of embeddings."""
        return offsets(self.starts, device=self.device)

    @property
    def rotary(self) -> Tensor | None:
        """The class stands at 0, the codes from 1 on along each axis: only distances between codes matter."""
        if self.places == "learned":
            return None
        table = llamagen_table if self.places == "llamagen" else sequence_table
        return table(self._axes, self.width // self.heads, device=self.device).to(self.label.weight.dtype)

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(self.grid) if self.places in ("axial", "llamagen") else (self.positions,)

    def logits(self, symbols_BNS: Tensor, labels_B: Tensor, states: Tensor | None = None) -> list[Tensor]:
        """Logits (B, N, size) of each of the S symbols of every position, given all that stands before it.

        `symbols_BNS` are known symbols of the first N positions, which may be fewer than the grid has.
        """
        embedded_BNSD = self.embedding(symbols_BNS + self.offsets)
        context_BND = self.context(embedded_BNSD[:, :-1].sum(2), labels_B, states)
        flat = self.head(context_BND.flatten(0, 1), embedded_BNSD.flatten(0, 1))
        return [logits.unflatten(0, symbols_BNS.shape[:2]) for logits in flat]

    def context(self, x_BND: Tensor, labels_B: Tensor, states: Tensor | None = None) -> Tensor:
        """What the transformer makes of the class, of the embeddings of the first positions, and of `states`:
        (B, 1 + N, D)."""
        x_BND = torch.cat([self._start(labels_B), x_BND], dim=1)
        places = torch.arange(x_BND.shape[1], device=x_BND.device)
        return self.transformer(self._placed(x_BND, places), is_causal=True, rotary=self.rotary, context=states)

    def begin(self, count: int) -> State:
        """The state of `count` images of which nothing is decoded."""
        at = torch.zeros(1, dtype=torch.int64, device=self.device)
        return State(self.transformer.cache(count, self.positions), at)

    @torch.no_grad()
    def step(
        self, codes: Tensor, labels: Tensor, state: State, u: Tensor, sampling: Sampling = DEFAULT
    ) -> tuple[Tensor, State]:
        """One step of decoding as a pure function of tensors that `torch.export` accepts, in eval mode.

        Codes (B, K) of the position `state.at`, drawn at uniform `u` (B, S), one for each symbol, and the state after
        it. `codes` (B, K) are those of the position before, which at the first one are not looked at; `labels` (B,) are
        -1 for none. Of `sampling`, temperature, top-k and top-p count; guidance needs a step of both branches. Raises
        ValueError for a prior that attends to images.

        Examples:
            >>> prior = GPT([64], [2, 2], classes=10, width=32, depth=2, heads=4).eval()
            >>> labels, codes, state = torch.tensor([3]), torch.zeros(1, 1, dtype=torch.int64), prior.begin(1)
            >>> for _ in range(prior.positions):
            ...     codes, state = prior.step(codes, labels, state, torch.rand(1, 1))
            >>> state.at
            tensor([4])
        """
        if self.attends:
            raise ValueError(f"{type(self).__name__} attends to images, a step knows labels alone")
        symbols: list[Tensor] = []

        def chosen(slot: int, logits: Tensor) -> Tensor:
            symbols.append(draw(filtered(logits.float(), sampling), u[:, slot]))
            return self.embedding(symbols[-1] + self.starts[slot])

        cache, at = state.cache.clone(), state.at
        before_B1D = self.embedding(self.symbols.split(codes) + self.offsets).sum(1, keepdim=True)
        x_B1D = torch.where(at == 0, self._start(labels), before_B1D)
        context_B1D = self.transformer.step(self._placed(x_B1D, at), cache, at, self.rotary)
        self.head.generate(context_B1D[:, 0], chosen)
        return self.symbols.join(torch.stack(symbols, dim=-1)), State(cache, at + 1)

    def states(self, condition: Condition) -> Tensor | None:
        """What the transformer attends to beside the codes, (B, S, attends). None: nothing."""
        return None

    def branches(self, condition: Condition, guidance: float) -> Condition:
        """The conditional branch and, if it is needed, the unconditional one."""
        return condition.branches(guidance)

    def noise_shape(self, sampling: Sampling) -> tuple[int, ...]:
        return self.positions, len(self.symbols.sizes)

    def _nats(self, codes: Tensor, condition: Condition, soft: Tensor | None = None) -> dict[str, Tensor]:
        """Of each symbol (B, N, S) given those before; its mean under `soft` (B, *grid, K, C)."""
        symbols_BNS = self.symbols.split(codes).flatten(1, -2)
        soft_BNSC = None if soft is None else soft.flatten(1, -3)
        logits = self.logits(symbols_BNS, condition.labels, self.states(condition))
        nats_BNS = nats(logits, symbols_BNS, soft_BNSC)
        if not self.tops:
            return {"cross_entropy": nats_BNS}
        top_BNS, bottom_BNS = nats_BNS.tensor_split([self.first], dim=-1)
        return {"top_cross_entropy": top_BNS, "cross_entropy": bottom_BNS}

    def _soft_terms(self, codes: Tensor, condition: Condition, soft: Tensor) -> dict[str, Tensor]:
        check_targets(soft, codes, self.symbols)
        return means(self._nats(codes, condition.drop(self.label_dropout), soft))

    def _features(self, codes: Tensor, condition: Condition) -> list[Tensor]:
        """Over the slots that predict the positions. The last position is predicted only, so nothing tells of its
        codes."""
        embedded_BNSD = self.embedding(self.symbols.split(codes).flatten(1, -2) + self.offsets)
        with recorded(self.transformer.blocks) as seen:
            self.context(embedded_BNSD[:, :-1].sum(2), condition.labels, self.states(condition))
        return [x_BND.mean(1) for x_BND in seen]

    def _draw(self, known: Tensor, condition: Condition, noise: Tensor, choose: Chooser) -> Tensor:
        """One pass over one position for each, twice as wide under guidance.

        Temperature, top-k and top-p act on each symbol. Known codes are kept and the others drawn given all that stands
        before them: an image prompt. What is known behind a position does not inform it, as in any autoregression.
        """
        symbols_BNS = self.symbols.split(known).flatten(1, -2)
        condition = self.branches(condition, choose.sampling.guidance)
        rows, count = len(condition.labels), len(known)
        copies = rows // max(count, 1)

        def chosen(n: int, slot: int, logits: Tensor) -> Tensor:
            symbols_BNS[:, n, slot] = choose(logits, noise[:, n, slot], symbols_BNS[:, n, slot])
            return self.embedding(symbols_BNS[:, n, slot] + self.starts[slot]).repeat(copies, 1)

        places = torch.arange(self.positions, device=known.device)
        cache = self.transformer.cache(rows, self.positions)
        # the first positions that no image has open
        ready = int((symbols_BNS >= 0).all(2).all(0).long().cumprod(0).sum())
        prompt = self.embedding(symbols_BNS[:, :ready] + self.offsets).sum(2).repeat(copies, 1, 1)
        states = self.states(condition)
        states = None if states is None else self.transformer.read(states)
        x_BMD = torch.cat([self._start(condition.labels), prompt], dim=1)
        for n in range(ready, self.positions):
            at = places[n + 1 - x_BMD.shape[1] : n + 1]
            so_far = cache[..., : (n // SPAN + 1) * SPAN, :]
            context_BMD = self.transformer.step(self._placed(x_BMD, at), so_far, at, self.rotary, states)
            x_BMD = self.head.generate(context_BMD[:, -1], partial(chosen, n))[:, None]
        return self.symbols.join(symbols_BNS).view(count, *self.grid, len(self.vocab))

    def _start(self, labels_B: Tensor) -> Tensor:
        """The first token (B, 1, D)."""
        return self.label(torch.where(labels_B < 0, self.classes, labels_B))[:, None]

    def _placed(self, x_BMD: Tensor, at_M: Tensor) -> Tensor:
        """The transformer's input, given that the tokens `x_BMD` predict the positions `at_M`."""
        return self.drop(x_BMD if self.place is None else x_BMD + self.place[at_M])


@derived
def sequence_table(axes: Sequence[int], head_width: int) -> Tensor:
    """The rotary table (N, 2, E / 2) of a class and then all codes but the last of a grid."""
    cells = grid_coordinates(axes)[:-1] + 1
    return rotary_table(F.pad(cells, (0, 0, 1, 0)), head_width)


@derived
def llamagen_table(axes: Sequence[int], head_width: int) -> Tensor:
    """The same with zeros for the class: its query attends to all alike, and every query scores its key with 0."""
    table = sequence_table(axes, head_width, device=torch.device("cpu")).clone()
    table[0] = 0
    return table
