"""Evaluation of stand-ins whose numbers are known exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latticode.evaluate import evaluate_prior, evaluate_tokenizer
from latticode.metrics import FeatureNetwork
from latticode.metrics.pixels import CAP, rounded, to_8bit
from latticode.types import Batch, Conditioning, Reconstruction, Sampling

SIZE = 16
CLASSES = 4


class FakeLoader:
    """Images of one grey level each, and the label that goes with it."""

    def __init__(self, greys: Tensor, batch: int = 5, skipped: int = 0):
        self.greys, self.batch, self.skipped, self.closed = greys, batch, skipped, 0

    def __len__(self) -> int:
        return len(self.greys)

    def epoch(self) -> Iterator[Batch]:
        try:
            for rows in torch.arange(len(self)).split(self.batch):
                yield Batch(paint(self.greys[rows]), self.greys[rows] % CLASSES, rows)
        finally:
            self.closed += 1


def paint(greys: Tensor) -> Tensor:
    return (greys.float() / 127.5 - 1).view(-1, 1, 1, 1).expand(-1, 1, SIZE, SIZE)


class FakeQuantizer(nn.Module):
    vocab = (256,)
    levels = (16, 16)
    bits = 8.0


class FakeTokenizer(nn.Module):
    """The grey level of an image is the code of each of its 2x2 positions; `error` is added on the way back."""

    def __init__(self, error: float = 0.0):
        super().__init__()
        self.quantizer, self.error, self.frozen = FakeQuantizer(), error, nn.Dropout().eval()

    def encode(self, images: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        assert not self.training
        return to_8bit(images)[:, 0, :2, :2, None].long()

    def decode(self, codes: Tensor, size: Any = None) -> Tensor:
        images = codes[..., 0].float().repeat_interleave(16, 1).repeat_interleave(16, 2)[:, None] / 127.5 - 1
        return images[..., : size[0], : size[1]] if size else images

    def forward(self, images: Tensor) -> Reconstruction:
        codes = self.encode(images)
        return Reconstruction(images + self.error, codes, {})


class FakePrior(nn.Module):
    """Codes with a right label cost 2 bits each, others 3; samples are i.i.d. grey levels, the last class is wrong."""

    def __init__(self, classes: int = CLASSES):
        super().__init__()
        self.classes, self.grid, self.calls = classes, (2, 2), []

    def bits(self, codes: Tensor, cond: Conditioning | None = None) -> Tensor:
        if cond is None:
            return torch.full((len(codes),), 4 * 3.0)
        assert cond.labels is not None
        return torch.where(cond.labels == codes[:, 0, 0, 0] % CLASSES, 2.0, 3.0) * 4

    def sample(self, count: int, cond: Conditioning | None, *, sampling: Sampling, seed: int, first: int) -> Tensor:
        self.calls.append((count, first, seed, sampling))
        greys = torch.stack([torch.randint(0, 64, (), generator=self.draw(seed, first + i)) for i in range(count)]) * 4
        if cond is not None:
            assert cond.labels is not None
            greys = greys + torch.where(cond.labels == CLASSES - 1, 0, cond.labels)
        return greys.view(-1, 1, 1, 1).expand(-1, 2, 2, 1)

    @staticmethod
    def draw(seed: int, index: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * seed + index)


class FakeClassifier(nn.Module):
    """Right about every image."""

    classes = CLASSES

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(to_8bit(images)[:, 0, 0, 0].long() % CLASSES, CLASSES).float()


class FakeNetwork(nn.Module):
    def features(self, images: Tensor) -> Tensor:
        return torch.stack([images.mean((1, 2, 3)), images.mean((1, 2, 3)).square()], dim=1)


@pytest.fixture
def network() -> FeatureNetwork:
    return FeatureNetwork("fake", FakeNetwork())


def as_json(result: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(result, allow_nan=False))


def test_identity_tokenizer(network: FeatureNetwork) -> None:
    loader = FakeLoader(torch.arange(64), skipped=2)
    seen: list[tuple[int, int]] = []
    result = as_json(
        evaluate_tokenizer(
            FakeTokenizer(), loader, features=network, progress=lambda *x: seen.append(x), protocol={"ema": True}
        )
    )
    assert (result["psnr"], result["psnr_pooled"], result["exact"]) == (CAP, CAP, 64)
    assert result["ssim"] == pytest.approx(1)
    assert (result["usage"], result["dead"]) == (64 / 256, 192)
    assert result["perplexity"] == pytest.approx(64)
    assert result["entropy_bits"] == pytest.approx(6)
    assert (result["bits_per_token"], result["tokens_per_image"]) == (8, 4)
    assert result["bits_per_pixel"] == 8 * 4 / SIZE**2
    assert result["level_histograms"] == [[16] * 16, [64] * 4 + [0] * 12]
    assert result["rfid_fake"] == pytest.approx(0, abs=1e-9)
    assert (result["count"], result["skipped"]) == (64, 2)
    protocol = result["protocol"]
    assert (protocol["ema"], protocol["round"], protocol["feature_network"]) == (True, True, "fake")
    assert (protocol["images"], protocol["reference_images"], protocol["sizes"]) == (64, 64, [[1, SIZE, SIZE]])
    assert f"{CAP:g} dB" in protocol["psnr"]
    assert seen[0] == (5, 64)
    assert seen[-1] == (64, 64)


def test_known_error_and_limit() -> None:
    loader = FakeLoader(torch.arange(100))
    seen: list[tuple[int, int]] = []
    result = as_json(evaluate_tokenizer(FakeTokenizer(4 / 127.5), loader, limit=12, progress=lambda *x: seen.append(x)))
    assert result["psnr"] == pytest.approx(20 * math.log10(255 / 4))
    assert result["psnr_pooled"] == pytest.approx(result["psnr"])
    assert result["count"] == 12
    assert seen == [(5, 12), (10, 12), (12, 12)]
    assert loader.closed == 1  # the loader is shut down, not left to the garbage collector
    assert not [key for key in result if key.startswith("rfid")]


def test_reconstruction_fid_against_a_reference(network: FeatureNetwork) -> None:
    loader, reference = FakeLoader(torch.arange(64)), FakeLoader(torch.arange(64) + 51)
    result = evaluate_tokenizer(FakeTokenizer(51 / 127.5), loader, features=network, reference=reference)
    assert result["rfid_fake"] == pytest.approx(0, abs=1e-9)
    assert evaluate_tokenizer(FakeTokenizer(), loader, features=network, reference=reference)["rfid_fake"] > 0.1
    assert result["protocol"]["reference"] == "the reference set"


def test_modes_are_put_back_even_after_an_error() -> None:
    tokenizer = FakeTokenizer().train()
    tokenizer.frozen.eval()
    evaluate_tokenizer(tokenizer, FakeLoader(torch.arange(4)))
    with pytest.raises(ValueError, match="no images"):
        evaluate_tokenizer(tokenizer, FakeLoader(torch.arange(0)))
    assert tokenizer.training
    assert tokenizer.quantizer.training
    assert not tokenizer.frozen.training
    assert not torch.is_inference_mode_enabled()


def test_prior_numbers(network: FeatureNetwork) -> None:
    test, train = FakeLoader(torch.arange(0, 256, 2)), FakeLoader(torch.arange(256))
    prior, sampling = FakePrior(), Sampling(steps=3)
    seen: list[tuple[int, int]] = []
    result = as_json(
        evaluate_prior(
            prior,
            FakeTokenizer(),
            test,
            sampling=sampling,
            seed=7,
            samples=40,
            features=network,
            reference=train,
            classifier=FakeClassifier(),  # type: ignore[arg-type]
            batch_size=16,
            progress=lambda *x: seen.append(x),
        )
    )
    assert (result["bits_per_token"], result["bits_per_token_uniform"]) == (2, 8)
    assert result["bits_per_pixel"] == 2 * 4 / SIZE**2
    assert result["label_accuracy"] == 0.75  # the last of the four classes comes out as the first
    assert result["label_accuracy_real"] == 1
    assert prior.calls == [(16, 0, 7, sampling), (16, 16, 7, sampling), (8, 32, 7, sampling)]
    assert (result["count"], result["samples"]) == (128, 40)
    assert result["samples_per_second"] > 0
    for name in ("fid", "precision", "recall"):
        assert f"{name}_fake" in result
        assert f"{name}_fake_real" in result
    assert result["precision_fake"] == 1
    assert 0 < result["fid_fake"] < 0.1
    protocol = result["protocol"]
    assert (protocol["reference_images"], protocol["real_images"], protocol["images"]) == (256, 40, 128)
    assert protocol["labels"] == "balanced over 4 classes"
    assert protocol["sampling"]["steps"] == 3
    assert protocol["feature_network"] == "fake"
    assert seen[-1] == (128 + 256 + 40,) * 2


def test_samples_do_not_depend_on_the_batch_size(network: FeatureNetwork) -> None:
    test, train = FakeLoader(torch.arange(64)), FakeLoader(torch.arange(256))
    results = [
        evaluate_prior(
            FakePrior(),
            FakeTokenizer(),
            test,
            sampling=Sampling(),
            samples=30,
            features=network,
            reference=train,
            batch_size=size,
        )
        for size in (7, 30)
    ]
    assert results[0]["fid_fake"] == pytest.approx(results[1]["fid_fake"], rel=1e-9)
    assert results[0]["precision_fake"] == results[1]["precision_fake"]


def test_a_set_measured_against_itself_is_perfect(network: FeatureNetwork) -> None:
    data = FakeLoader(torch.arange(256))
    result = evaluate_prior(
        FakePrior(), FakeTokenizer(), data, sampling=Sampling(), samples=256, features=network, reference=data
    )
    assert result["fid_fake_real"] == pytest.approx(0, abs=1e-9)
    assert (result["precision_fake_real"], result["recall_fake_real"]) == (1, 1)


def test_unconditional_prior_gets_no_labels() -> None:
    result = as_json(
        evaluate_prior(
            FakePrior(classes=0),
            FakeTokenizer(),
            FakeLoader(torch.arange(8)),
            sampling=Sampling(),
            samples=3,
            classifier=FakeClassifier(),  # type: ignore[arg-type]
        )
    )
    assert result["bits_per_token"] == 3
    assert result["label_accuracy"] is None  # nothing was asked
    assert result["protocol"]["labels"] == "none"


def test_options_that_do_not_fit_are_refused(network: FeatureNetwork) -> None:
    data = FakeLoader(torch.arange(8))

    def evaluate(**options: Any) -> None:
        evaluate_prior(FakePrior(), FakeTokenizer(), data, sampling=Sampling(), **options)

    with pytest.raises(ValueError, match="needs a reference"):
        evaluate(features=network)
    with pytest.raises(ValueError, match="samples must be >= 4"):
        evaluate(features=network, reference=data, samples=3)
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(batch_size=0)
    wrong = FakeClassifier()
    wrong.classes = 3
    with pytest.raises(ValueError, match="3 classes and the prior 4"):
        evaluate(classifier=wrong)
    with pytest.raises(ValueError, match="holds none"):
        evaluate_prior(FakePrior(), FakeTokenizer(), FakeLoader(torch.arange(0)), sampling=Sampling())


def test_classifier_sees_rounded_samples() -> None:
    class Strict(FakeClassifier):
        def forward(self, images: Tensor) -> Tensor:
            assert torch.equal(images, rounded(images))
            return super().forward(images)

    class Blurred(FakeTokenizer):
        def decode(self, codes: Tensor, size: Any = None) -> Tensor:
            return super().decode(codes, size) + 0.3 / 127.5

    result = evaluate_prior(
        FakePrior(),
        Blurred(),
        FakeLoader(torch.arange(8)),
        sampling=Sampling(),
        samples=4,
        classifier=Strict(),  # type: ignore[arg-type]
    )
    assert result["label_accuracy"] == 0.75
