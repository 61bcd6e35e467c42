"""Captions on their way: from every source through batches and tokens into training and evaluation."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers import QUIET, encode, tiny_tokenizer
from latticode import load
from latticode.core.types import CodeBatch, Conditioning, Sampling
from latticode.data import (
    Loader,
    Preprocess,
    Record,
    Source,
    StreamSource,
    TokenDataset,
    TokenLoader,
    TokenWriter,
    open_source,
)
from latticode.data import decoding as decoding_module
from latticode.data.records import ArraySource
from latticode.engine import ConfigError, TrainingError, load_config, train
from latticode.engine.objectives import PriorObjective, drawn_texts
from latticode.evaluate import evaluate_prior
from latticode.evaluate.captions import HeldOut
from latticode.priors.base import Prior
from latticode.priors.text import BPE

CAPTIONS: list[list[str]] = [["a dark square", "it is dark"], ["a bright square"], [], ["ein Quadrat, grün"]]


def png(value: int = 0) -> bytes:
    return encode(Image.new("L", (8, 8), value))


def texts_of(source: Source) -> list[list[str]]:
    return [list(source[i].texts) for i in range(len(source))]


# Sources


@pytest.mark.parametrize("column", ["captions", "caption", "text"])
def test_parquet_columns_of_lists(tmp_path, column) -> None:
    images, lists = [png(i) for i in range(4)], [*CAPTIONS[:2], None, ["  ", "ein Quadrat, grün ", None]]
    pq.write_table(pa.table({"image": images, "label": [0, 1, 0, 1], column: lists}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"), "all")
    assert texts_of(source) == CAPTIONS
    assert (source[3].label, source[3].content) == (1, images[3])


def test_parquet_strings_and_files_without(tmp_path) -> None:
    pq.write_table(pa.table({"image": [png()] * 3, "text": ["one", None, ""]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [png()], "text": [7]}), tmp_path / "b.parquet")  # a number is no caption
    assert texts_of(open_source(str(tmp_path), "all")) == [["one"], [], [], []]


def test_folder_has_them_beside_the_images(tmp_path) -> None:
    for name, told in (("a/one.png", "first\n\n second \n"), ("a/two.png", None), ("b/three.v2.png", "third")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
        if told is not None:
            (tmp_path / name).with_suffix(".txt").write_text(told)
    source = open_source(str(tmp_path), "all")
    assert texts_of(source) == [["first", "second"], [], ["third"]]
    assert source.classes == ("a", "b")
    assert texts_of(open_source(str(tmp_path / "b" / "three.v2.png"))) == [["third"]]


def test_tar_groups_them_with_their_image(tmp_path) -> None:
    members = {"x.jpg": png(), "x.txt": "one\ntwo é".encode(), "y.jpg": png(1), "z.txt": b"alone"}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = open_source(str(tmp_path / "a.tar"), "all")
    assert texts_of(source) == [["one", "two é"], []]
    assert source[1].content == png(1)
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(data[: data.index(b"two") + 2])
    with pytest.raises(ValueError, match=r"b\.tar is not a readable"):
        open_source(str(tmp_path / "b.tar"), "all")


@pytest.mark.parametrize("lists", [True, False])
def test_hub(tmp_path, monkeypatch, lists) -> None:

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    column = pa.array([["a", "b"], ["c"]]) if lists else pa.array(["a", "c"])
    images = [{"bytes": png(i), "path": None} for i in range(2)]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"image": images, "caption": column}), tmp_path / "data" / "train.parquet")
    wanted = [["a", "b"], ["c"]] if lists else [["a"], ["c"]]
    assert texts_of(open_source(f"hub:{tmp_path / 'data'}", "all")) == wanted
    stream = open_source(f"hub:{tmp_path / 'data'}?streaming", "all")
    assert isinstance(stream, StreamSource)
    assert [list(record.texts) for _, record in stream.records()] == wanted


# Batches


class Captioned(ArraySource):
    """Grey images whose captions name their index; every fourth has none."""

    def __init__(self, count: int = 13):
        images = np.arange(count, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
        super().__init__("made", images, np.arange(count) % 3, (), [f"r{i}" for i in range(count)])

    def __getitem__(self, i: int) -> Record:
        record = super().__getitem__(i)
        return Record(record.content, record.label, record.name, texts=told(i))


class Stream(StreamSource):
    def __init__(self, base: Source):
        self.base, self.name, self.classes = base, "stream", base.classes

    def records(self):
        return ((i, self.base[i]) for i in range(len(self.base)))


def told(i: int) -> tuple[str, ...]:
    return () if i % 4 == 3 else tuple(f"caption {k} of {i}" for k in range(1 + i % 3))


KINDS = {
    "cached": Preprocess(8, 1, flip=True),
    "random crop": Preprocess(4, 1, crop="random", flip=True),
    "own size": Preprocess(channels=1),
}


@pytest.mark.parametrize("room", [decoding_module.CACHE_BYTES, 0], ids=["kept", "read again"])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_hold_the_captions_of_their_images(kind, room, monkeypatch) -> None:
    monkeypatch.setattr(decoding_module, "CACHE_BYTES", room)
    for source in (Captioned(), Stream(Captioned())):
        loader = Loader(source, KINDS[kind], 5)
        batches = loader.batches()
        for batch in [*(next(batches) for _ in range(8)), *loader.epoch()]:
            assert batch.texts == tuple(told(int(i)) for i in batch.indices)


def test_without_captions_there_are_no_texts() -> None:
    plain = Captioned()
    loader = Loader(ArraySource("made", plain.images, plain.labels, (), plain.names), KINDS["cached"], 5)
    assert {batch.texts for batch in [next(loader.batches()), *loader.epoch()]} == {()}
    assert not loader._decoder._texts


# Tokens


IDENTITY = {"tokenizer": {"type": "x"}, "tokenizer_hash": "abc", "vocab": (40,), "preprocess": {}}


def write(folder: Path, start: int, stop: int, *, captions: bool = True, **options: Any) -> TokenWriter:
    writer = TokenWriter(folder, **IDENTITY, shard_size=5, **options)
    for i in range(start, stop):
        texts = (told(i),) if captions else ()
        writer.write(torch.full((1, 2, 1), i), torch.tensor([0]), [f"r{i}"], [(8, 8)], texts)
    return writer


@pytest.mark.parametrize("ragged", [False, True])
def test_tokens_keep_captions_and_their_loader_gives_them(tmp_path, ragged) -> None:
    write(tmp_path / "t", 0, 13, ragged=ragged).close()
    tokens = TokenDataset(tmp_path / "t", verify=True)
    assert tokens.texts() == tuple(told(i) for i in range(13))
    assert tokens.texts([12, 0, 5]) == (told(12), told(0), told(5))
    loader = TokenLoader(tokens, 4)
    batches = loader.batches()
    for batch in [*(next(batches) for _ in range(6)), *loader.epoch()]:
        assert batch.texts == tuple(told(int(i)) for i in batch.codes[:, 0, 0])
        assert batch.to("cpu").texts == batch.texts


def test_resumed_tokens_are_the_same(tmp_path) -> None:
    write(tmp_path / "whole", 0, 13).close()
    killed = write(tmp_path / "cut", 0, 8)
    assert killed.written == 5
    write(tmp_path / "cut", 5, 13, resume=True).close()
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "cut" / path.name).read_bytes() == path.read_bytes()


def test_shards_say_whether_they_have_captions(tmp_path) -> None:
    writer = write(tmp_path / "t", 0, 5)
    writer.write(torch.full((5, 2, 1), 7), torch.zeros(5), list("abcde"), [(8, 8)] * 5)
    writer.close()
    tokens = TokenDataset(tmp_path / "t")
    assert [shard.get("texts") for shard in tokens.manifest["shards"]] == [True, None]
    assert tokens.texts([9, 0]) == ((), told(0))


def test_tokens_without_captions_are_as_they_were(tmp_path) -> None:
    write(tmp_path / "t", 0, 6, captions=False).close()
    assert "texts" not in (tmp_path / "t" / "names-00000.jsonl").read_text()
    assert "texts" not in (tmp_path / "t" / "manifest.json").read_text()
    tokens = TokenDataset(tmp_path / "t")
    assert tokens.texts() == tokens.texts([1]) == ()
    assert next(TokenLoader(tokens, 4).batches()).texts == ()
    with pytest.raises(ValueError, match=r"set of texts per record, got 1 codes, .* 2 texts"):
        write(tmp_path / "bad", 0, 0).write(torch.zeros(1, 2, 1).long(), torch.zeros(1), ["a"], [(8, 8)], ((), ()))


# Training


class Reader(nn.Module):
    def forward(self, texts: Any) -> Any:
        raise NotImplementedError


class Listener(Prior):
    """Remembers what it was told. Codes cost 2 bits with a caption that names them, 3 with another."""

    def __init__(self, classes: int = 0, reads: bool = True, deaf: bool = False):
        super().__init__([256], [2, 2], classes)
        self.text, self.deaf = Reader() if reads else None, deaf
        self.told: list[Conditioning | None] = []

    def _nats(self, codes: Tensor, condition: Any) -> dict[str, Tensor]:
        raise NotImplementedError

    def _draw(self, known: Tensor, condition: Any, noise: Tensor, choose: Any) -> Tensor:
        raise NotImplementedError

    def loss(self, codes: Tensor, cond: Conditioning | None = None, soft: Tensor | None = None) -> dict[str, Tensor]:
        self.told.append(cond)
        return {"cross_entropy": torch.zeros(())}

    def bits(self, codes: Tensor, cond: Conditioning | None = None) -> Tensor:
        texts = self.texts_of(cond, len(codes))
        right = [
            self.deaf or text.endswith(f" {int(code)}") for code, text in zip(codes[:, 0, 0, 0], texts, strict=True)
        ]
        return torch.where(torch.tensor(right), 2.0, 3.0) * 4

    def sample(self, count: int, cond: Conditioning | None = None, **options: Any) -> Tensor:
        self.told.append(cond)
        greys = [int(text.rpartition(" ")[2] or 0) for text in self.texts_of(cond, count)]
        return torch.tensor(greys).view(-1, 1, 1, 1).expand(-1, 2, 2, 1)


def test_one_caption_is_drawn_for_each_image() -> None:
    texts = (("a", "b", "c"), (), ("d",))
    draws = [drawn_texts(texts) for _ in range(300)]
    assert {draw[1:] for draw in draws} == {("", "d")}
    counts = [sum(draw[0] == text for draw in draws) for text in "abc"]
    assert min(counts) > 70  # 100 each, give or take 8
    torch.manual_seed(5)
    first = [drawn_texts(texts) for _ in range(9)]
    torch.manual_seed(5)
    assert first == [drawn_texts(texts) for _ in range(9)]


@pytest.mark.parametrize(("reads", "classes"), [(True, 0), (True, 3), (False, 3), (False, 0)])
def test_a_prior_is_told_what_it_can_be_told(reads, classes) -> None:
    batch = CodeBatch(torch.zeros(2, 2, 2, 1).long(), torch.tensor([0, 1]), (("one",), ("two",)))
    prior = Listener(classes, reads)
    before = torch.get_rng_state()
    list(PriorObjective().turns(prior, batch, 0))
    assert torch.equal(before, torch.get_rng_state()) is not reads  # nothing is drawn for a prior without text
    (cond,) = prior.told
    assert cond is not None
    assert cond.texts == (("one", "two") if reads else None)
    assert (cond.labels is None) == (not classes)
    plain = CodeBatch(batch.codes, batch.labels)
    list(PriorObjective().turns(prior, plain, 0))
    assert prior.told[1].texts == (("", "") if reads else None)  # type: ignore[union-attr]


def captioned_digits(folder: Path) -> Path:
    source = open_source("embedded:digits", "all")
    records = [source[i] for i in range(60)]
    images = [encode(Image.fromarray(np.asarray(record.content))) for record in records]
    lists = [[f"the digit {record.label}", f"handwritten {record.label}"] for record in records]
    folder.mkdir()
    pq.write_table(pa.table({"image": images, "captions": lists}), folder / "digits.parquet")
    return folder


def config(tokenizer: Path, source: Any, *more: str):
    text = "{type: text_encoder, bpe: {type: bpe, size: 300, length: 12}, width: 8, depth: 1, heads: 1}"
    small = ["prior.width=8", "prior.depth=1", "prior.heads=1", f"prior.text={text}"]
    run = ["steps=4", "batch_size=4", "log_every=2", "save_every=2", "picture_every=4", "data.workers=0"]
    data = [f"data.source={source}", "data.size=8", "data.channels=1"]
    return load_config("maskgit", [f"tokenizer={tokenizer}", *small, *run, *data, *more])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["data.flip=false", "data.flip=true"])
def test_a_prior_learns_to_read_and_resumes(tmp_path, monkeypatch, tokenizer, how) -> None:
    """From an encoded data set and from images that are encoded as they come."""
    source = captioned_digits(tmp_path / "data")
    told: list[Any] = []
    turns = PriorObjective.turns

    def watched(self, model, batch, step):
        told.append(batch.texts)
        return turns(self, model, batch, step)

    monkeypatch.setattr(PriorObjective, "turns", watched)
    run = train(config(tokenizer, source, how), tmp_path / "run", console=QUIET)
    assert (run / "tokens").is_dir() == (how == "data.flip=false")
    captions = [text for own in texts_of(open_source(str(source))) for text in own]
    assert all(set(own) <= set(captions) and len(own) == 2 for texts in told for own in texts)
    wanted = BPE(300, 12)
    wanted.fit(captions)
    prior = load(run)
    assert torch.equal(prior.text.bpe.merges, wanted.merges)  # of the training part alone
    codes = torch.randint(12, (1, *prior.grid, 1))
    bits = [float(prior.bits(codes, Conditioning(texts=(text,)))) for text in ("the digit 3", "the digit 4")]
    assert bits[0] != bits[1]

    def stopped(self, model, batch, step):
        if step == 3:
            raise TrainingError("stopped")
        return watched(self, model, batch, step)

    monkeypatch.setattr(PriorObjective, "turns", stopped)
    with pytest.raises(TrainingError, match="stopped"):
        train(config(tokenizer, source, how), tmp_path / "cut", console=QUIET)
    monkeypatch.setattr(PriorObjective, "turns", turns)
    monkeypatch.setattr(BPE, "fit", lambda *_: pytest.fail("a saved vocabulary is kept"))
    train(config(tokenizer, source, how), tmp_path / "cut", console=QUIET, resume=True)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "cut"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_prior_that_reads_needs_captions(tmp_path, tokenizer) -> None:
    with pytest.raises(
        ConfigError, match=r"the prior reads text and data\.source has no captions; .*captions, caption"
    ):
        train(config(tokenizer, "embedded:digits"), tmp_path / "run", console=QUIET)


# Evaluation


class Greys(nn.Module):
    """A tokenizer whose codes are grey levels."""

    vocab, bits = (256,), 8.0

    def encode(self, images: Tensor) -> Tensor:
        return ((images[:, 0, ::4, ::4, None] + 1) * 127.5).round().long()

    def decode(self, codes: Tensor, size: Any = None) -> Tensor:
        return codes[..., 0].float().repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None] / 127.5 - 1


class ByGrey(nn.Module):
    """Knows the label of a made image."""

    classes = 3

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(((images[:, 0, 0, 0] + 1) * 127.5).round().long() % 3, 3).float()


def score(prior: Listener, source: Source | None = None, **options: Any) -> dict[str, Any]:
    loader = Loader(source or Captioned(), Preprocess(8, 1), 5)
    tokenizer: Any = Greys()
    judge: Any = ByGrey()
    return evaluate_prior(
        prior,
        tokenizer,
        loader,
        sampling=Sampling(),
        classifier=judge,
        **options,
    )


def test_a_prior_that_listens_and_one_that_does_not() -> None:
    seen: list[tuple[int, int]] = []
    result = score(Listener(), samples=30, batch_size=7, progress=lambda *x: seen.append(x))
    assert seen[-1] == (13 + 30 + 10,) * 2 or seen[-1][0] == 13 + 30 + 10
    json.dumps(result, allow_nan=False)
    assert result["compression_cost"] == pytest.approx((2 * 10 + 3 * 3) / 13)  # three images have no caption
    assert (result["caption_gain_bits"], result["caption_accuracy"], result["caption_images"]) == (4, 1, 10)
    assert result["label_accuracy"] == 1  # samples show what their captions say
    assert "captions are asked for" in result["protocol"]["labels"]
    assert {"caption_gain_bits", "caption_accuracy"} <= result["protocol"].keys()
    deaf = score(Listener(deaf=True), samples=3)
    assert (deaf["caption_gain_bits"], deaf["caption_accuracy"]) == (0, 0.5)
    assert "caption_gain_bits" not in score(Listener(reads=False), samples=3)
    assert score(Listener(), samples=3, limit=1)["caption_gain_bits"] is None  # nobody to swap captions with


def test_samples_ask_for_all_captions_in_turn() -> None:
    """Whatever the batch size: every image once, then again with its second caption."""
    asked = []
    for size in (4, 30):
        prior = Listener(classes=3)
        score(prior, samples=26, batch_size=size)
        told = [cond for cond in prior.told if cond is not None]
        texts = [text for cond in told for text in cond.texts or ()]
        labels = torch.cat([cond.labels for cond in told if cond.labels is not None]).tolist()
        asked.append((texts, labels))
    assert asked[0] == asked[1]
    texts, labels = asked[0]
    firsts = {f"caption 0 of {i}" for i in range(13) if i % 4 != 3}
    assert set(texts[:13]) == firsts | {""}
    assert {text for text in texts[13:] if text.startswith("caption 1")} == {
        f"caption 1 of {i}" for i in range(13) if i % 4 != 3 and i % 3
    }
    assert all(not text or int(text.split()[-1]) % 3 == label for text, label in zip(texts, labels, strict=True))


def test_strangers_are_never_of_the_image_itself() -> None:
    """Captions that several images share tell nothing when they are swapped."""
    held_out = HeldOut(Listener(), 0)
    texts = (("x", "y"), ("y", "z"), ("x",), ("q",), ())
    held_out.add(torch.zeros(5, 2, 2, 1), torch.zeros(5), texts, torch.zeros(5))
    for image, text in held_out._strangers().items():
        assert text not in texts[image]
        assert text in {"x", "y", "q"}  # the first of another
    assert set(held_out._strangers()) == {0, 1, 2, 3}
