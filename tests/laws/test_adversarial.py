"""Discriminators and their losses: shapes at any size, formulas by hand, gradients where they belong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from latticode.core.registry import build, spec_of
from latticode.losses.adversarial import ADVERSARIAL_LOSSES, LeCam, adaptive_weight, r1_penalty
from latticode.nn.discriminator import NORMS, PatchDiscriminator, blur_pool

PATCH = {"type": "patch_discriminator", "width": 8, "groups": 4}
DISCRIMINATORS = {f"patch-{norm}": PATCH | {"norm": norm} for norm in NORMS} | {
    "stylegan": {"type": "stylegan_discriminator", "width": 4, "multipliers": [1, 2, 2, 2]}
}


@pytest.fixture(params=DISCRIMINATORS.values(), ids=list(DISCRIMINATORS))
def discriminator(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param | {"channels": 3})


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (40, 16), (64, 64)])
@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_and_channels(name: str, channels: int, size: tuple[int, int]) -> None:
    discriminator = build(DISCRIMINATORS[name] | {"channels": channels})
    images = torch.rand(2, channels, *size, requires_grad=True)
    logits = discriminator(images)
    assert len(logits) == 2
    assert logits[0].numel() >= 1
    logits.square().sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0
    assert len(discriminator(images[:1])) == 1


def test_a_discriminator_is_rebuilt_from_its_spec(discriminator: nn.Module) -> None:
    assert build(spec_of(discriminator)).state_dict().keys() == discriminator.state_dict().keys()


def test_bad_images_and_arguments_are_named(discriminator: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"expected images \(B, 3, H, W\) of at least \d+ px, got \(2, 1, 16, 16\)"):
        discriminator(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match="norm must be one of group, batch, spectral, none, got 'layer'"):
        PatchDiscriminator(norm="layer")
    with pytest.raises(ValueError, match="multipliers must be one or more integers >= 1"):
        build({"type": "stylegan_discriminator", "multipliers": []})


def test_every_parameter_of_a_discriminator_learns(discriminator: nn.Module) -> None:
    ADVERSARIAL_LOSSES["hinge"].discriminator(
        discriminator(torch.rand(4, 3, 32, 32)), discriminator(torch.rand(4, 3, 32, 32))
    ).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in discriminator.parameters())


def test_r1_of_every_discriminator_can_be_differentiated(discriminator: nn.Module) -> None:
    images = torch.rand(4, 3, 24, 24, requires_grad=True)
    r1_penalty(discriminator(images), images).backward()
    gradients = [p.grad for p in discriminator.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)


def test_the_published_names_and_shapes() -> None:
    shapes = {k: tuple(v.shape) for k, v in PatchDiscriminator(norm="batch").state_dict().items()}
    convolutions = {0: (64, 3), 2: (128, 64), 5: (256, 128), 8: (512, 256), 11: (1, 512)}
    expected: dict[str, tuple[int, ...]] = {f"main.{i}.weight": (*s, 4, 4) for i, s in convolutions.items()}
    expected |= {"main.0.bias": (64,), "main.11.bias": (1,)}
    for index, width in ((3, 128), (6, 256), (9, 512)):
        expected |= {f"main.{index}.{k}": (width,) for k in ("weight", "bias", "running_mean", "running_var")}
        expected[f"main.{index}.num_batches_tracked"] = ()
    assert shapes == expected


@pytest.mark.parametrize(("layers", "field"), [(1, 16), (2, 34), (3, 70)])
def test_what_one_logit_of_a_patch_discriminator_sees(layers: int, field: int) -> None:
    discriminator = PatchDiscriminator(1, 2, layers, norm="none")
    images = torch.rand(1, 1, 160, 160, requires_grad=True)
    logits = discriminator(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    assert images.grad is not None
    rows, columns = (images.grad[0, 0].abs().sum(axis).nonzero() for axis in (1, 0))
    assert int(rows.max() - rows.min()) + 1 == int(columns.max() - columns.min()) + 1 == field


@torch.no_grad()
def test_spectral_norm_bounds_the_slope_of_every_convolution() -> None:
    discriminator = PatchDiscriminator(3, 8, norm="spectral")
    for _ in range(30):
        discriminator(torch.rand(1, 3, 24, 24))
    for layer in discriminator.main:
        if isinstance(layer, nn.Conv2d):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2) == pytest.approx(1, abs=0.02)


@torch.no_grad()
def test_a_stylegan_discriminator_sees_that_images_are_alike() -> None:
    discriminator = build(DISCRIMINATORS["stylegan"] | {"channels": 3})
    x, y = torch.rand(2, 4, 3, 32, 32)
    torch.testing.assert_close(
        discriminator(torch.cat([x, y])), torch.cat([discriminator(x), discriminator(y)])
    )  # a group is 4 neighbours
    alone, alike = discriminator(x[:1]), discriminator(x[:1].expand(4, -1, -1, -1))
    torch.testing.assert_close(alike, alone.expand(4, -1))
    assert (discriminator(x)[:1] - alone).abs() > 5e-4


def test_blurred_pooling() -> None:
    torch.testing.assert_close(blur_pool(torch.full((1, 2, 7, 8), 3.0)), torch.full((1, 2, 3, 4), 3.0))
    stripes = torch.tensor([1.0, -1.0]).repeat(8).expand(1, 1, 16, 16)
    assert blur_pool(stripes)[..., 1:-1].abs().max() == 0  # the pattern that plain subsampling would make a constant


def test_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    hinge, soft = ADVERSARIAL_LOSSES["hinge"], ADVERSARIAL_LOSSES["non_saturating"]
    assert float(hinge.discriminator(real, fake)) == pytest.approx((0 + 0.5) / 2 + (0 + 2) / 2)
    assert float(hinge.generator(fake)) == pytest.approx(1.0)
    expected = sum(math.log1p(math.exp(-r)) / 2 for r in (2, 0.5)) + sum(math.log1p(math.exp(f)) / 2 for f in (-3, 1))
    assert float(soft.discriminator(real, fake)) == pytest.approx(expected, rel=1e-6)
    assert float(soft.generator(torch.zeros(3))) == pytest.approx(math.log(2))
    assert float(soft.discriminator(torch.tensor([-1e4]), torch.tensor([1e4]))) == pytest.approx(2e4)


@pytest.mark.parametrize("name", ADVERSARIAL_LOSSES)
def test_the_two_want_opposite_things(name: str) -> None:
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    loss = ADVERSARIAL_LOSSES[name]
    up, down = torch.autograd.grad(loss.discriminator(real, fake), (real, fake))
    (generator,) = torch.autograd.grad(loss.generator(fake), fake)
    assert (up < 0).all()
    assert (down > 0).all()
    assert (generator < 0).all()


def test_r1_of_a_linear_discriminator_is_its_squared_weight() -> None:
    w = torch.randn(3, 4, 4, requires_grad=True)
    images = torch.randn(5, 3, 4, 4, requires_grad=True)
    penalty = r1_penalty((images * w).flatten(1).sum(1), images)
    torch.testing.assert_close(penalty, w.square().sum())
    torch.testing.assert_close(torch.autograd.grad(penalty, w)[0], 2 * w)


def test_r1_does_not_depend_on_how_many_patches_there_are() -> None:
    w, images = torch.randn(3, 4, 4), torch.randn(2, 3, 4, 4, requires_grad=True)
    logit = (images * w).flatten(1).sum(1)
    torch.testing.assert_close(r1_penalty(logit[:, None].expand(-1, 7), images), r1_penalty(logit, images))


def test_lecam_by_hand() -> None:
    means = LeCam()
    first = means(torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0]))
    assert (float(means.real), float(means.fake)) == (2.0, -0.5)  # the first batch is the mean
    assert float(first) == pytest.approx(((1 + 0.5) ** 2 + (3 + 0.5) ** 2) / 2 + ((2 + 1) ** 2 + (2 + 0) ** 2) / 2)
    means(torch.tensor([4.0]), torch.tensor([1.0]))
    assert float(means.real) == pytest.approx(2 / 11 * 2 + 9 / 11 * 4)
    restored = LeCam()
    restored.load_state_dict(means.state_dict())
    restored.eval()
    assert float(restored(torch.tensor([0.0]), torch.tensor([9.0]))) == 0  # closer than the means: nothing to pull
    assert float(restored.real) == float(means.real)


def test_lecam_means_are_long_averages() -> None:
    means = LeCam(decay=0.99)
    torch.manual_seed(0)
    for _ in range(2000):
        means(torch.randn(8) + 1, torch.randn(8) - 1)
    assert float(means.real) == pytest.approx(1, abs=0.1)
    assert float(means.fake) == pytest.approx(-1, abs=0.1)


def test_the_adaptive_weight_makes_the_gradients_equally_long() -> None:
    layer, hidden = torch.randn(3, 6, requires_grad=True), torch.randn(20, 6)
    output = hidden @ layer.T
    others, term = output.square().mean(), 0.01 * output.sin().sum()
    weight = adaptive_weight(others, term, layer)
    assert not weight.requires_grad
    lengths = [torch.autograd.grad(loss, layer, retain_graph=True)[0].norm() for loss in (others, weight * term)]
    torch.testing.assert_close(lengths[0], lengths[1], rtol=2e-3, atol=0)  # but for the 1e-4


def test_the_adaptive_weight_is_bounded() -> None:
    layer = torch.ones(2, requires_grad=True)
    assert float(adaptive_weight(layer.sum(), 0 * layer.sum(), layer)) == pytest.approx(2**0.5 / 1e-4, rel=0.3)
    assert float(adaptive_weight(100 * layer.sum(), 0 * layer.sum(), layer)) == 1e4
    assert float(adaptive_weight(0 * layer.sum(), layer.sum(), layer)) == 0


def test_the_adaptive_weight_survives_half_precision() -> None:
    layer, hidden = torch.randn(3, 4, requires_grad=True), torch.randn(30_000, 4) + 1
    weights = []
    for dtype in (torch.float32, torch.float16):
        output = (hidden.to(dtype) @ layer.T.to(dtype)).float()
        weights.append(adaptive_weight(1e-3 * output.square().mean(), 1e-3 * output.mean(), layer))
    torch.testing.assert_close(weights[1], weights[0], rtol=0.05, atol=0)
