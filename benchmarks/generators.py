"""Every prior trained on the tokens of one data set for the same number of steps, over tokenizers trained here; for
captioned pictures those that read text.

    python benchmarks/generators.py train fashion-mnist --data data --out runs/generators   # resumable
    python benchmarks/generators.py table fashion-mnist --data data --out runs/generators > generators.md

`train` trains and scores what is not finished yet: first the two classifiers (one whose features FID, precision and
recall look through, one that judges labels) and the tokenizers, then one prior after another. `table` prints the rows
and draws samples, one row of pictures for each prior and one column for each class or caption, into OUT/GROUP.png.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from systems import Data, Out, finish, line
from torch import Tensor, nn

from latticode.core.types import Sampling
from latticode.data.writing import save_png
from latticode.nn.transformer import Transformer
from latticode.priors.base import Prior
from latticode.priors.pixelcnn import RasterNetwork
from latticode.runs.evaluate import EvaluationRequest, evaluate
from latticode.runs.open import Run
from latticode.viz.pictures import grid_image, preview

Result = dict[str, Any]
HELD_OUT, TIMED = 2000, 64
BY_LABEL, BY_TEXT = Sampling(guidance=1.0, revisions=2), Sampling(guidance=2.0, guidance_schedule="linear")


@dataclass(frozen=True)
class Group:
    """`tokenizers` maps a name to a recipe and its overrides, `rows` a name to a tokenizer, a recipe and overrides."""

    source: str
    data: tuple[str, ...]
    tokenizers: dict[str, tuple[str, ...]]
    rows: dict[str, tuple[str, ...]]
    classifier: tuple[str, ...]
    columns: tuple[str, ...]
    shown: tuple[str, ...] = ()  # captions of the samples in the picture; without them, one sample of each class
    samples: int = 1000
    sampling: Sampling = BY_LABEL


SHORT = ("steps=1000",)  # of the tokenizers
STEPS, LONG = "steps=600", "steps=800"  # of the priors
BPE = "{type: bpe, size: 768, length: 32, cut: true}"
LEVELS = "[8, 5, 5, 5]"
THOUSAND = f"tokenizer.quantizer.levels={LEVELS}"  # codes
EIGHTH = (  # of the side
    *(f"tokenizer.{half}.multipliers=[1, 2, 4, 4]" for half in ("encoder", "decoder")),
    "tokenizer.encoder.blocks=[0, 1, 1, 1]",
)
GPT = ("gpt-fashion-mnist", STEPS)
ROWS: dict[str, tuple[str, ...]] = {
    "maskgit": ("fsq", "maskgit-fashion-mnist", STEPS),
    "mage": ("fsq", "mage-cifar10", STEPS, "prior.classes=10"),
    "gpt": ("fsq", *GPT),
    "gpt-llama": ("fsq", *GPT, "prior.style=llama", "prior.places=axial"),
    "gpt-digits": ("fsq", *GPT, f"prior.digits={LEVELS}", "prior.inner_depth=1"),
    "pixelcnn": ("fsq", "pixelcnn-fashion-mnist", STEPS),
    "pixelsnail": ("fsq", "pixelsnail-fashion-mnist", STEPS),
    "rq-transformer": ("rqvae", "rqtransformer-cifar10", STEPS, "prior.soft_labels=0.0"),
    "rq-transformer-soft": ("rqvae", "rqtransformer-cifar10", STEPS),
    "contextual-rq": ("rqvae", "contextual-rq-cifar10", STEPS),
    "hq-transformer": ("hqvae", "hqtransformer-cifar10", STEPS),
    "two-level": ("vqvae2", "two-level-cifar10", STEPS),
    "muse": ("vqvae2", "muse-cifar10", STEPS),
}
QUALITY = ("FID", "precision", "recall", "labels")
COSTS = ("tokenizer", "parameters", "minutes", "bits per position", "bits per pixel")
RATES = ("samples/s", "passes")
BY_CLASS = (*COSTS, *QUALITY, *RATES)
BY_CAPTION = (*COSTS, "caption gain", "own caption cheaper", "labels", "labels shuffled", "FID", *RATES)
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
        ROWS,
        classifier=("steps=1500",),
        columns=BY_CLASS,
    ),
    "cifar10": Group(
        "cifar10",
        ("data.size=32", "data.channels=3"),
        {
            "fsq": ("fsq-cifar10", *SHORT, THOUSAND),
            "rqvae": ("rqvae-cifar10", *SHORT),
            "hqvae": ("hqvae-cifar10", *SHORT),
            "vqvae2": ("vqvae2-cifar10", *SHORT),
        },
        ROWS,
        classifier=("steps=3000", "data.flip=true"),
        columns=BY_CLASS,
    ),
    "ucm-captions": Group(
        "ucm-captions",
        ("data.size=64", "data.channels=3"),
        {
            "fsq": ("fsq-cifar10", *SHORT, "batch_size=16", THOUSAND, *EIGHTH),
            "vqvae2": ("vqvae2-ucm", *SHORT),
        },
        {
            "maskgit": (
                *("fsq", "maskgit-fashion-mnist", LONG, "batch_size=32", "prior.classes=0"),
                f"prior.text={{type: text_encoder, bpe: {BPE}, width: 128, depth: 1, heads: 4}}",
            ),
            "dalle": ("fsq", "dalle-ucm", LONG, f"prior.text={BPE}"),
            "muse": ("vqvae2", "muse-ucm", STEPS),
        },
        classifier=("steps=800", "data.flip=true"),
        columns=BY_CAPTION,
        shown=(
            "there is a piece of green farmland",
            "lots of boats docked at the harbor",
            "dark green trees in a dense forest",
            "the sand beach with white waves",
            "a straight runway with some mark lines",
            "a parking lot with many cars",
            "a river goes through the forest",
            "many houses arranged in lines in the dense residential area",
            "a small baseball diamond with green grass",
            "two storage tanks on the ground",
        ),
        samples=336,
        sampling=BY_TEXT,
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
    "labels shuffled": lambda r: f"{100 * r['label_accuracy_shuffled']:.1f} %",
    "caption gain": lambda r: f"{r['caption_gain_bits']:.1f} bits",
    "own caption cheaper": lambda r: f"{100 * r['caption_accuracy']:.1f} %",
    "samples/s": lambda r: f"{r['samples_per_second']:.1f}",
    "passes": lambda r: r["passes"],
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Name = Annotated[str, typer.Argument(metavar="GROUP", help=f"One of {', '.join(GROUPS)}.")]


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
        score(folder / row, tokenizer, group)


@app.command()
def table(name: Name, out: Out = Path("runs/generators")) -> None:
    """Print the finished rows of GROUP and those of the test images; draw OUT/GROUP.png."""
    group, folder = GROUPS[name], out / name
    done = {row: group.rows[row][0] for row in group.rows if (folder / row / "run.json").is_file()}
    results = {row: score(folder / row, tokenizer, group) for row, tokenizer in done.items()}
    rows = []
    for row, result in results.items():  # one after another, so that what else the machine does is alike for all
        images, result["samples_per_second"] = example(folder / row, group)
        rows.append(images)
    print(line("prior", *group.columns) + "\n" + line(*["---"] * (1 + len(group.columns))))
    for row, result in results.items():
        print(line(row, *(COLUMNS[column](result) for column in group.columns)))
    any_row = next(iter(results.values()))
    real = {key.removesuffix("_real"): value for key, value in any_row.items() if key.endswith("_real")}
    print(line("test images", *(COLUMNS[c](real) if c in QUALITY else "" for c in group.columns)))
    save_png(out / f"{name}.png", grid_image(np.concatenate(rows), len(rows[0])))


def score(run: Path, tokenizer: str, group: Group) -> Result:
    """The run's numbers on held-out images and samples; kept in its folder, for they take a minute."""
    kept = run / "score.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    request = EvaluationRequest(
        features=str(run.parent / "classifier"),
        classifier=run.parent / "judge",
        samples=group.samples,
        limit=HELD_OUT,
        sampling=group.sampling,
    )
    opened = Run.open(run)
    result = evaluate(opened, request, console=Console(stderr=True))
    result |= json.loads((run / "run.json").read_text())
    result |= {"tokenizer": tokenizer, "passes": passes(opened.prior, group)}
    kept.write_text(json.dumps(result))
    return result


def passes(prior: Prior, group: Group) -> str:
    """How often each of the prior's networks runs for one image, as `12` or `64 + 256`."""
    count: Counter[str] = Counter()
    for name, module in prior.named_modules():
        network = module.blocks[0] if isinstance(module, Transformer) else module
        if isinstance(module, Transformer | RasterNetwork):
            assert isinstance(network, nn.Module)
            network.register_forward_hook(lambda *_, name=name: count.update([name]))
    prior.sample(1, prior.condition(torch.zeros(1, dtype=torch.int64), group.shown[:1]), sampling=group.sampling)
    return " + ".join(str(times) for times in count.values())


def example(run: Path, group: Group) -> tuple[np.ndarray, float]:
    """One sample for each class, or each caption shown, (count, C, H, W) uint8; and samples a second, by `TIMED`."""
    opened = Run.open(run)
    prior, tokenizer = opened.prior, opened.tokenizer
    preprocess, count = opened.config.data.preprocess(), len(group.shown) or prior.classes or 10

    def draw(number: int) -> Tensor:
        texts = tuple(group.shown[i % count] for i in range(number)) if group.shown else ()
        told = prior.condition(torch.arange(number) % count, texts)
        codes = prior.sample(number, told, sampling=group.sampling, seed=1)
        return tokenizer.decode(codes, preprocess.shape[1:] if preprocess.shape else None)

    with torch.inference_mode():
        images = preview(draw(count), preprocess)[0]
        began = time.perf_counter()
        draw(TIMED)
    return images, TIMED / (time.perf_counter() - began)


if __name__ == "__main__":
    app()
