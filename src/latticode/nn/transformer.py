"""A pre-norm transformer. B batch, L sequence, M new positions, D width, H heads, E = D / H width of a head, S states
of a context and C their width.

Norms come before attention and MLP, so the residual stream is an identity path from embedding to output and a fast run
needs no long warm-up (2002.04745). BERT and MaskGIT put them after: about as good at a learning rate of 1e-3 in our toy
runs, but with this initialisation it did not train at 3e-3, where this layout gained (docs/log.md).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.nn.rotary import rotated

STYLES = ("gpt", "llama", "vitvqgan")


class Past(NamedTuple):
    """What one attention layer keeps of a sequence that is still being decoded, and where its next tokens go.

    Examples:
        >>> attention, x = Attention(16, heads=2).eval(), torch.randn(2, 5, 16)
        >>> past = Past(torch.zeros(2, 2, 5, 8), torch.zeros(2, 2, 5, 8), torch.arange(2))  # room for 5, now come 2
        >>> mask = torch.arange(5) <= past.at[:, None]
        >>> torch.allclose(attention(x[:, :2], mask, past=past), attention(x, is_causal=True)[:, :2], atol=1e-5)
        True
    """

    keys: Tensor  # (B, H, L, E), written in place
    values: Tensor
    at: Tensor  # (M,) int64


class Attention(nn.Module):
    """Multi-head attention with one fused projection. Dropout is on the output only, because the fused CPU kernels take
    none on the attention weights and the plain path is several times slower.

    `mask` is True (or 0.0) where attending is allowed (False or -inf where not) and broadcasts to (B, H, L, L), with a
    `past` to (B, H, M, L). `rotary` (L, 2, E / 2) turns queries and keys (`latticode.nn.rotary`).

    Examples:
        >>> Attention(16, heads=2)(torch.randn(2, 5, 16), is_causal=True).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self, width: int, heads: int, dropout: float = 0.0, bias: bool = True, out_bias: bool | None = None
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide the width, got width {width} and heads {heads}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias)
        self.out = nn.Linear(width, width, bias if out_bias is None else out_bias)
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


class CrossAttention(nn.Module):
    """Multi-head attention to the S states of a context of width C; dropout as in `Attention`.

    The context is (B, S, C), or what `read` has made of it. `mask` (B, S) is True where a state may be attended to; at
    least one for each row.

    Examples:
        >>> CrossAttention(16, context=8, heads=2)(torch.randn(2, 5, 16), torch.randn(2, 7, 8)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, width: int, context: int, heads: int, dropout: float = 0.0, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias)
        self.kv = nn.Linear(context, 2 * width, bias)
        self.out = nn.Linear(width, width, bias)
        self.dropout = nn.Dropout(dropout)

    def read(self, context_BSC: Tensor) -> Tensor:
        """Keys and values (2, B, H, S, E), which are the same for every query."""
        return self.kv(context_BSC).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x_BLD: Tensor, context: Tensor, mask_BS: Tensor | None = None) -> Tensor:
        q_BHLE = self.q(x_BLD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_BHSE, v_BHSE = (self.read(context) if context.ndim == 3 else context).unbind(0)
        mask = None if mask_BS is None else mask_BS[:, None, None]
        y_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BHSE, v_BHSE, attn_mask=mask)
        return self.dropout(self.out(y_BHLE.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two linear layers around a GELU; `ratio` is hidden width over width.

    Examples:
        >>> MLP(16)(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    activation = staticmethod(F.gelu)

    def __init__(self, width: int, ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = round(width * ratio)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.dropout(self.down(self.activation(self.up(x_BLD))))


class TanhMLP(MLP):
    """With tanh in place of the GELU, as in ViT-VQGAN's public code.

    Examples:
        >>> mlp, x = TanhMLP(16), torch.randn(2, 5, 16)
        >>> torch.equal(mlp(x), mlp.down(torch.tanh(mlp.up(x))))
        True
    """

    activation = staticmethod(torch.tanh)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases (2002.05202); 2 / 3 of MLP's hidden width for as many parameters.

    Examples:
        >>> SwiGLU(16)(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(self, width: int, ratio: float = 4.0, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = round(width * ratio * 2 / 3)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.dropout(self.down(F.silu(self.gate(x_BLD)) * self.up(x_BLD)))


MLPS = {"gpt": MLP, "llama": SwiGLU, "vitvqgan": TanhMLP}


def norm_of(style: str, width: int) -> nn.Module:
    """The norm of a style: LayerNorm of gpt, RMSNorm of llama."""
    return nn.RMSNorm(width, eps=1e-5) if style == "llama" else nn.LayerNorm(width)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); between them, with a context of that width (0 = none), x +
    cross_attention(norm(x), context), whose states are taken as they are (1706.03762's decoder).

    Style "gpt" has LayerNorm, GELU and biases; "llama" RMSNorm, SwiGLU and no biases (2302.13971);
    "vitvqgan" is "gpt" with tanh and without biases of queries, keys and values, as ViT-VQGAN's public code is.

    Examples:
        >>> Block(16, heads=2, style="llama")(torch.randn(2, 5, 16), is_causal=True).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self, width: int, heads: int, mlp: float = 4.0, dropout: float = 0.0, style: str = "gpt", context: int = 0
    ) -> None:
        super().__init__()
        if style not in STYLES:
            raise ValueError(f"unknown style {style!r} of a transformer; valid: {', '.join(STYLES)}")
        self.norm1 = norm_of(style, width)
        self.attention = Attention(width, heads, dropout, style == "gpt", style != "llama")
        self.norm_context = norm_of(style, width) if context else None
        self.cross_attention = CrossAttention(width, context, heads, dropout, style != "llama") if context else None
        self.norm2 = norm_of(style, width)
        self.mlp = MLPS[style](width, mlp, dropout)

    def forward(
        self,
        x_BLD: Tensor,
        mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        rotary: Tensor | None = None,
        past: Past | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), mask, is_causal=is_causal, rotary=rotary, past=past)
        if self.cross_attention is not None and self.norm_context is not None and context is not None:
            x_BLD = x_BLD + self.cross_attention(self.norm_context(x_BLD), context, context_mask)
        return x_BLD + self.mlp(self.norm2(x_BLD))


class Transformer(nn.Module):
    """`depth` blocks and, unless `norm` is False, a final norm. With `context`, a width, each block attends to states
    (B, S, context) as well,
    of which the mask (B, S) bool tells those that are there.

    Examples:
        >>> transformer = Transformer(16, depth=2, heads=2).eval()
        >>> x, at = torch.randn(2, 5, 16), torch.arange(5)
        >>> whole, cache = transformer(x, is_causal=True), transformer.cache(2, 5)
        >>> with torch.no_grad():
        ...     steps = [transformer.step(x[:, n : n + 1], cache, at[n : n + 1]) for n in range(5)]
        >>> torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)
        True
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        mlp: float = 4.0,
        dropout: float = 0.0,
        style: str = "gpt",
        context: int = 0,
        norm: bool = True,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be >= 1, got {depth}")
        self.width, self.heads, self.context = width, heads, context
        self.blocks = nn.ModuleList(Block(width, heads, mlp, dropout, style, context) for _ in range(depth))
        self.norm = norm_of(style, width) if norm else nn.Identity()
        self.apply(initialise)
        branches = (3 if context else 2) * depth  # add up in the stream: keep its variance independent of depth (GPT-2)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith(("attention.out.weight", "mlp.down.weight")):
                    weight.mul_(branches**-0.5)

    def forward(
        self,
        x_BLD: Tensor,
        mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        rotary: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Outputs (B, L, D); `rotary` (>= L, 2, E / 2) where positions are turned into queries and keys.

        Raises ValueError for a context where none was asked for, and for none where one was.
        """
        self._check(context)
        rotary = None if rotary is None else rotary[: x_BLD.shape[1]]
        for block in self.blocks:
            x_BLD = block(x_BLD, mask, is_causal=is_causal, rotary=rotary, context=context, context_mask=context_mask)
        return self.norm(x_BLD)

    def cache(self, batch: int, length: int) -> Tensor:
        """An empty memory (depth, 2, B, H, L, E) of keys and values for `step`: 2 * depth * B * L * D numbers.

        Zeros, not whatever was there: what the mask hides still enters attention, times 0.
        """
        shape = (len(self.blocks), 2, batch, self.heads, length, self.width // self.heads)
        like = next(self.parameters())
        return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def step(
        self,
        x_BMD: Tensor,
        cache: Tensor,
        at_M: Tensor,
        rotary: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Outputs (B, M, D) of the tokens at positions `at_M`, given those at lower positions that `cache` has seen.

        Causal decoding: as rows `at_M` of `forward(..., is_causal=True)`. The keys and values are written into `cache`
        in place. Attention always runs over all L positions, so that every call with the same M has the same shapes:
        compiled once (`torch.compile(transformer.step)`), it serves the whole sequence. The context is (B, S, C), whose
        keys and values are then computed anew in each call, or what `read` has made of it.
        """
        if context is None or context.ndim == 3:
            self._check(context)
            context = None if context is None else self.read(context)
        mask_ML = torch.arange(cache.shape[-2], device=at_M.device) <= at_M[:, None]
        rotary = None if rotary is None else rotary[at_M]
        for i, block in enumerate(self.blocks):
            seen = None if context is None else context[i]
            past = Past(cache[i, 0], cache[i, 1], at_M)
            x_BMD = block(x_BMD, mask_ML, rotary=rotary, past=past, context=seen, context_mask=context_mask)
        return self.norm(x_BMD)

    def read(self, context_BSC: Tensor) -> Tensor:
        """What `step` has to know of a context: keys and values of each block (depth, 2, B, H, S, E)."""
        self._check(context_BSC)
        blocks: Any = self.blocks
        return torch.stack([block.cross_attention.read(context_BSC) for block in blocks])

    def _check(self, context: Tensor | None) -> None:
        given = 0 if context is None else context.shape[-1]
        if given != self.context:
            raise ValueError(f"the transformer attends to a context of width {self.context} (0 = none), got {given}")


def initialise(module: nn.Module) -> None:
    """Weights N(0, 1 / inputs) and zero biases of a linear layer; for `nn.Module.apply`.

    BERT's fixed 0.02 is made for its width of 768 and starves narrow networks: at width 64, depth 6 and 200 steps it
    cost 0.17 bits per token on a toy prior.
    """
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
