"""DALL-E (Ramesh et al. 2021, arXiv 2102.12092): text and image in one causal stream, under sparse attention.

B batch, L text positions, N image positions, T = L + N of the stream, M positions at hand, W columns, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latticode.core.derived import derived
from latticode.nn.transformer import Past, Transformer, initialise
from latticode.priors.base import IN_ORDER, Chooser, Condition, Prior, check_rates, recorded
from latticode.priors.text import BPE

KINDS = ("row", "column", "convolution")


class DALLE(Prior):
    """A causal transformer reads a start token, the text and then the image, and predicts the next token of either.

    Slot s of the stream holds token s - 1 and predicts token s. Text sees all text before it, an image token all of the
    text and, layer by layer, some of the image tokens before it (`kind_of`, `sparse_mask`). Where a text is too short,
    every position has a padding token of its own; the empty text is all padding, and the unconditional branch.

    Args:
        vocab: one size; other quantizers than those with one code per position need another prior.
        grid: the last axis is a row, all others together count rows.
        text: fitted on captions (`BPE.fit`) before anything but a state is put in.
        classes: 0, the condition is a text.
        width, depth, heads, mlp: of the transformer; `mlp` is hidden width over width.
        dropout: on the embeddings and on each branch.
        text_dropout: probability that training drops the text, for classifier-free guidance; the paper's had none.
        kernel: of the convolutional mask, odd; 11 in the paper on a grid of 32 x 32.

    Examples:
        The vocabulary is learned from captions first; that needs the package `tokenizers`, of the extra `text`.

        >>> import torch
        >>> from latticode import Conditioning, Sampling
        >>> bpe = BPE(size=300, length=8)
        >>> bpe.fit(["a red cat", "a blue cat"])
        >>> prior = DALLE([64], [4, 4], bpe, width=32, depth=3, heads=4, kernel=3)
        >>> cond = Conditioning(texts=("a red cat", "a cat"))
        >>> list(prior.loss(torch.randint(64, (2, 4, 4, 1)), cond))
        ['text_cross_entropy', 'cross_entropy']
        >>> prior.sample(2, cond, sampling=Sampling(guidance=1.0), seed=1).shape
        torch.Size([2, 4, 4, 1])
    """

    uses, causal = IN_ORDER, True
    text: BPE

    def __init__(
        self,
        vocab: Sequence[int],
        grid: Sequence[int],
        text: BPE,
        classes: int = 0,
        width: int = 256,
        depth: int = 6,
        heads: int = 8,
        mlp: float = 4.0,
        dropout: float = 0.1,
        text_dropout: float = 0.1,
        kernel: int = 11,
    ) -> None:
        super().__init__(vocab, grid, classes)
        if self.classes:
            raise ValueError(f"classes must be 0, DALL-E is told texts and not labels, got {classes}")
        if len(self.vocab) != 1:
            raise ValueError(f"DALL-E models one code per position, got {len(self.vocab)} (vocab {self.vocab})")
        check_rates(dropout=dropout, text_dropout=text_dropout)
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd and >= 1, got {kernel}")
        self.width, self.depth, self.heads, self.mlp = width, depth, heads, mlp
        self.dropout, self.text_dropout, self.kernel = dropout, text_dropout, kernel
        self.start = nn.Parameter(torch.empty(width))
        self.padding = nn.Parameter(torch.empty(text.length, width))
        self.text_place = nn.Parameter(torch.empty(text.length, width))
        self.row = nn.Parameter(torch.empty(self.positions // self.grid[-1], width))
        self.column = nn.Parameter(torch.empty(self.grid[-1], width))
        self.text = text  # type: ignore[override]  # of any prior it may be None
        self.text_embedding = nn.Embedding(text.size, width)
        self.embedding = nn.Embedding(self.vocab[0], width)
        self.drop = nn.Dropout(dropout)
        self.transformer = Transformer(width, depth, heads, mlp, dropout)
        self.text_head = nn.Linear(width, text.size)  # 0: the text has ended
        self.head = nn.Linear(width, self.vocab[0])
        self.kinds = [kind_of(layer, depth) for layer in range(1, depth + 1)]
        places = (self.start, self.padding, self.text_place, self.row, self.column)
        for weight in (*places, self.text_embedding.weight, self.embedding.weight):
            nn.init.normal_(weight, std=width**-0.5)
        for head in (self.text_head, self.head):
            initialise(head)

    def context(self, x_BMD: Tensor, at_M: Tensor, cache: Tensor | None = None) -> Tensor:
        """What the transformer makes (B, M, D) of the embedded slots `at_M`: the first M, or those that come after what
        `cache` has seen (`Transformer.cache`), which is written to."""
        of = self.text.length, self.positions, self.grid[-1], self.kernel
        masks = sparse_masks(*of, device=at_M.device)[:, at_M]
        masks = masks if cache is not None else masks[:, :, at_M]
        for layer, (block, kind) in enumerate(zip(self.transformer.blocks, self.kinds, strict=True)):
            past = None if cache is None else Past(cache[layer, 0], cache[layer, 1], at_M)
            x_BMD = block(x_BMD, masks[KINDS.index(kind)], past=past)
        return self.transformer.norm(x_BMD)

    def logits(self, ids_BL: Tensor, codes_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, L, text size) and (B, N, vocab) of each token given all that stands before it in the stream."""
        context_BTD = self._stream(ids_BL, codes_BN)
        length = self.text.length
        return self.text_head(context_BTD[:, :length]), self.head(context_BTD[:, length:])

    def _terms(self, codes: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Also `text_cross_entropy`, per token of the texts that are not dropped, with the end of each; DALL-E weighs
        the two 1/8 and the image 7/8."""
        ids_BL, codes_BN = self._ids(condition.drop(self.text_dropout)), codes.flatten(1)
        text, image = self.logits(ids_BL, codes_BN)
        counted = torch.cat([ids_BL[:, :1], ids_BL[:, :-1]], dim=1) > 0  # what follows a token, and the first one
        nats_BL = F.cross_entropy(text.float().mT, ids_BL, reduction="none")
        return {
            "text_cross_entropy": (nats_BL * counted).sum() / counted.sum().clamp(min=1),
            "cross_entropy": F.cross_entropy(image.float().mT, codes_BN),
        }

    def _nats(self, codes: Tensor, condition: Condition) -> dict[str, Tensor]:
        """Of each position (B, N) of the image given the text, in one forward pass; those of the text are not in."""
        codes_BN = codes.flatten(1)
        _, logits = self.logits(self._ids(condition), codes_BN)
        return {"cross_entropy": F.cross_entropy(logits.float().mT, codes_BN, reduction="none")}

    def _features(self, codes: Tensor, condition: Condition) -> list[Tensor]:
        """Over the slots that predict the image."""
        with recorded(self.transformer.blocks) as seen:
            self._stream(self._ids(condition), codes.flatten(1))
        return [x_BTD[:, self.text.length :].mean(1) for x_BTD in seen]

    def _draw(self, known: Tensor, condition: Condition, noise: Tensor, choose: Chooser) -> Tensor:
        """One pass over the text, then one over each position, twice as wide under guidance.

        Known codes are kept and the others drawn given all that stands before them; what is known behind a position
        does not inform it.
        """
        codes_BN = known.view(len(known), self.positions)
        ids_BL = self._ids(condition.branches(choose.sampling.guidance))
        copies = len(ids_BL) // max(len(known), 1)
        slots = torch.arange(self.text.length + self.positions, device=known.device)
        cache = self.transformer.cache(len(ids_BL), len(slots))
        ready = int((codes_BN >= 0).all(0).long().cumprod(0).sum())  # first positions that no image has open
        x_BMD = torch.cat([self._text_slots(ids_BL), self._image_slots(codes_BN[:, :ready].repeat(copies, 1))], dim=1)
        for n in range(ready, self.positions):
            slot = self.text.length + n
            context_BMD = self.context(x_BMD, slots[slot + 1 - x_BMD.shape[1] : slot + 1], cache)
            codes_BN[:, n] = choose(self.head(context_BMD[:, -1]), noise[:, n, 0], codes_BN[:, n])
            x_BMD = self._image_slots(codes_BN[:, n : n + 1].repeat(copies, 1), n)
        return known

    def _ids(self, condition: Condition) -> Tensor:
        """The tokens (B, L) of the texts."""
        return self.text(condition.texts).to(self.device)

    def _stream(self, ids_BL: Tensor, codes_BN: Tensor) -> Tensor:
        x_BTD = torch.cat([self._text_slots(ids_BL), self._image_slots(codes_BN[:, :-1])], dim=1)
        return self.context(self.drop(x_BTD), torch.arange(x_BTD.shape[1], device=x_BTD.device))

    def _text_slots(self, ids_BL: Tensor) -> Tensor:
        """The slots (B, 1 + L, D) of start and text."""
        x_BLD = torch.where(ids_BL[..., None] > 0, self.text_embedding(ids_BL), self.padding) + self.text_place
        return torch.cat([self.start.expand(len(ids_BL), 1, -1), x_BLD], dim=1)

    def _image_slots(self, codes_BM: Tensor, first: int = 0) -> Tensor:
        """The slots (B, M, D) of the image tokens from position `first` on."""
        at = torch.arange(first, first + codes_BM.shape[1], device=codes_BM.device)
        return self.embedding(codes_BM) + self.row[at // self.grid[-1]] + self.column[at % self.grid[-1]]


def kind_of(layer: int, depth: int) -> str:
    """The mask of layer 1 to `depth`: convolution in the last, column in 2, 6, 10, ..., else row (appendix B.1)."""
    if layer == depth:
        return "convolution"
    return "column" if (layer - 2) % 4 == 0 else "row"


@derived
def sparse_masks(length: int, positions: int, columns: int, kernel: int) -> Tensor:
    """(3, T, T) bool: `sparse_mask` of each of `KINDS`."""
    return torch.stack([sparse_mask(kind, length, positions, columns, kernel) for kind in KINDS])


def sparse_mask(kind: str, length: int, positions: int, columns: int, kernel: int) -> Tensor:
    """(T, T) bool, True where the slot of the row may look at that of the column (appendix B.1, figure 11).

    All look at all slots of the text before them. An image token looks at others (and itself) in raster order: "row" at
    those up to the one above it, so around the edge into the former row; "column" at its own column; "convolution" at
    those that a kernel around it covers, around the edge too.
    """
    slots = length + positions
    back = torch.arange(positions - 1)[:, None] - torch.arange(positions - 1)  # the last code is never held
    if kind == "row":
        seen = back <= columns
    elif kind == "column":
        seen = back % columns == 0
    else:
        reach = kernel // 2
        rows = torch.arange(reach + 1) * columns
        seen = ((back[..., None] - rows).abs() <= reach).any(-1)
    mask = torch.ones(slots, slots, dtype=torch.bool)
    mask[length + 1 :, length + 1 :] = seen
    return mask.tril()
