"""Adversarial (GAN) losses of a discriminator and of a generator, R1 and LeCam regularization, VQGAN's adaptive weight.

Logits are high for real images; every loss is a mean over all of them. D is the discriminator, x a real image and x' a
generated one, here a reconstruction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.core import distributed

SCALE = 2.0**12  # of losses before their gradients are compared: half precision would round those of large means to 0


class AdversarialLoss(NamedTuple):
    """The two sides of a GAN's loss, both to be minimized.

    Examples:
        >>> real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
        >>> hinge = ADVERSARIAL_LOSSES["hinge"]
        >>> float(hinge.discriminator(real, fake)), float(hinge.generator(fake))
        (1.25, 1.0)
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]  # of the logits of real and of reconstructed images
    generator: Callable[[Tensor], Tensor]  # of the logits of reconstructed images


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """E max(0, 1 - D(x)) + E max(0, 1 + D(x')) (Lim & Ye 2017, arXiv 1705.02894, eq. 13)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def hinge_generator(fake: Tensor) -> Tensor:
    """-E D(x')."""
    return -fake.mean()


def non_saturating_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """-E ln s(D(x)) - E ln(1 - s(D(x'))), s the logistic function (Goodfellow et al. 2014, arXiv 1406.2661, eq. 1)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def non_saturating_generator(fake: Tensor) -> Tensor:
    """-E ln s(D(x')), s the logistic function."""
    return F.softplus(-fake).mean()


ADVERSARIAL_LOSSES = {
    "hinge": AdversarialLoss(hinge_discriminator, hinge_generator),
    "non_saturating": AdversarialLoss(non_saturating_discriminator, non_saturating_generator),
}


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """E |grad_x D(x)|^2 over real `images` (Mescheder et al. 2018, arXiv 1801.04406, eq. 9 without its gamma / 2).

    `logits` (B, ...) were computed from `images`, which require a gradient; D(x) is the mean of an image's logits. The
    result can be differentiated again.
    """
    values = logits.reshape(len(logits), -1).mean(1).sum()
    (gradient,) = torch.autograd.grad(values, images, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


class LeCam(nn.Module):
    """LeCam regularization: E max(0, D(x) - m_fake)^2 + E max(0, m_real - D(x'))^2, m running means of the logits.

    Tseng et al. 2021, arXiv 2104.03310, eq. 3, with the authors' rectifiers: only logits that are further apart than
    the means are drawn together. The means run over all ranks; their decay rises as (1 + t) / (10 + t) to `decay`, or
    with `ramp=False` is `decay` from the first step on, which starts from means of 0, as in public code.

    Examples:
        >>> float(LeCam()(torch.tensor([2.0]), torch.tensor([-1.0])))  # (2 + 1)^2 + (2 + 1)^2
        18.0
    """

    real: Tensor
    fake: Tensor
    updates: Tensor

    def __init__(self, decay: float = 0.999, ramp: bool = True):
        super().__init__()
        self.decay, self.ramp = decay, ramp
        for name in ("real", "fake", "updates"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        if self.training:
            self._update(real.detach().float().mean(), fake.detach().float().mean())
        return F.relu(real - self.fake).square().mean() + F.relu(self.real - fake).square().mean()

    def _update(self, *means: Tensor) -> None:
        now = [total / distributed.world_size() for total in distributed.all_sum(means)]
        rising = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay) * (self.updates > 0)
        decay = rising if self.ramp else torch.full_like(rising, self.decay)
        for running, mean in zip((self.real, self.fake), now, strict=True):
            running.copy_(torch.lerp(mean, running, decay))
        self.updates += 1


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, layer: Tensor, most: float = 1e4) -> Tensor:
    """|grad reconstruction| / (|grad adversarial| + 1e-4) at the weight `layer`, clamped to [0, `most`], detached.

    Esser et al. 2021 (VQGAN, arXiv 2012.09841), eq. 7, with the constants of their code: the two losses move the
    decoder's last layer equally strongly. The gradients are those of all ranks together.
    """
    gradients = [
        torch.autograd.grad(SCALE * loss, layer, retain_graph=True)[0] for loss in (reconstruction, adversarial)
    ]
    norms = [gradient.norm() / distributed.world_size() for gradient in distributed.all_sum(gradients)]
    return (norms[0] / (norms[1] + SCALE * 1e-4)).clamp(0, most).detach()
