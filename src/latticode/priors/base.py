"""The base class of every prior, and what their samplers share: top-k and top-p filters, classifier-free guidance,
reproducible noise."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.core import registry
from latticode.core.modules import described, device_of, keeping_modes
from latticode.core.pretrained import Pretrained
from latticode.core.types import Conditioning, Sampling
from latticode.kernels.vocabulary import invert
from latticode.priors.schedules import RAMPS

DEFAULT = Sampling()
IN_ORDER = frozenset({"temperature", "guidance", "top_k", "top_p"})  # what one draw after another can use


class Condition(NamedTuple):
    """What is known of each of B images that are to be generated: a `Conditioning` that was checked, on its device.

    Examples:
        >>> condition = Condition(torch.tensor([3, 7]), ["", ""])
        >>> condition.branches(guidance=1.5).labels  # the conditional branch, then the unconditional one
        tensor([ 3,  7, -1, -1])
    """

    labels: Tensor  # (B,) int64, -1 = none
    texts: list[str]  # '' = none
    images: Tensor | None = None  # (B, 3, H, W); of the conditional branch only, where there are two
    dropped: Tensor | None = None  # (B,) bool: the rows whose images are not shown; None: all are

    @property
    def given(self) -> bool:
        """Whether anything is known of any image."""
        return any(self.texts) or self.images is not None or bool((self.labels >= 0).any())

    def drop(self, rate: float) -> Condition:
        """Training's drop of the condition: all that is known of an image is taken away with probability `rate`, so
        that the network learns the unconditional distribution too (Ho and Salimans 2022, arXiv 2207.12598)."""
        dropped = torch.rand(len(self.labels), device=self.labels.device) < rate
        texts = self.texts
        if any(texts):  # to look at the draws makes a device wait
            texts = ["" if drop else text for text, drop in zip(texts, numbers(dropped), strict=True)]
        return Condition(self.labels.masked_fill(dropped, -1), texts, self.images, dropped)

    def branches(self, guidance: float) -> Condition:
        """The conditional branch, followed by as many rows of the unconditional one, where classifier-free guidance
        has something to act on."""
        if not guidance or not self.given:
            return self
        nothing = torch.full_like(self.labels, -1)
        dropped = torch.cat([nothing > 0, nothing < 0])
        return Condition(torch.cat([self.labels, nothing]), [*self.texts, *[""] * len(nothing)], self.images, dropped)


class Prior(Pretrained, ABC):
    """A distribution over codes (B, *grid, K) int64, unconditional or per class.

    A class implements `_nats` and `_draw`, which see checked codes and conditions only; this one sees to the rest:
    what is asked is checked, noise drawn for each sample by its number, gradients and training mode are off where they
    have to be, and every submodule gets its own mode back. A class that does not learn from the means of `_nats`, but
    from masks it draws, say, overrides `_terms`.

    Laws, held by `tests/laws/test_priors.py` for every registered class: the probabilities of `bits` sum to 1 over all
    images; a sample depends on its seed and number, not on the batch it is drawn in; known codes are kept; a spec
    rebuilds the module.

    Examples:
        A prior of one's own, here of codes that are independent of each other:

        >>> from torch import nn
        >>> class Unigram(Prior):
        ...     def __init__(self, vocab, grid):
        ...         super().__init__(vocab, grid, classes=0)
        ...         self.logits = nn.Parameter(torch.zeros(vocab[0]))
        ...
        ...     def _nats(self, codes, condition):
        ...         return {"cross_entropy": -self.logits.log_softmax(0)[codes]}
        ...
        ...     def _draw(self, known, condition, noise, choose):
        ...         logits = self.logits.expand(known.numel(), -1)
        ...         return choose(logits, noise.flatten(), known.flatten()).view(known.shape)
        >>> prior = Unigram([16], [2, 2])
        >>> prior.bits(torch.zeros(1, 2, 2, 1, dtype=torch.uint8))  # four positions of 4 bits
        tensor([16.])
        >>> prior.sample(3, seed=1).shape
        torch.Size([3, 2, 2, 1])
    """

    uses: ClassVar[frozenset[str]] = frozenset(field.name for field in fields(Sampling))  # the others change nothing
    causal: ClassVar[bool] = False  # True: what is known informs only the positions that come after it
    sees: ClassVar[bool] = False  # True: it is conditioned on images
    label_dropout: float = 0.0  # probability that training drops the condition

    def __init__(self, vocab: Sequence[int], grid: Sequence[int], classes: int) -> None:
        super().__init__()
        self.vocab = [int(size) for size in vocab]  # the number of codes of each of the K code slots
        self.grid = [int(size) for size in grid]  # positions along each axis
        self.classes = int(classes)  # 0 = unconditional
        self.text: nn.Module | None = None  # reads captions, in a prior that is conditioned on them (`priors.text`)
        if not self.vocab or min(self.vocab) < 1:
            raise ValueError(f"vocab must be one size >= 1 per code slot, got {self.vocab}")
        if not self.grid or min(self.grid) < 1:
            raise ValueError(f"grid must be one size >= 1 per axis, got {self.grid}")
        if self.classes < 0:
            raise ValueError(f"classes must be >= 0 (0 = unconditional), got {self.classes}")

    @property
    def positions(self) -> int:
        """The number of positions of the grid."""
        return math.prod(self.grid)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return device_of(self)

    def forward(self, codes: Tensor, cond: Conditioning | None = None, soft: Tensor | None = None) -> dict[str, Tensor]:
        """`loss`, so that wrappers which call the module (DDP, FSDP2) train a prior."""
        return self.loss(codes, cond, soft)

    def loss(self, codes: Tensor, cond: Conditioning | None = None, soft: Tensor | None = None) -> dict[str, Tensor]:
        """Unweighted scalars by name, in nats per symbol, for `codes` (B, *grid, K). Draws from torch's global
        generators.

        `cross_entropy` is there always; a prior of two levels or of text has more. The targets are the codes, or where
        a prior has `soft_labels` the distributions `soft` (B, *grid, K, C) that they were drawn from. Raises ValueError
        for codes outside `vocab` or of another shape, for no images, for labels outside [-1, classes), and for `soft`
        of another shape or for a prior that learns from codes alone.
        """
        codes = self.check_codes(codes)
        if not len(codes):
            raise ValueError(f"{type(self).__name__} has no loss of no images, got codes {described(codes)}")
        condition = self.check_condition(cond, len(codes))
        return self._terms(codes, condition) if soft is None else self._soft_terms(codes, condition, soft)

    def sample(
        self,
        count: int,
        cond: Conditioning | None = None,
        *,
        sampling: Sampling = DEFAULT,
        seed: int = 0,
        first: int = 0,
        known: Tensor | None = None,
    ) -> Tensor:
        """Codes (count, *grid, K) of the samples number `first` to `first + count - 1` of `seed`, in one batch.

        `known` (count, *grid, K) holds codes to keep and -1 where to generate. What is not in `uses` of `sampling` has
        no effect, nor has guidance without a condition. Raises ValueError for bad options, labels or known codes, and
        FloatingPointError for logits that are not finite.
        """
        check_sampling(sampling)
        condition = self.check_condition(cond, count)
        codes = self.known_codes(count, known)
        noise = uniforms(self.noise_shape(sampling), seed, first, count).to(self.device)
        choose = Chooser(sampling, self.device)
        with self.inference():
            codes = self._draw(codes, condition, noise, choose)
        choose.check()
        return codes

    def bits(self, codes: Tensor, cond: Conditioning | None = None) -> Tensor:
        """The negative log-likelihood (B,) of each image of `codes` (B, *grid, K), in bits: what an entropy coder needs
        in the prior's own order. Raises ValueError for bad codes or conditions."""
        codes = self.check_codes(codes)
        condition = self.check_condition(cond, len(codes))
        with self.inference():
            levels = [nats.flatten(1).sum(1) for nats in self._nats(codes, condition).values()]
            return torch.stack(levels).sum(0) / math.log(2)

    def features(self, codes: Tensor, cond: Conditioning | None = None) -> list[Tensor]:
        """What the network makes of `codes` (B, *grid, K), for a linear probe: means over the positions (B, width), of
        the embedding first and then after each block. Gradients flow.

        Raises ValueError where a prior has none, and for bad codes or conditions.
        """
        codes = self.check_codes(codes)
        return self._features(codes, self.check_condition(cond, len(codes)))

    @abstractmethod
    def _nats(self, codes: Tensor, condition: Condition) -> dict[str, Tensor]:
        """The negative log-likelihoods in nats (B, ...) that sum to that of each image of valid `codes`
        (B, *grid, K), by the names of `loss`."""

    @abstractmethod
    def _draw(self, known: Tensor, condition: Condition, noise: Tensor, choose: Chooser) -> Tensor:
        """`known` (B, *grid, K), which may be written to, with a code at each -1, by uniform `noise`
        (B, *noise_shape)."""

    def _terms(self, codes: Tensor, condition: Condition) -> dict[str, Tensor]:
        """`loss` of valid codes: means over the symbols of a batch."""
        return means(self._nats(codes, condition.drop(self.label_dropout)))

    def _soft_terms(self, codes: Tensor, condition: Condition, soft: Tensor) -> dict[str, Tensor]:
        raise ValueError(f"{type(self).__name__} learns from codes alone, got soft targets {tuple(soft.shape)}")

    def _features(self, codes: Tensor, condition: Condition) -> list[Tensor]:
        kinds = {name: registry.resolve(name) for name in registry.TABLE}
        able = [name for name, cls in kinds.items() if issubclass(cls, Prior) and cls._features is not Prior._features]
        raise ValueError(f"a {type(self).__name__} has no features; priors that have: {', '.join(able)}")

    def noise_shape(self, sampling: Sampling) -> tuple[int, ...]:
        """Of the uniform numbers that `_draw` needs for one image."""
        return self.positions, len(self.vocab)

    def condition(
        self, labels: Tensor | None = None, texts: tuple[str, ...] | None = None, images: Tensor | None = None
    ) -> Conditioning:
        """Of what is known of a batch, that which this prior can be conditioned on."""
        return Conditioning(
            labels if self.classes else None,
            texts if self.text is not None else None,
            images if self.sees else None,
        )

    def check_codes(self, codes: Tensor, *, lowest: int = 0) -> Tensor:
        """`codes` as int64. Raises ValueError unless they are integers (B, *grid, K) in [lowest, vocab)."""
        name, shape = type(self).__name__, (*self.grid, len(self.vocab))
        if tuple(codes.shape[1:]) != shape or codes.is_floating_point() or codes.is_complex():
            expected = ", ".join(map(str, ("B", *shape)))
            raise ValueError(f"{name} expects integer codes ({expected}), got {tuple(codes.shape)} {codes.dtype}")
        codes = codes.long()  # few operations know the narrow types that datasets store
        if codes.numel() and not torch.compiler.is_compiling():
            low, high = (numbers(t) for t in codes.flatten(0, -2).aminmax(dim=0))
            if min(low) < lowest or any(h >= size for h, size in zip(high, self.vocab, strict=True)):
                raise ValueError(f"{name} expects codes in [{lowest}, {self.vocab}), got {min(low)} to {high}")
        return codes

    def check_condition(self, cond: Conditioning | None, count: int) -> Condition:
        """What `cond` says of `count` images, labels on the prior's device.

        Raises ValueError for labels outside [-1, classes), for texts or images that the prior cannot read or see, and
        for another number of them.
        """
        texts = self.texts_of(cond, count)
        images = None if cond is None else cond.images
        if images is not None and not self.sees:
            raise ValueError(f"{type(self).__name__} sees no images, got {tuple(images.shape)}")
        if cond is None or cond.labels is None:
            return Condition(torch.full((count,), -1, device=self.device), texts, images)
        labels = cond.labels.to(self.device, torch.int64)
        if tuple(labels.shape) != (count,):
            raise ValueError(f"expected one label for each of {count} images, got shape {tuple(labels.shape)}")
        if count and not torch.compiler.is_compiling():
            low, high = (int(v) for v in labels.aminmax())
            if low < -1 or high >= self.classes:
                bad = low if low < -1 else high
                valid = (
                    f"0 to {self.classes - 1}, or -1 for none" if self.classes else "only -1, the prior has no classes"
                )
                raise ValueError(f"label {bad} is not valid; valid: {valid}")
        return Condition(labels, texts, images)

    def texts_of(self, cond: Conditioning | None, count: int) -> list[str]:
        """One text for each of `count` images, '' = none. Raises ValueError for another number of them, and for a text
        that the prior cannot read."""
        texts = [""] * count if cond is None or cond.texts is None else list(cond.texts)
        if len(texts) != count:
            raise ValueError(f"expected one text for each of {count} images, got {len(texts)}")
        if self.text is None and any(texts):
            raise ValueError(f"the prior reads no text, got {next(filter(None, texts))!r}")
        return texts

    def known_codes(self, count: int, known: Tensor | None) -> Tensor:
        """A copy of `known` (count, *grid, K) on the prior's device, -1 where to generate: everywhere if it is None.

        Raises ValueError for another shape or number, or codes outside [-1, vocab).
        """
        if known is None:
            return torch.full((count, *self.grid, len(self.vocab)), -1, device=self.device)
        if len(known) != count:
            raise ValueError(f"expected known codes of {count} images, got {len(known)}")
        codes = self.check_codes(known, lowest=-1)
        return codes.to(self.device, copy=True, memory_format=torch.contiguous_format)

    @contextmanager
    def inference(self) -> Generator[None]:
        """Eval mode and no gradients inside; the mode of every submodule is restored after.

        Not torch's inference mode: a prior is trained on codes that were sampled, and such tensors take no part in
        autograd.
        """
        with keeping_modes(self), torch.no_grad():
            self.eval()
            yield


@contextmanager
def recorded(blocks: nn.ModuleList) -> Generator[list[Tensor]]:
    """Yields a list to which a run of `blocks`, one after another, adds the input of the first and every output."""
    seen: list[Tensor] = []

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    def after(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)

    handles = [blocks[0].register_forward_pre_hook(before), *(block.register_forward_hook(after) for block in blocks)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def numbers(tensor: Tensor) -> list[Any]:
    """The numbers of a tensor on the host, in lists within each other."""
    return tensor.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def check_sampling(sampling: Sampling) -> None:
    """Raise ValueError for an option outside its range."""
    limits = {
        "steps": (sampling.steps >= 1, ">= 1"),
        "temperature": (0 <= sampling.temperature < math.inf, ">= 0 (0 = the likeliest token)"),
        "noise": (0 <= sampling.noise < math.inf, ">= 0"),
        "guidance": (math.isfinite(sampling.guidance), "finite (0 = off)"),
        "guidance_schedule": (sampling.guidance_schedule in RAMPS, " or ".join(RAMPS)),
        "top_k": (sampling.top_k >= 0, ">= 0 (0 = all)"),
        "top_p": (0 < sampling.top_p <= 1, "in (0, 1]"),
    }
    for name, (holds, valid) in limits.items():
        if not holds:
            raise ValueError(f"{name} must be {valid}, got {getattr(sampling, name)}")


def uniforms(shape: Sequence[int], seed: int, first: int, count: int) -> Tensor:
    """(count, *shape) float32 draws from U[0, 1) on the CPU; row i depends on `seed` and `first + i` alone."""
    if seed < 0 or first < 0 or count < 0:
        raise ValueError(f"seed, first and count must be >= 0, got {seed}, {first} and {count}")
    result = torch.empty(count, *shape)
    for i, row in enumerate(result):
        state = np.random.SeedSequence([seed, first + i]).generate_state(1, np.uint64)  # no two pairs share a stream
        torch.rand(shape, generator=torch.Generator().manual_seed(int(state[0])), out=row)
    return result


def guided(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance l_c + w (l_c - l_0), in the convention where w = 0 is off (FSQ, section 5.1)."""
    return conditional + guidance * (conditional - unconditional)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (..., V) divided by the temperature, -inf for the tokens that top-k and top-p drop.

    Temperature 0 keeps the likeliest token. The likeliest is never dropped; ties with the k-th are kept.
    """
    if sampling.temperature == 0:
        return logits.masked_fill(logits < logits.amax(-1, keepdim=True), -math.inf)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        lowest = logits.topk(sampling.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < lowest, -math.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(-1)
        drop = p.cumsum(-1) - p >= sampling.top_p  # those before it already reach top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter_(-1, order, drop), -math.inf)
    return logits


def unfiltered(sampling: Sampling) -> bool:
    """Whether every token may be drawn."""
    return sampling.temperature > 0 and not sampling.top_k and sampling.top_p == 1


def draw(logits: Tensor, u: Tensor) -> Tensor:
    """Tokens (...,) from softmax(logits (..., V)) by inversion of the distribution function at u (...,) in [0, 1).

    One uniform per token, where a Gumbel argmax needs V. A token of probability 0 is never drawn; logits that are not
    finite give some token.
    """
    return invert(F.softmax(logits.float(), dim=-1), u)[0]


class Chooser:
    """Draws one token after another, guided where the logits have twice as many rows, the unconditional ones behind.

    Whether all logits were finite is looked at once in the end (`check`), so that nothing waits for a device.

    Examples:
        >>> choose = Chooser(Sampling(temperature=0.0), torch.device("cpu"))
        >>> choose(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0.5]), known=torch.tensor([-1]))
        tensor([1])
        >>> choose.check()
    """

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.finite = torch.ones((), dtype=torch.bool, device=device)

    def __call__(self, logits: Tensor, u: Tensor, known: Tensor) -> Tensor:
        """Tokens (B,) from logits (B, V) or (2 B, V) at uniform `u` (B,), but `known` (B,) where that is not -1."""
        logits = logits.float()
        if len(logits) > len(known):
            conditional, unconditional = logits.chunk(2)
            logits = guided(conditional, unconditional, self.sampling.guidance)
        self.note(logits)
        drawn = draw(filtered(logits, self.sampling), u)
        return torch.where(known < 0, drawn, known)

    def note(self, values: Tensor) -> None:
        """Remember whether `values` are finite."""
        self.finite.logical_and_(values.isfinite().all())

    def check(self) -> None:
        """Raise FloatingPointError if any values were not finite."""
        if not bool(self.finite):
            raise FloatingPointError("the prior's logits are not finite: broken weights, or a dtype too narrow")


def means(nats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean of each."""
    return {name: values.mean() for name, values in nats.items()}


def check_rates(**rates: float) -> None:
    """Raise ValueError, naming it, for one that is no probability below 1."""
    for name, value in rates.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")


def gumbel(u: Tensor) -> Tensor:
    """Gumbel(0, 1) draws from uniform ones, finite for u = 0 too."""
    return -(-u.clamp(1e-20, 1 - 2**-24).log()).log()
