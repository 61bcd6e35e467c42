"""What every dense task keeps, over those of the library and one that a user wrote."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latticode.core import registry
from latticode.core.registry import build, spec_of
from latticode.data import DensePreprocess, open_source
from latticode.dense.tasks import IGNORED, Depth, Panoptic, PixelClasses, Task, number_instances


class Trimap(PixelClasses):
    """A user's task, all there is of it: pet, background, or a border that does not count."""

    maps, classes, channels, terms = 1, (2,), 2, ("trimap",)

    def targets(self, inputs: Tensor) -> Tensor:
        stored = self.label_maps(inputs)  # 1 pet, 2 background, 3 border
        return (stored - 1).where(stored < 3, IGNORED)

    def predict(self, output: Tensor, image: Tensor) -> Tensor:
        return 1 + output.argmax(1, keepdim=True)


NAMES = ["floor", "wall", "ball", "box"]
SPECS = {
    "depth": {"type": "depth", "scale": 1000, "bins": 32},
    "panoptic": {"type": "panoptic", "categories": NAMES, "things": ["ball", "box"], "instances": 6, "void": 4},
    "colorization": {"type": "colorization"},
    "trimap": {"type": "trimap"},
}
B, H, W = 3, 24, 32


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.TABLE, "trimap", Trimap)


@pytest.fixture(params=SPECS)
def task(request) -> Task:
    return build(SPECS[request.param])


def examples(task: Task) -> Tensor:
    """Made-up scenes, as the loader would give them."""
    maps = {Depth: ("depth.png",), Panoptic: ("sem.png", "inst.png"), Trimap: ("sem.png",)}.get(type(task), ())
    preprocess = DensePreprocess((H, W), maps)
    source = open_source("embedded:shapes", medium=preprocess.medium)
    inputs = torch.stack([torch.from_numpy(preprocess.arrange(preprocess.load(source[i]))) for i in range(B)])
    if isinstance(task, Trimap):
        inputs[:, 3] = 1 + inputs[:, 3].clamp(max=2)
    return inputs


def ignored(task: Task, inputs: Tensor) -> Tensor:
    """(B, channels, H, W) bool: the outputs that must not matter."""
    if not isinstance(task, PixelClasses):
        return torch.zeros(B, task.channels, H, W, dtype=torch.bool)
    parts = zip(task.targets(inputs).eq(IGNORED).unbind(1), task.classes, strict=True)
    return torch.cat([part[:, None].expand(-1, size, -1, -1) for part, size in parts], 1)


def test_its_shapes_are_what_it_says(task):
    inputs = examples(task)
    assert inputs.shape[1] == 3 + task.maps
    assert task.image(inputs).shape == (B, 3, H, W)
    assert task.label(inputs).shape == (B, sum(task.classes) or task.channels, H, W)
    output = torch.randn(B, task.channels, H, W)
    assert task.predict(output, task.image(inputs)).shape[0::2] == (B, H)
    assert all(loss.ndim == 0 and loss > 0 for loss in task.losses(output, inputs).values())
    assert not list(task.parameters())
    assert not task.state_dict()
    assert build(spec_of(task)).losses(output, inputs) == task.losses(output, inputs)


def test_the_image_knows_nothing_of_the_label(task):
    inputs = examples(task)
    other = inputs.clone()
    if task.maps:
        other[:, 3:] = 0
    else:  # other colours of the same grey
        other[:] = pillow_grey(inputs)[:, None]
    assert torch.equal(task.image(other), task.image(inputs))
    assert torch.equal(task.image(inputs[:, :3]), task.image(inputs))
    assert task.image(inputs).abs().max() <= 1


def pillow_grey(inputs: Tensor) -> Tensor:
    """(B, H, W): what Pillow makes of the photographs."""
    pictures = [Image.fromarray(one[:3].permute(1, 2, 0).byte().numpy()) for one in inputs]
    return torch.stack([torch.from_numpy(np.array(picture.convert("L"))) for picture in pictures]).int()


def test_pixels_without_a_label_do_not_matter(task):
    inputs = examples(task)
    output = torch.randn(B, task.channels, H, W, requires_grad=True)
    losses = task.losses(output, inputs)
    (gradient,) = torch.autograd.grad(torch.stack(list(losses.values())).sum(), output)
    hidden = ignored(task, inputs)
    assert (gradient[hidden] == 0).all()
    assert (gradient[~hidden] != 0).all()
    if task.maps:
        assert hidden.any()
        changed = output.detach().where(~hidden, 1e4)
        assert task.losses(changed, inputs) == task.losses(output.detach(), inputs)


def test_nothing_to_learn_from_is_no_loss(task):
    if not isinstance(task, PixelClasses):
        pytest.skip("every pixel has a colour")
    inputs = examples(task)
    inputs[:, 3:] = {Depth: 0, Panoptic: 4, Trimap: 3}[type(task)]
    output = torch.randn(B, task.channels, H, W, requires_grad=True)
    losses = task.losses(output, inputs)
    assert all(loss == 0 for loss in losses.values())
    assert (torch.autograd.grad(torch.stack(list(losses.values())).sum(), output)[0] == 0).all()
    assert not task.label(inputs).any()


def test_the_label_is_one_hot_where_there_is_one_and_zero_elsewhere(task):
    if not isinstance(task, PixelClasses):
        pytest.skip("its label is a picture")
    inputs = examples(task)
    label = task.label(inputs)
    assert set(label.unique().tolist()) == {0, 1}
    for part, target in zip(label.split(task.classes, 1), task.targets(inputs).unbind(1), strict=True):
        assert torch.equal(part.sum(1), (target != IGNORED).float())
        assert torch.equal(part.argmax(1)[target != IGNORED], target[target != IGNORED])


def test_the_label_is_the_perfect_output(task):
    inputs = examples(task)
    output = task.label(inputs) * (50 if task.classes else 1)
    assert all(loss < 1e-6 for loss in task.losses(output, inputs).values())
    found = task.predict(output, task.image(inputs))
    known = ~ignored(task, inputs)[:, 0]
    if isinstance(task, Depth):
        half = (task.high - task.low) / task.bins / 2
        assert ((found - task.metres(inputs)).abs()[:, 0][known] <= half * 1.001).all()
    elif isinstance(task, Panoptic):
        assert torch.equal(found[:, 0][known], inputs[:, 3][known].long())
        numbered = task.targets(inputs)[:, 1]
        assert torch.equal((found[:, 1] - 1)[numbered >= 0], numbered[numbered >= 0])
        assert (found[:, 1][known & (inputs[:, 3] < 2)] == 0).all()
    elif isinstance(task, Trimap):
        assert torch.equal(found[:, 0][known], inputs[:, 3][known].long())
    else:
        assert torch.equal(((found + 1) * 127.5).round().int(), inputs)


def test_predictions_and_labels_do_not_depend_on_the_batch(task):
    inputs, output = examples(task), torch.randn(B, task.channels, H, W)
    together = task.predict(output, task.image(inputs))
    alone = torch.cat([task.predict(output[i : i + 1], task.image(inputs[i : i + 1])) for i in range(B)])
    assert torch.equal(together, alone)
    assert torch.equal(task.label(inputs), torch.cat([task.label(inputs[i : i + 1]) for i in range(B)]))


def test_other_examples_are_refused(task):
    inputs, output = examples(task), torch.zeros(B, task.channels, H, W)
    for wrong in (torch.cat([inputs, inputs[:, :1]], 1), inputs.float()):
        with pytest.raises(
            ValueError, match=rf"takes integers \(B, {3 + task.maps}, H, W\), RGB and {task.maps} label"
        ):
            task.losses(output, wrong)


# Depth


def test_depth_is_cut_into_equal_parts():
    task = Depth(scale=1000, bins=10, low=0, high=10)
    millimetres = torch.tensor([0, 500, 999, 1000, 1999, 2000, 9999, 10_000, 60_000], dtype=torch.int32)
    inputs = torch.cat([torch.zeros(3, 9, dtype=torch.int32), millimetres[None]])[None, :, None]
    assert task.targets(inputs).flatten().tolist() == [IGNORED, IGNORED, IGNORED, 1, 1, 2, 9, 9, 9]
    logits = torch.eye(10)[[1, 9]].T[None, :, None]
    assert task.predict(logits, inputs).flatten().tolist() == [1.5, 9.5]
    centimetres = Depth(scale=100, bins=10, low=0, high=10)
    assert torch.equal(centimetres.metres(inputs), 10 * task.metres(inputs))


@pytest.mark.parametrize("scale", [None, 0, -1000])
def test_depth_without_a_scale_is_refused(scale):
    with pytest.raises(ValueError, match=rf"16-bit depth needs task\.scale, units per metre .*, got {scale}"):
        Depth(scale)
    with pytest.raises(ValueError, match=r"got bins 1, low 0.001, high 10"):
        Depth(1000, bins=1)
    with pytest.raises(ValueError, match="got bins 9, low 5, high 5"):
        Depth(1000, bins=9, low=5, high=5)


# Panoptic


def blobs() -> Tensor:
    """(1, 12, 12): six instances, two with the same centre, one in two parts, and background."""
    ids = torch.zeros(1, 12, 12, dtype=torch.int64)
    ids[0, 0:2, 8:10] = 1
    ids[0, 0:2, 0:3] = 2
    ids[0, 4:9, 2:7] = 3
    ids[0, 5:8, 3:6] = 4
    ids[0, 6, 4] = 3  # a frame and its filling, about one centre
    ids[0, 10, 0], ids[0, 10, 10] = 5, 5
    ids[0, 11, 11] = 6
    return ids


def test_instances_are_numbered_in_reading_order():
    number = number_instances(blobs(), 6)[0]
    order = {int(i): int(number[blobs()[0] == i].unique()) for i in blobs().unique()}
    assert order == {0: IGNORED, 2: 0, 1: 1, 3: 2, 4: 3, 5: 4, 6: 5}


TWINS = torch.tensor([[[1, 2, 1], [2, 0, 2], [1, 2, 1]]])  # of one size, about one centre


@pytest.mark.parametrize("ids", [blobs(), TWINS], ids=["blobs", "twins"])
def test_the_ids_of_instances_mean_nothing(ids):
    generator = torch.Generator().manual_seed(0)
    for most in (6, 3, 1):
        for _ in range(8):
            others = torch.cat([torch.zeros(1).long(), 1 + torch.randperm(70_000, generator=generator)[:6]])
            assert torch.equal(number_instances(others[ids], most), number_instances(ids, most))


def test_of_too_many_instances_the_smallest_are_ignored():
    number = number_instances(blobs(), 4)[0]
    for small in (5, 6):
        assert (number[blobs()[0] == small] == IGNORED).all()
    assert number.unique().tolist() == [IGNORED, 0, 1, 2, 3]


def panoptic(semantic: list[list[int]], instance: list[list[int]], **settings) -> tuple[Panoptic, Tensor]:
    maps = torch.tensor([semantic, instance], dtype=torch.int32)
    inputs = torch.cat([torch.zeros(3, *maps.shape[1:], dtype=torch.int32), maps])[None]
    return Panoptic(**({"categories": NAMES, "things": [2, "box"], "instances": 3} | settings)), inputs


def test_only_things_have_instances_and_one_is_of_one_class():
    task, inputs = panoptic([[0, 2, 3], [1, 3, 2]], [[7, 7, 7], [0, 0, 9]])
    semantic, instance = task.targets(inputs)[0]
    assert semantic.tolist() == [[0, 2, 3], [1, 3, 2]]
    assert instance.tolist() == [[IGNORED, 0, 1], [IGNORED, IGNORED, 2]]


def test_the_pixels_of_an_instance_have_the_class_of_their_sum():
    task, inputs = panoptic([[2, 2, 2, 0]], [[1, 1, 1, 0]])
    output = torch.zeros(1, task.channels, 1, 4)
    output[0, 2, 0, :3] = torch.tensor([1.0, 1.0, 1.0])
    output[0, 3, 0, :3] = torch.tensor([1.5, 1.2, -9.0])  # two of three pixels would rather be boxes
    output[0, 0, 0, 3] = 1
    output[0, 4 + 1, 0] = 1
    found = task.predict(output, task.image(inputs))
    assert found[0, 0, 0].tolist() == [2, 2, 2, 0]
    assert found[0, 1, 0].tolist() == [2, 2, 2, 0]
    output[0, 0, 0, :3] = torch.tensor([0.9, 0.9, 0.9])
    output[0, 2:4, 0, :3] = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.1, 1.0]])  # the floor's sum is the largest
    assert task.predict(output, task.image(inputs))[0, 0, 0].tolist() == [3, 3, 3, 0]


def test_classes_out_of_range_are_refused_with_their_numbers():
    task, inputs = panoptic([[0, 4, 17]], [[0, 0, 0]], void=17)
    with pytest.raises(ValueError, match=r"class numbers must lie in 0\.\.3 \(void: 17\), got 4$"):
        task.losses(torch.zeros(1, task.channels, 1, 3), inputs)
    task, inputs = panoptic([[0, 4, 17]], [[0, 0, 0]])
    with pytest.raises(ValueError, match=r"\(void: None\), got 4, 17$"):
        task.label(inputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"things": []}, r"things must be some of the categories floor, wall, ball, box; got \[\]"),
        ({"things": ["cat"]}, r"got \['cat'\]"),
        ({"things": [4]}, r"got \[4\]"),
        ({"categories": ["a", "a"]}, r"categories need different names, and at least one, got \['a', 'a'\]"),
        ({"categories": 0}, "at least one, got 0"),
        ({"instances": 0}, "instances must be >= 1, got 0"),
        ({"void": 3}, r"void must not be the number of a category, 0\.\.3, got 3"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        panoptic([[0]], [[0]], **settings)


def test_categories_may_be_a_number():
    task = Panoptic(5, [1, "3"])
    assert task.names == ("0", "1", "2", "3", "4")
    assert task.of_things == [1, 3]
    assert task.classes == (5, 100)


# Colour


def test_grey_is_pillows():
    inputs = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.int32)
    grey = build(SPECS["colorization"]).image(inputs)
    assert torch.equal(((grey + 1) * 127.5).round().int(), pillow_grey(inputs)[:, None].expand(-1, 3, -1, -1))


def test_colours_beyond_the_range_are_cut():
    output = torch.tensor([-3.0, -0.5, 7.0]).view(1, 3, 1, 1)
    assert build(SPECS["colorization"]).predict(output, output).flatten().tolist() == [-1, -0.5, 1]
