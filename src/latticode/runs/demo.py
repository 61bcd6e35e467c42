"""The demonstration: train, tokenize, sample, evaluate and report in a few minutes, on data that ships inside
scikit-learn and scikit-image."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from latticode.core.types import Sampling
from latticode.core.values import to_uint8
from latticode.data import Loader, Preprocess, open_source
from latticode.data.writing import save_png
from latticode.engine import load_config, train
from latticode.metrics.pixels import PixelMetrics
from latticode.runs.evaluate import EvaluationRequest, evaluate
from latticode.runs.open import Run
from latticode.runs.sample import sample
from latticode.sampling.request import Request
from latticode.viz.pictures import grid_image
from latticode.viz.report import Picture, Section, run_sections, write_page

DIGITS = ("data.source=embedded:digits", "data.size=32", "data.channels=1", "data.crop=center", "data.flip=false")
SMALL = ("picture_every=100000", "save_every=100000", "ema=0.99")
PARTS = ("encoder", "decoder")
EIGHTH = ("width=16", "groups=4", "multipliers=[1,2,4,4]")  # f=8: 16 tokens a digit
STAGES = {
    "photos": (
        "fsq-tokenizer",
        [*SMALL, "steps=550", "batch_size=8", *(f"tokenizer.{p}.{v}" for p in PARTS for v in ("width=16", "groups=4"))],
    ),
    "classifier": ("classifier", ["steps=400", "batch_size=64"]),
    "digits": (
        "fsq-tokenizer",
        [
            *DIGITS,
            *SMALL,
            "steps=300",
            "batch_size=32",
            "tokenizer.quantizer.levels=[8,5,5,5]",
            *(f"tokenizer.{part}.{value}" for part in PARTS for value in EIGHTH),
            "tokenizer.encoder.blocks=[0,1,1,1]",
        ],
    ),
    "prior": ("maskgit", [*SMALL, "steps=600", "batch_size=64", "prior.width=128", "prior.depth=4", "prior.heads=4"]),
}
SAMPLING = Sampling(steps=12, guidance=1.0)


def run_demo(folder: Path, console: Console) -> Path:
    """Train every stage that `folder` lacks, evaluate, and write `folder`/report.html; returns its path."""
    began = time.monotonic()
    for name, (recipe, overrides) in STAGES.items():
        console.rule(name)
        more = [f"tokenizer={folder / 'digits'}"] if name == "prior" else []
        train(load_config(recipe, [*more, *overrides]), folder / name, resume=True, console=console)
    console.rule("evaluation")
    prior = Run.open(folder / "prior")
    request = Request(count=100, sampling=SAMPLING, batch_size=100)
    grid = sample(prior, folder / "prior" / "samples", request, overwrite=True, console=console)
    photograph, about = _photograph(folder)
    network = str(folder / "classifier")
    evaluate(folder / "classifier", console=console)
    evaluate(folder / "photos", console=console)
    evaluate(folder / "digits", EvaluationRequest(features=network), console=console)
    asked = EvaluationRequest(features=network, classifier=network, samples=500, sampling=SAMPLING)
    score = evaluate(prior, asked, console=console)
    minutes = (time.monotonic() - began) / 60
    accuracy = f"{score['label_accuracy']:.1%}"
    sections = [
        Section(
            "A photograph as tokens",
            f"Left the original, right what the decoder makes of its tokens. The tokenizer never saw it. {about}",
            (Picture(photograph),),
        ),
        Section(
            "Digits sampled from the prior",
            f"One column per class, 12 steps, guidance {SAMPLING.guidance:g}. A classifier reads {accuracy} of "
            f"500 such samples as the digit asked for, and {score['label_accuracy_real']:.1%} of real test digits.",
            (Picture(grid),),
        ),
    ]
    for name in STAGES:
        for section in run_sections(folder / name):
            sections.append(replace(section, title=f"{name}: {section.title}"))
    page = folder / "report.html"
    write_page(page, "latticode demo", sections, {"minutes": round(minutes, 1), "device": str(prior.device)})
    return page


def _photograph(folder: Path) -> tuple[Path, str]:
    """A held-out photograph at its own size beside its reconstruction, and what it cost."""
    tokenizer = Run.open(folder / "photos").tokenizer
    loader = Loader(open_source("embedded:photos", "test"), Preprocess(size=None, channels=3), 1)
    batch = next(iter(loader.epoch()))
    name = loader.source.name_of(int(batch.indices[0]))
    with torch.inference_mode():
        codes = tokenizer.encode(batch.inputs)
        restored = tokenizer.decode(codes, batch.inputs.shape[-2:])
    pixels = PixelMetrics()
    pixels.update(batch.inputs, restored)
    path = folder / "photograph.png"
    save_png(path, grid_image(torch.cat([to_uint8(batch.inputs), to_uint8(restored)]), 2, 8))
    height, width = batch.inputs.shape[-2:]
    bits = codes[..., 0].numel() * tokenizer.bits
    return path, (
        f"{name}, {width} x {height}: {codes[..., 0].numel():,} tokens of {tokenizer.bits:.2f} bits, "
        f"{bits / (width * height):.2f} bits per pixel against 24, PSNR {pixels.compute()['psnr']:.1f} dB."
    )
