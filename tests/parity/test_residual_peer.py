"""Residual quantization against vector-quantize-pytorch, where that is right, and in numbers where it is not.

Found in version 1.32:
- `ResidualVQ` gives the latents' gradient to z once for every stage, since it detaches the residual between stages that
  each pass a straight-through gradient: with n stages z learns n times too fast from the decoder.
- `ResidualFSQ` is right in eval mode since it clamps (its issue 230): the scale of stage i is L^-i, not the (L-1)^-i of
  its issue 96, which leaves errors up to (L-1)^-n where L^(1-n) / (L-1) is possible. Its gradient has the fault of
  `ResidualVQ`, once for each stage that does not clamp, and it cannot decode fewer stages unless built with dropout.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latticode.quantizers import FSQ, VQ
from latticode.quantizers.residual import Residual

peer = pytest.importorskip("vector_quantize_pytorch")
STAGES, SIZE, DIM = 4, 32, 6


def same_codebooks(**options: Any) -> tuple[Any, Residual]:
    """The peer's module and ours with its codebooks, which shrink from stage to stage as those of a trained one do."""
    options = {"rotation_trick": False, **options}
    theirs = peer.ResidualVQ(dim=DIM, num_quantizers=STAGES, codebook_size=SIZE, **options)
    ours = Residual([VQ(SIZE, DIM, kmeans=False, restart=0.0) for _ in range(STAGES)])
    with torch.no_grad():
        for i, (layer, stage) in enumerate(zip(theirs.layers, ours._sequence, strict=True)):
            weight = torch.randn(SIZE, DIM) * 0.6**i
            layer._codebook.embed.copy_(weight[None])
            assert isinstance(stage, VQ)
            stage.embedding.weight.copy_(weight)
    return theirs, ours


@pytest.fixture(name="z")
def _z() -> Tensor:
    return torch.randn(3, 50, DIM)


def test_codes_and_latents(z: Tensor):
    theirs, ours = same_codebooks()
    latents, codes, _ = theirs.eval()(z)
    out = ours.eval()(z)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(out.latents, latents)
    torch.testing.assert_close(ours.decode(codes), theirs.get_output_from_indices(codes))


def test_commitment_of_each_stage_in_value_and_gradient(z: Tensor):
    theirs, ours = same_codebooks(commitment_weight=1.0)
    z.requires_grad_()
    losses = theirs.train()(z, freeze_codebook=True)[2]
    out = ours.eval()(z)
    torch.testing.assert_close(out.losses["commitment"], losses.mean())
    (expected,) = torch.autograd.grad(losses.mean(), z)
    torch.testing.assert_close(torch.autograd.grad(out.losses["commitment"], z)[0], expected)
    means = [Residual(ours._sequence[:j]).eval()(z).losses["commitment"] * j for j in range(1, STAGES + 1)]
    torch.testing.assert_close(torch.stack([b - a for a, b in zip([torch.zeros(()), *means], means)]), losses)


def test_the_peer_passes_the_gradient_of_the_latents_once_for_each_stage(z: Tensor):
    theirs, ours = same_codebooks()
    upstream = torch.randn_like(z)
    gradients = []
    for latents in (ours.train()(z.requires_grad_()).latents, theirs.train()(z, freeze_codebook=True)[0]):
        gradients += torch.autograd.grad((latents * upstream).sum(), z)
    assert torch.equal(gradients[0], upstream)
    torch.testing.assert_close(gradients[1], STAGES * upstream)


LEVELS = [[3, 3], [4, 8], [5, 3], [2, 2], [8, 5]]


@pytest.mark.parametrize("levels", LEVELS, ids=str)
def test_residual_fsq(levels: list[int]):
    theirs = peer.ResidualFSQ(levels=levels, num_quantizers=3).eval()
    ours = Residual(FSQ(levels, bound="clamp"), 3, soft_clamp=True).eval()
    z = torch.randn(2, 400, 2)
    latents, codes = theirs(z)
    out = ours(z)
    agree = (out.codes == codes).all(dim=-1)
    assert agree.float().mean() > 0.99  # values at the edge of a cell fall to either side by rounding
    torch.testing.assert_close(out.latents[agree], latents[agree])
    torch.testing.assert_close(ours.decode(codes.long()), theirs.get_output_from_indices(codes))


def test_the_scale_of_the_peer_is_the_better_one():
    """The greatest error on what is clamped, of three stages of L levels: at L^-i, and at (L-1)^-i."""
    z = torch.linspace(-3, 3, 20001)[None, :, None]
    for level in (3, 5, 8):
        limit = level / (level - 1)
        theirs = peer.ResidualFSQ(levels=[level], num_quantizers=3).eval()
        ours = Residual(FSQ([level], bound="clamp"), 3, soft_clamp=True).eval()
        results = [ours(z).latents, theirs(z)[0]]
        theirs.scales.copy_((level - 1.0) ** -torch.arange(3.0)[:, None])
        results.append(theirs(z)[0])
        errors = [(latents - limit * torch.tanh(z / limit)).abs().max().item() for latents in results]
        half_cell = limit * level**-3
        assert errors == pytest.approx([half_cell, half_cell, (level - 1.0) ** -3], rel=0.01)


def test_the_peer_passes_the_gradient_of_residual_fsq_up_to_once_for_each_stage():
    """Once for each stage that does not clamp what comes to it; ours is that of the soft clamp alone."""
    theirs = peer.ResidualFSQ(levels=[5, 5], num_quantizers=3)
    ours = Residual(FSQ([5, 5], bound="clamp"), 3, soft_clamp=True)
    z = (torch.rand(2, 500, 2) - 0.5).requires_grad_()
    slope = 1 / torch.cosh(z.detach() / 1.25) ** 2
    gradients = [torch.autograd.grad(latents.sum(), z)[0] for latents in (ours(z).latents, theirs(z)[0])]
    torch.testing.assert_close(gradients[0], slope)
    times = gradients[1] / slope
    torch.testing.assert_close(times, times.round())
    assert times.round().unique().tolist() == [1, 2, 3]
    assert times.mean() > 2.4
