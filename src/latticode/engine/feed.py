"""What the loop eats: examples for a tokenizer or classifier, codes for a prior, with their held-out part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from latticode import distributed
from latticode.data import Loader, TokenDataset, TokenLoader, open_source
from latticode.engine.config import ConfigError, RunConfig
from latticode.engine.tokens import encode
from latticode.tokenizer import Tokenizer
from latticode.types import Batch, CodeBatch


@dataclass(frozen=True)
class Feed:
    """`batches(start)` is infinite and a pure function of seed and position; `held_out` yields images, in order."""

    batches: Callable[[int], Iterator[Any]]
    held_out: Callable[[], Iterator[Batch]]
    skipped: Mapping[str, str]  # records that could not be read, name -> reason; grows while batches are read
    classes: tuple[str, ...] = ()
    vocab: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()
    tokenizer: Any = None  # of a prior


def open_feed(config: RunConfig, folder: Path, device: torch.device, console: Console) -> Feed:
    """The data of a run. A prior's images are encoded once, to `folder`/tokens, unless augmentation varies them."""
    data = config.data
    loader = open_loader(config, data.split, batch_size=config.batch_size, shard=True)
    held_out = open_loader(config, "all" if data.split == "all" else "test", batch_size=config.batch_size)
    classes = loader.source.classes
    if config.kind == "classifier" and data.kind != "image":
        raise ConfigError(f"a classifier takes images, and data.kind is {data.kind}")
    if config.kind == "classifier" and not classes:
        raise ConfigError(f"a classifier needs labels, and {data.source} has none")
    if config.kind != "prior":
        return Feed(loader.batches, held_out.epoch, loader.skipped, classes)

    tokenizer = Tokenizer.from_pretrained(str(config.tokenizer)).to(device)
    if tokenizer.channels != data.channels:
        raise ConfigError(f"the tokenizer takes {tokenizer.channels} channels, data.channels is {data.channels}")
    preprocess = data.preprocess()
    if preprocess.shape is None:
        medium = preprocess.medium
        raise ConfigError(f"a prior needs {medium.noun}s of one size: give data.{medium.sized}")
    grid = tokenizer.grid(preprocess.shape[1:])
    if distributed.rank() == 0:
        tokenizer.save_pretrained(folder / "tokenizer")  # a run stands on its own
    if preprocess.flip or preprocess.windowed:
        batches, skipped = _encoding(loader, tokenizer, device), loader.skipped
    else:
        if distributed.rank() == 0:
            plain = open_loader(config, data.split, batch_size=config.batch_size)
            encode(tokenizer, plain, folder / "tokens", console=console, resume=True)
        stream = {"seed": config.seed, "rank": distributed.rank(), "world": distributed.world_size()}
        if distributed.is_distributed():
            torch.distributed.barrier()
        tokens = TokenDataset(folder / "tokens", expect_hash=tokenizer.fingerprint())
        batches, skipped = TokenLoader(tokens, config.batch_size, **stream).batches, tokens.manifest["skipped"]
    return Feed(batches, held_out.epoch, skipped, classes, tokenizer.vocab, grid, tokenizer)


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


def _encoding(loader: Loader, tokenizer: Any, device: torch.device) -> Callable[[int], Iterator[CodeBatch]]:
    def batches(start: int) -> Iterator[CodeBatch]:
        for batch in loader.batches(start):
            with torch.inference_mode():
                codes = tokenizer.encode(batch.inputs.to(device)).cpu()
            yield CodeBatch(codes.clone(), batch.labels)

    return batches
