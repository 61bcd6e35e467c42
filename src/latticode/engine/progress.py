"""Progress with rate and time left: a live bar on a terminal, a plain line every tenth elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[..., None]  # advance(done, **shown): done so far, and what to show beside it
SOON = 0.5  # seconds before which a rate says nothing


class _Rate(ProgressColumn):
    """Units per second since the start of this process's part of the work."""

    def render(self, task: Task) -> Text:
        elapsed, unit = task.elapsed or 0, task.fields["unit"]
        done = (task.completed - task.fields["first"]) * task.fields["scale"]
        return Text(f"{done / elapsed:,.0f} {unit}/s" if elapsed > SOON and done else f"- {unit}/s", style="cyan")


@contextmanager
def progress(
    console: Console, title: str, total: int, *, unit: str = "images", scale: float = 1, start: int = 0
) -> Iterator[Advance]:
    """Yield `advance(done, **shown)` for `total` pieces of work, `scale` units each, of which `start` are done."""
    if not console.is_terminal:
        with _lines(console, title, total, unit, scale, start) as advance:
            yield advance
        return
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24)]
    columns += [TextColumn("{task.percentage:>3.0f}%"), _Rate(), TimeElapsedColumn()]
    columns += [TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[shown]}", style="dim")]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, completed=start, unit=unit, scale=scale, first=start, shown="")

        def advance(done: int, **shown: float) -> None:
            bar.update(task, completed=done)
            if shown:
                bar.update(task, shown="  ".join(f"{k} {v:.4g}" for k, v in shown.items()))

        yield advance


@contextmanager
def _lines(console: Console, title: str, total: int, unit: str, scale: float, start: int) -> Iterator[Advance]:
    begun, printed = time.monotonic(), start * 10 // max(total, 1)

    def advance(done: int, **shown: float) -> None:
        nonlocal printed
        if (tenth := done * 10 // max(total, 1)) > printed:
            printed = tenth
            parts = [f"{title}: {done}/{total}"]
            if (seconds := time.monotonic() - begun) > SOON and done > start:
                rate = (done - start) / seconds
                parts += [f"{rate * scale:,.0f} {unit}/s", f"{(total - done) / rate:.0f} s left"]
            text = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
            console.print(f"{', '.join(parts)}  {text}".rstrip())

    yield advance
