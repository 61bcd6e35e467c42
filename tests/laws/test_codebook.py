"""How the codes of a codebook begin and are kept in use: k-means, restarts, clustering, splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clusters import blobs, shares
from latticode.core.pretrained import read_spec, save_tensors
from latticode.quantizers import VQ, codebook
from latticode.quantizers.base import accumulating
from latticode.quantizers.codebook import cluster, draw, kmeans


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_kmeans_lowers_the_error_and_counts_every_token(offset: float):
    tokens = torch.randn(600, 3) + offset
    torch.manual_seed(1)
    start, _ = kmeans(tokens, 20, steps=0)
    torch.manual_seed(1)
    centres, count = kmeans(tokens, 20)

    def error(centres: Tensor) -> Tensor:
        return torch.cdist(tokens.double(), centres.double()).amin(dim=1).square().mean()

    assert error(centres) < 0.9 * error(start)
    assert count.sum() == 600


def test_kmeans_starts_from_distinct_tokens():
    tokens = torch.randn(50, 2)
    centres, count = kmeans(tokens, 50)
    assert (count == 1).all()
    assert torch.equal(centres.sort(dim=0).values, tokens.sort(dim=0).values)


@pytest.mark.parametrize("tokens", [torch.randn(5, 3), torch.zeros(5, 3), torch.full((1, 3), 1000.0)])
def test_kmeans_of_few_tokens_makes_distinct_codes_beside_the_data(tokens: Tensor):
    centres, _ = kmeans(tokens, 32)
    assert len(centres.unique(dim=0)) >= 28
    assert torch.cdist(centres.double(), tokens.double()).amin(dim=1).max() < 0.05


def test_spherical_kmeans_stays_on_the_sphere():
    centres, _ = kmeans(F.normalize(torch.randn(200, 4), dim=-1), 16, unit=True)
    torch.testing.assert_close(centres.norm(dim=-1), torch.ones(16))


def test_a_normalized_codebook_stays_on_the_sphere_and_ignores_length():
    quantizer = VQ(16, 4, normalize=True)
    z = torch.randn(100, 4)
    for _ in range(5):
        quantizer(z + 0.1 * torch.randn(100, 4))
    torch.testing.assert_close(quantizer.embedding.weight.norm(dim=-1), torch.ones(16))
    quantizer.eval()
    assert torch.equal(quantizer.encode(z), quantizer.encode(7 * z))
    cosine = F.normalize(z, dim=-1) @ quantizer.embedding.weight.t()
    assert torch.equal(quantizer.encode(z)[:, 0], cosine.argmax(dim=1))


def test_the_first_batch_with_tokens_initializes_once():
    quantizer = VQ(8, 3, restart=0.0)
    quantizer(torch.zeros(0, 3))
    quantizer(torch.full((4, 3), torch.nan))
    assert not quantizer.embedding.initialized
    quantizer.eval()(blobs(4)[0])
    assert not quantizer.embedding.initialized
    quantizer.train()(blobs(4)[0])
    assert quantizer.embedding.initialized
    weight = quantizer.embedding.weight.clone()
    twin = VQ(8, 3, restart=0.0)
    twin.load_state_dict(quantizer.state_dict())
    twin(blobs(4)[0])
    torch.testing.assert_close(twin.embedding.weight, weight, atol=0.01, rtol=0)  # one average, not k-means anew


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_dead_codes_return_as_tokens_and_stay(update: str):
    quantizer = VQ(16, 3, update=update, kmeans=False, decay=0.9)
    with torch.no_grad():
        quantizer.embedding.weight[4:] = 1e3  # never the nearest
    codes = [quantizer(torch.randn(400, 3)).codes for _ in range(40)]
    assert (quantizer.embedding.weight.abs() < 10).all()
    assert (quantizer.embedding.count > 0.1 * quantizer.embedding.count.mean()).float().mean() > 0.9
    assert len(codes[-1].unique()) == 16


def test_a_revived_code_is_a_token_with_statistics_of_its_own():
    book = VQ(4, 3, kmeans=False, restart=0.5).embedding
    book.count.copy_(torch.tensor([10.0, 10.0, 10.0, 1.0]))
    alive = book.weight[:3].clone()
    tokens = torch.randn(20, 3)
    book.upkeep(tokens, torch.ones(20, dtype=torch.bool))
    assert torch.equal(book.weight[:3], alive)
    assert (tokens == book.weight[3]).all(dim=1).any()
    assert book.count[3] == 31 / 4
    torch.testing.assert_close(book.total[3], book.weight[3] * 31 / 4)


def test_restart_can_be_switched_off():
    quantizer = VQ(4, 3, kmeans=False, restart=0.0, decay=0.5)
    quantizer.embedding.weight[3] = 1e3
    for _ in range(50):
        quantizer(torch.randn(50, 3))
    assert (quantizer.embedding.weight[3] == 1e3).all()


def test_more_codes_than_tokens_is_no_reason_to_restart_every_code():
    """256 codes, 64 tokens a step, all codes used equally: hardly any is dead."""
    quantizer = VQ(256, 2, kmeans=False)
    grid = torch.cartesian_prod(torch.arange(16.0), torch.arange(16.0))
    quantizer.embedding.weight.copy_(grid)
    quantizer.embedding.total.copy_(grid)
    for _ in range(100):
        quantizer(grid[torch.randperm(256)[:64]])
    torch.testing.assert_close(quantizer.embedding.weight, grid, atol=1e-2, rtol=1e-3)


def test_draw_is_distinct_and_repeatable():
    tokens = torch.randn(30, 2)
    torch.manual_seed(3)
    drawn = draw(tokens, 30)
    assert len(drawn.unique(dim=0)) == 30
    torch.manual_seed(3)
    assert torch.equal(draw(tokens, 30), drawn)
    assert draw(tokens[:0], 30).shape == (0, 2)


def test_clustering_draws_rare_codes_to_tokens_and_leaves_the_others():
    """a = exp(-10 N K / (1 - decay) - 1e-3), with N the share of tokens."""
    vectors, token = torch.randn(5, 3), torch.randn(1, 3)
    share = torch.tensor([0.6, 0.3999, 0.0, 0.0001, 0.00000001], dtype=torch.float64)
    rows, moved = cluster(token, vectors, 40 * share, 0.9)
    assert rows.tolist() == [2, 3, 4]
    pull = torch.exp(-10 * 5 / 0.1 * share[2:] - 1e-3).float()[:, None]
    torch.testing.assert_close(moved, (1 - pull) * vectors[2:] + pull * token)
    assert len(cluster(token[:0], vectors, share, 0.9)[0]) == 0
    assert len(cluster(token, vectors, torch.ones(5), 0.9)[0]) == 0


@pytest.mark.parametrize("offset", [0.0, 5000.0])
def test_anchors_are_drawn_by_their_distance(offset: float, monkeypatch: pytest.MonkeyPatch):
    tokens = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.5], [9.0, 9.0]]) + offset
    vectors, uniform = torch.tensor([[0.3, 0.2], [0.9, 1.2]]) + offset, torch.rand(40_000, dtype=torch.float64)
    anchors = codebook._anchors(tokens, vectors.repeat(20_000, 1), uniform)
    frequency = (anchors.view(-1, 2, 1, 2) == tokens).all(dim=-1).double().mean(dim=0)
    torch.testing.assert_close(frequency, shares(vectors, tokens, 1.0), atol=0.01, rtol=0)
    monkeypatch.setattr(codebook, "ANCHOR_TILE", 1000)
    assert torch.equal(codebook._anchors(tokens, vectors.repeat(20_000, 1), uniform), anchors)


def test_tokens_whose_square_is_not_finite_are_anchors_like_others():
    huge, uniform = 1e30 * torch.eye(2), torch.rand(100, dtype=torch.float64)
    assert len(codebook._anchors(huge, torch.randn(100, 2), uniform).unique(dim=0)) == 2
    assert (codebook._anchors(torch.cat([huge, torch.ones(1, 2)]), torch.randn(100, 2), uniform) == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("normalize", [False, True])
def test_online_clustering_uses_more_codes(update: str, normalize: bool):
    """Tokens far from where the codes start: without it most codes never win one."""

    def used(upkeep: str) -> int:
        torch.manual_seed(0)
        options = {"update": update, "normalize": normalize, "kmeans": False, "restart": 0.0}
        quantizer = VQ(32, 3, decay=0.8, upkeep=upkeep, **options)
        codes = [quantizer(0.3 * blobs(20, spread=0.3, offset=3.0)[0]).codes for _ in range(60)]
        return len(codes[-1].unique())

    assert used("restart") < 8
    assert used("online") > 20


def test_online_codes_keep_statistics_of_their_place():
    quantizer = VQ(8, 3, kmeans=False, decay=0.9, upkeep="online")
    book = quantizer.embedding
    book.count[3:] = 1e-5
    still = book.weight[:3].clone()
    book.upkeep(torch.randn(30, 3), torch.ones(30, dtype=torch.bool))
    assert torch.equal(book.weight[:3], still)
    torch.testing.assert_close(book.total[3:], book.weight[3:] * 1e-5)
    assert (book.count[3:] == 1e-5).all()


def test_only_the_first_of_accumulated_batches_moves_codes():
    quantizer = VQ(8, 3, kmeans=False, decay=0.9, upkeep="online")
    quantizer.embedding.count[3:] = 0.0
    with accumulating(quantizer):
        quantizer(torch.randn(30, 3))
        after_first = quantizer.embedding.weight.clone()
        quantizer(torch.randn(30, 3))
        assert torch.equal(quantizer.embedding.weight, after_first)
    assert not torch.equal(quantizer.embedding.weight, after_first)


def lbg(count: np.ndarray, total: np.ndarray, noise: np.ndarray, least: float) -> int:
    """UViM's rule, in place and as plainly as it can be said; how many codes were split."""
    splits = 0
    while count.min() < least:
        poor, rich = count.argmin(), count.argmax()
        total[poor], count[poor] = total[rich] * noise[splits], count[rich]
        for k in (poor, rich):
            total[k], count[k] = total[k] / 2, count[k] / 2
        splits += 1
    return splits


def test_splitting_is_the_published_rule():
    """Ten training steps against sums and counts that decay by 0.995, codes being the directions of the sums."""
    size, dim, decay = 24, 5, 0.995
    quantizer = VQ(size, dim, decay=decay, normalize=True, kmeans=False, upkeep="split")
    book = quantizer.embedding
    assert torch.equal(book.count, torch.full((size,), 1 - decay))
    with torch.no_grad():
        book.count[::3] *= 0.08  # below a tenth of a token
        book.total[::3] *= 0.08
    count, total = (t.double().numpy() / (1 - decay) for t in (book.count, book.total))
    generator, splits = torch.Generator().manual_seed(3), 0
    for step in range(10):
        x = F.normalize(torch.randn(40, dim, generator=generator) + 2.0, dim=-1)
        poor = int((count < 0.1).sum())
        torch.manual_seed(step)
        noise = (1 + 1e-3 * (2 * torch.rand(poor, dim) - 1)).double().numpy()
        splits += lbg(count, total, noise, 0.1)
        codes = total / np.linalg.norm(total, axis=1, keepdims=True)
        torch.manual_seed(step)
        out = quantizer(x)
        ours = out.codes[:, 0].numpy()
        cosine = x.double().numpy() @ codes.T
        best = cosine.argmax(1)
        # two halves of one code are a thousandth apart: a token between them may go to either by rounding
        assert (cosine[range(40), best] - cosine[range(40), ours]).max() < 1e-6
        count = decay * count + np.bincount(ours, minlength=size)
        total = decay * total
        np.add.at(total, ours, x.double().numpy())
        np.testing.assert_allclose(book.count / (1 - decay), count, rtol=1e-4)
        np.testing.assert_allclose(book.total / (1 - decay), total, atol=1e-4)
    assert splits >= 8


def test_splitting_ends_where_halves_would_be_too_small():
    weight, count = torch.randn(6, 3), torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0, 0.0])
    total = weight * count[:, None]
    before = weight.clone()
    codebook.split(weight, count, total, 1.0, unit=False)
    assert sorted(count.tolist()) == [0.0, 0.0, 0.0, 0.0, 1.5, 1.5]
    assert torch.equal(weight[1:], before[1:]), "the richest stays where it is, and so do those without a half"
    torch.testing.assert_close(weight[0], before[1], rtol=1e-3, atol=0)
    assert not torch.equal(weight[0], before[1])
    count.zero_()
    codebook.split(weight, count, total, 1.0, unit=False)  # none is rich: nothing to do, and an end
    assert not count.any()


@pytest.mark.slow
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_splitting_uses_more_codes(update: str):
    """Tokens in few directions: without it most codes never win one."""

    def used(restart: float) -> int:
        torch.manual_seed(0)
        quantizer = VQ(64, 4, update=update, decay=0.9, normalize=True, kmeans=False, upkeep="split", restart=restart)
        codes = [quantizer(torch.randn(500, 4) * 0.3 + 1.0).codes for _ in range(60)]
        return len(codes[-1].unique())

    assert used(0.0) < 40
    assert used(0.1) > 60 or (update == "gradient" and used(0.1) > used(0.0))


@pytest.mark.parametrize(("online", "upkeep"), [(True, "online"), (False, "restart")])
def test_models_saved_before_upkeep_had_a_name_still_load(tmp_path: Path, online: bool, upkeep: str):
    vq = {"type": "vq", "size": 8, "dim": 3, "update": "gradient", "online": online}
    spec = {"type": "residual", "stages": [vq, vq]}
    save_tensors(tmp_path / "model.safetensors", {}, {"schema": 1, "spec": spec})
    renamed = {"type": "vq", "size": 8, "dim": 3, "update": "gradient", "upkeep": upkeep}
    assert read_spec(tmp_path) == {"type": "residual", "stages": [renamed, renamed]}
