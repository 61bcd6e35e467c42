"""Evaluation and use of dense tasks, from stand-ins with known scores to whole runs on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from helpers import QUIET, tiny_tokenizer
from latticode import load
from latticode.cli import app
from latticode.core.types import Conditioning, Sampling
from latticode.core.values import to_float
from latticode.data import DensePreprocess, open_source
from latticode.data.loading import Loader
from latticode.dense.tasks import Depth
from latticode.dense.uvim import UViM
from latticode.engine import load_config, train
from latticode.evaluate import evaluate_dense
from latticode.metrics import FeatureNetwork
from latticode.quantizers import FSQ
from latticode.runs.evaluate import EvaluationRequest, evaluate
from latticode.runs.open import Run
from latticode.runs.predict import predict
from latticode.viz.report import write_report

TASKS = {
    "depth": ("{type: depth, scale: 1000, bins: 16}", "[depth.png]", "depth"),
    "panoptic": (
        "{type: panoptic, categories: [floor, wall, ball, box], things: [ball, box], instances: 6, void: 4}",
        "[sem.png, inst.png]",
        "semantic: 1, instance",
    ),
    "colorization": ("{type: colorization}", "[]", "mse"),
}
SHAPE = {"depth": 1, "panoptic": 2, "colorization": 3}


def stage_one(folder: Path, name: str) -> Path:
    task, maps, terms = TASKS[name]
    sizes = "code: [2, 2], patch: 8, side: 4, width: 16, heads: 2, mlp: 2"
    parts = f"task: {task}, quantizer: {{type: fsq, levels: [4, 3]}}, {sizes}"
    recipe = folder / f"{name}.yaml"
    recipe.write_text(
        f"data: {{kind: dense, source: 'embedded:shapes', size: 32, maps: {maps}, workers: 0}}\n"
        f"tokenizer: {{type: uvim, {parts}, oracle_depth: 1, base_depth: 1}}\n"
        f"objective: {{type: guided}}\nweights: {{{terms}: 1}}\n"
        "steps: 2\nbatch_size: 4\nlog_every: 1\nsave_every: 2\npicture_every: 2\n"
    )
    return train(load_config(str(recipe)), folder / f"{name}-one", console=QUIET)


def stage_two(folder: Path, one: Path) -> Path:
    encoder = "{type: vit_encoder, patch: 8, side: 4, latent: 8, width: 16, depth: 1, heads: 2}"
    recipe = folder / "guide.yaml"
    recipe.write_text(
        f"tokenizer: {one}\ndata: {{}}\nprior: {{type: guide, encoder: {encoder}, width: 16, depth: 1, heads: 2}}\n"
        "objective: {type: prior}\nweights: {cross_entropy: 1}\n"
        "steps: 2\nbatch_size: 4\nlog_every: 1\nsave_every: 2\npicture_every: 2\n"
    )
    return train(load_config(str(recipe)), folder / f"{one.name}-two", console=QUIET)


@pytest.fixture(scope="module", params=TASKS)
def runs(request, tmp_path_factory) -> tuple[str, Path, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    one = stage_one(folder, request.param)
    return request.param, one, stage_two(folder, one)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    noise = np.random.default_rng(0)
    for name, (height, width) in {"tall": (50, 20), "wide": (30, 70)}.items():
        Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{name}.png")
    (folder / "torn.png").write_bytes((folder / "tall.png").read_bytes()[:60])
    return folder


class Copy(UViM):
    """Its code is the mean of the picture's label, its prediction is what the code says, without one 0.95 metres."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.task, self.quantizer, self.code, self.patch = Depth(scale=1000, bins=100), FSQ([10, 10]), [1, 1], 1
        self.task.predict = lambda output, image: output  # type: ignore[method-assign]

    def encode(self, inputs: Tensor) -> Tensor:
        return (inputs[:, 3:].double().mean((1, 2, 3)) / 100).long().clamp(0, 99)[:, None, None, None]

    def solve(self, image: Tensor, codes: Tensor | None = None) -> Tensor:
        if codes is None:
            return image.new_full((len(image), 1, *image.shape[2:]), 0.95)
        return ((codes.float() + 0.5) / 10).expand(-1, 1, *image.shape[2:])


class Told(nn.Module):
    """A prior that says `codes`, by the numbers of its images, the first `wrong` of them one too high."""

    sees, classes = True, 0

    def __init__(self, codes: Tensor, wrong: int) -> None:
        super().__init__()
        self.codes, self.wrong = codes, wrong

    def condition(self, images: Tensor) -> Conditioning:
        return Conditioning(images=images)

    def bits(self, codes: Tensor, cond: Conditioning) -> Tensor:
        assert cond.images is not None
        assert cond.images.shape[1] == 3
        return torch.full((len(codes),), 2.5)

    def sample(self, count: int, cond: Any, *, sampling: Sampling, seed: int, first: int) -> Tensor:
        assert sampling.temperature == 0
        found = self.codes[first : first + count].clone()
        found[torch.arange(first, first + count) < self.wrong] += 1
        return found


def loader(batch_size: int) -> Loader:
    preprocess = DensePreprocess(16, ["depth.png"])
    return Loader(open_source("embedded:shapes", "test", medium=preprocess.medium), preprocess, batch_size, workers=0)


@pytest.mark.parametrize("batch_size", [3, 7])
def test_ceiling_prediction_and_floor_are_what_they_say(batch_size: int):
    model = Copy()
    codes = torch.cat([model.encode(batch.inputs) for batch in loader(4).epoch()])[:9]
    prior: Any = Told(codes, wrong=3)
    result = evaluate_dense(model, loader(batch_size), prior=prior, limit=9)
    depth = torch.cat([batch.inputs[:, 3] for batch in loader(4).epoch()])[:9].double() / 1000
    near = depth.where(depth < 10, 0)
    said = {"ceiling": codes, "predicted": torch.cat([codes[:3] + 1, codes[3:]]), "floor": torch.full_like(codes, 9)}
    for way, numbers in said.items():
        guess = (numbers.double().flatten() + 0.5) / 10
        errors = [(one[one > 0] - g).square().mean().sqrt() for one, g in zip(near, guess, strict=True)]
        assert result["scores"]["rmse"][way] == pytest.approx(float(torch.stack(errors).mean()), rel=1e-5)
    assert result["code_accuracy"] == pytest.approx(6 / 9)
    assert result["compression_cost"] == 2.5
    assert result["tokens_per_image"] == 1
    assert result["usage"] == pytest.approx(len(codes.unique()) / 100)
    assert result["count"] == result["protocol"]["images"] == 9
    assert set(evaluate_dense(model, loader(batch_size), limit=9)["scores"]["rmse"]) == {"ceiling", "floor"}


def test_pictures_alone_have_a_distance_of_features():
    class Means(nn.Module):
        def features(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    with pytest.raises(ValueError, match="'means' knows pictures, and the task predicts"):
        evaluate_dense(Copy(), loader(4), features=FeatureNetwork("means", Means()), limit=4)


@pytest.mark.slow
def test_both_stages_are_evaluated_and_reported(runs):
    name, one, two = runs
    for run, ways in ((one, ["ceiling", "floor"]), (two, ["ceiling", "predicted", "floor"])):
        result = evaluate(Run.open(run, "cpu"), EvaluationRequest(limit=6), console=QUIET)
        assert all(list(values) == ways for values in result["scores"].values())
        assert result["count"] == 6
        assert 0 < result["usage"] <= 1
        assert json.loads((run / "evaluation.json").read_text())["scores"] == result["scores"]
        page = write_report(run).read_text()
        assert "Predictions" in page
        assert "predictions without a code" in page
        assert {"depth": "RMSE, m", "panoptic": "Classes, floor", "colorization": "PSNR"}[name] in page
    assert result["protocol"]["sampling"]["temperature"] == 0
    asked = evaluate(Run.open(two, "cpu"), EvaluationRequest(limit=2, sampling=Sampling(top_k=3)), console=QUIET)
    assert asked["protocol"]["sampling"]["temperature"] == 1


@pytest.mark.slow
def test_predictions_have_the_size_of_their_pictures(runs, photographs, tmp_path):
    name, one, two = runs
    for run, way in ((one, "stage I"), (two, "likeliest")):
        result = predict(Run.open(run, "cpu"), photographs, tmp_path / run.name, console=QUIET)
        assert way in result.way
        assert [path.name for path in result.files] == ["tall.png", "wide.png"]
        assert "torn.png" in str(result.skipped)
        for path, (height, width) in zip(result.files, ((50, 20), (30, 70)), strict=True):
            numbers = np.load(path.with_suffix(".npy"))
            assert numbers.shape == (SHAPE[name], height, width)
            with Image.open(path) as picture:
                assert picture.width >= width
                assert picture.height >= height
    uvim = load(one).eval()
    with Image.open(photographs / "wide.png") as picture, torch.inference_mode():
        pixels = [torch.from_numpy(np.array(p)).movedim(-1, 0)[None] for p in (picture, picture.resize((32, 32), 3))]
        image = uvim.task.image(pixels[1])
        expected = uvim.task.enlarge(uvim.task.predict(uvim.solve(image), image), to_float(pixels[0]))[0]
    assert np.allclose(np.load(tmp_path / one.name / "wide.npy"), expected, atol=1e-5)
    alone = predict(Run.open(two, "cpu"), photographs / "wide.png", tmp_path / "alone", batch_size=1, console=QUIET)
    assert np.array_equal(np.load(alone.files[0].with_suffix(".npy")), np.load(tmp_path / two.name / "wide.npy"))


@pytest.mark.slow
def test_the_command_line_predicts_and_refuses(runs, photographs, tmp_path):
    name, one, two = runs
    if name != "depth":
        pytest.skip("the same for all")
    call = CliRunner().invoke(app, ["predict", str(two), str(photographs), str(tmp_path / "out"), "--device", "cpu"])
    assert call.exit_code == 0, call.output
    assert "2 predictions" in call.output
    assert "torn.png" in call.output
    call = CliRunner().invoke(app, ["evaluate", str(one), "--limit", "4", "--device", "cpu"])
    assert "ceiling" in call.output
    with pytest.raises(ValueError, match="torn"):
        predict(two, photographs / "torn.png", tmp_path / "none", console=QUIET)
    for run in (one, two):
        with pytest.raises(ValueError, match="can only be used beside an image; see predict"):
            _ = Run.open(run, "cpu").tokenizer
    with pytest.raises(ValueError, match="not for dense tasks"):
        evaluate(one, EvaluationRequest(own_size=True), console=QUIET)
    other = tiny_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="is the run of a Tokenizer; one of a uvim"):
        predict(other, photographs, tmp_path / "none", console=QUIET)
