"""One or more of every registered quantizer, for the laws that hold for all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def vq(size: int, dim: int, **options: Any) -> dict[str, Any]:
    return {"type": "vq", "size": size, "dim": dim, **options}


def fsq(*levels: int, **options: Any) -> dict[str, Any]:
    return {"type": "fsq", "levels": list(levels), **options}


def residual(*stages: dict[str, Any], **options: Any) -> dict[str, Any]:
    return {"type": "residual", "stages": stages[0] if len(stages) == 1 else list(stages), **options}


SPECS: dict[str, dict[str, Any]] = {
    "fsq-8555": fsq(8, 5, 5, 5),
    "fsq-33": fsq(3, 3),
    "fsq-wide": fsq(17, 4, 1000),
    "fsq-one-channel": fsq(7),
    "fsq-60-bits": fsq(*[16] * 15),
    "fsq-80-bits": fsq(*[16] * 20, factors=4),
    "fsq-symmetric": fsq(2, 3, 8, bound="symmetric"),
    "fsq-equal-bins": fsq(2, 5, 4, 6, bound="equal-bins", slope=1.6, factors=2),
    "fsq-noise": fsq(5, 4, 8, noise=0.5),
    "fsq-rotation": fsq(5, 4, 8, gradient="rotation"),
    "fsq-diveq": fsq(5, 4, gradient="diveq", bound="symmetric"),
    "fsq-feedback": fsq(8, 6, 5, bound="clamp", feedback=True),
    "fsq-feedback-paper": fsq(8, 5, 5, 5, factors=2, feedback=True),
    "lfq": {"type": "lfq", "dim": 6},
    "lfq-factors": {"type": "lfq", "dim": 8, "factors": 2, "entropy_groups": 2},
    "bsq": {"type": "bsq", "dim": 5},
    "vq-ema": vq(48, 4),
    "vq-gradient": vq(48, 4, update="gradient"),
    "vq-normalize": vq(48, 4, normalize=True),
    "vq-normalize-gradient": vq(33, 3, normalize=True, update="gradient"),
    "vq-plain": vq(10, 1, kmeans=False, restart=0.0),
    "vq-one-code": vq(1, 2),
    "vq-rotation": vq(48, 4, gradient="rotation", entropy=0.5),
    "vq-diveq": vq(48, 4, gradient="diveq", update="gradient"),
    "vq-affine": vq(48, 4, update="gradient", affine=True, sync=0.5),
    "vq-online": vq(48, 4, upkeep="online"),
    "vq-split": vq(48, 4, upkeep="split", decay=0.9, normalize=True),
    "simvq": {"type": "simvq", "size": 48, "dim": 4},
    "gumbel": {"type": "gumbel", "size": 20, "dim": 4},
    "gumbel-hard": {"type": "gumbel", "size": 20, "dim": 4, "hard": True},
    "stochastic-vq": {"type": "stochastic_vq", "size": 20, "dim": 4},
    "ibq": {"type": "ibq", "size": 48, "dim": 4},
    "ibq-entropy": {"type": "ibq", "size": 33, "dim": 4, "entropy": 0.5},
    "rvq": residual(vq(48, 4), vq(48, 4), vq(33, 4, update="gradient")),
    "rvq-shared": residual(vq(48, 4), depth=3),
    "rvq-dropout": residual(vq(48, 4), depth=3, dropout=0.5),
    "residual-fsq": residual(fsq(5, 3, 5, bound="clamp"), depth=3, soft_clamp=True),
    "residual-lfq": residual({"type": "lfq", "dim": 4}, depth=2, soft_clamp=True),
    "qinco": residual(vq(48, 4), {"type": "qinco", "size": 48, "dim": 4, "width": 8}),
    "qinco-alone": {"type": "qinco", "size": 48, "dim": 4, "width": 8},
    "projected": {"type": "projected", "dim": 7, "quantizer": residual(vq(48, 4), vq(48, 4))},
    "grouped": {"type": "grouped", "quantizers": [residual(vq(48, 2), vq(48, 2)), fsq(5, 4)]},
    "grouped-shared": {"type": "grouped", "quantizers": vq(48, 3), "groups": 2},
    "residual-grouped": residual({"type": "grouped", "quantizers": vq(48, 2), "groups": 2}, vq(48, 4)),
    "hierarchical": {"type": "hierarchical", "top": fsq(5, 5, 5), "bottom": vq(48, 3), "fanout": 4},
}
DRAWN = {
    "fsq-noise",
    "fsq-diveq",
    "vq-diveq",
    "gumbel",
    "gumbel-hard",
    "stochastic-vq",
    "rvq-dropout",
}  # random in training
SOFT = DRAWN - {"gumbel-hard", "rvq-dropout"}  # the latents of training are near those of the codes, not equal

# Options that act on a training step and on nothing else; a test holds that without them a graph is the same.
OF_TRAINING = {"noise", "gradient", "upkeep", "decay", "restart", "entropy", "sync", "hard", "dropout"}


def at_rest(spec: Any) -> Any:
    """`spec` without what acts in training alone."""
    if isinstance(spec, dict):
        return {key: at_rest(value) for key, value in spec.items() if key not in OF_TRAINING}
    return [at_rest(value) for value in spec] if isinstance(spec, list) else spec


# The first spec that is the same at rest, by name: encode, decode and eval mode of both are one graph.
SAME_AT_REST = {name: next(one for one in SPECS if at_rest(SPECS[one]) == at_rest(SPECS[name])) for name in SPECS}


def types(spec: Any) -> set[str]:
    """All type names in a spec."""
    if isinstance(spec, dict):
        return set().union({spec["type"]} if "type" in spec else set(), *map(types, spec.values()))
    return set().union(*map(types, spec)) if isinstance(spec, list) else set()


def latents(*shape: int, seed: int = 0) -> Tensor:
    """Values that bf16 holds exactly, so that one input exists in every dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, with NaN equal to NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
