"""The state of a training run, in one safetensors file, written atomically: what is on disk is always whole.

Random numbers and data order are pure functions of (seed, step), so the step is all that has to be remembered of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from latticode.core import renamed
from latticode.core.pretrained import load_tensors, read_metadata, save_tensors

STATE = Path("training") / "state.safetensors"


def save_state(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    average: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
) -> None:
    """Write modules, optimizers and averaged weights with `metadata` (step, seconds, ...) to `folder`."""
    tensors: dict[str, Tensor] = {f"average/{k}": v for k, v in average.items()}
    for name, module in modules.items():
        tensors |= {f"module/{name}/{k}": v for k, v in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{name}/{index}/{k}": torch.as_tensor(v) for k, v in state.items()}
    save_tensors(folder / STATE, tensors, metadata)


def saved_step(folder: Path) -> int:
    """The step of the checkpoint in `folder`; 0 if there is none."""
    return read_metadata(folder / STATE)["step"] if (folder / STATE).exists() else 0


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata of the training state in `folder`, under the names of today."""
    tensors, metadata = load_tensors(folder / STATE)
    return {renamed.state_key(key): tensor for key, tensor in tensors.items()}, metadata


def load_state(
    folder: Path,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer],
    average: dict[str, Tensor],
) -> dict[str, Any]:
    """Read what `save_state` wrote into the given objects, strictly, and return the metadata."""
    tensors, metadata = read_state(folder)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    for name, module in modules.items():
        module.load_state_dict(part(f"module/{name}/"))
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in part(f"optimizer/{name}/").items():
            index, _, entry = key.partition("/")
            state.setdefault(int(index), {})[entry] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for key, value in part("average/").items():
        average[key].copy_(value)
    return metadata


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Add `values` as a line of JSON to a file."""
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")


def cut_lines(path: Path, step: int) -> None:
    """Drop the lines after `step`, which a resumed run writes again, and a last line that a kill left half written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    path.write_text("".join(kept))
