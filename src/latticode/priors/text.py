"""Text encoders of priors with captions: byte pair encoding with a small transformer, or a frozen T5.

A text encoder is `forward(texts) -> (states (B, L, width), mask (B, L) bool)`. The first state of every text can be
attended to, so that the empty text, which asks for an unconditional sample, has one too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from latticode.core import extras
from latticode.core.modules import device_of
from latticode.nn.transformer import Transformer
from latticode.priors.base import numbers

BYTES = 256
UNFITTED, NO_MERGE = -1, 0  # in the first row of the merges; in the rows that the captions had no pairs for


class BPE(nn.Module):
    """Byte pair encoding (Sennrich et al. 2016, arXiv 1508.07909; over bytes, as in GPT-2), learned by `fit`.

    Texts are lower-cased and their spaces made single. 0 is padding, 1 to 256 are the bytes, and the others are merges
    of two tokens each. The merges are a buffer, so a model is saved with its vocabulary, as plain numbers. Needs the
    package `tokenizers`, of the extra `text`.

    Args:
        size: of the vocabulary, with padding.
        length: tokens that a text may have.
        cut: leave out what is beyond `length`, instead of refusing the text.

    Examples:
        >>> bpe = BPE(size=270, length=8)
        >>> bpe.fit(["a red cat", "a blue cat", "a cat"])
        >>> bpe(["a cat", ""]).shape
        torch.Size([2, 8])
        >>> int(bpe([""]).sum())  # the empty text is all padding
        0
    """

    merges: Tensor  # (size - 257, 2) int32

    def __init__(self, size: int = 2048, length: int = 64, cut: bool = False):
        super().__init__()
        if size <= BYTES + 1:
            raise ValueError(f"size must be > {BYTES + 1} (padding and all bytes), got {size}")
        if length < 1:
            raise ValueError(f"length must be >= 1 token, got {length}")
        self.size, self.length, self.cut = size, length, cut
        self.register_buffer("merges", torch.full((size - BYTES - 1, 2), UNFITTED, dtype=torch.int32))
        self._encoder: Any = None  # made of the merges when it is first needed
        self.register_load_state_dict_post_hook(BPE._forget)  # pyright: ignore[reportUnknownMemberType]

    @property
    def fitted(self) -> bool:
        """Whether the byte pairs have been learned."""
        return int(self.merges[0, 0]) != UNFITTED

    def fit(self, texts: Iterable[str]) -> None:
        """Learn the vocabulary of `texts`; their order does not matter. Raises ValueError if there are none."""
        package = _package("tokenizers")
        alphabet = _alphabet(package)
        encoder = _byte_level(package, package.models.BPE())
        words = sorted({_normal(text) for text in texts} - {""})
        if not words:
            raise ValueError("there is no text to learn a vocabulary from")
        trainer = package.trainers.BpeTrainer(
            vocab_size=self.size - 1, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
        )
        encoder.train_from_iterator(words, trainer)
        number = {token: i + 1 for token, i in encoder.get_vocab().items()}
        merges = [(number[a], number[b]) for a, b in json.loads(encoder.to_str())["model"]["merges"]]
        merges += [(NO_MERGE, NO_MERGE)] * len(self.merges)  # few captions have few pairs
        self.merges.copy_(torch.tensor(merges[: len(self.merges)]))
        self._encoder = None

    def forward(self, texts: Sequence[str]) -> Tensor:
        """Tokens (B, length) int64; all padding for the empty text.

        Raises ValueError for a text of too many tokens, unless it may be cut, and before `fit`.
        """
        ids = torch.zeros(len(texts), self.length, dtype=torch.int64)
        encoder = self._encoder = self._encoder or self._built()
        for row, text in zip(ids, texts, strict=True):
            found = [1 + i for i in encoder.encode(_normal(text)).ids]
            if len(found) > self.length and not self.cut:
                raise _too_long(text, len(found), self.length)
            found = found[: self.length]
            row[: len(found)] = torch.tensor(found, dtype=torch.int64)
        return ids.to(self.merges.device)

    def _forget(self, _: Any) -> None:
        self._encoder = None

    def _built(self) -> Any:
        if not self.fitted:
            raise ValueError("the vocabulary is not learned yet: fit it on captions, or load what was trained on some")
        package = _package("tokenizers")
        tokens = _alphabet(package)
        vocabulary = {token: i for i, token in enumerate(tokens)}
        merges: list[tuple[str, str]] = []
        pairs: list[list[int]] = numbers(self.merges - 1)
        for left, right in pairs:
            if min(left, right) < 0:
                break
            if max(left, right) >= len(tokens):
                raise ValueError(f"the merges are no vocabulary: one joins {left} and {right} of {len(tokens)} tokens")
            merges.append((tokens[left], tokens[right]))
            joined = tokens[left] + tokens[right]
            if joined not in vocabulary:  # two pairs may give one token
                vocabulary[joined] = len(tokens)
                tokens.append(joined)
        return _byte_level(package, package.models.BPE(vocab=vocabulary, merges=merges))


class TextEncoder(nn.Module):
    """A bidirectional transformer over the tokens of `bpe`, after a learned start token. Padding is not attended to.

    Examples:
        >>> bpe = BPE(size=270, length=8)
        >>> bpe.fit(["a red cat", "a blue cat", "a cat"])
        >>> reader = TextEncoder(bpe, width=32, depth=1, heads=4)
        >>> states, mask = reader(["a cat", ""])
        >>> states.shape
        torch.Size([2, 9, 32])
        >>> mask.sum(1).tolist()[1]  # the empty text has a start token alone
        1
    """

    def __init__(self, bpe: BPE, width: int, depth: int, heads: int):
        super().__init__()
        self.bpe, self.width, self.depth, self.heads = bpe, width, depth, heads
        self.embedding = nn.Embedding(bpe.size, width)
        self.start = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(bpe.length, width))
        self.transformer = Transformer(width, depth, heads)
        for weight in (self.embedding.weight, self.start, self.position):
            nn.init.normal_(weight, std=width**-0.5)

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (B, 1 + length, width) and where they are of the text (B, 1 + length). Raises what `bpe` does."""
        ids_BL = self.bpe(texts)
        mask_BL = torch.cat([torch.ones_like(ids_BL[:, :1]), ids_BL], 1) > 0
        x_BLD = self.embedding(ids_BL) + self.position
        x_BLD = torch.cat([self.start.expand(len(x_BLD), 1, -1), x_BLD], 1)
        return self.transformer(x_BLD, mask_BL[:, None, None]), mask_BL


class T5Text(nn.Module):
    """A T5's encoder as its makers trained it (Raffel et al. 2020, arXiv 1910.10683; Muse reads one), and frozen.

    It is a constant: none of it is a parameter, it stays in eval mode, and a saved state has only its name. T5 ends
    every text with a token of its own, so that the empty one has that. Needs the package `transformers`, of the extra
    `text`.

    Args:
        name: folder or Hub name of a model with weights as safetensors, e.g. google/flan-t5-base.
        length: tokens that a text may have, with the last.

    Examples:
        It is downloaded, so this is not run with the tests.

        ```python
        reader = T5Text("google/flan-t5-base")
        prior = MaskGIT([1024], [16, 16], text=reader)
        prior.sample(1, Conditioning(texts=("a photo of a cat",)))
        ```
    """

    def __init__(self, name: str, length: int = 64):
        super().__init__()
        if length < 1:
            raise ValueError(f"length must be >= 1 token, got {length}")
        self.name, self.length = name, length
        package = _package("transformers")
        try:
            self._tokens = package.AutoTokenizer.from_pretrained(name)
            encoder = package.T5EncoderModel.from_pretrained(name, use_safetensors=True)  # no pickles
        except (OSError, ValueError) as error:
            raise ValueError(f"T5 {name!r} could not be loaded: {str(error).splitlines()[0]}") from error
        self.width = int(encoder.config.d_model)
        # in a tuple, so that neither parameters(), state_dict() nor train() see it
        self._frozen = (encoder.eval().requires_grad_(False),)

    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """States (B, length, width) and where they are of the text (B, length). Raises ValueError for a text of too
        many tokens."""
        (encoder,) = self._frozen
        found = [self._tokens(text)["input_ids"] for text in texts]
        for text, ids in zip(texts, found, strict=True):
            if len(ids) > self.length:
                raise _too_long(text, len(ids), self.length)
        device = device_of(encoder)
        ids_BL = torch.zeros(len(texts), self.length, dtype=torch.int64)
        mask_BL = torch.zeros(len(texts), self.length, dtype=torch.bool)
        for row, ids in enumerate(found):
            ids_BL[row, : len(ids)] = torch.tensor(ids)
            mask_BL[row, : len(ids)] = True
        ids_BL, mask_BL = ids_BL.to(device), mask_BL.to(device)
        with torch.no_grad():
            states_BLD = encoder(input_ids=ids_BL, attention_mask=mask_BL.long()).last_hidden_state
        return states_BLD, mask_BL

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for encoder in self._frozen:
            encoder._apply(fn, recurse)
        return super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType]


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _too_long(text: str, tokens: int, length: int) -> ValueError:
    return ValueError(f"the text {text!r} has {tokens} tokens, and at most {length} are read")


def _package(name: str) -> Any:
    return extras.load(name, "captions need")


def _alphabet(package: Any) -> list[str]:
    """A printable character for each byte, in the order in which a trained vocabulary has them."""
    return sorted(package.pre_tokenizers.ByteLevel.alphabet())


def _byte_level(package: Any, model: Any) -> Any:
    encoder = package.Tokenizer(model)
    encoder.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=True)  # the first word is like any other
    return encoder
