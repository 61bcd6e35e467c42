"""The Python of the documentation runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from latticode.core.registry import build
from latticode.engine.config import complete, load_config

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    *(f"docs/{name}.md" for name in ("audio-video", "dense", "quantizers", "sampling", "study", "training")),
]


def blocks(page: str) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL))


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    build(complete(load_config("fsq-tokenizer", ["data.source=photos/"]), classes=0).model).save_pretrained(
        Path("runs/fsq-tokenizer")
    )
    exec(compile(blocks(page), page, "exec"), {"__name__": page})
