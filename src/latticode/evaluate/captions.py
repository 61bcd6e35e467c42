"""Scores of captions for a prior that is conditioned on text: bits that an image's own caption saves, and how often it
saves more than another one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from latticode.core.types import Texts, first_texts
from latticode.priors.base import Prior

PROTOCOL = {
    "caption_gain_bits": "bits given another image's first caption minus bits given its own first caption, mean over "
    "images; the other image is the next in a random order whose first caption is none of the image's own",
    "caption_accuracy": "share of images with fewer bits given their own caption; ties count half, chance is 0.5",
}


class HeldOut:
    """The held-out images of a prior that reads text, as they come, and then what their captions can be used for.

    Examples:
        >>> from latticode import GPT
        >>> held_out = HeldOut(GPT([8], [2, 2], classes=3, width=8, depth=1, heads=1), seed=0)
        >>> texts = (("a cat",), ("a dog", "a hound"))
        >>> held_out.add(torch.zeros(2, 2, 2, 1), torch.tensor([0, 1]), texts, bits=torch.tensor([9.0, 8.0]))
        >>> labels, captions = held_out.asked(0, 2)  # each image once, with its first caption
        >>> sorted(zip(labels.tolist(), captions))
        [(0, 'a cat'), (1, 'a dog')]
    """

    def __init__(self, prior: Prior, seed: int):
        self.prior, self.seed = prior, seed
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.texts: list[tuple[str, ...]] = []

    def add(self, codes: Tensor, labels: Tensor, texts: Texts, bits: Tensor) -> None:
        """`bits` (B,) are what `codes` cost given the label and the first caption."""
        self._parts.append((codes.int().cpu(), labels.cpu(), bits.double().cpu()))
        self.texts += texts or ((),) * len(codes)

    @cached_property
    def _joined(self) -> tuple[Tensor, ...]:
        return tuple(torch.cat(column) for column in zip(*self._parts, strict=True))

    @cached_property
    def order(self) -> list[int]:
        """The images in a random order, by the seed alone."""
        return torch.randperm(len(self.texts), generator=torch.Generator().manual_seed(self.seed)).tolist()

    def asked(self, first: int, count: int) -> tuple[Tensor, tuple[str, ...]]:
        """Labels (count,) and captions of the samples from number `first` on: the images in random order, each with its
        first caption, then again with its second, and so on. A label is -1 where nothing asks for it."""
        images, texts = [], []
        for number in range(first, first + count):
            turn, place = divmod(number, len(self.order))
            images.append(self.order[place])
            own = self.texts[images[-1]]
            texts.append(own[turn % len(own)] if own else "")
        labels = self._joined[1][images]
        if not self.prior.classes:
            labels = labels.where(torch.tensor([bool(text) for text in texts]), -1)
        return labels, tuple(texts)

    def _strangers(self) -> dict[int, str]:
        """For images by number, a caption of another image that is none of its own; those without are left out."""
        firsts = first_texts(tuple(self.texts), len(self.texts))
        found = {}
        for place, image in enumerate(self.order):
            others = (firsts[other] for other in self.order[place + 1 :] + self.order[:place])
            stranger = next((text for text in others if text and text not in self.texts[image]), None)
            if self.texts[image] and stranger:
                found[image] = stranger
        return found

    def scores(self, batch_size: int, device: torch.device, report: Callable[[int], None]) -> dict[str, Any]:
        """caption_gain_bits, caption_accuracy and caption_images, how many images they are of; None of none."""
        codes, labels, own = self._joined
        strangers = self._strangers()
        if not strangers:
            return {"caption_gain_bits": None, "caption_accuracy": None, "caption_images": 0}
        gains = []
        images = list(strangers)
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            cond = self.prior.condition(labels[part].to(device), tuple(strangers[i] for i in part))
            gains.append(self.prior.bits(codes[part].long().to(device), cond).double().cpu() - own[part])
            report(len(part))
        gain = torch.cat(gains)
        return {
            "caption_gain_bits": float(gain.mean()),
            "caption_accuracy": float((gain > 0).double().mean() + (gain == 0).double().mean() / 2),
            "caption_images": len(gain),
        }
