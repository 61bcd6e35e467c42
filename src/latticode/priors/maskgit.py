"""MaskGIT (2202.04200): a bidirectional transformer over partly masked codes, sampled in a few parallel steps.

B batch, N positions, C codes, M masked positions of the whole batch, D width, T states of a context.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from latticode.nn.transformer import Transformer
from latticode.priors.base import Condition, recorded
from latticode.priors.masked import Context, Masked, projection
from latticode.priors.schedules import draw_ratios, masked_counts, random_mask, ratio_floor


class MaskedTransformer(Masked):
    """MaskGIT's network and how it learns. With `context` it attends to (B, T, D) that its caller gives it.

    Examples:
        >>> import torch
        >>> sizes = {"width": 32, "depth": 2, "heads": 4, "mlp": 2.0}
        >>> rates = {"dropout": 0.0, "label_smoothing": 0.1, "min_masked": 0.45, "label_dropout": 0.1}
        >>> network = MaskedTransformer([64], [4, 4], classes=0, **sizes, **rates, context=True)
        >>> codes, labels = torch.randint(64, (2, 16)), torch.tensor([-1, -1])
        >>> seen = Context(torch.randn(2, 5, 32), torch.ones(2, 5, dtype=torch.bool))
        >>> network.training_loss(codes, labels, seen).backward()  # nats per masked position
    """

    def __init__(
        self,
        vocab: Sequence[int],
        grid: Sequence[int],
        classes: int,
        width: int,
        depth: int,
        heads: int,
        mlp: float,
        dropout: float,
        label_smoothing: float,
        min_masked: float,
        label_dropout: float,
        digits: Sequence[int] | None = None,
        inner_depth: int = 0,
        context: bool = False,
    ) -> None:
        rates = dropout, label_smoothing, label_dropout
        super().__init__(vocab, grid, classes, width, heads, mlp, *rates, digits, inner_depth)
        self.depth, self.min_masked = depth, min_masked
        self.floor = ratio_floor(min_masked)
        self.transformer = Transformer(width, depth, heads, mlp, dropout, context=width if context else 0)

    def states(self, tokens_BN: Tensor, labels_B: Tensor, at_BN: Tensor, context: Context | None = None) -> Tensor:
        return self._outputs(tokens_BN, labels_B, context)[at_BN]

    def training_loss(self, codes_BN: Tensor, labels_B: Tensor, context: Context | None = None) -> Tensor:
        counts = masked_counts(draw_ratios(len(codes_BN), self.floor, codes_BN.device), self.positions)
        masked = random_mask(counts, self.positions)
        y_MD = self.states(codes_BN.masked_fill(masked, self.mask_token), labels_B, masked, context)
        return self.smoothed(y_MD, codes_BN[masked])

    def means(self, codes_BN: Tensor, labels_B: Tensor, context: Context | None = None) -> list[Tensor]:
        """`features` of `codes_BN`."""
        with recorded(self.transformer.blocks) as stream:
            self._outputs(codes_BN, labels_B, context)
        return [x_BLD[:, 1:].mean(1) for x_BLD in stream]

    def _outputs(self, tokens_BN: Tensor, labels_B: Tensor, context: Context | None) -> Tensor:
        """Of the positions (B, N, D)."""
        states, mask = context or (None, None)
        x_BLD = self.embedded(tokens_BN, labels_B)
        return self.transformer(x_BLD, context=states, context_mask=mask)[:, 1:]


class MaskGIT(MaskedTransformer):
    """A masked transformer over one grid, conditioned on classes, captions, both or nothing (Chang et al. 2022, arXiv
    2202.04200).

    Over a palette's colours it is the masked variant of iGPT. Muse's base model (2301.00704) is one that reads text.

    Args:
        vocab: [C]; other quantizers than those with one code per position need another prior.
        grid: positions along each axis.
        classes: 0 = unconditional.
        width, depth, heads, mlp: of the transformer; `mlp` is hidden width over width.
        dropout: on the embeddings and on each branch.
        label_smoothing: of the cross entropy.
        min_masked: training masks more than this fraction of the positions; FSQ (A.4.2) traced unstable training to
            batches with hardly a masked position and uses 0.45.
        label_dropout: probability that training drops label and text, for classifier-free guidance.
        digits: sizes of the digits into which each code is cut, first digit fastest, or None for whole codes; they must
            multiply to C. FSQ's levels, or powers of 2 for groups of LFQ's bits: MAGVIT-v2's is [512, 512] of 2^18.
        inner_depth: blocks of the transformer that predicts the digits of a position one after another; 0: they are
            independent given the other positions.
        text: what reads captions (`latticode.priors.text`); every block attends to its states. None: there are none.

    Examples:
        >>> import torch
        >>> from latticode import Conditioning, Sampling
        >>> prior = MaskGIT([64], [4, 4], classes=10, width=32, depth=2, heads=4)
        >>> codes, cond = torch.randint(64, (2, 4, 4, 1)), Conditioning(torch.tensor([3, 7]))
        >>> prior.loss(codes, cond)["cross_entropy"].backward()  # nats per masked position
        >>> prior.sample(2, cond, sampling=Sampling(steps=4, guidance=1.5), seed=1).shape
        torch.Size([2, 4, 4, 1])
        >>> hole = codes.clone()
        >>> hole[:, 1:3, 1:3] = -1
        >>> filled = prior.sample(2, cond, known=hole)  # inpainting: known codes are kept
    """

    def __init__(
        self,
        vocab: Sequence[int],
        grid: Sequence[int],
        classes: int = 0,
        width: int = 256,
        depth: int = 6,
        heads: int = 8,
        mlp: float = 4.0,
        dropout: float = 0.1,
        label_smoothing: float = 0.1,
        min_masked: float = 0.45,
        label_dropout: float = 0.1,
        digits: Sequence[int] | None = None,
        inner_depth: int = 0,
        text: nn.Module | None = None,
    ) -> None:
        rates = label_smoothing, min_masked, label_dropout
        inner = digits, inner_depth, text is not None
        super().__init__(vocab, grid, classes, width, depth, heads, mlp, dropout, *rates, *inner)
        self.text = text
        self.project = None if text is None else projection(text, width)

    def context(self, texts: Sequence[str]) -> Context | None:
        if self.text is None or self.project is None:
            return None
        states, mask = self.text(texts)
        return Context(self.project(states), mask)

    def _features(self, codes: Tensor, condition: Condition) -> list[Tensor]:
        return self.means(codes.flatten(1), condition.labels, self.context(condition.texts))
