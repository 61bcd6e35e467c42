"""VQ-VAE's networks: what a signal is worth after them before anything is learned."""

from __future__ import annotations

import torch

from latticode.autoencoders.residual import ResidualDecoder, ResidualEncoder


def test_a_signal_survives_two_encoders_and_two_decoders() -> None:
    """Those of VQ-VAE-2's upper level, one behind the other: nothing here normalises, so the first weights must not let
    it die, nor biases drown it."""
    torch.manual_seed(0)
    sizes = {"latent": 64, "hidden": 32, "blocks": 2}
    networks = (
        ResidualEncoder(stride=4, **sizes),
        ResidualEncoder(in_channels=64, stride=2, **sizes),
        ResidualDecoder(out_channels=64, stride=2, **sizes),
        ResidualDecoder(stride=4, **sizes),
    )
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        for network in networks:
            x = network(x)
            varying = x.std((0, 2, 3)).square().mean().sqrt()  # from place to place, not from channel to channel
            assert varying > 0.01
            assert varying > 0.5 * x.square().mean().sqrt()
