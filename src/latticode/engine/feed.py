"""Training data of a run: examples for a tokenizer or classifier, codes for a prior, and the held-out part of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from latticode.core import distributed
from latticode.core.pretrained import Pretrained
from latticode.core.types import Batch, CodeBatch, Coder
from latticode.data import Loader, TokenDataset, TokenLoader, open_source
from latticode.data.records import TEXT_COLUMNS
from latticode.engine.config import ConfigError, RunConfig
from latticode.engine.given import GivenLoader
from latticode.priors.text import BPE
from latticode.tokenizers.dataset import encode

CAPTIONS = 1_000_000  # that a vocabulary is learned from at the most


@dataclass(frozen=True)
class Feed:
    """`batches(start)` is infinite and a pure function of seed and position; `held_out` yields images, in order.

    Examples:
        >>> batch = Batch(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), torch.arange(2))
        >>> feed = Feed(lambda start: iter([batch]), lambda: iter([batch]), skipped={}, classes=("cat", "dog"))
        >>> len(next(feed.batches(0)).inputs), feed.tokenizer
        (2, None)
    """

    batches: Callable[[int], Iterator[Any]]
    held_out: Callable[[], Iterator[Batch]]
    skipped: Mapping[str, str]  # records that could not be read, name -> reason; grows while batches are read
    classes: tuple[str, ...] = ()
    vocab: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()
    radix: tuple[int, ...] | None = None
    tokenizer: Any = None  # of a prior: a `Coder`, and mostly a `Tokenizer`
    texts: Callable[[], Iterator[str]] = lambda: iter(())  # all captions of a prior's training images


def open_feed(
    config: RunConfig, folder: Path, device: torch.device, console: Console, given: tuple[Any, Any] | None = None
) -> Feed:
    """The data of a run, or what is `given` in their place: training and held-out data, the latter perhaps None. A
    prior's images are encoded once, to `folder`/tokens, unless they are given, augmentation varies them or the prior
    wants codes drawn anew at every look (`soft_labels`)."""
    data = config.data
    if given is None:
        loader: Any = open_loader(config, data.split, batch_size=config.batch_size, shard=True)
        held_out = open_loader(config, "all" if data.split == "all" else "test", batch_size=config.batch_size).epoch
    else:
        loader = GivenLoader(given[0], config, shard=True)
        held_out = (lambda: iter(())) if given[1] is None else GivenLoader(given[1], config).epoch
    classes = loader.source.classes
    if config.kind == "classifier" and data.kind != "image":
        raise ConfigError(f"a classifier takes images, and data.kind is {data.kind}")
    if config.kind == "classifier" and not classes:
        raise ConfigError(f"a classifier needs labels, and {data.source} has none")
    if config.kind != "prior":
        return Feed(loader.batches, held_out, loader.skipped, classes)

    tokenizer = Pretrained.from_pretrained(str(config.tokenizer)).to(device)
    if not isinstance(tokenizer, Coder):
        raise ConfigError(f"{config.tokenizer} holds a {type(tokenizer).__name__}, not a Tokenizer")
    if tokenizer.channels != data.channels:
        raise ConfigError(f"the tokenizer takes {tokenizer.channels} channels, data.channels is {data.channels}")
    preprocess = data.preprocess()
    if preprocess.shape is None:
        medium = preprocess.medium
        raise ConfigError(f"a prior needs {medium.noun}s of one size: give data.{medium.sized}")
    grid = tokenizer.grid(preprocess.shape[1:])
    if distributed.rank() == 0:
        tokenizer.save_pretrained(folder / "tokenizer")  # a run stands on its own
    soft = config.spec.get("soft_labels", 0.0)
    if isinstance(soft, Mapping):
        raise ConfigError("prior.soft_labels cannot be a ramp: codes are drawn at one temperature")
    if soft and tokenizer.guides:
        raise ConfigError("prior.soft_labels needs a tokenizer that draws its codes, and uvim does not")
    if given or preprocess.flip or preprocess.windowed or soft or tokenizer.guides:  # codes that guide come with images
        batches, skipped = _encoding(loader, tokenizer, device, soft), loader.skipped
        texts = loader.source.captions
    else:
        if distributed.rank() == 0:
            plain = open_loader(config, data.split, batch_size=config.batch_size)
            encode(tokenizer, plain, folder / "tokens", console=console, resume=True)
        stream = {"seed": config.seed, "rank": distributed.rank(), "world": distributed.world_size()}
        if distributed.is_distributed():
            torch.distributed.barrier()
        tokens = TokenDataset(folder / "tokens", expect_hash=tokenizer.fingerprint())
        batches, skipped = TokenLoader(tokens, config.batch_size, **stream).batches, tokens.manifest["skipped"]
        texts = tokens.captions
    return Feed(batches, held_out, skipped, classes, tokenizer.vocab, grid, tokenizer.radix, tokenizer, texts)


def open_loader(config: RunConfig, split: str, *, batch_size: int, shard: bool = False, whole: bool = False) -> Loader:
    """The examples of `split` under the run's preprocessing; `shard` gives every rank its part, `whole` takes
    recordings and clips from beginning to end."""
    preprocess = config.data.preprocess()
    return Loader(
        open_source(config.data.source, split, holdout=config.data.holdout, medium=preprocess.medium),
        preprocess.whole() if whole else preprocess,
        batch_size,
        seed=config.seed,
        rank=distributed.rank() if shard else 0,
        world=distributed.world_size() if shard else 1,
        workers=config.data.workers,
    )


def _encoding(
    loader: Loader | GivenLoader, tokenizer: Any, device: torch.device, soft: float
) -> Callable[[int], Iterator[CodeBatch]]:
    """Batches that are encoded as they are wanted; `soft` > 0: with codes drawn at that temperature, and what from."""

    def batches(start: int) -> Iterator[CodeBatch]:
        for batch in loader.batches(start):
            inputs = batch.inputs.to(device)
            with torch.no_grad():  # not inference_mode, whose tensors no loss may keep for its backward pass
                codes, p = tokenizer.soften(inputs, soft) if soft else (tokenizer.encode(inputs), None)
                images = tokenizer.image(inputs)
            yield CodeBatch(codes, batch.labels, batch.texts, p, images)

    return batches


def learn_vocabulary(model: Any, feed: Feed) -> None:
    """Let the byte pairs of a prior that reads text learn from the captions that it trains on, if they are not learned
    yet. Raises ConfigError if there are no captions."""
    if getattr(model, "text", None) is None:
        return
    texts = islice(feed.texts(), CAPTIONS)
    first = next(texts, None)
    if first is None:
        raise ConfigError(
            "the prior reads text and data.source has no captions; it takes them from a parquet column "
            f"{', '.join(TEXT_COLUMNS)}, or NAME.txt beside NAME.jpg in a folder or tar file"
        )
    for part in model.modules():
        if isinstance(part, BPE) and not part.fitted:
            part.fit(chain([first], texts))
