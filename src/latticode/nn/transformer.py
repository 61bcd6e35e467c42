"""A pre-norm transformer. B batch, L sequence, D width, H heads, E = D / H width of a head.

Norms come before attention and MLP, so the residual stream is an identity path from embedding to output and a fast run
needs no long warm-up (2002.04745). BERT and MaskGIT put them after: about as good at a learning rate of 1e-3 in our toy
runs, but with this initialisation it did not train at 3e-3, where this layout gained (docs/log.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention with one fused projection. Dropout is on the output only, because the fused CPU kernels take
    none on the attention weights and the plain path is several times slower.

    `mask` is True (or 0.0) where attending is allowed (False or -inf where not) and broadcasts to (B, H, L, L).
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide the width, got width {width} and heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
        qkv_BLH3E = self.qkv(x_BLD).unflatten(-1, (3, self.heads, -1))
        q_BHLE, k_BHLE, v_BHLE = qkv_BLH3E.permute(2, 0, 3, 1, 4).unbind(0)
        y_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, attn_mask=mask, is_causal=is_causal)
        return self.dropout(self.out(y_BHLE.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two linear layers around a GELU; `ratio` is hidden width over width."""

    def __init__(self, width: int, ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = round(width * ratio)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.dropout(self.down(F.gelu(self.up(x_BLD))))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mlp, dropout)

    def forward(self, x_BLD: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), mask, is_causal=is_causal)
        return x_BLD + self.mlp(self.norm2(x_BLD))


class Transformer(nn.Module):
    """`depth` blocks and a final norm."""

    def __init__(self, width: int, depth: int, heads: int, mlp: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be >= 1, got {depth}")
        self.blocks = nn.ModuleList(Block(width, heads, mlp, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.apply(initialise)
        with torch.no_grad():  # 2 * depth branches add up in the stream: keep its variance independent of depth (GPT-2)
            for name, weight in self.named_parameters():
                if name.endswith(("attention.out.weight", "mlp.down.weight")):
                    weight.mul_((2 * depth) ** -0.5)

    def forward(self, x_BLD: Tensor, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
        for block in self.blocks:
            x_BLD = block(x_BLD, mask, is_causal=is_causal)
        return self.norm(x_BLD)


def initialise(module: nn.Module) -> None:
    """Weights N(0, 1 / inputs) and zero biases of a linear layer; for `nn.Module.apply`.

    BERT's fixed 0.02 is made for its width of 768 and starves narrow networks: at width 64, depth 6 and 200 steps it
    cost 0.17 bits per token on a toy prior.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(module.bias)
