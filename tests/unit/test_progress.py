"""Progress lines where there is no terminal, and bars of a part."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager, nullcontext

from rich.console import Console

from latticode.core import progress as module
from latticode.core.progress import part_of, progress, tell_skipped


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


def test_lines_of_a_part_are_rare_and_say_of_what(monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    out = io.StringIO()
    with part_of("1/4 [fsq]", set()), progress(Console(file=out, width=20), "train", 10) as advance:
        for done in range(1, 11):
            now += 25.0
            advance(done)
    assert [line.split(",")[0] for line in out.getvalue().splitlines()] == [
        f"1/4 [fsq]: train: {done}/10" for done in (3, 6, 9)
    ]
    with progress(Console(file=out, width=200), "encode", 1) as advance:
        advance(1)
    assert out.getvalue().splitlines()[-1] == "encode: 1/1"


def test_bars_of_a_part_vanish() -> None:
    def left_on_screen(part: AbstractContextManager[None]) -> bool:
        out = io.StringIO()
        with part, progress(Console(file=out, force_terminal=True, width=200), "train", 2) as advance:
            advance(2)
        assert "train" in out.getvalue()
        return not out.getvalue().rstrip("\r\n").endswith("\x1b[2K")

    assert left_on_screen(nullcontext())
    assert not left_on_screen(part_of("1/4 fsq", set()))


def test_a_narrow_terminal_takes_from_the_bar_and_the_values_alone() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None, width=80)
    with part_of("12/98 vq-ema-65536-0", set()), progress(console, "train tokenizer", 100) as advance:
        advance(50, mse=0.02212, commitment=0.2, codebook=0.123)
    last = out.getvalue().replace("\r", "\n").split("\n")[-3:]
    assert any("train tokenizer" in line and "images/s" in line and "left" in line for line in last), last


def test_a_skipped_record_is_named_once_by_the_parts_of_a_whole() -> None:
    out, named = io.StringIO(), set()
    console = Console(file=out, width=20)

    def told(skipped: dict[str, str]) -> list[str]:
        out.seek(0)
        out.truncate()
        tell_skipped(console, skipped)
        return out.getvalue().splitlines()

    first, both = {"a[0].png": "cut off at half of its length"}, {"a[0].png": "cut off", "b.png": "empty"}
    with part_of("1/2 fsq", named):
        assert told(first) == ["skipped a[0].png: cut off at half of its length", "1 skipped"]
        assert told(first) == []
    with part_of("2/2 vq", named):
        assert told(both) == ["skipped b.png: empty", "1 skipped"]
    assert len(told(both)) == len(told(both)) == 3
    assert told({}) == []
