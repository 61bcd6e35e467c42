"""With the same weights the networks of sound compute what the reference implementation computes.

`dac.npz` holds outputs of descriptinc/descript-audio-codec at c7cfc5d, run once in float32 with torch 2.13 on a CPU:
Encoder(8, [2, 4, 8, 8], 16) and Decoder(16, 64, [8, 8, 4, 2]) of dac/model/dac.py. Weights and inputs are drawn here as
they were there, from NumPy's frozen legacy generator seeded with a tensor's name.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from drawn import golden, random_state
from latticode.core.registry import build

EXPECTED = golden("dac")
COMMON: dict[str, Any] = {"latent": 16, "strides": [2, 4, 8, 8]}
CASES = {
    "encoder": ({"type": "audio_encoder", "width": 8, **COMMON}, "input", (2, 1, 2048)),
    "decoder": ({"type": "audio_decoder", "width": 4, **COMMON}, "latents", (2, 16, 3)),
}
SCALES = {"weight_v": (1.0, 0.0), "weight_g": (0.1, 0.7), "alpha": (0.1, 1.0), "bias": (0.1, 0.0)}  # deviation, mean


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    deviation, mean = SCALES[name.rpartition(".")[2]]
    return torch.from_numpy(random_state(name).standard_normal(shape) * deviation + mean).float()


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_outputs(name: str) -> None:
    spec, part, shape = CASES[name]
    network = build(spec).eval()
    network.load_state_dict({k: weight(f"{name}.{k}", tuple(v.shape)) for k, v in network.state_dict().items()})
    expected = EXPECTED[name]
    assert expected.std() > 0.1
    x = torch.from_numpy(random_state(part).uniform(-1, 1, shape)).float()
    torch.testing.assert_close(network(x), expected, rtol=0, atol=1e-5)
