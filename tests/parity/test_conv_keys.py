"""The convolutional autoencoder carries the key names and shapes of the published VQGAN checkpoints."""

from __future__ import annotations

from latticode.registry import build

# f=16, 128 channels x (1, 1, 2, 2, 4), attention at the lowest resolution: a few keys of each kind, and their number.
PUBLISHED = {
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
TENSORS = {"encoder": 144, "decoder": 194}


def test_keys_and_shapes() -> None:
    spec = {
        "type": "tokenizer",
        "encoder": {"type": "conv_encoder", "attention": [4]},
        "quantizer": {"type": "fsq", "levels": [8, 5, 5, 5]},
        "decoder": {"type": "conv_decoder", "attention": [4]},
    }
    ours = {k: tuple(v.shape) for k, v in build(spec).state_dict().items()}
    assert {k: ours.get(k) for k in PUBLISHED} == PUBLISHED
    for part, count in TENSORS.items():
        assert sum(k.startswith(f"{part}.") for k in ours) == count
