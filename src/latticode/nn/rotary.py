"""Rotary position embeddings (RoFormer, 2104.09864) over a sequence or a grid (axial): a query and a key meet under an
angle that their distance sets.

B batch, H heads, L positions, E width of a head, A axes of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary_table(coordinates_LA: Tensor, head_width: int, base: float = 10000.0) -> Tensor:
    """Cosines and sines (L, 2, E / 2) of the angles of each position; position 0 is not turned.

    With one axis pair i of E / 2 turns by base^(-2i / E) per step (equation 15). With more, each axis has an equal run
    of pairs with frequencies of its own (axial, as in LlamaGen, 2406.06525). Raises ValueError where the pairs do not
    divide among the axes.
    """
    axes = coordinates_LA.shape[1]
    check_pairs(head_width, axes)
    pairs = head_width // (2 * axes)
    frequencies = base ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles_LE = (coordinates_LA[..., None] * frequencies).flatten(1)
    return torch.stack([angles_LE.cos(), angles_LE.sin()], dim=1).float()


def check_pairs(head_width: int, axes: int) -> None:
    """Raise ValueError unless the pairs of channels of a head divide among the axes."""
    if head_width % (2 * axes):
        raise ValueError(f"rotary positions need a head width divisible by {2 * axes} (2 per axis), got {head_width}")


def grid_coordinates(grid: Sequence[int]) -> Tensor:
    """(prod(grid), A) int64: where each cell lies, row-major."""
    return torch.cartesian_prod(*(torch.arange(size) for size in grid)).view(-1, len(grid))


def rotated(x_BHLE: Tensor, table_L2E: Tensor) -> Tensor:
    """Queries or keys with neighbouring channels (2i, 2i + 1) turned by their position's angles, in the same dtype."""
    cos_LE, sin_LE = table_L2E.unbind(1)
    a, b = x_BHLE.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos_LE - b * sin_LE, a * sin_LE + b * cos_LE], dim=-1).flatten(-2).type_as(x_BHLE)
