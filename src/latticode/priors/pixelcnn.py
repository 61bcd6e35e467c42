"""Convolutional autoregression in raster order: gated PixelCNN (1606.05328), PixelSNAIL (1712.09763) and the two-level
prior of VQ-VAE-2 (1906.00446).

B batch, D width, C codes, H rows, W columns, N = H W positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from latticode.nn.masked import RasterNetwork, initialise_convolution
from latticode.priors.base import IN_ORDER, Chooser, Condition, Prior, check_rates, numbers
from latticode.priors.grids import packed, ratio_of, unpacked


class PixelCNN(Prior):
    """A gated PixelCNN; with `attention` it is a PixelSNAIL, the top prior of VQ-VAE-2.

    Args:
        vocab: [C]; other quantizers than those with one code per position need another prior, those of two grids
            `TwoLevel`.
        grid: rows and columns; one axis is one row, above which the vertical stack finds nothing to see.
        classes: 0 = unconditional.
        width, depth, kernel: of the gated layers. Without attention a position sees r + 1 rows up, r columns to either
            side in those and r + 1 to the left in its own, r = depth * (kernel // 2): the depth must fit the grid.
        attention: causal attention after every that many layers; 0 = none.
        heads: of the attention.
        dropout: on each branch.
        label_dropout: probability that training drops the label, for classifier-free guidance.

    Examples:
        >>> import torch
        >>> from latticode import Conditioning, Sampling
        >>> prior = PixelCNN([64], [4, 4], classes=10, width=32, depth=2, attention=1)  # a PixelSNAIL
        >>> codes, cond = torch.randint(64, (2, 4, 4, 1)), Conditioning(torch.tensor([3, 7]))
        >>> prior.loss(codes, cond)["cross_entropy"].backward()  # nats per position
        >>> prior.sample(2, cond, sampling=Sampling(temperature=0.9), seed=1).shape
        torch.Size([2, 4, 4, 1])
    """

    uses, causal = IN_ORDER, True

    def __init__(
        self,
        vocab: Sequence[int],
        grid: Sequence[int],
        classes: int = 0,
        width: int = 128,
        depth: int = 8,
        kernel: int = 3,
        attention: int = 0,
        heads: int = 4,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__(vocab, grid, classes)
        if len(self.vocab) != 1:
            raise ValueError(f"PixelCNN models one code per position, got {len(self.vocab)} (vocab {self.vocab})")
        if len(self.grid) > 2:
            raise ValueError(f"PixelCNN models grids of one or two axes, got {len(self.grid)} (grid {self.grid})")
        check_rates(label_dropout=label_dropout)
        self.width, self.depth, self.kernel = width, depth, kernel
        self.attention, self.heads = attention, heads
        self.dropout, self.label_dropout = dropout, label_dropout
        self.plane = (1, *self.grid)[-2], self.grid[-1]
        self.network = RasterNetwork(
            self.vocab[0], self.plane, self.classes, width, depth, kernel, attention, heads, dropout
        )

    def _nats(self, codes: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Of each position (B, rows, W), in one forward pass."""
        codes = codes.reshape(-1, *self.plane)
        return {"cross_entropy": nats(self.network, codes, self.network.condition(condition.labels))}

    def _draw(self, known: Tensor, condition: Condition, noise: Tensor, choose: Chooser) -> Tensor:
        """One forward pass for each position, twice as wide under guidance. Known codes inform only what comes after
        them."""
        on = self.network.condition(condition.branches(choose.sampling.guidance).labels)
        start = known.view(len(known), *self.plane)
        return generate(self.network, start, on, noise[..., 0], choose).view(known.shape)


class TwoLevel(Prior):
    """VQ-VAE-2's prior over the packed codes of a `HierarchicalTokenizer` of two grids (1906.00446, section 3.2).

    The codes (B, h, w, 1 + r r) hold at each position the code of the top grid and those of the r x r positions of the
    bottom grid inside it, row-major. The top is a PixelSNAIL; the bottom, on the (h r, w r) grid, a PixelCNN that is
    conditioned on the label and, by convolutions, on all top codes. As in the paper it has no attention, whose cost
    grows with the fourth power of a grid's side, and the top codes already tell it of the whole image.

    Args:
        vocab: [C_top, C_bottom, ..., C_bottom], 1 + r r of them.
        grid: rows and columns of the top grid.
        classes: 0 = unconditional.
        width, depth, kernel, attention, heads: of the top, as for `PixelCNN`.
        bottom_width, bottom_depth: of the bottom, which has the same kernel.
        dropout, label_dropout: of both; a label is dropped for both.

    Examples:
        >>> import torch
        >>> prior = TwoLevel([64] * 5, [2, 2], width=32, depth=2, attention=1, bottom_width=32, bottom_depth=2)
        >>> list(prior.loss(torch.randint(64, (2, 2, 2, 5))))  # nats per code of either grid
        ['top_cross_entropy', 'cross_entropy']
        >>> prior.sample(2, seed=1).shape
        torch.Size([2, 2, 2, 5])
    """

    uses, causal = IN_ORDER, True

    def __init__(
        self,
        vocab: Sequence[int],
        grid: Sequence[int],
        classes: int = 0,
        width: int = 128,
        depth: int = 8,
        kernel: int = 3,
        attention: int = 4,
        heads: int = 4,
        bottom_width: int = 128,
        bottom_depth: int = 8,
        dropout: float = 0.1,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__(vocab, grid, classes)
        self.ratio = ratio_of(self.vocab, self.grid, type(self).__name__)  # r
        check_rates(label_dropout=label_dropout)
        self.width, self.depth, self.kernel, self.attention, self.heads = width, depth, kernel, attention, heads
        self.bottom_width, self.bottom_depth = bottom_width, bottom_depth
        self.dropout, self.label_dropout = dropout, label_dropout
        rows, columns = self.grid
        fine = rows * self.ratio, columns * self.ratio
        self.top = RasterNetwork(
            self.vocab[0], (rows, columns), self.classes, width, depth, kernel, attention, heads, dropout
        )
        self.bottom = RasterNetwork(
            self.vocab[1], fine, self.classes, bottom_width, bottom_depth, kernel, dropout=dropout
        )
        self.embedding = nn.Embedding(self.vocab[0], bottom_width)
        self.upsample = nn.Sequential(
            nn.Conv2d(bottom_width, bottom_width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(bottom_width, bottom_width * self.ratio**2, 3, padding=1),  # each position in a cell has its own
            nn.PixelShuffle(self.ratio),
        )
        self.upsample.apply(initialise_convolution)

    def _nats(self, codes: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Of each code of the top (B, h, w), and of the bottom given the top (B, h r, w r)."""
        top, bottom = unpacked(codes, self.ratio)
        labels = condition.labels
        return {
            "top_cross_entropy": nats(self.top, top, self.top.condition(labels)),
            "cross_entropy": nats(self.bottom, bottom, self._condition(top, labels)),
        }

    def _draw(self, known: Tensor, condition: Condition, noise: Tensor, choose: Chooser) -> Tensor:
        """First the top, then the bottom, each as `PixelCNN`'s. Known codes of the bottom do not inform the top."""
        known_top, known_bottom = unpacked(known, self.ratio)
        labels = condition.branches(choose.sampling.guidance).labels
        at_top, at_bottom = noise.flatten(1).tensor_split([self.positions], dim=1)
        top = generate(self.top, known_top, self.top.condition(labels), at_top, choose)
        given = self._condition(top.repeat(len(labels) // max(len(top), 1), 1, 1), labels)
        return packed(top, generate(self.bottom, known_bottom, given, at_bottom, choose), self.ratio)

    def _condition(self, top: Tensor, labels: Tensor) -> Tensor:
        """Of the bottom (B, D, h r, w r)."""
        return self.bottom.condition(labels) + self.upsample(self.embedding(top).movedim(-1, 1))


def nats(network: RasterNetwork, codes: Tensor, condition: Tensor) -> Tensor:
    """-log p (B, H, W) of each of `codes` (B, H, W) given those before."""
    return F.cross_entropy(network(codes, condition).float(), codes, reduction="none")


def generate(network: RasterNetwork, known: Tensor, condition: Tensor, noise: Tensor, choose: Chooser) -> Tensor:
    """Codes (B, H, W): `known` with a draw at each -1, from the uniform `noise` (B, N).

    One forward pass for each position that is open in any image, over all rows down to its own, on average half of the
    plane; nothing is kept from pass to pass. `condition` has B rows, or 2 B, those of the unconditional branch behind.
    """
    codes = known.clamp(min=0)  # what is open is not looked at before it is drawn
    copies = len(condition) // max(len(codes), 1)
    for n in numbers((known < 0).any(0).flatten().nonzero().flatten()):
        i, j = divmod(n, network.plane[1])
        rows = condition if condition.shape[2] == 1 else condition[:, :, : i + 1]
        logits = network(codes[:, : i + 1].repeat(copies, 1, 1), rows)[:, :, i, j]
        codes[:, i, j] = choose(logits, noise[:, n], known[:, i, j])
    return codes
