"""Laws of convolutional autoregression: nothing looks ahead, everything behind is seen, two levels are one prior."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latticode.core import registry
from latticode.core.types import Conditioning, Sampling
from latticode.nn import masked
from latticode.priors import PixelCNN, TwoLevel
from latticode.priors.base import Condition
from latticode.priors.pixelcnn import packed, unpacked

SPECS: dict[str, dict[str, Any]] = {
    "pixelcnn": {"depth": 4},
    "wide-kernel": {"depth": 2, "kernel": 5},
    "pixelsnail": {"depth": 2, "attention": 1, "heads": 2},
    "attention-last": {"depth": 3, "attention": 3, "heads": 1},
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def disturbed(prior: Any) -> Any:
    """In eval mode, with weights far from their initial values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
    return prior.eval()


def small(**changes: Any) -> PixelCNN:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"vocab": [11], "grid": [4, 5], "classes": 2, "width": 16, "depth": 2} | changes
    return disturbed(PixelCNN(**arguments))


def logits_of(prior: PixelCNN, codes: Tensor, labels: Tensor) -> Tensor:
    """(B, N, C) of `codes` (B, H, W)."""
    return prior.network(codes, prior.network.condition(labels)).flatten(2).mT


# --- order


@every_spec
def test_no_position_sees_itself_or_a_later_one(spec: dict[str, Any]):
    """Changing one code leaves the logits there and before as they are, to the bit."""
    prior = small(**spec)
    codes, labels = torch.randint(11, (2, 4, 5)), torch.tensor([0, -1])
    with torch.no_grad():
        before = logits_of(prior, codes, labels)
        for n in range(prior.positions):
            changed = codes.clone()
            changed[:, n // 5, n % 5] = (changed[:, n // 5, n % 5] + 1) % 11
            after = logits_of(prior, changed, labels)
            assert torch.equal(before[:, : n + 1], after[:, : n + 1])
            assert (before[:, n + 1 :] != after[:, n + 1 :]).any(-1).all()


def seen(prior: PixelCNN) -> Tensor:
    """(N, N) bool: whether the logits at the first position have a gradient on the code at the second."""
    kept: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0]

    prior.double().network.embedding.register_forward_hook(keep)
    logits = logits_of(prior, torch.randint(11, (1, *prior.plane)), torch.tensor([0]))
    mixed = (logits[0] * torch.randn(11, dtype=torch.float64)).sum(1)
    gradients = [torch.autograd.grad(value, kept[0], retain_graph=True)[0] for value in mixed]
    return torch.stack(gradients).abs().sum(-1).flatten(1) > 0


@every_spec
def test_every_position_sees_all_earlier_ones(spec: dict[str, Any]):
    """No blind spot, with layers enough to cross the grid or with attention."""
    before = torch.ones(20, 20, dtype=torch.bool).tril(-1)
    assert torch.equal(seen(small(**spec)), before)


@pytest.mark.parametrize(("depth", "kernel"), [(1, 3), (2, 3), (1, 5)])
def test_without_attention_a_position_sees_as_far_as_documented(depth: int, kernel: int):
    reach = depth * (kernel // 2)
    cells = list(itertools.product(range(6), range(7)))
    expected = [
        [
            (r < i and i - r <= reach + 1 and abs(c - j) <= reach) or (r == i and 1 <= j - c <= reach + 1)
            for r, c in cells
        ]
        for i, j in cells
    ]
    saw = seen(small(grid=[6, 7], depth=depth, kernel=kernel))
    assert torch.equal(saw, torch.tensor(expected))


@every_spec
def test_logits_of_the_first_rows_are_those_of_the_whole(spec: dict[str, Any]):
    prior = small(**spec)
    codes, labels = torch.randint(11, (2, 4, 5)), torch.tensor([0, 1])
    torch.testing.assert_close(logits_of(prior, codes[:, :2], labels), logits_of(prior, codes, labels)[:, :10])


def test_the_label_reaches_the_first_position():
    prior = small()
    logits = logits_of(prior, torch.zeros(3, 4, 5, dtype=torch.int64), torch.tensor([0, 1, -1]))
    assert len(logits[:, 0].unique(dim=0)) == 3


def test_attention_is_told_the_places(monkeypatch: pytest.MonkeyPatch):
    prior = small(grid=[2, 4], attention=1)
    places = masked.places((2, 4), device=prior.device)
    assert places[:, 0].tolist() == [-0.5] * 4 + [0.5] * 4
    assert places[:, 1].tolist() == [-0.75, -0.25, 0.25, 0.75] * 2
    codes, labels = torch.randint(11, (1, 2, 4)), torch.tensor([0])
    before = logits_of(prior, codes, labels)
    monkeypatch.setattr(masked, "places", lambda plane, device: torch.zeros_like(places))
    changed = (logits_of(prior, codes, labels) != before).any(-1)[0]
    assert changed.tolist() == [False] + [True] * 7, "the first position has nothing to choose from"


# --- sampling


@every_spec
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_temperature_zero_takes_the_likeliest_code_given_the_whole(spec: dict[str, Any], guidance: float):
    prior = small(**spec)
    labels = torch.tensor([0, 1, -1])
    codes = prior.sample(3, Conditioning(labels), sampling=Sampling(temperature=0.0, guidance=guidance))
    conditional = logits_of(prior, codes[..., 0], labels)
    unconditional = logits_of(prior, codes[..., 0], torch.full_like(labels, -1))
    logits = conditional + guidance * (conditional - unconditional)
    assert torch.equal(codes.flatten(1), logits.argmax(-1))


def test_a_pass_runs_for_open_positions_only_and_twice_as_wide_under_guidance():
    prior, rows = small(), []
    prior.network.register_forward_pre_hook(lambda module, inputs: rows.append(tuple(inputs[0].shape)))
    known = torch.full((2, 4, 5, 1), -1)
    known[:, :2], known[0, 2] = 3, 5
    prior.sample(2, known=known)
    assert rows == [(2, 3, 5)] * 5 + [(2, 4, 5)] * 5
    rows.clear()
    cond = Conditioning(torch.tensor([0, 1]))
    prior.sample(2, cond, sampling=Sampling(guidance=2.0), known=known)
    assert rows == [(4, 3, 5)] * 5 + [(4, 4, 5)] * 5
    assert torch.equal(prior.sample(2, cond, sampling=Sampling(guidance=-1.0)), prior.sample(2))
    assert torch.equal(prior.sample(2, sampling=Sampling(guidance=3.0)), prior.sample(2)), "no label, no effect"


def test_what_is_known_behind_a_position_does_not_inform_it():
    prior = small()
    behind = torch.full((8, 4, 5, 1), -1)
    behind[:, 3] = torch.randint(11, (5, 1))
    assert torch.equal(prior.sample(8, known=behind)[:, :3], prior.sample(8)[:, :3])


def test_training_hides_labels():
    prior, labels = small(label_dropout=0.25), []
    prior.network.label.register_forward_pre_hook(lambda module, inputs: labels.append(inputs[0]))
    prior.loss(torch.zeros(4000, 4, 5, 1, dtype=torch.int64), Conditioning(torch.ones(4000, dtype=torch.int64)))
    assert (labels[0] == 2).float().mean().item() == pytest.approx(0.25, abs=0.03)  # 2 is 'no label'
    assert labels[0].unique().tolist() == [1, 2]


# --- probabilities


def enumerated(prior: Any, count: int) -> None:
    """2^-bits over all images sum to 1, and `count` samples are distributed so (chi-square, 4 sigma)."""
    ranges = [range(size) for size in prior.vocab] * prior.positions
    images = torch.tensor(list(itertools.product(*ranges))).view(-1, *prior.grid, len(prior.vocab))
    p = (-prior.bits(images).double()).exp2()
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert p.max() > 3 / len(p), "the distribution must not be the uniform one"
    cells = {tuple(image): i for i, image in enumerate(images.flatten(1).tolist())}
    drawn = prior.sample(count, seed=1).flatten(1).tolist()
    counts = torch.tensor([cells[tuple(image)] for image in drawn]).bincount(minlength=len(p))
    expected = p * count
    often = expected >= 5
    chi = ((counts - expected)[often].square() / expected[often]).sum().item()
    freedom = int(often.sum())
    assert freedom > 8
    assert chi < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("attention", [0, 1])
def test_samples_follow_the_probabilities(attention: int):
    enumerated(small(vocab=[3], grid=[2, 2], attention=attention, heads=2), 3000)


@every_spec
def test_loss_is_the_mean_of_bits(spec: dict[str, Any]):
    prior = small(**spec, label_dropout=0.0)
    codes, cond = prior.sample(4, seed=2), Conditioning(torch.tensor([0, 1, -1, 0]))
    nats = prior.loss(codes, cond)["cross_entropy"] * prior.positions
    torch.testing.assert_close(nats, prior.bits(codes, cond).mean() * math.log(2))


def test_no_images_need_no_bits():
    for prior in (small(attention=1), two_level()):
        assert prior.bits(torch.zeros(0, *prior.grid, len(prior.vocab), dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("attention", [0, 2])
@pytest.mark.slow
def test_an_overfitted_prior_reproduces_its_images(attention: int):
    torch.manual_seed(0)
    prior = PixelCNN([12], [3, 3], 2, width=32, depth=3, attention=attention, dropout=0.0, label_dropout=0.5)
    images, labels = torch.randint(12, (2, 3, 3, 1)), torch.tensor([0, 1])
    images[:, 0, 0] = torch.tensor([[3], [8]])  # the first code tells which image it is
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3, weight_decay=0.0)
    rows = torch.arange(16) % 2
    for _ in range(80):
        optimizer.zero_grad()
        prior.loss(images[rows], Conditioning(labels[rows]))["cross_entropy"].backward()
        optimizer.step()
    cool = Sampling(temperature=0.3)
    assert torch.equal(prior.sample(16, Conditioning(labels[rows]), sampling=cool), images[rows])
    assert (prior.bits(images, Conditioning(labels)) < 2).all()
    assert (prior.bits(images, Conditioning(1 - labels)) > 4).all(), "the other class's image"
    free = prior.sample(16, sampling=cool, seed=2)
    shares = [(free == image).all((1, 2, 3)).float().mean().item() for image in images]
    assert min(shares) > 0.1, "without a label it is one image or the other"
    assert sum(shares) == 1


# --- two levels


def two_level(**changes: Any) -> TwoLevel:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "vocab": [5, *[7] * 4],
        "grid": [2, 3],
        "classes": 2,
        "width": 16,
        "depth": 2,
        "attention": 1,
    }
    arguments |= {"heads": 2, "bottom_width": 16, "bottom_depth": 3} | changes
    return disturbed(TwoLevel(**arguments))


@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_levels_are_packed_as_the_tokenizer_does(ratio: int):
    shape = {"width": 4, "multipliers": [1, 1] if ratio == 2 else [1], "blocks": 0, "groups": 2}
    codes = torch.randint(9, (2, 3, 4, 1 + ratio**2))
    top, bottom = unpacked(codes, ratio)
    assert top.shape == (2, 3, 4)
    assert bottom.shape == (2, 3 * ratio, 4 * ratio)
    assert torch.equal(packed(top, bottom, ratio), codes)
    if ratio != 3:
        coarse = {
            "type": "tokenizer",
            "encoder": {"type": "conv_encoder", "in_channels": 4, "latent": 4, **shape},
            "quantizer": {"type": "fsq", "levels": [3, 3]},
            "decoder": {"type": "conv_decoder", "out_channels": 4, "latent": 4, **shape},
        }
        fine = {**coarse, "type": "hierarchical_tokenizer", "top": coarse}
        levels = registry.build(fine).levels(codes)
        assert torch.equal(levels[0][..., 0], top)
        assert torch.equal(levels[1][..., 0], bottom)


def test_each_level_looks_only_back_and_the_bottom_at_all_of_the_top():
    prior = two_level(depth=3, bottom_depth=6)
    codes = torch.stack([torch.randint(v, (2, 2, 3)) for v in prior.vocab], dim=-1)
    condition = Condition(torch.tensor([0, -1]), ["", ""])
    with torch.no_grad():
        top, bottom = prior._nats(codes, condition).values()
        for n in range(6):
            changed = codes.clone()
            changed[:, n // 3, n % 3, 0] = (changed[:, n // 3, n % 3, 0] + 1) % 5
            after = list(prior._nats(changed, condition).values())
            assert torch.equal(top.flatten(1)[:, :n], after[0].flatten(1)[:, :n])
            assert (top.flatten(1)[:, n:] != after[0].flatten(1)[:, n:]).all()
            assert (bottom != after[1]).any(), "the bottom is told"
        for n in range(24):
            fine = unpacked(codes, 2)[1].flatten(1)
            fine[:, n] = (fine[:, n] + 1) % 7
            after = list(prior._nats(packed(codes[..., 0], fine.view(2, 4, 6), 2), condition).values())
            assert torch.equal(top, after[0])
            assert torch.equal(bottom.flatten(1)[:, :n], after[1].flatten(1)[:, :n])
            assert (bottom.flatten(1)[:, n:] != after[1].flatten(1)[:, n:]).all()


def test_both_levels_are_sampled_as_the_whole_predicts():
    prior, labels = two_level(), torch.tensor([0, 1, -1])
    for guidance in (0.0, 1.5):
        codes = prior.sample(3, Conditioning(labels), sampling=Sampling(temperature=0.0, guidance=guidance))
        (top, bottom), whole = unpacked(codes, 2), [torch.zeros(()), torch.zeros(())]
        for y, weight in ((labels, 1 + guidance), (torch.full_like(labels, -1), -guidance)):
            whole[0] = whole[0] + weight * prior.top(top, prior.top.condition(y))
            whole[1] = whole[1] + weight * prior.bottom(bottom, prior._condition(top, y))
        assert torch.equal(top, whole[0].argmax(1))
        assert torch.equal(bottom, whole[1].argmax(1))


def test_a_kept_top_is_given_a_bottom():
    prior = two_level()
    codes = prior.sample(4, seed=3)
    known = codes.clone()
    known[..., 1:] = -1
    assert torch.equal(prior.sample(4, seed=3, known=known), codes)
    assert not torch.equal(prior.sample(4, seed=4, known=known), codes)


@pytest.mark.slow
@pytest.mark.parametrize(("vocab", "grid"), [([2, 2, 2, 2, 2], [1, 2]), ([3, 2], [2, 2])])
def test_two_levels_sum_to_one_and_samples_follow(vocab: list[int], grid: list[int]):
    enumerated(two_level(vocab=vocab, grid=grid), 3000)


def test_the_losses_of_two_levels_are_the_mean_bits_of_each():
    prior = two_level(label_dropout=0.0)
    codes = prior.sample(4)
    losses = prior.loss(codes)
    assert list(losses) == ["top_cross_entropy", "cross_entropy"]
    nats = 6 * losses["top_cross_entropy"] + 24 * losses["cross_entropy"]
    torch.testing.assert_close(nats, prior.bits(codes).mean() * math.log(2))


@pytest.mark.parametrize("vocab", [[7], [7, 7, 7], [7, 5, 5, 5, 4]])
def test_other_packings_are_refused(vocab: list[int]):
    with pytest.raises(ValueError, match=rf"sizes \[top, bottom \* r \* r\], got {len(vocab)}"):
        two_level(vocab=vocab)
    with pytest.raises(ValueError, match=r"grids of two axes, got 1 \(grid \[9\]\)"):
        two_level(grid=[9])


# --- arguments


def test_bad_arguments_are_named():
    for name in ("dropout", "label_dropout"):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\), got 1.5"):
            small(**{name: 1.5})
    for name in ("width", "depth"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1, got 0"):
            small(**{name: 0})
    for attention in (-1, 3):
        with pytest.raises(ValueError, match=rf"attention must be 0 \(none\) to the depth, 2, got {attention}"):
            small(attention=attention)
    for kernel in (1, 4):
        with pytest.raises(ValueError, match=f"kernel must be odd and >= 3, got {kernel}"):
            small(kernel=kernel)
    with pytest.raises(ValueError, match="heads must divide the width, got width 16 and heads 3"):
        small(attention=1, heads=3)
    with pytest.raises(ValueError, match=r"one code per position, got 3 \(vocab \[7, 4, 5\]\)"):
        small(vocab=[7, 4, 5])
    with pytest.raises(ValueError, match=r"grids of one or two axes, got 3 \(grid \[2, 3, 2\]\)"):
        small(grid=[2, 3, 2])
