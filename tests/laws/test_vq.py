"""What is particular to VQ: its losses, the statistics of its codebook, k-means and restarts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.quantizers import VQ
from latticode.quantizers.codebook import EPS, draw, kmeans
from latticode.quantizers.gradients import straight_through


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def blobs(per_blob: int, spread: float = 0.01, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Tokens around 8 corners of a cube (8 * per_blob, 3), and the corners (8, 3)."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3) + offset
    tokens = corners.repeat_interleave(per_blob, dim=0)
    return tokens + spread * torch.randn_like(tokens), corners


def test_straight_through_is_exact_and_passes_the_gradient():
    z, q = (1000 * torch.randn(50, 4)).requires_grad_(), 1e-3 * torch.randn(50, 4)
    out = straight_through(z, q)
    assert torch.equal(out, q)
    upstream = torch.randn(50, 4)
    (gradient,) = torch.autograd.grad(out, z, upstream)
    assert torch.equal(gradient, upstream)


@pytest.mark.parametrize("normalize", [False, True])
def test_losses_are_the_published_ones(normalize: bool):
    quantizer = VQ(16, 4, update="gradient", normalize=normalize, kmeans=False, restart=0.0)
    z = torch.randn(30, 4, requires_grad=True)
    out = quantizer(z)
    unit = (lambda x: F.normalize(x, dim=-1)) if normalize else (lambda x: x)
    x, q = unit(z), unit(quantizer.embedding.weight)[out.codes[:, 0]]
    commitment, codebook = F.mse_loss(x, q.detach()), F.mse_loss(q, x.detach())
    torch.testing.assert_close(dict(out.losses), {"commitment": commitment, "codebook": codebook})
    inputs = (z, quantizer.embedding.weight)
    ours = torch.autograd.grad(out.losses["commitment"] + 2 * out.losses["codebook"], inputs)
    theirs = torch.autograd.grad(commitment + 2 * codebook, inputs)
    torch.testing.assert_close(ours, theirs)
    assert list(VQ(16, 4)(z).losses) == ["commitment"]


@pytest.mark.parametrize("normalize", [False, True])
def test_a_code_vector_is_its_own_nearest_code(normalize: bool):
    quantizer = VQ(300, 4, normalize=normalize, kmeans=False)
    codes = torch.arange(300)[:, None]
    assert torch.equal(quantizer.encode(quantizer.decode(codes)), codes)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_token_gets_no_gradient(normalize: bool, value: float):
    z = torch.randn(10, 4)
    z[3, 1] = value
    z.requires_grad_()
    out = VQ(8, 4, normalize=normalize, update="gradient", kmeans=False)(z)
    (gradient,) = torch.autograd.grad(out.latents.sum() + sum(out.losses.values()), z)
    assert (gradient[3] == 0).all()
    assert gradient.isfinite().all()
    assert (out.codes[3] == -1).all()


def test_a_learned_codebook_is_a_parameter_and_an_averaged_one_is_not():
    assert [name for name, _ in VQ(4, 2, update="gradient").named_parameters()] == ["embedding.weight"]
    assert not list(VQ(4, 2).parameters())
    assert "embedding.weight" in VQ(4, 2).state_dict()


def test_the_averages_follow_their_equations():
    """n <- decay n + (1 - decay) count, m <- decay m + (1 - decay) sum, c = m / smoothed n, token by token."""
    quantizer = VQ(5, 2, decay=0.9, kmeans=False, restart=0.0)
    book = quantizer.embedding
    n, m, before = book.count.double(), book.total.double(), book.weight.clone()
    z = torch.randn(40, 2)
    codes = quantizer(z).codes[:, 0]
    for k in range(5):
        chosen = z[codes == k].double()
        n[k] = 0.9 * n[k] + 0.1 * len(chosen)
        m[k] = 0.9 * m[k] + 0.1 * chosen.sum(dim=0)
    smoothed = (n + EPS) / (n.sum() + 5 * EPS) * n.sum()
    used = torch.bincount(codes, minlength=5) > 0
    expected = torch.where(used[:, None], m / smoothed[:, None], before.double())
    torch.testing.assert_close(book.count, n.float())
    torch.testing.assert_close(book.total, m.float())
    torch.testing.assert_close(book.weight, expected.float())


def test_unchosen_codes_stay_where_they_are():
    quantizer = VQ(3, 2, kmeans=False, restart=0.0)
    book = quantizer.embedding
    book.weight.copy_(torch.tensor([[0.0, 0.0], [50.0, 50.0], [-50.0, 50.0]]))
    book.count[1:] = 1e-7  # after a thousand steps without a token; far below the smoothing
    book.total.copy_(book.weight * book.count[:, None])
    far = book.weight[1:].clone()
    quantizer(torch.randn(4, 2))
    assert torch.equal(book.weight[1:], far)


def test_an_averaged_codebook_converges_to_the_data():
    quantizer = VQ(64, 3, decay=0.5, kmeans=False)
    losses = [quantizer(blobs(20)[0]).losses["commitment"] for _ in range(20)]
    corners = blobs(1)[1]
    assert losses[0] > 0.1
    assert losses[-1] < 1e-3
    assert torch.cdist(corners, quantizer.embedding.weight).amin(dim=1).max() < 0.02


def test_a_learned_codebook_descends():
    quantizer = VQ(64, 3, update="gradient", kmeans=False, restart=0.0)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(quantizer(blobs(10)[0]).losses["codebook"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]
    assert isinstance(quantizer.embedding.weight, nn.Parameter)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0, "dim": 2}, "got 0 and 2"),
        ({"size": 4, "dim": 0}, "got 4 and 0"),
        ({"size": 4, "dim": 2, "update": "sgd"}, "ema, gradient, got 'sgd'"),
        ({"size": 4, "dim": 2, "decay": 1.0}, "got 1.0"),
        ({"size": 4, "dim": 2, "restart": 1.0}, "fraction of the mean count .* got 1.0"),
    ],
)
def test_refuses_bad_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        VQ(**arguments)
