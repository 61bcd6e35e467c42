"""The report in a real browser: all pictures load, nothing is blank, and nothing that a user named is executed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import numpy as np
import pytest
from PIL import Image

from latticode.data.writing import save_png
from latticode.viz.pictures import grid_image, side_by_side
from latticode.viz.report import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
]
ATTACK = "<img src=x onerror=document.documentElement.dataset.owned=1>"
PROBE = """<script>addEventListener("load", () => {
  document.documentElement.dataset.images = JSON.stringify([...document.images].map(image => {
    const box = image.getBoundingClientRect();
    return {loaded: image.complete && image.naturalWidth > 0, chart: image.className.includes("chart"),
            box: [box.left, box.top, box.right, box.bottom]};
  }));
  document.documentElement.dataset.width = document.documentElement.scrollWidth;
})</script>"""

pytestmark = [
    pytest.mark.chromium,
    pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path"),
]


def browse(tmp_path, page, width, *options):
    assert BROWSER is not None
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [BROWSER, *FLAGS, profile, f"--window-size={width},2400", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=90, check=True)
    return done.stdout.decode()


@pytest.fixture
def page(tmp_path):
    """The report of a small run, opened up for the probe: its own policy forbids all scripts."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 3, 24, 24), dtype=np.uint8)
    run = tmp_path / "run"
    save_png(run / "images" / "reconstructions-000100.png", side_by_side(images, images))
    save_png(run / "images" / "reconstructions-000200.png", side_by_side(images, images))
    save_png(run / "images" / f"{ATTACK}.png", grid_image(images))
    lines = [{"step": i, "train/loss": 1 / (i + 1), f"val/{ATTACK}": i} for i in range(60)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    numbers = {"psnr": 27.3, ATTACK: 1, "level_histograms": [[3, 5, 2], [4, 4, 2, 1]], "code_counts": [5, 3, 0, 9]}
    (run / "evaluation.json").write_text(json.dumps(numbers | {"protocol": {"psnr": ATTACK}}))
    (run / "config.yaml").write_text(f"classes: ['{ATTACK}']\n")
    report = write_report(run).read_text(encoding="utf-8")
    opened, policies = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', PROBE, report)
    assert policies == 1
    path = tmp_path / "opened.html"
    path.write_text(opened, encoding="utf-8")
    return path


def probe(dom):
    found = re.search(r'data-images="([^"]*)"', dom)
    assert found, dom[:500]
    return json.loads(unescape(found[1]))


@pytest.mark.slow
def test_pictures_and_charts_are_loaded_and_drawn(tmp_path, page):
    screenshot = tmp_path / "page.png"
    images = probe(browse(tmp_path, page, 1200, "--dump-dom"))
    browse(tmp_path, page, 1200, f"--screenshot={screenshot}")
    assert len(images) == 8
    assert all(image["loaded"] for image in images)
    with Image.open(screenshot) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    assert pixels.std() > 5
    for image in images:
        left, top, right, bottom = map(round, image["box"])
        assert 0 <= left < right <= 1200
        area = pixels[top:bottom, left:right]
        assert area.shape[0] > 40
        assert len(np.unique(area.reshape(-1, 3), axis=0)) > (8 if image["chart"] else 100)


@pytest.mark.slow
def test_names_are_not_executed_and_a_phone_needs_no_sideways_scrolling(tmp_path, page):
    dom = browse(tmp_path, page, 500, "--dump-dom")
    assert "data-owned" not in dom
    assert all(image["box"][2] <= 500 for image in probe(dom))
    width = re.search(r'data-width="(\d+)"', dom)
    assert width
    assert int(width[1]) <= 500
