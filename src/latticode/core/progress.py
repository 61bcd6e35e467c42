"""Progress of long work: a live bar with rate and time left on a terminal, a plain line every tenth elsewhere, and the
records that were skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import NamedTuple

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
from rich.table import Column
from rich.text import Text

Advance = Callable[..., None]  # advance(done, **shown): done so far, and what to show beside it
SOON = 0.5  # seconds before which a rate says nothing
PAUSE = 60.0  # seconds at least between two lines of a part


class _Part(NamedTuple):
    whole: str
    named: set[str]  # records that this or another part of the whole has named


_PART: ContextVar[_Part | None] = ContextVar("part", default=None)


class _Rate(ProgressColumn):
    """Units per second since the start of this process's part of the work."""

    def render(self, task: Task) -> Text:
        elapsed, unit = task.elapsed or 0, task.fields["unit"]
        done = (task.completed - task.fields["first"]) * task.fields["scale"]
        return Text(f"{done / elapsed:,.0f} {unit}/s" if elapsed > SOON and done else f"- {unit}/s", style="cyan")


class _Shown(ProgressColumn):
    """What fits of the values beside the bar."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["shown"], style="dim", no_wrap=True, overflow="ellipsis")


def _kept() -> Column:
    """One that a narrow terminal leaves whole: it takes from the bar and the values."""
    return Column(no_wrap=True)


@contextmanager
def part_of(whole: str, named: set[str]) -> Generator[None]:
    """Work within is a part of `whole` and says so: its bars vanish once they are full, its lines are rare, and parts
    that share `named` name a skipped record once."""
    before = _PART.set(_Part(whole, named))
    try:
        yield
    finally:
        _PART.reset(before)


@contextmanager
def progress(
    console: Console, title: str, total: int, *, unit: str = "images", scale: float = 1, start: int = 0
) -> Generator[Advance]:
    """Yield `advance(done, **shown)` for `total` pieces of work, `scale` units each, of which `start` are done."""
    part = _PART.get()
    title = f"{part.whole}: {title}" if part else title
    if not console.is_terminal:
        with _lines(console, title, total, unit, scale, start, PAUSE if part else 0) as advance:
            yield advance
        return
    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24)]
    columns += [TextColumn("{task.percentage:>3.0f}%"), _Rate(_kept()), TimeElapsedColumn(_kept())]
    columns += [TextColumn("left"), TimeRemainingColumn(table_column=_kept()), _Shown()]
    with Progress(*columns, console=console, transient=part is not None) as bar:
        task = bar.add_task(title, total=total, completed=start, unit=unit, scale=scale, first=start, shown="")

        def advance(done: int, **shown: float) -> None:
            bar.update(task, completed=done)
            if shown:
                bar.update(task, shown="  ".join(f"{k} {v:.4g}" for k, v in shown.items()))

        yield advance


@contextmanager
def _lines(
    console: Console, title: str, total: int, unit: str, scale: float, start: int, pause: float
) -> Generator[Advance]:
    begun = last = time.monotonic()
    printed = start * 10 // max(total, 1)

    def advance(done: int, **shown: float) -> None:
        nonlocal printed, last
        now = time.monotonic()
        if (tenth := done * 10 // max(total, 1)) > printed and now - last >= pause:
            printed, last = tenth, now
            parts = [f"{title}: {done}/{total}"]
            if (seconds := now - begun) > SOON and done > start:
                rate = (done - start) / seconds
                parts += [f"{rate * scale:,.0f} {unit}/s", f"{(total - done) / rate:.0f} s left"]
            text = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
            console.print(f"{', '.join(parts)}  {text}".rstrip(), markup=False, soft_wrap=True)

    yield advance


def tell_skipped(console: Console, skipped: Mapping[str, str]) -> None:
    """Name and count the records that could not be read; `skipped` is name -> reason."""
    part = _PART.get()
    named = part.named if part else set[str]()
    new = {name: reason for name, reason in skipped.items() if name not in named}
    for name, reason in new.items():
        console.print(f"skipped {name}: {reason}", style="yellow", markup=False, soft_wrap=True)
    if new:
        console.print(f"{len(new):,} skipped", style="yellow")
    named.update(new)


@contextmanager
def watched(console: Console, title: str) -> Generator[Callable[[int, int], None]]:
    """A bar whose total is known only once the work reports it: yields hook(done, total)."""
    with ExitStack() as stack:
        advance: Callable[..., None] | None = None

        def hook(done: int, total: int) -> None:
            nonlocal advance
            if advance is None:
                advance = stack.enter_context(progress(console, title, total))
            advance(done)

        yield hook
