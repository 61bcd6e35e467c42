"""Data that a program gives to `train`: its own Dataset or DataLoader, as exactly resumable as a source.

What comes out at a position of the stream is a pure function of the run's seed and that position. For a Dataset the
order is the one that a source has (`latticode.data.order`), and the global generators of torch, numpy and Python's
`random` are seeded for each example, so that its augmentations are drawn again when a run is resumed, whatever the
number of workers. A DataLoader keeps its own order: the generators, and its own if it has one, are seeded at the start
of each epoch and for each batch, and a position inside an epoch is reached by reading up to it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from latticode.core import distributed
from latticode.core.modules import described
from latticode.core.types import Batch
from latticode.core.values import to_float
from latticode.data.order import IndexStream
from latticode.engine.config import ConfigError, DenseData, RunConfig

GIVEN = "given:"
EXAMPLES = "a tensor, a pair (tensor, label) or a latticode.core.types.Batch"


class GivenLoader:
    """The examples of `data` under the configuration of a run: what `latticode.data.Loader` is for a source.

    Args:
        data: a Dataset with a length, whose items are a tensor (C, *size) or a pair of it and a label, or a DataLoader
            of batches of such; a DataLoader may yield `Batch` too. Tensors are float in [-1, 1], or uint8.
        config: its `batch_size`, `seed`, `data.workers` (of a Dataset), `data.channels` and `data.size` hold.
        shard: give each rank its part.

    Raises:
        ConfigError: for something else, for data without an example, and for a DataLoader of another batch size or one
            that would give every rank the same examples. Iterating: for batches that are not what `data` announces.

    Examples:
        >>> from torch.utils.data import TensorDataset
        >>> from latticode.engine.config import load_config
        >>> own = ["data.source=given:noise", "data.size=8", "data.workers=0", "batch_size=4"]
        >>> config = load_config("fsq-tokenizer", own)
        >>> dataset = TensorDataset(torch.zeros(10, 3, 8, 8), torch.arange(10))
        >>> [batch.labels.tolist() for batch in GivenLoader(dataset, config).epoch()]
        [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    """

    def __init__(self, data: Any, config: RunConfig, *, shard: bool = False):
        self.config, self.data = config, data
        self.rank, self.world = (distributed.rank(), distributed.world_size()) if shard else (0, 1)
        self.skipped: Mapping[str, str] = {}
        self.source = GivenSource(getattr(data, "dataset", data))
        self._order: IndexStream | None = None
        if isinstance(data, DataLoader):
            if data.batch_size not in (None, config.batch_size):
                raise ConfigError(f"the DataLoader's batch_size is {data.batch_size}, the run's {config.batch_size}")
            if self.world > 1 and not hasattr(data.sampler, "set_epoch"):
                raise ConfigError(
                    f"each of {self.world} processes would see the same examples: give the DataLoader a "
                    "torch.utils.data.DistributedSampler, or `train` the Dataset itself"
                )
        elif hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset):
            if not len(data):
                raise ConfigError("the Dataset has no example")
            place = {"seed": config.seed, "rank": self.rank, "world": self.world}
            self._order = IndexStream(len(data), config.batch_size, **place)
        else:
            raise ConfigError(f"data is a Dataset with a length or a DataLoader, got {type(data).__name__}")

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """This rank's batches start, start + 1, ... without end; `batches(k)` equals the tail of `batches(0)`."""
        found = self._from_loader(start) if self._order is None else self._from_dataset(self._order, start)
        return map(self._batch, found)

    def epoch(self) -> Iterator[Batch]:
        """One pass in order."""
        if self._order is None:
            return map(self._batch, _seeded_pass(self.data, self.config.seed, 0))
        places = [(0, index) for index in range(len(self.data))]
        size = self.config.batch_size
        return map(self._batch, self._loaded([places[i : i + size] for i in range(0, len(places), size)]))

    def _from_dataset(self, order: IndexStream, start: int) -> Iterator[Any]:
        def places() -> Iterator[list[tuple[int, int]]]:
            for t in count(start):
                epochs, indices = order.batch(t)
                yield list(zip(epochs.tolist(), indices.tolist(), strict=True))

        return self._loaded(places())

    def _loaded(self, places: Any) -> Iterator[Any]:
        """The batches of `places`, lists of (epoch, index)."""
        examples = SeededExamples(self.data, self.config.seed)
        generator = torch.Generator()  # of its own: a DataLoader without one would draw from the step's
        workers = self.config.data.workers
        return iter(DataLoader(examples, batch_sampler=Places(places), num_workers=workers, generator=generator))

    def _from_loader(self, start: int) -> Iterator[Any]:
        done = 0
        for epoch in count():
            length = len(self.data) if hasattr(self.data.dataset, "__len__") else 0
            if length and done + length <= start:
                done += length
                continue
            if hasattr(self.data.sampler, "set_epoch"):
                self.data.sampler.set_epoch(epoch)
            before = done
            for batch in _seeded_pass(self.data, self.config.seed * 4096 + self.rank, epoch):
                if done >= start:
                    yield batch
                done += 1
            if done == before:
                raise ConfigError("the DataLoader has no batch")

    def _batch(self, value: Any) -> Batch:
        if isinstance(value, Batch):
            batch = value
        else:
            parts = (value,) if isinstance(value, Tensor) else value
            if not isinstance(parts, tuple | list) or not 1 <= len(parts) <= 2 or not isinstance(parts[0], Tensor):
                raise ConfigError(f"an example is {EXAMPLES}, and a batch is made of such; got {_named(value)}")
            inputs, none = parts[0], torch.full((len(parts[0]),), -1)
            labels = torch.as_tensor(parts[1]) if len(parts) == 2 else none
            if labels.shape != none.shape or labels.is_floating_point():
                raise ConfigError(f"{len(inputs)} examples have as many integers as labels, got {described(labels)}")
            batch = Batch(inputs, labels.long(), none)
        inputs = batch.inputs
        if inputs.dtype == torch.uint8 and not isinstance(self.config.data, DenseData):
            inputs = to_float(inputs)
        shape, channels = self.config.data.preprocess().shape, self.config.data.channels
        if inputs.ndim < 3 or inputs.shape[1] != channels or (shape and tuple(inputs.shape[1:]) != tuple(shape)):
            wanted = f"(B, {', '.join(map(str, shape or (channels, '*size')))})"
            raise ConfigError(f"data.channels and data.size say {wanted}, and the data are {described(inputs)}")
        if not isinstance(self.config.data, DenseData):
            low, high = (float(x) for x in inputs.aminmax())
            if not inputs.is_floating_point() or low < -1.01 or high > 1.01:
                raise ConfigError(
                    f"values are floats in [-1, 1] or uint8 in 0..255, got {described(inputs)} from {low:.3g} to "
                    f"{high:.3g}"
                )
        return Batch(inputs, batch.labels, batch.indices, batch.texts)


class GivenSource:
    """What is known of given data: its classes, if it has a list of their names as torchvision's datasets have.

    Examples:
        >>> from types import SimpleNamespace
        >>> GivenSource(SimpleNamespace(classes=["cat", "dog"])).classes  # as torchvision's datasets have it
        ('cat', 'dog')
    """

    def __init__(self, dataset: Any):
        classes = getattr(dataset, "classes", ())
        self.classes = tuple(map(str, classes)) if isinstance(classes, list | tuple) else ()

    def captions(self) -> Iterator[str]:
        """None: a vocabulary is learned from a source on disk."""
        return iter(())


class SeededExamples(Dataset[Any]):
    """Items of `data` by (epoch, index), the random generators seeded for each.

    Examples:
        >>> class Noise(Dataset):
        ...     def __getitem__(self, index):
        ...         return torch.rand(3)
        >>> examples = SeededExamples(Noise(), seed=0)
        >>> first = examples[0, 7]  # epoch 0, example 7
        >>> torch.equal(first, examples[0, 7]), torch.equal(first, examples[1, 7])
        (True, False)
    """

    def __init__(self, data: Any, seed: int):
        self.data, self.seed = data, seed

    def __getitem__(self, place: tuple[int, int]) -> Any:
        with seeded(self.seed, *place):
            return self.data[place[1]]


class Places:
    """A batch sampler of a DataLoader that yields what it is given.

    Examples:
        >>> list(Places([[(0, 2), (0, 0)], [(0, 1)]]))  # two batches of (epoch, index)
        [[(0, 2), (0, 0)], [(0, 1)]]
    """

    def __init__(self, places: Any):
        self.places = places

    def __iter__(self) -> Iterator[Any]:
        return iter(self.places)


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """The global CPU generators of torch, numpy and `random` seeded by `numbers`, and put back afterwards."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    first, second = np.random.SeedSequence(numbers).generate_state(2)
    torch.default_generator.manual_seed(int(first) << 32 | int(second))
    np.random.seed(first)
    random.seed(int(second))
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _seeded_pass(loader: DataLoader[Any], seed: int, epoch: int) -> Iterator[Any]:
    """One pass over `loader`, each batch made under a seed of its own."""
    if loader.generator is not None:
        loader.generator.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0]))
    with seeded(seed, epoch):
        batches = iter(loader)
    for place in count():
        with seeded(seed, epoch, place):
            batch = next(batches, batches)
        if batch is batches:
            return
        yield batch


def _named(value: Any) -> str:
    parts = [f"{type(part).__name__}" for part in value] if isinstance(value, tuple | list) else []
    return f"{type(value).__name__} of {', '.join(parts)}" if parts else type(value).__name__
