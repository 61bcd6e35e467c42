"""What is particular to residual quantization: scales, gradients, prefixes, dropout, shared stages, QINCo."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from latticode.quantizers import VQ, Quantizer
from latticode.quantizers.base import Step, Tokens, token_mean
from latticode.quantizers.gradients import straight_through
from latticode.quantizers.implicit import QINCo, adapted
from latticode.quantizers.residual import Residual


class Grid(Quantizer):
    """L levels on [-1, 1] in each channel, one code for each: a stage with a fixed range, and with a loss."""

    def __init__(self, *levels: int):
        super().__init__()
        self.levels, self.dim, self.vocab = levels, len(levels), levels
        self.contraction = [1 / n for n in levels]

    def _quantize(self, tokens: Tokens) -> Step:
        q = self._decode(self._encode(tokens.values))
        loss = token_mean((tokens.target - q).square(), tokens.keep)
        return Step(straight_through(tokens.values, q), self._encode(tokens.values), {"commitment": loss})

    def _encode(self, x: Tensor) -> Tensor:
        top = torch.tensor(self.levels) - 1
        return ((x.clamp(-1, 1) + 1) / 2 * top).round().long()

    def _decode(self, codes: Tensor) -> Tensor:
        return codes.to(self._arithmetic) * 2 / (torch.tensor(self.levels) - 1) - 1


class Doubled(Grid):
    """Its gradient to the latents is a half."""

    def _quantize(self, tokens: Tokens) -> Step:
        step = super()._quantize(tokens)
        return step._replace(latents=step.latents.detach() + (tokens.values - tokens.values.detach()) / 2)


def codebooks(*sizes: int, dim: int = 3, **options: Any) -> list[VQ]:
    return [VQ(size, dim, **{"restart": 0.0, **options}) for size in sizes]


def trained(quantizer: Quantizer, steps: int = 5, tokens: int = 400) -> Quantizer:
    for _ in range(steps):
        quantizer(torch.randn(tokens, quantizer.dim))
    return quantizer


def parts(quantizer: Residual, codes: Tensor) -> list[Tensor]:
    """What each stage adds to the latents of `codes`."""
    sums = [quantizer.decode(codes[..., :k]) for k in quantizer._prefixes]
    return [sums[0], *(b - a for a, b in zip(sums, sums[1:]))]


# Values


def test_each_stage_quantizes_what_is_left():
    stages = codebooks(20, 30, 10)
    quantizer = trained(Residual(stages)).eval()
    z = torch.randn(50, 3)
    left, codes = z, []
    for stage in stages:
        codes.append(stage.encode(left))
        left = left - stage.decode(codes[-1])
    out = quantizer(z)
    assert torch.equal(out.codes, torch.cat(codes, dim=1))
    torch.testing.assert_close(z - out.latents, left)
    assert quantizer.vocab == (20, 30, 10)


@pytest.mark.parametrize("shared", [False, True])
def test_stages_of_one_grid_are_one_even_grid(shared: bool):
    """L^j levels on +- L / (L-1): the error is at most half a cell, and that much is needed."""
    quantizer = Residual(Grid(5, 3, 2), 4) if shared else Residual([Grid(5, 3, 2) for _ in range(4)])
    levels = torch.tensor([5.0, 3.0, 2.0])
    reach = levels / (levels - 1)
    z = (torch.rand(5000, 3) * 2 - 1) * reach
    codes = quantizer.encode(z)
    for j, slots in enumerate(quantizer._prefixes, 1):
        cell = reach * levels**-j
        error = (quantizer.decode(codes[:, :slots]) - z).abs().amax(dim=0)
        assert (error <= cell * 1.0001).all()
        assert (error >= cell * 0.95).all()
    assert quantizer.contraction == pytest.approx([5.0**-4, 3.0**-4, 2.0**-4])
    torch.testing.assert_close(torch.tensor(quantizer.reach), reach)
    for channel, count in enumerate((5, 3, 2)):
        line = torch.linspace(-1, 1, 100_001)[:, None] * reach
        assert len(quantizer.decode(quantizer.encode(line))[:, channel].unique()) == count**4


def test_no_error_passes_the_product_of_contractions():
    """Over different and nested stages: each fills its reach with what is left."""
    nested = Residual([Residual([Grid(3), Grid(5)]), Residual(Grid(4), 2), Grid(2)])
    flat = Residual([Grid(3), Grid(5), Grid(4), Grid(4), Grid(2)])
    z = (torch.rand(500, 1) * 2 - 1) * 1.5
    assert torch.equal(nested.encode(z), flat.encode(z))
    torch.testing.assert_close(nested(z).latents, flat(z).latents)
    assert nested._prefixes == flat._prefixes == [1, 2, 3, 4, 5]
    assert nested.contraction == pytest.approx([1 / (3 * 5 * 4 * 4 * 2)])
    for slots, product in zip(flat._prefixes, (3, 15, 60, 240, 480), strict=True):
        error = (flat.decode(flat.encode(z)[:, :slots]) - z).abs().max()
        assert 0.9 < error / (1.5 / product) < 1.001


def test_codebooks_have_a_scale_only_behind_grids():
    """There they see what is left as wide as [-1, 1]."""
    mixed = Residual([*codebooks(9), Grid(5, 4, 3), *codebooks(8), Grid(2, 2, 2)])
    assert mixed._table[0] == mixed._table[1] == [1.0] * 3
    assert mixed._table[2] == pytest.approx([1 / 4, 1 / 3, 1 / 2])
    assert mixed._table[3] == pytest.approx([1 / 8, 1 / 6, 1 / 4])
    assert mixed.contraction == [1.0] * 3
    trained(mixed).eval()
    z = torch.randn(50, 3)
    out = mixed(z)
    assert torch.equal(mixed.decode(mixed.encode(z)), out.latents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_leaves_the_scales_exact(dtype: torch.dtype):
    quantizer = Residual(Grid(4), 5)
    z = (torch.rand(200, 1) * 2 - 1).to(dtype)
    expected = quantizer.encode(z)
    assert torch.equal(quantizer.to(dtype).encode(z), expected)
    assert quantizer._scale(1, z.device).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_soft_clamp_keeps_every_value_within_reach():
    quantizer = Residual(Grid(5, 3), 6, soft_clamp=True)
    z = torch.randn(2000, 2) * 10
    limit = torch.tensor([5 / 4, 3 / 2])
    bounded = limit * torch.tanh(z / limit)
    out = quantizer(z)
    assert ((out.latents - bounded).abs() <= limit * torch.tensor([1 / 5, 1 / 3]) ** 6 + 1e-6).all()
    assert quantizer.contraction == 1.0
    assert quantizer.reach == [torch.inf] * 2
    assert torch.equal(quantizer.encode(z), out.codes)
    with pytest.raises(ValueError, match="contraction is below 1"):
        Residual(codebooks(4, 4), soft_clamp=True)


# Gradients


def gradient_of(output: Tensor, z: Tensor) -> Tensor:
    return torch.autograd.grad(output, z, retain_graph=True)[0]


@pytest.mark.parametrize("make", [lambda: Residual(codebooks(9, 9, 9)), lambda: Residual(codebooks(9)[0], 4)])
def test_straight_through_stages_pass_one_identity(make: Any):
    """Bit for bit the gradient of the latents, not one more of it for each stage."""
    z, upstream = torch.randn(40, 3, requires_grad=True), torch.randn(40, 3)
    assert torch.equal(gradient_of((make()(z).latents * upstream).sum(), z), upstream)


def test_the_gradient_is_the_chain_rule_over_the_residuals():
    """1 - prod (1 - J_i), here with J_i = 1/2."""
    quantizer = Residual([Doubled(5), Doubled(5), Doubled(4)])
    z = torch.rand(20, 1, requires_grad=True)
    torch.testing.assert_close(gradient_of(quantizer(z).latents.sum(), z), torch.full_like(z, 1 - 0.5**3))


@pytest.mark.parametrize("training", [False, True])
def test_commitment_is_the_mean_over_cumulative_depths(training: bool):
    """|z - sg(q_0 + .. + q_d)|^2 averaged over d, in value and in gradient (RQ-VAE)."""
    quantizer = Residual(codebooks(9, 9, 9, kmeans=False)).train(training)
    before = copy.deepcopy(quantizer)
    z = torch.randn(40, 3, requires_grad=True)
    out = quantizer(z)
    sums = [before.decode(out.codes[:, :k]) for k in (1, 2, 3)]
    expected = torch.stack([(z - one.detach()).square().mean() for one in sums]).mean()
    torch.testing.assert_close(out.losses["commitment"], expected)
    torch.testing.assert_close(gradient_of(out.losses["commitment"], z), gradient_of(expected, z))


def test_losses_of_scaled_stages_count_alike():
    """In the units of the stage, with the derivative 1 in z."""
    quantizer = Residual(Grid(5), 3)
    z = (torch.rand(30, 1) * 2 - 1).requires_grad_()
    out = quantizer(z)
    pieces = parts(quantizer, out.codes)
    expected, left = torch.zeros(()), z.detach()
    for i, piece in enumerate(pieces):
        unit = left * 5**i
        expected = expected + (unit + (z - z.detach()) - piece * 5**i).square().mean() / 3
        left = left - piece
    torch.testing.assert_close(out.losses["commitment"], expected)
    torch.testing.assert_close(gradient_of(out.losses["commitment"], z), gradient_of(expected, z), atol=1e-4, rtol=1e-3)


def test_learned_codebooks_see_the_residual_as_constant():
    stages = codebooks(9, 9, update="gradient", kmeans=False)
    quantizer = Residual(stages)
    z = torch.randn(40, 3, requires_grad=True)
    out = quantizer(z)
    q = [stage.embedding.weight[out.codes[:, i]] for i, stage in enumerate(stages)]
    left = [z.detach(), z.detach() - q[0].detach()]
    expected = torch.stack([(one - target).square().mean() for one, target in zip(q, left)]).mean()
    weights = [stage.embedding.weight for stage in stages]
    ours = torch.autograd.grad(out.losses["codebook"], weights, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, weights))
    assert torch.autograd.grad(out.losses["codebook"], z, allow_unused=True, materialize_grads=True)[0].eq(0).all()


# Prefixes


def test_the_error_falls_with_every_stage_of_a_trained_quantizer():
    quantizer = trained(Residual(codebooks(16, 16, 16, 16)), steps=30).eval()
    z = torch.randn(2000, 3)
    codes = quantizer.encode(z)
    errors = [(quantizer.decode(codes[:, :k]) - z).square().mean().item() for k in range(1, 5)]
    assert all(b < 0.6 * a for a, b in zip(errors, errors[1:])), errors


def test_no_code_ends_the_refinement():
    quantizer = trained(Residual([Residual(codebooks(5, 6)), *codebooks(7)])).eval()
    codes = quantizer.encode(torch.randn(4, 3))
    short = codes.clone()
    short[0, 1:], short[1, 2], short[2, 1] = -1, -1, -1  # the last misses a code of the inner one only
    expected = quantizer.decode(codes)
    expected[0], expected[1] = quantizer.decode(codes[0, :1]), quantizer.decode(codes[1, :2])
    outer, last = cast(Any, quantizer._sequence)
    expected[2] = outer.decode(codes[2, :1]) + last.decode(codes[2, 2:])
    assert torch.equal(quantizer.decode(short), expected)
    after = codes.clone()
    after[3, 0] = -1
    with pytest.raises(ValueError, match=r"0 \.\. \[4, 5, 6\]"):
        quantizer.decode(after)
    flat = trained(Residual(codebooks(5, 6, 7))).eval()
    codes = flat.encode(torch.randn(4, 3))
    assert torch.equal(
        flat.decode(codes * torch.tensor([1, 0, 1]) - torch.tensor([0, 1, 0])), flat.decode(codes[:, :1])
    )
    with pytest.raises(ValueError, match=r"\(\.\.\., 3\) or their first 1, 2, got"):
        flat.decode(codes[:, :0])


# Dropout


@pytest.mark.parametrize("shape", [(3,), (500, 3), (200, 5, 3), (200, 2, 2, 3)])
def test_dropout_keeps_a_prefix_of_each_sample(shape: tuple[int, ...]):
    quantizer = Residual(codebooks(6, 6, 6, 6, kmeans=False), dropout=0.75)
    before = copy.deepcopy(quantizer)
    z = torch.randn(*shape, requires_grad=True)
    out = quantizer(z)
    kept = (out.codes >= 0).sum(dim=-1)
    assert torch.equal(out.codes >= 0, torch.arange(4) < kept[..., None])
    assert (kept >= 1).all()
    if len(shape) > 1:
        rows = kept.view(shape[0], -1)
        assert (rows == rows[:, :1]).all()
        share = torch.bincount(rows[:, 0], minlength=5)[1:] / shape[0]
        torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.1, rtol=0)
    assert torch.equal(before.decode(out.codes), out.latents)
    upstream = torch.randn(*shape)
    assert torch.equal(gradient_of((out.latents * upstream).sum(), z), upstream)
    chosen = out.codes >= 0
    full = [before.decode(out.codes[..., :k]) for k in range(1, 5)]
    errors = torch.stack([(z - one).square().mean(dim=-1) for one in full], dim=-1)
    torch.testing.assert_close(out.losses["commitment"], errors[chosen].mean())
    for i, stage in enumerate(quantizer._sequence):
        assert isinstance(stage, VQ)
        count = torch.bincount(out.codes[..., i][chosen[..., i]].flatten(), minlength=6).float()
        decay = torch.where(count.sum() > 0, 0.99, 1.0)
        torch.testing.assert_close(stage.embedding.count, decay + (1 - decay) * count)


def test_dropout_rests_in_eval_mode_and_encode():
    quantizer = trained(Residual(codebooks(6, 6), dropout=1.0))
    z = torch.randn(50, 3)
    assert (quantizer.encode(z) >= 0).all()
    assert (quantizer(z).codes[:, 1] == -1).all()
    assert (quantizer.eval()(z).codes >= 0).all()


# One stage for all depths


def test_a_shared_codebook_learns_from_all_depths_at_once():
    stage = VQ(12, 3, decay=0.9, kmeans=False, restart=0.0)
    quantizer, book = Residual(stage, 3), stage.embedding
    start = book.weight.clone()
    z = torch.randn(200, 3)
    codes = quantizer(z).codes
    left, count, total = z, torch.zeros(12), torch.zeros(12, 3)
    for i in range(3):
        count.index_add_(0, codes[:, i], torch.ones(200))
        total.index_add_(0, codes[:, i], left)
        left = left - start[codes[:, i]]
    torch.testing.assert_close(book.count, 0.9 + 0.1 * count)
    torch.testing.assert_close(book.total, 0.9 * start + 0.1 * total)


def test_a_shared_codebook_is_initialized_once(monkeypatch: pytest.MonkeyPatch):
    seen = []
    stage = VQ(12, 3)
    monkeypatch.setattr(stage.embedding, "upkeep", lambda tokens, keep: seen.append(tokens))
    z = torch.randn(20, 3)
    Residual(stage, 3)(z)
    assert len(seen) == 1
    assert torch.equal(seen[0], z)


def test_refuses_stages_that_do_not_fit():
    one = VQ(4, 3)
    for arguments, message in [
        (([one, VQ(4, 2)],), r"one dim, got \[3, 2\]"),
        (([one, one],), "holds one quantizer twice"),
        (([],), "at least one"),
        ((one,), "depth >= 1, got None"),
        ((one, 0), "depth >= 1, got 0"),
        (([one, VQ(4, 3)], 2), "stages has 2, got depth=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            Residual(*arguments)
    for dropout, depth in ((1.5, 2), (-0.1, 2), (0.5, 1)):
        with pytest.raises(ValueError, match=f"got {dropout}"):
            Residual(one, depth, dropout=dropout)


# Implicit codebooks


def restless(*arguments: Any, **options: Any) -> QINCo:
    """With a network that does something."""
    stage = QINCo(*arguments, kmeans=False, restart=0.0, **options)
    for parameter in [*stage.concat.parameters(), *stage.contract.parameters()]:
        torch.nn.init.normal_(parameter, std=0.3)
    return stage


def test_the_network_starts_as_the_plain_codebook():
    first, second = codebooks(8)[0], QINCo(16, 3, width=5, restart=0.0)
    quantizer = trained(Residual([first, second])).eval()
    codes = quantizer.encode(torch.randn(30, 3))
    plain = second.embedding.weight[codes[:, 1]] + first.embedding.weight[codes[:, 0]]
    torch.testing.assert_close(quantizer.decode(codes), plain)


def test_qinco_finds_the_nearest_of_the_adapted_codes(monkeypatch: pytest.MonkeyPatch):
    """Tile by tile as the formula in one piece, written with the concatenated pair."""
    stage = restless(16, 3, width=5, blocks=2)
    x, context = torch.randn(41, 3), torch.randn(41, 3)
    c = stage.embedding.weight.expand(41, 16, 3)
    y = c + stage.concat(torch.cat([c, context[:, None].expand_as(c)], dim=-1))
    for expand, contract in zip(stage.expand, stage.contract, strict=True):
        y = y + contract(torch.relu(expand(y)))
    expected = (y - x[:, None]).square().sum(dim=-1).argmin(dim=-1)
    monkeypatch.setattr("latticode.quantizers.implicit.TILE", 16 * 5 * 7)
    assert torch.equal(stage._encode(x, context)[:, 0], expected)
    assert not torch.equal(stage._encode(x)[:, 0], expected)
    torch.testing.assert_close(stage._decode(expected[:, None], context), y[torch.arange(41), expected])


def test_qinco_decodes_to_the_latents_bit_for_bit_and_learns():
    quantizer = Residual([*codebooks(8), restless(16, 3, width=5), restless(16, 3, width=5)])
    z = torch.randn(4, 60, 3, requires_grad=True)
    out = trained(quantizer, steps=1).eval()(z)
    assert torch.equal(quantizer.encode(z), out.codes)
    assert torch.equal(quantizer.decode(out.codes), out.latents)
    assert torch.equal(gradient_of(out.latents.sum(), z), torch.ones_like(z))
    (through,) = torch.autograd.grad(
        out.losses["codebook"], z, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    assert (through == 0).all()  # the context is constant
    later = quantizer._sequence[1:]
    for gradient in torch.autograd.grad(out.losses["codebook"], [p for stage in later for p in stage.parameters()]):
        assert gradient.any()


def test_behind_a_grid_the_context_is_in_the_units_of_the_stage():
    grid, stage = Grid(5, 5, 5), restless(16, 3, width=5)
    codes = Residual([grid, stage]).encode(torch.rand(20, 3))
    coarse = grid.decode(codes[:, :3])
    expected = coarse + stage._decode(codes[:, 3:], coarse * 4) / 4
    torch.testing.assert_close(Residual([grid, stage]).decode(codes), expected)


@pytest.mark.slow
def test_qinco_fits_what_depends_on_the_context():
    """Tokens c (1 +- 1/4) around four corners c: the best two plain codes leave 1/4, QINCo turns its two to each c."""
    corners = torch.tensor([[4.0, 0.0], [0.0, 4.0], [-4.0, 0.0], [0.0, -4.0]])
    first, second = VQ(4, 2, kmeans=False, restart=0.0), QINCo(2, 2, width=16, restart=0.0)
    first.embedding.weight.copy_(corners)
    first.embedding.total.copy_(corners)
    quantizer, error = Residual([first, second]), torch.tensor(torch.inf)
    optimizer = torch.optim.Adam(second.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        tokens = corners.repeat(32, 1) * (1 + (torch.randint(2, (128, 1)) - 0.5) / 2)
        error = quantizer(tokens).losses["codebook"]
        error.backward()
        optimizer.step()
    assert error < 0.03


def test_adapted_broadcasts():
    stage = restless(6, 3, width=4)
    weights = stage._network()
    codes, context = torch.randn(6, 3), torch.randn(5, 1, 3)
    each = torch.stack([adapted(codes, one.expand(6, 3), weights) for one in context])
    torch.testing.assert_close(adapted(codes, context, weights), each)
    for arguments in ((0, 3), (4, 0)):
        with pytest.raises(ValueError, match="must be >= 1"):
            QINCo(*arguments)
    with pytest.raises(ValueError, match="got 1"):
        QINCo(4, 3, restart=1.0)
