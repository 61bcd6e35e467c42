"""With the same weights the convolutional networks compute what the reference implementations compute.

`vqgan.npz` holds outputs of two repositories, run once in float32 with torch 2.13 on a CPU:
- CompVis/taming-transformers at 3ba01b2, Encoder and Decoder of taming/modules/diffusionmodules/model.py with ch 32,
  ch_mult (1, 1, 2), num_res_blocks 1, attn_resolutions [4], resolution 16, z_channels 8;
- bytedance/1d-tokenizer at 942a96f, Encoder and Decoder of modeling/modules/maskgit_vqgan.py with hidden_channels 32,
  channel_mult (1, 1, 2), num_res_blocks 2, z_channels 8.
Weights and inputs are drawn here as they were there, from NumPy's frozen legacy generator seeded with a tensor's name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from drawn import golden, random_state
from latticode.core.registry import build

EXPECTED = golden("vqgan")
COMMON: dict[str, Any] = {"latent": 8, "width": 32, "multipliers": [1, 1, 2]}
SPECS: dict[str, dict[str, Any]] = {
    "taming_encoder": {"type": "conv_encoder", "blocks": 1, "attention": [2], **COMMON},
    "taming_decoder": {"type": "conv_decoder", "blocks": 2, "attention": [2], **COMMON},
    "maskgit_encoder": {"type": "maskgit_encoder", "blocks": 2, **COMMON},
    "maskgit_decoder": {"type": "maskgit_decoder", "blocks": 2, **COMMON},
}


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """N(0, 1 / inputs) for a kernel, N(0, 0.1^2) for a vector, around 1 for the scale of a norm."""
    scale = float(np.prod(shape[1:])) ** -0.5 if len(shape) > 1 else 0.1
    is_scale = name.split(".")[-2].startswith("norm") and name.endswith("weight")
    return torch.from_numpy(random_state(name).standard_normal(shape) * scale + is_scale).float()


def filled(name: str) -> nn.Module:
    module, prefix = build(SPECS[name]), name.split("_")[1]
    module.load_state_dict({k: weight(f"{prefix}.{k}", tuple(v.shape)) for k, v in module.state_dict().items()})
    return module.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", SPECS)
def test_outputs(name: str) -> None:
    part, shape = ("input", (2, 3, 20, 12)) if name.endswith("encoder") else ("latents", (2, 8, 5, 3))
    x = torch.from_numpy(random_state(part).uniform(-1, 1, shape)).float()
    expected = EXPECTED[name]
    assert expected.std() > 0.1
    torch.testing.assert_close(filled(name)(x), expected, rtol=0, atol=1e-5)
