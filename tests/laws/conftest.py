"""Every quantizer of the zoo in turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from latticode.core import registry
from latticode.quantizers import FSQ, Quantizer
from zoo import SPECS, latents


@pytest.fixture(params=SPECS, name="spec")
def _spec(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SPECS[request.param]


@pytest.fixture(name="quantizer")
def _quantizer(spec: dict[str, Any]) -> Quantizer:
    """In training mode, past its first step."""
    torch.manual_seed(0)
    quantizer = registry.build(spec)
    for part in quantizer.modules():
        if isinstance(part, FSQ) and part.feedback:
            for row in part.shear:
                nn.init.uniform_(row, -1, 1)
    quantizer(latents(300, quantizer.dim))
    return quantizer


@pytest.fixture(name="name")
def _name(spec: dict[str, Any]) -> str:
    return next(name for name, one in SPECS.items() if one is spec)


@pytest.fixture(name="trained")
def _trained(quantizer: Quantizer) -> Quantizer:
    return quantizer.eval()
