"""Quantizers made of quantizers, nested freely; channels first."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from latticode.core import registry
from latticode.quantizers import FSQ, VQ, Quantizer
from latticode.quantizers.binary import LFQ
from latticode.quantizers.compose import ChannelDim, Grouped, Hierarchical, Projected
from latticode.quantizers.implicit import QINCo
from latticode.quantizers.residual import Residual


def vq(size: int, dim: int) -> VQ:
    return VQ(size, dim, restart=0.0)


def rvq(*sizes: int, dim: int) -> Residual:
    return Residual([vq(size, dim) for size in sizes])


def restless(size: int, dim: int) -> QINCo:
    """With a network that does something."""
    stage = QINCo(size, dim, width=8, kmeans=False)
    torch.nn.init.normal_(stage.concat.weight, std=0.3)
    return stage


def rfsq(*levels: int) -> Residual:
    return Residual(FSQ(list(levels), bound="clamp"), 3, soft_clamp=True)


NESTINGS: dict[str, Callable[[], Quantizer]] = {
    "projected-residual": lambda: Projected(rvq(9, 8, 7, dim=4), 11),
    "residual-projected": lambda: Residual([Projected(FSQ([5, 5]), 4), vq(16, 4)]),
    "grouped-residual": lambda: Grouped([rvq(9, 8, dim=2), rfsq(5, 4), FSQ([7])]),
    "grouped-shared-residual": lambda: Grouped(rvq(9, 8, dim=2), 3),
    "residual-grouped": lambda: Residual([Grouped(vq(9, 2), 2), Grouped([vq(5, 3), FSQ([3])]), vq(6, 4)]),
    "residual-of-grids": lambda: Residual([Grouped([rfsq(5), rfsq(3, 2)]), Grouped(FSQ([4], bound="clamp"), 3)]),
    "residual-residual-shared": lambda: Residual(Residual(vq(9, 3), 2), 2),
    "residual-signs": lambda: Residual(LFQ(4, factors=2), 3, soft_clamp=True),
    "hierarchical": lambda: Hierarchical(FSQ([5, 5, 5]), vq(16, 3), 4),
    "hierarchical-residual": lambda: Hierarchical(rvq(9, 8, dim=2), Projected(rfsq(5, 4, 3), 2), 2),
    "hierarchy-of-three": lambda: Hierarchical(Hierarchical(vq(8, 2), vq(8, 2), 2), vq(16, 4), 3),
    "residual-hierarchical": lambda: Residual([Hierarchical(vq(9, 2), vq(8, 2), 2), vq(7, 4)]),
    "implicit": lambda: Projected(Residual([vq(9, 3), QINCo(8, 3, width=8), QINCo(7, 3, width=8, blocks=0)]), 5),
    "implicit-behind-a-grid": lambda: Residual([FSQ([5] * 7), restless(9, 7)]),
    "dropout": lambda: Grouped([Residual(vq(9, 2), 4, dropout=0.5), FSQ([5])]),
}


@pytest.fixture(params=NESTINGS, name="nested")
def _nested(request: pytest.FixtureRequest) -> Quantizer:
    """In training mode, past its first step."""
    quantizer = NESTINGS[request.param]()
    quantizer(torch.randn(100, quantizer.dim))
    return quantizer


def test_decode_of_encode_is_the_latents_of_forward(nested: Quantizer):
    nested.eval()
    for shape in ((), (50,), (2, 3, 4), (0,), (2, 0, 3)):
        z = torch.randn(*shape, nested.dim)
        out = nested(z)
        assert torch.equal(nested.encode(z), out.codes)
        assert torch.equal(nested.decode(out.codes), out.latents)
        assert out.codes.shape == (*shape, len(nested.vocab))
        assert ((out.codes >= 0) & (out.codes < torch.tensor(nested.vocab))).all()


def test_strided_latents_give_the_same_bits(nested: Quantizer):
    nested.eval()
    for z in (torch.randn(2, nested.dim, 4, 3).movedim(1, -1), torch.randn(nested.dim, 9).t()):
        out, plain = nested(z), nested(z.contiguous())
        assert torch.equal(out.latents, plain.latents)
        assert torch.equal(nested.encode(z), plain.codes)
        assert torch.equal(nested.decode(out.codes), out.latents)


def test_codes_decode_to_the_latents_in_training(nested: Quantizer):
    before = copy.deepcopy(nested)
    out = nested(torch.randn(60, nested.dim))
    assert torch.equal(before.decode(out.codes), out.latents)


def test_every_prefix_decodes(nested: Quantizer):
    """To the latents of codes with -1 in all later slots."""
    codes = nested.encode(torch.randn(20, nested.dim))
    for slots in nested._prefixes:
        padded = codes.clone()
        padded[:, slots:] = -1
        assert torch.equal(nested.decode(codes[:, :slots]), nested.decode(padded))
    for slots in set(range(len(nested.vocab))) - set(nested._prefixes):
        with pytest.raises(ValueError, match=rf"codes \(\.\.\., {len(nested.vocab)}\)"):
            nested.decode(codes[:, :slots])


def test_codes_outside_the_vocabulary_are_refused(nested: Quantizer):
    codes = nested.encode(torch.randn(3, nested.dim))
    for slot, (size, least) in enumerate(zip(nested.vocab, nested._lowest, strict=True)):
        for wrong in (size, least - 1):
            bad = codes.clone()
            bad[1, slot] = wrong
            with pytest.raises(ValueError, match=str(wrong)):
                nested.decode(bad)


def test_padding_and_broken_tokens_touch_nothing(nested: Quantizer):
    torch.manual_seed(1)
    z = torch.randn(40, nested.dim)
    mask = torch.arange(40) < 30
    z[~mask], z[3, 0] = torch.nan, torch.inf
    good = mask & (torch.arange(40) != 3)
    twin = copy.deepcopy(nested)
    for module in (*nested.modules(), *twin.modules()):
        if isinstance(module, Residual):
            module.dropout = 0.0  # its draws depend on how many tokens there are
    z.requires_grad_()
    out, expected = nested(z, mask), twin(z[good])
    assert (out.codes[~good] == -1).all()
    assert (out.latents[~mask] == 0).all()
    assert out.latents[3].isnan().all()
    assert torch.equal(out.codes[good], expected.codes)
    torch.testing.assert_close(dict(out.losses), dict(expected.losses))
    for key, value in nested.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[key])
    (gradient,) = torch.autograd.grad(out.latents[good].sum() + sum(out.losses.values()), z)
    assert gradient.isfinite().all()
    assert (gradient[~good] == 0).all()


def test_precision_is_float32_whatever_comes(nested: Quantizer):
    nested.eval()
    z = torch.randn(50, nested.dim).bfloat16()
    codes = nested.encode(z.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(nested.encode(z), codes)
        assert nested(z).latents.dtype == torch.bfloat16
    cast = copy.deepcopy(nested).bfloat16()
    out = cast(z)
    assert torch.equal(cast.encode(z), out.codes)
    assert torch.equal(cast.decode(out.codes), out.latents)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.slow
def test_one_graph(nested: Quantizer, training: bool):
    torch._dynamo.reset()
    nested.train(training)
    twin = copy.deepcopy(nested)
    z = torch.randn(30, nested.dim)
    torch.manual_seed(2)
    out = torch.compile(nested, backend="aot_eager", fullgraph=True)(z)
    torch.manual_seed(2)
    expected = twin(z)
    assert torch.equal(out.codes, expected.codes)
    torch.testing.assert_close(out.latents, expected.latents)
    torch.testing.assert_close(dict(out.losses), dict(expected.losses))


def test_a_spec_and_a_state_rebuild_it(nested: Quantizer):
    spec = registry.spec_of(nested)
    twin = registry.build(spec)
    assert registry.spec_of(twin) == spec
    twin.load_state_dict(nested.state_dict())
    z = torch.randn(20, nested.dim)
    assert torch.equal(twin.eval()(z).latents, nested.eval()(z).latents)


def test_bits_and_vocab_are_those_of_the_parts():
    assert NESTINGS["residual-grouped"]().vocab == (9, 9, 5, 3, 6)
    assert NESTINGS["hierarchical"]().vocab == (125, 16, 16, 16, 16)
    assert NESTINGS["hierarchical"]().bits == pytest.approx(FSQ([5, 5, 5]).bits + 16)


def test_groups_keep_the_reach_and_contraction_of_their_channels():
    quantizer = Residual(Grouped([FSQ([5], bound="clamp"), vq(7, 1), FSQ([2, 3], bound="clamp")]), 2)
    torch.testing.assert_close(torch.tensor(quantizer.reach), torch.tensor([5 / 4, torch.inf, 2.0, 3 / 2]))
    torch.testing.assert_close(torch.tensor(quantizer.contraction), torch.tensor([1 / 25, 1.0, 1 / 4, 1 / 9]))
    assert Projected(quantizer, 4).reach == [torch.inf] * 4


# Projected


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return x @ layer.weight.t() + layer.bias


def test_projected_is_the_quantizer_between_two_maps():
    inner = vq(16, 3)
    quantizer = Projected(inner, 5)
    quantizer(torch.randn(100, 5))
    inner = copy.deepcopy(inner)
    z = torch.randn(30, 5, requires_grad=True)
    out = quantizer(z)
    expected = inner(linear(z, quantizer.project_in))
    assert torch.equal(out.codes, expected.codes)
    torch.testing.assert_close(out.latents, linear(expected.latents, quantizer.project_out))
    torch.testing.assert_close(out.losses["commitment"], expected.losses["commitment"])
    weights = [z, *quantizer.parameters()]
    upstream = torch.randn(30, 5)
    ours = torch.autograd.grad((out.latents * upstream).sum() + out.losses["commitment"], weights)
    there = (linear(expected.latents, quantizer.project_out) * upstream).sum() + expected.losses["commitment"]
    torch.testing.assert_close(ours, torch.autograd.grad(there, weights))


def test_a_projection_does_not_depend_on_the_layout():
    """To the last bit, although a matrix product rounds by it."""
    quantizer, z = Projected(vq(16, 8), 12), torch.randn(12, 200).t()
    assert torch.equal(quantizer._project_in(z), quantizer._project_in(z.contiguous()))


def test_losses_reach_z_through_a_projection_of_a_later_stage():
    """Behind a straight-through stage the latents that come in have no gradient; the losses' target has."""
    first, second = vq(4, 3), Projected(vq(8, 2), 3)
    quantizer = Residual([first, second])
    quantizer(torch.randn(100, 3))
    before, inner = copy.deepcopy(first).eval(), copy.deepcopy(second.quantizer).eval()
    z = torch.randn(30, 3, requires_grad=True)
    out = quantizer(z)
    left = z - before(z).latents.detach()
    projected = linear(left, second.project_in)
    expected = (left.square().mean() + (projected - inner(projected).latents.detach()).square().mean()) / 2
    inputs = [z, second.project_in.weight]
    ours = torch.autograd.grad(out.losses["commitment"], inputs)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, inputs))


# Grouped


def test_groups_are_quantized_apart():
    pieces = [vq(6, 2), FSQ([5, 4, 3]), rvq(4, 5, dim=1)]
    quantizer = Grouped(pieces)
    quantizer(torch.randn(50, 6))
    twins = copy.deepcopy(pieces)
    z = torch.randn(4, 10, 6)
    out, each = quantizer(z), [twin(run) for twin, run in zip(twins, z.split([2, 3, 1], dim=-1), strict=True)]
    assert torch.equal(out.latents, torch.cat([one.latents for one in each], dim=-1))
    assert torch.equal(out.codes, torch.cat([one.codes for one in each], dim=-1))
    # One loss of 40 tokens and one of two times 40.
    expected = (each[0].losses["commitment"] + 2 * each[2].losses["commitment"]) / 3
    torch.testing.assert_close(out.losses["commitment"], expected)
    for one, twin in zip(pieces, twins, strict=True):
        for key, value in one.state_dict().items():
            assert torch.equal(value, twin.state_dict()[key])


def test_a_shared_group_learns_from_all_runs_at_once():
    shared = vq(6, 2)
    quantizer, twin = Grouped(shared, 3), copy.deepcopy(shared)
    z = torch.randn(50, 6)
    torch.manual_seed(1)
    out = quantizer(z)
    torch.manual_seed(1)
    expected = twin(z.view(150, 2))
    assert torch.equal(out.latents, expected.latents.view(50, 6))
    assert torch.equal(out.codes, expected.codes.view(50, 3))
    for key, value in shared.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key])


# Hierarchical


def test_the_bottom_refines_each_child_of_the_top():
    quantizer = Hierarchical(vq(8, 2), vq(9, 2), 3)
    quantizer(torch.randn(200, 6))
    before = copy.deepcopy(quantizer)
    z = torch.randn(40, 6, requires_grad=True)
    out = quantizer(z)
    children = z.view(40, 3, 2)
    coarse = before.top.decode(before.top.encode(children.mean(dim=1)))
    fine = before.bottom.decode(before.bottom.encode(children - coarse[:, None]))
    torch.testing.assert_close(out.latents.view(40, 3, 2), coarse[:, None] + fine)
    assert torch.equal(before.decode(out.codes[:, :1]), coarse.repeat(1, 3))
    partial = out.codes.clone()
    partial[:, 2] = -1
    torch.testing.assert_close(before.decode(partial).view(40, 3, 2)[:, 1], coarse)
    # One identity to the latents, and the derivative 1 to the losses at both levels.
    upstream = torch.randn(40, 6)
    (gradient,) = torch.autograd.grad((out.latents * upstream).sum(), z, retain_graph=True)
    torch.testing.assert_close(gradient, upstream)
    top, bottom = (children.mean(dim=1) - coarse).square(), (children - coarse[:, None] - fine).square()
    expected = (top.sum() + bottom.sum()) / (40 * 4 * 2)
    torch.testing.assert_close(out.losses["commitment"], expected)
    (ours,) = torch.autograd.grad(out.losses["commitment"], z)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, z)[0])


def test_refuses_parts_that_do_not_fit():
    one = vq(4, 2)
    for make, message in [
        (lambda: Projected(one, 0), "got 0"),
        (lambda: Grouped(one), "groups >= 1, got None"),
        (lambda: Grouped([one], 2), "got groups=2"),
        (lambda: Grouped([one, one]), "holds one quantizer twice"),
        (lambda: Hierarchical(one, vq(4, 3), 2), "got 2 and 3"),
        (lambda: Hierarchical(one, one, 2), "two quantizers"),
        (lambda: Hierarchical(one, vq(4, 2), 0), "got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()


# ChannelDim


def test_channel_dim_is_the_quantizer_in_another_layout():
    inner = FSQ([5, 4, 3])
    z, mask = torch.randn(2, 3, 4, 5, requires_grad=True), torch.rand(2, 4, 5) < 0.5
    module, moved = ChannelDim(inner), z.movedim(1, -1)
    out, expected = module(z, mask), inner(moved, mask)
    assert torch.equal(out.latents.movedim(1, -1), expected.latents)
    assert torch.equal(out.codes, expected.codes)
    assert torch.equal(module.encode(z, mask), expected.codes)
    assert torch.equal(module.decode(inner.encode(moved)), inner(moved).latents.movedim(-1, 1))
    assert torch.equal(ChannelDim(inner, -2)(z.transpose(1, 2)).codes, inner(moved).codes)


def test_channel_dim_copies_nothing():
    """What the quantizer gets and gives are views; its latents in channels-last memory are channels-last images."""
    seen: list[Tensor] = []
    inner = vq(4, 3)
    inner.register_forward_hook(lambda module, inputs, out: seen.extend([inputs[0], out.latents]))
    z = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    out = ChannelDim(inner.eval())(z)
    assert seen[0].data_ptr() == z.data_ptr()
    assert seen[1].data_ptr() == out.latents.data_ptr()
    assert out.latents.is_contiguous(memory_format=torch.channels_last)
