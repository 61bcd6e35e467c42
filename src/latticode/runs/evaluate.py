"""Score a run on held-out data and write evaluation.json, every number with its protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from latticode.core import registry
from latticode.core.files import write_json
from latticode.core.progress import watched
from latticode.core.types import Sampling
from latticode.data import Loader
from latticode.engine.checkpoint import STATE
from latticode.engine.config import RunConfig
from latticode.engine.feed import open_loader
from latticode.engine.finetune import trained_objective
from latticode.engine.objectives import PriorClassificationObjective
from latticode.evaluate import Reference, evaluate_classifier, evaluate_dense, evaluate_prior, evaluate_tokenizer
from latticode.losses.perceptual import LPIPS, FeatureDistance
from latticode.metrics.features import FeatureNetwork
from latticode.runs.open import Run, greedy_unless_asked, network_of, note_unused

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class EvaluationRequest:
    """What a run is scored on, and by what.

    Args:
        source: default: the run's own data.
        split: of the source: train, test or all.
        own_size, tile: of a tokenizer: images at their own size, in tiles where they are longer (`tiling.encode`).
        features: of Fréchet distances (rFID, gFID): "inception" or the folder of a classifier's run.
        perceptual: of a tokenizer: "lpips" or the folder of a classifier's run.
        classifier: folder of the run that judges whether a prior's samples show their labels.
        samples: drawn from a prior; `sampling` and `seed` say how. The codes of a dense task are the likeliest unless
            `sampling` is not the default.
        limit: the first images only.

    Examples:
        >>> request = EvaluationRequest(features="runs/classifier", samples=500, sampling=Sampling(guidance=1.0))
        >>> request.split, request.samples
        ('test', 500)
    """

    source: str | None = None
    split: str = "test"
    own_size: bool = False
    tile: int | None = None
    features: str | None = None
    perceptual: str | None = None
    classifier: Path | str | None = None
    samples: int = 1000
    limit: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0


def evaluate(
    run: Run | Path | str,
    request: EvaluationRequest = EvaluationRequest(),
    *,
    references: dict[str, Reference] | None = None,
    console: Console,
) -> dict[str, Any]:
    """Score the run as `request` says, write `evaluation.json` into its folder and return it.

    Runs of dense tasks, of either stage, are scored as `evaluate_dense` says. Calls that share `references` look at a
    training set only once, and do not notice that it changes. Raises ValueError for what does not fit the run.
    """
    run = Run.open(run)
    config, kind = run.config.on(request.source), run.config.kind
    if kind != "tokenizer" and (request.own_size or request.perceptual):
        raise ValueError(f"own sizes and perceptual distances are of tokenizers; {run.folder} is the run of a {kind}")
    if kind == "tokenizer":
        loader = run.whole(request.source, request.split, own_size=request.own_size)
    else:
        loader = open_loader(config, request.split, batch_size=64)
    network = None if request.features is None else network_of(request.features, run.device)
    protocol = {
        "source": config.data.source,
        "split": request.split,
        "preprocessing": loader.preprocess.record(),
        "augmentation": "none: nothing is flipped, and of crop 'random' the centred window is taken",
        "ema": config.ema,
        "run": run.name,
    }
    with watched(console, f"evaluate {run.name}") as watch:
        shared: dict[str, Any] = {"limit": request.limit, "protocol": protocol, "progress": watch}
        if kind == "classifier":
            result = evaluate_classifier(run.classifier, loader, **shared)
        elif run.coder.guides:
            result = _dense(run, request, loader, network, console, shared)
        elif kind == "tokenizer":
            result = _tokenizer(run, request, loader, network, shared)
        else:
            reference = _reference(config, network, {} if references is None else references) if network else None
            result = _prior(run, request, loader, network, reference, console, shared)
    write_json(run.folder / EVALUATION, result)
    return result


def _tokenizer(
    run: Run, request: EvaluationRequest, loader: Loader, network: FeatureNetwork | None, shared: dict[str, Any]
) -> dict[str, Any]:
    perceptual = None
    if request.perceptual is not None:
        perceptual = LPIPS() if request.perceptual == "lpips" else FeatureDistance(request.perceptual)
        perceptual = perceptual.to(run.device)
    options = {"features": network, "perceptual": perceptual, "tile": request.tile}
    return evaluate_tokenizer(run.tokenizer, loader, **options, **shared)


def _dense(
    run: Run,
    request: EvaluationRequest,
    loader: Loader,
    network: FeatureNetwork | None,
    console: Console,
    shared: dict[str, Any],
) -> dict[str, Any]:
    if request.own_size or request.perceptual or request.tile or request.classifier:
        what = "own sizes, tiles, perceptual distances and classifiers"
        raise ValueError(f"{what} are not for dense tasks, as of {run.folder}")
    prior, sampling = None, greedy_unless_asked(request.sampling)
    if run.config.kind == "prior":
        prior = run.prior
        note_unused(prior, sampling, console)
    options = {"prior": prior, "sampling": sampling, "seed": request.seed, "features": network}
    return evaluate_dense(run.uvim, loader, **options, **shared)


def _prior(
    run: Run,
    request: EvaluationRequest,
    loader: Loader,
    network: FeatureNetwork | None,
    reference: Reference | None,
    console: Console,
    shared: dict[str, Any],
) -> dict[str, Any]:
    note_unused(run.prior, request.sampling, console)
    return evaluate_prior(
        run.prior,
        run.tokenizer,
        loader,
        features=network,
        reference=reference,
        classifier=Run.open(request.classifier, run.device).classifier if request.classifier else None,
        samples=request.samples,
        sampling=request.sampling,
        seed=request.seed,
        label_of=_head(run),
        **shared,
    )


def _reference(config: RunConfig, network: FeatureNetwork, known: dict[str, Reference]) -> Reference:
    key = f"{network.weights} {config.data.model_dump_json()}"
    if key not in known:
        known[key] = Reference(open_loader(config, "train", batch_size=64))
    return known[key]


def _head(run: Run) -> Callable[[Tensor], Tensor] | None:
    """Codes to logits of labels, where a prior was trained with a head and the training's state is still there."""
    trained = issubclass(registry.resolve(run.config.objective["type"]), PriorClassificationObjective)
    if not trained or not (run.folder / STATE).is_file():
        return None
    return partial(trained_objective(run.folder, run.config).to(run.device).classify, run.prior)
