"""The contract of every quantizer, and the one place that sees to masks, broken tokens, precision and ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from latticode.core import distributed
from latticode.core.freezing import Freezable
from latticode.core.modules import described
from latticode.core.types import Quantized
from latticode.quantizers.codebook import Codebook, passing

T = TypeVar("T")
Loss = tuple[Tensor, Tensor]  # sum over tokens and their number: what parts and ranks can be pooled by


class Tokens(NamedTuple):
    """What a quantizer works on inside: latents in float32 at least, each of them finite.

    Examples:
        >>> x, keep = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([True, False])
        >>> Tokens(x, keep, target=x, upkeep=False).through(lambda values: values / 2).target[0]
        tensor([0.5000, 1.0000])
    """

    values: Tensor  # (..., D), of no meaning where not kept
    keep: Tensor  # (...) bool; the others are masked or not finite, and may touch neither losses nor statistics
    target: Tensor  # `values` as the losses see them: the same numbers, perhaps with another gradient
    upkeep: bool  # this is the first use in a training step: codebooks may be initialized and restarted
    context: Tensor | None = None  # (..., D), what earlier stages of a residual quantizer have made of the token

    def become(self, values: Tensor, target: Tensor | None = None) -> Tokens:
        """The same tokens with other values."""
        return self._replace(values=values, target=values if target is None else target)

    def through(self, function: Callable[[Tensor], Tensor]) -> Tokens:
        """The same tokens after `function` (..., D) -> (..., E), which treats each by itself."""
        values = function(self.values)
        return self.become(values, values if self.target is self.values else function(self.target))


class Update(NamedTuple):
    """A codebook and tokens (..., D) that chose codes (...) of it, for its running averages.

    Examples:
        >>> from latticode import VQ
        >>> keep = torch.tensor([True, True, False])  # the last one is padding
        >>> update = Update(VQ(4, 2).embedding, torch.randn(3, 2), codes=torch.tensor([0, 3, 1]), keep=keep)
        >>> update.codes[update.keep]  # whose averages move
        tensor([0, 3])
    """

    codebook: Codebook
    tokens: Tensor
    codes: Tensor
    keep: Tensor


class Step(NamedTuple):
    """What a quantizer makes of `Tokens`.

    Examples:
        >>> step = Step(torch.zeros(5, 2), torch.zeros(5, 1, dtype=torch.int64))  # FSQ's: no losses, nothing to move
        >>> step.losses, step.updates
        ({}, ())
    """

    latents: Tensor  # (..., D), with gradients
    codes: Tensor  # (..., K) int64
    losses: Mapping[str, Loss] = {}
    updates: Sequence[Update] = ()


class Quantizer(Freezable, ABC):
    """Maps continuous latents to discrete codes and back. Channel-last, any rank >= 1, empty batches allowed.

    Laws, held by `tests/laws/test_quantizers.py` for every registered class: `decode(encode(z))` equals the latents of
    `forward(z)` in eval mode bit for bit; codes lie in `vocab`; the result for a token does not depend on the others in
    eval mode; a spec rebuilds the module.

    Arithmetic is float32 whatever the type of z, the parameters or the autocast (float64 for a float64 module), so the
    codes of a value do not depend on them; latents have z's type, `decode` gives the module's. A token that holds a NaN
    or an infinity has codes -1 and NaN latents; one that `mask` excludes has codes -1 and latents 0. Both get no
    gradient and touch neither losses nor running statistics. Under torch.distributed all ranks must run each training
    step; losses, their averaged gradients and codebooks are those of one process on the joined batch. Random draws come
    from torch's global generators.

    A class implements `_quantize`, `_encode` and `_decode`, which see clean tokens only, and so composes with
    the others.

    Around it: parameters that are frozen (`requires_grad_(False)`) freeze running averages too. A forward pass that
    activation checkpointing replays codes as it did and moves nothing. In eval mode `torch.func` can transform it.

    Examples:
        >>> class Signs(Quantizer):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.dim, self.vocab = 1, (2,)
        ...     def _encode(self, x):
        ...         return (x > 0).long()
        ...     def _decode(self, codes):
        ...         return 2.0 * codes - 1
        ...     def _quantize(self, tokens):
        ...         codes = self._encode(tokens.values)
        ...         return Step(tokens.values + (self._decode(codes) - tokens.values).detach(), codes)
        >>> Signs()(torch.tensor([[0.3], [-2.0], [torch.nan]])).codes.flatten()
        tensor([ 1,  0, -1])
    """

    dim: int  # D, the width of the latents
    vocab: tuple[int, ...]  # the number of codes of each of the K code slots
    contraction: float | Sequence[float] = 1.0  # width of what is left over `reach`, per channel; 1: it adapts

    def __init__(self) -> None:
        super().__init__()
        # Follows .to() and .bfloat16(): decode's type. Never on the meta device, which nothing would take it off again.
        self.register_buffer("_like", torch.empty(0, device="cpu"), persistent=False)

    _like: Tensor

    @property
    def bits(self) -> float:
        """Bits per position at a uniform distribution of codes: the sum of log2 of `vocab`."""
        return sum(math.log2(size) for size in self.vocab)

    @property
    def radix(self) -> tuple[int, ...] | None:
        """Sizes of the digits of every code, the first fastest, by which a prior may predict it; None: it has none.

        A quantizer made of others has theirs if these are the same.
        """
        found = {part.radix for part in self.modules() if isinstance(part, Quantizer) and part is not self}
        return found.pop() if len(found) == 1 else None

    @property
    def reach(self) -> list[float]:
        """Half the width of the latents that a fixed grid serves, per channel; inf where it adapts to any.

        L levels on [-1, 1] have cells of width 2 / (L-1): they serve L / (L-1) and leave 1 / (L-1) of it, so their
        `contraction` is 1 / L, from which this is derived.
        """
        return [1 / (1 - share) if share < 1 else math.inf for share in contractions(self)]

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantize `z` (..., D) with gradients; `mask` (...) bool is False at padding.

        Updates running statistics, in training mode only. A loss without a token is 0.
        """
        self._check_latents(z, mask)
        with without_autocast(z.device.type):
            tokens = self._tokens(z, mask)
            if self.training and not torch.compiler.is_compiling():
                with passing(_codebooks(self), tokens.values):
                    step = self._quantize(tokens)
                    losses = self._settle(step)
            else:
                step = self._quantize(tokens)
                losses = self._settle(step) if self.training else _means(step.losses)
            gone = ~tokens.keep[..., None]
            latents = step.latents.masked_fill(gone, torch.nan)
            latents = latents if mask is None else latents.masked_fill(~mask[..., None], 0.0)
            return Quantized(latents.to(z.dtype), step.codes.masked_fill(gone, -1), losses)

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Codes (..., K) int64 of `z` (..., D). Pure."""
        self._check_latents(z, mask)
        with without_autocast(z.device.type):
            tokens = self._tokens(z, mask)
            return self._encode(tokens.values).masked_fill(~tokens.keep[..., None], -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Latents (..., D) of `codes` (..., K). Raises ValueError for codes outside `vocab` or of another K.

        Where a quantizer refines what another one gives (`Residual`, `Hierarchical`), the refinement may be left out:
        the codes may end before it, or be -1 there.
        """
        self._check_codes(codes)
        with without_autocast(codes.device.type):
            return self._decode(codes.long()).to(self._like.dtype)

    @torch.no_grad()
    def error(self, z: Tensor) -> Tensor:
        """The latents of the codes of `z` (..., D) less `z`, in its type; 0 for a token that is not finite. Pure."""
        self._check_latents(z)
        with without_autocast(z.device.type):
            tokens = self._tokens(z, None)
            error = self._decode(self._encode(tokens.values)) - tokens.values
            return error.masked_fill(~tokens.keep[..., None], 0.0).to(z.dtype)

    def inner(self, z: Tensor, codes: Tensor) -> Iterator[tuple[str, Quantizer, Tensor, Tensor]]:
        """(place in this one, quantizer, its latents (..., D), its codes (..., K)) of each quantizer that this one is
        made of, where it gives `codes` (..., K) to the finite latents `z` (..., D); here there is none."""
        yield from ()

    @abstractmethod
    def _quantize(self, tokens: Tokens) -> Step:
        """Latents, codes, losses and codebook updates of `tokens`, with the codebooks as they are."""

    @abstractmethod
    def _encode(self, x: Tensor) -> Tensor:
        """The codes (..., K) that `_quantize` gives to `x` (..., D)."""

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """The latents (..., D) of valid `codes` (..., K), bit for bit those of `_quantize` in eval mode."""

    @property
    def _arithmetic(self) -> torch.dtype:
        return torch.float64 if self._like.dtype == torch.float64 else torch.float32

    def _tokens(self, z: Tensor, mask: Tensor | None) -> Tokens:
        x = z.to(self._arithmetic)
        keep = x.isfinite().all(dim=-1)
        keep = keep if mask is None else keep & mask
        x = torch.where(keep[..., None], x, 0.0)
        return Tokens(x, keep, x, self.training)

    def _settle(self, step: Step) -> dict[str, Tensor]:
        """The losses over the tokens of all ranks, after moving the codebooks; one all-reduce in all."""
        moved: list[tuple[Codebook, Tensor, Tensor]] = []
        for book in _distinct([update.codebook for update in step.updates if not update.codebook.still]):
            parts = [book.statistics(u.tokens, u.codes, u.keep) for u in step.updates if u.codebook is book]
            moved.append((book, sum(part[0] for part in parts), sum(part[1] for part in parts)))  # type: ignore[arg-type]
        pairs = [part for loss in step.losses.values() for part in loss]
        sums = distributed.joined([*pairs, *(part for _, *parts in moved for part in parts)])
        for i, (book, _, _) in enumerate(moved):
            book.absorb(*sums[len(pairs) + 2 * i : len(pairs) + 2 * i + 2])
        return _means({name: (sums[2 * i], sums[2 * i + 1]) for i, name in enumerate(step.losses)})

    def _check_latents(self, z: Tensor, mask: Tensor | None = None) -> None:
        if z.ndim < 1 or z.shape[-1] != self.dim or not z.is_floating_point():
            raise ValueError(f"{type(self).__name__} expects float latents (..., {self.dim}), got {described(z)}")
        if mask is not None and (mask.shape != z.shape[:-1] or mask.dtype != torch.bool):
            shape = tuple(z.shape)
            raise ValueError(f"latents {shape} need a bool mask {shape[:-1]}, got {described(mask)}")

    def _check_codes(self, codes: Tensor) -> None:
        *fewer, slots = self._prefixes
        if codes.ndim < 1 or codes.shape[-1] not in (*fewer, slots) or codes.is_floating_point():
            some = f" or their first {', '.join(map(str, fewer))}" if fewer else ""
            raise ValueError(
                f"{type(self).__name__} expects integer codes (..., {slots}){some}, got {described(codes)}"
            )
        self._check_range(codes, self._lowest)

    @property
    def _prefixes(self) -> list[int]:
        """How many of the first code slots can be decoded without the others, ascending; the last is K."""
        return [len(self.vocab)]

    @property
    def _lowest(self) -> list[int]:
        """The least code of each slot: 0, or -1 where there may be none."""
        return [0] * len(self.vocab)

    def _present(self, codes: Tensor) -> Tensor:
        """Whether `codes` (..., k), of the first k slots, have one in every slot that needs one: (...) bool."""
        needed = [codes[..., i] >= 0 for i, least in enumerate(self._lowest[: codes.shape[-1]]) if least == 0]
        return torch.stack(needed).all(dim=0)

    def _check_range(self, codes: Tensor, lowest: Sequence[int]) -> None:
        """Raise ValueError for `codes` (..., k), of the first k slots, that are below `lowest` or not in `vocab`."""
        if torch.compiler.is_compiling() or codes.numel() == 0:
            return
        flat = codes.reshape(-1, codes.shape[-1])
        low, high = flat.amin(0).tolist(), flat.amax(0).tolist()
        if any(a < least or b >= size for a, b, least, size in zip(low, high, lowest, self.vocab, strict=False)):
            raise ValueError(f"codes must lie in 0 .. {[n - 1 for n in self.vocab]} per slot, got {low} .. {high}")


@contextmanager
def accumulating(module: nn.Module) -> Generator[None]:
    """Hold the codebooks inside `module` still, and move them once at the end by all that was seen in the block.

    So several small batches between two steps of the optimizer act as the one big batch: the same codes, the same
    running averages, and, for batches of equal size, the same mean losses (not `diversity`, which is no mean over
    tokens). K-means and restarts see the first of the batches only.

    Examples:
        >>> from latticode import VQ
        >>> quantizer = VQ(8, 2)
        >>> with accumulating(quantizer):
        ...     codes = [quantizer(part).codes for part in torch.randn(4, 50, 2)]
    """
    books = _codebooks(module)
    for book in books:
        book.hold()
    try:
        yield
    finally:
        for book in books:
            book.release()


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """No autocast in the block; nothing at all where there is none, so that exported graphs hold no region of it."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


def contractions(quantizer: Quantizer) -> list[float]:
    """`quantizer.contraction`, channel by channel."""
    one = quantizer.contraction
    return [one] * quantizer.dim if isinstance(one, int | float) else list(one)


def pooled(losses: Sequence[Mapping[str, Loss]]) -> dict[str, Loss]:
    """Losses of several parts as one: those of one name become the mean over all their tokens."""
    names = dict.fromkeys(name for part in losses for name in part)
    return {
        name: tuple(sum(part[name][i] for part in losses if name in part) for i in range(2))  # type: ignore[misc]
        for name in names
    }


def token_mean(values: Tensor, keep: Tensor) -> Loss:
    """The loss that is the mean of `values` (..., D) over channels and kept tokens."""
    return torch.where(keep, values.sum(dim=-1), 0.0).sum() / values.shape[-1], keep.sum().to(values.dtype)


def _codebooks(module: nn.Module) -> list[Codebook]:
    return [part for part in module.modules() if isinstance(part, Codebook)]


def _means(losses: Mapping[str, Loss]) -> dict[str, Tensor]:
    return {name: total / count.clamp(min=1) for name, (total, count) in losses.items()}


def _distinct(items: Sequence[T]) -> list[T]:
    found: list[T] = []
    for item in items:
        if not any(item is other for other in found):
            found.append(item)
    return found
