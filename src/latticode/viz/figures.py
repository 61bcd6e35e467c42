"""Charts as matplotlib figures, drawn as SVG for light and dark pages, and pictures as data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, UnidentifiedImageError

Series = tuple[Sequence[float], Sequence[float]]  # steps, values
Point = tuple[float, float, float]  # x, mean, spread; 0 where it is not known

PAGE_WIDTH = 960  # CSS pixels of the text column; small pictures are enlarged by half steps up to it
THUMBNAIL = 320  # pixels; earlier pictures are embedded no wider than this

INK = "#010203"  # a colour that nothing else uses; `svg` makes it the page's text colour
# legible on white and on near-black
COLOURS = ("#2f7fb5", "#d9772b", "#4f9d69", "#a3629f", "#8a8f98", "#c4504e", "#a98f1f", "#35a7a0", "#4a4f8c")
MARKERS = ("o", "s", "^", "D", "v", "x", "P", "*")  # one fewer, so that 72 lines differ in colour or marker
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titlecolor": INK,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "latticode",
}
THEME = "<style>svg{color:#3c4148}@media (prefers-color-scheme:dark){svg{color:#c3c8d0}}</style>"
LEGEND_WIDTH = 48  # letters side by side below a chart of studies
MOST_POINTS = 400  # per line; more are averaged
LOG_RATIO = 20.0  # positive values that span more than this are drawn on a log axis


@dataclass(frozen=True)
class Picture:
    """A PIL image, the path of a PNG or SVG, or a matplotlib figure.

    Examples:
        >>> shown = embed(Picture(Image.new("RGB", (32, 32)), caption="step 1,000"))
        >>> shown["uri"][:22], shown["width"], shown["pixels"]  # small pictures are enlarged
        ('data:image/png;base64,', 256, True)
    """

    image: Image.Image | Path | Figure
    caption: str = ""
    width: str = "full"  # "full", "half" or "small": how many share a row on a wide screen


def embed(picture: Picture) -> dict[str, Any]:
    """The data URI of a picture, its width in CSS pixels, and whether its pixels are meant to be seen."""
    image = picture.image
    if isinstance(image, Figure):
        return {"uri": _uri(svg(image), "svg+xml"), "width": round(image.get_figwidth() * 96), "pixels": False}
    if isinstance(image, Path):
        data = image.read_bytes()
        if image.suffix == ".svg":
            return {"uri": _uri(data, "svg+xml"), "width": PAGE_WIDTH, "pixels": False}
        with Image.open(image) as opened:
            width = opened.width
    else:
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        data, width = buffer.getvalue(), image.width
    factor = min(max(1, 2 * PAGE_WIDTH // width / 2), 8) if picture.width == "full" else 1
    return {"uri": _uri(data, "png"), "width": round(width * factor), "pixels": factor >= 2}


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def readable(path: Path) -> bool:
    """Whether a PNG can be decoded: a picture that a crash or a full disk cut short must not cost the report."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError):
        return False
    return True


def thumbnail(path: Path) -> Image.Image:
    """A picture's RGB thumbnail, at most as wide as a table's cell."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, 4 * THUMBNAIL))
    return small


def svg(figure: Figure) -> bytes:
    """The figure as an SVG file with a transparent ground, whose ink follows the page's colour scheme."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue().decode().replace(INK, "currentColor").replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans'")
    head, tag, body = text.partition("<defs>")
    return (head + THEME + tag + body).encode()


def curves(title: str, series: Mapping[str, Series], *, log: bool = True) -> Figure:
    """One or several lines over training steps. Long lines are drawn faint with their running mean on top.

    `log` lets the axis be logarithmic where the values are positive and span more than a factor `LOG_RATIO`.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(4.4, 2.5)
        axes.set_title(title, parse_math=False)
        for colour, (name, (steps, values)) in zip(_cycle(COLOURS, len(series)), series.items(), strict=True):
            x, y = thin(steps, values)
            smooth = running_mean(y, len(y) // 25)
            marker = "o" if len(x) == 1 else ""
            if len(y) >= 50:
                axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(x, smooth, color=colour, linewidth=1.5, marker=marker, markersize=4)
            if len(series) > 1:
                axes.plot([], [], color=colour, label=f" {name}")  # a leading _ would hide the entry
        if len(series) > 1:
            legend = axes.legend(frameon=False, fontsize=8, labelcolor=INK)
            for text in legend.get_texts():
                text.set_parse_math(False)
        everything = [value for _, values in series.values() for value in values]
        if log and min(everything) > 0 and max(everything) / min(everything) > LOG_RATIO:
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("step")
        axes.grid(True, axis="y")
        return figure


def trade_off(
    title: str, label: str, series: Mapping[str, Sequence[Point]], *, diagonal: bool = False, most: float = math.inf
) -> Figure:
    """A line for each name of `series` through its means, with the spreads as bars that end at `most`, beyond which no
    value can be; dashed where both axes agree."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(4.4, 3.2)
        axes.set_title(title, parse_math=False)
        colours, markers = _cycle(COLOURS, len(series)), _cycle(MARKERS, len(series))
        for colour, marker, (name, points) in zip(colours, markers, series.items(), strict=True):
            x, mean, deviation = zip(*points, strict=True)
            up = [min(d, most - m) for m, d in zip(mean, deviation, strict=True)]
            bars = (deviation, up) if any(deviation) else None
            shape: dict[str, Any] = {"marker": marker, "markersize": 4, "linewidth": 1.3, "elinewidth": 0.8}
            axes.errorbar(x, mean, yerr=bars, color=colour, capsize=2, label=name, **shape)
        if diagonal:
            ends = [min(p[0] for line in series.values() for p in line), max(p[0] for s in series.values() for p in s)]
            axes.plot(ends, ends, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7)
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(label)
        axes.grid(True, axis="y")
        columns = max(1, min(4, LEGEND_WIDTH // max(map(len, series))))
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=8, labelcolor=INK)
        return figure


def level_bars(counts: Sequence[float], title: str) -> Figure:
    """How often each level of one channel was used, as fractions; the dashed line is the uniform distribution."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(2.0, 1.45)
        axes.set_title(title, parse_math=False)
        total = sum(counts) or 1
        axes.bar(range(len(counts)), [count / total for count in counts], width=0.8, color=COLOURS[0])
        axes.axhline(1 / len(counts), color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7)
        axes.set_xticks(range(0, len(counts), math.ceil(len(counts) / 8)))
        axes.yaxis.set_major_locator(MaxNLocator(2))
        axes.tick_params(labelsize=7.5, length=2)
        return figure


def code_panels(panels: Sequence[tuple[str, Sequence[float], bool]]) -> Figure:
    """A small chart for each of `panels` (title, counts, whether of levels), four in a row: how often each level was
    used, or each code, most frequent first; the dashed line is the uniform distribution over them."""
    rows = math.ceil(len(panels) / 4)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 1.7 * rows), layout="constrained")
        for place, (title, counts, levels) in enumerate(panels, 1):
            axes = figure.add_subplot(rows, 4, place)
            axes.set_title(title, parse_math=False, fontsize=8)
            share = np.asarray(counts, dtype=np.float64) / (sum(counts) or 1)
            if levels:
                axes.bar(range(len(share)), share, width=0.8, color=COLOURS[0])
            else:
                x, y = thin(np.arange(1, len(share) + 1), np.sort(share)[::-1])
                axes.fill_between(x, y, color=COLOURS[0], alpha=0.4, linewidth=0)
            axes.axhline(1 / len(share), color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(2))
            axes.tick_params(labelsize=7.5, length=2)
        return figure


def usage_curve(counts: Sequence[float]) -> Figure:
    """Frequency of each code, most frequent first, on a log axis; the dashed line is the uniform distribution."""
    frequency = np.sort(np.asarray(counts, dtype=np.float64))[::-1]
    frequency = frequency / (frequency.sum() or 1)
    used = int((frequency > 0).sum())
    rank, height = thin(np.arange(1, used + 1), frequency[:used])
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(6.4, 2.6)
        axes.fill_between(rank, height, color=COLOURS[0], alpha=0.15, linewidth=0)
        axes.plot(rank, height, color=COLOURS[0], linewidth=1.5)
        axes.axhline(1 / len(frequency), color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7)
        axes.set_yscale("log")
        axes.set_xlim(1, max(len(frequency), 2))
        axes.set_xlabel("codes, most frequent first")
        axes.set_ylabel("frequency")
        axes.grid(True, axis="y")
        return figure


def probe_curve(probe: Mapping[str, Any]) -> Figure:
    """Accuracy of a linear probe over layers (`latticode.runs.probe.probe_layers`); the dot is the chosen layer."""
    numbers = [layer["layer"] for layer in probe["layers"]]
    with matplotlib.rc_context(STYLE):
        figure, axes = _panel(6.4, 2.6)
        for colour, key, label in ((COLOURS[4], "held_out", "held out"), (COLOURS[0], "accuracy", "test")):
            values = [100 * layer[key] for layer in probe["layers"]]
            axes.plot(numbers, values, color=colour, linewidth=1.5, marker=".", label=label)
        axes.plot(probe["layer"], 100 * probe["accuracy"], "o", color=COLOURS[0], markersize=7)
        axes.axhline(100 * probe["chance"], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
        axes.set_ylabel("accuracy, %")
        axes.grid(True, axis="y")
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
        return figure


def thin(x: Iterable[float], y: Iterable[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most `MOST_POINTS` points: means of neighbours."""
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(xs) <= MOST_POINTS:
        return xs, ys
    starts = np.linspace(0, len(xs), MOST_POINTS, endpoint=False).astype(np.int64)
    sizes = np.diff([*starts, len(xs)])
    return np.add.reduceat(xs, starts) / sizes, np.add.reduceat(ys, starts) / sizes


def running_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, over fewer at the two ends."""
    if window < 2:
        return y
    kernel = np.ones(window)
    return np.convolve(y, kernel, "same") / np.convolve(np.ones(len(y)), kernel, "same")


def _panel(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _cycle(colours: Sequence[str], count: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(count)]
