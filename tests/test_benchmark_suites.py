"""The suites of files, loops and compilation: both sides do the same work, and nothing is left behind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import benchmark
from experiments import benchmark_checkpoint as files
from experiments import benchmark_data as data
from experiments.benchmark_case import Case
from experiments.benchmark_compile import compile_calls
from experiments.benchmark_weights import weight_calls
from nd_jax.models.t5 import T5Config
from nd_jax.train.checkpoint import Checkpointer, complete_steps
from tests.text_encoder_case import tiny_config, write_prompts


def test_both_loaders_give_every_prompt_once_and_the_same_rows(tmp_path):
    ours, theirs = data.loader_calls(data.write_prompts(tmp_path, 400), 100, 1, workers=0)
    epochs = [{}, {}]
    for rows, take in zip(epochs, (ours, theirs), strict=True):
        for batch in (take() for _ in range(4)):
            batch = {name: np.asarray(values) for name, values in batch.items()}
            rows |= {int(i): (batch["ids"][k], batch["mask"][k]) for k, i in enumerate(batch["example"])}
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(400))
    for index, row in epochs[0].items():
        np.testing.assert_array_equal(row, epochs[1][index])


def test_a_run_takes_so_many_batches(tmp_path):
    ours, theirs = data.loader_calls(data.write_latents(tmp_path, 8, (3, 2, 4, 2)), 2, 3, workers=0)
    ours(), theirs()
    # The fourth batch of an epoch of four, with the rows that the first three did not have.
    for take in (ours, theirs):
        batch = take()
        assert batch["latents"].shape == (2, 3, 2, 4, 2) and len(set(np.asarray(batch["example"]).tolist())) == 2


def test_clips_are_decoded_at_every_reading(tmp_path):
    source, transform = data.write_clips(tmp_path, 2, frames=9, height=32, width=48)()
    record = source[1]
    assert source[1]["video"] is not record["video"] and len(source) == 2
    assert transform(record, np.random.default_rng(0))["video"].shape == (9, 32, 48, 3)


def test_what_was_saved_comes_back_on_both_sides(tmp_path):
    state = files.random_state(2 * files.ARRAYS * 4 * 5)
    calls = files.file_calls(tmp_path, state)
    for run in calls["save"]:
        run()
    assert complete_steps(tmp_path / "checkpoints") == [1]
    ours, theirs = (run() for run in calls["restore"])
    jax.tree.map(np.testing.assert_array_equal, ours, state)
    assert len(theirs) == 2 * files.ARRAYS
    np.testing.assert_array_equal(theirs["params.kernel_3"].numpy(), state.params["student"]["kernel_3"])


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    prompts = write_prompts(folder / "prompts.txt")
    config = tiny_config(**{"data.prompts": str(prompts), "num_steps": 2, "mesh.data": 8, "mesh.fsdp": 1})
    return files.Loop(config, folder)


def test_the_loader_in_the_loop(running):
    waited = []
    ours, theirs = files.loader_calls(running, 3, waited)
    step, position = int(running.state.step), running.batches.get_state()["position"]
    ours()
    assert int(running.state.step) == step + 3 and running.batches.get_state()["position"] == position + 3
    theirs()
    assert int(running.state.step) == step + 6 and running.batches.get_state()["position"] == position + 3
    assert len(waited) == 1 and waited[0] > 0


def test_one_save_in_the_loop(running, tmp_path):
    waited, saver = [], Checkpointer(tmp_path, keep=2, best_metric="", meta=files.META)
    ours, theirs = files.save_calls(running, saver, 2, waited)
    ours(), theirs(), ours()
    assert complete_steps(tmp_path / "checkpoints") == [0, 1] and len(waited) == 2


def test_weights_come_out_as_they_went_in(tmp_path):
    from safetensors.torch import load_file

    config = T5Config(vocab_size=16, d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=2)
    for run in weight_calls(tmp_path, config)["export"]:
        run()
    want = load_file(tmp_path / "source" / "model.safetensors")
    for path in (tmp_path / "export" / "source" / "model.safetensors", tmp_path / "model.safetensors"):
        got = load_file(path)
        assert got.keys() == want.keys() and all(bool((got[key] == want[key]).all()) for key in want)


def test_the_cache_is_filled_by_one_side_and_settings_stay(tmp_path):
    x = jax.ShapeDtypeStruct((3, 3), "float32")
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache
    cached, uncached = compile_calls(tmp_path, lambda: jax.jit(lambda x: jnp.sin(x) @ x).lower(x).compile())
    uncached()
    assert not list(tmp_path.iterdir())
    cached()
    entries = {path.name for path in tmp_path.glob("*-cache")}
    assert entries
    value = np.eye(3, dtype=np.float32)
    np.testing.assert_array_equal(cached()(value), uncached()(value))
    assert {path.name for path in tmp_path.glob("*-cache")} == entries
    assert (jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache) == before


def test_rates_and_waiting():
    case = Case("name", {}, None, amount=10, unit="prompts", waited=[9.0, 9.0, 0.1, 0.3])
    side = lambda median: {"median": median, "seconds": [median] * 2}
    got = benchmark.rates(case, {"nd_jax": side(2.0), "reference": side(4.0)})
    # Two runs were timed; those before them warmed up.
    assert got["rate"] == {"nd_jax": 5.0, "reference": 2.5, "unit": "prompts/s"}
    assert got["waited"] == [0.1, 0.3] and got["waited_share"] == pytest.approx(0.1)
    assert benchmark.shown_rates(got) == "5, 2.5 prompts/s; waited 10 %"
    assert benchmark.rates(Case("name", {}, None), {}) == {} and benchmark.shown_rates({}) == ""


def test_every_suite_has_cases():
    names = [case.name for suite in ("data", "checkpoint", "loop", "weights") for case in benchmark.SUITES[suite][1]()]
    assert "training loop with save, 100 steps" in names and len(set(names)) == len(names) == 9
