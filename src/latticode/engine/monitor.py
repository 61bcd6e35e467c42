"""Training-time logging: metrics.jsonl, TensorBoard, and pictures of held-out images; run.json at the end."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latticode.core.files import write_json
from latticode.core.modules import device_of
from latticode.core.types import Batch, CodeBatch, Sampling, first_texts
from latticode.core.values import to_uint8
from latticode.data.writing import save_png
from latticode.dense.uvim import UViM
from latticode.engine.checkpoint import append_line
from latticode.engine.config import RunConfig
from latticode.engine.feed import Feed
from latticode.engine.objectives import Objective
from latticode.metrics.reconstruction import metrics_of
from latticode.viz.pictures import grid_image, preview, side_by_side

PICTURED, SAMPLED = 16, 32


class Monitor:
    """Watches the first held-out batch: the same images at every look, so that pictures compare.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from latticode.engine.config import load_config
        >>> config = load_config("fsq-tokenizer", ["data.size=8"])
        >>> feed = Feed(lambda start: iter(()), lambda: iter(()), skipped={})  # nothing to train on, nothing held out
        >>> with TemporaryDirectory() as folder:
        ...     monitor = Monitor(config, Path(folder), feed, start=0)
        ...     monitor.log(50, {"loss": 0.25, "val/ssim": None})
        ...     monitor.writer.close()
        ...     print((Path(folder) / "metrics.jsonl").read_text(), end="")
        {"step": 50, "loss": 0.25}
    """

    def __init__(self, config: RunConfig, folder: Path, feed: Feed, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.config, self.folder, self.feed = config, folder, feed
        self.preprocess = config.data.preprocess()
        self.batch = next(feed.held_out(), None)
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=start)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write the values of a step to metrics.jsonl and TensorBoard; those that are None are left out."""
        values = {name: value for name, value in values.items() if value is not None}  # e.g. SSIM of tiny images
        append_line(self.folder / "metrics.jsonl", {"step": step, **values})
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    @torch.inference_mode()
    def watch(self, step: int, model: Any, objective: Objective) -> None:
        """Score `model` and what `objective` has trained on the held-out batch and draw what the model does."""
        if self.batch is None:
            return
        batch = self.batch.to(device_of(model))
        coder = model if self.config.kind == "tokenizer" else self.feed.tokenizer
        if self.config.kind == "classifier":
            values = {"accuracy": float((model(batch.inputs).argmax(1) == batch.labels).float().mean())}
        elif coder.guides:
            values = self._guided(step, batch, model, coder, objective)
        elif self.config.kind == "tokenizer":
            values = self._reconstructed(step, batch, model)
        else:
            values = self._sampled(step, batch, model, objective)
        self.log(step, {f"val/{k}": v for k, v in values.items()})

    def _reconstructed(self, step: int, batch: Batch, model: Any) -> dict[str, float | None]:
        """Score and draw reconstructions."""
        result = model(batch.inputs)
        metrics = metrics_of(self.preprocess)
        metrics.update(batch.inputs, result.output)
        scores = metrics.compute()
        above, columns = preview(batch.inputs[:PICTURED], self.preprocess)
        below, _ = preview(result.output[:PICTURED], self.preprocess)
        self._picture(step, "reconstructions", side_by_side(above, below, columns))
        return {name: scores[name] for name in metrics.shown}

    def _sampled(self, step: int, batch: Batch, model: Any, objective: Objective) -> dict[str, float | None]:
        """Score codes, in bits per token, and draw samples."""
        firsts = first_texts(batch.texts, len(batch.inputs))
        cond = model.condition(batch.labels, firsts)
        codes = self.feed.tokenizer.encode(batch.inputs)
        values: dict[str, float | None] = {"compression_cost": float(model.bits(codes, cond).mean()) / codes[0].numel()}
        values |= objective.scores(model, CodeBatch(codes, batch.labels))
        labels = torch.arange(SAMPLED, device=batch.labels.device) % max(model.classes, 1)
        asked = tuple(islice(cycle(firsts), SAMPLED))
        sampled = model.sample(SAMPLED, model.condition(labels, asked), seed=self.config.seed)
        size = self.preprocess.shape[1:] if self.preprocess.shape else None
        pictures, columns = preview(self.feed.tokenizer.decode(sampled, size), self.preprocess)
        self._picture(step, "samples", grid_image(pictures, columns))
        return values

    def _guided(self, step: int, batch: Batch, model: Any, uvim: UViM, objective: Objective) -> dict[str, float | None]:
        """Score and draw predictions by the oracle's code, or by the likeliest code of a prior of it."""
        codes, image = uvim.encode(batch.inputs), uvim.image(batch.inputs)
        values: dict[str, float | None] = {}
        if model is not uvim:
            cond = model.condition(images=image)
            values["compression_cost"] = float(model.bits(codes, cond).mean()) / codes[0].numel()
            values |= objective.scores(model, CodeBatch(codes, batch.labels, images=image))
            codes = model.sample(len(codes), cond, sampling=Sampling(temperature=0.0))
        prediction = uvim.task.predict(uvim.solve(image, codes), image)
        metrics = uvim.task.metrics()
        metrics.update(prediction, batch.inputs)
        scores = metrics.compute()
        above, below = to_uint8(image[:PICTURED]), uvim.task.picture(prediction[:PICTURED])
        self._picture(step, "predictions", side_by_side(above.cpu().numpy(), np.asarray(below.cpu()), 8))
        return values | {name: scores[name] for name in metrics.shown}

    def _picture(self, step: int, kind: str, image: Any) -> None:
        save_png(self.folder / "images" / f"{kind}-{step:06d}.png", image)
        self.writer.add_image(kind, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self, model: Any, seconds: float, facts: Mapping[str, Any]) -> None:
        """Write run.json, what the report says of the run as a whole."""
        about = {
            "title": f"{self.folder.resolve().name}: {self.config.about}",
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": self.config.steps,
            "seconds": round(seconds, 1),
            "date": date.today().isoformat(),
            **facts,
        }
        write_json(self.folder / "run.json", about)
        self.writer.close()
