"""Laws of error feedback: of channels to later ones in an FSQ, of positions to their neighbours in a tokenizer."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from helpers import FSQ_SPEC, VQ_SPEC, tokenizer_spec
from latticode import FSQ, Tokenizer
from latticode.core.registry import build
from latticode.quantizers.residual import Residual
from latticode.tokenizers import tiling


def shear(fsq: FSQ, rows: Tensor) -> FSQ:
    """`fsq` with the strictly lower triangle of `rows` (D, D) as its F."""
    for i, row in enumerate(fsq.shear, 1):
        row.data.copy_(rows[i, :i])
    return fsq


@pytest.mark.parametrize("bound", ["paper", "symmetric", "equal-bins", "clamp"])
def test_without_weights_feedback_changes_nothing(bound: str) -> None:
    z = torch.randn(500, 3)
    plain, fed = FSQ([8, 6, 5], bound), FSQ([8, 6, 5], bound, feedback=True)
    assert torch.equal(fed(z).codes, plain(z).codes)
    assert torch.equal(fed(z).latents, plain(z).latents)


def test_each_channel_is_moved_by_the_errors_of_those_before_it() -> None:
    rows = torch.tensor([[0.0, 0.0, 0.0], [0.7, 0.0, 0.0], [-0.4, 1.3, 0.0]])
    fsq, z = shear(FSQ([8, 6, 5], "clamp", feedback=True), rows), torch.rand(400, 3) * 1.6 - 0.8
    errors: list[Tensor] = []
    for i, level in enumerate(fsq.levels):
        moved = z[:, i] + sum(rows[i, j] * errors[j] for j in range(i))
        errors.append(((moved.clamp(-1, 1) + 1) * (level - 1) / 2).round() * 2 / (level - 1) - 1 - moved.clamp(-1, 1))
    expected = torch.stack([z[:, i] + sum(rows[i, j] * errors[j] for j in range(i)) for i in range(3)], 1)
    assert torch.equal(fsq(z).codes, FSQ([8, 6, 5], "clamp")(expected).codes)
    assert not torch.equal(fsq(z).codes, FSQ([8, 6, 5], "clamp")(z).codes)


def test_in_the_right_basis_it_is_the_nearest_plane() -> None:
    """For a linear decoder B, F makes the columns of B (I + F) orthogonal: then the error is the least that deciding
    channel after channel can reach, the sum of their squares times step^2 / 12, and below that of rounding."""
    torch.manual_seed(0)
    basis, step = torch.randn(4, 4).double(), 2 / 1000
    rows = torch.zeros(4, 4).double()
    for j in range(3):
        rows[j + 1 :, j] = -torch.linalg.lstsq(basis[:, j + 1 :], basis[:, j]).solution
    z = torch.rand(200_000, 4) - 0.5

    def error(fsq: FSQ) -> float:
        return ((fsq(z).latents - z).double() @ basis.T).square().sum(1).mean().item()

    levels = [1001] * 4
    told = error(shear(FSQ(levels, "clamp", feedback=True), rows.float()))
    orthogonal = basis @ (torch.eye(4) + rows)
    assert told == pytest.approx(orthogonal.square().sum().item() * step**2 / 12, rel=0.01)
    assert error(FSQ(levels, "clamp")) == pytest.approx(basis.square().sum().item() * step**2 / 12, rel=0.01)
    assert told < 0.85 * error(FSQ(levels, "clamp"))


def test_what_the_decoder_loses_finds_the_basis() -> None:
    """Trained by the squared error of a fixed decoder alone, the columns of B (I + F) become orthogonal."""
    torch.manual_seed(0)
    basis = torch.tensor([[1.0, 0.8], [0.0, 0.6]])  # F should be -<b0, b1> / |b1|^2 = -0.8
    fsq = FSQ([9, 9], "clamp", feedback=True)
    optimizer = torch.optim.Adam(fsq.parameters(), 0.02)
    for _ in range(200):
        z = torch.rand(512, 2) * 1.6 - 0.8
        optimizer.zero_grad()
        ((fsq(z).latents - z) @ basis.T).square().sum(1).mean().backward()
        optimizer.step()
    assert fsq.shear[0].item() == pytest.approx(-0.8, abs=0.05)


def test_a_residual_quantizer_decodes_what_its_stages_are_told() -> None:
    residual = Residual(FSQ([5, 5], "clamp", feedback=True), depth=3)
    shear(residual.stages, torch.tensor([[0.0, 0.0], [0.9, 0.0]]))  # type: ignore[arg-type]
    z = torch.randn(300, 2) / 2
    out = residual.eval()(z)
    torch.testing.assert_close(residual.decode(out.codes), out.latents)
    assert not torch.equal(out.codes, Residual(FSQ([5, 5], "clamp"), depth=3).eval()(z).codes)


# --- positions


class Keep(nn.Module):
    """As an encoder and as a decoder the identity, on any number of axes."""

    latent, in_channels, out_channels, stride, lead = 2, 2, 2, 1, 0

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x


def told(axes: int) -> Tokenizer:
    """Quantizes what it is given, two channels, with random weights of neighbours."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(Keep(axes), FSQ([5, 4], "clamp"), Keep(axes), feedback=True)
    nn.init.uniform_(tokenizer.neighbours.weight, -1, 1)
    tokenizer.quant_conv = tokenizer.post_quant_conv = nn.Identity()
    return tokenizer.eval()


@torch.no_grad()
@pytest.mark.parametrize("size", [(7,), (4, 5), (1, 3), (3, 2, 4)])
def test_every_second_position_is_moved_by_its_neighbours(size: tuple[int, ...]) -> None:
    axes = len(size)
    tokenizer, x = told(axes), torch.rand(2, 2, *size) * 2 - 1
    z, plain = x.movedim(1, -1), tokenizer.quantizer(x.movedim(1, -1)).latents
    weight = tokenizer.neighbours.weight.view(2, 2 * axes, 2)
    expected = z.clone()
    for place in itertools.product(*map(range, size)):
        if sum(place) % 2:
            for axis, (k, by) in itertools.product(range(axes), enumerate((-1, 1))):
                other = [n + by * (a == axis) for a, n in enumerate(place)]
                if 0 <= other[axis] < size[axis]:
                    at = (slice(None), *other)
                    expected[(slice(None), *place)] += (plain - z)[at] @ weight[:, 2 * axis + k].T
    codes = tokenizer.encode(x)
    assert torch.equal(codes, tokenizer.quantizer.encode(expected))
    assert (codes != tokenizer.quantizer.encode(z)).any() or size == (1, 3)
    assert torch.equal(tokenizer(x).output, tokenizer.decode(codes))


@pytest.mark.parametrize("quantizer", [FSQ_SPEC, FSQ_SPEC | {"feedback": True}, VQ_SPEC])
def test_the_weights_of_neighbours_learn(quantizer: dict) -> None:
    tokenizer = build(tokenizer_spec(quantizer) | {"feedback": True, "gain": 8.0})
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    before = tokenizer(x).output
    (before - x).square().mean().backward()
    assert (tokenizer.neighbours.weight.grad != 0).any()
    assert not (tokenizer.neighbours.weight != 0).any(), "at first nobody is told anything"


def test_a_broken_position_breaks_no_other_one() -> None:
    tokenizer = told(2).train()
    x = torch.rand(1, 2, 6, 6)
    broken = x.clone()
    broken[0, :, 2, 2] = torch.nan
    result = tokenizer(broken).output.isnan().any(1)
    assert result.sum() == 1


@torch.no_grad()
def test_tiles_keep_the_turns_of_the_whole() -> None:
    tokenizer = told(2)
    x = torch.rand(1, 2, 37, 24) * 2 - 1
    codes = tokenizer.encode(x)
    for tile, overlap in ((8, 4), (10, 2), (12, 6), (24, 2)):
        assert torch.equal(tiling.encode(tokenizer, x, tile, overlap), codes)
    with pytest.raises(ValueError, match=r"tile must be a multiple of 2, .* got tile 9"):
        tiling.encode(tokenizer, x, 9, 4)
    assert torch.equal(tiling.encode(tokenizer, x, 16), codes), "a reach that is unknown"
    tokenizer.encoder.reach = 0  # type: ignore[assignment]
    assert torch.equal(tiling.encode(tokenizer, x, 16), codes), "what a neighbour is told counts into the reach"
