"""The batch pipeline: order, shards, state, randomness and the held-out pass."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest
from grain.checkpoint import CheckpointRestore, CheckpointSave
from hypothesis import given
from hypothesis import strategies as st

from nd_jax.data.loader import Batches, EvalBatches, LoaderOptions
from nd_jax.data.prompts import PromptTransform
from nd_jax.errors import UserError

WIDTH = 3
# Grain's shuffle searches among 65536 numbers for one below the count: very small counts take it milliseconds a record.
COUNT = 100


class Numbers:
    """Record i is the number i + 100."""

    def __init__(self, count, fingerprint="numbers"):
        self.count = count
        self.fingerprint = fingerprint

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        assert 0 <= index < self.count
        return index + 100


def transform(record, rng):
    """A row that names its record, and a draw that tells two generators apart."""
    return {"ids": np.full(WIDTH, record, np.int32), "draw": np.float32(rng.random())}


def make(count=COUNT, batch=8, seed=0, process=0, processes=1, indices=None, source=None, threads=0):
    options = LoaderOptions(batch, seed, process, processes, num_threads=threads, prefetch_batches=2 * threads)
    return Batches(source or Numbers(count), transform, options, indices)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def global_batches(number, **kwargs):
    """The first `number` batches of all processes, put together by rows."""
    processes = kwargs.get("processes", 1)
    parts = [take(make(process=p, **kwargs), number) for p in range(processes)]
    return [{k: np.concatenate([part[i][k] for part in parts]) for k in parts[0][i]} for i in range(number)]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name].dtype == b[name].dtype
            np.testing.assert_array_equal(a[name], b[name])


def test_shapes_and_types():
    for batch in take(make(), 3):
        assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
            "ids": ((8, WIDTH), "int32"),
            "draw": ((8,), "float32"),
            "example": ((8,), "int64"),
        }
        np.testing.assert_array_equal(batch["ids"][:, 0], batch["example"] + 100)


@given(st.integers(1, 30), st.integers(1, 9), st.integers(0, 2**40))
def test_every_epoch_visits_each_example_once(count, batch, seed):
    epochs = 3
    batches = take(make(count, batch, seed), -(-epochs * count // batch))
    stream = np.concatenate([b["example"] for b in batches])[: epochs * count].reshape(epochs, count)
    for epoch in stream:
        assert sorted(epoch) == list(range(count))


def test_epochs_and_seeds_have_different_orders():
    orders = [take(make(50, 50, seed), 3)[epoch]["example"].tolist() for seed in range(4) for epoch in range(3)]
    assert len(set(map(tuple, orders))) == len(orders)
    assert list(range(50)) not in orders


@given(st.integers(60, COUNT), st.integers(1, 5), st.integers(0, 1000))
def test_global_batches_do_not_depend_on_the_number_of_processes(count, rows, seed):
    batch = 4 * rows
    expected = global_batches(6, count=count, batch=batch, seed=seed)
    for processes in (2, 4):
        assert_same(global_batches(6, count=count, batch=batch, seed=seed, processes=processes), expected)


@given(st.integers(0, 16), st.integers(0, 6), st.sampled_from([1, 2, 4]), st.integers(0, 100))
def test_restoring_continues_the_same_stream_on_any_number_of_processes(position, wasted, processes, seed):
    kwargs = dict(count=COUNT, batch=8, seed=seed)
    expected = global_batches(position + 4, **kwargs)[position:]
    saver = make(**kwargs)
    take(saver, position)
    state = json.loads(json.dumps(saver.get_state()))
    assert state["position"] == position
    assert_same(take(saver, 4), expected)

    parts = []
    for process in range(processes):
        restored = make(process=process, processes=processes, threads=2, **kwargs)
        take(restored, wasted)  # whatever was read ahead before is dropped
        restored.set_state(state)
        parts.append(take(restored, 4))
        assert restored.get_state() == saver.get_state()
        restored.close()
    joined = [{k: np.concatenate([part[i][k] for part in parts]) for k in expected[0]} for i in range(4)]
    assert_same(joined, expected)


def test_threads_do_not_change_the_stream():
    expected = take(make(batch=12), 20)
    threaded = make(batch=12, threads=4)
    assert_same(take(threaded, 20), expected)
    assert threaded.get_state()["position"] == 20
    threaded.close()


def test_the_state_counts_what_was_handed_out_not_what_was_read_ahead():
    iterator = make(threads=2)
    iterator.start_prefetch()
    assert iterator.get_state()["position"] == 0
    next(iterator)
    assert iterator.get_state()["position"] == 1
    iterator.close()


def test_far_positions():
    """A position of a long run: beyond 2^32 records."""
    iterator = make(batch=50)
    iterator.set_state({**iterator.get_state(), "position": 4 * 10**9})
    stream = np.concatenate([b["example"] for b in take(iterator, 4)])
    assert sorted(stream[:COUNT]) == sorted(stream[COUNT:]) == list(range(COUNT))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("seed", {"seed": 1}),
        ("global_batch", {"batch": 16}),
        ("num_examples", {"indices": [0, 1, 2]}),
        ("data", {"indices": list(reversed(range(COUNT)))}),
        ("data", {"source": Numbers(COUNT, "other numbers")}),
    ],
)
def test_a_state_of_something_else_is_refused(name, change):
    other = make(**change)
    with pytest.raises(UserError, match=f"the checkpoint's data has {name} "):
        other.set_state(make().get_state())
    assert other.get_state()["position"] == 0


@pytest.mark.parametrize("state", [{}, {"position": -1}, {"position": "3"}, {"next_index": 3}])
def test_no_state_at_all_is_refused(state):
    with pytest.raises(UserError, match="has no position"):
        make().set_state(state)


def test_grain_and_orbax_checkpoint_it(tmp_path):
    iterator = make()
    take(iterator, 3)
    checkpointer = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
    checkpointer.save(tmp_path / "c", ocp.args.Composite(data=CheckpointSave(iterator)))
    expected = take(iterator, 3)
    restored = make()
    checkpointer.restore(tmp_path / "c", ocp.args.Composite(data=CheckpointRestore(restored)))
    assert_same(take(restored, 3), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch": 6, "process_count": 4}, "global batch 6 does not divide among 4 processes"),
        ({"global_batch": 0}, "global batch 0"),
        ({"global_batch": 4, "process_index": 2, "process_count": 2}, "process_index 2 is not below process_count 2"),
        ({"global_batch": 4, "num_threads": 4, "prefetch_batches": 2}, "prefetch_batches 2 is below num_threads 4"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        LoaderOptions(**options)


@pytest.mark.parametrize("indices", [[0, 0], [-1], [10], [1, 10]])
def test_bad_indices(indices):
    for kind in (Batches, EvalBatches):
        with pytest.raises(UserError, match="distinct and between 0 and 9"):
            kind(Numbers(10), transform, LoaderOptions(2), indices)
        with pytest.raises(UserError, match="no examples to read"):
            kind(Numbers(10), transform, LoaderOptions(2), [])


def test_only_the_chosen_records_are_read():
    stream = np.concatenate([b["example"] for b in take(make(count=10, batch=3, indices=[7, 2, 4]), 4)])
    assert set(stream.tolist()) == {2, 4, 7}


def test_an_error_in_a_record_reaches_the_reader():
    class Broken(Numbers):
        def __getitem__(self, index):
            raise UserError(f"record {index} is broken")

    for threads in (0, 2):
        iterator = make(source=Broken(10), threads=threads)
        with pytest.raises(UserError, match="is broken"):
            next(iterator)
        iterator.close()


# Held-out pass.


def eval_batches(count, batch, indices, process=0, processes=1, threads=0):
    options = LoaderOptions(batch, 0, process, processes, num_threads=threads, prefetch_batches=2 * threads)
    return EvalBatches(Numbers(count), transform, options, indices)


@given(st.integers(1, 25), st.integers(1, 3), st.sampled_from([1, 2, 4]), st.data())
def test_held_out_pass_has_every_record_once_in_order(count, rows, processes, data):
    indices = data.draw(st.permutations(range(count)))[: data.draw(st.integers(1, count))]
    batch = 4 * rows
    passes = [list(eval_batches(count, batch, indices, p, processes)) for p in range(processes)]
    assert {len(batches) for batches in passes} == {-(-len(indices) // batch)}
    shapes = {(k, v.shape, v.dtype.name) for batches in passes for b in batches for k, v in b.items()}
    b = batch // processes
    assert shapes == {
        ("ids", (b, WIDTH), "int32"),
        ("draw", (b,), "float32"),
        ("example", (b,), "int64"),
        ("valid", (b,), "bool"),
    }
    joined = {k: np.concatenate([p[i][k] for i in range(len(passes[0])) for p in passes]) for k in passes[0][0]}
    assert joined["valid"].tolist() == [True] * len(indices) + [False] * (len(joined["valid"]) - len(indices))
    assert joined["example"][joined["valid"]].tolist() == list(indices)
    assert (joined["example"][~joined["valid"]] == -1).all()
    np.testing.assert_array_equal(joined["ids"][joined["valid"], 0], np.array(indices) + 100)
    assert not joined["ids"][~joined["valid"]].any()


def test_held_out_pass_repeats_exactly_and_may_be_left_early():
    batches = eval_batches(9, 4, range(9), threads=2)
    assert len(batches) == 3
    for _ in batches:
        break
    assert_same(list(batches), list(eval_batches(9, 4, range(9))))


# Caption dropout.


def caption_stream(probability, seed=0, processes=1, count=640, batches=40):
    """Whether each caption of the stream was dropped, bool [batches * batch]."""

    def tokenize(text):
        return {"ids": np.array([len(text)], np.int32)}

    captions = ["caption"] * count
    source = type("Captions", (list,), {"fingerprint": "captions"})(captions)
    parts = []
    for process in range(processes):
        options = LoaderOptions(64, seed, process, processes, num_threads=0, prefetch_batches=0)
        parts.append(take(Batches(source, PromptTransform(tokenize, probability), options), batches))
    return np.concatenate([part[i]["ids"][:, 0] for i in range(batches) for part in parts]) == 0


def test_dropout_has_its_rate():
    assert not caption_stream(0.0).any()
    assert caption_stream(1.0).all()
    for probability in (0.1, 0.5):
        dropped = caption_stream(probability)
        deviation = np.sqrt(probability * (1 - probability) / dropped.size)
        assert abs(dropped.mean() - probability) < 4 * deviation


def test_dropout_depends_on_seed_and_position_only():
    dropped = caption_stream(0.3)
    np.testing.assert_array_equal(dropped, caption_stream(0.3, processes=4))
    assert (dropped != caption_stream(0.3, seed=1)).any()
    batches = dropped.reshape(-1, 64)
    assert len({tuple(batch) for batch in batches}) == len(batches)
    # Independent neighbours: both dropped with probability 0.09, standard deviation 0.006.
    assert abs((dropped[1:] & dropped[:-1]).mean() - 0.09) < 0.03


def test_dropout_must_be_a_probability():
    for probability in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="not a probability"):
            PromptTransform(len, probability)
