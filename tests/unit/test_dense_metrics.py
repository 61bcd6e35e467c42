"""Scores of dense tasks by hand, and their pictures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from latticode.core.values import to_float
from latticode.dense.tasks import Colorization, Depth, Panoptic
from latticode.metrics.dense import ColorizationMetrics, DepthMetrics, PanopticMetrics, colourfulness
from latticode.viz.pictures import grid_image, segment_colours, with_legend

NAMES = ["sky", "road", "car"]


def itself(inputs: Tensor) -> Tensor:
    return inputs


def maps(classes: list[list[int]], instances: list[list[int]]) -> Tensor:
    return torch.tensor([[classes, instances]])


def panoptic(truth: Tensor, prediction: Tensor) -> dict:
    metrics = PanopticMetrics(itself, NAMES, [2])
    metrics.update(prediction, truth)
    return metrics.compute()


def test_depth_by_hand():
    truth = torch.tensor([[[[1.0, 2.0, 0.0, 10.0]]], [[[4.0, 4.0, 4.0, 4.0]]], [[[0.0, 0.0, 0.0, 11.0]]]])
    found = torch.tensor([[[[2.0, 2.0, 9.0, 1.0]]], [[[4.0, 4.0, 4.0, 8.0]]], [[[1.0, 1.0, 1.0, 1.0]]]])
    metrics = DepthMetrics(itself)
    metrics.update(found, truth)
    scores = metrics.compute()
    # the first image has two measured pixels within the range, 1 m and 0 m off, the second four; the third has none
    assert scores["count"] == 2
    assert scores["rmse"] == pytest.approx((math.sqrt(1 / 2) + math.sqrt(16 / 4)) / 2)
    assert scores["abs_rel"] == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert scores["log10"] == pytest.approx((math.log10(2) / 2 + math.log10(2) / 4) / 2)
    assert scores["delta1"] == scores["delta3"] == pytest.approx((1 / 2 + 3 / 4) / 2)  # 2 > 1.25^3


def test_deltas_differ_and_are_the_same_from_both_sides():
    for found, share in ((1.2, (1, 1, 1)), (1.5, (0, 1, 1)), (1.9, (0, 0, 1)), (2.0, (0, 0, 0))):
        for truth, guess in ((1.0, found), (found, 1.0)):
            metrics = DepthMetrics(itself)
            metrics.update(torch.full((1, 1, 2, 2), guess), torch.full((1, 1, 2, 2), truth))
            scores = metrics.compute()
            assert tuple(scores[f"delta{k}"] for k in (1, 2, 3)) == share


def test_depth_does_not_depend_on_the_batches_and_nothing_is_no_number():
    torch.manual_seed(0)
    truth, found = 0.1 + torch.rand(5, 1, 3, 4), 0.1 + torch.rand(5, 1, 3, 4)
    whole, parts = DepthMetrics(itself), DepthMetrics(itself)
    whole.update(found, truth)
    for i in range(5):
        parts.update(found[i : i + 1], truth[i : i + 1])
    assert parts.compute() == whole.compute()
    assert DepthMetrics(itself).compute()["rmse"] is None
    with pytest.raises(ValueError, match="above 0 m, got a prediction of -1"):
        whole.update(torch.full((1, 1, 3, 4), -1.0), truth[:1])
    with pytest.raises(ValueError, match=r"expected predictions \(1, 1, 3, 4\).*got \(1, 1, 3, 3\)"):
        whole.update(found[:1, :, :, :3], truth[:1])


def test_a_perfect_panoptic_prediction_has_quality_one():
    truth = maps([[0, 0, 2, 2], [1, 1, 2, 2]], [[0, 0, 1, 1], [0, 0, 2, 2]])
    scores = panoptic(truth, maps([[0, 0, 2, 2], [1, 1, 2, 2]], [[0, 0, 7, 7], [0, 0, 3, 3]]))  # numbers are names
    assert [scores[name] for name in ("pq", "sq", "rq", "pq_things", "pq_stuff")] == [1.0] * 5
    assert list(scores["classes"]) == NAMES
    assert scores["classes"]["car"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "segments": 2, "predicted": 2}


def test_panoptic_quality_by_hand():
    truth = maps([[0, 0, 0, 0], [0, 0, 2, 2], [1, 1, 2, 2]], [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 2, 2]])
    found = maps([[0, 0, 0, 0], [0, 2, 2, 2], [0, 0, 2, 2]], [[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 1, 1]])
    # sky: 5 of 6 and two more, IoU 5/8; the road is missed; one car of five pixels against two of two: IoU 2/5 each
    scores = panoptic(truth, found)
    assert scores["classes"]["sky"]["pq"] == pytest.approx(5 / 8)
    assert scores["classes"]["road"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "segments": 1, "predicted": 0}
    assert scores["classes"]["car"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "segments": 2, "predicted": 1}
    assert scores["pq"] == pytest.approx(5 / 24)
    assert scores["pq_stuff"] == pytest.approx(5 / 16)
    assert scores["pq_things"] == 0
    # two cars of two pixels as one right and one spare: recognition 1 / (1 + 1/2 + 1/2)
    spare = maps([[0, 0, 0, 0], [0, 0, 2, 2], [1, 1, 2, 0]], [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 2, 0]])
    spare[0, 0, 2, 2:] = torch.tensor([2, 0])
    car = panoptic(truth, spare)["classes"]["car"]
    assert (car["sq"], car["rq"]) == (1.0, 0.5)  # an IoU of one half is no match


def test_void_and_things_without_an_instance_are_ignored():
    truth = maps([[0, 0, 9, 9], [1, 1, 2, 2]], [[0, 0, 0, 0], [0, 0, 0, 0]])  # 9 is void, and so is car number 0
    for found in (
        maps([[0, 0, 1, 1], [1, 1, 0, 0]], [[0] * 4] * 2),
        maps([[0, 0, 2, 2], [1, 1, 2, 2]], [[0, 0, 1, 1], [0, 0, 2, 2]]),
    ):
        scores = panoptic(truth, found)
        assert scores["pq"] == 1.0
        assert list(scores["classes"]) == ["sky", "road"]
    assert panoptic(truth.fill_(9), found)["pq"] is None


def test_colourfulness_by_hand():
    grey = torch.full((1, 3, 2, 2), 77, dtype=torch.uint8)
    assert colourfulness(grey).item() == 0
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(-1, -1, 2, 2)
    assert colourfulness(red).item() == pytest.approx(0.3 * math.hypot(255, 127.5))
    half = torch.cat([red, grey], 3)  # R - G: 255 and 0, yellow - blue: 127.5 and 0
    assert colourfulness(half).item() == pytest.approx(1.3 * math.hypot(127.5, 63.75))


def test_perfect_colours():
    torch.manual_seed(0)
    inputs = torch.randint(256, (3, 3, 12, 12), dtype=torch.int32)
    metrics = ColorizationMetrics(Colorization().label)
    metrics.update(to_float(inputs), inputs)
    scores = metrics.compute()
    assert scores["psnr"] == 100
    assert scores["colourfulness"] == scores["colourfulness_real"] > 0
    metrics = Colorization().metrics()
    metrics.update(Colorization().image(inputs), inputs)
    assert metrics.compute()["colourfulness"] == 0


def test_segments_of_a_class_share_a_hue_and_have_outlines():
    classes, instances = torch.tensor([[[0, 0, 0, 1, 1, 1, 1, 1]] * 3]), torch.tensor([[[0, 0, 0, 1, 1, 2, 2, 2]] * 3])
    picture = segment_colours(classes, instances)
    assert picture.shape == (1, 3, 3, 8)
    assert picture.dtype == torch.uint8
    row = picture[0, :, 1].T.double()
    assert torch.equal(row[0], row[2])
    assert (row[3] < row[4]).all()
    assert (row[5] < row[6]).all()  # the outlines
    assert torch.allclose(row[4] / row[4].sum(), row[7] / row[7].sum(), atol=0.01)
    assert not torch.equal(row[4], row[7])
    assert not torch.allclose(row[0] / row[0].sum(), row[4] / row[4].sum(), atol=0.05)


def test_depth_is_drawn_from_light_to_dark_with_its_metres_beside():
    task = Depth(scale=1000)
    depth = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    brightness = task.picture(depth).sum(1)[0, 0].tolist()
    assert brightness[0] > brightness[1] > brightness[2]
    texts = [text for text, _ in task.legend(depth) if text]
    assert texts == ["1.00 m", "1.40 m", "1.80 m", "2.20 m", "2.60 m", "3.00 m"]
    assert task.legend(depth)[-1][1] == tuple(task.picture(depth)[0, :, 0, 2].tolist())
    assert task.picture(torch.full((1, 1, 2, 2), 2.0)).unique().numel() <= 3  # a plane has no range


def test_the_legend_names_the_classes_that_occur():
    task = Panoptic(NAMES, things=["car"])
    found = maps([[2, 2, 0]], [[1, 1, 0]])
    entries = task.legend(found)
    assert [text for text, _ in entries] == ["car", "sky"]
    image = grid_image(task.picture(found), 1, 0)
    explained = with_legend(image, entries)
    assert explained.width > image.width + 30
    assert {colour for _, colour in explained.getcolors(10_000) or ()} >= {colour for _, colour in entries}
    assert with_legend(image, []) is image


def test_enlarged_predictions_keep_numbers_or_the_luminance():
    found = maps([[0, 1], [2, 2]], [[0, 0], [1, 2]])
    large = Panoptic(NAMES, things=["car"]).enlarge(found, torch.zeros(1, 3, 5, 8))
    assert large.shape == (1, 2, 5, 8)
    assert large.dtype == torch.int64
    assert set(large.unique().tolist()) == {0, 1, 2}
    torch.manual_seed(0)
    photo = to_float(torch.randint(60, 190, (1, 3, 9, 10)))
    task, muted = Colorization(), torch.tensor([0.1, 0.0, -0.1]).view(1, 3, 1, 1).expand(-1, -1, 3, 4)
    coloured = task.enlarge(muted, photo)
    before, after = (task.image(((x + 1) * 127.5).round().int()) for x in (photo, coloured))
    assert (before - after).abs().max() <= 2 / 127.5
    assert torch.allclose(coloured[:, 0] - coloured[:, 2], torch.tensor(0.2), atol=1e-5)
