"""Evaluation of stand-ins whose numbers are known exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from latticode.core.types import Batch, Conditioning, Reconstruction, Sampling
from latticode.core.values import rounded, to_uint8
from latticode.data.loading import Loader
from latticode.data.passes import Report
from latticode.data.records import ArraySource
from latticode.data.transforms import Preprocess
from latticode.evaluate import Reference, evaluate_classifier, evaluate_prior, evaluate_tokenizer
from latticode.losses.perceptual import Perceptual
from latticode.metrics import Classifier, FeatureNetwork
from latticode.metrics.pixels import CAP
from latticode.priors.base import Prior
from latticode.tokenizers.tokenizer import Tokenizer

SIZE = 16
CLASSES = 4


class GreyLoader(Loader):
    """Images of one grey level each, with the level modulo CLASSES as label; `closed` counts finished passes."""

    def __init__(self, greys: range, batch_size: int = 5, labelled: bool = True):
        levels = np.array(greys, np.uint8)
        images = np.broadcast_to(levels[:, None, None], (len(levels), SIZE, SIZE))
        labels = levels.astype(np.int64) % CLASSES if labelled else None
        source = ArraySource("greys", images, labels, (), [f"grey {level}" for level in levels])
        super().__init__(source, Preprocess(size=SIZE, channels=1), batch_size)
        self.closed = 0

    def epoch(self) -> Iterator[Batch]:
        try:
            yield from super().epoch()
        finally:
            self.closed += 1


class FakeQuantizer(nn.Module):
    vocab = (256,)
    levels = (16, 16)
    bits = 8.0


class FakeTokenizer(Tokenizer):
    """The grey level of an image is the code of each of its 2x2 positions; `error` is added on the way back."""

    def __init__(self, error: float = 0.0):
        nn.Module.__init__(self)
        self.quantizer = cast(Any, FakeQuantizer())
        self.encoder = self.decoder = nn.Identity()
        self.axes, self.strides, self.leads = 2, (8, 8), (0, 0)
        self.error, self.frozen = error, nn.Dropout().eval()

    def encode(self, images: Tensor) -> Tensor:
        assert torch.is_inference_mode_enabled()
        assert not self.training
        return to_uint8(images)[:, 0, ::8, ::8, None].long()

    def decode(self, codes: Tensor, size: Any = None) -> Tensor:
        images = codes[..., 0].float().repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None] / 127.5 - 1
        return images[..., : size[0], : size[1]] if size else images

    def forward(self, images: Tensor) -> Reconstruction:
        codes = self.encode(images)
        return Reconstruction(images + self.error, codes, {})


class FakePrior(Prior):
    """Codes with a right label cost 2 bits each, others 3; samples are i.i.d. grey levels, the last class is wrong."""

    def __init__(self, classes: int = CLASSES):
        super().__init__([256], [2, 2], classes)
        self.calls: list[tuple[int, int, int, Sampling]] = []

    def _nats(self, codes: Tensor, condition: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def _draw(self, known: Tensor, condition: Any, noise: Tensor, choose: Any) -> Tensor:
        raise NotImplementedError

    def bits(self, codes: Tensor, cond: Conditioning | None = None) -> Tensor:
        if cond is None or cond.labels is None:
            return torch.full((len(codes),), 4 * 3.0)
        return torch.where(cond.labels == codes[:, 0, 0, 0] % CLASSES, 2.0, 3.0) * 4

    def sample(
        self,
        count: int,
        cond: Conditioning | None = None,
        *,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int = 0,
        first: int = 0,
        known: Tensor | None = None,
    ) -> Tensor:
        self.calls.append((count, first, seed, sampling))
        greys = torch.stack([torch.randint(0, 64, (), generator=self.draw(seed, first + i)) for i in range(count)]) * 4
        if cond is not None and cond.labels is not None:
            greys = greys + torch.where(cond.labels == CLASSES - 1, 0, cond.labels)
        return greys.view(-1, 1, 1, 1).expand(-1, 2, 2, 1)

    @staticmethod
    def draw(seed: int, index: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * seed + index)


class FakeClassifier(Classifier):
    """Right about every image."""

    def __init__(self, classes: int = CLASSES):
        super().__init__(classes, width=1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(to_uint8(x)[:, 0, 0, 0].long() % CLASSES, CLASSES).float()


class FakeNetwork(nn.Module):
    def features(self, images: Tensor) -> Tensor:
        return torch.stack([images.mean((1, 2, 3)), images.mean((1, 2, 3)).square()], dim=1)


class FakeEyes(Perceptual):
    """Mean absolute difference of images of 8 bits."""

    name, kind = "the eyes of a test", "fake"

    def stages(self, images: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        assert torch.equal(output, rounded(output))
        assert torch.equal(target, rounded(target))
        return (output - target).abs().mean()


@pytest.fixture
def network() -> FeatureNetwork:
    return FeatureNetwork("fake", FakeNetwork())


def as_json(result: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(result, allow_nan=False))


def test_identity_tokenizer(network: FeatureNetwork) -> None:
    loader = GreyLoader(range(64))
    loader.skipped.update({"broken.png": "cut short", "notes.txt": "not an image"})
    seen: list[tuple[int, int]] = []
    result = as_json(
        evaluate_tokenizer(
            FakeTokenizer(), loader, features=network, progress=lambda *x: seen.append(x), protocol={"ema": True}
        )
    )
    assert (result["psnr"], result["psnr_pooled"], result["exact"]) == (CAP, CAP, 64)
    assert result["ssim"] == pytest.approx(1, abs=5e-5)
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
    loader = GreyLoader(range(100))
    seen: list[tuple[int, int]] = []
    result = as_json(evaluate_tokenizer(FakeTokenizer(4 / 127.5), loader, limit=12, progress=lambda *x: seen.append(x)))
    assert result["psnr"] == pytest.approx(20 * math.log10(255 / 4))
    assert result["psnr_pooled"] == pytest.approx(result["psnr"])
    assert result["count"] == 12
    assert seen == [(5, 12), (10, 12), (12, 12)]
    assert loader.closed == 1  # the loader is shut down, not left to the garbage collector
    assert not [key for key in result if key.startswith("rfid")]


def test_reconstruction_fid_against_a_reference(network: FeatureNetwork) -> None:
    loader, reference = GreyLoader(range(64)), GreyLoader(range(51, 115))
    result = evaluate_tokenizer(FakeTokenizer(51 / 127.5), loader, features=network, reference=reference)
    assert result["rfid_fake"] == pytest.approx(0, abs=1e-9)
    assert evaluate_tokenizer(FakeTokenizer(), loader, features=network, reference=reference)["rfid_fake"] > 0.1
    assert result["protocol"]["reference"] == "the reference set"


def test_perceptual_distance_is_a_mean_over_images() -> None:
    class Negative(FakeTokenizer):
        def forward(self, images: Tensor) -> Reconstruction:
            return Reconstruction(-images + 0.3 / 127.5, self.encode(images), {})

    result = as_json(evaluate_tokenizer(Negative(), GreyLoader(range(12)), perceptual=FakeEyes()))  # 5, 5 and 2 images
    assert result["perceptual_fake"] == pytest.approx(np.mean([2 - g / 127.5 * 2 for g in range(12)]))
    assert result["protocol"]["perceptual"] == "the eyes of a test"
    assert not [key for key in evaluate_tokenizer(Negative(), GreyLoader(range(3))) if key.startswith("perceptual")]


def test_large_images_are_reconstructed_in_tiles() -> None:
    class NeverWhole(FakeTokenizer):
        def forward(self, images: Tensor) -> Reconstruction:
            raise AssertionError

    result = as_json(evaluate_tokenizer(NeverWhole(), GreyLoader(range(64)), tile=8))
    assert (result["psnr"], result["protocol"]["tile"]) == (CAP, 8)
    assert result["bits_per_pixel"] == 8 * 4 / SIZE**2
    assert "tile" not in evaluate_tokenizer(FakeTokenizer(), GreyLoader(range(4)), tile=SIZE)["protocol"]


def test_modes_are_put_back_even_after_an_error() -> None:
    tokenizer = FakeTokenizer().train()
    tokenizer.frozen.eval()
    evaluate_tokenizer(tokenizer, GreyLoader(range(4)))
    with pytest.raises(ValueError, match="no images"):
        evaluate_tokenizer(tokenizer, GreyLoader(range(4)), limit=0)
    assert tokenizer.training
    assert tokenizer.quantizer.training
    assert not tokenizer.frozen.training
    assert not torch.is_inference_mode_enabled()


def test_prior_numbers(network: FeatureNetwork) -> None:
    test, train = GreyLoader(range(0, 256, 2)), GreyLoader(range(256))
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
            reference=Reference(train),
            classifier=FakeClassifier(),
            batch_size=16,
            progress=lambda *x: seen.append(x),
        )
    )
    assert (result["compression_cost"], result["compression_cost_uniform"]) == (2, 8)
    assert result["bits_per_pixel"] == 2 * 4 / SIZE**2
    assert result["label_accuracy"] == 0.75  # the last of the four classes comes out as the first
    assert result["label_accuracy_shuffled"] == 0.25  # guesses 1/2, 1/4, 1/4, 0 of labels that are 1/4 each
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
    test, train = GreyLoader(range(64)), GreyLoader(range(256))
    results = [
        evaluate_prior(
            FakePrior(),
            FakeTokenizer(),
            test,
            sampling=Sampling(),
            samples=30,
            features=network,
            reference=Reference(train),
            batch_size=size,
        )
        for size in (7, 30)
    ]
    assert results[0]["fid_fake"] == pytest.approx(results[1]["fid_fake"], rel=1e-9)
    assert results[0]["precision_fake"] == results[1]["precision_fake"]


def test_a_reference_is_looked_at_once_and_by_one_network(network: FeatureNetwork) -> None:
    train, results = GreyLoader(range(256)), []
    reference = Reference(train)
    for _ in range(2):
        seen: list[tuple[int, int]] = []
        options: dict[str, Any] = {"samples": 8, "features": network, "progress": lambda *x, seen=seen: seen.append(x)}
        prior, tokenizer, test = FakePrior(), FakeTokenizer(), GreyLoader(range(16))
        results.append(evaluate_prior(prior, tokenizer, test, sampling=Sampling(), reference=reference, **options))
        assert seen[-1] == (16 + 256 * (len(results) == 1) + 8,) * 2
    first, second = ({k: v for k, v in r.items() if k != "samples_per_second"} for r in results)
    assert first == second
    other = FeatureNetwork("other", Classifier(CLASSES))
    with pytest.raises(ValueError, match="another network than 'other'"):
        reference.look(other, Report(None, 0))


def test_a_set_measured_against_itself_is_perfect(network: FeatureNetwork) -> None:
    data = GreyLoader(range(256))
    result = evaluate_prior(
        FakePrior(),
        FakeTokenizer(),
        data,
        sampling=Sampling(),
        samples=256,
        features=network,
        reference=Reference(data),
    )
    assert result["fid_fake_real"] == pytest.approx(0, abs=1e-9)
    assert (result["precision_fake_real"], result["recall_fake_real"]) == (1, 1)


def test_unconditional_prior_gets_no_labels() -> None:
    result = as_json(
        evaluate_prior(
            FakePrior(classes=0),
            FakeTokenizer(),
            GreyLoader(range(8)),
            sampling=Sampling(),
            samples=3,
            classifier=FakeClassifier(),
        )
    )
    assert result["compression_cost"] == 3
    assert result["label_accuracy"] is None  # nothing was asked
    assert result["protocol"]["labels"] == "none"


def test_options_that_do_not_fit_are_refused(network: FeatureNetwork) -> None:
    data = GreyLoader(range(8))

    def evaluate(**options: Any) -> None:
        evaluate_prior(FakePrior(), FakeTokenizer(), data, sampling=Sampling(), **options)

    with pytest.raises(ValueError, match="needs a reference"):
        evaluate(features=network)
    with pytest.raises(ValueError, match="samples must be >= 4"):
        evaluate(features=network, reference=Reference(data), samples=3)
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(batch_size=0)
    with pytest.raises(ValueError, match="3 classes and the prior 4"):
        evaluate(classifier=FakeClassifier(3))
    with pytest.raises(ValueError, match="holds none"):
        evaluate(limit=0)


def test_classifier_sees_rounded_samples() -> None:
    class Strict(FakeClassifier):
        def forward(self, x: Tensor) -> Tensor:
            assert torch.equal(x, rounded(x))
            return super().forward(x)

    class Blurred(FakeTokenizer):
        def decode(self, codes: Tensor, size: Any = None) -> Tensor:
            return super().decode(codes, size) + 0.3 / 127.5

    result = evaluate_prior(
        FakePrior(),
        Blurred(),
        GreyLoader(range(8)),
        sampling=Sampling(),
        samples=4,
        classifier=Strict(),
    )
    assert result["label_accuracy"] == 0.75


def test_classifier_on_labelled_images() -> None:
    class Constant(FakeClassifier):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([2.0, 0, 0, 0]).log_softmax(0).expand(len(x), -1)

    result = as_json(evaluate_classifier(Constant(), GreyLoader(range(10)), protocol={"split": "test"}))
    assert result["accuracy"] == 0.3  # 0, 4, 8
    assert result["cross_entropy"] == pytest.approx(math.log(math.e**2 + 3) - 2 * 0.3)
    assert (result["count"], result["protocol"]) == (10, {"images": 10, "split": "test"})
    assert evaluate_classifier(FakeClassifier(), GreyLoader(range(10)), limit=7)["accuracy"] == 1
    with pytest.raises(ValueError, match="no labelled images"):
        evaluate_classifier(FakeClassifier(), GreyLoader(range(10), labelled=False))


def test_real_images_without_labels_are_not_judged() -> None:
    data = GreyLoader(range(8), labelled=False)
    result = as_json(
        evaluate_prior(
            FakePrior(), FakeTokenizer(), data, sampling=Sampling(), samples=8, classifier=FakeClassifier(), limit=6
        )
    )
    assert (result["label_accuracy"], result["label_accuracy_real"]) == (0.75, None)
    assert (result["compression_cost"], result["count"]) == (3, 6)
