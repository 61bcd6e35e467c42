"""The losses of VQGAN, its discriminator, LeCam's penalty and DALL-E's pixels against the authors' code.

`vqgan_losses.npz` holds outputs, run once in float32 with torch 2.13 on a CPU, of CompVis/taming-transformers at
3ba01b2 (hinge_d_loss, vanilla_d_loss, calculate_adaptive_weight, NLayerDiscriminator(3, 8, 2) in eval mode),
google/lecam-gan at f9af948 (lecam_reg with means 0.3 and -0.2), TencentARC/SEED-Voken at b9a17ea (LeCAM_EMA with decay
0.9), openai/DALL-E at 5be4b23 (map_pixels, unmap_pixels) and zhaoyue-zephyrus/bsq-vit at 37d212d (d_r1_loss and
LogitLaplaceLoss; DALL-E's own code of it is not public).
"""

from __future__ import annotations

import math

import torch

from drawn import close, drawn, golden, load, normal, uniform
from latticode.autoencoders.pixels import LogitLaplace
from latticode.losses.adversarial import (
    LeCam,
    adaptive_weight,
    hinge_discriminator,
    non_saturating_discriminator,
    r1_penalty,
)
from latticode.nn.discriminator import PatchDiscriminator

EXPECTED = golden("vqgan_losses")
REAL, FAKE = normal("gan.real", (2, 1, 5, 4)), normal("gan.fake", (2, 1, 5, 4))


def test_discriminator_losses() -> None:
    """Theirs are means of the two halves, ours their sums."""
    close(hinge_discriminator(REAL, FAKE) / 2, EXPECTED["hinge"])
    close(non_saturating_discriminator(REAL, FAKE) / 2, EXPECTED["vanilla"])


def test_adaptive_weight() -> None:
    layer = normal("gan.layer", (3, 8)).requires_grad_()
    y = normal("gan.x", (10, 8)) @ layer.T
    close(adaptive_weight((y - 1).abs().mean(), -y.sin().mean(), layer), EXPECTED["adaptive"])


@torch.no_grad()
def test_discriminator() -> None:
    network = PatchDiscriminator(3, 8, 2, norm="batch")
    state = {}
    for name, value in network.state_dict().items():
        key, shape = f"disc.{name}", tuple(value.shape)
        if name.endswith("num_batches_tracked"):
            state[name] = value
        elif name.endswith("running_var"):
            state[name] = normal(key, shape).abs() + 0.5
        else:
            state[name] = drawn(key, shape)
    close(load(network, state)(uniform("disc.image", (2, 3, 32, 28))), EXPECTED["patch"])


def test_lecam() -> None:
    penalty = LeCam()
    penalty.real.fill_(0.3)
    penalty.fake.fill_(-0.2)
    close(penalty.eval()(REAL, FAKE), EXPECTED["lecam"])


def test_r1_penalty() -> None:
    images = uniform("r1.image", (3, 2, 5, 4)).requires_grad_()
    logits = (images.square() * normal("r1.w", (2, 5, 4))).sum((1, 2, 3))[:, None]
    close(r1_penalty(logits, images), EXPECTED["r1"])


def test_running_means_of_lecam() -> None:
    """Three training steps without the ramp, as Open-MAGVIT2 has them."""
    penalty = LeCam(0.9, ramp=False).train()
    steps = [penalty(normal(f"lecam.real{i}", (4, 1)), normal(f"lecam.fake{i}", (4, 1))) for i in range(3)]
    close(torch.stack(steps), EXPECTED["lecam_steps"])


def test_pixels_of_dalle() -> None:
    """Their pixels are in [0, 1], ours in [-1, 1]; their image is clamped."""
    x, pixels = uniform("dalle.x", (2, 3, 4, 5)), LogitLaplace()
    mapped = pixels.eps + (1 - 2 * pixels.eps) * (x + 1) / 2
    close(mapped, EXPECTED["mapped"])
    mu = normal("dalle.mu", (2, 3, 4, 5))
    image = pixels.image(torch.cat([mu, torch.zeros_like(mu)], 1))
    close((image.clamp(-1, 1) + 1) / 2, EXPECTED["unmapped"])
    log_b = normal("dalle.lnb", (2, 3, 4, 5), 0.5)
    close(pixels.nll(torch.cat([mu, log_b], 1), x) - math.log(2), EXPECTED["laplace"])  # bsq-vit leaves ln 2 out
