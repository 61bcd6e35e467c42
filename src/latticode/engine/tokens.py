"""Images to a token dataset and back, with reading, network and writing side by side."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from latticode import registry
from latticode.data import Loader, TokenDataset, TokenWriter
from latticode.engine.progress import progress


def encode(tokenizer: Any, loader: Loader, folder: Path, *, console: Console, resume: bool = False) -> TokenDataset:
    """Encode everything that `loader.epoch()` yields into a token dataset at `folder`.

    The loader reads ahead in its own threads and the writer runs in another, so the network is the limit. With `resume`
    the shards that are there are kept and the rest is encoded.
    """
    device = next(tokenizer.parameters()).device
    writer = TokenWriter(
        folder,
        tokenizer=registry.spec_of(tokenizer),
        tokenizer_hash=tokenizer.fingerprint(),
        vocab=tokenizer.vocab,
        preprocess=loader.preprocess.record(),
        classes=loader.source.classes,
        resume=resume,
    )
    done = writer.written
    total = len(loader.source)
    with ThreadPoolExecutor(1) as pool, progress(console, "encode", total, start=done) as advance:
        pending: Future[None] | None = None
        for batch in loader.epoch(start=done):
            with torch.inference_mode():
                codes = tokenizer.encode(batch.images.to(device)).cpu()
            if pending:
                pending.result()
            names = [loader.source.name_of(int(i)) for i in batch.indices]
            sizes = [tuple(batch.images.shape[-2:])] * len(names)
            pending = pool.submit(writer.write, codes, batch.labels, names, sizes)
            done += len(names)
            advance(done)
        if pending:
            pending.result()
    writer.close(skipped=loader.skipped)
    return TokenDataset(folder)


def decode(tokenizer: Any, tokens: TokenDataset, batch_size: int = 64) -> Iterator[tuple[list[int], Tensor]]:
    """(positions, images (B, C, H, W) in [-1, 1]) of a token dataset, cropped to the sizes that were encoded."""
    device = next(tokenizer.parameters()).device
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
            yield positions, tokenizer.decode(tokens.codes(positions).to(device), size).cpu()
        start = stop
