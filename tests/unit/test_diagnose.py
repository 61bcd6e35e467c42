"""What is wrong with a codebook: every broken tokenizer gives its own finding and no other, a healthy one none."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import QUIET, tiny_config, tiny_tokenizer
from latticode import cli
from latticode.core.pretrained import load_model
from latticode.diagnose import diagnose, recommended
from latticode.diagnose.bounds import better_bound, bounds
from latticode.diagnose.evidence import Evidence, leaves, measure
from latticode.diagnose.findings import Finding, findings, notes
from latticode.engine import train
from latticode.quantizers import BSQ, FSQ, LFQ, VQ, Grouped, Gumbel, Hierarchical, Projected, Quantizer, Residual, SimVQ
from latticode.runs.open import Run

TOKENS = 10_000


def fitted(quantizer: Quantizer, z: Tensor) -> Quantizer:
    """After a few training steps on `z`, which move what learns by averages."""
    quantizer.train()
    for _ in range(5):
        quantizer(z)
    return quantizer.eval()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def found(quantizer: Quantizer, z: Tensor) -> list[Finding]:
    evidence = seen(quantizer, z)
    return [f for part in evidence.parts.values() for f in findings(part, measure(part))]


def seen(quantizer: Quantizer, z: Tensor) -> Evidence:
    evidence = Evidence(quantizer)
    quantizer.eval()
    with torch.inference_mode():
        evidence.add("quantizer", quantizer, z, quantizer.encode(z))
    return evidence


def simvq() -> SimVQ:
    quantizer = SimVQ(64, 4)
    with torch.no_grad():
        quantizer.transform.weight.copy_(2 * torch.eye(4))  # the frozen codes have variance 1/4
    return quantizer


def fit(quantizer: Quantizer) -> Quantizer:
    return fitted(quantizer, normal(TOKENS, quantizer.dim))


HEALTHY: dict[str, tuple[Callable[[], Quantizer], float]] = {  # and the standard deviation of its latents
    "fsq-paper": (lambda: FSQ([8, 5, 5, 5]), 1),
    "fsq-symmetric": (lambda: FSQ([8, 5, 5, 5], "symmetric"), 1),
    "fsq-equal-bins": (lambda: FSQ([8, 5, 5, 5], "equal-bins"), 1),
    "fsq-3-4": (lambda: FSQ([3, 4, 8, 16]), 1),
    "fsq-2": (lambda: FSQ([2, 2, 2, 2], "symmetric"), 1),
    "fsq-factors": (lambda: FSQ([8, 5, 5, 5], factors=2), 1),
    "fsq-projected": (lambda: Projected(FSQ([5, 5]), 6), 2),
    "lfq": (lambda: LFQ(6), 1),
    "lfq-factors": (lambda: LFQ(6, factors=2), 1),
    "bsq": (lambda: BSQ(6), 30),
    "vq": (lambda: fit(VQ(64, 4)), 1),
    "vq-unit": (lambda: fit(VQ(64, 4, normalize=True)), 100),
    "simvq": (simvq, 1),
    "residual-vq": (lambda: fit(Residual(VQ(16, 4), 2)), 1),
    "residual-lists": (lambda: fit(Residual([VQ(16, 4), VQ(16, 4)])), 1),
    "residual-fsq": (lambda: Residual(FSQ([5, 5], "clamp"), 2), 0.7),
    "residual-soft": (lambda: Residual(FSQ([5, 5], "clamp"), 2, soft_clamp=True), 0.7),
    "grouped": (lambda: Grouped(FSQ([5, 5]), 2), 1),
    "hierarchical": (lambda: fit(Hierarchical(VQ(16, 2), VQ(16, 2), 4)), 1),
    "gumbel": (lambda: Gumbel(8, 4), 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_quantizer_has_no_finding(name: str) -> None:
    make, std = HEALTHY[name]
    quantizer = make()
    assert found(quantizer, std * normal(TOKENS, quantizer.dim)) == []


# --- each broken thing and nothing else


def scaled(channel: int, factor: float, z: Tensor) -> Tensor:
    scale = torch.ones(z.shape[-1])
    scale[channel] = factor
    return z * scale


def kinds(quantizer: Quantizer, z: Tensor) -> list[tuple[str, list[int]]]:
    return [(f.kind, f.channels) for f in found(quantizer, z)]


@pytest.mark.parametrize("quantizer", [FSQ([8, 5, 5, 5]), FSQ([8, 5, 5, 5], "equal-bins"), LFQ(4)], ids=repr)
def test_a_dead_channel(quantizer: Quantizer) -> None:
    assert kinds(quantizer, scaled(2, 0.0, normal(TOKENS, 4))) == [("dead", [2])]
    assert kinds(quantizer, normal(TOKENS, 4) + torch.tensor([0, 30.0, 0, 0])) == [("dead", [1])]


@pytest.mark.parametrize("bound", ["paper", "symmetric", "equal-bins"])
def test_a_saturated_and_a_narrow_channel(bound: str) -> None:
    z = normal(TOKENS, 3)
    assert kinds(FSQ([8, 5, 3], bound), scaled(1, 100, z)) == [("saturated", [1])]
    assert kinds(FSQ([8, 5, 3], bound), 100 * z) == [("saturated", [0]), ("saturated", [1]), ("saturated", [2])]
    assert kinds(FSQ([8, 8, 8], bound), scaled(0, 0.1, z)) in ([("narrow", [0])], [("dead", [0])])
    (one,) = found(FSQ([8, 8, 8], bound), scaled(0, 0.2, z))
    assert (one.kind, one.channels) == ("narrow", [0])
    assert one.value == pytest.approx(0.2, rel=0.05)
    assert one.change == ["tokenizer.quantizer.slope=10"]


def test_the_change_of_a_slope_cures() -> None:
    z = normal(TOKENS, 3) * 40
    (one, *_) = found(FSQ([8, 5, 5]), z)
    slope = float(one.change[0].partition("=")[2])
    assert found(FSQ([8, 5, 5], slope=slope), z) == []


def test_two_levels_of_the_published_bound() -> None:
    z = normal(TOKENS, 3)
    assert kinds(FSQ([2, 5, 5]), z) == [("unbalanced", [0])]
    (one,) = found(FSQ([2, 5, 5]), z)
    assert one.value == pytest.approx(0.94, abs=0.01)
    assert one.threshold == pytest.approx(2**-0.5)
    assert "bound=" in one.change[0]
    assert "paper" not in one.change[0]


@pytest.mark.parametrize("quantizer", [FSQ([8, 5, 5, 5]), FSQ([5, 5, 5, 5]), LFQ(4), BSQ(4)], ids=repr)
def test_two_equal_channels(quantizer: Quantizer) -> None:
    z = normal(TOKENS, 4)
    z[:, 3] = -2 * z[:, 1]
    assert kinds(quantizer, z) == [("correlated", [1, 3])]


def test_signs_far_from_their_latents() -> None:
    z = normal(TOKENS, 6)
    assert kinds(LFQ(6), 100 * z) == [("wide", [i]) for i in range(6)]
    assert kinds(LFQ(6), scaled(4, 0.01, z)) == [("narrow", [4])]
    assert kinds(LFQ(6, scale=100.0), 100 * z) == []


@pytest.mark.parametrize("make", [lambda z: fitted(VQ(64, 4), z), lambda z: simvq()], ids=["vq", "simvq"])
def test_latents_far_wider_than_their_codebook(make) -> None:
    z = normal(TOKENS, 4)
    assert kinds(make(z), 100 * z) == [("wide", [])]


def test_a_collapsed_codebook() -> None:
    z = normal(TOKENS, 4)
    quantizer: Any = fitted(VQ(64, 4), z)
    quantizer.embedding.weight[3:] = 1e4
    (one,) = found(quantizer, z)
    assert (one.kind, one.channels) == ("collapsed", [])
    assert one.value == pytest.approx(3 / 64)
    assert "tokenizer.quantizer.size=8" in one.change
    assert "tokenizer.quantizer.update=ema" not in one.change


def test_a_lattice_that_few_points_of_are_used() -> None:
    """Every channel is even and no two are correlated; together they take 25 of 625 codes."""
    a, b = torch.rand(2, TOKENS) * 4 - 2
    z = torch.stack([a, b, a.abs() * 2 - 2, b.abs() * 2 - 2], -1)
    (one,) = found(FSQ([5, 5, 5, 5]), z)
    assert one.kind == "collapsed"
    assert one.change[0].startswith("tokenizer.quantizer.levels=")


def test_each_slot_of_a_residual_quantizer_is_judged_by_itself() -> None:
    z = normal(TOKENS, 4)
    quantizer: Any = fitted(Residual([VQ(16, 4), VQ(64, 4)]), z)
    quantizer.stages[1].embedding.weight[3:] = 1e4
    (one,) = found(quantizer, z)
    assert (one.kind, one.part) == ("collapsed", "quantizer.stages[1]")
    assert "in tokenizer.quantizer.stages[1]: size=8" in one.change


# --- the parts


@pytest.mark.parametrize("name", HEALTHY)
def test_leaves_see_what_their_quantizers_see(name: str) -> None:
    """The codes of every leaf are those that it gives to the latents that it is said to have had."""
    make, std = HEALTHY[name]
    quantizer = make().eval()
    z = std * normal(500, quantizer.dim)
    parts = list(leaves("quantizer", quantizer, z, quantizer.encode(z)))
    assert sum(codes[0].numel() for *_, codes in parts) == len(quantizer.vocab)
    for _, one, latents, codes in parts:
        assert (one.encode(latents) == codes).float().mean() > 0.999


def test_tokens_without_codes_are_counted_apart() -> None:
    z = normal(1000, 3)
    z[:7, 1] = math.nan
    evidence = seen(FSQ([5, 5, 5]), z)
    assert (evidence.invalid, evidence.tokens) == (7, 1000)
    assert evidence.parts["quantizer"].codes.positions == 993


def test_few_tokens_are_a_note_and_no_defect() -> None:
    evidence = seen(FSQ([8, 8, 8, 8, 8]), normal(TOKENS, 5))
    (part,) = evidence.parts.values()
    numbers = measure(part)
    assert findings(part, numbers) == []
    assert numbers["possible"] == pytest.approx(1 - (1 - 2**-15) ** TOKENS)
    (note,) = notes(numbers)
    assert "no defect" in note
    assert notes(measure(*seen(FSQ([5, 5]), normal(TOKENS, 2)).parts.values())) == []


def test_bounds_measure_what_the_quantizer_would_do() -> None:
    """Against the numbers that `levels` computes for a unit normal."""
    from latticode.quantizers.levels import expected_entropy

    z = normal(50_000, 3)
    for row in bounds([8, 5, 3], z):
        assert row["entropy_bits"] == pytest.approx(expected_entropy([8, 5, 3], row["bound"], row["slope"]), abs=0.02)
        assert sum(row["channels"]) == pytest.approx(row["entropy_bits"], abs=0.02)
    best, rows = better_bound([8, 5, 3], FSQ([8, 5, 3], slope=9.0), z)
    assert (rows[0]["bound"], rows[0]["slope"]) == ("paper", 9.0)
    assert best["entropy_bits"] == max(row["entropy_bits"] for row in rows)
    best, _ = better_bound([5, 5, 5], FSQ([5, 5, 5]), z)
    assert best["bound"] == "paper", "a hundredth of a bit is no reason to change"


# --- a run


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return tiny_tokenizer(tmp_path_factory.mktemp("diagnose") / "run")


def test_a_run_with_a_dead_channel(tmp_path: Path) -> None:
    run = tiny_tokenizer(tmp_path / "run")
    model = load_model(run)
    conv = model.quant_conv
    assert isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        conv.weight[1], conv.bias[1] = 0, 0  # type: ignore[index]
    model.save_pretrained(run)
    result = diagnose(Run.open(run, "cpu"), limit=100, console=QUIET)
    assert ("dead", [1]) in [(f["kind"], f["channels"]) for f in result["findings"]]
    assert json.loads((run / "diagnosis.json").read_text()) == result
    assert (run / "diagnosis.svg").read_bytes().startswith(b"<?xml")
    assert result["parts"][0]["tokens"] == result["protocol"]["tokens"] == 100 * 4
    again = recommended(Run.open(run, "cpu"), limit=100, console=QUIET)
    assert again["idle"] == [1]


def test_levels_by_the_latents_of_a_run(tokenizer: Path) -> None:
    result = recommended(Run.open(tokenizer, "cpu"), limit=100, console=QUIET)
    assert result["levels"] == result["measured"] == [4, 3]
    assert (result["rows"][0]["bound"], result["rows"][0]["slope"]) == ("paper", 2.0)
    wider = recommended(Run.open(tokenizer, "cpu"), bits=9, limit=100, console=QUIET)
    assert (wider["levels"], wider["measured"]) == ([8, 8, 8], [4, 3])
    assert recommended(Run.open(tokenizer, "cpu"), bits=6, limit=100, console=QUIET)["measured"] == [8, 8]


def test_levels_need_one_fsq(tmp_path: Path) -> None:
    run = train(tiny_config({"type": "vq", "size": 16, "dim": 3}), tmp_path / "vq", console=QUIET)
    with pytest.raises(ValueError, match=r"one FSQ; .* has VQ"):
        recommended(Run.open(run, "cpu"), limit=20, console=QUIET)
    assert diagnose(Run.open(run, "cpu"), limit=20, console=QUIET)["parts"][0]["type"] == "VQ"


@pytest.mark.slow
def test_the_command_line(tokenizer: Path, monkeypatch, capsys) -> None:
    for words, expected in (
        (["diagnose", tokenizer, "--limit", 100, "--device", "cpu"], "quantizer"),
        (["levels", "--run", tokenizer, "embedded:digits"], "evidence: "),
    ):
        monkeypatch.setattr(sys, "argv", ["latticode", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 0
        assert expected in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["latticode", "levels", "embedded:digits"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "is for --run" in capsys.readouterr().err
