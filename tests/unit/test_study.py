"""The study: its plan, its jobs, its tables, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from itertools import count
from typing import Any, cast

import pytest
from rich.console import Console
from typer.testing import CliRunner

from helpers import QUIET, TINY, tokenizer_spec
from latticode import load
from latticode.cli import app
from latticode.core import registry
from latticode.core.progress import progress, tell_skipped
from latticode.engine import ConfigError, TrainingError, TrainingStoppedError
from latticode.metrics.classifier import Classifier
from latticode.quantizers.levels import recommend
from latticode.study import QUANTIZERS, Plan, parse_budget, parse_shard, parse_sizes, study
from latticode.study import plan as study_plan
from latticode.study import run as study_run
from latticode.study.page import charts
from latticode.study.plan import Cost, Job, between, check_same, choice, read_plan, steps_for, variant
from latticode.study.run import calibrated
from latticode.study.table import over_seeds, read_rows
from latticode.viz import figures

SMALL = (  # digits, and a tokenizer of a few parameters
    *(text for text in TINY if not text.startswith(("steps", "data.source"))),
    *(f"tokenizer.{part}={tokenizer_spec()[part]}".replace("'", "") for part in ("encoder", "decoder")),
)
PLAN = Plan("embedded:digits", (16, 64), ("fsq", "vq-ema"), 1, overrides=SMALL, steps=2)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished study of two quantizers, two sizes, one seed, two steps."""
    folder = tmp_path_factory.mktemp("study")
    study(PLAN, folder, console=QUIET)
    return folder


@pytest.fixture
def copied(done, tmp_path):
    return shutil.copytree(done, tmp_path / "study")


def lines(folder):
    return list(csv.DictReader((folder / "study.csv").read_text().splitlines()))


# --- the plan ---


def test_sizes() -> None:
    assert parse_sizes("2^4..2^8") == (16, 32, 64, 128, 256)
    assert parse_sizes("10..70") == (16, 32, 64)
    assert parse_sizes("256, 16,2^6,16") == (16, 64, 256)


@pytest.mark.parametrize("text", ["", "1", "2^4..", "16..x", "2^25", "3..3", "2^99999999", "16;64", "-16"])
def test_sizes_that_are_none(text) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_sizes(text)


def test_budgets_and_shards() -> None:
    assert [parse_budget(text) for text in ("90s", "30m", "2h", "1h30m")] == [90, 1800, 7200, 5400]
    assert parse_shard("2/3") == (2, 3)
    for text in ("", "30", "0m", "m", "1m1h"):
        with pytest.raises(ValueError, match="budget"):
            parse_budget(text)
    for text in ("0/3", "4/3", "1", "a/b"):
        with pytest.raises(ValueError, match="shard"):
            parse_shard(text)


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if not name.startswith("fsq-")])
@pytest.mark.parametrize("size", [4, 16, 1024])
def test_every_quantizer_has_the_size_and_a_weight_for_each_loss(name, size) -> None:
    config = Plan("embedded:digits", (size,), (name,), 1).tokenizer_config(Job(name, size, 3))
    quantizer = registry.build(config.spec["quantizer"])
    (codes,) = quantizer.vocab
    assert codes == (recommend(size=size).size if name == "fsq" else size)
    assert config.weights.keys() == {"mse", *choice(name, size).weights}
    assert (config.seed, config.data.source) == (3, "embedded:digits")


def test_even_levels_come_as_near_to_the_size_as_they_can() -> None:
    for name, size, levels in (
        ("fsq-2", 16, [2] * 4),
        ("fsq-3", 256, [3] * 5),
        ("fsq-4", 256, [4] * 4),
        ("fsq-8", 4, [8]),
        ("fsq-8", 4096, [8] * 4),
        ("fsq-clamp", 1024, [10] * 3),
    ):
        spec, weights, _ = variant(name, size)
        bound = {"fsq-2": "symmetric", "fsq-clamp": "clamp"}.get(name, "paper")
        assert (spec["levels"], spec["bound"], weights) == (levels, bound, {})


def test_a_variant_changes_the_quantizer_and_its_weights() -> None:
    name = "vq-ema+gradient=rotation+weights.commitment=0.5"
    assert variant(name, 64) == ({**variant("vq-ema", 64)[0], "gradient": "rotation"}, {"commitment": 0.5}, False)
    plan = replace(PLAN, quantizers=("fsq", "fsq+bound=equal-bins+slope=1.6", name))
    config = plan.tokenizer_config(Job("fsq+bound=equal-bins+slope=1.6", 16, 0))
    expected = {"type": "fsq", "levels": [5, 3], "bound": "equal-bins", "slope": 1.6}
    assert expected.items() <= config.spec["quantizer"].items()
    for wrong, message in (
        ("fsq+bound=round", "bound must be one of"),
        ("fsq+bounds=paper", "bounds"),
        ("fsq+paper", "key=value"),
        ("fsq+tokenizer.gain=2", "may change feedback=true|false, got fsq.tokenizer.gain=2"),
        ("fsq+tokenizer.feedback=1", "may change feedback=true|false"),
        ("fsp+bound=paper", "'fsp' to study; nearest: fsq"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(PLAN, quantizers=(wrong,))


def test_feedback_goes_to_the_quantizer_and_to_the_tokenizer() -> None:
    channels, positions = "fsq-clamp+feedback=true", "vq-ema+tokenizer.feedback=true"
    plan = replace(PLAN, quantizers=("fsq-feedback", channels, positions))
    found = []
    for name in ("fsq-feedback", channels, positions, "fsq-clamp"):
        spec = plan.tokenizer_config(Job(name, 64, 0)).spec
        found.append((spec["quantizer"].get("feedback", False), spec.get("feedback", False)))
    assert found == [(True, True), (True, False), (False, True), (False, False)]


def test_the_plan_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="'qv' to study; nearest: vq"):
        replace(PLAN, quantizers=("fsq", "qv"))
    for name in ("lfq", "bsq"):
        with pytest.raises(ValueError, match=f"{name} .* power of two, got 24"):
            replace(PLAN, quantizers=(name,), sizes=(16, 24))
    for text in ("steps=5", "seed=1", "data.source=x", "tokenizer.quantizer.levels=[8,8]", "prior.steps=5"):
        with pytest.raises(ValueError, match="the study itself sets"):
            replace(PLAN, overrides=(text,))
    with pytest.raises(ConfigError, match="trains no tokenizer"):
        replace(PLAN, recipe="maskgit", overrides=()).tokenizer_config(PLAN.jobs[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize=3", "unknown key 'batchsize'; nearest: batch_size"),
        ("tokenizer.encoder.widht=8", "unknown key 'widht' for type 'conv_encoder'; nearest: width"),
        ("prior.widht=8", "unknown key 'widht' for type 'maskgit'; nearest: width"),
        ("prior.heads=3", "heads 3"),
        ("prior.optimizer.rate=1", "unknown key 'optimizer.rate'"),
        ("prior.digits=[4,4]", r"digits must multiply .* got \[4, 4\] = 16 for \[15\]"),
    ],
)
def test_what_a_job_would_refuse_is_refused_before_anything_trains(tmp_path, text, message) -> None:
    plan = replace(PLAN, prior=True, overrides=(*SMALL, text))
    with pytest.raises(ValueError, match=message):
        study(plan, tmp_path, console=QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such path"),
        ([], "no images under"),
        (["a.png", "b.png"], "no image of .* can be read; the first, .*: empty"),
    ],
)
def test_a_source_without_images_is_refused_before_anything_trains(tmp_path, files, message) -> None:
    source = tmp_path / "photos"
    if files is not None:
        source.mkdir()
    for name in files or ():
        (source / name).touch()
    with pytest.raises(ValueError, match=message):
        study(replace(PLAN, source=str(source)), tmp_path / "study", console=QUIET)
    assert not (tmp_path / "study").exists()


def test_a_network_that_cannot_see_the_images_is_refused_before_anything_trains(tmp_path) -> None:
    network = str(Classifier(10, 3, 4).save_pretrained(tmp_path / "colour"))
    for features, message in ((network, r"colour cannot judge .* \(B, 3, H, W\)"), (str(tmp_path / "none"), "none")):
        with pytest.raises((ValueError, OSError), match=message):
            study(replace(PLAN, features=features), tmp_path / "study", console=QUIET)
    assert not (tmp_path / "study").exists()


def test_an_override_of_priors_is_of_their_run_or_of_the_prior(tmp_path) -> None:
    plan = replace(PLAN, overrides=("prior.width=16", "prior.heads=2", "prior.batch_size=7", "prior.optimizer.lr=1e-4"))
    config = plan.prior_config(plan.jobs[0], tmp_path)
    assert config.data == plan.tokenizer_config(plan.jobs[0]).data
    assert ((config.prior or {})["width"], config.batch_size, config.optimizer.lr) == (16, 7, 1e-4)
    assert plan.tokenizer_config(plan.jobs[0]).batch_size != 7


def test_an_override_reaches_the_jobs_that_it_concerns() -> None:
    plan = replace(PLAN, overrides=("weights.commitment=0.5", "weights.mse=2", "optimizer.warmup=40"), steps=100)
    fsq, vq = (plan.tokenizer_config(Job(name, 16, 0)) for name in PLAN.quantizers)
    assert fsq.weights == {"mse": 2.0}
    assert vq.weights == {"mse": 2.0, "commitment": 0.5}
    assert fsq.optimizer.warmup == 10  # a tenth of the steps


def test_steps_are_the_most_that_the_budget_pays_for() -> None:
    costs = [Cost(5, 0.1), Cost(10, 0.4)]
    steps = steps_for(100, costs)
    assert sum(c.fixed + steps * c.step for c in costs) <= 100 < sum(c.fixed + (steps + 1) * c.step for c in costs)
    with pytest.raises(ValueError, match="raise --budget"):
        steps_for(15.4, costs)


def test_costs_between_two_sizes_lie_on_a_line() -> None:
    measured = {"1024": (5.0, 0.5), "16": (3.0, 0.1)}
    assert between(measured, 16) == Cost(3, 0.1)
    assert between(measured, 1024) == Cost(5, 0.5)
    assert between(measured, 520).step == pytest.approx(0.3)
    assert between({"16": (3.0, 0.1)}, 16) == Cost(3, 0.1)


def test_calibration_counts_against_the_budget_and_the_prior_gets_its_share(tmp_path) -> None:
    clock = count(0, 40.0)  # seconds: the calibration takes 40

    def measured(plan, job, place):
        tokenizer = {"tokenizer": Cost(1.0, 0.01 * job.size)}
        return tokenizer | ({"prior": Cost(2.0, 0.1)} if plan.prior else {})

    plan = calibrated(
        replace(PLAN, steps=0, budget=240.0, prior=True), tmp_path, measured, QUIET, clock=lambda: next(clock)
    )
    assert plan.steps == (100 - 4) / (2 * 0.16 + 2 * 0.64)  # half of the 200 seconds that are left
    assert plan.prior_steps == round((100 - 8) / 0.4)
    assert plan.estimate(plan.jobs[0]) == pytest.approx(1 + 0.16 * plan.steps + 2 + 0.1 * plan.prior_steps)
    plan.write(tmp_path)
    again = read_plan(tmp_path)
    assert again is not None
    assert (again.steps, again.prior_steps) == (plan.steps, plan.prior_steps)
    assert [again.estimate(job) for job in again.jobs] == [plan.estimate(job) for job in plan.jobs]


def test_a_plan_is_read_and_not_measured_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(study_run, "measure", lambda *_: pytest.fail("measured again"))
    PLAN.write(tmp_path)
    assert study(replace(PLAN, steps=0, budget=60.0), tmp_path, plan_only=True, console=QUIET).is_file()
    with pytest.raises(ValueError, match="seeds: 1 there, 2 now"):
        study(replace(PLAN, seeds=2), tmp_path, plan_only=True, console=QUIET)
    with pytest.raises(ValueError, match="steps: 2 there, 3 now"):
        check_same(PLAN, replace(PLAN, steps=3))
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(ValueError, match="not the plan of a study"):
        read_plan(tmp_path)


def test_a_shard_without_a_plan_does_not_measure(tmp_path) -> None:
    with pytest.raises(ValueError, match="--plan-only"):
        study(replace(PLAN, steps=0, budget=60.0), tmp_path, shard=(1, 2), console=QUIET)


def test_the_command_line_writes_the_plan(tmp_path) -> None:
    words = f"study embedded:digits data.size=8 --steps 5 --sizes 16..64 --quantizers fsq,lfq --out {tmp_path}"
    result = CliRunner().invoke(app, [*words.split(), "--plan-only"])
    assert result.exit_code == 0
    assert result.stdout.replace("\n", "").endswith("study.json")
    plan = read_plan(tmp_path)
    assert plan == Plan("embedded:digits", (16, 32, 64), ("fsq", "lfq"), 1, overrides=("data.size=8",), steps=5)


# --- the jobs ---


@pytest.mark.slow
def test_the_table_repeats_the_evaluations(done) -> None:
    rows = lines(done)
    assert [(row["quantizer"], row["size"], row["seed"]) for row in rows] == [tuple(map(str, job)) for job in PLAN.jobs]
    for row, job in zip(rows, PLAN.jobs, strict=True):
        evaluation = json.loads((done / "jobs" / job.name / "evaluation.json").read_text())
        about = json.loads((done / "jobs" / job.name / "run.json").read_text())
        for key in ("psnr", "usage", "perplexity", "entropy_bits"):
            assert float(row[key]) == evaluation[key]
        assert float(row["bits"]) == evaluation["bits_per_token"]
        assert int(row["parameters"]) == about["parameters"]
        assert row["steps"] == "2"


@pytest.mark.slow
def test_the_page_shows_it(done) -> None:
    page = (done / "study.html").read_text()
    for title in ("Against the size of the codebook", "Numbers", "Reconstructions", "Levels", "Protocol"):
        assert f"<h2>{title}</h2>" in page
    assert "Failed jobs" not in page
    for text in ("embedded:digits", "4 of 4", "vq-ema"):
        assert text in page


@pytest.mark.slow
def test_finished_jobs_are_skipped(copied, monkeypatch) -> None:
    monkeypatch.setattr(study_run, "train", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(study_plan, "open_loader", lambda *_, **__: pytest.fail("looked at the data"))
    before = lines(copied)
    study(PLAN, copied, console=QUIET)
    assert lines(copied) == before


@pytest.mark.slow
def test_shards_part_the_jobs_and_merge(done, tmp_path, monkeypatch) -> None:
    ran = []

    def run(plan, job, folder, references, console):
        ran.append(job)
        shutil.copytree(done / "jobs" / job.name, folder / "jobs" / job.name)
        return "copied"

    monkeypatch.setattr(study_run, "run_job", run)
    for index in (1, 2, 3):
        study(PLAN, tmp_path, shard=(index, 3), console=QUIET)
        assert len(lines(tmp_path)) == len(ran)
    assert sorted(ran) == sorted(PLAN.jobs)
    assert lines(tmp_path) == lines(done)


@pytest.mark.slow
def test_a_failing_job_is_recorded_and_the_others_go_on(copied, monkeypatch) -> None:
    broken, other = PLAN.jobs[1], PLAN.jobs[2]
    whole = lines(copied)
    for job in (broken, other):
        (copied / "jobs" / job.name / "job.json").unlink()

    def train(config, folder, **_):
        if folder.name == broken.name:
            raise TrainingError("loss mse is not finite <b>")

    with monkeypatch.context() as patch:
        patch.setattr(study_run, "train", train)
        with pytest.raises(TrainingError, match=f"1 of 4 jobs failed: {broken.name}; .*study.html"):
            study(PLAN, copied, console=QUIET)
    rows = lines(copied)
    assert [row["error"] for row in rows] == ["", "loss mse is not finite <b>", "", ""]
    assert (rows[1]["psnr"], rows[2]["psnr"]) == ("", whole[2]["psnr"])
    page = (copied / "study.html").read_text()
    assert "Failed jobs" in page
    assert "not finite &lt;b&gt;" in page
    study(PLAN, copied, console=QUIET)  # which tries it again
    assert [row["psnr"] for row in lines(copied)] == [row["psnr"] for row in whole]


@pytest.mark.slow
def test_an_interruption_ends_the_study(copied, monkeypatch) -> None:
    job = PLAN.jobs[0]
    (copied / "jobs" / job.name / "job.json").unlink()

    def train(*_, **__):
        raise TrainingStoppedError("at step 1 of 2")

    monkeypatch.setattr(study_run, "train", train)
    (copied / "study.html").unlink()
    with pytest.raises(TrainingStoppedError, match="shows what is done, and the same command"):
        study(PLAN, copied, console=QUIET)
    assert not (copied / "jobs" / job.name / "job.json").exists()
    assert len(lines(copied)) == 3
    assert "3 of 4" in (copied / "study.html").read_text()


@pytest.mark.slow
def test_a_long_study_shows_what_there_is_and_what_it_does(done, tmp_path, monkeypatch) -> None:
    shown, out = [], io.StringIO()

    def run(plan, job, folder, references, console):
        shown.append(len(lines(folder)) if (folder / "study.html").exists() else None)
        shutil.copytree(done / "jobs" / job.name, folder / "jobs" / job.name)
        with progress(console, "train tokenizer", 2) as advance:
            advance(2)
        tell_skipped(console, {"cut.png": "image file is truncated"})
        return "copied"

    monkeypatch.setattr(study_run, "run_job", run)
    monkeypatch.setattr(study_run, "EARLY", 0.0)
    study(PLAN, tmp_path, console=Console(file=out, force_terminal=True, highlight=False, width=200))
    assert shown == [None, 1, 2, 3]
    assert "1/4 fsq-16-0: train tokenizer" in out.getvalue()
    assert "4/4 vq-ema-64-0: copied" in out.getvalue()
    assert out.getvalue().count("skipped cut.png") == 1


@pytest.mark.slow
@pytest.mark.parametrize("file", ["evaluation.json", "config.yaml"])
def test_jobs_of_different_protocols_do_not_mix(copied, file) -> None:
    path = copied / "jobs" / PLAN.jobs[2].name / file
    old, new = ('"split": "test"', '"split": "train"') if file == "evaluation.json" else ("steps: 2", "steps: 3")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=r"fsq-16-0 and fsq-64-0 were made under different protocols.*(split|steps)"):
        read_rows(copied, PLAN)


def test_no_two_lines_of_a_chart_look_alike() -> None:
    series = {f"quantizer {i}": [(4.0, 20.0 + i, 0.1), (6.0, 22.0 + i, 0.1)] for i in range(20)}
    (axes,) = figures.trade_off("psnr", "bits", series).axes
    lines = [container.lines[0] for container in cast(Any, axes.containers)]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 20


def test_the_chart_shows_means_spreads_and_the_diagonal() -> None:
    series = {"fsq": [(4.0, 3.0, 0.5), (8.0, 7.0, 0.25)], "vq": [(4.0, 2.0, 0.0)]}
    figure = figures.trade_off("entropy", "bits", series, diagonal=True)
    axes: Any
    (axes,) = figure.axes
    first, second = axes.containers
    assert first.lines[0].get_xydata().tolist() == [[4, 3], [8, 7]]
    assert [bar.tolist() for bar in first.lines[2][0].get_segments()] == [[[4, 2.5], [4, 3.5]], [[8, 6.75], [8, 7.25]]]
    assert not second.has_yerr
    assert axes.lines[-1].get_xydata().tolist() == [[4, 4], [8, 8]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["fsq", "vq"]
    (axes,) = figures.trade_off("usage", "bits", {"fsq": [(4.0, 98.0, 5.0)]}, most=100.0).axes
    assert axes.containers[0].lines[2][0].get_segments()[0].tolist() == [[4, 93], [4, 100]]


def test_distances_of_real_images_have_no_chart() -> None:
    row = {"quantizer": "fsq", "size": 16, "bits": 4.0, "psnr": 20.0, "fid_judge": 3.0, "fid_judge_real": 0.2}
    by_size, by_cost = charts([row])
    figures: list[Any] = [picture.image for picture in by_size]
    assert [figure.axes[0].get_title(loc="left") for figure in figures] == ["PSNR, dB", "FID of samples"]
    assert by_cost == []


def test_spread_over_seeds() -> None:
    rows = [{"quantizer": "fsq", "size": 16, "psnr": value} for value in (20.0, 22.0, None)]
    rows.append({"quantizer": "fsq", "size": 64, "psnr": 23.0})
    found = over_seeds(rows, "psnr")["fsq"]
    assert found[16] == (21.0, pytest.approx(2**0.5))
    assert found[64] == (23.0, None)


@pytest.mark.slow
def test_a_study_with_priors_that_measures_its_steps(tmp_path) -> None:
    network = str(Classifier(10, 1, 4).save_pretrained(tmp_path / "classifier"))
    small = (*SMALL, "prior.width=16", "prior.depth=1", "prior.heads=2", "prior.digits=own", "prior.inner_depth=1")
    both = ("fsq", "vq-ema")  # codes of VQ have no digits, and yet these are priors of one protocol
    plan = Plan(PLAN.source, (16,), both, 1, True, network, samples=4, limit=8, overrides=small, steps=2)
    with pytest.raises(ValueError, match="raise --budget"):
        study(replace(plan, steps=0, budget=1e-3), tmp_path, console=QUIET)
    assert not (tmp_path / "study.json").exists()
    assert not (tmp_path / "calibration").exists()
    study(plan, tmp_path, console=QUIET)
    row, other = lines(tmp_path)
    assert other["compression_cost"]
    priors = [load(tmp_path / "jobs" / f"{name}-16-0" / "prior") for name in both]
    assert [prior.digits for prior in priors] == [[5, 3], None]
    evaluation = json.loads((tmp_path / "jobs" / "fsq-16-0" / "prior" / "evaluation.json").read_text())
    for key in ("compression_cost", "fid_classifier", "recall_classifier"):
        assert float(row[key]) == evaluation[key]
    assert float(row["rfid_classifier"]) > 0
    assert row["prior_steps"] == "2"
    assert evaluation["count"] == 8
    assert float(row["peak_memory_mb"]) > 50
    page = (tmp_path / "study.html").read_text()
    assert "Compression cost" in page
    assert "FID of samples" in page
