"""A dense task as a user writes it, and small models for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from latticode.core import registry
from latticode.dense.tasks import Task
from latticode.dense.uvim import UViM
from latticode.priors import Guide
from zoo import SPECS


class Kinds(Task):
    """A task as a user writes it, all in one place: which of `count` kinds each pixel is; what is more is ignored."""

    maps = 1

    def __init__(self, count: int = 4):
        super().__init__()
        self.count, self.classes, self.channels = count, (count,), count

    def label(self, inputs: Tensor) -> Tensor:
        return (
            F.one_hot(self.label_maps(inputs)[:, 0].clamp(max=self.count), self.count + 1)[..., :-1]
            .movedim(-1, 1)
            .float()
        )

    def losses(self, output: Tensor, inputs: Tensor) -> dict[str, Tensor]:
        target = self.label_maps(inputs)[:, 0]
        return {"kinds": F.cross_entropy(output, target.where(target < self.count, -1), ignore_index=-1)}

    def predict(self, output: Tensor, image: Tensor) -> Tensor:
        return output.argmax(1, keepdim=True)

    def metrics(self) -> Accuracy:
        return Accuracy(self.count)

    def picture(self, prediction: Tensor) -> Tensor:
        return (prediction * (255 // self.count)).expand(-1, 3, -1, -1).to(torch.uint8)


class Accuracy:
    shown = ("accuracy",)

    def __init__(self, count: int):
        self.count, self.right, self.total = count, 0, 0

    def update(self, prediction: Tensor, inputs: Tensor) -> None:
        known = inputs[:, 3:] < self.count
        self.right += int((prediction == inputs[:, 3:])[known].sum())
        self.total += int(known.sum())

    def compute(self) -> dict[str, float]:
        return {"accuracy": self.right / self.total}


SIZES = {"code": [2, 3], "patch": 4, "side": 4, "width": 16, "heads": 2, "oracle_depth": 1, "base_depth": 1}
FSQ = {"type": "fsq", "levels": [5, 3, 3]}
VQ = {"type": "vq", "size": 45, "dim": 16, "normalize": True, "kmeans": False, "upkeep": "split", "decay": 0.995}
EYE = {"type": "vit_encoder", "latent": 8, "patch": 4, "width": 8, "depth": 1, "heads": 2, "side": 4}
ONE_CODE = {"projected": {"type": "projected", "quantizer": FSQ, "dim": 16}} | {
    spec["type"]: spec  # the first in the zoo of every registered quantizer with one code for a position
    for spec in reversed(SPECS.values())
    if len(registry.build(spec).vocab) == 1
}
both = pytest.mark.parametrize("quantizer", [FSQ, VQ], ids=["fsq", "vq"])


def uvim(quantizer: dict[str, Any] = FSQ, **changes: Any) -> UViM:
    """With weights away from their initial values: at those the head gives zero for everything."""
    model = registry.build({"type": "uvim", "task": {"type": "kinds"}, "quantizer": quantizer, **SIZES, **changes})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.eval()


def guide(model: UViM, **changes: Any) -> Guide:
    spec = {"type": "guide", "encoder": EYE, "width": 16, "depth": 2, "heads": 2, **changes}
    prior = registry.build({**spec, "vocab": model.vocab, "grid": model.grid((16, 16))})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return prior.eval()


def examples(count: int = 4, height: int = 16, width: int = 16, seed: int = 0) -> Tensor:
    """RGB 0..255 and a map of kinds 0..4, 4 being none."""
    generator = torch.Generator().manual_seed(seed)
    rgb = torch.randint(256, (count, 3, height, width), generator=generator)
    return torch.cat([rgb, torch.randint(5, (count, 1, height, width), generator=generator)], 1).int()


def relabelled(inputs: Tensor) -> Tensor:
    return torch.cat([inputs[:, :3], (inputs[:, 3:] + 1) % 5], 1)


def latents_of(model: UViM, run: Any) -> Tensor:
    """What the base model is given of the code while `run` runs."""
    seen: list[Tensor] = []
    handle = model.from_code.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    run()
    handle.remove()
    (latents,) = seen
    return latents
