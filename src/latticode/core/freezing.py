"""Freezing that also reaches what training moves without an optimizer."""

from __future__ import annotations

from typing import Self

from torch import nn


class Freezable(nn.Module):
    """A module whose `requires_grad_` tells the codebooks inside too whether they may move.

    PyTorch's own only sets a flag of parameters, and the running averages of a codebook are none.

    Examples:
        >>> import torch
        >>> from latticode import VQ
        >>> quantizer = VQ(4, 2, kmeans=False, restart=0.0).requires_grad_(False)
        >>> before = quantizer.embedding.vectors().clone()
        >>> _ = quantizer(torch.randn(100, 2))  # in training mode, where running averages would move the codes
        >>> torch.equal(quantizer.embedding.vectors(), before)
        True
    """

    moves: bool = True

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As in PyTorch; and with False no codebook inside is averaged, initialized or restarted, in training mode too.

        Around it a module that is not of this library does not pass that on: `model.apply(lambda part:
        part.requires_grad_(False))` reaches all. Like other modules' flags it is not saved.
        """
        for part in self.modules():
            if isinstance(part, Freezable):
                part.moves = requires_grad
        return super().requires_grad_(requires_grad)
