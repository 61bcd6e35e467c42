"""UViM's dense tasks with FSQ, VQ and VQ that splits codes, both stages, and what the paper left out of them in turn.

    python benchmarks/dense.py train depth --data data --out runs/dense --seeds 3     # resumable
    python benchmarks/dense.py table depth --out runs/dense > dense-depth.md

`train` trains and scores what is not finished yet: seed after seed, for each row stage I and, where it has a code,
stage II over it. `table` prints mean and standard deviation over the seeds that are there, and draws OUT/TASK.png:
held-out examples, a column each, as photograph, label, and what the last stage of each row's first seed predicts.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from systems import Data, Out, finish, line
from torch import Tensor

from latticode.core.types import Sampling
from latticode.data.writing import save_png
from latticode.engine.config import read_run
from latticode.engine.feed import open_loader
from latticode.evaluate.dense import GREEDY
from latticode.runs.evaluate import EvaluationRequest, evaluate
from latticode.runs.open import Run
from latticode.viz.pictures import grid_image

SHOWN = 8  # held-out examples in the picture
Result = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """`metrics` maps what is printed to its key in the scores and its decimals."""

    source: str
    loss: str  # the weights of the task's own losses
    metrics: dict[str, tuple[str, int]]
    sampling: Sampling = GREEDY  # of stage II's codes: the likeliest colours are grey
    features: bool = False  # whether a classifier is trained on the photographs, to look at colours


VQ = "type: vq, size: 4096, dim: 128, decay: 0.995, normalize: true, kmeans: false"
UNGUIDED = "tokenizer.dropout=all"
ROWS: dict[str, tuple[str, ...]] = {
    "fsq": (),
    "vq": (f"tokenizer.quantizer={{{VQ}, restart: 0.0}}", "weights={LOSS, commitment: 0.0}"),
    "vq-split": (f"tokenizer.quantizer={{{VQ}, upkeep: split}}", "weights={LOSS, commitment: 0.0}"),
    "fsq-digits": (),  # FSQ's stage I
    "no-context": ("tokenizer.oracle_context=false", "tokenizer.base_context=false"),
    "no-dropout": ("tokenizer.dropout=none",),
    "no-oracle": (UNGUIDED,),
}
GUIDES = {"fsq-digits": ("prior.digits=[7, 5, 5, 5, 5]", "prior.inner_depth=1")}  # of stage II
FIRST = {"fsq-digits": "fsq"}  # rows that have the stage I of another
ABLATIONS = ("no-context", "no-dropout", "no-oracle")  # of FSQ, one seed each
TASKS = {
    "depth": Task(
        "rgbd",
        "depth: 1.0",
        {"RMSE, m": ("rmse", 3), "absRel": ("abs_rel", 3), "delta < 1.25": ("delta1", 3)},
    ),
    "camvid": Task("camvid", "semantic: 1.0, instance: 1.0", {"PQ": ("pq", 3), "SQ": ("sq", 3), "RQ": ("rq", 3)}),
    "colorization": Task(
        "scenes64",
        "mse: 1.0",
        {"FID": ("fid_classifier", 2), "PSNR": ("psnr", 2), "colourfulness": ("colourfulness", 1)},
        sampling=Sampling(top_p=0.95),
        features=True,
    ),
}
WAYS = ("ceiling", "predicted", "floor")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Name = Annotated[str, typer.Argument(metavar="TASK", help=f"One of {', '.join(TASKS)}.")]


@app.command()
def train(
    name: Name,
    data: Data = Path("data"),
    out: Out = Path("runs/dense"),
    seeds: Annotated[int, typer.Option(min=1, help="Of the quantizers; ablations have one.")] = 1,
    shard: Annotated[str, typer.Option(metavar="I/N", help="Only every N-th run, from the I-th.")] = "0/1",
    only: Annotated[str, typer.Option(metavar="ROW,...", help="Only these rows.")] = "",
) -> None:
    """Train and score the runs of TASK that are not finished; one that was cut off goes on where it stopped."""
    task, (first, of) = TASKS[name], (int(part) for part in shard.split("/"))
    source = f"data.source={data / task.source}"
    if task.features:
        options = (source, "steps=1200", "data.size=64", "data.channels=3", "data.flip=true")
        finish(out / name / "classifier", "classifier", *options)
    wanted = [row for row in ROWS if not only or row in only.split(",")]
    jobs = [(row, seed) for seed in range(seeds) for row in wanted if seed == 0 or row not in ABLATIONS]
    for row, seed in jobs[first::of]:
        overrides = [part.replace("LOSS", task.loss) for part in ROWS[row]]
        places = stages(out / name, row, seed)
        for stage, run in enumerate(places):
            own = (f"tokenizer={places[0]}", *GUIDES.get(row, ())) if stage else (source, *overrides)
            recipe = f"uvim-{name}-small" + ("-guide" if stage else "")
            finish(run, recipe, *own, f"seed={seed}")
            score(run, task)


def stages(folder: Path, row: str, seed: int) -> list[Path]:
    """The runs of a row: stage I, and stage II if there is a code to predict."""
    first = folder / f"{FIRST.get(row, row)}-{seed}"
    return [first] if UNGUIDED in ROWS[row] else [first, folder / f"{row}-{seed}-guide"]


def score(run: Path, task: Task) -> Result:
    kept = run / "evaluation.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    features = str(run.parent / "classifier") if task.features else None
    return evaluate(run, EvaluationRequest(features=features, sampling=task.sampling), console=Console(stderr=True))


@app.command()
def table(name: Name, out: Out = Path("runs/dense")) -> None:
    """Print the rows of TASK that are there; draw OUT/TASK.png."""
    task, folder = TASKS[name], out / name
    results = {row: found for row in ROWS if (found := list(finished(folder, row, task)))}
    columns = {**columns_of(task), **COLUMNS}
    print(line("", "seeds", *columns) + "\n" + line(*["---"] * (2 + len(columns))))
    for row, found in results.items():
        print(line(row, str(len(found)), *(spread(found, *column) for column in columns.values())))
    last = [stages(folder, row, 0)[-1] for row in results]
    inputs = examples(last[0])
    pictures = [shown(run, inputs, task.sampling, labelled=run is last[0]) for run in last]
    save_png(out / f"{name}.png", grid_image(np.concatenate(pictures).repeat(2, 2).repeat(2, 3), SHOWN))


def finished(folder: Path, row: str, task: Task) -> Iterator[Result]:
    """What each finished seed of a row gave: the evaluation of its last stage, and the minutes of all."""
    for seed in range(100):
        places = stages(folder, row, seed)
        if not all((place / "run.json").is_file() for place in places):
            return
        seconds = sum(json.loads((place / "run.json").read_text())["seconds"] for place in places)
        yield {**score(places[-1], task), "minutes": seconds / 60}


Column = tuple[Callable[[Result], float | None], int]  # what, and how many decimals
COLUMNS: dict[str, Column] = {
    "usage, %": (lambda r: 100 * r["usage"] if "compression_cost" in r else None, 1),
    "perplexity": (lambda r: r["perplexity"] if "compression_cost" in r else None, 0),
    "cost of a code, bits": (lambda r: r.get("compression_cost"), 2),
    "codes right, %": (lambda r: 100 * r["code_accuracy"] if "code_accuracy" in r else None, 1),
    "minutes": (lambda r: r["minutes"], 1),
}


def columns_of(task: Task) -> dict[str, Column]:
    """The first metric by every way to a code, the others by the predicted one, or none where nothing predicts it."""
    found: dict[str, Column] = {}
    for number, (title, (key, decimals)) in enumerate(task.metrics.items()):
        if number:
            found[title] = (partial(score_of, key=key, ways=("predicted", "floor")), decimals)
        else:
            found |= {f"{title}, {way}": (partial(score_of, key=key, ways=(way,)), decimals) for way in WAYS}
    return found


def score_of(result: Result, key: str, ways: Sequence[str]) -> float | None:
    """The score by the first of the `ways` to a code that there is."""
    return next((result["scores"][key][way] for way in ways if way in result["scores"][key]), None)


def spread(results: list[Result], of: Callable[[Result], float | None], decimals: int) -> str:
    """Mean and, of several, standard deviation."""
    values = [value for result in results if (value := of(result)) is not None]
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{decimals}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{decimals}f}"


def examples(run: Path) -> Tensor:
    """SHOWN held-out examples, from all over the set."""
    loader = open_loader(read_run(run), "test", batch_size=SHOWN)
    inputs = torch.cat([batch.inputs for batch in loader.epoch()])
    return inputs[:: len(inputs) // SHOWN][:SHOWN]


def shown(run: Path, inputs: Tensor, sampling: Sampling, *, labelled: bool) -> np.ndarray:
    """Predictions for `inputs` of B examples, (B, 3, H, W) uint8; `labelled`: after their photographs and labels."""
    opened = Run.open(run)
    uvim, prior = opened.uvim, opened.prior if opened.config.kind == "prior" else None
    parts: list[Tensor] = []
    with torch.inference_mode():
        image, task = uvim.image(inputs), uvim.task
        if labelled:
            parts += [inputs[:, :3].byte(), task.picture(truth(task, inputs, image))]
        codes = None
        if prior is not None:
            codes = prior.sample(len(inputs), prior.condition(images=image), sampling=sampling)
        parts.append(task.picture(task.predict(uvim.solve(image, codes), image)))
    return torch.cat(parts).numpy()


def truth(task: Any, inputs: Tensor, image: Tensor) -> Tensor:
    """The label as if it were predicted with certainty."""
    label = task.label(inputs)
    return label if task.classes == () else task.predict(label, image)


if __name__ == "__main__":
    app()
