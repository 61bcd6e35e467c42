"""Probes in code space: which codes each of them decodes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers import QUIET, tiny_tokenizer, tokenizer_spec
from latticode.core import registry
from latticode.diagnose import diagnose
from latticode.diagnose.semantics import drawn, picture, probes, shifted, stitched, uniform
from latticode.quantizers import FSQ
from latticode.runs.open import Run
from latticode.viz.report import write_report

CODES = torch.randint(12, (5, 4, 3, 2))


def test_codes_of_the_marginal_are_codes_of_the_pool() -> None:
    few = torch.tensor([[1, 2], [3, 4], [3, 4], [3, 4]]).view(1, 2, 2, 2)
    maps = drawn(few, 500, torch.Generator().manual_seed(1))
    assert maps.shape == (500, 2, 2, 2)
    values, numbers = maps.flatten(0, 2).unique(dim=0, return_counts=True)
    assert values.tolist() == [[1, 2], [3, 4]]
    assert numbers[1] / numbers.sum() == pytest.approx(0.75, abs=0.03)
    assert (drawn(few, 9, torch.Generator().manual_seed(3)) == drawn(few, 9, torch.Generator().manual_seed(3))).all()


def test_one_code_everywhere_the_most_frequent_first() -> None:
    codes = torch.tensor([7, 5, 5, 7, 5, 2]).view(1, 2, 3, 1)
    maps = uniform(codes, 2)
    assert maps.shape == (2, 2, 3, 1)
    assert maps[:, 0, 0, 0].tolist() == [5, 7]
    assert (maps == maps[:, :1, :1]).all()
    assert len(uniform(codes, 8)) == 3


def test_stitched_maps_have_a_half_of_each() -> None:
    maps = stitched(CODES)
    assert (maps[:, :2] == CODES[:, :2]).all()
    assert (maps[:-1, 2:] == CODES[1:, 2:]).all()
    assert (maps[-1, 2:] == CODES[0, 2:]).all()


def test_an_offset_moves_one_channel_and_stops_at_the_ends() -> None:
    quantizer = FSQ([5, 4, 3])
    codes = torch.arange(60)[:, None]
    before, after = quantizer.digits(codes), quantizer.digits(shifted(codes, quantizer, 1, 2))
    assert (after[:, [0, 2]] == before[:, [0, 2]]).all()
    assert (after[:, 1] == (before[:, 1] + 2).clamp(max=3)).all()
    assert (shifted(codes, quantizer, 1, 0) == codes).all()
    with pytest.raises(ValueError, match=r"0 \.\. 2, got 3"):
        shifted(codes, quantizer, 3, 1)


@pytest.mark.parametrize("spec", [{"type": "fsq", "levels": [4, 3]}, {"type": "vq", "size": 16, "dim": 3}], ids=str)
def test_every_probe_is_images(spec) -> None:
    tokenizer = registry.build(tokenizer_spec(spec)).eval()
    images = torch.rand(4, 1, 8, 8) * 2 - 1
    with torch.inference_mode():
        rows = probes(tokenizer, images, tokenizer.encode(images))
        assert torch.equal(rows[1][1], tokenizer.decode(tokenizer.encode(images), (8, 8)))
    assert len(rows) == (7 if spec["type"] == "fsq" else 5)
    assert all(shown.shape[1:] == images.shape[1:] and 1 <= len(shown) <= 4 for _, shown in rows)
    assert picture(rows).height == len(rows) * (16 + 64 + 6) - 6  # a line of text, images enlarged to 64, a gap


@pytest.mark.slow
def test_a_diagnosis_draws_them(tmp_path: Path) -> None:
    run = tiny_tokenizer(tmp_path / "run")
    result = diagnose(Run.open(run, "cpu"), limit=20, console=QUIET)
    assert result["probes"][:2] == ["images", "reconstructions"]
    with Image.open(run / "semantics.png") as drawn_probes:
        assert drawn_probes.height == len(result["probes"]) * 86 - 6
    page = write_report(run).read_text()
    assert "Diagnosis" in page
    assert "What codes mean" in page
    (run / "semantics.png").write_bytes(b"cut short")
    assert "What codes mean" not in write_report(run).read_text()
