"""Perceptual distances: zero for the same image, a gradient to the output alone, constants of no state."""

from __future__ import annotations

import hashlib

import pytest
import safetensors.torch
import torch
from torch import nn

from helpers import tokenizer_spec
from latticode.core.registry import build, spec_of
from latticode.losses.perceptual import LPIPS, FeatureDistance, Perceptual
from latticode.metrics.classifier import Classifier


def trained_classifier(channels: int = 3) -> Classifier:
    """A classifier whose norms have statistics and weights of their own, as after training."""
    torch.manual_seed(1)
    network = Classifier(4, channels, width=8)
    network(torch.randn(8, channels, 16, 16))
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0, 0.2)
    return network


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> tuple[str, str]:
    """Files as published, with random numbers of a sensible size."""
    folder = tmp_path_factory.mktemp("lpips")
    generator = torch.Generator().manual_seed(0)
    widths = [(64, 3), (64, 64), (128, 64), (128, 128), (256, 128), (256, 256), (256, 256)]
    widths += [(512, 256)] + [(512, 512)] * 5
    vgg, linear = {}, {}
    for index, (outputs, inputs) in zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), widths, strict=True):
        noise = torch.randn(outputs, inputs, 3, 3, generator=generator)
        vgg[f"features.{index}.weight"] = (noise * (2 / (9 * inputs)) ** 0.5).half()
        vgg[f"features.{index}.bias"] = torch.zeros(outputs).half()
    vgg["classifier.0.weight"] = torch.zeros(1)  # what is not needed may be there
    for stage, width in enumerate((64, 128, 256, 512, 512)):
        linear[f"lin{stage}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    safetensors.torch.save_file(vgg, folder / "vgg.safetensors")
    torch.save(linear, folder / "linear.pth")
    return str(folder / "vgg.safetensors"), str(folder / "linear.pth")


@pytest.fixture(params=["features", "lpips"])
def perceptual(request: pytest.FixtureRequest, tmp_path, weights) -> Perceptual:
    if request.param == "lpips":
        return build({"type": "lpips", "vgg": weights[0], "linear": weights[1]})
    return build({"type": "features", "run": str(trained_classifier().save_pretrained(tmp_path / "run"))})


@pytest.mark.slow
def test_distance(perceptual: Perceptual) -> None:
    x, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 3, 32, 32)
    distances = [float(perceptual(x + s * noise, x)) for s in (0, 0.05, 0.2, 0.8)]
    assert distances[0] == 0
    assert distances == sorted(set(distances))
    torch.testing.assert_close(perceptual(x + noise, x), perceptual(x, x + noise))
    separate = [perceptual(x[i : i + 1] + noise[i : i + 1], x[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(perceptual(x + noise, x), torch.stack(separate).mean())


def test_the_gradient_goes_to_the_output_only(perceptual: Perceptual) -> None:
    output, target = (torch.rand(1, 3, 16, 16, requires_grad=True) for _ in range(2))
    perceptual(output, target).backward()
    assert output.grad is not None
    assert output.grad.abs().sum() > 0
    assert target.grad is None


def test_features_that_are_all_silent_are_no_danger(tmp_path) -> None:
    classifier = trained_classifier()
    nn.init.constant_(classifier.get_parameter("body.1.bias"), -100)  # nothing passes the first rectifier
    perceptual = FeatureDistance(str(classifier.save_pretrained(tmp_path)))
    output = torch.rand(1, 3, 16, 16, requires_grad=True)
    distance = perceptual(output, torch.rand(1, 3, 16, 16))
    distance.backward()
    assert distance.isfinite()
    assert output.grad is not None
    assert output.grad.isfinite().all()


def test_the_network_is_a_constant(perceptual: Perceptual) -> None:
    assert not list(perceptual.parameters())
    assert not perceptual.state_dict()
    x, y = torch.rand(2, 2, 3, 16, 16)
    before = perceptual(x, y)
    perceptual.load_state_dict({})
    perceptual.train()
    assert not any(module.training for module in perceptual.modules())
    assert torch.equal(perceptual(x, y), before)
    assert all(b.dtype == torch.float64 for b in perceptual.double().buffers() if b.is_floating_point())  # it moves


def test_a_build_on_the_meta_device_keeps_the_network(perceptual: Perceptual) -> None:
    """Inside a model that is built there and emptied, as large ones are."""
    spec, x = spec_of(perceptual), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(3, 3), build(spec)])
    model.to_empty(device="cpu")
    assert torch.equal(model[1](x, -x), perceptual(x, -x))


def test_wrong_images_are_named(perceptual: Perceptual) -> None:
    with pytest.raises(ValueError, match=r"sees images \(B, .*got \(1, 2, 16, 16\)"):
        perceptual(torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 16, 16))


def test_features_by_hand(tmp_path) -> None:
    classifier = trained_classifier(1)
    run = classifier.save_pretrained(tmp_path)
    perceptual = FeatureDistance(str(run))
    digest = hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    assert perceptual.name == f"features of {run}, SHA-256 {digest[:16]}"
    x, y = torch.rand(2, 3, 1, 16, 16)
    measured = perceptual(x, y)
    classifier.eval()
    expected, stages = torch.zeros(()), 0
    with torch.no_grad():
        for layer in classifier.body:
            x, y = layer(x), layer(y)
            if isinstance(layer, nn.ReLU):
                squares = (nn.functional.normalize(x, dim=1) - nn.functional.normalize(y, dim=1)).square()
                expected, stages = expected + squares.sum(1).mean(), stages + 1
    assert stages == 5
    torch.testing.assert_close(measured, expected, rtol=1e-4, atol=0)


def test_only_a_classifier_has_features(tmp_path) -> None:
    folder = build(tokenizer_spec()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a Tokenizer; a classifier is needed"):
        FeatureDistance(str(folder))
    with pytest.raises(FileNotFoundError, match="nowhere holds no"):
        FeatureDistance("nowhere")


@torch.no_grad()
def test_lpips_by_hand(weights) -> None:
    vgg, linear = safetensors.torch.load_file(weights[0]), torch.load(weights[1], weights_only=True)
    x, y = torch.rand(2, 2, 1, 16, 16) * 2 - 1
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    a, b = (((image.expand(-1, 3, -1, -1) - shift) / scale) for image in (x, y))
    expected = torch.zeros(2)
    stage = 0
    for index in range(30):  # torchvision's numbering: 31 layers, of which the last halving is not seen
        if index in (4, 9, 16, 23):
            a, b = (nn.functional.max_pool2d(h, 2) for h in (a, b))
        elif f"features.{index}.weight" in vgg:
            kernel, bias = (vgg[f"features.{index}.{k}"].float() for k in ("weight", "bias"))
            a, b = (nn.functional.conv2d(h, kernel, bias, padding=1).relu() for h in (a, b))
        if index in (3, 8, 15, 22, 29):
            squares = (nn.functional.normalize(a, dim=1) - nn.functional.normalize(b, dim=1)).square()
            expected += (squares * linear[f"lin{stage}.model.1.weight"]).sum(1).mean((1, 2))
            stage += 1
    torch.testing.assert_close(LPIPS(*weights)(x, y), expected.mean())


def test_weights_that_are_not_there_are_named_with_the_way_to_them(tmp_path, monkeypatch, weights) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"(?s)vgg16-397923af\.pth as .*weights-vgg16-lpips\.pth as .*perceptual.*'features'"
    ):
        LPIPS()
    with pytest.raises(ValueError, match=r"get https://\S+weights-vgg16-lpips\.pth as \S+\. With"):
        LPIPS(vgg=weights[0])
    with pytest.raises(ValueError, match=r"does not fit: lin0\.model\.1\.weight must be \(1, 64, 1, 1\), .*none"):
        LPIPS(weights[0], weights[0])
