"""Every prior trained on the tokens of one data set for the same number of steps, over tokenizers trained here.

    python benchmarks/generators.py train fashion-mnist --data data --out runs/generators   # resumable
    python benchmarks/generators.py table fashion-mnist --data data --out runs/generators > generators.md

`train` trains and scores what is not finished yet: first the two classifiers (one whose features FID, precision and
recall look through, one that judges labels) and the tokenizers, then one prior after another. `table` prints the rows
and draws samples, one row of pictures for each prior and one column for each class, into OUT/GROUP.png.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from systems import finish, line
from torch import nn

from latticode import runs
from latticode.nn.transformer import Transformer
from latticode.outputs import preview
from latticode.pictures import grid_image, save_png
from latticode.priors.base import Prior
from latticode.priors.pixelcnn import RasterNetwork
from latticode.types import Conditioning, Sampling

Result = dict[str, Any]
SAMPLING = Sampling(guidance=1.0, revisions=2)
SAMPLES, HELD_OUT = 1000, 2000


@dataclass(frozen=True)
class Group:
    """`tokenizers` maps a name to a recipe and its overrides, `rows` a name to a tokenizer, a recipe and overrides."""

    source: str
    data: tuple[str, ...]
    tokenizers: dict[str, tuple[str, ...]]
    rows: dict[str, tuple[str, ...]]
    classifier: tuple[str, ...]


SHORT = ("steps=1000",)  # of the tokenizers
STEPS = "steps=600"  # of the priors
GPT = ("gpt-fashion-mnist", STEPS)
ROWS: dict[str, tuple[str, ...]] = {
    "maskgit": ("fsq", "maskgit-fashion-mnist", STEPS),
    "mage": ("fsq", "mage-cifar10", STEPS, "prior.classes=10"),
    "gpt": ("fsq", *GPT),
    "gpt-llama": ("fsq", *GPT, "prior.style=llama", "prior.places=axial"),
    "gpt-digits": ("fsq", *GPT, "prior.digits=LEVELS", "prior.inner_depth=1"),
    "pixelcnn": ("fsq", "pixelcnn-fashion-mnist", STEPS),
    "pixelsnail": ("fsq", "pixelsnail-fashion-mnist", STEPS),
    "rq-transformer": ("rqvae", "rqtransformer-cifar10", STEPS, "prior.soft_labels=0.0"),
    "rq-transformer-soft": ("rqvae", "rqtransformer-cifar10", STEPS),
    "contextual-rq": ("rqvae", "contextual-rq-cifar10", STEPS),
    "hq-transformer": ("hqvae", "hqtransformer-cifar10", STEPS),
    "two-level": ("vqvae2", "two-level-cifar10", STEPS),
    "muse": ("vqvae2", "muse-cifar10", STEPS),
}
GREY = ("data.size=32", "data.channels=1", "data.flip=false")
GROUPS = {
    "fashion-mnist": Group(
        "fashion-mnist",
        GREY,
        {
            "fsq": ("fsq-fashion-mnist", *SHORT),
            "rqvae": ("rqvae-cifar10", *SHORT),
            "hqvae": ("hqvae-cifar10", *SHORT),
            "vqvae2": ("vqvae2-cifar10", *SHORT),
        },
        {name: tuple(part.replace("LEVELS", "[8, 5, 5, 5]") for part in row) for name, row in ROWS.items()},
        classifier=("steps=1500",),
    ),
    "cifar10": Group(
        "cifar10",
        ("data.size=32",),
        {
            "fsq": ("fsq-cifar10", *SHORT, "tokenizer.quantizer.levels=[8, 5, 5, 5]"),
            "rqvae": ("rqvae-cifar10", *SHORT),
            "hqvae": ("hqvae-cifar10", *SHORT),
            "vqvae2": ("vqvae2-cifar10", *SHORT),
        },
        {name: tuple(part.replace("LEVELS", "[8, 5, 5, 5]") for part in row) for name, row in ROWS.items()},
        classifier=("steps=3000", "data.flip=true"),
    ),
}
COLUMNS: dict[str, Callable[[Result], str]] = {
    "tokenizer": lambda r: r["tokenizer"],
    "parameters": lambda r: f"{r['parameters'] / 1e6:.2f} M",
    "minutes": lambda r: f"{r['seconds'] / 60:.1f}",
    "bits per position": lambda r: f"{r['compression_cost']:.2f} of {r['compression_cost_uniform']:.2f}",
    "bits per pixel": lambda r: f"{r['bits_per_pixel']:.3f}",
    "FID": lambda r: f"{r['fid_classifier']:.2f}",
    "precision": lambda r: f"{r['precision_classifier']:.3f}",
    "recall": lambda r: f"{r['recall_classifier']:.3f}",
    "labels": lambda r: f"{100 * r['label_accuracy']:.1f} %",
    "samples/s": lambda r: f"{r['samples_per_second']:.1f}",
    "passes": lambda r: r["passes"],
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Name = Annotated[str, typer.Argument(metavar="GROUP", help=f"One of {', '.join(GROUPS)}.")]
Data = Annotated[Path, typer.Option(help="Folder of the data sets.")]
Out = Annotated[Path, typer.Option(help="Folder of the runs.")]


@app.command()
def train(
    name: Name,
    data: Data = Path("data"),
    out: Out = Path("runs/generators"),
    shard: Annotated[str, typer.Option(metavar="I/N", help="Only every N-th row, from the I-th.")] = "0/1",
    only: Annotated[str, typer.Option(metavar="ROW,...", help="Only these rows.")] = "",
) -> None:
    """Train and score the rows of GROUP that are not finished; a row that was cut off goes on where it stopped."""
    group, (first, of) = GROUPS[name], (int(part) for part in shard.split("/"))
    folder = out / name
    common = (f"data.source={data / group.source}", *group.data)
    for seed, network in enumerate(("classifier", "judge")):
        finish(folder / network, "classifier", *common, *group.classifier, f"seed={seed}")
    for tokenizer, (recipe, *overrides) in group.tokenizers.items():
        finish(folder / tokenizer, recipe, *common, *overrides)
    for row in [row for row in group.rows if not only or row in only.split(",")][first::of]:
        tokenizer, recipe, *overrides = group.rows[row]
        finish(folder / row, recipe, f"tokenizer={folder / tokenizer}", *overrides)
        score(folder / row, tokenizer)


@app.command()
def table(name: Name, out: Out = Path("runs/generators")) -> None:
    """Print the finished rows of GROUP and those of the test images; draw OUT/GROUP.png."""
    group, folder = GROUPS[name], out / name
    done = {row: group.rows[row][0] for row in group.rows if (folder / row / "run.json").is_file()}
    results = {row: score(folder / row, tokenizer) for row, tokenizer in done.items()}
    print(line("prior", *COLUMNS) + "\n" + line(*["---"] * (1 + len(COLUMNS))))
    for row, result in results.items():
        print(line(row, *(column(result) for column in COLUMNS.values())))
    any_row = next(iter(results.values()))
    real = {key.removesuffix("_real"): value for key, value in any_row.items() if key.endswith("_real")}
    print(line("test images", *(COLUMNS[c](real) if c in REAL else "" for c in COLUMNS)))
    rows = [example(folder / row) for row in done]
    save_png(out / f"{name}.png", grid_image(np.concatenate(rows), len(rows[0])))


REAL = ("FID", "precision", "recall", "labels")


def score(run: Path, tokenizer: str) -> Result:
    """The run's numbers on held-out images and samples; kept in its folder, for they take a minute."""
    kept = run / "score.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    result = runs.evaluate(
        run,
        features=str(run.parent / "classifier"),
        classifier=run.parent / "judge",
        samples=SAMPLES,
        limit=HELD_OUT,
        sampling=SAMPLING,
        console=Console(stderr=True),
    )
    _, prior = runs.open_model(run, "prior")
    result |= {"tokenizer": tokenizer, "passes": passes(prior), **json.loads((run / "run.json").read_text())}
    kept.write_text(json.dumps(result))
    return result


def passes(prior: Prior) -> str:
    """How often each of the prior's networks runs for one image, as `12` or `64 + 256`."""
    count: Counter[str] = Counter()
    for name, module in prior.named_modules():
        network = module.blocks[0] if isinstance(module, Transformer) else module
        if isinstance(module, Transformer | RasterNetwork):
            assert isinstance(network, nn.Module)
            network.register_forward_hook(lambda *_, name=name: count.update([name]))
    prior.sample(1, Conditioning(torch.zeros(1, dtype=torch.int64)) if prior.classes else None, sampling=SAMPLING)
    return " + ".join(str(times) for times in count.values())


def example(run: Path) -> np.ndarray:
    """One sample of each class, (classes, C, H, W) uint8."""
    config, prior = runs.open_model(run, "prior")
    _, tokenizer = runs.open_tokenizer(run)
    preprocess, count = config.data.preprocess(), prior.classes or 10
    with torch.inference_mode():
        cond = Conditioning(torch.arange(count)) if prior.classes else None
        codes = prior.sample(count, cond, sampling=SAMPLING, seed=1)
        images = tokenizer.decode(codes, preprocess.shape[1:] if preprocess.shape else None)
    return preview(images, preprocess)[0]


if __name__ == "__main__":
    app()
