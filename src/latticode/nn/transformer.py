"""A pre-norm transformer. B batch, L sequence, M new positions, D width, H heads, E = D / H width of a head.

Norms come before attention and MLP, so the residual stream is an identity path from embedding to output and a fast run
needs no long warm-up (2002.04745). BERT and MaskGIT put them after: about as good at a learning rate of 1e-3 in our toy
runs, but with this initialisation it did not train at 3e-3, where this layout gained (docs/log.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.nn.rotary import rotated

STYLES = ("gpt", "llama")


class Past(NamedTuple):
    """What one attention layer keeps of a sequence that is still being decoded, and where its next tokens go."""

    keys: Tensor  # (B, H, L, E), written in place
    values: Tensor
    at: Tensor  # (M,) int64


class Attention(nn.Module):
    """Multi-head attention with one fused projection. Dropout is on the output only, because the fused CPU kernels take
    none on the attention weights and the plain path is several times slower.

    `mask` is True (or 0.0) where attending is allowed (False or -inf where not) and broadcasts to (B, H, L, L), with a
    `past` to (B, H, M, L). `rotary` (L, 2, E / 2) turns queries and keys (`latticode.nn.rotary`).
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide the width, got width {width} and heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.out = nn.Linear(width, width, bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BLD: Tensor,
        mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        rotary: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        qkv_BLH3E = self.qkv(x_BLD).unflatten(-1, (3, self.heads, -1))
        q_BHLE, k_BHLE, v_BHLE = qkv_BLH3E.permute(2, 0, 3, 1, 4).unbind(0)
        if rotary is not None:
            q_BHLE, k_BHLE = rotated(q_BHLE, rotary), rotated(k_BHLE, rotary)
        if past is not None:
            k_BHLE = past.keys.index_copy_(2, past.at, k_BHLE.type_as(past.keys))
            v_BHLE = past.values.index_copy_(2, past.at, v_BHLE.type_as(past.values))
            q_BHLE = q_BHLE.type_as(past.keys)
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


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases (2002.05202); 2 / 3 of MLP's hidden width for as many parameters."""

    def __init__(self, width: int, ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = round(width * ratio * 2 / 3)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.dropout(self.down(F.silu(self.gate(x_BLD)) * self.up(x_BLD)))


def norm_of(style: str, width: int) -> nn.Module:
    return nn.LayerNorm(width) if style == "gpt" else nn.RMSNorm(width, eps=1e-5)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Style "gpt" has LayerNorm, GELU and biases; "llama" RMSNorm, SwiGLU and no biases (2302.13971).
    """

    def __init__(self, width: int, heads: int, mlp: float = 4.0, dropout: float = 0.0, style: str = "gpt") -> None:
        super().__init__()
        if style not in STYLES:
            raise ValueError(f"unknown style {style!r} of a transformer; valid: {', '.join(STYLES)}")
        self.norm1 = norm_of(style, width)
        self.attention = Attention(width, heads, dropout, bias=style == "gpt")
        self.norm2 = norm_of(style, width)
        self.mlp = (MLP if style == "gpt" else SwiGLU)(width, mlp, dropout)

    def forward(
        self,
        x_BLD: Tensor,
        mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        rotary: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), mask, is_causal=is_causal, rotary=rotary, past=past)
        return x_BLD + self.mlp(self.norm2(x_BLD))


class Transformer(nn.Module):
    """`depth` blocks and a final norm."""

    def __init__(
        self, width: int, depth: int, heads: int, mlp: float = 4.0, dropout: float = 0.0, style: str = "gpt"
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be >= 1, got {depth}")
        self.width, self.heads = width, heads
        self.blocks = nn.ModuleList(Block(width, heads, mlp, dropout, style) for _ in range(depth))
        self.norm = norm_of(style, width)
        self.apply(initialise)
        with torch.no_grad():  # 2 * depth branches add up in the stream: keep its variance independent of depth (GPT-2)
            for name, weight in self.named_parameters():
                if name.endswith(("attention.out.weight", "mlp.down.weight")):
                    weight.mul_((2 * depth) ** -0.5)

    def forward(
        self,
        x_BLD: Tensor,
        mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        rotary: Tensor | None = None,
    ) -> Tensor:
        """Outputs (B, L, D); `rotary` (>= L, 2, E / 2) where positions are turned into queries and keys."""
        rotary = None if rotary is None else rotary[: x_BLD.shape[1]]
        for block in self.blocks:
            x_BLD = block(x_BLD, mask, is_causal=is_causal, rotary=rotary)
        return self.norm(x_BLD)

    def cache(self, batch: int, length: int) -> Tensor:
        """An empty memory (depth, 2, B, H, L, E) of keys and values for `step`: 2 * depth * B * L * D numbers.

        Zeros, not whatever was there: what the mask hides still enters attention, times 0.
        """
        shape = (len(self.blocks), 2, batch, self.heads, length, self.width // self.heads)
        return next(self.parameters()).new_zeros(shape)

    def step(self, x_BMD: Tensor, cache: Tensor, at_M: Tensor, rotary: Tensor | None = None) -> Tensor:
        """Outputs (B, M, D) of the tokens at positions `at_M`, given those at lower positions that `cache` has seen.

        Causal decoding: as rows `at_M` of `forward(..., is_causal=True)`. The keys and values are written into `cache`
        in place. Attention always runs over all L positions, so that every call with the same M has the same shapes:
        compiled once (`torch.compile(transformer.step)`), it serves the whole sequence.
        """
        mask_ML = torch.arange(cache.shape[-2], device=at_M.device) <= at_M[:, None]
        rotary = None if rotary is None else rotary[at_M]
        for block, (keys, values) in zip(self.blocks, cache, strict=True):
            x_BMD = block(x_BMD, mask_ML, rotary=rotary, past=Past(keys, values, at_M))
        return self.norm(x_BMD)


def initialise(module: nn.Module) -> None:
    """Weights N(0, 1 / inputs) and zero biases of a linear layer; for `nn.Module.apply`.

    BERT's fixed 0.02 is made for its width of 768 and starves narrow networks: at width 64, depth 6 and 200 steps it
    cost 0.17 bits per token on a toy prior.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
