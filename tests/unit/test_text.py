"""Readers of captions: what a vocabulary says, keeps and refuses, and what each reader owes a prior."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import tokenizers
import torch
from torch import nn

from latticode.core.registry import build, spec_of
from latticode.priors.text import BPE, T5Text, TextEncoder

COLOURS = ("red", "blue", "small grey", "dark brown")
CAPTIONS = [f"the bird has {c} wings and a {d} beak" for c in COLOURS for d in COLOURS]


def fitted(size: int = 300, length: int = 16, cut: bool = False) -> BPE:
    bpe = BPE(size, length, cut)
    bpe.fit(CAPTIONS)
    return bpe


def encoder() -> TextEncoder:
    return TextEncoder(fitted(), width=16, depth=2, heads=2).eval()


def test_tokens_are_those_of_the_trained_vocabulary() -> None:
    """Against `tokenizers` with the same training: the merges that are kept rebuild it."""
    bpe = fitted(size=400, length=64)
    level = tokenizers.pre_tokenizers.ByteLevel
    peer = tokenizers.Tokenizer(tokenizers.models.BPE())
    peer.pre_tokenizer = level(add_prefix_space=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=399, initial_alphabet=level.alphabet(), show_progress=False, special_tokens=[]
    )
    peer.train_from_iterator(CAPTIONS, trainer)
    for text in [*CAPTIONS, "a word never seen: zebra 7", "é → 鳥"]:
        ids = bpe([text])[0]
        assert [i - 1 for i in ids.tolist() if i] == peer.encode(text).ids
        assert int(ids.max()) < bpe.size


def test_a_text_is_its_tokens_then_padding_and_the_empty_text_is_padding() -> None:
    ids = fitted()(["red wings", "", "  ", "RED  wings\n"])
    assert ids.shape == (4, 16)
    assert ids.dtype == torch.int64
    assert not ids[1].any()
    assert torch.equal(ids[0], ids[3])
    assert torch.equal(ids[1], ids[2])
    known = int((ids[0] > 0).sum())
    assert 0 < known < 16
    assert not ids[0, known:].any()


def test_the_vocabulary_depends_on_the_captions_alone() -> None:
    other = BPE(300, 16)
    other.fit([*reversed(CAPTIONS), "", CAPTIONS[0]])
    assert torch.equal(other.merges, fitted().merges)
    different = BPE(300, 16)
    different.fit(["cars and houses", "a car beside a house"])
    assert not torch.equal(different.merges, fitted().merges)


def test_few_captions_fill_a_part_of_the_vocabulary() -> None:
    bpe = BPE(2048, 8)
    bpe.fit(["ab"])
    assert bpe.fitted
    assert (bpe(["ab"]) > 0).sum() == 1
    assert (bpe(["ba"]) > 0).sum() == 3  # space, b, a
    bpe.fit(["a"])
    assert bpe.fitted


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="not learned yet"):
        BPE(300, 16)(["red"])
    with pytest.raises(ValueError, match="no text"):
        BPE(300, 16).fit(["", " "])
    with pytest.raises(ValueError, match=r"'xyzxyz' has 7 tokens, and at most 4 are read"):
        fitted(length=4)(["red", "xyzxyz"])
    assert torch.equal(fitted(length=4, cut=True)(["xyzxyz"])[0], fitted(length=16)(["xyzxyz"])[0, :4])
    with pytest.raises(ValueError, match="size must be > 257"):
        BPE(257)
    with pytest.raises(ValueError, match="length must be >= 1"):
        BPE(300, 0)
    bad = BPE(300)
    bad.merges.fill_(299)
    with pytest.raises(ValueError, match="no vocabulary"):
        bad(["a"])


def test_without_the_package_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"captions need tokenizers.*latticode\[text\]"):
        BPE(300).fit(CAPTIONS)
    with pytest.raises(ImportError, match=r"captions need transformers.*latticode\[text\]"):
        T5Text("t5-small")


def test_the_vocabulary_is_saved_with_the_weights(tmp_path) -> None:
    ours = encoder()
    safetensors.torch.save_file(ours.state_dict(), tmp_path / "state.safetensors")
    spec = spec_of(ours)
    assert spec == {
        "type": "text_encoder",
        "bpe": {"type": "bpe", "size": 300, "length": 16, "cut": False},
        "width": 16,
        "depth": 2,
        "heads": 2,
    }
    theirs = build(spec).eval()
    assert not theirs.bpe.fitted
    theirs.bpe.fit(["something else"])
    theirs(["something"])  # what it knows now must not outlive the loading
    theirs.load_state_dict(safetensors.torch.load_file(tmp_path / "state.safetensors"))
    for model in (theirs, copy.deepcopy(ours)):
        for found, wanted in zip(model(CAPTIONS), ours(CAPTIONS), strict=True):
            assert torch.equal(found, wanted)


def reads_as_a_prior_needs(reader: Any, length: int) -> None:
    states, mask = reader(["the red bird", "", "blue wings"])
    assert states.shape == (3, length, reader.width)
    assert mask.shape == (3, length)
    assert mask.dtype == torch.bool
    assert mask[:, 0].all()
    assert mask[1].sum() == 1
    assert 1 < mask[0].sum() < length
    alone = reader(["the red bird"])[0]
    assert torch.allclose(alone[0][mask[0]], states[0][mask[0]], atol=1e-5)
    assert not torch.allclose(states[0, 0], states[2, 0], atol=1e-3)  # the first state has seen the text


def test_encoder_reads_as_a_prior_needs() -> None:
    reads_as_a_prior_needs(encoder(), 17)


def test_padding_changes_nothing() -> None:
    model = encoder()
    states, mask = model(["red wings"])
    with torch.no_grad():
        model.embedding.weight[0].normal_()
    moved, _ = model(["red wings"])
    assert torch.allclose(states[mask], moved[mask], atol=1e-6)


def test_every_word_counts_and_so_does_its_place() -> None:
    model = encoder()
    states, _ = model(["red blue bird", "blue red bird", "red blue wings"])
    assert not torch.allclose(states[0, 0], states[1, 0], atol=1e-3)
    assert not torch.allclose(states[0, 0], states[2, 0], atol=1e-3)


def test_encoder_learns_through_the_text() -> None:
    model = encoder()
    states, mask = model(["red bird"])
    states[mask].square().sum().backward()
    rows = model.embedding.weight.grad.abs().sum(1)  # type: ignore[union-attr]
    assert set(rows.nonzero().flatten().tolist()) >= set(model.bpe(["red bird"])[0].tolist()) - {0}


class StubT5(nn.Module):
    """As much of a T5 as the reader touches."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(d_model=6)
        self.embedding = nn.Embedding(20, 6)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        x = self.dropout(self.embedding(input_ids)) * attention_mask[..., None]
        return SimpleNamespace(last_hidden_state=x + x.sum(1, keepdim=True))


def stub(monkeypatch) -> None:
    def from_pretrained(name: str, **options: Any) -> StubT5:
        if name != "here":
            raise OSError(f"{name} is not a folder\nand much more")
        assert options == {"use_safetensors": True}
        return StubT5()

    def tokens(text: str) -> dict[str, list[int]]:
        return {"input_ids": [*(2 + ord(word[0]) % 18 for word in text.split()), 1]}

    package = SimpleNamespace(
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda name: tokens),
        T5EncoderModel=SimpleNamespace(from_pretrained=from_pretrained),
    )
    monkeypatch.setitem(sys.modules, "transformers", package)


def test_t5_is_a_constant(monkeypatch) -> None:
    stub(monkeypatch)
    reader = T5Text("here", 8)
    holder = nn.Sequential(reader, nn.Linear(1, 1)).train()
    assert spec_of(reader) == {"type": "t5", "name": "here", "length": 8}
    assert reader.width == 6
    reads_as_a_prior_needs(reader, 8)  # without the stub's dropout
    assert not list(reader.parameters())
    assert not reader.state_dict()
    assert not reader(["red"])[0].requires_grad
    holder.to(torch.float64)
    assert reader(["red"])[0].dtype == torch.float64
    with pytest.raises(ValueError, match="'a b c d e f g h' has 9 tokens, and at most 8 are read"):
        reader(["a b c d e f g h"])
    with pytest.raises(ValueError, match=r"T5 'there' could not be loaded: there is not a folder$"):
        T5Text("there")
    with pytest.raises(ValueError, match="length must be >= 1"):
        T5Text("here", 0)


def test_t5_of_transformers(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "the": 3, "red": 4, "blue": 5, "bird": 6, "wings": 7}
    words_to_ids = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    words_to_ids.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words_to_ids.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_to_ids, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(tmp_path)
    config = transformers.T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path)
    reader = T5Text(str(tmp_path), 8).train()
    reads_as_a_prior_needs(reader, 8)
    assert not reader.state_dict()
