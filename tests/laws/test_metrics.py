"""Laws of the metrics: closed forms, invariance to the split into batches, agreement with other implementations."""

from __future__ import annotations

import math
import sys
import types

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

from latticode.core.values import rounded, to_uint8
from latticode.metrics import (
    Classifier,
    CodeStatistics,
    FeatureNetworkError,
    FeatureSample,
    FeatureStatistics,
    PixelMetrics,
    entropy_bits,
    feature_network,
    frechet_distance,
    precision_recall,
)
from latticode.metrics import features as features_module
from latticode.metrics import pixels as pixels_module
from latticode.metrics.pixels import CAP


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, channels: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Smooth images in [-1, 1] and noisy copies, each with its own noise; some values leave the range."""
    draw = generator(seed)
    coarse = torch.rand(count, channels, 4, 4, generator=draw) * 2 - 1
    images = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    strength = torch.linspace(0.02, 0.5, count)[:, None, None, None]
    return images, images + strength * torch.randn(images.shape, generator=draw)


# ---- pixels


@pytest.mark.parametrize(("channels", "height", "width"), [(1, 32, 32), (3, 24, 40), (3, 11, 11)])
@pytest.mark.slow
def test_pixels_agree_with_scikit_image(channels: int, height: int, width: int) -> None:
    images, noisy = pictures(5, channels, height, width)
    metrics = PixelMetrics()
    metrics.update(images, noisy)
    result = metrics.compute()
    psnrs, ssims, squares = [], [], []
    for true, restored in zip(to_uint8(images).numpy(), to_uint8(noisy).numpy()):
        psnrs.append(peak_signal_noise_ratio(true, restored, data_range=255))
        squares.append(((true.astype(float) - restored.astype(float)) ** 2).mean())
        options = {"channel_axis": 0, "data_range": 255, "gaussian_weights": True, "sigma": 1.5}
        ssims.append(structural_similarity(true, restored, use_sample_covariance=False, **options))
    assert result["psnr"] == pytest.approx(np.mean(psnrs), abs=1e-9)
    assert result["psnr_pooled"] == pytest.approx(10 * np.log10(255**2 / np.mean(squares)), abs=1e-9)
    assert result["psnr_pooled"] < result["psnr"]  # Jensen: the noise differs from image to image
    assert result["ssim"] == pytest.approx(np.mean(ssims), abs=2e-5)
    assert result["count"] == 5


@pytest.mark.parametrize("strip", [1, 3 * 45 * 8, 3 * 45 * 64])
@pytest.mark.slow
def test_strips_of_large_photographs_do_not_change_the_numbers(monkeypatch: pytest.MonkeyPatch, strip: int) -> None:
    images, restored = pictures(1, 3, 64, 45)
    whole, parts = PixelMetrics(), PixelMetrics()
    whole.update(images, restored)
    monkeypatch.setattr(pixels_module, "STRIP", strip)
    parts.update(images, restored)
    assert parts.compute() == pytest.approx(whole.compute(), rel=1e-6)


def test_pixels_do_not_depend_on_the_split_into_batches() -> None:
    images, noisy = pictures(7, 1, 16, 16)
    whole, split = PixelMetrics(), PixelMetrics()
    whole.update(images, noisy)
    for a, b in zip(images.split(3), noisy.split(3)):
        split.update(a, b)
    split.update(images[:0], noisy[:0])
    for key, value in whole.compute().items():
        assert split.compute()[key] == pytest.approx(value, abs=1e-7), key


def test_an_exact_image_counts_with_the_cap_and_is_named() -> None:
    images, _ = pictures(2, 1, 16, 16)
    shifted = images.clone()
    shifted[1] = rounded(images[1]) + torch.where(rounded(images[1]) < 0, 2 / 255, -2 / 255)  # one step everywhere
    metrics = PixelMetrics()
    metrics.update(images, shifted)
    result = metrics.compute()
    assert result["exact"] == 1
    assert result["psnr"] == pytest.approx((CAP + 20 * math.log10(255)) / 2)
    assert result["psnr_pooled"] == pytest.approx(20 * math.log10(255) + 10 * math.log10(2))


def test_rounding_is_idempotent_and_clamps() -> None:
    images = torch.linspace(-1.5, 1.5, 1001).view(1, 1, 7, 143)
    assert torch.equal(rounded(rounded(images)), rounded(images))
    assert (rounded(images).min(), rounded(images).max()) == (-1, 1)
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every.float() / 127.5 - 1), every)


def test_pixels_refuse_what_has_no_number() -> None:
    metrics = PixelMetrics()
    with pytest.raises(ValueError, match="no images"):
        metrics.compute()
    with pytest.raises(ValueError, match="one shape"):
        metrics.update(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 15))
    with pytest.raises(ValueError, match="not finite"):
        metrics.update(torch.zeros(1, 1, 16, 16), torch.full((1, 1, 16, 16), math.nan))
    metrics.update(torch.zeros(1, 1, 10, 16), torch.zeros(1, 1, 10, 16))
    assert metrics.compute()["ssim"] is None  # smaller than the window


# ---- codes


def test_code_statistics_in_closed_form() -> None:
    codes = torch.tensor([0] * 4 + [1] * 2 + [5, 7] + [-1] * 3).view(-1, 1)
    statistics = CodeStatistics([8])
    statistics.update(codes)
    result = statistics.compute()
    assert result["entropy_bits"] == pytest.approx(1.75)  # 1/2, 1/4, 1/8, 1/8
    assert result["perplexity"] == pytest.approx(2**1.75)
    assert (result["usage"], result["dead"]) == (0.5, 4)
    assert (result["positions"], result["invalid"]) == (8, 3)
    assert statistics.counts()[0].tolist() == [0, 1, 5, 7]


@pytest.mark.parametrize("size", [2, 1000, 2**20])  # the last is stored sparsely
def test_uniform_codes_have_full_entropy(size: int) -> None:
    seen = min(size, 1000)
    statistics = CodeStatistics([size])
    statistics.update((torch.arange(seen) * (size // seen)).repeat(3).view(3, seen, 1))
    result = statistics.compute()
    assert result["entropy_bits"] == pytest.approx(math.log2(seen))
    assert result["perplexity"] == pytest.approx(seen)
    assert result["usage"] == pytest.approx(seen / size)


def test_one_code_has_no_entropy() -> None:
    statistics = CodeStatistics([4])
    statistics.update(torch.full((2, 3, 3, 1), 2))
    assert statistics.compute()["entropy_bits"] == 0.0
    assert statistics.compute()["perplexity"] == 1.0


@pytest.mark.parametrize("vocab", [(5,), (4, 7), (6, 2**40)])
def test_merged_code_statistics_equal_one_over_all(vocab: tuple[int, ...]) -> None:
    draw = generator()
    codes = torch.stack([torch.randint(0, size, (300,), generator=draw) for size in vocab], dim=-1)
    codes[::50] = -1
    whole, parts, first, second = (CodeStatistics(vocab) for _ in range(4))
    whole.update(codes.view(10, 30, -1))
    first.update(codes[:70])
    second.update(codes[70:])
    for part in codes.split(37):
        parts.update(part)
    first.merge(second)
    assert whole.compute() == parts.compute() == first.compute()
    for slot in range(len(vocab)):
        for a, b in zip(whole.counts(slot), first.counts(slot)):
            assert torch.equal(a, b)


def test_slots_are_counted_apart_and_summed_up() -> None:
    statistics = CodeStatistics([2, 8])
    statistics.update(torch.stack([torch.arange(8) % 2, torch.arange(8) // 4], dim=-1))
    result = statistics.compute()
    assert [slot["usage"] for slot in result["slots"]] == [1.0, 0.25]
    assert result["usage"] == pytest.approx(4 / 10)
    assert result["entropy_bits"] == pytest.approx(2.0)
    assert result["perplexity"] == pytest.approx(2.0)


def test_code_statistics_refuse_foreign_codes() -> None:
    statistics = CodeStatistics([4])
    for codes in (torch.tensor([[4]]), torch.tensor([[-2]]), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 1)):
        with pytest.raises(ValueError, match="got"):
            statistics.update(codes)
    with pytest.raises(ValueError, match="no valid codes"):
        statistics.compute()
    with pytest.raises(ValueError, match="merge"):
        statistics.merge(CodeStatistics([5]))
    with pytest.raises(ValueError, match="vocab"):
        CodeStatistics([])


@pytest.mark.parametrize("factors", [1, 2])
@pytest.mark.parametrize("levels", [[3, 5, 4, 2], [8, 5, 5, 5], [2, 3]])
def test_level_histograms_count_digits_first_channel_fastest(levels: list[int], factors: int) -> None:
    run = len(levels) // factors
    runs = [levels[i : i + run] for i in range(0, len(levels), run)]
    statistics = CodeStatistics([math.prod(part) for part in runs])
    slots = [torch.randint(0, size, (500,), generator=generator()) for size in statistics.vocab]
    statistics.update(torch.stack(slots, dim=-1))
    expected = []
    for codes, part in zip(slots, runs, strict=True):
        digits = np.unravel_index(codes.numpy(), part, order="F")
        expected += [np.bincount(d, minlength=n).tolist() for d, n in zip(digits, part, strict=True)]
    assert statistics.level_histograms(levels) == expected


@pytest.mark.parametrize("levels", [[3, 5], [3, 5, 4, 2], [3, 4, 5], [60, 1], []])
def test_level_histograms_refuse_levels_of_another_quantizer(levels: list[int]) -> None:
    statistics = CodeStatistics([15, 4])
    statistics.update(torch.tensor([[7, 3]]))
    with pytest.raises(ValueError, match="do not make up"):
        statistics.level_histograms(levels)


def test_entropy_ignores_absent_codes() -> None:
    assert entropy_bits(torch.tensor([0, 3, 0, 3])) == pytest.approx(1.0)


# ---- features


def rows(count: int, width: int, seed: int = 0) -> Tensor:
    mix = torch.randn(width, width, generator=generator(99))
    return torch.randn(count, width, generator=generator(seed)).double() @ mix.double()


def statistics(*batches: Tensor) -> FeatureStatistics:
    result = FeatureStatistics()
    for batch in batches:
        result.update(batch)
    return result


@pytest.mark.parametrize("count", [40, 200])  # below the width, the covariance is singular
def test_frechet_distance_of_a_set_with_itself_is_zero(count: int) -> None:
    a = statistics(rows(count, 64))
    assert a.distance(a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_in_closed_form() -> None:
    # N(0, diag(1, 4)) and N((3, 4), diag(9, 1)): 25 + (1 - 3)^2 + (2 - 1)^2
    zero, mean = torch.zeros(2), torch.tensor([3.0, 4.0])
    a, b = torch.tensor([1.0, 4.0]).diag(), torch.tensor([9.0, 1.0]).diag()
    assert frechet_distance(zero, a, mean, b) == pytest.approx(30)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=generator()).double()).Q  # the distance does not see rotations
    turned = frechet_distance(zero, turn @ a.double() @ turn.T, turn @ mean.double(), turn @ b.double() @ turn.T)
    assert turned == pytest.approx(30)


def test_frechet_distance_agrees_with_the_matrix_root() -> None:
    a, b = statistics(rows(100, 16)), statistics(rows(80, 16, seed=1) * 1.3 + 0.2)
    (m1, s1), (m2, s2) = a.compute(), b.compute()
    root = np.real(np.trace(np.asarray(sqrtm((s1 @ s2).numpy()))))
    expected = float((m1 - m2).square().sum() + s1.trace() + s2.trace()) - 2 * root
    assert a.distance(b) == pytest.approx(expected, rel=1e-9)
    assert a.distance(b) == pytest.approx(b.distance(a), rel=1e-9)


def test_feature_statistics_do_not_depend_on_the_split_and_merge() -> None:
    data = rows(101, 8) + 1e6  # a mean that a sum of squares in float64 would not survive
    whole, split = statistics(data), statistics(*data.split(7), data[:0])
    merged = statistics(data[:30])
    merged.merge(statistics(data[30:]))
    merged.merge(FeatureStatistics())
    for other in (split, merged):
        assert torch.allclose(other.compute()[0], whole.compute()[0], rtol=1e-12)
        assert torch.allclose(other.compute()[1], whole.compute()[1], rtol=1e-8)
    assert np.allclose(whole.compute()[1].numpy(), np.cov(data.numpy(), rowvar=False), rtol=1e-7)
    with pytest.raises(ValueError, match="at least 2"):
        statistics(data[:1]).compute()
    with pytest.raises(ValueError, match="not finite"):
        statistics(torch.full((2, 8), math.inf))
    with pytest.raises(ValueError, match="width 8"):
        whole.update(rows(3, 9))


@pytest.mark.parametrize("chunk", [2**23, 100])  # one block, many blocks
def test_precision_and_recall_at_the_extremes(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "CHUNK", chunk)
    a = rows(60, 5) + 1e3
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(a, a + 1e3) == (0.0, 0.0)
    assert precision_recall(a, a[:1].repeat(10, 1)) == (1.0, 1 / 60)  # a collapsed generator: all good, one mode
    draw = rows(50, 5, seed=1)
    assert precision_recall(rows(60, 5), draw) == precision_recall(draw, rows(60, 5))[::-1]


@pytest.mark.parametrize("chunk", [2**23, 70])
def test_precision_and_recall_agree_with_the_definition(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "CHUNK", chunk)
    a, b = rows(40, 3).numpy(), (rows(30, 3, seed=2) * 0.7 + 0.5).numpy()

    def share(points: np.ndarray, centres: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(c - np.delete(centres, i, 0), axis=1))[2] for i, c in enumerate(centres)]
        return sum([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii)) for p in points]) / len(points)

    assert precision_recall(torch.tensor(a), torch.tensor(b), k=3) == (share(b, a), share(a, b))
    assert 0 < share(b, a) != share(a, b) < 1
    for k in (0, 30):
        with pytest.raises(ValueError, match="k must be"):
            precision_recall(torch.tensor(a), torch.tensor(b), k=k)


def test_feature_sample_is_uniform_seeded_and_bounded() -> None:
    stream = torch.arange(1000.0).view(-1, 1)
    once, again = FeatureSample(100, seed=3), FeatureSample(100, seed=3)
    for part in stream.split(64):
        once.update(part)
        again.update(part)
    assert torch.equal(once.features, again.features)
    assert len(once.features.unique()) == 100
    assert abs(float(once.features.mean()) - 499.5) < 100  # three standard errors are 83
    few = FeatureSample(5000)
    few.update(stream)
    assert torch.equal(few.features, stream)


def test_feature_network_classifier_is_the_saved_one(tmp_path) -> None:
    torch.manual_seed(0)
    model = Classifier(3, channels=1, width=4)
    model.save_pretrained(tmp_path)
    network = feature_network("classifier", tmp_path)
    images, _ = pictures(2, 1, 16, 16)
    assert network.name == "classifier"
    assert torch.equal(network(images), model.eval().features(rounded(images)))
    with pytest.raises(FeatureNetworkError, match="folder"):
        feature_network("classifier")
    with pytest.raises(ValueError, match="valid: classifier, inception"):
        feature_network("vgg")


def test_inception_says_what_is_missing_and_where_it_goes(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)  # not importable
    with pytest.raises(FeatureNetworkError) as error:
        feature_network("inception", tmp_path / "weights.pth")
    for part in (
        "torch-fidelity",
        "latticode[perceptual]",
        str(tmp_path / "weights.pth"),
        features_module.INCEPTION_URL,
    ):
        assert part in str(error.value)


def test_inception_gets_8_bit_colour(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Extractor(nn.Module):
        def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str):
            super().__init__()
            self.arguments = (name, features_list, feature_extractor_weights_path)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            assert x.dtype == torch.uint8
            return (x.flatten(1).float(),)

    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Extractor  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)
    weights = tmp_path / "weights.pth"
    with pytest.raises(FeatureNetworkError, match="no file"):
        feature_network("inception", weights)
    weights.touch()
    network = feature_network("inception", weights)
    grey, _ = pictures(2, 1, 4, 4)
    assert torch.equal(network(grey), to_uint8(grey).expand(-1, 3, -1, -1).flatten(1).float())
    assert network.network.extractor.arguments == ("inception", ["2048"], str(weights))  # type: ignore[union-attr]
