"""VQ, SimVQ and the gradient estimators against vector-quantize-pytorch, where that is right."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from latticode.quantizers import VQ
from latticode.quantizers.gradients import diveq, rotation
from latticode.quantizers.vq import SimVQ

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what the import of a peer warns of is not ours to see to
    peer = pytest.importorskip("vector_quantize_pytorch")


def test_simvq():
    """Codes, latents, losses and gradients; the peer has one loss, codebook + 0.25 commitment by default."""
    theirs = peer.SimVQ(dim=6, codebook_size=50, rotation_trick=False)
    ours = SimVQ(50, 6)
    ours.load_state_dict({"frozen": theirs.frozen_codebook, "transform.weight": theirs.code_transform.weight})
    results = []
    for module in (theirs, ours):
        z = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        if module is theirs:
            latents, codes, loss = module(z)
            weight = theirs.code_transform.weight
        else:
            out = module(z)
            latents, codes = out.latents, out.codes[..., 0]
            loss = out.losses["codebook"] + 0.25 * out.losses["commitment"]
            weight = ours.transform.weight
        gradients = torch.autograd.grad(loss + latents.pow(3).sum(), (z, weight))
        results.append((codes, latents, loss, *gradients))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("normalize", [False, True])
def test_one_step_of_the_averages(normalize: bool):
    """Where every code is chosen. Of an unchosen code the smoothing draws the peer's vector to the origin, not ours."""
    theirs = peer.VectorQuantize(
        dim=4, codebook_size=8, decay=0.9, threshold_ema_dead_code=0, use_cosine_sim=normalize, rotation_trick=False
    )
    ours = VQ(8, 4, decay=0.9, normalize=normalize, kmeans=False, restart=0.0)
    vectors = theirs._codebook.embed[0].clone()
    ours.embedding.weight.copy_(vectors)
    ours.embedding.total.copy_(vectors)
    for step in range(3):
        z = torch.randn(1, 200, 4, generator=torch.Generator().manual_seed(step))
        latents, codes, _ = theirs(z)
        out = ours(z)
        assert len(codes.unique()) == 8
        assert torch.equal(out.codes[..., 0], codes)
        torch.testing.assert_close(out.latents, latents)
        torch.testing.assert_close(ours.embedding.count, theirs._codebook.cluster_size[0])
        torch.testing.assert_close(ours.embedding.total, theirs._codebook.embed_avg[0])
        torch.testing.assert_close(ours.embedding.weight, theirs._codebook.embed[0])


def learned(sync: float) -> tuple[Any, VQ]:
    """The peer's learned codebook and ours, alike."""
    theirs = peer.VectorQuantize(
        dim=4,
        codebook_size=8,
        learnable_codebook=True,
        ema_update=False,
        threshold_ema_dead_code=0,
        rotation_trick=False,
        sync_update_v=sync,
    )
    ours = VQ(8, 4, update="gradient", kmeans=False, restart=0.0, sync=sync)
    ours.embedding.weight.data.copy_(theirs._codebook.embed.data[0])
    return theirs, ours


def test_losses_of_a_learned_codebook():
    """The one loss of the peer is a mean square that pulls code and latent alike: half of our two together."""
    theirs, ours = learned(0.0)
    z = torch.randn(1, 60, 4, requires_grad=True)
    _, codes, loss = theirs(z)
    out = ours(z)
    mine = out.losses["commitment"] + out.losses["codebook"]
    assert torch.equal(out.codes[..., 0], codes)
    torch.testing.assert_close(mine / 2, loss)
    to_z, to_codes = torch.autograd.grad(loss, (z, theirs._codebook.embed))
    torch.testing.assert_close(torch.autograd.grad(mine, (z, ours.embedding.weight)), (to_z, to_codes[0]))


def test_sync_reaches_our_codes_and_only_the_latents_of_the_peer():
    """It adds v (q - sg q) after q has become the straight-through latents: 1 + v times the gradient for z instead."""
    theirs, ours = learned(0.5)
    z, upstream = torch.randn(1, 60, 4, requires_grad=True), torch.randn(1, 60, 4)
    (to_z,) = torch.autograd.grad(theirs(z)[0], z, upstream)
    torch.testing.assert_close(to_z, 1.5 * upstream)
    to_z, to_codes = torch.autograd.grad(ours(z).latents, (z, ours.embedding.weight), upstream)
    assert torch.equal(to_z, upstream)
    assert to_codes.abs().sum() > 0


def test_rotation_trick():
    from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

    upstream = torch.randn(50, 5)
    z, q = torch.randn(50, 5), torch.randn(50, 5)

    def gradient(estimate: object) -> Tensor:
        x = z.clone().requires_grad_()
        return torch.autograd.grad(estimate(x, q), x, upstream)[0]  # type: ignore[operator]

    torch.testing.assert_close(gradient(rotation), gradient(rotate_to))
    assert torch.equal(rotation(z, q), q)
    assert not torch.equal(rotate_to(z, q), q)  # the peer's latents are the code only up to rounding


def test_diveq():
    from vector_quantize_pytorch.vector_quantize_pytorch import directional_reparam

    z, q, upstream = torch.randn(50, 5), torch.randn(50, 5), torch.randn(50, 5)
    results = []
    for estimate in (diveq, directional_reparam):
        inputs = [z.clone().requires_grad_(), q.clone().requires_grad_()]
        torch.manual_seed(2)
        out = estimate(inputs[0], inputs[1], 5e-3)
        results.append((out, *torch.autograd.grad(out, inputs, upstream)))
    torch.testing.assert_close(results[0], results[1])
