"""Recordings: files of every format, one rate and width, windows, and the way from a folder to wav files and back."""

from __future__ import annotations

import io
import json
import struct
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.io import wavfile

from latticode import cli
from latticode.data import AUDIO, AudioPreprocess, Loader, Preprocess, TokenDataset, open_source
from latticode.data.records import Record
from latticode.data.waveforms import SoundError, decode_sound, encode_wav, save_wav
from latticode.engine import load_config
from latticode.engine.config import ConfigError

RATE = 8000


def sound(count: int = 900, channels: int = 1, seed: int = 0) -> np.ndarray:
    """(C, T) float32, multiples of 1/128, so that every format holds them exactly."""
    values = np.random.default_rng(seed).integers(-127, 128, (channels, count))
    return (values / 128).astype(np.float32)


def scipy_wav(samples: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    scaled = {
        "u1": lambda x: (x * 128 + 128).astype(np.uint8),
        "i2": lambda x: (x * 2**15).astype(np.int16),
        "i4": lambda x: (x * 2.0**31).astype(np.int32),
        "f4": lambda x: x.astype(np.float32),
        "f8": lambda x: x.astype(np.float64),
    }[kind](samples.T)
    wavfile.write(buffer, RATE, scaled)
    return buffer.getvalue()


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(k + struct.pack("<I", len(d)) + d + b"\0" * (len(d) % 2) for k, d in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def layout(tag: int, channels: int, bits: int, more: bytes = b"") -> tuple[bytes, bytes]:
    frame = channels * bits // 8
    return b"fmt ", struct.pack("<HHIIHH", tag, channels, RATE, RATE * frame, frame, bits) + more


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("kind", ["u1", "i2", "i4", "f4", "f8"])
def test_wav_files_of_every_kind(kind: str, channels: int) -> None:
    samples, rate = decode_sound(scipy_wav(sound(channels=channels), kind))
    assert rate == RATE
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, sound(channels=channels))


def test_24_bits_extensible_odd_chunks_and_unknown_sizes() -> None:
    samples = sound(7)
    data = b"".join(struct.pack("<i", int(x * 2**23))[:3] for x in samples[0])  # 21 bytes: odd
    extensible = layout(0xFFFE, 1, 24, struct.pack("<HHIH", 22, 24, 4, 1) + bytes(14))
    for file in (riff(layout(1, 1, 24), (b"LIST", b"abc"), (b"data", data)), riff(extensible, (b"data", data))):
        np.testing.assert_array_equal(decode_sound(file)[0], samples)
    streamed = bytearray(riff(layout(1, 1, 24), (b"data", data)))[:-1]
    for whole, size in ((0, 0), (36, 0), (0x7FFFF024, 0x7FFFF000), (0xFFFFFFFF, 0xFFFFFFFF)):
        streamed[4:8], streamed[40:44] = struct.pack("<I", whole), struct.pack("<I", size)
        np.testing.assert_array_equal(decode_sound(bytes(streamed))[0], samples)


@pytest.mark.parametrize("kind", ["FLAC", "OGG"])
def test_other_formats_come_through_soundfile(kind: str, monkeypatch) -> None:
    soundfile = pytest.importorskip("soundfile")
    buffer, tone = io.BytesIO(), 0.5 * np.sin(np.arange(4000) * 0.1)
    soundfile.write(buffer, tone, RATE, format=kind)
    samples, rate = decode_sound(buffer.getvalue())
    assert (samples.shape, samples.dtype, rate) == ((1, 4000), np.float32, RATE)
    assert np.abs(samples[0] - tone).max() < (1e-4 if kind == "FLAC" else 0.1)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(SoundError, match=r"x: not a wav file; .*latticode\[audio\]"):
        decode_sound(buffer.getvalue(), "x")


WAV = encode_wav(sound(100), RATE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "x: empty"),
        (WAV[:-40], "truncated: 160 of 200 bytes"),
        (WAV[:30], "without format or samples"),
        (riff((b"data", b"1234")), "without format or samples"),
        (riff(layout(1, 1, 16), (b"data", b"")), "0 samples"),
        (riff(layout(1, 1, 16), (b"data", b""), (b"LIST", b"not sound")), "0 samples"),
        (riff(layout(6, 1, 8), (b"data", b"12")), "wav format 6 of 8 bits"),
        (riff(layout(3, 1, 32), (b"data", struct.pack("<f", float("nan")))), "not finite"),
        (b"no sound at all", "unknown format|soundfile"),
    ],
)
def test_what_cannot_be_heard_is_named(data: bytes, message: str) -> None:
    with pytest.raises(SoundError, match=message):
        decode_sound(data, "x")


def test_written_as_16_bits(tmp_path) -> None:
    samples = np.array([[-1.0, -0.25, 0.0, 1 / 65536, 0.99999, 2.0]], np.float32)
    save_wav(tmp_path / "a.wav", samples, 44100)
    rate, read = wavfile.read(tmp_path / "a.wav")
    assert (rate, read.dtype, read.tolist()) == (44100, np.int16, [-32768, -8192, 0, 0, 32767, 32767])
    again, _ = decode_sound((tmp_path / "a.wav").read_bytes())
    assert np.abs(again - samples.clip(-1, 1)).max() <= 1 / 32768
    assert encode_wav(again, 44100) == (tmp_path / "a.wav").read_bytes()


def load(preprocess: AudioPreprocess, samples: np.ndarray, rate: int = RATE) -> np.ndarray:
    return preprocess.load(Record(encode_wav(samples, rate), 0, "x"))


def test_channels_and_rates() -> None:
    stereo = sound(channels=2)
    np.testing.assert_allclose(load(AudioPreprocess(RATE), stereo), stereo.mean(0, keepdims=True))
    np.testing.assert_array_equal(load(AudioPreprocess(RATE, channels=2), stereo), stereo)
    np.testing.assert_array_equal(load(AudioPreprocess(RATE, channels=2), stereo[:1]), stereo[[0, 0]])
    with pytest.raises(SoundError, match="x: 3 channels cannot become 2"):
        load(AudioPreprocess(RATE, channels=2), sound(channels=3))
    time = np.arange(4410) / 44100
    tone = (0.5 * np.sin(2 * np.pi * 1000 * time) + 0.4 * np.sin(2 * np.pi * 6000 * time))[None]
    low = load(AudioPreprocess(RATE), tone, 44100)
    assert low.shape == (1, 800)
    wanted = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(800) / RATE)
    assert np.abs(low[0, 50:-50] - wanted[50:-50]).max() < 0.01  # what 8 kHz cannot hold is gone, not folded
    assert np.abs(load(AudioPreprocess(11025), np.sign(tone), 44100)).max() <= 1


def test_windows() -> None:
    ramp = np.arange(10, dtype=np.float32)[None] / 10
    pre = AudioPreprocess(RATE, 4)
    np.testing.assert_array_equal(pre.arrange(ramp), ramp[:, 3:7])
    starts = {float(pre.arrange(ramp, np.random.default_rng(i))[0, 0]) for i in range(100)}
    assert starts == {float(x) for x in ramp[0, :7]}
    np.testing.assert_array_equal(pre.arrange(ramp[:, :3]), [[*ramp[0, :3], 0]])
    assert pre.shape == (1, 4)
    assert pre.whole().shape is None
    np.testing.assert_array_equal(pre.whole().arrange(ramp), ramp)


def test_the_record_says_what_was_done() -> None:
    pre = AudioPreprocess(RATE, 4, 2)
    record = json.loads(json.dumps(pre.record()))
    assert record == {"kind": "audio", "rate": 8000, "length": 4, "channels": 2, "range": "[-1, 1]"}
    assert AudioPreprocess.from_record(record) == pre
    with pytest.raises(ValueError, match="preprocessing of audio, not image"):
        Preprocess.from_record(record)
    for bad in ({"rate": 0}, {"rate": 8000, "length": 0}, {"rate": 8000, "channels": 3}):
        with pytest.raises(ValueError, match="must be"):
            AudioPreprocess(**bad)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six recordings of two classes, lengths 300 to 800; one more is damaged."""
    for i in range(6):
        path = tmp_path / "sounds" / ("no" if i % 2 else "yes") / f"{i}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_wav(path, sound(300 + 100 * i, seed=i), RATE)
    (tmp_path / "sounds" / "no" / "broken.wav").write_bytes(WAV[:60])
    (tmp_path / "sounds" / "no" / "notes.txt").write_text("not a sound")
    return tmp_path / "sounds"


def test_a_folder_with_classes_and_a_damaged_file(folder) -> None:
    source = open_source(str(folder), "all", medium=AUDIO)
    assert (len(source), source.classes) == (7, ("no", "yes"))
    loader = Loader(source, AudioPreprocess(RATE), 4)
    batches = list(loader.epoch())
    assert [b.inputs.shape[-1] for b in batches] == [400, 600, 800, 300, 500, 700]
    assert batches[0].inputs.dtype == torch.float32
    np.testing.assert_array_equal(batches[0].inputs[0].numpy(), sound(400, seed=1))
    assert [int(b.labels) for b in batches] == [0, 0, 0, 1, 1, 1]
    assert list(loader.skipped) == ["no/broken.wav"]
    assert loader.skipped["no/broken.wav"].startswith("truncated")
    with pytest.raises(ValueError, match=r"recordings of one batch differ in size .*give the preprocessing a length"):
        next(loader.batches())


@pytest.mark.parametrize("workers", [0, 2])
def test_training_windows_are_a_function_of_seed_and_step(folder, workers: int) -> None:
    def loader(seed: int = 0) -> Loader:
        source = open_source(str(folder), "all", medium=AUDIO)
        return Loader(source, AudioPreprocess(RATE, 350), 4, seed=seed, workers=workers)

    first = [b.inputs for b in islice(loader().batches(), 6)]
    assert all(x.shape == (4, 1, 350) for x in first)
    again = loader()
    assert all(torch.equal(a, b.inputs) for a, b in zip(first, islice(again.batches(), 6), strict=True))
    assert all(torch.equal(a, b.inputs) for a, b in zip(first[4:], islice(again.batches(4), 2), strict=True))
    assert not torch.equal(first[0], next(loader(1).batches()).inputs)
    held = [b.inputs for b in loader().epoch()]
    assert sum(len(x) for x in held) == 6
    assert all(torch.equal(a, b.inputs) for a, b in zip(held, loader(1).epoch(), strict=True))


def test_parquet_single_files_and_other_kinds(folder, tmp_path) -> None:
    cells = [{"bytes": encode_wav(sound(50 + i), RATE), "path": f"{i}.wav"} for i in range(3)]
    table = pa.table({"audio": cells, "label": [2, 0, 1]})
    pq.write_table(table, tmp_path / "test.parquet")
    source = open_source(str(tmp_path / "test.parquet"), "all", medium=AUDIO)
    assert [source[i].label for i in range(3)] == [2, 0, 1]
    assert load(AudioPreprocess(RATE), sound(51)).shape == AudioPreprocess(RATE).load(source[1]).shape
    single = open_source(str(folder / "yes" / "2.wav"), "test", medium=AUDIO)
    assert (len(single), single.name_of(0)) == (1, "2.wav")
    with pytest.raises(ValueError, match=r"no recordings under .*flac, ogg, wav"):
        open_source(str(tmp_path / "empty"), medium=AUDIO) if (tmp_path / "empty").mkdir() is None else None
    with pytest.raises(ValueError, match=r"no reader of images for \.wav"):
        open_source(str(folder / "yes" / "2.wav"))
    with pytest.raises(ValueError, match=r"embedded:digits holds images, not recordings: data\.kind=image"):
        open_source("embedded:digits", medium=AUDIO)


@pytest.mark.parametrize("path", [None, "x.wav"], ids=["struct of bytes", "audio feature"])
def test_hub_sets(path, tmp_path, monkeypatch) -> None:

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    cells = [{"bytes": encode_wav(sound(50 + i), RATE), "path": path} for i in range(3)]
    features = {"audio": {"_type": "Audio"}, "label": {"_type": "ClassLabel", "names": ["a", "b"]}}
    meta = {"huggingface": json.dumps({"info": {"features": features}})}
    (tmp_path / "set").mkdir()
    table = pa.table({"audio": cells, "label": [0, 1, 0]})
    pq.write_table(table.replace_schema_metadata(meta), tmp_path / "set" / "train.parquet")
    whole = open_source(f"hub:{tmp_path / 'set'}", "all", medium=AUDIO)
    assert whole.classes == ("a", "b")
    streamed = open_source(f"hub:{tmp_path / 'set'}?streaming", "all", medium=AUDIO)
    for i, record in streamed.records():  # type: ignore[attr-defined]
        assert record.content == whole[i].content == cells[i]["bytes"]
    with pytest.raises(ValueError, match="has no image column, only audio, label"):
        open_source(f"hub:{tmp_path / 'set'}", "all")


def test_tones() -> None:
    source = open_source("embedded:tones", "all", medium=AUDIO)
    assert (len(source), source.classes) == (240, ("i", "e", "a", "o", "u"))
    record = source[7]
    assert (record.label, record.name) == (2, "tones/a-01")
    samples, rate = decode_sound(record.content)  # type: ignore[arg-type]
    assert rate == RATE
    assert 0.69 < np.abs(samples).max() < 0.71
    assert source[7].content == record.content


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.kind=smell"], "data: data.kind must be one of image, audio, video"),
        (["data.size=32"], "unknown key 'data.size'; .*valid: .*length"),
        (["data.rate=0"], "data.rate: .*greater than 0, got 0"),
        (["data={kind: audio, source: x}"], "missing key 'data.rate'"),
        (["data.length=0"], "data.length: .*got 0"),
        (["data.channels=3"], "data.channels: .*1 or 2"),
        (["data={kind: video, source: x, crop: random}"], "data: crop must be .* for clips, got 'random'"),
    ],
)
def test_what_a_kind_has_no_use_for_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("fsq-fsdd", overrides).data.preprocess()


TINY = [
    "data.source=embedded:tones",
    "data.length=400",
    "data.workers=0",
    "steps=2",
    "batch_size=2",
    "log_every=1",
    "save_every=2",
    "picture_every=2",
    *(f"tokenizer.{part}.{key}" for part in ("encoder", "decoder") for key in ("width=4", "dilations=[1]", "latent=4")),
]


def run(monkeypatch, capsys, *words: object) -> str:
    monkeypatch.setattr(sys, "argv", ["latticode", *map(str, words)])
    with pytest.raises(SystemExit) as leave:
        cli.main()
    printed = capsys.readouterr()
    assert not leave.value.code, printed.err
    return printed.out


@pytest.mark.slow
def test_the_whole_road(folder, tmp_path, monkeypatch, capsys) -> None:
    trained, tokens, restored = tmp_path / "run", tmp_path / "tokens", tmp_path / "restored"
    run(monkeypatch, capsys, "train", "fsq-fsdd", *TINY, "--out", trained)
    assert (trained / "images" / "reconstructions-000002.png").is_file()
    assert "val/si_sdr" in (trained / "metrics.jsonl").read_text()
    assert "6 recordings in" in run(monkeypatch, capsys, "encode", trained, folder, tokens)
    dataset = TokenDataset(tokens, verify=True)
    assert len(dataset.manifest["shards"]) == 1
    assert list(dataset.manifest["skipped"]) == ["no/broken.wav"]
    assert [dataset.size(i) for i in range(2)] == [(400,), (600,)]
    assert [dataset.grid_of(i) for i in range(3)] == [(10,), (15,), (20,)]
    assert dataset.manifest["preprocess"]["length"] is None
    run(monkeypatch, capsys, "decode", trained, tokens, restored)
    files = sorted(restored.iterdir())
    assert files[0].name == "000000-1.wav"
    for i, file in enumerate(files):
        rate, samples = wavfile.read(file)
        assert (rate, samples.dtype, samples.shape) == (RATE, np.int16, dataset.size(i))
    out = run(monkeypatch, capsys, "evaluate", trained, "--limit", 5)
    assert "si_sdr" in out
    scores = json.loads((trained / "evaluation.json").read_text())
    assert scores["count"] == scores["protocol"]["recordings"] == 5
    assert scores["protocol"]["preprocessing"]["length"] is None
    assert scores["bits_per_second"] == pytest.approx(scores["tokens_per_second"] * scores["bits_per_token"])
    assert 200 <= scores["tokens_per_second"] < 205  # 8000 / 40, and what padding adds
    assert "bits_per_pixel" not in scores
    assert "SI-SDR" in (trained / "report.html").read_text()
