"""Files are whole or not there, and JSON is what its reader expects."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from latticode.core.files import read_json, replacing, write_json, write_text


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_is_replaced_whole(tmp_path) -> None:
    path = tmp_path / "new" / "file.txt"
    write_text(path, "one")
    with replacing(path) as temporary:
        temporary.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"
    assert names(path.parent) == {"file.txt"}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 or os.name == "nt"


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def half_written() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half_written()
    assert path.read_text() == "old"
    assert names(tmp_path) == {"file.txt"}


def test_what_is_flushed_is_open_for_writing(tmp_path, monkeypatch) -> None:
    """Windows refuses to flush a handle that is open for reading only: every save would fail there."""
    fcntl = pytest.importorskip("fcntl")
    modes = []
    monkeypatch.setattr(os, "fsync", lambda handle: modes.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE))
    write_text(tmp_path / "file.txt", "text")
    assert modes == [os.O_RDWR]


def test_json_comes_back(tmp_path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"steps": 3, "name": "é"})
    assert read_json(path) == {"steps": 3, "name": "é"}
    assert read_json(path, {"steps": int, "name": (str, int)}) == {"steps": 3, "name": "é"}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path)["steps"] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"{}", "needs 'steps', int, got nothing"),
        (b'{"steps": "three"}', "needs 'steps', int, got 'three'"),
    ],
)
def test_an_error_names_the_file_and_what_is_wrong(tmp_path, content, message) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as told:
        read_json(path, {"steps": int})
    assert str(path) in str(told.value)
