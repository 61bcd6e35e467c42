"""Linear probing of a prior: a linear classifier on the activations of each layer, as iGPT was measured (Chen et al.
2020, "Generative Pretraining from Pixels", section 4.1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from latticode.core.files import replacing, write_json
from latticode.core.modules import device_of, evaluating
from latticode.core.progress import progress, watched
from latticode.data import Loader
from latticode.data.passes import Progress, Report, batches_of, count_of
from latticode.data.records import Subset
from latticode.engine.feed import open_loader
from latticode.priors.base import Prior
from latticode.runs.open import Run
from latticode.tokenizers.tokenizer import Tokenizer
from latticode.viz import figures

PROBE = "probe.json"
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C: of the summed losses against half the squared norm of the weights
HELD_OUT = 0.1  # of the training images, to choose the strength and the layer on
ITERATIONS = 500

PROTOCOL = {
    "features": "mean over positions of the activations after the embedding (layer 0) and each block, no label given",
    "accuracy": "multinomial logistic regression on features standardised over the training images, test images",
    "chosen": f"L2 of every layer, of C = {', '.join(f'{c:g}' for c in STRENGTHS)}, and the layer: by accuracy on "
    f"{HELD_OUT:.0%} of the training images; then fitted to all of them",
}


def probe(
    run: Run | Path | str,
    source: str | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    console: Console,
) -> dict[str, Any]:
    """Probe the prior of `run` on the labels of `source` (default: its own data); write probe.json and probe.svg there.

    `limit` is of the images of each of both splits, which `seed` then draws. Returns what `probe_layers` does, with
    skipped and protocol. Raises ValueError for the run of anything but a prior, a prior without features, and data
    without labels.
    """
    run = Run.open(run)
    config, prior, tokenizer = run.config.on(source), run.prior, run.tokenizer
    parts, skipped = [], 0
    for split in ("train", "test"):
        loader = open_loader(config, split, batch_size=batch_size)
        if not loader.source.classes:
            raise ValueError(f"a probe needs labels, and {config.data.source} has none")
        if limit is not None and not loader.streaming:
            drawn = np.random.default_rng(seed).permutation(len(loader.source))[:limit]
            some = Subset(loader.source, np.sort(drawn))
            loader = Loader(some, loader.preprocess, batch_size, workers=config.data.workers)
        with watched(console, f"features of {split}") as watch:
            parts.append(layer_features(prior, tokenizer, loader, limit, watch))
        skipped += len(loader.skipped)
    (train, labels), (test, test_labels) = parts
    with progress(console, "probe", len(train) * (len(STRENGTHS) + 1), unit="fits") as advance:
        result = probe_layers(train, labels, test, test_labels, seed=seed, progress=advance)
    protocol = {
        **PROTOCOL,
        "source": config.data.source,
        "preprocessing": config.data.preprocess().record(),
        "limit": limit,
        "seed": seed,
        "ema": config.ema,
        "run": run.name,
    }
    result |= {"skipped": skipped, "protocol": protocol}
    write_json(run.folder / PROBE, result)
    with replacing((run.folder / PROBE).with_suffix(".svg")) as temporary:
        temporary.write_bytes(figures.svg(figures.probe_curve(result)))
    return result


def layer_features(
    prior: Prior, tokenizer: Tokenizer, loader: Loader, limit: int | None = None, progress: Progress | None = None
) -> tuple[list[np.ndarray], np.ndarray]:
    """Features (N, D) of each layer, float32, and labels (N,) of the labelled images of `loader`; the prior is told
    neither these nor captions. Raises ValueError for a prior without features and a loader without labelled images."""
    device = device_of(prior)
    rows: list[list[np.ndarray]] = []
    labels: list[np.ndarray] = []
    report = Report(progress, count_of(loader, limit))
    with evaluating(prior, tokenizer):
        for batch in batches_of(loader, limit, report):
            known = batch.labels >= 0
            if known.any():
                codes = tokenizer.encode(batch.inputs[known].to(device))
                rows.append([layer.float().cpu().numpy() for layer in prior.features(codes)])
                labels.append(batch.labels[known].numpy())
    if not rows:
        raise ValueError(f"{loader.source.name} holds no labelled images")
    return [np.concatenate(layer) for layer in zip(*rows, strict=True)], np.concatenate(labels)


def probe_layers(
    train: Sequence[np.ndarray],
    labels: np.ndarray,
    test: Sequence[np.ndarray],
    test_labels: np.ndarray,
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """A linear classifier on each of the layers `train`, features (N, D) with `labels` (N,), scored on `test`.

    The test labels choose nothing: strength and layer are chosen on a part of the training images, see `PROTOCOL`.

    Returns layer, the chosen one, and its accuracy; chance, the share of the most frequent training label among the
    test images; layers, of each its layer, accuracy, held_out (accuracy there), strength, converged; train, held_out,
    test, the numbers of images. Raises ValueError for fewer than 2 labels.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out, fitted = np.split(order, [max(1, round(HELD_OUT * len(order)))])
    names, counts = np.unique(labels[fitted], return_counts=True)
    if len(names) < 2:
        raise ValueError(f"a probe needs images of at least 2 labels, got {len(names)}")
    layers: list[dict[str, Any]] = []
    done = 0

    def report() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done)

    for number, (ours, theirs) in enumerate(zip(train, test, strict=True)):
        scores = []
        for strength in STRENGTHS:
            model, _ = fit(ours[fitted], labels[fitted], strength)
            scores.append(float(model.score(ours[held_out], labels[held_out])))
            report()
        best = int(np.argmax(scores))  # of equal ones the simplest
        model, converged = fit(ours, labels, STRENGTHS[best])
        report()
        layers.append(
            {
                "layer": number,
                "accuracy": float(model.score(theirs, test_labels)),
                "held_out": scores[best],
                "strength": STRENGTHS[best],
                "converged": converged,
            }
        )
    chosen = max(layers, key=lambda layer: layer["held_out"])
    return {
        "layer": chosen["layer"],
        "accuracy": chosen["accuracy"],
        "chance": float((test_labels == names[counts.argmax()]).mean()),
        "layers": layers,
        "train": len(labels),
        "held_out": len(held_out),
        "test": len(test_labels),
    }


def fit(features: np.ndarray, labels: np.ndarray, strength: float) -> tuple[Any, bool]:
    """Logistic regression on standardised features, and whether it converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = LogisticRegression(C=strength, max_iter=ITERATIONS)
    model = make_pipeline(StandardScaler(), classifier)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # is told in the result
        model.fit(features, labels)
    return model, bool(classifier.n_iter_.max() < ITERATIONS)
