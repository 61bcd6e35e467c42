"""Images, recordings or clips to a token dataset and back, with reading, network and writing side by side."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from latticode.core import registry
from latticode.core.modules import device_of
from latticode.core.progress import progress
from latticode.data import Loader, TokenDataset, TokenWriter
from latticode.data.tokens import MANIFEST, UnfinishedError
from latticode.tokenizers import tiling


def encode(
    tokenizer: Any,
    loader: Loader,
    folder: Path,
    *,
    tile: int | None = None,
    console: Console,
    resume: bool = False,
) -> TokenDataset:
    """Encode everything that `loader.epoch()` yields into a token dataset at `folder`.

    The loader reads ahead in its own threads and the writer runs in another, so the network is the limit. Images longer
    than `tile` are encoded in tiles, see `tiling.encode`. With `resume` the shards that are there are kept and the rest
    is encoded. Raises ValueError if `folder` holds other tokens.
    """
    identity: dict[str, Any] = {"tokenizer": registry.spec_of(tokenizer), "tokenizer_hash": tokenizer.fingerprint()}
    if resume and (folder / MANIFEST).exists():
        try:
            return TokenDataset(folder, expect_hash=identity["tokenizer_hash"], expect_spec=identity["tokenizer"])
        except UnfinishedError:
            pass
    writer = TokenWriter(
        folder,
        **identity,
        vocab=tokenizer.vocab,
        preprocess=loader.preprocess.record() | ({} if tile is None else {"tile": tile}),
        classes=loader.source.classes,
        ragged=loader.preprocess.shape is None,
        resume=resume,
    )
    device = device_of(tokenizer)
    left = done = writer.written  # images of finished shards are read again, to count them, but not encoded
    total = 0 if loader.streaming else len(loader)
    with ThreadPoolExecutor(1) as pool, progress(console, "encode", total, start=done) as advance:
        pending: Future[None] | None = None
        for batch in loader.epoch():
            batch, left = batch.drop(min(left, len(batch.inputs))), max(0, left - len(batch.inputs))
            if not len(batch.inputs):
                continue
            with torch.inference_mode():
                codes = tiling.encode(tokenizer, batch.inputs.to(device), tile).cpu()
            if pending:
                pending.result()
            names = [loader.source.name_of(int(i)) for i in batch.indices]
            sizes = [tuple(batch.inputs.shape[2:])] * len(names)
            pending = pool.submit(writer.write, codes, batch.labels, names, sizes, batch.texts)
            done += len(names)
            advance(done)
        if pending:
            pending.result()
    writer.skip(loader.skipped)
    writer.close()
    return TokenDataset(folder)


def decode(
    tokenizer: Any, tokens: TokenDataset, batch_size: int = 64, tile: int | None = None
) -> Iterator[tuple[list[int], Tensor]]:
    """(positions, values (B, C, *size) in [-1, 1]) of a token dataset, cropped to the sizes that were encoded.

    What kept its own size comes one by one; images longer than `tile` are decoded in tiles, see `tiling.decode`.
    """
    if any(shard["grid"] is None for shard in tokens.manifest["shards"]):
        batch_size = 1
    device = device_of(tokenizer)
    start = 0
    while start < len(tokens):
        stop = start + 1
        shape, size = tokens[start][0].shape, tokens.size(start)
        while stop < min(start + batch_size, len(tokens)):
            if tokens[stop][0].shape != shape or tokens.size(stop) != size:
                break
            stop += 1
        positions = list(range(start, stop))
        with torch.inference_mode():
            yield positions, tiling.decode(tokenizer, tokens.codes(positions).to(device), size, tile).cpu()
        start = stop
