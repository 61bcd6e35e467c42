"""The transformer against torch's own layers with the same weights, and decoding against the whole sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.nn.rotary import grid_coordinates, rotary_table, rotated
from latticode.nn.transformer import Attention, Block, CrossAttention, Transformer

WIDTH, HEADS, LENGTH = 24, 3, 7


def randomise(module: nn.Module) -> None:
    """Weights far from their initial values, so that a forgotten bias or norm shows."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)


def reference(block: Block, mlp: float) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, int(WIDTH * mlp), dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    pairs = {
        "self_attn.in_proj_": block.attention.qkv,
        "self_attn.out_proj.": block.attention.out,
        "linear1.": block.mlp.up,
        "linear2.": block.mlp.down,
        "norm1.": block.norm1,
        "norm2.": block.norm2,
    }
    layer.load_state_dict(
        {name + key: value for name, part in pairs.items() for key, value in part.state_dict().items()}
    )
    return layer


@pytest.mark.parametrize("mlp", [4.0, 2.5])
@pytest.mark.parametrize("causal", [False, True])
def test_block_equals_torch_encoder_layer(mlp: float, causal: bool):
    block = Block(WIDTH, HEADS, mlp)
    randomise(block)
    layer = reference(block, mlp)
    x = torch.randn(2, LENGTH, WIDTH)
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH) if causal else None
    expected = layer(x, src_mask=mask, is_causal=causal)
    torch.testing.assert_close(block(x, is_causal=causal), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block(x, mask), expected, atol=1e-5, rtol=1e-5)


def test_gradients_equal_torch_encoder_layer():
    block = Block(WIDTH, HEADS)
    randomise(block)
    layer = reference(block, 4.0)
    x = torch.randn(2, LENGTH, WIDTH, requires_grad=True)
    (ours,) = torch.autograd.grad(block(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


def decoder_reference(block: Block, context: int) -> nn.TransformerDecoderLayer:
    """`context` is the block's width: torch's layer keeps keys and values in one matrix with the queries."""
    layer = nn.TransformerDecoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    cross = block.cross_attention
    assert cross is not None
    assert block.norm_context is not None
    assert cross.kv.in_features == context == WIDTH
    pairs = {
        "self_attn.in_proj_": block.attention.qkv,
        "self_attn.out_proj.": block.attention.out,
        "multihead_attn.out_proj.": cross.out,
        "linear1.": block.mlp.up,
        "linear2.": block.mlp.down,
        "norm1.": block.norm1,
        "norm2.": block.norm_context,
        "norm3.": block.norm2,
    }
    state = {name + key: value for name, part in pairs.items() for key, value in part.state_dict().items()}
    state["multihead_attn.in_proj_weight"] = torch.cat([cross.q.weight, cross.kv.weight])
    state["multihead_attn.in_proj_bias"] = torch.cat([cross.q.bias, cross.kv.bias])
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_block_with_a_context_equals_torch_decoder_layer(causal: bool, masked: bool):
    block = Block(WIDTH, HEADS, context=WIDTH)
    randomise(block)
    layer = decoder_reference(block, WIDTH)
    x, states = torch.randn(2, LENGTH, WIDTH), torch.randn(2, 5, WIDTH)
    there = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 0, 1]]).bool() if masked else None
    expected = layer(
        x,
        states,
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(LENGTH) if causal else None,
        tgt_is_causal=causal,
        memory_key_padding_mask=None if there is None else ~there,
    )
    got = block(x, is_causal=causal, context=states, context_mask=there)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_context_of_another_width_equals_torch_attention():
    """torch has no decoder layer for that, but its attention takes keys and values of their own widths."""
    cross = CrossAttention(WIDTH, 10, HEADS)
    randomise(cross)
    peer = nn.MultiheadAttention(WIDTH, HEADS, kdim=10, vdim=10, batch_first=True)
    k, v = cross.kv.weight.chunk(2)
    state = {"q_proj_weight": cross.q.weight, "k_proj_weight": k, "v_proj_weight": v}
    state["in_proj_bias"] = torch.cat([cross.q.bias, cross.kv.bias])
    state |= {f"out_proj.{key}": value for key, value in cross.out.state_dict().items()}
    peer.load_state_dict(state)
    x, states = torch.randn(2, LENGTH, WIDTH), torch.randn(2, 5, 10)
    torch.testing.assert_close(cross(x, states), peer(x, states, states)[0], atol=1e-5, rtol=1e-5)


def test_masked_states_and_their_order_do_not_matter():
    transformer = Transformer(WIDTH, depth=2, heads=HEADS, context=10)
    randomise(transformer)
    x, states, order = torch.randn(2, LENGTH, WIDTH), torch.randn(2, 5, 10), torch.randperm(5)
    there = torch.tensor([[1, 1, 1, 0, 0]] * 2).bool()
    expected = transformer(x, context=states[:, :3])
    torch.testing.assert_close(transformer(x, context=states, context_mask=there), expected)
    shuffled = transformer(x, context=states[:, order], context_mask=there[:, order])
    torch.testing.assert_close(shuffled, expected)
    assert not torch.allclose(transformer(x, context=states), expected)


def test_a_transformer_without_a_context_has_the_weights_it_had():
    plain, told = (set(Transformer(WIDTH, 1, HEADS, context=width).state_dict()) for width in (0, 10))
    assert not {name for name in plain if "context" in name or "cross" in name}
    assert plain < told
    variance = [
        dict(Transformer(96, 8, HEADS, context=width).named_parameters())["blocks.0.mlp.down.weight"].var().item()
        for width in (0, 10)
    ]
    assert variance[1] / variance[0] == pytest.approx(2 / 3, rel=0.05), "three branches of a block add up, not two"


def test_bidirectional_attention_commutes_with_permutations():
    transformer = Transformer(WIDTH, depth=2, heads=HEADS)
    x, order = torch.randn(2, LENGTH, WIDTH), torch.randperm(LENGTH)
    torch.testing.assert_close(transformer(x[:, order]), transformer(x)[:, order])


def test_causal_outputs_ignore_the_future():
    transformer = Transformer(WIDTH, depth=2, heads=HEADS)
    randomise(transformer)
    x = torch.randn(2, LENGTH, WIDTH)
    whole = transformer(x, is_causal=True)
    torch.testing.assert_close(transformer(x[:, :4], is_causal=True), whole[:, :4])
    assert not torch.allclose(transformer(x[:, :4]), transformer(x)[:, :4])


def test_dropout_acts_in_training_only():
    transformer = Transformer(WIDTH, depth=1, heads=HEADS, dropout=0.5)
    x = torch.randn(2, LENGTH, WIDTH)
    assert not torch.equal(transformer(x), transformer(x))
    transformer.eval()
    assert torch.equal(transformer(x), transformer(x))


# --- rotary positions


def test_rotation_is_that_of_the_paper():
    """As complex numbers: pair i of a vector at position m times exp(1j m base^(-2i / E)), equations 14 and 15."""
    x = torch.randn(2, HEADS, LENGTH, 8, dtype=torch.float64)
    angles = torch.arange(LENGTH)[:, None] * 10000.0 ** (-2 * torch.arange(4, dtype=torch.float64) / 8)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)
    table = rotary_table(grid_coordinates([LENGTH]), 8)
    assert table.shape == (LENGTH, 2, 4)
    torch.testing.assert_close(rotated(x, table), torch.view_as_real(turned).flatten(-2), atol=1e-6, rtol=0)


@pytest.mark.parametrize("grid", [[9], [5, 4], [3, 2, 4]])
def test_scores_depend_on_distances_along_each_axis_alone(grid: list[int]):
    cells = grid_coordinates(grid)
    assert [tuple(cell) for cell in cells.tolist()] == [tuple(i) for i in torch.ones(grid).nonzero().tolist()]
    q, k = torch.randn(2, 12)

    def scores(coordinates: Tensor) -> Tensor:
        table = rotary_table(coordinates, 12)
        a, b = (rotated(v.expand(1, 1, len(cells), 12), table)[0, 0] for v in (q, k))
        return a @ b.T

    here = scores(cells)
    torch.testing.assert_close(scores(cells + torch.arange(7, 7 + len(grid))), here, atol=1e-4, rtol=1e-4)
    offsets = cells[:, None] - cells
    for i, j in [(0, 1), (1, 0), (2, 1)]:
        same = (offsets == offsets[i, j]).all(-1)
        torch.testing.assert_close(here[same], here[i, j].expand(int(same.sum())), atol=1e-5, rtol=1e-5)
    assert len((here / 1e-4).round().unique()) > 0.9 * len(offsets.flatten(0, 1).unique(dim=0))


def test_pairs_must_divide_among_the_axes():
    with pytest.raises(ValueError, match=r"head width divisible by 4 \(2 per axis\), got 6"):
        rotary_table(grid_coordinates([3, 3]), 6)


def test_llama_block_equals_its_formula():
    block: Any = Block(WIDTH, HEADS, 3.0, style="llama")
    randomise(block)
    assert [name for name, _ in block.named_parameters() if name.endswith("bias")] == []
    x, table = torch.randn(2, LENGTH, WIDTH), rotary_table(grid_coordinates([LENGTH]), WIDTH // HEADS)

    def norm(v: Tensor, weight: Tensor) -> Tensor:
        return v / (v.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    q, k, v = block.attention.qkv(norm(x, block.norm1.weight)).view(2, LENGTH, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    scores = rotated(q, table) @ rotated(k, table).mT / (WIDTH // HEADS) ** 0.5
    scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
    y = x + block.attention.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    normed = norm(y, block.norm2.weight)
    expected = y + block.mlp.down(F.silu(block.mlp.gate(normed)) * block.mlp.up(normed))
    torch.testing.assert_close(block(x, is_causal=True, rotary=table), expected, atol=1e-5, rtol=1e-5)
    assert block.mlp.up.out_features == 2 * WIDTH, "2 / 3 of 3 times the width"


# --- decoding


def steps_of(*sizes: int) -> Iterator[Tensor]:
    yield from torch.arange(sum(sizes)).split(sizes)


@pytest.mark.parametrize("style", ["gpt", "llama"])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("sizes", [(1,) * LENGTH, (4, 1, 2), (LENGTH,)])
def test_steps_equal_the_whole_sequence(style: str, rotary: bool, sizes: tuple[int, ...]):
    transformer = Transformer(WIDTH, depth=3, heads=HEADS, style=style).eval()
    randomise(transformer)
    x = torch.randn(2, LENGTH, WIDTH)
    table = rotary_table(grid_coordinates([LENGTH + 2]), WIDTH // HEADS) if rotary else None
    with torch.no_grad():
        expected = transformer(x, is_causal=True, rotary=table)
        cache = transformer.cache(2, LENGTH + 2)  # a longer one than is needed
        assert cache.shape == (3, 2, 2, HEADS, LENGTH + 2, WIDTH // HEADS)
        got = torch.cat([transformer.step(x[:, at], cache, at, table) for at in steps_of(*sizes)], dim=1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert (cache[..., LENGTH:, :] == 0).all()
    assert (cache[..., :LENGTH, :] != 0).all()


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_steps_with_a_context_equal_the_whole_sequence(style: str):
    transformer = Transformer(WIDTH, depth=3, heads=HEADS, style=style, context=10).eval()
    randomise(transformer)
    assert style == "gpt" or not [name for name, _ in transformer.named_parameters() if name.endswith("bias")]
    x, states = torch.randn(2, LENGTH, WIDTH), torch.randn(2, 5, 10)
    told = {"context": states, "context_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 1]]).bool()}
    with torch.no_grad():
        expected = transformer(x, is_causal=True, **told)
        cache = transformer.cache(2, LENGTH)
        got = torch.cat([transformer.step(x[:, at], cache, at, **told) for at in steps_of(4, 1, 2)], dim=1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_step_looks_at_nothing_ahead():
    """What an earlier sequence has left in the cache behind the present position is not seen, to the bit."""
    transformer = Transformer(WIDTH, depth=2, heads=HEADS).eval()
    x, first = torch.randn(2, 3, WIDTH), torch.arange(3)
    with torch.no_grad():
        clean, used = transformer.cache(2, LENGTH), transformer.cache(2, LENGTH).normal_()
        assert torch.equal(transformer.step(x, clean, first), transformer.step(x, used, first))


@pytest.mark.slow
def test_a_sequence_is_decoded_by_one_compiled_graph():
    transformer = Transformer(WIDTH, depth=2, heads=HEADS).eval()
    table = rotary_table(grid_coordinates([LENGTH]), WIDTH // HEADS)
    graphs = torch._dynamo.testing.CompileCounter()
    step = torch.compile(transformer.step, backend=graphs, fullgraph=True)
    x = torch.randn(2, LENGTH, WIDTH)
    with torch.no_grad():
        cache = transformer.cache(2, LENGTH)
        got = torch.cat([step(x[:, at], cache, at, table) for at in steps_of(*[1] * LENGTH)], dim=1)
        torch.testing.assert_close(got, transformer(x, is_causal=True, rotary=table), atol=1e-5, rtol=1e-5)
    assert graphs.frame_count == 1


def test_decoding_works_in_half_precision():
    transformer = Transformer(WIDTH, depth=2, heads=HEADS).eval()
    table = rotary_table(grid_coordinates([LENGTH]), WIDTH // HEADS)
    x, cache = torch.randn(2, LENGTH, WIDTH), transformer.cache(2, LENGTH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = torch.cat([transformer.step(x[:, at], cache, at, table) for at in steps_of(3, 4)], dim=1)
    torch.testing.assert_close(got.float(), transformer(x, is_causal=True, rotary=table), atol=0.1, rtol=0.05)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="width 24 and heads 5"):
        Attention(24, 5)
    with pytest.raises(ValueError, match="depth must be >= 1, got 0"):
        Transformer(24, 0, 3)
    with pytest.raises(ValueError, match="unknown style 'bert' of a transformer; valid: gpt, llama"):
        Transformer(24, 1, 3, style="bert")
    told, states = Transformer(24, 1, 3, context=10), torch.randn(1, 4, 8)
    for call in (lambda: told(states), lambda: told.step(states, told.cache(1, 4), torch.arange(4))):
        with pytest.raises(ValueError, match=r"a context of width 10 \(0 = none\), got 0"):
            call()
    with pytest.raises(ValueError, match=r"a context of width 0 \(0 = none\), got 8"):
        Transformer(24, 1, 3)(torch.randn(1, 4, 24), context=states)
