"""Laws of the losses on spectra and of the metrics of sound and video."""

from __future__ import annotations

import math

import pytest
import torch

from latticode.losses import TERMS
from latticode.losses.spectral import (
    FLOOR,
    RATES,
    WINDOWS,
    _filters,
    magnitudes,
    mel_distance,
    mel_filters,
    stft_distance,
)
from latticode.metrics import AudioMetrics, PixelMetrics, VideoMetrics
from latticode.metrics.audio import CAP, si_sdr

TIME = torch.arange(4000) / 8000


def sine(frequency: float, gain: float = 1.0) -> torch.Tensor:
    return gain * torch.sin(2 * math.pi * frequency * TIME)[None, None]


@pytest.mark.parametrize("window", WINDOWS)
def test_a_sine_is_a_peak_of_its_amplitude_at_its_frequency(window: int) -> None:
    spectra = magnitudes(sine(1000, 0.25), window)
    middle = spectra[0, :, spectra.shape[2] // 2]
    assert abs(float(middle.max()) - 0.25) < 1e-3
    assert int(middle.argmax()) * 8000 / window == 1000
    assert magnitudes(torch.zeros(2, 3, 50), window).shape == (6, window // 2 + 1, 1 + 50 // (window // 4))
    torch.testing.assert_close(magnitudes(torch.zeros(1, 1, 50), window).max(), torch.tensor(FLOOR))


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("window", WINDOWS)
def test_no_mel_band_is_empty(rate: int, window: int) -> None:
    filters = mel_filters(rate, window, window // 16)
    assert filters.shape == (window // 16, window // 2 + 1)
    assert filters.min() == 0
    assert filters.max() <= 1
    assert (filters.sum(1) > 0).all()
    assert (filters[:, 1:-1].sum(0) > 0).all()  # no frequency goes unheard but the two ends


def test_mel_corners() -> None:
    """1000 Hz is 1000 mel, and every second band's triangle begins where another ends."""
    filters = mel_filters(16000, 16000, 9)  # 1 Hz per bin
    peaks = filters.argmax(1).double()
    mel = 2595 * torch.log10(1 + peaks / 700)
    torch.testing.assert_close(mel.diff(), mel.diff().mean().expand(8), rtol=0, atol=1.5)
    assert abs(2595 * math.log10(1 + 1000 / 700) - 1000) < 0.02
    first = filters[0].nonzero().flatten()
    assert abs(int(first[-1]) - int(peaks[1])) <= 1


@pytest.mark.parametrize("name", ["stft", "mel_8000", "mel_48000"])
def test_distances(name: str) -> None:
    term, x = TERMS[name], sine(440, 0.5) + 0.05 * torch.randn(1, 1, 4000)
    assert float(term(x, x)) == 0
    assert float(term(0.9 * x, x)) < float(term(0.5 * x, x))
    assert float(term(torch.roll(x, 7, -1), x)) < 0.2 * float(term(torch.randn_like(x), x))  # phase hardly counts
    silence = torch.zeros(1, 1, 300, requires_grad=True)
    term(silence + 1e-3, x[..., :300]).backward()
    assert silence.grad is not None
    assert silence.grad.isfinite().all()
    assert silence.grad.abs().sum() > 0
    assert torch.isfinite(term(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1)))


def test_mel_distance_under_autocast_and_after_an_evaluation() -> None:
    x = 0.1 * torch.randn(2, 1, 3000)
    y = (x + 5e-4 * torch.randn_like(x)).requires_grad_()
    _filters.cache_clear()
    with torch.inference_mode():
        expected = mel_distance(y, x, 8000)
    with torch.autocast("cpu", torch.bfloat16):
        distance = mel_distance(y, x, 8000)
    assert distance.item() == expected.item()
    distance.backward()
    assert y.grad is not None


def test_a_gain_is_its_logarithm() -> None:
    x = torch.randn(2, 1, 4000) * 0.1
    assert abs(float(mel_distance(x / 10, x, 8000)) - 1) < 1e-3
    assert abs(float(stft_distance(x / 10, x)) - (0.9 + math.log(10))) < 0.02


def test_si_sdr() -> None:
    s, n = sine(500), sine(1250, 0.1)  # orthogonal, a hundredth of the energy
    assert abs(float(si_sdr(s, s + n)) - 20) < 1e-3
    assert abs(float(si_sdr(s, -3 * (s + n) + 0.5)) - 20) < 1e-3  # blind to scale, sign and offset
    assert float(si_sdr(s, 0.5 * s)) == CAP
    assert float(si_sdr(s, 0 * s)) == -CAP
    assert bool(si_sdr(0 * s + 0.3, s).isnan())


def test_sound_metrics_stream() -> None:
    x = torch.rand(5, 2, 1000) - 0.5
    y = x + 0.1 * torch.randn_like(x)
    whole, parts = AudioMetrics(8000), AudioMetrics(8000)
    whole.update(x, y)
    parts.update(x[:1], y[:1])
    parts.update(x[1:], y[1:])
    assert parts.compute() == whole.compute()
    assert whole.compute()["count"] == 5
    exact = AudioMetrics(8000)
    exact.update(x, x + 1e-5)  # less than half a step of 16 bits
    assert exact.compute() == {"si_sdr": pytest.approx(exact.compute()["si_sdr"])} | {
        "mel_distance": pytest.approx(0, abs=1e-2),
        "stft_distance": pytest.approx(0, abs=1e-2),
        "silent": 0,
        "count": 5,
    }
    exact.update(torch.zeros(1, 2, 1000), x[:1])
    assert (exact.compute()["silent"], exact.compute()["count"]) == (1, 6)
    assert exact.compute()["stft_distance"] < 1e-2  # relative to silence it would be in the thousands
    half = AudioMetrics(8000)
    half.update(x[:1] * torch.tensor([[[1.0], [0.0]]]), y[:1])
    assert half.compute()["si_sdr"] == pytest.approx(float(si_sdr(x[0, 0], y[0, 0])), abs=1e-2)  # one channel is heard
    assert half.compute()["silent"] == 0
    silent = AudioMetrics(8000)
    silent.update(torch.zeros(1, 1, 10), torch.zeros(1, 1, 10))
    assert silent.compute()["si_sdr"] is None
    assert silent.compute()["stft_distance"] is None
    with pytest.raises(ValueError, match=r"one shape \(B, C, T\), got \(5, 2, 1000\) and \(5, 2, 999\)"):
        whole.update(x, y[..., :-1])
    with pytest.raises(ValueError, match="not finite"):
        whole.update(x, y / 0)
    with pytest.raises(ValueError, match="no recordings"):
        AudioMetrics(8000).compute()


def test_video_metrics() -> None:
    x = torch.rand(3, 1, 4, 16, 16) * 2 - 1
    y = (x + 0.1 * torch.randn_like(x)).clamp(-1, 1)
    clips, frames = VideoMetrics(), PixelMetrics()
    clips.update(x[:1], y[:1])
    clips.update(x[1:], y[1:])
    frames.update(x.movedim(1, 2).flatten(0, 1), y.movedim(1, 2).flatten(0, 1))
    scores = clips.compute()
    for key, value in frames.compute().items():
        if key != "count":
            assert scores[key] == pytest.approx(value, rel=1e-5), key
    assert (scores["count"], scores["frames"]) == (3, 12)
    still = VideoMetrics()
    still.update(x, x[:, :, :1].expand_as(x))
    assert still.compute()["temporal_error"] == pytest.approx(still.compute()["temporal_change"])
    shifted = VideoMetrics()
    shifted.update(x * 0.5, x * 0.5 + 2 * 10 / 255)  # ten steps lighter: wrong, but it moves right
    assert shifted.compute()["temporal_error"] < 1
    assert shifted.compute()["psnr"] == pytest.approx(20 * math.log10(255 / 10), abs=0.2)
    single = VideoMetrics()
    single.update(x[:, :, :1], y[:, :, :1])
    assert single.compute()["temporal_error"] is None
    with pytest.raises(ValueError, match=r"clips and reconstructions of one shape"):
        single.update(x[0], y[0])
