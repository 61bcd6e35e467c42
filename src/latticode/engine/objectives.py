"""What training optimizes, as turns of players.

An objective is built from a spec like any module, so it can own networks that the trained model does not (a critic).
`players` names the modules that are optimized; `turns` yields one (player, unweighted loss terms) after another, and
the engine weighs, backpropagates into that player alone and steps. A generator may share one forward between turns. A
turn whose terms carry no gradient trains nothing: so a player that joins later yields zeros under its terms' names.
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
    """Beside the turns, what the engine and an objective tell each other:

    `weights`: the recipe's, set by the engine, for an objective that must know how its terms will be weighed.
    `notes`: after the turns, scalars that are worth logging and that nobody optimizes.
    `facts`: what a reader of the run must know of the objective, for run.json.
    `critic_from`: the step from which a critic moves the model; the engine looks at held-out images there.
    """

    critic_from: int | None = None

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
        """What a network of the objective's own makes of held-out examples, if it has a use beyond training."""
        return {}


class ReconstructionObjective(Objective):
    """A tokenizer's: what it makes of the input against the input, and whatever losses it returns itself.

    Args:
        terms: losses by name (`l1`, `mse`, `stft`, ... of `latticode.losses`), each a term of that name.
        perceptual: the term `perceptual`.
        adversarial: a critic, the second player, and the term `adversarial`. The critic's turn comes first, on the
            same reconstructions.
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
            self.facts["critic_from"] = self.critic_from = adversarial.start + adversarial.warmup

    def players(self, model: nn.Module) -> dict[str, nn.Module]:
        if self.adversarial is None:
            return {"tokenizer": model}
        if self.adversarial.adaptive:
            last_layer(model)
        return {"tokenizer": model, "critic": self.adversarial.critic}

    def turns(self, model: Any, batch: Batch, step: int) -> Iterator[Turn]:
        target, result = batch.inputs, model(batch.inputs)
        if self.adversarial is not None:
            yield "critic", self.adversarial.judged(target, result.output.detach(), step)
        terms = {name: TERMS[name](result.output, target) for name in self.terms} | dict(result.losses)
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(result.output, target)
        if self.adversarial is not None:
            others = torch.stack([self.weights.get(name, 1.0) * term for name, term in terms.items()]).sum()
            terms["adversarial"] = self.adversarial.persuasion(model, result.output, others, step)
            self.notes = self.adversarial.notes
        yield "tokenizer", terms


class Adversarial(nn.Module):
    """A critic, how it learns and how it is listened to.

    Its terms: `critic`, its loss; `r1` and `lecam` if asked for. The tokenizer's term `adversarial` is its loss times
    the adaptive weight and the ramp. Noted are `adaptive_weight` and the critic's mean logits, `logits_real` and
    `logits_fake`: once they stay far apart, the critic has won and teaches nothing.

    Args:
        critic: images (B, C, H, W) to logits (B, ...), high for real ones.
        loss: "hinge" or "non_saturating".
        start: the step at which the critic begins to learn; until then all terms are 0.
        warmup: steps that the critic then learns alone.
        ramp: steps over which its weight then grows to 1, linearly.
        adaptive: scale the term so that its gradient at the decoder's last layer is as long as that of all other
            terms, weighted (`latticode.losses.adversarial.adaptive_weight`).
        r1_every: take R1 every so many of the critic's steps, and then that many times as much (lazily: Karras et al.
            2020, arXiv 1912.04958, B); 0: never. It is computed without half precision.
        lecam: LeCAM's regularisation (`latticode.losses.adversarial.LeCam`).
    """

    def __init__(
        self,
        critic: nn.Module,
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
        self.critic, self.loss, self.start, self.warmup, self.ramp = critic, loss, start, warmup, ramp
        self.adaptive, self.r1_every, self.lecam = adaptive, r1_every, lecam
        self.means = LeCam() if lecam else None
        self.notes: dict[str, Tensor] = {}

    def judged(self, real: Tensor, fake: Tensor, step: int) -> dict[str, Tensor]:
        """The critic's terms on images that carry no gradient."""
        off = torch.zeros((), device=real.device)
        terms = {"critic": off} | ({"r1": off} if self.r1_every else {}) | ({"lecam": off} if self.lecam else {})
        if step < self.start:
            return terms
        penalized = bool(self.r1_every) and (step - self.start) % self.r1_every == 0
        with torch.autocast(real.device.type, enabled=False) if penalized else nullcontext():
            images = real.detach().requires_grad_(penalized)
            on_real = self.critic(images).float()
            if penalized:
                terms["r1"] = self.r1_every * r1_penalty(on_real, images)
        on_fake = self.critic(fake).float()
        terms["critic"] = ADVERSARIAL_LOSSES[self.loss].critic(on_real, on_fake)
        if self.means is not None:
            terms["lecam"] = self.means(on_real, on_fake)
        self.notes = {"logits_real": on_real.detach().mean(), "logits_fake": on_fake.detach().mean()}
        return terms

    def persuasion(self, model: nn.Module, output: Tensor, others: Tensor, step: int) -> Tensor:
        """The tokenizer's term for its `output`; `others` is the weighted sum of its other terms."""
        heard = step - self.start - self.warmup
        if heard < 0:
            return torch.zeros((), device=output.device)
        term = ADVERSARIAL_LOSSES[self.loss].generator(self.critic(output).float())
        if self.adaptive:
            self.notes["adaptive_weight"] = adaptive_weight(others, term, last_layer(model))
            term = self.notes["adaptive_weight"] * term
        return term * min(1.0, (heard + 1) / self.ramp) if self.ramp else term


def last_layer(model: Any) -> Tensor:
    """The weight that a tokenizer's output comes from. Raises ValueError if there is none or it is frozen."""
    layer = getattr(model.decoder, "last_layer", None)
    if layer is None or not layer.requires_grad:
        what = "no last_layer" if layer is None else "a frozen last layer"
        raise ValueError(f"{type(model.decoder).__name__} has {what}, so give adversarial.adaptive=false")
    return layer


class GuidedObjective(Objective):
    """The losses of a dense task on what a base model makes of an image under the oracle's code
    (`latticode.dense.uvim`), and the quantizer's."""

    def players(self, model: nn.Module) -> dict[str, nn.Module]:
        return {"tokenizer": model}

    def turns(self, model: Any, batch: Batch, step: int) -> Iterator[Turn]:
        result = model(batch.inputs)
        yield "tokenizer", {**model.task.losses(result.output, batch.inputs), **result.losses}


class PriorObjective(Objective):
    """A prior's own loss on codes, told the label where there is one, if it reads text one caption of each image, drawn
    from torch's global generator, and if it sees the image itself."""

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
    both move as under one shared loss. The features are told no label; a prior of no classes is not told it either
    where it generates. Images without a label count for the prior's own loss alone.

    Args:
        classes: of the labels.
        width: of the prior's features.
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
    """Cross entropy of a classifier on labelled images."""

    def players(self, model: nn.Module) -> dict[str, nn.Module]:
        return {"classifier": model}

    def turns(self, model: Any, batch: Batch, step: int) -> Iterator[Turn]:
        yield "classifier", {"cross_entropy": F.cross_entropy(model(batch.inputs), batch.labels)}
