"""ViT-VQGAN's networks against the most used public code; the authors published none.

`vit.npz` holds outputs of thuanz123/enhancing-transformers at e1c185d, run once in float32 with torch 2.13 on a CPU:
ViTEncoder((12, 8), 4, 16, 2, 4, 32, dim_head=4) and ViTDecoder of the same arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drawn import close, drawn, golden, load, normal, uniform
from latticode.autoencoders.vit import ViTDecoder, ViTEncoder

EXPECTED = golden("vit")
SHAPE: dict[str, Any] = {"latent": 16, "patch": 4, "width": 16, "depth": 2, "heads": 4, "mlp": 2.0, "side": 2}


def transformer(name: str) -> dict[str, Tensor]:
    named = {f"norm.{kind}": drawn(f"{name}.norm.{kind}", (16,)) for kind in ("weight", "bias")}
    for i in range(2):
        for ours, theirs in (("norm1", "0.norm"), ("norm2", "1.norm")):
            for kind in ("weight", "bias"):
                named[f"blocks.{i}.{ours}.{kind}"] = drawn(f"{name}.layers.{i}.{theirs}.{kind}", (16,))
        parts: dict[str, tuple[str, tuple[int, ...]]] = {
            "attention.qkv.weight": ("0.fn.to_qkv.weight", (48, 16)),
            "attention.out.weight": ("0.fn.to_out.weight", (16, 16)),
            "attention.out.bias": ("0.fn.to_out.bias", (16,)),
            "mlp.up.weight": ("1.fn.net.0.weight", (32, 16)),
            "mlp.up.bias": ("1.fn.net.0.bias", (32,)),
            "mlp.down.weight": ("1.fn.net.2.weight", (16, 32)),
            "mlp.down.bias": ("1.fn.net.2.bias", (16,)),
        }
        named |= {
            f"blocks.{i}.{ours}": drawn(f"{name}.layers.{i}.{key}", shape) for ours, (key, shape) in parts.items()
        }
    return {f"transformer.{key}": value for key, value in named.items()}


def filled(network: Any, name: str, places: str) -> Any:
    """With their weights; the table of positions is 3 x 2 patches."""
    network.positions.table = torch.nn.Parameter(torch.zeros(3, 2, 16))
    mine = {"positions.table": drawn(f"{name}.{places}", (1, 6, 16))}
    return mine | transformer(f"{name}.transformer")


@torch.no_grad()
def test_encoder() -> None:
    """Theirs ends before the linear map to the quantizer, so ours has the identity there."""
    network = ViTEncoder(**SHAPE, style="vitvqgan")
    tensors = filled(network, "vit.encoder", "en_pos_embedding") | {
        "patchify.weight": drawn("vit.encoder.to_patch_embedding.0.weight", (16, 3, 4, 4)),
        "patchify.bias": drawn("vit.encoder.to_patch_embedding.0.bias", (16,)),
        "head.weight": torch.eye(16),
        "head.bias": torch.zeros(16),
    }
    output = load(network, tensors)(uniform("vit.image", (2, 3, 12, 8)))
    close(output.flatten(2).mT, EXPECTED["encoder"], 2e-5)


@torch.no_grad()
def test_decoder() -> None:
    network = ViTDecoder(**SHAPE, style="vitvqgan")
    kernel = drawn("vit.decoder.to_pixel.1.weight", (16, 3, 4, 4))
    tensors = filled(network, "vit.decoder", "de_pos_embedding") | {
        "embed.weight": torch.eye(16),
        "embed.bias": torch.zeros(16),
        "head.weight": kernel.flatten(1).T,
        "head.bias": drawn("vit.decoder.to_pixel.1.bias", (3,)).repeat_interleave(16),
    }
    tokens = normal("vit.tokens", (2, 6, 16))
    close(load(network, tensors)(tokens.mT.unflatten(2, (3, 2))), EXPECTED["decoder"], 2e-5)
