"""Laws of MaskGIT and its schedules: exact counts, what the loss sees, what sampling ends in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from latticode.core.types import Conditioning, Sampling
from latticode.priors import masked
from latticode.priors.base import guided
from latticode.priors.masked import Context
from latticode.priors.maskgit import MaskGIT
from latticode.priors.schedules import (
    SCHEDULES,
    draw_ratios,
    group_sizes,
    masked_counts,
    random_mask,
    ranks,
    ratio_floor,
    remask_counts,
    spread_groups,
    spread_order,
)


def small(**changes: object) -> MaskGIT:
    torch.manual_seed(0)
    arguments: dict = {"vocab": [11], "grid": [4, 4], "classes": 2, "width": 32, "depth": 2, "heads": 2} | changes
    return MaskGIT(**arguments)


# --- schedules


def test_published_cosine_counts():
    assert remask_counts(256, 12) == [253, 247, 236, 221, 203, 181, 155, 128, 97, 66, 33, 0]
    after = [256, *remask_counts(256, 8)]
    assert [a - b for a, b in pairwise(after)] == [5, 15, 24, 31, 39, 45, 48, 49]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("unknown", [0, 1, 2, 5, 64])
@pytest.mark.parametrize("steps", [1, 2, 12, 64, 100])
def test_every_pass_fixes_a_token(schedule: str, unknown: int, steps: int):
    left = [unknown, *remask_counts(unknown, steps, schedule)]
    assert left[-1] == 0
    assert all(a > b for a, b in pairwise(left))
    assert len(left) - 1 <= min(steps, unknown)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_fall_from_one_to_zero(schedule: str):
    values = [SCHEDULES[schedule](i / 100, 10**7) for i in range(101)]
    assert values[0] == pytest.approx(1)
    assert values[-1] == pytest.approx(0, abs=1e-12)
    assert all(a > b for a, b in pairwise(values))


def test_linear_counts_survive_rounding():
    for n in range(1, 60):
        assert remask_counts(n, n, "linear") == list(range(n - 1, -1, -1))


def test_published_group_sizes():
    assert group_sizes(256) == [1, 4, 7, 11, 14, 19, 22, 27, 31, 35, 40, 45]
    assert group_sizes(64) == [1, 1, 1, 3, 3, 5, 6, 6, 8, 9, 10, 11]


@pytest.mark.parametrize("positions", [1, 2, 11, 12, 13, 49, 1024])
def test_groups_hold_every_position_once(positions: int):
    sizes = group_sizes(positions)
    assert sum(sizes) == positions
    assert min(sizes) >= 1
    assert len(sizes) == min(12, positions)
    assert sorted(cell for group in spread_groups([positions]) for cell in group) == list(range(positions))


@pytest.mark.parametrize("grid", [(16, 16), (8, 8), (7, 1), (3, 5), (100,), (2, 4, 4)])
def test_spread_order_is_a_permutation_that_spreads(grid: tuple[int, ...]):
    order = spread_order(grid)
    assert sorted(order) == list(range(math.prod(grid)))
    if grid == (16, 16):  # the first 16 of 256 meet each quarter of the image, near the 4 of an even spread
        quarters = torch.tensor([(cell // 16 // 8) * 2 + cell % 16 // 8 for cell in order[:16]]).bincount(minlength=4)
        assert quarters.min() >= 3


def test_spread_order_follows_the_plastic_number():
    g = 1.32471795724474602596
    points = [((0.5 + n / g) % 1, (0.5 + n / g**2) % 1) for n in range(1, 611)]
    cells = [int(y * 16) * 16 + int(x * 16) for y, x in points]
    assert spread_order((16, 16)) == list(dict.fromkeys(cells))
    assert len(set(cells[:-1])) == 255, "draw 610 fills the last cell"


def test_masking_floor():
    assert ratio_floor(0.45) == pytest.approx(0.29715, abs=1e-5)
    assert ratio_floor(0.0) == 0
    torch.manual_seed(0)
    ratios = draw_ratios(20_000, ratio_floor(0.45))
    counts = masked_counts(ratios, 256)
    assert counts.min() >= 116
    assert counts.max() == 256
    assert (counts / 256).mean().item() == pytest.approx(0.809, abs=0.005)
    assert masked_counts(torch.tensor([0.0, 1.0]), 256).tolist() == [1, 256]


def test_masks_without_a_floor_have_the_density_of_muse():
    """(2 / pi) (1 - x^2)^(-1/2): distribution function (2 / pi) arcsin x, mean 2 / pi = 0.64."""
    torch.manual_seed(0)
    positions = 4096
    fractions = masked_counts(draw_ratios(20_000, ratio_floor(0.0)), positions).double() / positions
    assert fractions.mean().item() == pytest.approx(2 / math.pi, abs=0.005)
    for x in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        assert (fractions <= x).double().mean().item() == pytest.approx(2 / math.pi * math.asin(x), abs=0.01)


def test_random_masks_have_exact_counts_and_no_favourites():
    torch.manual_seed(0)
    counts = torch.randint(1, 17, (20_000,))
    mask = random_mask(counts, 16)
    assert torch.equal(mask.sum(1), counts)
    assert (mask.float().mean(0) - counts.float().mean() / 16).abs().max() < 0.02


def test_ranks_break_ties():
    assert ranks(torch.tensor([[3.0, 1.0, math.inf, 1.0]])).tolist() == [[2, 0, 3, 1]]


# --- loss


def spy(prior: MaskGIT) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Records what the network is asked: tokens, labels, positions."""
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    original = prior.states

    def states(tokens: Tensor, labels: Tensor, at: Tensor, context: Context | None = None) -> Tensor:
        calls.append((tokens.clone(), labels.clone(), at.clone()))
        return original(tokens, labels, at, context)

    prior.states = states  # type: ignore[method-assign]
    return calls


def test_training_hides_what_it_asks_for():
    prior = small(label_dropout=0.25)
    calls = spy(prior)
    codes = torch.randint(11, (4000, 4, 4, 1))
    prior.eval().loss(codes, Conditioning(torch.ones(4000, dtype=torch.int64)))
    ((tokens, labels, at),) = calls
    assert torch.equal(tokens == prior.mask_token, at)
    assert torch.equal(tokens[~at], codes.flatten(1)[~at])
    assert at.sum(1).min() == 8, "ceil(0.45 * 16)"
    assert at.sum(1).max() == 16
    assert (labels == -1).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert labels.unique().tolist() == [-1, 1]


def test_loss_is_the_smoothed_cross_entropy_of_masked_positions_alone():
    prior = small(dropout=0.0, label_smoothing=0.2)
    codes = torch.randint(11, (3, 4, 4, 1))
    calls = spy(prior)
    loss = prior.loss(codes)["cross_entropy"]
    tokens, labels, at = calls[0]
    everywhere = prior.predicted(prior.states(tokens, labels, torch.ones_like(at)))[0].log_softmax(-1).view(3, 16, 11)
    true = everywhere.gather(-1, codes.flatten(1)[..., None])[..., 0]
    expected = -(0.8 * true + 0.2 * everywhere.mean(-1))[at].mean()
    torch.testing.assert_close(loss, expected)


def test_unmasked_positions_give_no_gradient():
    """A code that occurs at unmasked positions only is no target: its output bias is only pushed down, by p alone."""
    prior = small(dropout=0.0, label_smoothing=0.0, classes=0)
    codes = torch.zeros(8, 4, 4, 1, dtype=torch.int64)
    calls = spy(prior)
    torch.manual_seed(5)
    prior.loss(codes)
    visible = ~calls[0][2].view(codes.shape)
    torch.manual_seed(5)  # the same masks
    loss = prior.loss(codes.masked_fill(visible, 7))["cross_entropy"]
    assert torch.equal(calls[0][2], calls[1][2])
    assert prior.bias is not None
    (gradient,) = torch.autograd.grad(loss, prior.bias)
    p = prior.predicted(prior.states(*calls[1]))[0].softmax(-1).mean(0)
    torch.testing.assert_close(gradient, p - torch.eye(11)[0])


# --- sampling


@pytest.mark.parametrize("steps", [1, 5, 12, 40])
def test_sampling_uses_the_exact_counts(steps: int):
    prior = small()
    calls = spy(prior)
    prior.sample(3, sampling=Sampling(steps=steps))
    asked = torch.stack([at.sum(1) for _, _, at in calls])
    counts = [16, *remask_counts(16, steps)][:-1]
    assert asked.tolist() == [[n] * 3 for n in counts]
    for (before, _, asked_before), (after, _, asked_after) in pairwise(calls):
        assert (asked_before | ~asked_after).all(), "what is fixed stays fixed"
        assert torch.equal(after[~asked_before], before[~asked_before])
        assert torch.equal(after == prior.mask_token, asked_after)


def test_counts_follow_the_unknown_of_each_image():
    prior = small()
    known = torch.full((3, 16), -1)
    known[1, :10] = 4
    known[2] = 4
    calls = spy(prior)
    prior.sample(3, known=known.view(3, 4, 4, 1), sampling=Sampling(steps=4))
    plans = [[16, *remask_counts(16, 4)][:-1], [6, *remask_counts(6, 4)][:-1], [0] * 4]
    assert torch.stack([at.sum(1) for _, _, at in calls]).T.tolist() == plans
    calls.clear()
    complete = known[2:].view(1, 4, 4, 1)
    assert torch.equal(prior.sample(1, known=complete), complete)
    assert calls == []


def test_without_noise_the_least_confident_draws_are_masked_again():
    prior = small()
    calls = spy(prior)
    with torch.no_grad():
        prior.position.normal_(std=1.0)  # confidences that differ between positions
    prior.sample(2, sampling=Sampling(steps=3, noise=0.0, temperature=0.0))
    (tokens, labels, at), (_, _, again), _ = list(calls)
    log_p = prior.eval().predicted(prior.states(tokens, labels, at))[0].log_softmax(-1).amax(-1).view(2, 16)
    for row in range(2):
        assert log_p[row][again[row]].max() <= log_p[row][~again[row]].min()


def test_noise_reorders_but_does_not_change_the_draws():
    """With one step the confidences decide nothing; with more they decide the order."""
    prior = small()
    for steps, equal in ((1, True), (4, False)):
        quiet, loud = (prior.sample(4, sampling=Sampling(steps=steps, noise=noise)) for noise in (0.0, 20.0))
        assert torch.equal(quiet, loud) is equal


def test_noise_is_annealed_to_zero(monkeypatch: pytest.MonkeyPatch):
    prior, seen = small(classes=0), []
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.zero_()  # every draw has log p = -log 11
    monkeypatch.setattr(masked, "gumbel", torch.ones_like)
    monkeypatch.setattr(masked, "ranks", lambda c: seen.append(c[c.isfinite()].unique().item()) or ranks(c))
    prior.sample(2, sampling=Sampling(steps=12, noise=4.5))
    assert [round(value + math.log(11), 4) for value in seen] == [4.125 - 0.375 * step for step in range(12)]


def test_guidance_runs_the_second_branch_only_when_asked():
    prior = small()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    cond = Conditioning(torch.tensor([0, 1]))
    calls = spy(prior)
    plain = prior.sample(2, cond)
    assert {len(tokens) for tokens, _, _ in calls} == {2}
    calls.clear()
    strong = prior.sample(2, cond, sampling=Sampling(guidance=3.0))
    assert all(labels.tolist() == [0, 1, -1, -1] for _, labels, _ in calls)
    assert not torch.equal(plain, strong)
    assert torch.equal(prior.sample(2, cond, sampling=Sampling(guidance=-1.0)), prior.sample(2))
    assert torch.equal(prior.sample(2, sampling=Sampling(guidance=3.0)), prior.sample(2)), "no label, no effect"


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1]),
        ("cosine", [0.1464466, 0.5, 0.8535534, 1]),
    ],
)
def test_guidance_grows_over_the_steps_by_its_schedule(
    schedule: str, shares: list[float], monkeypatch: pytest.MonkeyPatch
):
    prior, seen, cond = small(), [], Conditioning(torch.tensor([0, 1]))
    monkeypatch.setattr(masked, "guided", lambda c, u, w: seen.append(w) or guided(c, u, w))
    sampling = Sampling(steps=4, guidance=3.0, guidance_schedule=schedule)
    codes = prior.sample(2, cond, sampling=sampling)
    assert seen == pytest.approx([3 * share for share in shares])
    constant = prior.sample(2, cond, sampling=Sampling(steps=4, guidance=3.0))
    assert torch.equal(codes, constant) is (schedule == "constant")
    assert torch.equal(
        prior.sample(2, cond, sampling=replace(sampling, guidance=0.0)),
        prior.sample(2, cond, sampling=Sampling(steps=4)),
    )


# --- text


class Reader(nn.Module):
    """A state of every letter, after a first one; and it remembers what it has read."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.width = width
        self.letters = nn.Embedding(27, width)
        self.read: list[list[str]] = []

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.read.append(list(texts))
        ids = torch.zeros(len(texts), 1 + max(map(len, texts), default=0), dtype=torch.int64)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        mask[:, 0] = True
        for row, there, text in zip(ids, mask, texts, strict=True):
            row[1 : 1 + len(text)] = torch.tensor([1 + ord(letter) - ord("a") for letter in text])
            there[: 1 + len(text)] = True
        return self.letters(ids), mask


def reading(**changes: object) -> tuple[MaskGIT, Reader]:
    """With weights that make a difference of every word."""
    reader = Reader()
    prior = small(text=reader, **changes)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return prior, reader


def test_captions_and_labels_inform_the_prior_alone_and_together():
    prior, _ = reading()
    codes, labels = torch.randint(11, (1, 4, 4, 1)), torch.tensor([1])
    told = [
        None,
        Conditioning(labels),
        Conditioning(texts=("a",)),
        Conditioning(labels, ("a",)),
        Conditioning(texts=("b",)),
    ]
    assert len({prior.bits(codes, cond).item() for cond in told}) == len(told)
    assert torch.equal(prior.bits(codes), prior.bits(codes, Conditioning(texts=("",))))
    beside = Conditioning(texts=("a", "wordy"))
    both = prior.bits(codes.repeat(2, 1, 1, 1), beside)
    torch.testing.assert_close(both[:1], prior.bits(codes, told[2]))  # what the other's length pads is not there


def test_states_of_the_same_width_are_taken_as_they_are():
    assert list(small(text=Reader(32)).project.parameters()) == []  # type: ignore[union-attr]
    assert reading()[0].project.weight.shape == (32, 6)  # type: ignore[union-attr]


def test_training_hides_label_and_text_together():
    prior, reader = reading(label_dropout=0.25, depth=1)
    calls = spy(prior)
    prior.loss(torch.randint(11, (2000, 4, 4, 1)), Conditioning(torch.ones(2000).long(), ("ab",) * 2000))
    labels, texts = calls[0][1].tolist(), reader.read[0]
    assert texts.count("") / 2000 == pytest.approx(0.25, abs=0.03)
    assert set(zip(labels, texts, strict=True)) == {(1, "ab"), (-1, "")}


@pytest.mark.parametrize(
    ("labels", "texts"), [([0, 1], ("", "")), ([-1, -1], ("ab", "")), ([0, -1], ("ab", "c"))], ids=str
)
def test_guidance_leaves_the_second_branch_without_label_and_text(labels: list[int], texts: tuple[str, ...]):
    prior, reader = reading()
    cond = Conditioning(torch.tensor(labels), texts)
    calls = spy(prior)
    strong = prior.sample(2, cond, sampling=Sampling(guidance=3.0))
    assert all(call.tolist() == [*labels, -1, -1] for _, call, _ in calls)
    assert reader.read == [[*texts, "", ""]], "once for all steps"
    assert not torch.equal(strong, prior.sample(2, cond))
    assert torch.equal(prior.sample(2, cond, sampling=Sampling(guidance=-1.0)), prior.sample(2))
    nothing = Conditioning(torch.tensor([-1, -1]), ("", ""))
    assert torch.equal(prior.sample(2, nothing, sampling=Sampling(guidance=3.0)), prior.sample(2))


def test_features_are_means_of_the_stream_and_carry_gradients():
    prior, _ = reading(depth=3)
    codes, labels = torch.randint(11, (2, 4, 4, 1)), torch.tensor([0, -1])
    cond = Conditioning(labels, ("ab", ""))
    prior.eval()
    features = prior.features(codes, cond)
    assert [tuple(f.shape) for f in features] == [(2, 32)] * 4
    torch.testing.assert_close(features[0], prior.embedded(codes.flatten(1), labels)[:, 1:].mean(1))
    (gradient,) = torch.autograd.grad(features[-1].sum(), prior.embedding.weight)
    assert gradient.any()
    assert not torch.equal(features[-1], prior.features(codes)[-1])
    with pytest.raises(ValueError, match="expects integer codes"):
        prior.features(codes[..., 0])


def test_colours_of_a_palette_are_codes_like_any_other():
    """The masked variant of iGPT: 32 x 32 positions, 512 colours."""
    prior = small(vocab=[512], grid=[32, 32], classes=0, width=16, depth=1)
    codes = torch.randint(512, (2, 32, 32, 1))
    assert prior.loss(codes)["cross_entropy"].item() == pytest.approx(math.log(512), abs=1.0)
    assert prior.bits(codes[:1]).item() == pytest.approx(1024 * 9, rel=0.2)
    sample = prior.sample(
        1, sampling=Sampling(steps=3), known=codes[:1].masked_fill(torch.arange(32)[:, None, None] > 9, -1)
    )
    assert torch.equal(sample[:, :10], codes[:1, :10])
    prior.check_codes(sample)


@pytest.mark.slow
def test_an_overfitted_prior_reproduces_its_images():
    prior = small(width=48, dropout=0.0, label_smoothing=0.0, label_dropout=0.5)
    generator = torch.Generator().manual_seed(3)
    images, labels = torch.randint(11, (2, 4, 4, 1), generator=generator), torch.tensor([0, 1])
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(300):
        rows = torch.arange(16) % 2
        optimizer.zero_grad()
        prior.loss(images[rows], Conditioning(labels[rows]))["cross_entropy"].backward()
        optimizer.step()
    cool = Sampling(temperature=0.3)  # 300 steps leave some 0.5 % to wrong tokens
    rows = torch.arange(8) % 2
    assert torch.equal(prior.sample(8, Conditioning(labels[rows]), sampling=cool, seed=1), images[rows])
    assert (prior.bits(images, Conditioning(labels)) < 2).all()
    assert (prior.bits(images, Conditioning(1 - labels)) > 10).all(), "the other class's image"
    free = prior.sample(16, sampling=cool, seed=2)
    shares = [(free == image).all((1, 2, 3)).float().mean().item() for image in images]
    assert min(shares) >= 0.2, "without a label it is one image or the other, with few mixtures"
    assert sum(shares) >= 0.8
    known = images.clone()
    known[:, 1:] = -1
    assert torch.equal(prior.sample(2, known=known, sampling=cool), images), "the first row tells which image it is"


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"one code per position, got 2 \(vocab \[8, 8\]\)"):
        MaskGIT([8, 8], [4, 4])
    for name in ("dropout", "label_smoothing", "label_dropout"):
        with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\), got 1.5"):
            small(**{name: 1.5})
    with pytest.raises(ValueError, match=r"min_masked must be in \[0, 1\], got -0.1"):
        small(min_masked=-0.1)
    with pytest.raises(ValueError, match="unknown schedule 'cosin'; valid: cosine, arccos"):
        small().sample(1, sampling=Sampling(schedule="cosin"))
    with pytest.raises(ValueError, match="guidance_schedule must be constant or linear or cosine, got exp"):
        small().sample(1, sampling=Sampling(guidance_schedule="exp"))
    with pytest.raises(ValueError, match="expected one text for each of 2 images, got 1"):
        reading()[0].sample(2, Conditioning(texts=("a",)))
    with pytest.raises(ValueError, match="the prior reads no text, got 'a'"):
        small().sample(1, Conditioning(texts=("a",)))
    with pytest.raises(ValueError, match="steps must be >= 1, got 0"):
        small().sample(1, sampling=Sampling(steps=0))
