"""Laws of MAGE: what is masked and dropped, that dropping changes no bookkeeping, and what is worth probing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latticode.core.types import Conditioning, Sampling
from latticode.priors import MAGE
from latticode.priors.schedules import truncated_normal


def small(scale: float = 0.2, **changes: Any) -> MAGE:
    torch.manual_seed(0)
    sizes = {"width": 32, "depth": 3, "decoder_depth": 2, "heads": 2}
    arguments: dict[str, Any] = {"vocab": [11], "grid": [4, 4], "classes": 2} | sizes | changes
    prior = MAGE(**arguments)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return prior


@pytest.mark.parametrize(("mean", "std", "low", "high"), [(0.55, 0.25, 0.5, 1.0), (0.0, 1.0, -0.5, 2.0)])
def test_shares_follow_the_truncated_normal(mean: float, std: float, low: float, high: float):
    torch.manual_seed(0)
    draws = truncated_normal(50_000, mean, std, low, high).double()
    assert draws.min() >= low
    assert draws.max() <= high
    below = lambda x: (1 + math.erf((x - mean) / std / math.sqrt(2))) / 2  # noqa: E731
    for x in torch.linspace(low, high, 9).tolist():
        expected = (below(x) - below(low)) / (below(high) - below(low))
        assert (draws <= x).double().mean().item() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("grid", "min_masked"), [([16, 16], 0.5), ([3, 3], 0.5), ([4, 4], 0.0), ([2, 5], 0.7)])
def test_what_is_dropped_is_masked_and_equally_much_of_each_image(grid: list[int], min_masked: float):
    prior = small(grid=grid, min_masked=min_masked, depth=1)
    masked, dropped = prior.masks(3000)
    positions, least = prior.positions, math.ceil(min_masked * prior.positions)
    assert (dropped.sum(1) == least).all()
    assert not (dropped & ~masked).any()
    assert 0 <= masked.sum(1).min() - max(1, least) <= 1, "a share above the least is rounded up"
    assert masked.sum(1).max() == positions
    for flags in (masked, dropped):
        assert (flags.float().mean(0) - flags.float().mean()).abs().max() < 0.06, "no favourites"
    if min_masked == 0.5 and positions == 256:
        assert (masked.sum(1) / 256).mean().item() == pytest.approx(0.706, abs=0.01)


def test_training_hides_what_it_asks_for_from_an_encoder_that_meets_half():
    prior = small(label_dropout=0.25, depth=1)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    met: list[int] = []
    original = prior.states

    def states(tokens: Tensor, labels: Tensor, at: Tensor, context: Any = None, **more: Any) -> Tensor:
        calls.append((tokens, labels, at))
        return original(tokens, labels, at, context, **more)

    prior.states = states  # type: ignore[method-assign]
    prior.encoder.register_forward_hook(lambda module, inputs, output: met.append(output.shape[1]))
    codes = torch.randint(11, (2000, 4, 4, 1))
    prior.loss(codes, Conditioning(torch.ones(2000, dtype=torch.int64)))
    ((tokens, labels, at),) = calls
    assert torch.equal(tokens == prior.mask_token, at)
    assert torch.equal(tokens[~at], codes.flatten(1)[~at])
    assert (labels == -1).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert met == [1 + 8]
    prior.bits(codes[:1])
    assert met[1:] == [1 + 16] * 12


@pytest.mark.parametrize("drop", [False, True])
def test_logits_are_those_of_each_image_by_itself(drop: bool):
    """Image by image, position by position, as section 3.1 says it."""
    prior = small().eval()
    masked, dropped = prior.masks(5)
    tokens = torch.randint(11, (5, 16)).masked_fill(masked, prior.mask_token)
    labels = torch.tensor([-1, 0, 1, -1, 0])
    expected = []
    for b in range(5):
        x = prior.embedded(tokens[b : b + 1], labels[b : b + 1])[0]
        met = [n for n in range(16) if not (drop and dropped[b, n])]
        y = prior.link(prior.encoder(x[[0, *(1 + n for n in met)]][None]))[0]
        out_of = dict(zip(met, y[1:], strict=True))
        rows = [y[0], *(y[0] if masked[b, n] else out_of[n] for n in range(16))]
        z = prior.decoder((torch.stack(rows) + prior.decoder_position)[None])[0]
        expected.append(prior.predicted(z[1:][masked[b]])[0])
    got = prior.predicted(prior.states(tokens, labels, masked, dropped_BN=dropped if drop else None))[0]
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-4, rtol=1e-4)
    some = masked & (torch.arange(16) % 3 == 0)  # those that are not asked for are masked all the same
    few = prior.predicted(prior.states(tokens, labels, some, dropped_BN=dropped if drop else None))[0]
    torch.testing.assert_close(few, got[some[masked]])


def test_everything_may_be_dropped():
    prior = small(min_masked=0.99)
    assert prior.loss(torch.randint(11, (3, 4, 4, 1)))["cross_entropy"].isfinite()


def test_loss_is_the_smoothed_cross_entropy_of_masked_positions_alone():
    prior = small(dropout=0.0, label_smoothing=0.2)
    codes = torch.randint(11, (3, 4, 4, 1))
    torch.manual_seed(5)
    loss = prior.training_loss(codes.flatten(1), torch.tensor([-1, 0, 1]))
    torch.manual_seed(5)
    masked, dropped = prior.masks(3)
    tokens = codes.flatten(1).masked_fill(masked, prior.mask_token)
    log_p = prior.predicted(prior.states(tokens, torch.tensor([-1, 0, 1]), masked, dropped_BN=dropped))[0].log_softmax(
        -1
    )
    true = log_p.gather(-1, codes.flatten(1)[masked][:, None])[:, 0]
    torch.testing.assert_close(loss, -(0.8 * true + 0.2 * log_p.mean(-1)).mean())


def test_features_are_the_encoders_and_carry_gradients():
    prior = small().eval()
    codes, labels = torch.randint(11, (2, 4, 4, 1)), torch.tensor([0, -1])
    features = prior.features(codes, Conditioning(labels))
    assert [tuple(f.shape) for f in features] == [(2, 32)] * 4
    x = prior.embedded(codes.flatten(1), labels)
    for feature, block in zip(features, [*prior.encoder.blocks, None], strict=True):
        torch.testing.assert_close(feature, x[:, 1:].mean(1))
        x = x if block is None else block(x)
    (gradient,) = torch.autograd.grad(features[-1].sum(), prior.embedding.weight)
    assert gradient.any()


@pytest.mark.slow
def test_an_overfitted_prior_reproduces_its_images():
    prior = small(0.0, width=48, depth=2, decoder_depth=1, dropout=0.0, label_smoothing=0.0, label_dropout=0.5)
    images, labels = torch.randint(11, (2, 4, 4, 1)), torch.tensor([0, 1])
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3, weight_decay=0.0)
    rows = torch.arange(16) % 2
    for _ in range(250):
        optimizer.zero_grad()
        prior.loss(images[rows], Conditioning(labels[rows]))["cross_entropy"].backward()
        optimizer.step()
    cool = Sampling(temperature=0.3)
    assert torch.equal(prior.sample(8, Conditioning(labels[rows[:8]]), sampling=cool), images[rows[:8]])
    assert (prior.bits(images, Conditioning(labels)) < 3).all()
    other = prior.bits(images, Conditioning(1 - labels)) - prior.bits(images, Conditioning(labels))
    assert (other > 3).all(), "the other class's image"


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"MAGE models one code per position, got 2 \(vocab \[8, 8\]\)"):
        small(vocab=[8, 8])
    for value in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"min_masked must be in \[0, 1\), got {value}"):
            small(min_masked=value)
    with pytest.raises(ValueError, match="std_masked must be > 0, got 0"):
        small(std_masked=0)
    with pytest.raises(ValueError, match="the prior reads no text, got 'a'"):
        small().sample(1, Conditioning(texts=("a",)))
