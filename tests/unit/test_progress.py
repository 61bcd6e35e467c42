"""Progress lines where there is no terminal."""

from __future__ import annotations

import io

from rich.console import Console

from latticode.engine import progress as module
from latticode.engine.progress import progress


def test_lines_tell_a_rate_only_when_there_is_one(monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    out = io.StringIO()
    with progress(Console(file=out, width=200), "encode", 100, scale=64, start=10) as advance:
        advance(20)  # in no time
        now = 2.0
        advance(25)  # no new tenth
        advance(30, mse=0.125)
    first, second = out.getvalue().splitlines()
    assert first == "encode: 20/100"
    assert second == "encode: 30/100, 640 images/s, 7 s left  mse 0.125"
