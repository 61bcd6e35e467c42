"""The order of records, and the batches made of them: pure functions of seed and position."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from latticode.core.types import Batch
from latticode.data import Loader, Preprocess, Record, StreamSource
from latticode.data import decoding as decoding_module
from latticode.data.order import SHUFFLE_BUFFER, IndexStream, prefetch, shuffled
from latticode.data.records import ArraySource


def source(count: int = 23, size: tuple[int, int] = (8, 8)) -> ArraySource:
    """Random grey images whose corner holds their index."""
    images = np.random.default_rng(1).integers(0, 256, (count, *size)).astype(np.uint8)
    images[:, 0, 0] = np.arange(count)
    return ArraySource("made", images, np.arange(count) % 3, ("a", "b", "c"), [f"r{i}" for i in range(count)])


class Damaged(ArraySource):
    """Some records cannot be decoded, some not even read; and reads are counted."""

    def __init__(self, base: ArraySource, undecodable: set[int], unreadable: Iterable[int] = ()):
        super().__init__(base.name, base.images, base.labels, base.classes, base.names)
        self.undecodable, self.unreadable, self.reads = undecodable, unreadable, 0

    def __getitem__(self, i: int) -> Record:
        self.reads += 1
        if i in self.unreadable:
            raise PermissionError("not yours")
        record = super().__getitem__(i)
        return Record(b"junk", record.label, record.name) if i in self.undecodable else record


class Stream(StreamSource):
    def __init__(self, base: ArraySource):
        self.base, self.name, self.classes = base, "stream", base.classes

    def records(self) -> Iterator[tuple[int, Record]]:
        return ((i, self.base[i]) for i in range(len(self.base)))


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.inputs, b.inputs) and torch.equal(a.labels, b.labels) and torch.equal(a.indices, b.indices)


def take(loader: Loader, count: int, start: int = 0) -> list[Batch]:
    with closing(cast(Any, loader.batches(start))) as iterator:
        return list(islice(iterator, count))


# The order


@pytest.mark.parametrize("count", [1, 5, 12, 50])
@pytest.mark.parametrize("batch_size", [1, 4, 12, 17])
def test_every_epoch_holds_every_record_once(count, batch_size):
    stream = IndexStream(count, batch_size, seed=3)
    epochs, indices = (np.concatenate(x) for x in zip(*(stream.batch(t) for t in range(5 * count // batch_size + 1))))
    assert list(epochs) == sorted(epochs)
    for epoch in range(len(epochs) // count):
        assert sorted(indices[epochs == epoch]) == list(range(count))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_together_are_one_process(world):
    whole = IndexStream(23, 6, seed=5)
    ranks = [IndexStream(23, 6 // world, seed=5, rank=r, world=world) for r in range(world)]
    for t in (0, 3, 40):
        for part in (0, 1):
            np.testing.assert_array_equal(np.concatenate([r.batch(t)[part] for r in ranks]), whole.batch(t)[part])
    assert [i for r in ranks for i in r.shard()] == list(range(23))


def test_order_depends_on_seed_and_epoch_only():
    a, b, c = IndexStream(50, 10, seed=1), IndexStream(50, 5, seed=1), IndexStream(50, 10, seed=2)
    np.testing.assert_array_equal(a.order(7), b.order(7))
    assert not np.array_equal(a.order(7), a.order(8))
    assert not np.array_equal(a.order(7), c.order(7))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"count": 0}, "empty source"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"rank": 2, "world": 2}, r"rank must be in 0\.\.1, got 2"),
    ],
)
def test_bad_streams_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        IndexStream(**{"count": 5, "batch_size": 2, **bad})


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_prefetch_keeps_the_order_and_is_bounded(workers):
    started = []

    def jobs():
        for i in range(1000):
            started.append(i)
            yield lambda i=i: i * i

    results = prefetch(jobs(), workers)
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(started) <= 5 + 2 * workers + 1
    cast(Any, results).close()
    assert not [t for t in threading.enumerate() if t.name.startswith("latticode-loader")]


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetch_passes_errors_on(workers):
    with pytest.raises(ZeroDivisionError):
        list(prefetch(iter([lambda: 1, lambda: 1 // 0]), workers))


def test_stream_is_mixed_within_a_window():
    order = list(shuffled(iter(range(5000)), np.random.default_rng(0)))
    assert sorted(order) == list(range(5000))
    assert all(item < place + SHUFFLE_BUFFER for place, item in enumerate(order))
    assert np.corrcoef(order[:1000], range(1000))[0, 1] < 0.6


# Batches

KINDS = {
    "cached": Preprocess(8, 1, flip=True),
    "resized": Preprocess(5, 3),
    "random crop": Preprocess(4, 1, crop="random", flip=True),
    "own size": Preprocess(channels=1, flip=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_from_k_are_the_tail_whatever_the_workers(kind):
    whole = take(Loader(source(), KINDS[kind], 5, seed=2), 12)
    for start, workers in ((4, 0), (0, 3), (9, 2)):
        tail = take(Loader(source(), KINDS[kind], 5, seed=2, workers=workers), 12 - start, start)
        assert all(map(same, whole[start:], tail))
    assert not same(whole[0], take(Loader(source(), KINDS[kind], 5, seed=3), 1)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_concatenated_are_the_batch_of_one_process(kind):
    whole = take(Loader(source(), KINDS[kind], 6), 8)
    parts = [take(Loader(source(), KINDS[kind], 2, rank=r, world=3), 8) for r in range(3)]
    for t, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[t].inputs for part in parts]), batch.inputs)
        assert torch.equal(torch.cat([part[t].labels for part in parts]), batch.labels)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_in_memory_changes_nothing(kind, monkeypatch):
    kept = take(Loader(source(), KINDS[kind], 5), 12)
    monkeypatch.setattr(decoding_module, "CACHE_BYTES", 0)
    assert all(map(same, kept, take(Loader(source(), KINDS[kind], 5), 12)))


@pytest.mark.parametrize(("kind", "reads"), [("cached", 23), ("random crop", 23), ("own size", 60)])
def test_small_sources_are_decoded_once(kind, reads):
    counted = Damaged(source(), set())
    take(Loader(counted, KINDS[kind], 5), 12)
    assert counted.reads == reads


def test_batches_hold_the_records_they_name():
    made = source()
    for batch in take(Loader(made, Preprocess(8, 1), 5), 6):
        assert (batch.inputs.shape, batch.inputs.dtype) == ((5, 1, 8, 8), torch.float32)
        expected = torch.from_numpy(made.images[batch.indices.numpy()])[:, None].float() / 127.5 - 1
        assert torch.equal(batch.inputs, expected)
        assert torch.equal(batch.labels, batch.indices % 3)


def test_augmentation_varies_between_epochs_and_can_be_turned_off():
    pre = Preprocess(8, 1, flip=True)
    plain = Loader(source(), pre, 23, augment=False)
    first, second = (b.inputs[b.indices.argsort()] for b in take(Loader(source(), pre, 23), 2))
    a, b = (b.inputs[b.indices.argsort()] for b in take(plain, 2))
    assert torch.equal(a, b)
    assert not torch.equal(first, second)
    flipped = (first != a).flatten(1).any(1)
    assert 4 <= flipped.sum() <= 19
    assert torch.equal(torch.where(flipped[:, None, None, None], a.flip(-1), a), first)


def test_random_crops_vary_between_epochs():
    pre = Preprocess(4, 1, crop="random")
    first, second = (b.inputs[b.indices.argsort()] for b in take(Loader(source(), pre, 23), 2))
    assert (first != second).flatten(1).any(1).sum() > 11


@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_evaluation_alone(kind):
    loader = Loader(source(), KINDS[kind], 5)
    before = list(loader.epoch())
    take(loader, 8)
    assert all(map(same, before, loader.epoch()))


# One ordered pass


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 30])
def test_epoch_is_everything_once_in_order(workers, world):
    loaders = [Loader(source(), Preprocess(8, 1), 5, rank=r, world=world, workers=workers) for r in range(world)]
    batches = [batch for loader in loaders for batch in loader.epoch()]
    assert torch.cat([b.indices for b in batches]).tolist() == list(range(23))
    assert sum(len(loader) for loader in loaders) == 23
    assert all(len(b.inputs) <= 5 for b in batches)


def test_epoch_takes_mixed_sizes_apart_and_batches_refuse_them():
    made = source(6)

    class Mixed(ArraySource):
        def __getitem__(self, i: int) -> Record:
            return Record(self.images[i][: 8 if i % 4 else 4], 0, self.names[i])

    mixed = Mixed("mixed", made.images, None, (), made.names)
    shapes = [tuple(b.inputs.shape) for b in Loader(mixed, Preprocess(channels=1), 6).epoch()]
    assert shapes == [(1, 1, 4, 8), (3, 1, 8, 8), (1, 1, 4, 8), (1, 1, 8, 8)]
    with pytest.raises(ValueError, match=r"differ in size \(4x8 and 8x8\); give the preprocessing a size"):
        next(Loader(mixed, Preprocess(channels=1), 6).batches())


# Records that cannot be read


@pytest.mark.parametrize("kind", KINDS)
def test_bad_records_are_replaced_in_training_and_left_out_in_evaluation(kind):
    damaged = Damaged(source(), {3, 22}, {4})
    loader = Loader(damaged, KINDS[kind], 5)
    whole, good = take(loader, 10), take(Loader(source(), KINDS[kind], 5), 10)
    replacement = {3: 5, 4: 5, 22: 0}
    for a, b in zip(whole, good, strict=True):
        assert a.indices.tolist() == [replacement.get(i, i) for i in b.indices.tolist()]
    assert set(loader.skipped) == {"r3", "r4", "r22"}
    assert loader.skipped["r4"] == "PermissionError: not yours"
    assert loader.skipped["r3"] == "not an image, or of an unknown format"
    tail = take(Loader(damaged, KINDS[kind], 5, workers=2), 5, 5)
    assert all(map(same, whole[5:], tail))

    fresh = Loader(damaged, KINDS[kind], 5)
    kept = torch.cat([b.indices for b in fresh.epoch()]).tolist()
    assert kept == [i for i in range(23) if i not in replacement]
    assert fresh.skipped == loader.skipped


@pytest.mark.parametrize("kind", KINDS)
def test_source_without_a_good_record_is_refused(kind):
    loader = Loader(Damaged(source(4), {0, 1, 2, 3}), KINDS[kind], 2)
    with pytest.raises(ValueError, match=r"no image of 'made' can be read; the first, r\d: not an image"):
        next(loader.batches())
    with pytest.raises(ValueError, match="no image of 'made' can be read"):
        list(loader.epoch())


def test_pictures_given_as_files_are_decoded(tmp_path):
    Image.new("RGB", (10, 6), (255, 0, 0)).save(tmp_path / "red.png")
    (tmp_path / "bad.png").write_bytes(b"")
    from latticode.data import open_source

    loader = Loader(open_source(str(tmp_path), "all"), Preprocess(4), 3, workers=1)
    batch = take(loader, 1)[0]
    assert batch.inputs.unique().tolist() == [-1, 1]
    assert loader.skipped == {"bad.png": "empty"}


def test_bad_loaders_are_refused():
    with pytest.raises(ValueError, match="workers must be >= 0, got -1"):
        Loader(source(), Preprocess(8), 2, workers=-1)
    with pytest.raises(ValueError, match="start must be >= 0, got -1"):
        Loader(source(), Preprocess(8), 2).batches(-1)


# Streams


@pytest.mark.parametrize("pre", [Preprocess(8, 1, flip=True), Preprocess(4, 1, crop="random", flip=True)])
def test_stream_resumes_and_shards_like_any_source(pre):
    stream = Stream(source())
    whole = take(Loader(stream, pre, 6), 9)
    assert all(map(same, whole[5:], take(Loader(stream, pre, 6, workers=2), 4, 5)))
    parts = [take(Loader(stream, pre, 3, rank=r, world=2), 9) for r in range(2)]
    for t, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[t].inputs for part in parts]), batch.inputs)
    assert sorted(torch.cat([b.indices for b in whole])[:23].tolist()) == list(range(23))


def test_stream_epoch_is_everything_once():
    loaders = [Loader(Stream(source()), Preprocess(8, 1), 5, rank=r, world=2) for r in range(2)]
    parts = [torch.cat([b.indices for b in loader.epoch()]).tolist() for loader in loaders]
    assert sorted(parts[0] + parts[1]) == list(range(23))
    assert parts[0][:5] == [0, 1, 2, 3, 4]
    assert parts[1][:5] == [5, 6, 7, 8, 9]
    with pytest.raises(TypeError, match="streamed and has no length"):
        len(loaders[0])


def test_stream_replaces_bad_records_and_refuses_nothing_but_bad_ones():
    loader = Loader(Stream(Damaged(source(), {2})), Preprocess(8, 1), 6)
    batches = take(loader, 4)
    assert set(loader.skipped) == {"r2"}
    assert all(len(b.inputs) == 6 and 2 not in b.indices for b in batches)
    with pytest.raises(ValueError, match="no image of 'stream' can be read"):
        take(Loader(Stream(Damaged(source(4), {0, 1, 2, 3})), Preprocess(8, 1), 2), 1)
    empty = ArraySource("none", np.zeros((0, 8, 8), np.uint8), None, (), [])
    with pytest.raises(ValueError, match="'stream' has no records"):
        take(Loader(Stream(empty), Preprocess(8, 1), 2), 1)
