"""Discriminators of sound: shapes at any length, what a logit sees, gradients where they belong, and a training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers import QUIET
from latticode.core.registry import build, spec_of
from latticode.engine import load_config, train
from latticode.losses.adversarial import ADVERSARIAL_LOSSES, r1_penalty
from latticode.nn.discriminator_audio import BANDS, MultiDiscriminator, PeriodDiscriminator, STFTDiscriminator

PERIOD = {"type": "period_discriminator", "period": 3, "width": 2}
SPECTRUM = {"type": "stft_discriminator", "window": 64, "width": 4}
DISCRIMINATORS = {
    "period": PERIOD,
    "spectrum": SPECTRUM,
    "both": {"type": "multi_discriminator", "discriminators": [PERIOD, SPECTRUM]},
}


@pytest.fixture(params=DISCRIMINATORS)
def discriminator(request: pytest.FixtureRequest) -> nn.Module:
    return build(DISCRIMINATORS[request.param])


@pytest.mark.parametrize("length", [3, 100, 400])
def test_any_length(discriminator: nn.Module, length: int) -> None:
    waveforms = (torch.rand(2, 1, length) - 0.5).requires_grad_()
    logits = discriminator(waveforms)
    assert len(logits) == 2
    assert logits[0].numel() >= 1
    logits.square().sum().backward()
    assert waveforms.grad is not None
    assert waveforms.grad.isfinite().all()
    assert waveforms.grad.abs().sum() > 0
    torch.testing.assert_close(discriminator(waveforms[:1]), logits[:1])


def test_a_discriminator_is_rebuilt_from_its_spec(discriminator: nn.Module) -> None:
    again = build(spec_of(discriminator))
    again.load_state_dict(discriminator.state_dict())
    x = torch.rand(1, 1, 200)
    assert torch.equal(again(x), discriminator(x))


def test_every_parameter_learns_and_r1_can_be_differentiated(discriminator: nn.Module) -> None:
    real, fake = torch.rand(2, 4, 1, 300).requires_grad_() - 0.5
    logits = discriminator(real)
    loss = ADVERSARIAL_LOSSES["hinge"].discriminator(logits, discriminator(fake)) + r1_penalty(logits, real)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in discriminator.parameters())
    weights = [p for name, p in discriminator.named_parameters() if "original" in name]
    assert weights
    assert all(p.grad.abs().sum() > 0 for p in weights if p.grad is not None)


def reach(discriminator: nn.Module, chosen: tuple[int, ...], x: Tensor) -> Tensor:
    """The samples of `x` (1, 1, T) that the logit at `chosen` depends on."""
    x = x.clone().requires_grad_()
    discriminator(x)[0, 0][chosen].backward()
    assert x.grad is not None
    return x.grad[0, 0].nonzero().flatten()


def test_a_period_discriminator_hears_samples_whole_periods_apart() -> None:
    heard = reach(PeriodDiscriminator(period=5, width=2), (1, 3), torch.rand(1, 1, 600))
    assert (heard % 5 == 3).all()
    assert len(heard) > 20


def test_a_period_discriminator_by_hand() -> None:
    discriminator, x = PeriodDiscriminator(2, 3, 2), torch.rand(2, 2, 100)
    h = F.pad(x, (0, 2), mode="reflect").view(2, 2, 34, 3)
    layers: list[Any] = list(discriminator.main)
    for layer in layers[:-1]:
        conv = layer[0]
        h = F.leaky_relu(F.conv2d(h, conv.weight, conv.bias, conv.stride, (2, 0)), 0.1)
    torch.testing.assert_close(discriminator(x), F.conv2d(h, layers[-1].weight, layers[-1].bias, 1, (1, 0)))
    assert [tuple(layer[0].stride) for layer in layers[:-1]] == [(3, 1)] * 4 + [(1, 1)]
    assert h.shape == (2, 64, 1, 3)


def test_a_spectrum_discriminator_hears_every_frequency_once() -> None:
    discriminator, seen = STFTDiscriminator(2, 64, 4), []
    for band in discriminator.bands:
        band.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(3, 2, 256) - 0.5
    discriminator(x)
    parts = torch.cat(seen, -1)
    assert [s.shape[-1] for s in seen] == [int(b * 33) - int(a * 33) for a, b in zip(BANDS, BANDS[1:], strict=False)]
    assert parts.shape == (3, 4, 17, 33)
    frame = torch.fft.rfft(x[1, 1, 128 - 32 : 128 + 32] * torch.hann_window(64)) / 8  # the window's square root
    torch.testing.assert_close(torch.complex(*parts[1, 2:, 8]), frame)


def test_discriminators_count_alike() -> None:
    class Of(nn.Module):
        def __init__(self, *logits: float):
            super().__init__()
            self.logits = torch.tensor(logits)

        def forward(self, x: Tensor) -> Tensor:
            return self.logits.expand(len(x), 1, -1)

    both = MultiDiscriminator([Of(1.0), Of(-3.0, -3.0, 5.0, -3.0)])(torch.zeros(2, 1, 9))
    assert both.shape == (2, 8)
    assert float(both.mean()) == 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (PERIOD | {"period": 0}, "period must be >= 1, got 0"),
        (SPECTRUM | {"window": 30}, "window must be >= 32 and a multiple of 4, got 30"),
        ({"type": "multi_discriminator", "discriminators": []}, "one or more, got none"),
    ],
)
def test_bad_settings_are_named(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(spec)


@pytest.mark.parametrize("shape", [(2, 2, 100), (2, 100), (1, 1, 2)])
def test_bad_waveforms_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"waveforms \(B, 1, T\) of at least 3 samples, got \("):
        build(PERIOD)(torch.zeros(shape))


@pytest.mark.slow
def test_a_training_with_discriminators(tmp_path) -> None:
    net = ("width=4", "latent=4", "dilations=[1]")
    config = load_config(
        "fsq-fsdd",
        [
            *("data.source=embedded:tones", "data.length=400", "data.workers=0", "steps=2", "batch_size=2"),
            *("log_every=1", "save_every=2", "picture_every=2"),
            *(f"tokenizer.{part}.{key}" for part in ("encoder", "decoder") for key in net),
            f"objective.adversarial={{type: adversarial, discriminator: {DISCRIMINATORS['both']}, r1_every: 2}}",
            *("weights.discriminator=1", "weights.r1=1", "weights.adversarial=1"),
        ],
    )
    train(config, tmp_path / "run", console=QUIET)
    assert "adaptive_weight" in (tmp_path / "run" / "metrics.jsonl").read_text()
