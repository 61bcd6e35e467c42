"""Scores for rejection sampling, by which the best of many draws is kept (`latticode.sampling.sampler`): a classifier's
probability, as VQ-VAE-2 (Razavi et al. 2019, arXiv 1906.00446), or CLIP, as DALL-E (Ramesh et al. 2021, arXiv
2102.12092, section 2.6). Any function of that form will do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latticode.core import extras
from latticode.core.types import Conditioning
from latticode.core.values import rounded

Score = Callable[[Tensor, Conditioning], Tensor]  # images (B, C, H, W) and what was asked for to (B,), high is good

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of RGB in [0, 1]


class LabelScore:
    """The probability that a classifier gives the label asked for. It sees what would be stored, images of 8 bits.

    Args:
        classifier: images (B, C, H, W) to logits (B, classes). To be written down with samples it is a saved model's.

    Calls raise ValueError without labels.

    Examples:
        >>> score = LabelScore(lambda images: images.mean((2, 3)))  # the lightest of the channels
        >>> images = torch.stack([torch.ones(2, 4, 4), -torch.ones(2, 4, 4)])
        >>> score(images, Conditioning(torch.tensor([0, 1])))
        tensor([0.5000, 0.5000])
    """

    def __init__(self, classifier: Any):
        self.classifier = classifier

    @property
    def record(self) -> dict[str, Any]:
        """What samples say of the score: the classifier's fingerprint."""
        return {"classifier": self.classifier.fingerprint()}

    def check(self, labels: Sequence[int], classes: int) -> None:
        """Raise ValueError if not every sample has one of its labels, or the prior knows others."""
        if min(labels, default=-1) < 0:
            raise ValueError("rejection by a classifier needs a label for every sample")
        if self.classifier.classes != classes:
            raise ValueError(f"the classifier knows {self.classifier.classes} classes and the prior {classes}")

    @torch.no_grad()
    def __call__(self, images: Tensor, cond: Conditioning) -> Tensor:
        if cond.labels is None or bool((cond.labels < 0).any()):
            raise ValueError("a classifier scores images that a label was asked of, and there is none")
        p = self.classifier(rounded(images)).softmax(-1)
        return p.gather(-1, cond.labels.to(p.device)[:, None]).squeeze(-1)


def clip_score(model: Any, tokenize: Callable[[Sequence[str]], Any]) -> Score:
    """The cosine between CLIP's embeddings of image and text (Radford et al. 2021, arXiv 2103.00020).

    `model` is a `transformers.CLIPModel`, `tokenize` gives its `input_ids` and `attention_mask` (B, L) for texts. Of
    images scaled so that their shorter side fits the model's the centre is taken, as CLIP was trained. The score raises
    ValueError without texts.
    """
    size = int(model.config.vision_config.image_size)

    @torch.no_grad()
    def score(images: Tensor, cond: Conditioning) -> Tensor:
        if cond.texts is None or not all(cond.texts):
            raise ValueError("CLIP scores images that a text was asked of, and there is none")
        found = {name: value.to(model.device) for name, value in tokenize(cond.texts).items()}
        result = model(pixel_values=clip_pixels(rounded(images), size).to(model.device, model.dtype), **found)
        return F.cosine_similarity(result.image_embeds.float(), result.text_embeds.float())

    return score


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """CLIP's input (B, 3, size, size) of images (B, 1 or 3, H, W) in [-1, 1]."""
    height, width = images.shape[2:]
    factor = size / min(height, width)
    scaled = (max(size, round(height * factor)), max(size, round(width * factor)))
    images = F.interpolate(images.float(), scaled, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    images = images[:, :, top : top + size, left : left + size].expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    return ((images + 1) / 2 - mean) / std


def load_clip(name: str, device: torch.device | str = "cpu") -> Score:
    """`clip_score` by the CLIP of a folder or Hub name, e.g. openai/clip-vit-base-patch32, with weights as safetensors.

    Raises ImportError without the package `transformers`, of the extra `text`, and ValueError for what is no CLIP.
    """
    package = extras.load("transformers", "CLIP needs")
    try:
        tokens = package.AutoTokenizer.from_pretrained(name)
        model = package.CLIPModel.from_pretrained(name, use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"CLIP {name!r} could not be loaded: {str(error).splitlines()[0]}") from error
    score = clip_score(model, lambda texts: tokens(list(texts), padding=True, truncation=True, return_tensors="pt"))
    score.name = f"clip {name}"  # type: ignore[attr-defined]
    return score


def record_of(score: Score) -> dict[str, Any]:
    """What samples say of the score that chose them: its own `record`, or its name."""
    return getattr(score, "record", None) or {"score": getattr(score, "name", type(score).__name__)}
