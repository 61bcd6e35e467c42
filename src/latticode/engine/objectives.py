"""Objectives: what training optimizes, as turns of players (modules with an optimizer of their own).

An objective is built from a spec like any module, so it can own networks that the trained model does not, such as a
discriminator. `players` names the modules that are optimized; `turns` yields one (player, unweighted loss terms) after
another, and the engine weighs the terms, backpropagates into that player alone and steps its optimizer. The turns of
one step may share a forward pass. A turn whose terms carry no gradient trains nothing: so a player that joins later
yields zeros under its terms' names.

In the room: reconstruction of a tokenizer, with perceptual and adversarial losses; a prior's negative log-likelihood;
the dense tasks of UViM; classification.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.core.registry import SpecError, nearest
from latticode.core.types import Batch, CodeBatch, Texts
from latticode.losses import TERMS
from latticode.losses.adversarial import ADVERSARIAL_LOSSES, LeCam, adaptive_weight, r1_penalty
from latticode.losses.perceptual import Perceptual

Turn = tuple[str, Mapping[str, Tensor]]


class Objective(nn.Module, ABC):
    """What a training run optimizes. Beside the turns, the engine and an objective exchange:

    `weights`: of the loss terms, from the recipe, set by the engine, for an objective that must know them.
    `notes`: after the turns, scalars to log that are not optimized.
    `facts`: what a reader of the run must know of the objective, for run.json.
    `discriminator_from`: the first step at which a discriminator moves the model; the engine scores held-out images
        there.

    Examples:
        A subclass names its players and yields their terms:

        >>> class Squares(Objective):
        ...     def players(self, model):
        ...         return {"model": model}
        ...     def turns(self, model, batch, step):
        ...         yield "model", {"mse": model(batch).square().mean()}
        >>> [(player, float(terms["mse"])) for player, terms in Squares().turns(nn.Identity(), torch.ones(2), 0)]
        [('model', 1.0)]
    """

    discriminator_from: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.weights: Mapping[str, float] = {}
        self.notes: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {}

    @abstractmethod
    def players(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules to optimize by name; the trained model is the first."""

    @abstractmethod
    def turns(self, model: Any, batch: Any, step: int) -> Iterator[Turn]:
        """One player after another with its unweighted terms on `batch`."""

    def scores(self, model: Any, batch: Any) -> dict[str, float]:
        """Scores of the objective's own networks on held-out examples, e.g. a classification head's accuracy."""
        return {}


class ReconstructionObjective(Objective):
    """A tokenizer's: reconstruction losses, and the losses of its quantizer (`commitment`, `codebook`, ...).

    Args:
        terms: reconstruction losses by name (`l1`, `mse`, `stft`, ... of `latticode.losses`), each a term of that name.
        perceptual: a perceptual loss (`latticode.losses.perceptual`), the term `perceptual`.
        adversarial: a discriminator, the second player, and the term `adversarial`. The discriminator's turn comes
            first, on the same reconstructions.

    Raises SpecError for an unknown loss.

    Examples:
        >>> from latticode import FSQ, Tokenizer
        >>> from latticode.autoencoders import ConvDecoder, ConvEncoder
        >>> small = {"width": 8, "multipliers": [1, 2], "blocks": 1, "latent": 4, "groups": 4}
        >>> tokenizer = Tokenizer(ConvEncoder(3, **small), FSQ([8, 5]), ConvDecoder(3, **small))
        >>> none = torch.zeros(2, dtype=torch.int64)
        >>> batch = Batch(torch.zeros(2, 3, 8, 8), labels=none, indices=none)
        >>> turns = ReconstructionObjective(["l1", "mse"]).turns(tokenizer, batch, step=0)
        >>> [(player, sorted(terms)) for player, terms in turns]
        [('tokenizer', ['l1', 'mse'])]
    """

    def __init__(
        self,
        terms: Sequence[str] = ("mse",),
        perceptual: Perceptual | None = None,
        adversarial: Adversarial | None = None,
    ):
        super().__init__()
        for name in terms:
            if name not in TERMS:
                raise SpecError(f"unknown loss {name!r}{nearest(name, TERMS)}")
        self.terms, self.perceptual, self.adversarial = list(terms), perceptual, adversarial
        if perceptual is not None:
            self.facts["perceptual"] = perceptual.name
        if adversarial is not None:
            self.facts["discriminator_from"] = self.discriminator_from = adversarial.start + adversarial.warmup

    def players(self, model: nn.Module) -> dict[str, nn.Module]:
        if self.adversarial is None:
            return {"tokenizer": model}
        if self.adversarial.adaptive:
            last_layer(model)
        return {"tokenizer": model, "discriminator": self.adversarial.discriminator}

    def turns(self, model: Any, batch: Batch, step: int) -> Iterator[Turn]:
        target, result = batch.inputs, model(batch.inputs)
        if self.adversarial is not None:
            yield "discriminator", self.adversarial.discriminator_terms(target, result.output.detach(), step)
        terms = {name: TERMS[name](result.output, target) for name in self.terms} | dict(result.losses)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(result.output, target)
        if self.adversarial is not None:
            others = torch.stack([self.weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
            terms["adversarial"] = self.adversarial.generator_term(model, result.output, others, step)
            self.notes = self.adversarial.notes
        yield "tokenizer", terms


class Adversarial(nn.Module):
    """A discriminator, how it is trained, and how its loss enters the tokenizer's (the generator's).

    The discriminator's terms are `discriminator`, its GAN loss, and `r1` and `lecam` if asked for. The tokenizer's term
    `adversarial` is the generator's loss times the adaptive weight and the ramp. Logged are also `adaptive_weight` and
    the discriminator's mean logits, `logits_real` and `logits_fake`: once they stay far apart, the discriminator has
    won and the tokenizer learns nothing from it.

    Args:
        discriminator: images (B, C, H, W) to logits (B, ...), high for real ones.
        loss: "hinge" or "non_saturating".
        start: the step at which the discriminator begins to learn; until then all terms are 0.
        warmup: steps that the discriminator then learns alone, while the generator's term is 0.
        ramp: steps over which the generator's term then grows to its full weight, linearly.
        adaptive: scale the term so that its gradient at the decoder's last layer is as long as that of all other
            terms, weighted (`latticode.losses.adversarial.adaptive_weight`).
        r1_every: add the R1 gradient penalty every so many of the discriminator's steps, and then that many times as
            much (lazy regularization: Karras et al. 2020, arXiv 1912.04958, B); 0: never. It is computed without half
            precision.
        lecam: add LeCam regularization (`latticode.losses.adversarial.LeCam`).

    Raises SpecError for an unknown loss and for negative steps.

    Examples:
        >>> from latticode.nn.discriminator import PatchDiscriminator
        >>> adversarial = Adversarial(PatchDiscriminator(3, width=8, layers=1), start=10, r1_every=16)
        >>> real = fake = torch.zeros(2, 3, 16, 16)
        >>> {name: float(term) for name, term in adversarial.discriminator_terms(real, fake, step=0).items()}
        {'discriminator': 0.0, 'r1': 0.0}
        >>> adversarial.discriminator_terms(real, fake, step=10)["discriminator"] > 0
        tensor(True)
    """

    def __init__(
        self,
        discriminator: nn.Module,
        loss: str = "hinge",
        start: int = 0,
        warmup: int = 0,
        ramp: int = 0,
        adaptive: bool = True,
        r1_every: int = 0,
        lecam: bool = False,
    ):
        super().__init__()
        if loss not in ADVERSARIAL_LOSSES:
            raise SpecError(f"unknown adversarial loss {loss!r}{nearest(loss, ADVERSARIAL_LOSSES)}")
        for name, value in (("start", start), ("warmup", warmup), ("ramp", ramp), ("r1_every", r1_every)):
            if value < 0:
                raise SpecError(f"{name} must be >= 0 steps, got {value}")
        self.discriminator, self.loss, self.start, self.warmup, self.ramp = discriminator, loss, start, warmup, ramp
        self.adaptive, self.r1_every, self.lecam = adaptive, r1_every, lecam
        self.means = LeCam() if lecam else None
        self.notes: dict[str, Tensor] = {}

    def discriminator_terms(self, real: Tensor, fake: Tensor, step: int) -> dict[str, Tensor]:
        """The discriminator's loss terms on images (B, C, H, W) that carry no gradient."""
        off = torch.zeros((), device=real.device)
        terms = {"discriminator": off} | ({"r1": off} if self.r1_every else {}) | ({"lecam": off} if self.lecam else {})
        if step < self.start:
            return terms
        penalized = bool(self.r1_every) and (step - self.start) % self.r1_every == 0
        with torch.autocast(real.device.type, enabled=False) if penalized else nullcontext():
            images = real.detach().requires_grad_(penalized)
            on_real = self.discriminator(images).float()
            if penalized:
                terms["r1"] = self.r1_every * r1_penalty(on_real, images)
        on_fake = self.discriminator(fake).float()
        terms["discriminator"] = ADVERSARIAL_LOSSES[self.loss].discriminator(on_real, on_fake)
        if self.means is not None:
            terms["lecam"] = self.means(on_real, on_fake)
        self.notes = {"logits_real": on_real.detach().mean(), "logits_fake": on_fake.detach().mean()}
        return terms

    def generator_term(self, model: nn.Module, output: Tensor, others: Tensor, step: int) -> Tensor:
        """The tokenizer's term for its `output`; `others` is the weighted sum of its other terms."""
        active = step - self.start - self.warmup  # steps that this term has moved the tokenizer
        if active < 0:
            return torch.zeros((), device=output.device)
        term = ADVERSARIAL_LOSSES[self.loss].generator(self.discriminator(output).float())
        if self.adaptive:
            self.notes["adaptive_weight"] = adaptive_weight(others, term, last_layer(model))
            term = self.notes["adaptive_weight"] * term
        return term * min(1.0, (active + 1) / self.ramp) if self.ramp else term


def last_layer(model: Any) -> Tensor:
    """The weight that a tokenizer's output comes from. Raises ValueError if there is none or it is frozen."""
    layer = getattr(model.decoder, "last_layer", None)
    if layer is None or not layer.requires_grad:
        what = "no last_layer" if layer is None else "a frozen last layer"
        raise ValueError(f"{type(model.decoder).__name__} has {what}, so give adversarial.adaptive=false")
    return layer


class GuidedObjective(Objective):
    """UViM's stage I (`latticode.dense.uvim`): the losses of a dense task on the base model's prediction from an image
    and the restricted oracle's code, and the quantizer's losses.

    Examples:
        >>> [name for name in GuidedObjective().players(nn.Identity())]
        ['tokenizer']
    """

    def players(self, model: nn.Module) -> dict[str, nn.Module]:
        return {"tokenizer": model}

    def turns(self, model: Any, batch: Batch, step: int) -> Iterator[Turn]:
        result = model(batch.inputs)
        yield "tokenizer", {**model.task.losses(result.output, batch.inputs), **result.losses}


class PriorObjective(Objective):
    """A prior's own loss on codes, a negative log-likelihood in nats per token where the method has one.

    The prior is conditioned on what it takes: the label of an image, one of its captions (drawn from torch's global
    generator), the image itself.

    Examples:
        >>> from latticode.priors import GPT
        >>> prior = GPT(vocab=[16], grid=[4], classes=2, width=16, depth=1, heads=2)
        >>> batch = CodeBatch(torch.zeros(2, 4, 1, dtype=torch.int64), torch.tensor([0, 1]))
        >>> [(player, list(terms)) for player, terms in PriorObjective().turns(prior, batch, 0)]
        [('prior', ['cross_entropy'])]
    """

    def players(self, model: nn.Module) -> dict[str, nn.Module]:
        return {"prior": model}

    def turns(self, model: Any, batch: CodeBatch, step: int) -> Iterator[Turn]:
        texts = None if model.text is None else drawn_texts(batch.texts or ((),) * len(batch.codes))
        soft = {} if batch.soft is None else {"soft": batch.soft}  # of priors that asked for it (`soft_labels`)
        yield "prior", model.loss(batch.codes, model.condition(batch.labels, texts, batch.images), **soft)


class PriorClassificationObjective(PriorObjective):
    """Fine-tuning of a prior to classify, as iGPT's (Chen et al. 2020, section 2.3): its own loss and the label's cross
    entropy by a linear head on the normed means of its last layer.

    The head is the second player. The prior's turn has the term `classification`, whose gradient reaches it through the
    head; the head's has the same number under its own name, `head`, on the same activations, so that with equal weights
    both move as under one shared loss. The features are not conditioned on the label. Images without a label count for
    the prior's own loss alone.

    Args:
        classes: of the labels.
        width: of the prior's features.

    Raises SpecError for fewer than two classes, and for a prior of another width.

    Examples:
        >>> from latticode.priors import GPT
        >>> prior = GPT(vocab=[16], grid=[4], classes=0, width=16, depth=1, heads=2)
        >>> objective = PriorClassificationObjective(classes=3, width=16)
        >>> objective.classify(prior, torch.zeros(2, 4, 1, dtype=torch.int64)).shape
        torch.Size([2, 3])
    """

    def __init__(self, classes: int, width: int):
        super().__init__()
        if classes < 2:
            raise SpecError(f"classes must be >= 2 to tell apart, got {classes}")
        self.classes, self.width = classes, width
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def players(self, model: nn.Module) -> dict[str, nn.Module]:
        if getattr(model, "width", None) != self.width:
            raise SpecError(f"objective.width must be the prior's, {getattr(model, 'width', None)}, got {self.width}")
        return {**super().players(model), "head": self.head}

    def turns(self, model: Any, batch: CodeBatch, step: int) -> Iterator[Turn]:
        for player, terms in super().turns(model, batch, step):
            features = model.features(batch.codes)[-1]
            yield player, {**terms, "classification": self._nats(features, batch.labels)}
            yield "head", {"head": self._nats(features.detach(), batch.labels)}

    def classify(self, model: Any, codes: Tensor) -> Tensor:
        """Logits (B, classes) of `codes` (B, *grid, K)."""
        return self.head(model.features(codes)[-1])

    def scores(self, model: Any, batch: CodeBatch) -> dict[str, float]:
        known = batch.labels >= 0
        right = self.classify(model, batch.codes[known]).argmax(1) == batch.labels[known]
        return {"accuracy": float(right.float().mean())} if known.any() else {}

    def _nats(self, features: Tensor, labels: Tensor) -> Tensor:
        """The mean over the images that have a label; 0 if there are none."""
        nats = F.cross_entropy(self.head(features).float(), labels, reduction="sum", ignore_index=-1)
        return nats / (labels >= 0).sum().clamp(min=1)


def drawn_texts(texts: Texts) -> tuple[str, ...]:
    """One of the captions of each image, '' where there is none."""
    draws = torch.rand(len(texts)).tolist()
    return tuple(own[int(draw * len(own))] if own else "" for own, draw in zip(texts, draws, strict=True))


class ClassificationObjective(Objective):
    """Cross entropy of a classifier on labelled images.

    Examples:
        >>> from latticode.metrics import Classifier
        >>> batch = Batch(torch.zeros(2, 1, 16, 16), torch.tensor([0, 1]), torch.tensor([0, 1]))
        >>> [(player, list(terms)) for player, terms in ClassificationObjective().turns(Classifier(2), batch, 0)]
        [('classifier', ['cross_entropy'])]
    """

    def players(self, model: nn.Module) -> dict[str, nn.Module]:
        return {"classifier": model}

    def turns(self, model: Any, batch: Batch, step: int) -> Iterator[Turn]:
        yield "classifier", {"cross_entropy": F.cross_entropy(model(batch.inputs), batch.labels)}
