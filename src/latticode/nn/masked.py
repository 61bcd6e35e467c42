"""Masked convolutions and attention of PixelCNNs: they look only at what comes before in raster order (row by row).

B batch, D width, H rows, W columns, N = H W positions in raster order, G heads, E width of a head.

Inputs are shifted once, by a row and by a column; every layer above may then look at its own position too, so no
kernel needs a mask and none of its weights is wasted on zeros (Salimans et al. 2017, arXiv 1701.05517, section 2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.core.derived import derived
from latticode.nn.rotary import grid_coordinates
from latticode.nn.transformer import initialise


def shifted(x: Tensor) -> tuple[Tensor, Tensor]:
    """The input (B, D, H, W) of the vertical stack, which holds the row above, and of the horizontal one, which holds
    the column to the left; zeros come in."""
    return F.pad(x, (0, 0, 1, -1)), F.pad(x, (1, -1))


class GatedConv(nn.Module):
    """One layer of a gated PixelCNN (van den Oord et al. 2016, arXiv 1606.05328, figure 2), residual in both stacks.

    The vertical stack sees the rows up to its own at all columns, the horizontal one its own row up to its own column
    and what the vertical stack says there: together all that comes before, without a blind spot. Both are
    tanh(a + c) sigmoid(b + d), where c and d, linear in the condition, are their biases (equation 4). The paper adds
    the input in the horizontal stack only; without it here as well, the vertical signal shrinks from layer to layer.

    Examples:
        >>> v, h = shifted(torch.randn(2, 8, 4, 4))
        >>> v, h = GatedConv(8, kernel=3)(v, h, torch.randn(2, 8, 1, 1))
        >>> h.shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, width: int, kernel: int, dropout: float = 0.0) -> None:
        super().__init__()
        if kernel < 3 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and >= 3, got {kernel}")
        self.reach = kernel // 2
        self.vertical = nn.Conv2d(width, 2 * width, (self.reach + 1, kernel))
        self.horizontal = nn.Conv2d(width, 2 * width, (1, self.reach + 1))
        self.link = nn.Conv2d(2 * width, 2 * width, 1)  # vertical to horizontal
        self.condition = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.vertical_out = nn.Conv2d(width, width, 1)
        self.horizontal_out = nn.Conv2d(width, width, 1)
        self.dropout = nn.Dropout(dropout)
        self.apply(initialise_convolution)

    def forward(self, v: Tensor, h: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Both stacks (B, D, H, W) after this layer; `condition` (B, D, H or 1, W or 1)."""
        n = self.reach
        to_v, to_h = self.condition(condition).chunk(2, dim=1)
        seen = self.vertical(F.pad(v, (n, n, n, 0)))
        inner = self.horizontal(F.pad(h, (n, 0))) + self.link(seen)
        v = v + self.vertical_out(self.dropout(gated(seen + to_v)))
        return v, h + self.horizontal_out(self.dropout(gated(inner + to_h)))


class RasterAttention(nn.Module):
    """Causal attention over all that comes before, added to the features: what makes a PixelCNN a PixelSNAIL (Chen et
    al. 2018, arXiv 1712.09763, section 2.2).

    Queries are made of the features and of the place; keys and values also of the input, which at a former position is
    known, whereas the features there stop short of it. A gated layer brings back what was found.

    Examples:
        >>> x = torch.randn(2, 8, 4, 4)
        >>> RasterAttention(8, heads=2)(x, x, places((4, 4), device=x.device)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide the width, got width {width} and heads {heads}")
        self.heads = heads
        self.query = nn.Linear(width + 2, width)
        self.key_value = nn.Linear(2 * width + 2, 2 * width)
        self.merge = nn.Linear(2 * width, 2 * width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.apply(initialise)

    def forward(self, h: Tensor, x: Tensor, places_N2: Tensor) -> Tensor:
        """Features like `h` (B, D, H, W) given the input `x` (B, D, H, W), not shifted, and the places."""
        h_BND = h.flatten(2).mT
        places_BN2 = places_N2.expand(len(h), -1, -1)
        known = torch.cat([h_BND, x.flatten(2).mT, places_BN2], dim=-1)
        known = F.pad(known, (0, 0, 1, -1))  # position n may look at n - 1, and the first one at zeros
        q_BGNE = self.query(torch.cat([h_BND, places_BN2], dim=-1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_BGNE, v_BGNE = self.key_value(known).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        found = F.scaled_dot_product_attention(q_BGNE, k_BGNE, v_BGNE, is_causal=True).transpose(1, 2).flatten(2)
        merged = gated(self.merge(torch.cat([h_BND, found], dim=-1)), dim=-1)
        return h + self.out(self.dropout(merged)).mT.unflatten(-1, h.shape[2:])


class RasterNetwork(nn.Module):
    """Logits over C codes at each position of a plane, given the codes before it in raster order and a condition.

    Args:
        size: C.
        plane: rows and columns.
        classes: the table of labels has one more row, for 'no label'.
        width, depth, kernel: of the gated layers.
        attention: causal attention after every that many layers; 0 = none.
        heads: of the attention.
        dropout: on each branch.

    Examples:
        >>> network = RasterNetwork(64, (4, 4), classes=10, width=16, depth=2, kernel=3)
        >>> network(torch.zeros(2, 4, 4, dtype=torch.int64), network.condition(torch.tensor([3, -1]))).shape
        torch.Size([2, 64, 4, 4])
    """

    def __init__(
        self,
        size: int,
        plane: tuple[int, int],
        classes: int,
        width: int,
        depth: int,
        kernel: int,
        attention: int = 0,
        heads: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in {"width": width, "depth": depth}.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not 0 <= attention <= depth:
            raise ValueError(f"attention must be 0 (none) to the depth, {depth}, got {attention}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.plane, self.classes, self.attention = plane, classes, attention
        self.embedding = nn.Embedding(size, width)
        self.label = nn.Embedding(classes + 1, width)  # the last is 'no label'
        self.layers = nn.ModuleList(GatedConv(width, kernel, dropout) for _ in range(depth))
        looks = depth // attention if attention else 0
        self.looks = nn.ModuleList(RasterAttention(width, heads, dropout) for _ in range(looks))
        self.head = nn.Sequential(nn.GELU(), nn.Conv2d(width, width, 1), nn.GELU(), nn.Conv2d(width, size, 1))
        self.head.apply(initialise_convolution)

    def condition(self, labels: Tensor) -> Tensor:
        """(B, D, 1, 1) of labels (B,), -1 = none."""
        return self.label(torch.where(labels < 0, self.classes, labels))[..., None, None]

    def forward(self, codes: Tensor, condition: Tensor) -> Tensor:
        """Logits (B, C, rows, W) for `codes` (B, rows, W), the first rows or all of the plane, given all before each.

        `condition` (B, D, rows or 1, W or 1).
        """
        x = self.embedding(codes).movedim(-1, 1)
        v, h = shifted(x)
        for i, layer in enumerate(self.layers, start=1):
            v, h = layer(v, h, condition)
            if self.attention and i % self.attention == 0:
                at = places(self.plane, device=h.device)[: codes.shape[1:].numel()].to(h.dtype)
                h = self.looks[i // self.attention - 1](h, x, at)
        return self.head(v + h)  # so that the last layer of the vertical stack has a reader too


@derived
def places(plane: tuple[int, int]) -> Tensor:
    """(N, 2): where each position lies, row and column in [-1, 1]."""
    return (grid_coordinates(plane) + 0.5) / torch.tensor(plane) * 2 - 1


def gated(x: Tensor, dim: int = 1) -> Tensor:
    """tanh(a) sigmoid(b) of the two halves of `x`."""
    a, b = x.chunk(2, dim)
    return a.tanh() * b.sigmoid()


def initialise_convolution(module: nn.Module) -> None:
    """Weights N(0, 1 / inputs of a position) and zero biases; for `nn.Module.apply`."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
