"""Commands that turn files into a token dataset and back: encode, decode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latticode.cli.options import (
    Device,
    OwnSize,
    RunFolder,
    Split,
    Tile,
    err,
    out,
)


def encode(
    run: RunFolder,
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder, parquet, tar, idx folder, hub:NAME, embedded:NAME.")
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the token dataset.")],
    split: Annotated[Split, typer.Option(help="Part of the source.")] = Split.all,
    own_size: OwnSize = False,
    tile: Tile = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the shards that are there and encode the rest.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    device: Device = "auto",
) -> None:
    """Turn images, recordings or clips into a token dataset that remembers its tokenizer."""
    from latticode.core.progress import tell_skipped
    from latticode.runs.open import Run
    from latticode.tokenizers.dataset import encode as encode_dataset

    opened = Run.open(run, device)
    tokenizer, loader = opened.tokenizer, opened.whole(source, split.value, own_size=own_size, batch_size=batch_size)
    dataset = encode_dataset(tokenizer, loader, target, tile=tile, console=err, resume=resume)
    tell_skipped(err, dataset.manifest["skipped"])
    out.print(f"{len(dataset)} {loader.preprocess.medium.noun}s in {target}, {tokenizer.bits:.2f} bits per position")


def decode(
    run: RunFolder,
    source: Annotated[Path, typer.Argument(metavar="TOKENS", help="Folder of a token dataset.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the files: PNG, wav or WebP.")],
    tile: Tile = None,
    device: Device = "auto",
) -> None:
    """Turn a token dataset back into images, wav files or animated WebP files, named as they were."""
    from latticode.core.progress import progress
    from latticode.data import TokenDataset
    from latticode.runs.open import Run
    from latticode.tokenizers.dataset import decode as decode_dataset

    opened = Run.open(run, device)
    tokenizer, preprocess = opened.tokenizer, opened.config.data.preprocess()
    dataset = TokenDataset(source, expect_hash=tokenizer.fingerprint())
    with progress(err, "decode", len(dataset)) as advance:
        for positions, images in decode_dataset(tokenizer, dataset, tile=tile):
            for position, image in zip(positions, images, strict=True):
                preprocess.save(target / f"{position:06d}-{Path(dataset.name(position)).stem}", image)
            advance(positions[-1] + 1)
    out.print(f"{len(dataset)} {preprocess.medium.noun}s in {target}")
