"""Samples and edits as files: one depends on seed and number alone, says how it was made, and is not drawn twice."""

from __future__ import annotations

import io
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from helpers import QUIET, TINY, tiny_tokenizer
from latticode import load
from latticode.cli import options
from latticode.core.types import Conditioning, Sampling
from latticode.data import Preprocess
from latticode.engine import load_config, train
from latticode.runs import sample as draws
from latticode.sampling import sampler
from latticode.sampling.request import Request
from latticode.sampling.scores import LabelScore
from latticode.tokenizers.tokenizer import Tokenizer

PRIOR = ["steps=2", "log_every=1", "batch_size=8", "prior.width=16", "prior.depth=1", "prior.heads=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sampling")


@pytest.fixture(scope="module")
def tokenizer(folder) -> Path:
    return tiny_tokenizer(folder / "tokenizer")


def prior_of(tokenizer: Path, name: str) -> Path:
    """A prior with weights far from their initial values: at those, samples hardly depend on anything."""
    run = train(load_config(name, [f"tokenizer={tokenizer}", *PRIOR]), tokenizer.parent / name, console=QUIET)
    prior = load(run)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
    prior.save_pretrained(run)
    return run


@pytest.fixture(scope="module")
def maskgit(tokenizer) -> Path:
    return prior_of(tokenizer, "maskgit")


@pytest.fixture(scope="module")
def gpt(tokenizer) -> Path:
    return prior_of(tokenizer, "gpt")


@pytest.fixture(scope="module")
def classifier(folder) -> Path:
    config = load_config("classifier", [*TINY[:5], "steps=2", "classifier.width=4"])
    return train(config, folder / "classifier", console=QUIET)


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8), np.uint8)).save(path)
    return path


def draw(run: Path, target: Path, count: int, **options: Any) -> list[bytes]:
    """The sample files, as bytes."""
    own = {name: options.pop(name) for name in ("image", "keep", "overwrite") if name in options}
    if classifier := options.pop("classifier", None):
        options["score"] = LabelScore(load(classifier))
    draws.sample(run, target, Request(count=count, **options), **own, console=QUIET)
    return contents(target)


def contents(target: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(target.glob("sample-*"))]


def pixels(target: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(target.glob("sample-*"))]


def about(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        return json.loads(image.info["latticode"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["maskgit", "gpt"])
@pytest.mark.parametrize("more", [{}, {"keep_best": 0.34}], ids=["plain", "rejection"])
def test_files_are_the_same_whatever_the_batch_size(request, tmp_path, classifier, name, more) -> None:
    run = request.getfixturevalue(name)
    more = more | ({"classifier": classifier} if more else {}) | {"sampling": Sampling(steps=3, guidance=1.0)}
    whole = draw(run, tmp_path / "a", 9, batch_size=64, **more)
    assert whole == draw(run, tmp_path / "b", 9, batch_size=2, **more)
    assert len(set(whole)) == 9
    draw(run, tmp_path / "c", 1, seed=1, **more)
    assert (pixels(tmp_path / "c")[0] != pixels(tmp_path / "a")[0]).any()


def test_decoding_several_at_once_gives_each_its_own_place(maskgit, tmp_path, monkeypatch) -> None:
    """Rounding that depends on the size of a batch and the place in it, made large, shows in no file."""
    sizes, real = set(), Tokenizer.decode

    def rounding(self: Tokenizer, codes: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        sizes.add(len(codes))
        return real(self, codes, size) + 0.1 * torch.arange(len(codes)).view(-1, 1, 1, 1)

    monkeypatch.setattr(sampler, "TOGETHER", {"cpu": 4})
    monkeypatch.setattr(Tokenizer, "decode", rounding)
    assert draw(maskgit, tmp_path / "a", 9) == draw(maskgit, tmp_path / "b", 9, batch_size=3)
    assert sizes == {4}


def test_what_was_cut_off_goes_on(maskgit, tmp_path, monkeypatch) -> None:
    whole = draw(maskgit, tmp_path / "whole", 10)
    target, drawn, real = tmp_path / "parts", [], Preprocess.save

    def failing(self: Preprocess, path: Path, *given: Any) -> Path:
        if len(drawn) == 6:
            raise KeyboardInterrupt
        drawn.append(path.stem)
        return real(self, path, *given)

    monkeypatch.setattr(Preprocess, "save", failing)
    with pytest.raises(KeyboardInterrupt):
        draw(maskgit, target, 10, batch_size=4)
    assert len(json.loads((target / "samples.json").read_text())["files"]) == 6
    (target / "sample-00002.png").unlink()
    monkeypatch.setattr(Preprocess, "save", lambda *given: (drawn.append(given[1].stem), real(*given))[1])
    assert draw(maskgit, target, 10, batch_size=4) == whole
    assert drawn[6:] == [f"sample-{i:05d}" for i in (2, 6, 7, 8, 9)]
    assert (target / "grid.png").read_bytes() == (tmp_path / "whole" / "grid.png").read_bytes()
    assert (target / "samples.json").read_text() == (tmp_path / "whole" / "samples.json").read_text()


def test_a_folder_of_other_settings_is_refused_or_overwritten(maskgit, tmp_path) -> None:
    target = tmp_path / "samples"
    first = draw(maskgit, target, 3)
    with pytest.raises(ValueError, match=r"other settings: .*seed: 0 there, 1 now"):
        draw(maskgit, target, 3, seed=1)
    with pytest.raises(ValueError, match="labels"):
        draw(maskgit, target, 3, labels=["3"])
    assert contents(target) == first
    assert len(draw(maskgit, target, 2, seed=1, overwrite=True)) == 2
    (target / "samples.json").unlink()
    with pytest.raises(ValueError, match=r"holds samples but no samples\.json"):
        draw(maskgit, target, 3)
    for path in target.glob("sample-*"):
        path.unlink()
    assert draw(maskgit, target, 3) == first, "an empty folder may be used"


def test_every_file_says_how_it_was_made(maskgit, tokenizer, tmp_path) -> None:
    target = tmp_path / "samples"
    asked = Sampling(steps=3, top_k=5, top_p=0.9, temperature=0.8)
    draw(maskgit, target, 5, labels=["3", "-1"], sampling=asked, seed=7)
    listed = json.loads((target / "samples.json").read_text())
    common = {"run": "maskgit", "seed": 7, **vars(asked)}
    common |= {"prior": load(maskgit).fingerprint(), "tokenizer": load(tokenizer).fingerprint()}
    assert listed["settings"] == common | {"labels": [3, -1], "texts": []}
    assert about(target / "grid.png") == listed["settings"] | {"count": 5}
    for index, entry in enumerate(listed["files"]):
        assert entry == {"file": f"sample-{index:05d}.png", "index": index, "label": [3, -1][index % 2]}
        assert about(target / entry.pop("file")) == common | entry


def test_labels_by_name(tokenizer, tmp_path) -> None:
    names = ["bag", "coat", "shoe"]
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((8, 8), 60 * i, np.uint8)).save(tmp_path / "data" / name / f"{i}.png")
    config = load_config(
        "maskgit", [f"tokenizer={tokenizer}", *PRIOR, f"data.source={tmp_path / 'data'}", "data.split=all"]
    )
    run = train(config, tmp_path / "run", console=QUIET)
    named = draw(run, tmp_path / "a", 3, labels=["coat", "0"])
    assert named == draw(run, tmp_path / "b", 3, labels=["1", "0"])
    with pytest.raises(ValueError, match="no class is called 'coats'; nearest: coat; valid: bag, coat, shoe"):
        draw(run, tmp_path / "c", 3, labels=["coats"])
    with pytest.raises(ValueError, match=r"label 3 is not a class; valid: 0 \.\. 2"):
        draw(run, tmp_path / "c", 3, labels=["3"])


def test_a_prompt_is_kept_and_what_follows_is_drawn(gpt, maskgit, tokenizer, photo, tmp_path) -> None:
    model = load(tokenizer)
    values = torch.tensor(np.asarray(Image.open(photo)) / 127.5 - 1, dtype=torch.float32)[None, None]
    codes = model.encode(values)
    for run in (gpt, maskgit):
        target = tmp_path / run.name
        draw(run, target / "all", 2, image=photo, keep=1.0)
        expected = ((model.decode(codes, (8, 8)) + 1) * 127.5).round().clamp(0, 255)[0, 0].detach().numpy()
        assert all((one == expected).all() for one in pixels(target / "all"))
        draw(run, target / "none", 2, image=photo, keep=0.0)
        draw(run, target / "free", 2)
        assert all((a == b).all() for a, b in zip(pixels(target / "none"), pixels(target / "free"), strict=True))
        draw(run, target / "half", 2, image=photo, keep=0.5)
        assert about(target / "half" / "sample-00000.png")["kept"] == "1/2"
    with pytest.raises(ValueError, match=r"keep must be in \[0, 1\]"):
        draw(gpt, tmp_path / "x", 1, image=photo, keep=2.0)


def test_rejection_keeps_the_likeliest_by_the_classifier(maskgit, classifier, tmp_path) -> None:
    draw(maskgit, tmp_path / "all", 12, labels=["4"])
    draw(maskgit, tmp_path / "best", 4, labels=["4"], classifier=classifier, keep_best=1 / 3)
    candidates = torch.tensor(np.stack(pixels(tmp_path / "all")) / 127.5 - 1, dtype=torch.float32)[:, None]
    with torch.no_grad():
        score = load(classifier)(candidates).softmax(1)[:, 4].view(4, 3)
    for i, kept in enumerate(pixels(tmp_path / "best")):
        assert (kept == pixels(tmp_path / "all")[3 * i + int(score[i].argmax())]).all()
    assert about(tmp_path / "best" / "sample-00000.png")["candidates"] == 3


def test_a_score_of_the_users_own_chooses_too(gpt, tmp_path) -> None:
    def darkness(images: torch.Tensor, cond: Conditioning) -> torch.Tensor:
        return -images.mean((1, 2, 3))

    draw(gpt, tmp_path / "all", 8, labels=["4"])
    draw(gpt, tmp_path / "best", 2, labels=["4"], score=darkness, keep_best=0.25, batch_size=3)
    means = np.array([image.mean() for image in pixels(tmp_path / "all")]).reshape(2, 4)
    assert [image.mean() for image in pixels(tmp_path / "best")] == means.min(1).tolist()
    assert about(tmp_path / "best" / "sample-00000.png")["score"] == "function"
    with pytest.raises(ValueError, match="a number for each of 3 samples"):
        draw(gpt, tmp_path / "nan", 2, score=lambda i, c: darkness(i, c) * torch.nan, keep_best=0.25, batch_size=3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep_best": 0.5}, "rejection needs a classifier"),
        ({"classifier": "CLASSIFIER"}, r"keep_best in \(0, 1\)"),
        ({"classifier": "CLASSIFIER", "keep_best": 0.5, "labels": ["-1"]}, "needs a label for every sample"),
        ({"texts": ["a shoe"]}, "reads no text, got 'a shoe'"),
        ({"sampling": Sampling(top_p=0.0)}, "top_p must be"),
        ({"labels": ["10"]}, "label 10 is not a class"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(maskgit, classifier, tmp_path, given, message) -> None:
    given = {key: classifier if value == "CLASSIFIER" else value for key, value in given.items()}
    with pytest.raises(ValueError, match=message):
        draw(maskgit, tmp_path / "samples", 2, **given)
    assert not (tmp_path / "samples").exists()


def test_an_edit_keeps_the_pixels_of_the_user(maskgit, photo, tmp_path) -> None:
    """Stride 4, so the soft border takes the 4 pixels around the box and leaves the other columns alone."""
    grid = draws.edit(maskgit, photo, tmp_path / "out", Request(count=3, labels=["2"]), box=(0, 0, 2, 8), console=QUIET)
    original = np.asarray(Image.open(photo)).astype(int)
    for variant in pixels(tmp_path / "out"):
        assert (variant[:, 6:] == original[:, 6:]).all()
        assert (variant[:, :2] != original[:, :2]).any()
    assert about(grid)["box"] == [0, 0, 2, 8]
    assert np.asarray(Image.open(grid)).shape == (8, 5 * 10 - 2)


def test_edits_of_nothing_and_of_everything(maskgit, gpt, photo, tmp_path) -> None:
    black = tmp_path / "black.png"
    Image.new("L", (8, 8)).save(black)
    for run in (maskgit, gpt):
        target = tmp_path / run.name
        draws.edit(run, photo, target / "nothing", Request(count=2, labels=["2"]), mask=black, console=QUIET)
        original = np.asarray(Image.open(photo))
        assert all((variant == original).all() for variant in pixels(target / "nothing"))
        draws.edit(run, photo, target / "everything", Request(count=2, labels=["2"]), box=(0, 0, 8, 8), console=QUIET)
        draw(run, target / "samples", 2, labels=["2"])
        pairs = zip(pixels(target / "everything"), pixels(target / "samples"), strict=True)
        assert all((a == b).all() for a, b in pairs)


def test_outpainting_puts_the_image_on_a_square_canvas(maskgit, tmp_path) -> None:
    small = tmp_path / "small.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (8, 6), np.uint8)).save(small)
    draws.edit(maskgit, small, tmp_path / "out", Request(count=2), outpaint=(0, 0, 2, 0), console=QUIET)
    original = np.asarray(Image.open(small))
    for variant in pixels(tmp_path / "out"):
        assert (variant[:, :2] == original[:, :2]).all()
        assert variant.shape == (8, 8)
    with pytest.raises(ValueError, match="canvas must be square, or the run would crop it; got 10x8"):
        draws.edit(maskgit, small, tmp_path / "x", Request(count=1), outpaint=(4, 0, 0, 0), console=QUIET)
    with pytest.raises(ValueError, match="one of mask, box and outpaint"):
        draws.edit(maskgit, small, tmp_path / "x", Request(count=1), console=QUIET)


@pytest.mark.slow
def test_sound_is_sampled_and_prompted_but_not_edited(tmp_path) -> None:
    small = {"width": 4, "strides": [4, 4], "dilations": [1], "latent": 4}
    parts = {"encoder": {"type": "audio_encoder", **small}, "decoder": {"type": "audio_decoder", **small}}
    spec = {"type": "tokenizer", "quantizer": {"type": "fsq", "levels": [4, 3]}, **parts}
    config = ["data={kind: audio, source: 'embedded:tones', rate: 8000, length: 512, workers: 0}", "batch_size=4"]
    config += [f"tokenizer={spec}", "steps=1", "objective.terms=[l1]", "weights={l1: 1.0}"]
    tokenizer = train(load_config("fsq-fsdd", config), tmp_path / "tokenizer", console=QUIET)
    run = prior_of(tokenizer, "maskgit")
    whole = draw(run, tmp_path / "a", 3)
    assert whole == draw(run, tmp_path / "b", 3, batch_size=2)
    listed = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert [entry["file"] for entry in listed["files"]] == [f"sample-{i:05d}.wav" for i in range(3)]
    draw(run, tmp_path / "c", 2, image=tmp_path / "a" / "sample-00000.wav", keep=0.25)
    assert about(tmp_path / "c" / "grid.png")["kept"] == "8/32"
    with pytest.raises(ValueError, match=r"only images can be edited; .* generates recordings"):
        draws.edit(run, tmp_path / "x.png", tmp_path / "out", box=(0, 0, 1, 1), console=QUIET)


def test_one_line_says_what_a_prior_cannot_use(gpt, maskgit, photo, tmp_path) -> None:
    def said(run: Path, asked: Sampling, name: str) -> str:
        out = io.StringIO()
        request = Request(count=1, sampling=asked)
        draws.sample(run, tmp_path / name, request, console=Console(file=out, width=200))
        return out.getvalue()

    assert "GPT has no use for steps, noise\n" in said(gpt, Sampling(steps=3, noise=1.0, top_k=3), "a")
    assert "no use" not in said(gpt, Sampling(temperature=0.5), "b")
    assert "no use" not in said(maskgit, Sampling(steps=3, noise=1.0), "c")
    out = io.StringIO()
    console = Console(file=out, width=200)
    draws.edit(gpt, photo, tmp_path / "edit", Request(count=1), box=(0, 0, 4, 4), console=console)
    assert "informs only the tokens behind it" in out.getvalue()


def test_the_command_line_offers_every_option_of_sampling_with_its_default() -> None:
    assert set(options.SAMPLING) == {field.name for field in fields(Sampling)}
