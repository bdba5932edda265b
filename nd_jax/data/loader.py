"""The batch pipeline of every method: shuffle, shard, transform and batch a source with random access.

    stream      position n -> record; epoch e holds positions e N .. (e + 1) N - 1, each a new permutation of N records
    batch k     positions k B .. (k + 1) B - 1 of the stream, B = global batch
    process p   rows p b .. (p + 1) b - 1 of every batch, b = B / P

So a global batch is the same whatever the number of processes P, and the number k of the next one is the whole state.
Randomness of a transform depends on (seed, position) only. Grain does the work: its `MapDataset` has the same
indexing, and its prefetching iterator reads batches in threads ahead of the step.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from nd_jax.errors import UserError

Batch = dict[str, np.ndarray]
# Takes a record and a generator that is valid during the call only; returns arrays of shapes that never change.
Transform = Callable[[Any, np.random.Generator], Mapping[str, np.ndarray]]

# Row of an evaluation batch that holds no example.
NO_EXAMPLE = -1


class Source(Protocol):
    """Records with random access, read from several threads; equal fingerprints mean equal records."""

    fingerprint: str

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class LoaderOptions:
    """How batches are made.

    Attributes:
      global_batch: rows of a batch over all processes.
      seed: of the order and of the transform's randomness.
      process_index, process_count: which rows of each batch are read here.
      num_threads: threads that read ahead; 0 reads in the calling thread.
      prefetch_batches: batches kept ready.
    """

    global_batch: int
    seed: int = 0
    process_index: int = 0
    process_count: int = 1
    num_threads: int = 2
    prefetch_batches: int = 8

    def __post_init__(self):
        if not 0 <= self.process_index < self.process_count:
            raise UserError(f"process_index {self.process_index} is not below process_count {self.process_count}")
        if self.global_batch < 1 or self.global_batch % self.process_count:
            raise UserError(
                f"global batch {self.global_batch} does not divide among {self.process_count} processes; "
                f"use a positive multiple of {self.process_count}"
            )
        if self.num_threads < 0 or self.prefetch_batches < self.num_threads:
            raise UserError(
                f"prefetch_batches {self.prefetch_batches} is below num_threads {self.num_threads}: "
                "every thread needs a batch to work on"
            )

    @property
    def process_batch(self) -> int:
        """Rows of a batch in this process."""
        return self.global_batch // self.process_count


class Batches(grain.DatasetIterator[Batch]):
    """Endless training batches of this process.

    A batch has the transform's arrays with a leading axis [b] and `example` int64 [b], the records' indices in the
    source.

    The state is the same on all processes and fits any number of them: save it once, as JSON. (`grain.checkpoint` takes
    this iterator too, but its files are named after the number of processes and are not found with another.)

    Args:
      source: records.
      transform: record -> arrays; called in threads.
      options: batch, seed, shard, threads.
      indices: records to train on, all by default.

    Raises:
      UserError: no indices, or indices that are repeated or out of range.
    """

    def __init__(
        self, source: Source, transform: Transform, options: LoaderOptions, indices: Sequence[int] | None = None
    ):
        # Before anything can raise: grain's destructor reads what this sets.
        super().__init__()
        indices = _checked_indices(source, range(len(source)) if indices is None else indices)

        def load(row: int, rng: np.random.Generator) -> dict[str, Any]:
            return _load(source, transform, int(indices[row]), rng)

        stream = (
            grain.MapDataset.range(len(indices))
            .shuffle(seed=_derived_seed(options.seed, "shuffle"))
            .repeat()
            .random_map(load, seed=_derived_seed(options.seed, "transform"))
        )
        self._parents = (_iterate(stream, options),)
        self._identity = {
            "num_examples": len(indices),
            "data": hashlib.sha256(source.fingerprint.encode() + indices.tobytes()).hexdigest(),
            "seed": options.seed,
            "global_batch": options.global_batch,
        }

    def __next__(self) -> Batch:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        """JSON-able: `position`, the global batches consumed, and what the stream depends on."""
        return {"position": self._parent.get_state()["next_index"], **self._identity}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues after `state["position"]` batches.

        Raises:
          UserError: the state is of other data, another seed or another batch, or is no state at all.
        """
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise UserError(f"data state {dict(state)} has no position; the checkpoint is not of this loader")
        for name, here in self._identity.items():
            if state.get(name) != here:
                raise UserError(
                    f"the checkpoint's data has {name} {state.get(name)!r} but this run has {here!r}; "
                    "resume with the same prompts, split, seed and batch, or start in a new workdir"
                )
        self._parent.set_state({"next_index": position})

    def __str__(self) -> str:
        return f"Batches({self._identity})"


class EvalBatches:
    """One pass over some records in the order given; iterate as often as needed.

    A batch has the arrays of a training batch and `valid` bool [b]. The rows after the last record are zeros with
    `valid` False and `example` -1, so every batch has the same shape and every process sees the same number of batches.

    Args and errors: as for `Batches`.
    """

    def __init__(self, source: Source, transform: Transform, options: LoaderOptions, indices: Sequence[int]):
        self._source = source
        self._transform = transform
        self._options = options
        self._indices = _checked_indices(source, indices)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self._indices) // self._options.global_batch)

    def __iter__(self) -> Iterator[Batch]:
        indices, rows = self._indices, len(self) * self._options.global_batch
        padding: dict[str, Any] = {}
        if rows > len(indices):
            template = self._transform(self._source[int(indices[0])], np.random.default_rng(0))
            padding = {name: np.zeros_like(value) for name, value in template.items()}
            padding |= {"example": np.int64(NO_EXAMPLE), "valid": np.False_}

        def load(row: int, rng: np.random.Generator) -> dict[str, Any]:
            if row >= len(indices):
                return padding
            return _load(self._source, self._transform, int(indices[row]), rng) | {"valid": np.True_}

        seed = _derived_seed(self._options.seed, "eval")
        iterator = _iterate(grain.MapDataset.range(rows).random_map(load, seed=seed), self._options)
        try:
            yield from iterator
        finally:
            iterator.close()


def _load(source: Source, transform: Transform, index: int, rng: np.random.Generator) -> dict[str, Any]:
    return {**transform(source[index], rng), "example": np.int64(index)}


def _iterate(stream: grain.MapDataset, options: LoaderOptions) -> grain.DatasetIterator:
    """Iterator over this process's part of the global batches of a stream."""
    # In batches of b rows, process p's part of global batch k is number k P + p.
    shards = stream.batch(options.process_batch, drop_remainder=True)
    mine = shards[options.process_index :: options.process_count]
    return iter(mine.to_iter_dataset(grain.ReadOptions(options.num_threads, options.prefetch_batches)))


def _checked_indices(source: Source, indices: Sequence[int]) -> np.ndarray:
    array = np.asarray(indices, np.int64)
    if array.ndim != 1 or not array.size:
        raise UserError(f"no examples to read: {array.size} of {len(source)} records are selected; give more data")
    if array.min() < 0 or array.max() >= len(source) or np.unique(array).size != array.size:
        raise UserError(f"record indices must be distinct and between 0 and {len(source) - 1}; split the records again")
    return array


def _derived_seed(seed: int, purpose: str) -> int:
    """Seed of 32 bits for one purpose; neighbours do not stay neighbours, because grain adds the epoch to a seed."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:4], "little")
