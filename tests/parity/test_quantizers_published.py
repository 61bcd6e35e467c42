"""SimVQ, BSQ and IBQ against the authors' code, LFQ against the most used one, as the authors' is not public.

The golden files hold outputs, run once in float32 with torch 2.13 on a CPU:
- `simvq.npz`: youngsheen/SimVQ at d8bd94d, SimVQ(30, 6, beta=0.25, legacy=False);
- `bsq.npz`: zhaoyue-zephyrus/bsq-vit at 37d212d, BinarySphericalQuantizer(12, ..., group_size=4, l2_norm=True) in
  both of its ways to compute entropies, at inv_temperature 1 and 100;
- `ibq.npz`: TencentARC/SEED-Voken at b9a17ea, IndexPropagationQuantize(30, 6, beta=0.25, use_entropy_loss=True,
  entropy_temperature=0.5);
- `lfq.npz`: TencentARC/SEED-Voken at b9a17ea, Open-MAGVIT2's LFQ(dim=8, codebook_size=256) at its inverse temperature
  of 100.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from drawn import close, golden, load, normal
from latticode import BSQ, IBQ, LFQ, SimVQ


def gradient(value: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(value, of, retain_graph=True)[0]


def test_simvq() -> None:
    """Their W has a bias, which the paper's formula has not: `bias=True`."""
    expected = golden("simvq")
    quantizer = load(
        SimVQ(30, 6, bias=True),
        {
            "frozen": normal("simvq.frozen", (30, 6), 6**-0.5),
            "transform.weight": normal("simvq.weight", (6, 6), 6**-0.5),
            "transform.bias": normal("simvq.bias", (6,), 0.3),
        },
    )
    z = normal("simvq.z", (2, 6, 4, 3)).requires_grad_()
    out = quantizer(z.movedim(1, -1))
    loss = out.losses["codebook"] + 0.25 * out.losses["commitment"]
    (loss + out.latents.square().sum()).backward()
    assert torch.equal(out.codes.flatten(), expected["codes"].flatten())
    close(out.latents.movedim(-1, 1), expected["latents"])
    close(loss, expected["loss"])
    assert z.grad is not None
    close(z.grad, expected["grad_z"])
    close(quantizer.transform.weight.grad, expected["grad_weight"])
    close(quantizer.transform.bias.grad, expected["grad_bias"])


def test_ibq() -> None:
    """Codes, losses and the gradients of z and of every code."""
    expected = golden("ibq")
    quantizer = load(IBQ(30, 6, entropy=0.5), {"embedding": normal("ibq.book", (30, 6))})
    z = normal("ibq.z", (2, 6, 4, 3)).requires_grad_()
    out = quantizer(z.movedim(1, -1))
    losses, latents = out.losses, out.latents.movedim(-1, 1)
    loss = losses["double_quantization"] + losses["commitment"] + 0.25 * losses["codebook"]
    average = math.log(30) - losses["diversity"]
    (latents.mul(normal("ibq.w", (2, 6, 4, 3))).sum() + 3 * loss + 2 * losses["sample_entropy"] - average).backward()
    assert torch.equal(out.codes.flatten(), expected["codes"])
    close(latents, expected["latents"])
    close(loss, expected["loss"])
    close(losses["sample_entropy"], expected["sample"], 2e-4)  # they add 1e-5 to what they take logarithms of
    close(average, expected["average"], 1e-3)
    assert z.grad is not None
    close(z.grad, expected["grad_z"], 1e-3)
    close(quantizer.embedding.grad, expected["grad_book"], 2e-3)


@pytest.mark.parametrize("inverse", [1, 100])
@pytest.mark.parametrize(("way", "groups"), [("group", 3), ("analytical", 12)])
def test_bsq_entropies(way: str, groups: int, inverse: int) -> None:
    """Their groups of 4 bits are three entropy groups here; their analytical way takes every bit by itself."""
    expected = golden("bsq")
    u = F.normalize(normal("bsq.z", (2, 10, 12)), dim=-1).requires_grad_()
    losses = BSQ(12, temperature=1 / inverse, entropy_groups=groups)(u).losses
    codebook = 12 * math.log(2) - losses["diversity"]
    key = f"{way}_{inverse}"
    close(losses["sample_entropy"], expected[f"sample_{key}"])
    close(codebook, expected[f"codebook_{key}"], 1e-4)  # they add 1e-8 to what they take the logarithm of
    # Their u is a leaf; ours is normalized once more, so of their gradient the part along the sphere arrives.
    tangent = expected[f"gsample_{key}"], expected[f"gcodebook_{key}"]
    along = [g - (g * u).sum(-1, keepdim=True) * u for g in tangent]
    close(gradient(losses["sample_entropy"], u), along[0].detach(), 2e-5)
    close(gradient(codebook, u), along[1].detach(), 2e-5)


def test_bsq_codes() -> None:
    """Their first channel is the highest bit, ours the lowest; their commitment loss sums over channels."""
    expected = golden("bsq")
    u = F.normalize(normal("bsq.z", (2, 10, 12)), dim=-1)
    out = BSQ(12)(u)
    close(out.latents, expected["latents"])
    close(12 * out.losses["commitment"], expected["commitment"])
    bits = [out.codes[..., 0] // 2**i % 2 for i in range(12)]
    assert torch.equal(torch.stack([b * 2 ** (11 - i) for i, b in enumerate(bits)]).sum(0), expected["indices"])


def test_lfq() -> None:
    expected = golden("lfq")
    z = normal("lfq.z", (2, 8, 5, 3)).requires_grad_()
    out = LFQ(8)(z.movedim(1, -1))
    entropy = 8 * math.log(2) - out.losses["diversity"]
    assert torch.equal(out.codes.flatten(), expected["codes"])
    close(out.latents.movedim(-1, 1), expected["latents"], 1e-6)
    close(out.losses["commitment"], expected["commitment"])
    close(out.losses["sample_entropy"], expected["sample"])
    close(entropy, expected["batch"], 1e-3)  # they add 1e-5 to each of 256 probabilities
    close(gradient(out.losses["sample_entropy"], z), expected["gsample"], 1e-4)
    close(gradient(entropy, z), expected["gbatch"], 1e-3)
