"""The classifier: shapes, spec, saving, cost, and that it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from latticode.core import registry
from latticode.metrics import Classifier


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (28, 28), (32, 48), (64, 64)])
def test_shapes_at_every_size(size: tuple[int, int]) -> None:
    model = Classifier(5, channels=3, width=8).eval()
    images = torch.rand(2, 3, *size) * 2 - 1
    assert model.features(images).shape == (2, 32)
    assert model.dim == 32
    assert torch.equal(model(images), model.head(model.features(images)))
    assert model(images[:0]).shape == (0, 5)


def test_spec_rebuilds_and_saving_keeps_every_bit(tmp_path) -> None:
    model = Classifier(5, channels=3, width=8)
    images = torch.rand(4, 3, 16, 16)
    model(images)  # moves the running statistics
    assert registry.spec_of(model) == {"type": "classifier", "classes": 5, "channels": 3, "width": 8}
    assert isinstance(registry.build(registry.spec_of(model)), Classifier)
    model.save_pretrained(tmp_path)
    assert torch.equal(Classifier.from_pretrained(tmp_path)(images), model.eval()(images))


def test_default_cost_stays_small() -> None:
    images, cost = torch.zeros(1, 1, 32, 32), 0
    for layer in Classifier(10).body.eval().children():
        images = layer(images)
        if isinstance(layer, torch.nn.Conv2d):
            cost += images[0, 0].numel() * layer.weight.numel()
    assert 5e6 < cost < 10e6  # multiply-adds per image


def test_bad_arguments_and_images_are_refused() -> None:
    for arguments in ({"classes": 1}, {"classes": 2, "channels": 0}, {"classes": 2, "width": 0}):
        with pytest.raises(ValueError, match="must be >="):
            Classifier(**arguments)
    model = Classifier(2)
    for shape in ((1, 3, 16, 16), (1, 16, 16), (1, 1, 7, 16)):
        with pytest.raises(ValueError, match="expected images"):
            model(torch.zeros(shape))


def test_it_learns_where_the_bright_corner_is() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)

    def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(0, 4, (count,), generator=generator)
        images = 0.5 * torch.randn(count, 1, 16, 16, generator=generator)
        for image, label in zip(images, labels):
            row, column = 8 * int(label // 2), 8 * int(label % 2)
            image[0, row : row + 8, column : column + 8] += torch.eye(8) * 1.5 if label % 2 else 0.5
        return images, labels

    model = Classifier(4, width=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        images, labels = batch(32)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    images, labels = batch(200)
    with torch.inference_mode():
        assert (model.eval()(images).argmax(1) == labels).float().mean() > 0.8
