"""Every tokenizer system trained on the same data for the same number of steps, FSQ at the same bits beside each.

    python benchmarks/systems.py train cifar10 --data data --out runs/systems     # resumable; --shard 0/2, --shard 1/2
    python benchmarks/systems.py table cifar10 --data data --out runs/systems > docs/results/systems-cifar10.md

`train` trains and scores what is not finished yet, one row after another, first the two classifiers: one whose features
are the perceptual distance that systems train against, and another that judges. `table` prints the rows and writes the
reconstructions of the same held-out images, one row of pictures for each system, into OUT/GROUP.png.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from torch import Tensor

from latticode.data.writing import save_png
from latticode.engine.config import read_run
from latticode.engine.feed import open_loader
from latticode.metrics.reconstruction import metrics_of
from latticode.runs.evaluate import EvaluationRequest, evaluate
from latticode.runs.open import Run
from latticode.viz.pictures import grid_image, preview

SHOWN = 8  # held-out examples in the picture
Result = dict[str, Any]


@dataclass(frozen=True)
class Group:
    """Rows that one table compares: `rows` maps a name to a recipe and its overrides, `common` are everyone's."""

    source: str
    common: tuple[str, ...]
    rows: dict[str, tuple[str, ...]]
    columns: tuple[str, ...]
    classifier: tuple[str, ...] = ()  # how the classifiers train; without them there are no feature distances
    exact: str = ""  # another source, whose pixels are exact, for PSNR and SSIM


def quantizer(spec: str, weights: str) -> tuple[str, ...]:
    return f"tokenizer.quantizer={spec}", f"weights={weights}"


LEVELS = ([8, 8, 8], [8, 5, 5, 5], [16, 8, 8, 8], [8, 8, 8, 8, 8, 8])
FSQ_9, FSQ_10, FSQ_13, FSQ_18 = (f"{{type: fsq, levels: {levels}}}" for levels in LEVELS)
FINITE_STAGES = "{type: residual, depth: 4, stages: {type: fsq, levels: [4, 4, 4, 4], bound: clamp}}"
BINARY_STAGES = "{type: residual, depth: 4, stages: {type: lfq, dim: 8}}"
MSE = "{mse: 1.0}"
GAN = ("objective.adversarial.start=500", "objective.perceptual.run=OUT/classifier")
CRITICAL = "mse: 1.0, perceptual: 0.1, adversarial: 0.1, discriminator: 1.0, r1: 1.0"
GENTLE = "mse: 1.0, l1: 0.2, perceptual: 0.03, adversarial: 0.1, discriminator: 1.0, r1: 1.0"

CODES = ("codes per example", "bits per code", "usage", "perplexity", "parameters", "examples/s", "minutes")
IMAGES = ("bits per pixel", "PSNR", "SSIM", "perceptual", "rFID", *CODES)
COLUMNS: dict[str, Callable[[Result], str]] = {
    "bits per pixel": lambda r: f"{r['bits_per_pixel']:.3f}",
    "bits per second": lambda r: f"{r['bits_per_second']:.0f}",
    "PSNR": lambda r: f"{r['psnr']:.2f}",
    "SSIM": lambda r: f"{r['ssim']:.3f}",
    "perceptual": lambda r: f"{r['perceptual_classifier']:.3f}",
    "rFID": lambda r: f"{r['rfid_classifier']:.3f}",
    "temporal error": lambda r: f"{r['temporal_error']:.4f}",
    "SI-SDR": lambda r: f"{r['si_sdr']:.2f}",
    "mel distance": lambda r: f"{r['mel_distance']:.3f}",
    "STFT distance": lambda r: f"{r['stft_distance']:.3f}",
    "codes per example": lambda r: f"{r['codes']:.0f}",
    "bits per code": lambda r: f"{r['bits']:.2f}",
    "usage": lambda r: f"{100 * r['usage']:.1f} %" if r["bits"] < 24 else "-",  # more codes than tokens to use them
    "perplexity": lambda r: f"{r['perplexity']:.0f}",
    "parameters": lambda r: f"{r['parameters'] / 1e6:.2f} M",
    "examples/s": lambda r: f"{r['speed']:.0f}",
    "minutes": lambda r: f"{r['seconds'] / 60:.1f}",
}

GROUPS = {
    "cifar10": Group(
        "cifar10",
        ("steps=1000", "data.size=32"),
        {
            "fsq": ("fsq-cifar10",),
            "vq": ("vq-cifar10",),
            "simvq": ("simvq-cifar10",),
            "vqvae": ("vqvae-cifar10",),
            "vqvae-gradient": (
                "vqvae-cifar10",
                "tokenizer.quantizer.update=gradient",
                "weights={mse: 4.0, codebook: 1.0, commitment: 0.25}",
            ),
            "vqvae-fsq": ("vqvae-cifar10", *quantizer(FSQ_9, MSE)),
            "vqvae2": ("vqvae2-cifar10",),
            "vqvae2-fsq": ("vqvae2-cifar10", *quantizer(FSQ_9, MSE), f"tokenizer.top.quantizer={FSQ_9}"),
            "rqvae": ("rqvae-cifar10",),
            "rqvae-fsq": ("rqvae-cifar10", *quantizer(FINITE_STAGES, MSE)),
            "rqvae-lfq": (
                "rqvae-cifar10",
                *quantizer(BINARY_STAGES, "{mse: 1.0, commitment: 0.25, sample_entropy: 0.02, diversity: 0.02}"),
            ),
            "fsq-32-bits": ("fsq-cifar10", "tokenizer.quantizer.levels=[16, 16, 16, 16, 16, 16, 16, 16]"),
            "hqvae": ("hqvae-cifar10",),
            "hqvae-fsq": (
                "hqvae-cifar10",
                *quantizer(f"{{type: hierarchical, fanout: 4, top: {FSQ_10}, bottom: {FSQ_10}}}", MSE),
            ),
            "maskgit-vqgan": ("maskgit-vqgan-cifar10", *GAN),
            "maskgit-vqgan-fsq": ("maskgit-vqgan-cifar10", *GAN, *quantizer(FSQ_10, f"{{{CRITICAL}}}")),
            "vqgan-vq": ("vqgan-vq-cifar10", *GAN),
            "vqgan-fsq": ("vqgan-cifar10", *GAN),
            "palette": ("palette-cifar10",),
            "dvae": ("dvae-cifar10",),
            "dvae-fsq": ("dvae-cifar10", *quantizer(FSQ_10, "{logit_laplace: 1.0}")),
        },
        columns=IMAGES,
        classifier=("steps=3000", "data.flip=true", "data.size=32", "data.channels=3"),
        exact="cifar10-lossless",
    ),
    "scenes64": Group(
        "scenes64",
        ("objective.perceptual.run=OUT/classifier",),
        {
            "vqgan-vq": ("vqgan-vq-scenes64",),
            "vqgan-fsq": ("vqgan-scenes64",),
            "vitvqgan": ("vitvqgan-scenes64",),
            "vitvqgan-fsq": ("vitvqgan-scenes64", *quantizer(FSQ_13, f"{{logit_laplace: 0.1, {GENTLE}}}")),
            "bsq": ("bsq-scenes64",),
            "bsq-fsq": ("bsq-scenes64", *quantizer(FSQ_18, f"{{{GENTLE}}}")),
        },
        columns=IMAGES,
        classifier=("steps=1200", "data.flip=true", "data.size=64", "data.channels=3"),
    ),
    "fsdd": Group(
        "fsdd",
        ("steps=1000",),
        {"rvq": ("rvq-fsdd",), "simvq": ("simvq-fsdd",), "fsq": ("fsq-fsdd",)},
        columns=("bits per second", "SI-SDR", "mel distance", "STFT distance", *CODES),
    ),
    "weizmann": Group(
        "weizmann-actions",
        ("steps=700",),
        {"magvit2": ("magvit2-weizmann",), "fsq": ("fsq-weizmann",)},
        columns=("bits per pixel", "PSNR", "SSIM", "temporal error", *CODES),
    ),
}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Name = Annotated[str, typer.Argument(metavar="GROUP", help=f"One of {', '.join(GROUPS)}.")]
Data = Annotated[Path, typer.Option(help="Folder of the data sets.")]
Out = Annotated[Path, typer.Option(help="Folder of the runs.")]


@app.command()
def train(
    name: Name,
    data: Data = Path("data"),
    out: Out = Path("runs/systems"),
    shard: Annotated[str, typer.Option(metavar="I/N", help="Only every N-th row, from the I-th.")] = "0/1",
) -> None:
    """Train the rows of GROUP that are not finished; a row that was cut off goes on where it stopped."""
    group, (first, of) = GROUPS[name], (int(part) for part in shard.split("/"))
    folder = out / name
    source = f"data.source={data / group.source}"
    for seed, network in enumerate(("classifier", "judge")):
        if group.classifier:
            finish(folder / network, "classifier", source, *group.classifier, f"seed={seed}")
    for row in list(group.rows)[first::of]:
        recipe, *overrides = (part.replace("OUT", str(folder)) for part in (*group.rows[row], *group.common))
        finish(folder / row, recipe, source, *overrides)


def finish(run: Path, recipe: str, *overrides: str) -> None:
    """Train as a user would, or go on where it stopped; nothing if it is finished."""
    if not (run / "run.json").is_file():
        command = [sys.executable, "-m", "latticode.cli.main", "train", recipe, *overrides, "-o", str(run)]
        subprocess.run([*command, "--resume"] if run.exists() else command, check=True)


@app.command()
def table(name: Name, data: Data = Path("data"), out: Out = Path("runs/systems")) -> None:
    """Print the finished rows of GROUP, and what residual codes give by and by; draw OUT/GROUP.png."""
    group, folder = GROUPS[name], out / name
    done = [row for row in group.rows if (folder / row / "run.json").is_file()]
    results = {row: score(folder / row, group, data) for row in done}
    print(line("system", *group.columns) + "\n" + line(*["---"] * (1 + len(group.columns))))
    for row, result in results.items():
        print(line(row, *(COLUMNS[column](result) for column in group.columns)))
    for row, result in results.items():
        if result["prefixes"]:
            values = ", ".join(f"{value:.2f}" for value in result["prefixes"])
            print(f"\n{row}, dB from the first 1, 2, ... codes of each position: {values}")
    pictures = [example(folder / row) for row in done]
    columns = pictures[0][2]  # that fit side by side
    rows = [pictures[0][0], *(restored for _, restored, _ in pictures)]
    save_png(out / f"{name}.png", grid_image(np.concatenate([row[:columns] for row in rows]), columns))


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def score(run: Path, group: Group, data: Path) -> Result:
    """The run's numbers on held-out data; kept in its folder, for they take a minute."""
    kept = run / "score.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    console, judge = Console(stderr=True), str(run.parent / "judge") if group.classifier else None
    exact = evaluate(run, EvaluationRequest(source=str(data / group.exact)), console=console) if group.exact else {}
    result = evaluate(run, EvaluationRequest(features=judge, perceptual=judge), console=console)
    tokenizer = Run.open(run).tokenizer
    batch, times = held_out(run, 64), []
    with torch.inference_mode():
        codes = tokenizer.encode(batch)
        for _ in range(4):
            began = time.perf_counter()
            tokenizer.encode(batch)
            times.append(time.perf_counter() - began)
    slots = len(tokenizer.vocab)
    result |= {key: exact[key] for key in ("psnr", "ssim") if exact}
    result |= {"codes": codes[0].numel(), "bits": tokenizer.bits / slots, "speed": len(batch) / min(times)}
    result |= {"prefixes": prefixes(run, tokenizer, batch) if type(tokenizer.quantizer).__name__ == "Residual" else []}
    result |= json.loads((run / "run.json").read_text())
    kept.write_text(json.dumps(result))
    return result


def prefixes(run: Path, tokenizer: Any, batch: Tensor) -> list[float]:
    """PSNR, or SI-SDR of sound, of `batch` decoded from the first 1, 2, ... codes of each position."""
    found = []
    with torch.inference_mode():
        codes = tokenizer.encode(batch)
        for n in range(1, codes.shape[-1] + 1):
            metrics = metrics_of(read_run(run).data.preprocess())
            metrics.update(batch, tokenizer.decode(codes[..., :n], batch.shape[2:]))
            result = metrics.compute()
            found.append(result["psnr"] if "psnr" in result else result["si_sdr"])
    return found


def example(run: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Pictures of held-out examples, of what the run makes of them, and how many fit side by side."""
    opened, batch = Run.open(run), held_out(run, SHOWN)
    with torch.inference_mode():
        output = opened.tokenizer(batch).output
    preprocess = opened.config.data.preprocess()
    originals, columns = preview(batch, preprocess)
    return originals, preview(output, preprocess)[0], columns


def held_out(run: Path, count: int) -> Tensor:
    """The first examples of the test set, of the length they are trained at."""
    return next(open_loader(read_run(run), "test", batch_size=count).epoch()).inputs


if __name__ == "__main__":
    app()
