"""Metrics and causal convolutions against the code that is used everywhere.

`metrics.npz` holds outputs of torch-fidelity 0.4 (Frechet distance, precision and recall with 3 neighbours), of
openai/guided-diffusion at 22e0df8 (the Frechet distance of ADM's suite, evaluations/evaluator.py), of librosa
(filters.mel with htk=True, norm=None) and of lucidrains/magvit2-pytorch at a00519f (CausalConv3d(3, 5, 3)). SI-SDR is
compared with torchmetrics and, in tests/laws/test_metrics.py, SSIM and PSNR with scikit-image as the tests run.
"""

from __future__ import annotations

import pytest
import torch

from drawn import close, golden, normal, uniform
from latticode.losses.spectral import mel_filters
from latticode.metrics.audio import si_sdr
from latticode.metrics.features import FeatureStatistics, precision_recall
from latticode.nn.causal import CausalConv3d

EXPECTED = golden("metrics")
REAL, FAKE = normal("metrics.a", (300, 12)), normal("metrics.b", (260, 12), 1.2, 0.3)


def test_frechet_distance() -> None:
    real, fake = FeatureStatistics(), FeatureStatistics()
    real.update(REAL)
    fake.update(FAKE)
    close(torch.tensor(real.distance(fake)).double(), EXPECTED["frechet_adm"], 1e-6)
    close(EXPECTED["frechet"], EXPECTED["frechet_adm"], 1e-6)  # theirs agree with each other as well


def test_precision_and_recall() -> None:
    assert precision_recall(REAL, FAKE, 3) == pytest.approx(EXPECTED["precision_recall"].tolist(), abs=1e-6)


@pytest.mark.parametrize(("rate", "window"), [(16000, 256), (44100, 1024)])
def test_mel_filters(rate: int, window: int) -> None:
    close(mel_filters(rate, window, window // 16), EXPECTED[f"mel_{rate}_{window}"].float(), 1e-5)


@pytest.mark.slow
def test_si_sdr() -> None:
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio  # two seconds

    target, output = normal("sdr.s", (4, 1000)), normal("sdr.s", (4, 1000)) + normal("sdr.n", (4, 1000), 0.5)
    theirs = scale_invariant_signal_distortion_ratio(output, target, zero_mean=True)
    close(si_sdr(target, output).float(), theirs, 1e-4)


@torch.no_grad()
def test_causal_convolution() -> None:
    """With zeros before the first frame, as theirs has; by default ours are copies, and later frames agree anyway."""
    conv = CausalConv3d(3, 5)
    conv.weight.copy_(normal("causal.weight", (5, 3, 3, 3, 3), 0.1))
    assert conv.bias is not None
    conv.bias.copy_(normal("causal.bias", (5,), 0.1))
    x = uniform("causal.x", (2, 3, 5, 6, 4))
    close(conv(x)[:, :, 2:], EXPECTED["causal"][:, :, 2:])
    conv.before = "zeros"
    close(conv(x), EXPECTED["causal"])
