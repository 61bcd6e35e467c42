"""The convolutional autoencoders carry the key names and shapes of the published VQGAN checkpoints."""

from __future__ import annotations

from typing import Any

import pytest

from latticode.core.registry import build

# taming-transformers, f=16, 128 channels x (1, 1, 2, 2, 4), attention at the lowest resolution: a few of each kind.
TAMING = {
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.down.0.block.0.norm1.weight": (128,),
    "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
    "encoder.down.2.block.0.nin_shortcut.weight": (256, 128, 1, 1),
    "encoder.down.4.attn.1.proj_out.weight": (512, 512, 1, 1),
    "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
    "encoder.mid.block_2.conv2.weight": (512, 512, 3, 3),
    "encoder.norm_out.weight": (512,),
    "encoder.conv_out.weight": (256, 512, 3, 3),
    "decoder.conv_in.weight": (512, 256, 3, 3),
    "decoder.up.1.block.0.nin_shortcut.weight": (128, 256, 1, 1),
    "decoder.up.4.attn.2.norm.bias": (512,),
    "decoder.up.4.block.2.conv1.weight": (512, 512, 3, 3),
    "decoder.up.1.upsample.conv.weight": (128, 128, 3, 3),
    "decoder.conv_out.weight": (3, 128, 3, 3),
}
# maskgit-vqgan, f=16: the same without attention and without most biases.
MASKGIT = {
    "encoder.conv_in.weight": (128, 3, 3, 3),
    "encoder.down.0.block.0.norm1.bias": (128,),
    "encoder.down.2.block.0.conv1.weight": (256, 128, 3, 3),
    "encoder.down.2.block.0.nin_shortcut.weight": (256, 256, 1, 1),
    "encoder.mid.1.conv2.weight": (512, 512, 3, 3),
    "encoder.norm_out.weight": (512,),
    "encoder.conv_out.weight": (256, 512, 1, 1),
    "encoder.conv_out.bias": (256,),
    "decoder.conv_in.weight": (512, 256, 3, 3),
    "decoder.conv_in.bias": (512,),
    "decoder.mid.0.norm2.weight": (512,),
    "decoder.up.1.block.0.nin_shortcut.weight": (128, 128, 1, 1),
    "decoder.up.1.upsample_conv.weight": (128, 128, 3, 3),
    "decoder.up.4.upsample_conv.bias": (512,),
    "decoder.up.4.block.1.conv1.weight": (512, 512, 3, 3),
    "decoder.conv_out.weight": (3, 128, 3, 3),
    "decoder.conv_out.bias": (3,),
}
CASES = {  # the options, keys of each kind, and the number of tensors
    "conv": ({"attention": [4]}, TAMING, {"encoder": 144, "decoder": 194}),
    "maskgit": ({}, MASKGIT, {"encoder": 79, "decoder": 88}),
}


def shapes(spec: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in build(spec).state_dict().items()}


@pytest.mark.parametrize("name", CASES)
def test_keys_and_shapes(name: str) -> None:
    options, published, tensors = CASES[name]
    spec = {
        "type": "tokenizer",
        "encoder": {"type": f"{name}_encoder", **options},
        "quantizer": {"type": "fsq", "levels": [8, 5, 5, 5]},
        "decoder": {"type": f"{name}_decoder", **options},
    }
    ours = shapes(spec)
    assert {k: ours.get(k) for k in published} == published
    for part, count in tensors.items():
        assert sum(k.startswith(f"{part}.") for k in ours) == count


def test_norms_have_the_same_keys() -> None:
    options = {"type": "conv_encoder", "width": 8, "multipliers": [1, 2], "attention": [1], "groups": 4}
    assert shapes({**options, "norm": "position"}) == shapes({**options, "norm": "group"}) == shapes(options)
    with pytest.raises(ValueError, match="norm must be one of group, position, got 'batch'"):
        build({**options, "norm": "batch"})
