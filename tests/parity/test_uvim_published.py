"""UViM's pieces against the authors' code, and panoptic quality against the COCO panoptic API.

- `uvim.npz` holds what google-research/big_vision at 0127fb6 gives with JAX 0.10.2 on a CPU: the importances of code
  dropout, jax.image.resize by "linear", split_the_most_frequent_embedding, depth_task's bins, loss and prediction
  (32 bins, 1 mm to 10 m), and nyu_depth's six metrics.
- `panoptic.npz` holds what cocodataset/panopticapi at 7bb4655 gives for four pictures of five classes, of which 3 to 5
  are things and 0 is void, with the pictures.
"""

from __future__ import annotations

import pytest
import torch

from drawn import close, golden, normal, random_state, uniform
from latticode.dense.tasks import Depth
from latticode.dense.uvim import passing, resized
from latticode.metrics.dense import DepthMetrics, PanopticMetrics
from latticode.quantizers.codebook import split

EXPECTED = golden("uvim")


@pytest.mark.parametrize("size", [(3, 2), (12, 8), (4, 4), (5, 3), (6, 4)])
def test_resize(size: tuple[int, int]) -> None:
    """Smaller, larger and mixed, of a grid of 6 x 4."""
    close(resized(uniform("uvim.x", (2, 6, 4, 3)), size), EXPECTED[f"resize_{size[0]}x{size[1]}"])


@pytest.mark.parametrize("length", [1, 4, 9, 16])
def test_code_dropout(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A code passes where its importance is above the draw of its image."""
    draws = torch.linspace(0, 0.999, 50)[:, None]
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: draws)
    assert torch.equal(passing(50, (1, length), "prefix")[:, 0], EXPECTED[f"importance_{length}"] > draws)


def test_splitting() -> None:
    """Which codes are split, and what is left of the counts; the noise of 1e-3 on the copies is drawn elsewhere."""
    book = normal("uvim.book", (8, 4))
    counts = torch.tensor([0.02, 5, 9, 0.05, 1, 0.3, 2, 0.09])
    sums = book.clone()
    split(book / counts[:, None], counts, sums, 0.1, unit=False)
    close(counts, EXPECTED["split_counts"], 1e-6)
    torch.testing.assert_close(sums, EXPECTED["split_sums"], rtol=5e-3, atol=1e-5)


def depth() -> tuple[Depth, torch.Tensor]:
    """The task and examples (2, 4, 8, 8) in millimetres."""
    millimetres = torch.from_numpy(random_state("uvim.depth").randint(0, 12000, (2, 8, 8)))
    return Depth(1000, bins=32), torch.cat([torch.zeros(2, 3, 8, 8).long(), millimetres[:, None]], 1)


def test_depth_bins_loss_and_prediction() -> None:
    """Their loss is a map of summed patches, 0 in the first bin; ours is the mean over what it does not ignore."""
    task, inputs = depth()
    targets = task.targets(inputs)[:, 0]
    assert torch.equal(targets.clamp(min=0), EXPECTED["bins"].long())
    output = uniform("uvim.logits", (2, 8, 8, 32)).movedim(-1, 1)
    losses = EXPECTED["loss_map"]
    close(task.losses(output, inputs)["depth"], losses.sum() / (targets >= 0).sum())
    close(task.predict(output, inputs)[:, 0], EXPECTED["predicted"], 1e-5)


def test_depth_metrics() -> None:
    task, inputs = depth()
    predicted = torch.from_numpy(abs(random_state("uvim.pred").standard_normal((2, 8, 8))) + 0.5)
    metrics = DepthMetrics(task.metres)
    metrics.update(predicted[:, None], inputs)
    scores = metrics.compute()
    close(torch.tensor([scores[name] for name in metrics.names]).double(), EXPECTED["metrics"], 1e-5)


def test_panoptic_quality() -> None:
    expected = golden("panoptic")
    names, things = ["void", "a", "b", "c", "d", "e"], [3, 4, 5]
    truth, predicted = expected["truth"].clone(), expected["predicted"].clone()
    for maps in (truth, predicted):  # classes without instances have none; class 0 is nobody's
        maps[:, 1] *= maps[:, 0] >= 3
        maps[:, 0] -= 1
    metrics = PanopticMetrics(lambda inputs: truth, names[1:], [thing - 1 for thing in things])
    metrics.update(predicted, truth)
    scores = metrics.compute()
    close(torch.tensor([scores["pq"], scores["sq"], scores["rq"]]).double(), expected["all"], 1e-6)
    close(
        torch.tensor([scores["pq_things"], scores["pq_stuff"]]).double(),
        torch.stack([expected["things"][0], expected["stuff"][0]]),
        1e-6,
    )
