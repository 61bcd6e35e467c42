"""Small specs and runs, and a look at memory, that several tests share."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latticode.engine import RunConfig, load_config, train

FSQ_SPEC = {"type": "fsq", "levels": [4, 3]}
VQ_SPEC = {"type": "vq", "size": 16, "dim": 3}
QUIET = Console(quiet=True)


def tokenizer_spec(quantizer: dict[str, Any] = FSQ_SPEC, channels: int = 1) -> dict[str, Any]:
    common = {"width": 4, "multipliers": [1, 2, 2], "blocks": [0, 1, 1], "latent": 4, "groups": 2}
    return {
        "type": "tokenizer",
        "encoder": {"type": "conv_encoder", "in_channels": channels, **common},
        "quantizer": quantizer,
        "decoder": {"type": "conv_decoder", "out_channels": channels, **common},
    }


TINY = (  # a run of the digits that takes a second
    "data.source=embedded:digits",
    "data.size=8",
    "data.channels=1",
    "data.crop=center",
    "data.workers=0",
    "batch_size=4",
    "steps=4",
    "log_every=2",
    "save_every=2",
    "picture_every=4",
)


def tiny_config(quantizer: dict[str, Any] = FSQ_SPEC, *more: str) -> RunConfig:
    overrides = [*TINY, f"tokenizer={tokenizer_spec(quantizer)}", *more]
    if quantizer["type"] == "vq":
        overrides.append("weights={mse: 1, l1: 0.2, commitment: 0.25}")
    return load_config("fsq-tokenizer", overrides)


def tiny_tokenizer(folder: Path) -> Path:
    return train(tiny_config(), folder, console=QUIET)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The file that holds `image`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out
