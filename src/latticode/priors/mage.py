"""MAGE (2211.09117): a masked prior whose encoder sees only what is not masked, so that its features are worth probing.

B batch, N positions, C codes, M masked positions of the whole batch, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.nn.transformer import Transformer, initialise
from latticode.priors.base import Condition, check_rates, recorded
from latticode.priors.masked import Context, Masked
from latticode.priors.schedules import ranks, truncated_normal


class MAGE(Masked):
    """An encoder over the class token and the codes, and a decoder that predicts the masked ones.

    In training the share of masked codes varies, and `min_masked` of all positions, all of them masked, are dropped
    before the encoder: it is a ViT over what is left, at half of the cost. The decoder's input is the encoder's output,
    with that of the class token at every masked position, plus positions of its own (section 3.1). Decoding, and its
    cost, is MaskGIT's, with all positions in the encoder.

    Args:
        vocab: [C]; other quantizers than those with one code per position need another prior.
        grid: positions along each axis.
        classes: 0 = unconditional, as in the paper: the class token is always that of 'no label'.
        width, heads, mlp: of encoder and decoder; `mlp` is hidden width over width.
        depth, decoder_depth: blocks of the encoder and of the decoder.
        dropout: on the embeddings and on each branch.
        label_smoothing: of the cross entropy.
        min_masked: the least share of masked positions in training, and the share that the encoder does not meet.
        mean_masked, std_masked: of the normal distribution that the share is drawn from, on [min_masked, 1].
        label_dropout: probability that training drops the label, for classifier-free guidance.
        digits, inner_depth: as for `MaskGIT`.

    Examples:
        >>> import torch
        >>> prior = MAGE([64], [4, 4], width=32, depth=2, decoder_depth=1, heads=4)
        >>> codes = torch.randint(64, (2, 4, 4, 1))
        >>> list(prior.loss(codes))  # nats per masked position
        ['cross_entropy']
        >>> [tuple(layer.shape) for layer in prior.features(codes)]  # for a linear probe
        [(2, 32), (2, 32), (2, 32)]
    """

    def __init__(
        self,
        vocab: Sequence[int],
        grid: Sequence[int],
        classes: int = 0,
        width: int = 256,
        depth: int = 6,
        decoder_depth: int = 4,
        heads: int = 8,
        mlp: float = 4.0,
        dropout: float = 0.1,
        label_smoothing: float = 0.1,
        min_masked: float = 0.5,
        mean_masked: float = 0.55,
        std_masked: float = 0.25,
        label_dropout: float = 0.1,
        digits: Sequence[int] | None = None,
        inner_depth: int = 0,
    ) -> None:
        rates = dropout, label_smoothing, label_dropout
        super().__init__(vocab, grid, classes, width, heads, mlp, *rates, digits, inner_depth)
        check_rates(min_masked=min_masked)
        if not 0 < std_masked < math.inf:
            raise ValueError(f"std_masked must be > 0, got {std_masked}")
        self.depth, self.decoder_depth = depth, decoder_depth
        self.min_masked, self.mean_masked, self.std_masked = min_masked, mean_masked, std_masked
        self.dropped = math.ceil(min_masked * self.positions)  # positions that the encoder does not meet in training
        self.encoder = Transformer(width, depth, heads, mlp, dropout)
        self.link = nn.Linear(width, width)
        self.decoder_position = nn.Parameter(torch.empty(self.positions + 1, width))
        self.decoder = Transformer(width, decoder_depth, heads, mlp, dropout)
        initialise(self.link)
        nn.init.normal_(self.decoder_position, std=width**-0.5)

    def states(
        self,
        tokens_BN: Tensor,
        labels_B: Tensor,
        at_BN: Tensor,
        context: Context | None = None,
        dropped_BN: Tensor | None = None,
    ) -> Tensor:
        """As `Masked.states`.

        The encoder does not meet those that are `dropped_BN` (bool): equally many of each row, and masked.
        """
        x_BLD, seen_BN = self.embedded(tokens_BN, labels_B), tokens_BN != self.mask_token
        met_BK = seen_BN
        if dropped_BN is not None:
            met = dropped_BN.long().argsort(dim=1, stable=True)[:, : self.positions - self.dropped]
            met_BK = seen_BN.gather(1, met)
            x_BLD = x_BLD.gather(1, F.pad(met + 1, (1, 0))[..., None].expand(-1, -1, self.width))
        y_BLD = self.link(self.encoder(x_BLD))
        class_B1D, codes_BKD = y_BLD[:, :1], y_BLD[:, 1:]
        filled_BND = class_B1D.repeat(1, self.positions, 1).masked_scatter(seen_BN[..., None], codes_BKD[met_BK])
        z_BLD = self.decoder(torch.cat([class_B1D, filled_BND], dim=1) + self.decoder_position)
        return z_BLD[:, 1:][at_BN]

    def training_loss(self, codes_BN: Tensor, labels_B: Tensor, context: Context | None = None) -> Tensor:
        masked, dropped = self.masks(len(codes_BN), codes_BN.device)
        y_MD = self.states(codes_BN.masked_fill(masked, self.mask_token), labels_B, masked, dropped_BN=dropped)
        return self.smoothed(y_MD, codes_BN[masked])

    def masks(self, count: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """Which positions (count, N) are masked, a share drawn anew for each image, and which of those are dropped."""
        shares = truncated_normal(count, self.mean_masked, self.std_masked, self.min_masked, 1.0, device)
        masked = (shares * self.positions).ceil().clamp(max(1, self.dropped), self.positions)
        order = ranks(torch.rand(count, self.positions, device=device))
        return order < masked[:, None], order < self.dropped

    def _features(self, codes: Tensor, condition: Condition) -> list[Tensor]:
        """Of the encoder, which meets the whole image."""
        with recorded(self.encoder.blocks) as stream:
            self.encoder(self.embedded(codes.flatten(1), condition.labels))
        return [x_BLD[:, 1:].mean(1) for x_BLD in stream]
