"""What is particular to VQ: its losses, the statistics of a codebook, affine and synchronized codes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clusters import blobs, entropy, shares
from latticode.quantizers import VQ
from latticode.quantizers.codebook import EPS


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_the_entropy_losses_are_the_regulariser_of_maskgit(normalize: bool, training: bool):
    quantizer = VQ(12, 4, update="gradient", normalize=normalize, kmeans=False, restart=0.0, entropy=0.7)
    quantizer.train(training)
    z = torch.randn(2, 15, 4, requires_grad=True)
    mask = torch.rand(2, 15) < 0.7
    losses = quantizer(z, mask).losses
    unit = (lambda x: F.normalize(x, dim=-1)) if normalize else (lambda x: x)
    p = shares(unit(z[mask]), unit(quantizer.embedding.weight), 0.7)
    expected = {"sample_entropy": entropy(p).mean(), "diversity": math.log(12) - entropy(p.mean(dim=0))}
    assert list(losses) == ["commitment", "codebook", *expected]
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value.float())
        inputs = (z, quantizer.embedding.weight)
        ours = torch.autograd.grad(losses[name], inputs, retain_graph=True)
        torch.testing.assert_close(ours, torch.autograd.grad(value, inputs, retain_graph=True), atol=1e-6, rtol=1e-4)


def test_the_entropy_losses_are_of_the_codebook_before_the_averages_move():
    quantizer = VQ(12, 4, kmeans=False, restart=0.0, entropy=0.7, decay=0.0)
    before = quantizer.embedding.weight.clone()
    z = torch.randn(30, 4, requires_grad=True)
    loss = quantizer(z).losses["sample_entropy"]
    assert not torch.equal(quantizer.embedding.weight, before)
    (expected,) = torch.autograd.grad(entropy(shares(z, before, 0.7)).mean(), z)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], expected, atol=1e-6, rtol=1e-4)


def test_the_entropy_losses_are_zero_for_sure_tokens_on_all_codes():
    quantizer = VQ(8, 3, kmeans=False, restart=0.0, entropy=1e-3).eval()
    losses = quantizer(quantizer.embedding.weight * (1 + 1e-6)).losses
    assert losses["sample_entropy"] < 1e-3
    assert 0 <= losses["diversity"] < 1e-3
    losses = quantizer(quantizer.embedding.weight[:1]).losses
    assert losses["diversity"] == pytest.approx(math.log(8), abs=1e-3)


def test_diversity_alone_spreads_the_tokens_over_the_codes():
    quantizer = VQ(8, 2, kmeans=False, restart=0.0, decay=0.0, entropy=1.0).eval()
    z = (0.1 * torch.randn(64, 2)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        losses.append(quantizer(z).losses["diversity"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]


def test_affine_codes_are_scaled_and_shifted_alike():
    quantizer = VQ(5, 3, update="gradient", affine=True, kmeans=False)
    plain = quantizer.embedding.weight.detach().clone()
    assert torch.equal(quantizer.vectors(), plain)
    with torch.no_grad():
        quantizer.log_scale.copy_(torch.tensor([0.0, 1.0, -1.0]))
        quantizer.shift.copy_(torch.tensor([1.0, 2.0, 3.0]))
    expected = plain * torch.tensor([1.0, math.e, 1 / math.e]) + torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(quantizer.vectors().detach(), expected)
    torch.testing.assert_close(quantizer.decode(torch.tensor([[4]]))[0], expected[4])


@pytest.mark.parametrize("affine", [False, True])
def test_affine_moves_codes_that_no_token_chose(affine: bool):
    quantizer = VQ(4, 3, update="gradient", affine=affine, kmeans=False, restart=0.0)
    with torch.no_grad():
        quantizer.embedding.weight[3] = 50.0
    before = quantizer.vectors().detach()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    out = quantizer(torch.randn(64, 3) + 1)
    assert 3 not in out.codes
    out.losses["codebook"].backward()
    optimizer.step()
    assert bool((quantizer.vectors()[3] != before[3]).all()) == affine


@pytest.mark.parametrize("kmeans", [False, True])
def test_affine_codes_revive_where_the_tokens_are(kmeans: bool):
    quantizer = VQ(6, 3, update="gradient", affine=True, kmeans=kmeans, restart=0.5)
    with torch.no_grad():
        quantizer.log_scale.fill_(1.5)
        quantizer.shift.fill_(4.0)
        quantizer.embedding.count[2] = 0.0
    tokens = torch.randn(6, 3)
    quantizer(tokens)
    revived = quantizer.vectors().detach()[slice(None) if kmeans else slice(2, 3)]
    assert torch.cdist(revived, tokens).amin(dim=1).max() < 1e-4


def test_sync_lets_the_gradient_of_the_latents_reach_the_codes():
    z, upstream = torch.randn(20, 3), torch.randn(20, 3)
    quantizer = VQ(6, 3, update="gradient", sync=0.5, kmeans=False, restart=0.0)
    out = quantizer(z.requires_grad_())
    assert torch.equal(out.latents, quantizer.decode(out.codes))
    to_z, to_codes = torch.autograd.grad(out.latents, (z, quantizer.embedding.weight), upstream)
    assert torch.equal(to_z, upstream)
    torch.testing.assert_close(to_codes, torch.zeros(6, 3).index_add_(0, out.codes[:, 0], 0.5 * upstream))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0, "dim": 2}, "got 0 and 2"),
        ({"size": 4, "dim": 0}, "got 4 and 0"),
        ({"size": 4, "dim": 2, "update": "sgd"}, "ema, gradient, got 'sgd'"),
        ({"size": 4, "dim": 2, "decay": 1.0}, "got 1.0"),
        ({"size": 4, "dim": 2, "restart": 1.0}, "fraction of the mean count .* got 1.0"),
        ({"size": 4, "dim": 2, "gradient": "ste"}, "straight-through, rotation, diveq, got 'ste'"),
        ({"size": 4, "dim": 2, "gradient": "diveq"}, "gradient='diveq' .* update='gradient', got 'ema'"),
        ({"size": 4, "dim": 2, "sync": 0.1}, "sync=0.1 .* update='gradient', got 'ema'"),
        ({"size": 4, "dim": 2, "sync": -1.0, "update": "gradient"}, "got -1.0"),
        ({"size": 4, "dim": 2, "affine": True}, "affine .* update='gradient', got 'ema'"),
        ({"size": 4, "dim": 2, "affine": True, "update": "gradient", "normalize": True}, "choose one"),
        ({"size": 4, "dim": 2, "entropy": 0.0}, "temperature .* got 0.0"),
    ],
)
def test_refuses_bad_arguments(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        VQ(**arguments)
