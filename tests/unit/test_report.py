"""The report of a run, and the pictures that go into it."""

from __future__ import annotations

import base64
import html
import json
import math
import re

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from latticode.data.writing import SETTINGS_KEY, save_png
from latticode.viz import figures
from latticode.viz.pictures import grid_image, side_by_side
from latticode.viz.report import Picture, Section, Table, cell, read_metrics, write_page, write_report

HOSTILE = "<script>document.documentElement.dataset.owned=1</script>"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, noise):
    """A run folder as a user with hostile names would leave it."""
    run = tmp_path_factory.mktemp("report") / "run <b>1</b>"
    (run / "images").mkdir(parents=True)
    for step in range(100, 1100, 100):
        save_png(run / "images" / f"reconstructions-{step:06}.png", side_by_side(noise, noise))
    save_png(run / "images" / "samples-000500.png", grid_image(noise))
    save_png(run / "images" / "<img src=x onerror=alert(1)>-000007.png", grid_image(noise))
    lines = [
        {"step": step, "train/l1": 2 * math.exp(-step / 20), "lr": 1e-3, "a $\\frac & <b>": step} for step in range(99)
    ]
    lines += [{"step": 99, "val/l1": 0.5, "train/l1": math.nan, "nothing": None, "flag": True}]
    text = "\n".join(map(json.dumps, lines)) + '\n[1, 2]\n{"step": 100, "train/l1": 0.'
    (run / "metrics.jsonl").write_text(text)
    evaluation = {
        "psnr": 27.3456,
        "usage": 0.998,
        "count": 12345,
        "rfid_classifier_real": 3.25,
        f"mystery {HOSTILE}": 0.000123,
        "nested": {"deep": {"value": 77}},
        "level_histograms": [[1, 2, 3], [5, 0, 5, 2]],
        "code_counts": [5, 0, 9, 1],
        "odd_list": [1, 2],
        "absent": None,
        "protocol": {"psnr": "after rounding to 8 bits", "reference": HOSTILE, "crop": {"kind": "center"}},
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    (run / "config.yaml").write_text(f"data:\n  classes: ['{HOSTILE}', '</pre>']\n")
    facts = {"recipe": "fsq-tokenizer", "seconds": 3725.0, "parameters": 1234567, "command": f"train {HOSTILE}"}
    (run / "run.json").write_text(json.dumps({"title": f"Run {HOSTILE}", **facts}))
    return run


@pytest.fixture(scope="module")
def page(run_folder):
    path = write_report(run_folder)
    assert path == run_folder / "report.html"
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(0).integers(0, 256, (8, 3, 16, 16), dtype=np.uint8)


def data_uris(page):
    return re.findall(r'src="data:image/(png|svg\+xml);base64,([^"]*)"', page)


def sections_of(page):
    return [html.unescape(title) for title in re.findall(r"<h2>(.*?)</h2>", page)]


def test_report_has_every_section_pictures_first_and_config_last(page):
    titles = sections_of(page)
    assert titles[:2] == ["Reconstructions", "Samples"]
    assert titles[3:] == ["Numbers", "Levels", "Code usage", "Training", "Configuration"]
    # 1 latest + 5 earlier reconstructions, 1 samples, 1 other, 2 channels, 1 usage curve, 3 panels (l1, lr, hostile)
    assert len(data_uris(page)) == 14
    assert page.index("step 1,000") < page.index("step 100<") < page.index("step 900<")
    assert page.count("<details>") == 1


def test_report_escapes_what_users_name(page):
    assert "<script" not in page
    assert "<img src=x" not in page
    assert page.count(html.escape(HOSTILE)) == 6
    assert page.count("</pre>") == 1


def test_report_refers_to_nothing_outside(page):
    assert "default-src 'none'" in page
    assert set(re.findall(r'(?:src|href)="(.{5})', page)) <= {
        "data:",
        *(h[:5] for h in re.findall(r'"(#[^"]*)"', page)),
    }
    assert not re.search(r"https?:|url\(|@import|<link", page)
    for kind, data in data_uris(page):
        decoded = base64.b64decode(data)
        if kind == "svg+xml":
            assert b"<svg" in decoded
            assert not re.search(rb'(?:href|src)="(?!#)', decoded)
        else:
            assert decoded.startswith(b"\x89PNG")


def test_report_shows_every_number_with_its_protocol(page):
    table = {html.unescape(k): v for k, v in re.findall(r'<tr><td>(.*?)</td><td class="number">(.*?)</td>', page)}
    assert table["PSNR, dB"] == "27.35"
    assert table["Codes used, %"] == "99.8"
    assert table["Examples"] == "12,345"
    assert table["rFID (classifier), real images"] == "3.25"
    assert table[f"Mystery {HOSTILE}"] == "0.000123"
    assert table["Nested deep value"] == "77"
    assert '<td class="number">27.35</td><td>after rounding to 8 bits</td>' in page
    assert "<td>Crop kind</td><td>center</td>" in page
    assert "<td>Odd list</td><td>1, 2</td>" in page
    assert "3 of 4 codes were used" in page
    assert "<dd>1 h 02 min</dd>" in page
    assert "<dd>1,234,567</dd>" in page


def test_counts_in_another_form_are_shown_not_dropped(tmp_path):
    evaluation = {"level_histograms": "none taken", "code_counts": [], "protocol": "by hand"}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<td>Level histograms</td><td>none taken</td>" in page
    assert "Code counts" in page
    assert "by hand" in page
    assert sections_of(page) == ["Numbers"]


def test_report_of_an_empty_folder_has_its_name_only(tmp_path):
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert f"<h1>{tmp_path.name}</h1>" in page
    assert "<section" not in page


def test_a_picture_cut_short_is_named_and_the_rest_shown(tmp_path, noise):
    images = tmp_path / "images"
    save_png(images / "samples-000001.png", grid_image(noise))
    whole = (images / "samples-000001.png").read_bytes()
    (images / "samples-000002.png").write_bytes(whole[: len(whole) // 2])
    (images / "samples-000003.png").write_bytes(b"")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert sections_of(page) == ["Samples", "Unreadable pictures"]
    assert base64.b64decode(data_uris(page)[0][1]) == whole
    assert "samples-000002.png\nsamples-000003.png" in page


def test_broken_inputs_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "evaluation.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"evaluation\.json must hold a JSON object, got list"):
        write_report(tmp_path)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json is not JSON"):
        write_report(tmp_path)


def test_metrics_of_a_resumed_run_count_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == {}
    path.write_text('{"step": 2, "a": 1}\n{"step": 3, "a": 5}\n{"step": 2, "a": 4, "b": Infinity}\n{"a": 9}\n{"st')
    assert read_metrics(path) == {"a": ([2, 3], [4.0, 5.0])}


def test_page_of_sections_from_several_runs(tmp_path):
    figure = Figure()
    figure.add_subplot().plot([1, 2])
    save_png(tmp_path / "a.png", Image.new("L", (10, 5), 7))
    sections = [
        Section("Same", "one & two\n\nthree", [Picture(Image.new("RGB", (30, 20)), "black"), Picture(figure)]),
        Section("Same", tables=[Table([["FSQ", 1.5], ["VQ", None]], ["quantizer", "bits"], caption="Both")]),
        Section("Ünï", pictures=[Picture(tmp_path / "a.png")], id="third"),
    ]
    write_page(tmp_path / "page.html", "Demo", sections, {"device": "cpu", "date": ""})
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.findall(r'<section id="(.*?)"', page) == ["same", "same-2", "third"]
    assert re.findall(r'<a href="#(.*?)"', page) == ["same", "same-2", "third"]
    assert "<p>one &amp; two</p>\n<p>three</p>" in page
    assert '<th>quantizer</th><th class="number">bits</th>' in page
    assert [kind for kind, _ in data_uris(page)] == ["png", "svg+xml", "png"]
    assert 'class="pixels picture"' in page
    assert "Date" not in page


def test_charts_are_reproducible_and_follow_the_colour_scheme():
    first, second = (figures.svg(figures.level_bars([1, 2, 3], "channel 1")) for _ in range(2))
    assert first == second
    assert b"currentColor" in first
    assert b"prefers-color-scheme:dark" in first
    assert figures.INK.encode() not in first


def test_thinning_keeps_the_mean_and_short_series():
    x = np.arange(4000.0)
    thinned_x, thinned_y = figures.thin(x, 2 * x + 1)
    assert len(thinned_x) == figures.MOST_POINTS
    assert thinned_y == pytest.approx(2 * thinned_x + 1)
    assert thinned_y.mean() == pytest.approx((2 * x + 1).mean())
    assert figures.thin([1, 2], [3, 4])[1].tolist() == [3, 4]


def test_running_mean_keeps_constants_and_length():
    assert figures.running_mean(np.full(30, 2.5), 7) == pytest.approx(np.full(30, 2.5))
    assert figures.running_mean(np.array([0.0, 3.0, 0.0, 0.0]), 3)[1] == pytest.approx(1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234, "1,234"),
        (27.3456, "27.35"),
        (0.00012345, "0.0001234"),
        (123456.7, "123,457"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
        (True, "yes"),
        (None, "none"),
        ([1, 2.5], "1, 2.5"),
        ([[3, 32, 32], [1, 8]], "(3, 32, 32), (1, 8)"),
        (list(range(100)), "100 values"),
        ({"a": 1}, "a: 1"),
        ("<b>", "<b>"),
    ],
)
def test_cells(value, text):
    assert cell(value) == text


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_grid_puts_each_image_in_its_place(channels, as_tensor):
    images = np.random.default_rng(1).integers(0, 256, (5, channels, 4, 6), dtype=np.uint8)
    picture = grid_image(torch.from_numpy(images) if as_tensor else images, columns=3, pad=2)
    assert picture.size == (3 * 6 + 2 * 2, 2 * 4 + 2)
    assert picture.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    pixels = np.asarray(picture).reshape(10, 22, channels)
    for index, image in enumerate(images):
        top, left = index // 3 * 6, index % 3 * 8
        assert (pixels[top : top + 4, left : left + 6] == image.transpose(1, 2, 0)).all()
    assert (pixels[4:6] == 255).all()
    assert (pixels[6:, 16:] == 255).all()


def test_side_by_side_pairs_rows():
    originals = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 4, 4), np.uint8)
    pixels = np.asarray(side_by_side(originals, originals + 100, columns=3, pad=1))
    assert pixels.shape == (2 * (4 + 1 + 4) + 4, 3 * 4 + 2)
    assert pixels[0, [0, 5, 10]].tolist() == [0, 1, 2]
    assert pixels[5, [0, 5, 10]].tolist() == [100, 101, 102]
    assert pixels[13, [0, 5, 10]].tolist() == [3, 4, 255]
    assert pixels[18, [0, 5, 10]].tolist() == [103, 104, 255]


@pytest.mark.parametrize("bad", [np.zeros((2, 3, 4), np.uint8), np.zeros((2, 2, 4, 4), np.uint8),
                                 np.zeros((0, 3, 4, 4), np.uint8), np.zeros((2, 3, 4, 4))])  # fmt: skip
def test_grid_refuses_other_shapes_and_types(bad):
    with pytest.raises(ValueError, match=re.escape(str(bad.shape))):
        grid_image(bad)
    with pytest.raises(ValueError, match=re.escape(str(bad.shape))):
        side_by_side(bad, bad)


def test_grid_refuses_senseless_layouts(noise):
    with pytest.raises(ValueError, match="columns=0"):
        grid_image(noise, columns=0)
    with pytest.raises(ValueError, match="columns=0"):
        side_by_side(noise, noise, columns=0)
    with pytest.raises(ValueError, match="one shape"):
        side_by_side(noise, noise[:3])


def test_png_carries_its_settings_and_replaces_atomically(tmp_path):
    path = tmp_path / "new" / "a.png"
    save_png(path, Image.new("RGB", (3, 2), (1, 2, 3)), {"seed": 0, "label": "Füße"})
    with Image.open(path) as image:
        assert json.loads(image.info[SETTINGS_KEY]) == {"seed": 0, "label": "Füße"}
        assert image.getpixel((2, 1)) == (1, 2, 3)
    before = path.read_bytes()
    with pytest.raises(OSError, match="cannot write mode"):
        save_png(path, Image.new("HSV", (3, 2)))
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
