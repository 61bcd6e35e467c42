"""The transformer against torch's own layers with the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from latticode.nn.transformer import Attention, Block, Transformer

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


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="width 24 and heads 5"):
        Attention(24, 5)
    with pytest.raises(ValueError, match="depth must be >= 1, got 0"):
        Transformer(24, 0, 3)
