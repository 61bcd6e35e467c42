"""The loop: resumed = uninterrupted, two ranks = one, and what goes wrong is said."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from helpers import FSQ_SPEC, QUIET, TINY, VQ_SPEC, tiny_config, tiny_tokenizer, tokenizer_spec
from latticode import load
from latticode.core.types import Batch
from latticode.engine import ConfigError, TrainingError, load_config, loop, train
from latticode.engine.checkpoint import STATE
from latticode.engine.config import OptimizerConfig, complete, read_run, with_digits
from latticode.engine.given import GivenLoader
from latticode.engine.loop import learning_rate
from latticode.engine.objectives import TERMS


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    one, two = weights(a), weights(b)
    states = load_file(a / STATE), load_file(b / STATE)
    return (
        one.keys() == two.keys()
        and all(torch.equal(one[k], two[k]) for k in one)
        and states[0].keys() == states[1].keys()
        and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    )


def command(folder: Path, *more: str) -> list[str]:
    overrides = [*TINY, f"tokenizer={json.dumps(tokenizer_spec(FSQ_SPEC))}"]
    return ["-m", "latticode.cli", "train", "fsq-tokenizer", *overrides, *more, "--out", str(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", [FSQ_SPEC, VQ_SPEC], ids=["fsq", "vq"])
@pytest.mark.parametrize("stop", [2, 3])
def test_interrupted_and_resumed_ends_with_the_same_weights(tmp_path, monkeypatch, quantizer, stop) -> None:
    config = tiny_config(quantizer)
    whole = train(config, tmp_path / "whole", console=QUIET)
    calls = 0
    mse = TERMS["mse"]

    def signalled(output, target):
        nonlocal calls
        calls += 1
        if calls == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return mse(output, target)

    monkeypatch.setitem(TERMS, "mse", signalled)
    with pytest.raises(TrainingError, match=f"interrupted at step {stop} of 4, saved"):
        train(config, tmp_path / "cut", console=QUIET)
    monkeypatch.setitem(TERMS, "mse", mse)
    torch.manual_seed(99)  # the state of the process must not matter
    assert same(train(config, tmp_path / "cut", resume=True, console=QUIET), whole)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [2, 4]


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed(tmp_path) -> None:
    more = ("steps=30", "save_every=3", "picture_every=30", "log_every=10")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *command(tmp_path / "whole", *more)], check=True, capture_output=True, env=environment
    )
    process = subprocess.Popen(
        [sys.executable, *command(tmp_path / "cut", *more)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    state = tmp_path / "cut" / STATE
    first = None
    while time.monotonic() < deadline and process.poll() is None:  # killed as soon as a second state is being written
        stamp = state.stat().st_mtime_ns if state.exists() else None
        first = first or stamp
        if stamp != first:
            process.kill()
            break
        time.sleep(0.001)
    assert process.wait() == -signal.SIGKILL
    load(tmp_path / "cut")
    subprocess.run(
        [sys.executable, *command(tmp_path / "cut", *more), "--resume"],
        check=True,
        capture_output=True,
        env=environment,
    )
    assert same(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("quantizer", [FSQ_SPEC, VQ_SPEC], ids=["fsq", "vq"])
@pytest.mark.slow
def test_two_ranks_equal_one_process_with_the_double_batch(tmp_path, quantizer) -> None:
    spec = f"tokenizer={json.dumps(tokenizer_spec(quantizer))}"
    more = ["weights={mse: 1, l1: 0.2, commitment: 0.25}"] if quantizer["type"] == "vq" else []
    base = ["train", "fsq-tokenizer", *TINY, spec, *more]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, "-m", "latticode.cli", *base, "--out", str(tmp_path / "two")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    one = train(tiny_config(quantizer, "batch_size=8"), tmp_path / "one", console=QUIET)
    ours, theirs = weights(one), weights(tmp_path / "two")
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_one_interrupted_rank_stops_all(tmp_path) -> None:
    spec = f"tokenizer={json.dumps(tokenizer_spec(FSQ_SPEC))}"
    script = tmp_path / "rank.py"  # rank 1 alone gets the signal, once both have taken their first steps
    script.write_text(
        "import os, pathlib, signal, threading, time\n"
        "from latticode import cli\n"
        "def interrupt():\n"
        f"    while not pathlib.Path({str(tmp_path / 'run' / 'metrics.jsonl')!r}).exists():\n"
        "        time.sleep(0.05)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "if os.environ['RANK'] == '1':\n"
        "    threading.Thread(target=interrupt, daemon=True).start()\n"
        "cli.main()\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    result = subprocess.run(
        [*launcher, "train", "fsq-tokenizer", *TINY, spec, "steps=1000000", "--out", str(tmp_path / "run")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "saved; go on with --resume" in result.stderr
    load(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", [FSQ_SPEC, VQ_SPEC | {"kmeans": False, "restart": 0.0}], ids=["fsq", "vq"])
def test_accumulation_equals_the_big_batch(tmp_path, quantizer) -> None:
    big = train(tiny_config(quantizer, "batch_size=8"), tmp_path / "big", console=QUIET)
    small = train(tiny_config(quantizer, "batch_size=4", "accumulate=2"), tmp_path / "small", console=QUIET)
    ours, theirs = weights(small), weights(big)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("quantizer", [FSQ_SPEC, VQ_SPEC], ids=["fsq", "vq"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_its_weights_stay_float32(tmp_path, quantizer, precision) -> None:
    run = train(tiny_config(quantizer, f"precision={precision}", "steps=2"), tmp_path, console=QUIET)
    assert {v.dtype for v in weights(run).values() if v.is_floating_point()} == {torch.float32}


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch) -> None:
    calls = 0
    mse = TERMS["mse"]

    def failing(output, target):
        nonlocal calls
        calls += 1
        return mse(output, target) * (float("nan") if calls > 2 else 1)

    monkeypatch.setitem(TERMS, "mse", failing)
    with pytest.raises(TrainingError, match="loss term mse was not finite at step 3;"):
        train(tiny_config(), tmp_path, console=QUIET)
    assert all(v.isfinite().all() for v in weights(tmp_path).values() if v.is_floating_point())


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch) -> None:
    import safetensors.torch

    folder = tmp_path / "run"
    save, calls = safetensors.torch.save_file, 0

    def full(tensors, path, metadata):
        nonlocal calls
        calls += 1
        if calls > 2:  # the checkpoint of step 0 fits
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(tiny_config(), folder, console=QUIET)
    load(folder)
    monkeypatch.setattr(safetensors.torch, "save_file", save)
    assert not list(folder.rglob("*.tmp"))
    assert same(train(tiny_config(), folder, resume=True, console=QUIET), tiny_tokenizer(tmp_path / "whole"))


def test_weights_and_terms_must_name_the_same_keys(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no weight for the loss terms l1"):
        train(tiny_config(FSQ_SPEC, "weights={mse: 1}"), tmp_path / "a", console=QUIET)
    with pytest.raises(ConfigError, match="weights ssim name no loss term"):
        train(tiny_config(FSQ_SPEC, "weights={mse: 1, l1: 1, ssim: 1}"), tmp_path / "b", console=QUIET)
    tiny_tokenizer(tmp_path / "b")  # what failed in its first step does not stand in the way of another try


def test_a_run_is_not_overwritten(tmp_path) -> None:
    tiny_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="already holds a run; resume it with --resume"):
        tiny_tokenizer(tmp_path)


def test_a_resumed_run_keeps_its_configuration(tmp_path) -> None:
    tiny_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.002 there, 0\.5 now"):
        train(tiny_config(FSQ_SPEC, "optimizer.lr=0.5"), tmp_path, resume=True, console=QUIET)
    longer = train(tiny_config(FSQ_SPEC, "steps=6"), tmp_path, resume=True, console=QUIET)
    assert json.loads((longer / "run.json").read_text())["steps"] == 6


def test_schedule() -> None:
    config = OptimizerConfig(lr=1.0, warmup=10, final=0.1)
    rates = [learning_rate(config, step, 110) for step in range(110)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[60] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stesp=3"], "unknown key 'stesp'; nearest: steps"),
        (["data.sorce=x"], "unknown key 'data.sorce'; nearest: source"),
        (["steps=0"], "steps: .*greater than 0, got 0"),
        (["steps"], "an override is key=value, got 'steps'"),
        (["steps.a=1"], "steps is 4000, which has no keys"),
        (["data.channels=2"], "data.channels: "),
        (["data.crop=middle"], "data: .*middle"),
        (["tokenizer.quantizer.level=[8]"], "unknown key 'level' for type 'fsq'; nearest: levels"),
        (["tokenizer.quantizer.type=fsqq"], "unknown type 'fsqq'; nearest: fsq"),
        (["tokenizer.quantizer={type: vq, size: 8}"], "type 'vq' lacks dim"),
    ],
)
def test_what_cannot_be_run_is_refused_with_what_could(tmp_path, overrides, message) -> None:
    with pytest.raises(ConfigError, match=message):
        train(load_config("fsq-tokenizer", overrides), tmp_path, console=QUIET)


def test_recipes_by_name_and_path(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'fsq-tokeniser'; nearest: fsq-tokenizer"):
        load_config("fsq-tokeniser")
    with pytest.raises(ConfigError, match=r"no recipe file .*nowhere\.yaml"):
        load_config(str(tmp_path / "nowhere.yaml"))
    (tmp_path / "mine.yaml").write_text("steps: [")
    with pytest.raises(ConfigError, match=r"mine\.yaml is not valid YAML"):
        load_config(str(tmp_path / "mine.yaml"))
    with pytest.raises(ConfigError, match="a prior needs a trained tokenizer"):
        load_config("maskgit")
    assert load_config("fsq-tokenizer", ["optimizer.lr=1e-4"]).optimizer.lr == 1e-4


@pytest.mark.slow
def test_what_a_prior_may_stand_on(tmp_path) -> None:
    small = ["steps=1", "batch_size=2", "prior.width=8", "prior.depth=1", "prior.heads=1"]
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    prior = train(load_config("maskgit", [f"tokenizer={tokenizer}", *small]), tmp_path / "prior", console=QUIET)
    with pytest.raises(ConfigError, match="is the run of a prior; a tokenizer's is needed"):
        load_config("maskgit", [f"tokenizer={prior}"])
    with pytest.raises(ConfigError, match="nowhere is not the folder of a run"):
        load_config("maskgit", [f"tokenizer={tmp_path / 'nowhere'}"])
    saved = load(tokenizer).save_pretrained(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"missing key 'data\.source'"):
        load_config("maskgit", [f"tokenizer={saved}"])
    data = "data={source: 'embedded:digits', size: 8, channels: 1}"
    again = train(load_config("maskgit", [f"tokenizer={saved}", data, *small]), tmp_path / "again", console=QUIET)
    assert load(again).vocab == load(prior).vocab == [12]
    load(prior).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="holds a MaskGIT, not a Tokenizer"):
        train(load_config("maskgit", [f"tokenizer={tmp_path / 'model'}", data]), tmp_path / "no", console=QUIET)


def test_what_data_determine_reaches_the_parts_of_a_list() -> None:
    two = "[{type: period_discriminator}, {type: stft_discriminator, channels: 1}]"
    discriminators = f"{{type: multi_discriminator, discriminators: {two}}}"
    config = load_config(
        "fsq-fsdd",
        ["data.channels=2", f"objective.adversarial={{type: adversarial, discriminator: {discriminators}}}"],
    )
    filled = complete(config, classes=0).objective["adversarial"]["discriminator"]["discriminators"]
    assert [discriminator["channels"] for discriminator in filled] == [2, 1]  # what a recipe says, stands


def test_digits_of_a_prior_are_those_of_its_tokenizer_where_it_says_own(tmp_path) -> None:
    tokenizer = train(tiny_config({"type": "fsq", "levels": [5, 3]}), tmp_path / "tokenizer", console=QUIET)
    for digits, expected in (("own", [5, 3]), ("[3,5]", [3, 5]), ("null", None)):
        spec = f"prior={{type: maskgit, width: 16, depth: 1, heads: 2, digits: {digits}}}"
        config = load_config("maskgit", [f"tokenizer={tokenizer}", spec, "steps=1", "batch_size=4"])
        run = train(config, tmp_path / digits, console=QUIET)
        prior = load(run)
        assert (prior.digits, prior.vocab) == (expected, [15])
        assert (read_run(run).prior or {})["digits"] == yaml.safe_load(digits), "what was asked for"
    assert with_digits({"type": "gpt", "digits": "own"}, None) == {"type": "gpt", "digits": None}


def test_a_signal_in_the_middle_of_an_agreement_is_not_lost(monkeypatch) -> None:
    def agree(tensors):  # the signal comes when the others have been told already that there is none
        os.kill(os.getpid(), signal.SIGTERM)
        return tensors

    monkeypatch.setattr(loop.distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(loop.distributed, "all_sum", agree)
    with loop.Interrupt(torch.device("cpu")) as interrupt:
        assert not interrupt.on_any_rank()
        assert not interrupt.raised
        assert interrupt.on_any_rank()
        assert interrupt.raised


# Data that a program gives


class Noisy(Dataset[tuple[Tensor, int]]):
    """Eleven pictures, each drawn anew by all three usual generators; `stop` ends the run at the n-th look."""

    classes = ("even", "odd")

    def __init__(self, stop: int = 0):
        self.stop, self.looks = stop, 0

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.looks += 1
        if self.looks == self.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        noise = torch.rand(1, 8, 8) / 8 + random.random() / 8 + float(np.random.rand()) / 8
        return noise + index / 22, index % 2


def given_config(*more: str):
    return tiny_config(FSQ_SPEC, "data={source: given:noise, size: 8, channels: 1, workers: 0}", *more)


def as_loader(data: Noisy, **options) -> DataLoader:
    return DataLoader(data, batch_size=4, shuffle=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda data: data, as_loader, lambda d: as_loader(d, generator=torch.Generator())])
def test_given_data_interrupted_and_resumed(tmp_path, wrap) -> None:
    whole = train(given_config(), tmp_path / "whole", data=wrap(Noisy()), console=QUIET)
    with pytest.raises(TrainingError, match=r"interrupted at step \d of 4, saved"):
        train(given_config(), tmp_path / "cut", data=wrap(Noisy(stop=8)), console=QUIET)
    torch.manual_seed(99)
    random.seed(99)
    again = train(given_config(), tmp_path / "cut", data=wrap(Noisy()), held_out=Noisy(), resume=True, console=QUIET)
    assert same(again, whole)
    assert not (whole / "images").exists()
    assert (again / "images" / "reconstructions-000004.png").is_file()


def test_given_data_are_a_function_of_seed_and_position() -> None:
    config = given_config()
    for wrap in (lambda data: data, as_loader, lambda data: as_loader(data, drop_last=True)):
        loader = GivenLoader(wrap(Noisy()), config)
        first = [batch.inputs for batch, _ in zip(loader.batches(), range(9))]
        for start in (1, 5, 8):
            assert torch.equal(next(loader.batches(start)).inputs, first[start])
        assert not torch.equal(next(GivenLoader(wrap(Noisy()), given_config("seed=1")).batches()).inputs, first[0])
        state = torch.get_rng_state(), random.getstate()
        next(loader.batches())
        assert torch.equal(torch.get_rng_state(), state[0])
        assert random.getstate() == state[1]
    with_workers = GivenLoader(Noisy(), given_config("data.workers=1")).batches(1)
    assert torch.equal(next(with_workers).inputs, next(GivenLoader(Noisy(), config).batches(1)).inputs)
    labels = torch.cat([batch.labels for batch in GivenLoader(Noisy(), config).epoch()])
    assert labels.tolist() == [i % 2 for i in range(11)]


def test_ranks_share_a_given_dataset(monkeypatch) -> None:
    whole = next(GivenLoader(Noisy(), given_config("batch_size=8")).batches(1))
    monkeypatch.setattr("latticode.engine.given.distributed.world_size", lambda: 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("latticode.engine.given.distributed.rank", lambda rank=rank: rank)
        parts.append(next(GivenLoader(Noisy(), given_config(), shard=True).batches(1)).inputs)
    assert torch.equal(torch.cat(parts), whole.inputs)
    with pytest.raises(ConfigError, match="each of 2 processes would see the same examples"):
        GivenLoader(as_loader(Noisy()), given_config(), shard=True)


@pytest.mark.slow
def test_a_classifier_and_a_prior_on_given_data(tmp_path) -> None:
    data = "data={source: given:noise, size: 8, channels: 1, workers: 0}"
    small = ["steps=2", "batch_size=4", "picture_every=2", data]
    classifier = load_config("classifier", [*small, "classifier.width=8"])
    run = train(classifier, tmp_path / "classifier", data=Noisy(), held_out=Noisy(), console=QUIET)
    assert load(run).classes == 2
    tokenizer = train(given_config(), tmp_path / "tokenizer", data=Noisy(), console=QUIET)
    config = load_config(
        "maskgit", [f"tokenizer={tokenizer}", *small, "prior.width=8", "prior.depth=1", "prior.heads=1"]
    )
    run = train(config, tmp_path / "prior", data=as_loader(Noisy()), held_out=Noisy(), console=QUIET)
    assert load(run).sample(2).shape == (2, 2, 2, 1)


class Listed(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int):
        return self.items[index]


class Endless(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(99, 1, 8, 8))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Listed(), "the Dataset has no example"),
        (Endless(), "a Dataset with a length or a DataLoader, got Endless"),
        (DataLoader(Noisy(), batch_size=2), "the DataLoader's batch_size is 2, the run's 4"),
        (Listed(torch.zeros(3, 8, 8)), r"say \(B, 1, 8, 8\), and the data are \(4, 3, 8, 8\) float32"),
        (Listed(torch.zeros(1, 9, 9)), r"say \(B, 1, 8, 8\), and the data are \(4, 1, 9, 9\) float32"),
        (Listed(torch.full((1, 8, 8), 255.0)), "floats in .* from 255 to 255"),
        (Listed((torch.zeros(1, 8, 8), 0.5)), "as many integers as labels, got"),
        (Listed({"image": torch.zeros(1, 8, 8)}), "an example is a tensor, a pair .* got dict"),
    ],
)
def test_given_data_that_do_not_fit_are_refused(tmp_path, data, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(given_config(), tmp_path, data=data, console=QUIET)


@pytest.mark.slow
def test_given_data_and_their_source_go_together(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"given:NAME goes with train\(data=...\), got 'embedded:digits' and Noisy"):
        train(tiny_config(), tmp_path, data=Noisy(), console=QUIET)
    with pytest.raises(ConfigError, match="got 'given:noise' and none"):
        train(given_config(), tmp_path, console=QUIET)
    batches = [Batch(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64), torch.arange(4))] * 5
    loader = DataLoader(Listed(*batches), batch_size=None)
    run = train(given_config("steps=2"), tmp_path, data=loader, console=QUIET)
    evaluated = [sys.executable, "-m", "latticode", "evaluate", str(run)]
    refused = subprocess.run(evaluated, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "'given:noise' is data that a program gave" in refused.stderr
