"""The loop: resume, SIGTERM, divergence, foreign workdirs, damaged checkpoints. The kill test is in test_kill.py."""

import json
import os
import signal

import numpy as np
import pytest

from nd_jax.errors import UserError
from nd_jax.train.checkpoint import complete_steps, load_params
from nd_jax.train.loop import Diverged, train
from nd_jax.train.metrics import read_metrics
from tests.toy_method import ToyBatches, toy_config, toy_eval, toy_method


def run(workdir, batches=None, method=None, **changes):
    return train(toy_config(**changes), method or toy_method(), batches or ToyBatches(16), toy_eval, workdir)


def losses(workdir):
    return {m["step"]: m["train/loss"] for m in read_metrics(workdir / "metrics.jsonl") if "train/loss" in m}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    result = run(workdir)
    assert result.step == 12 and not result.interrupted
    return workdir


class Interrupting(ToyBatches):
    """Sends SIGTERM to this process when batch `at` is read."""

    at = 5

    def __next__(self):
        if self.position == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__next__()


def test_sigterm_saves_and_the_resumed_run_is_the_same_bit_by_bit(tmp_path, undisturbed):
    result = run(tmp_path, Interrupting(16))
    assert result.interrupted and result.step == 6 and 6 in complete_steps(tmp_path / "checkpoints")
    run(tmp_path)
    assert losses(tmp_path) == losses(undisturbed)
    assert sorted(losses(tmp_path)) == list(range(1, 13))


def test_resume_on_another_mesh(tmp_path, undisturbed):
    run(tmp_path, Interrupting(16))
    run(tmp_path, mesh={"data": 1, "fsdp": 8, "tensor": 1})
    a, b = losses(tmp_path), losses(undisturbed)
    np.testing.assert_allclose([a[s] for s in sorted(b)], [b[s] for s in sorted(b)], rtol=1e-5)


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tmp_path, undisturbed):
    run(tmp_path, Interrupting(16))
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(json.dumps({"step": 8, "train/loss": 99.0}) + '\n{"step": 9, "tra')
    run(tmp_path)
    assert losses(tmp_path) == losses(undisturbed)


def test_divergence_names_step_examples_and_checkpoint_and_saves_nothing_bad(tmp_path):
    with pytest.raises(Diverged) as error:
        run(tmp_path, ToyBatches(16, poison_at=7))
    message = str(error.value)
    assert "at step 8" in message and "112, 113" in message and str(tmp_path / "checkpoints" / "6") in message
    assert "\n" not in message
    assert complete_steps(tmp_path / "checkpoints") == [3, 6]


def test_divergence_in_a_step_that_would_be_saved(tmp_path):
    with pytest.raises(Diverged, match="no checkpoint was saved yet"):
        run(tmp_path, ToyBatches(16, poison_at=2))
    assert complete_steps(tmp_path / "checkpoints") == []


def test_keeps_the_latest_and_the_best(undisturbed):
    # eval/score rises until the end here, so the best is among the latest.
    assert complete_steps(undisturbed / "checkpoints") == [9, 12]
    scores = [m["eval/score"] for m in read_metrics(undisturbed / "metrics.jsonl") if "eval/score" in m]
    assert scores[-1] == max(scores)


def test_workdir_of_another_config(undisturbed):
    with pytest.raises(UserError, match=r"optimizer.learning_rate: 0.01 there, 0.5 here"):
        run(undisturbed, optimizer=toy_config()["optimizer"] | {"learning_rate": 0.5})


def test_another_teacher_is_refused(tmp_path):
    run(tmp_path, num_steps=3)
    with pytest.raises(UserError, match="frozen teacher"):
        run(tmp_path, method=toy_method(teacher_seed=8))


def test_truncated_checkpoint_names_the_one_to_go_back_to(tmp_path):
    run(tmp_path, num_steps=6)
    # OCDBT data files hold the arrays; cut the newest ones short, as a failing disk would.
    for path in (tmp_path / "checkpoints" / "6" / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(UserError) as error:
        run(tmp_path)
    assert "cannot be read" in str(error.value) and "continue from step 3" in str(error.value)
    assert complete_steps(tmp_path / "checkpoints") == [3, 6]


def test_what_orbax_leaves_of_a_failed_restore_fails_no_later_test(tmp_path):
    """Where arrays fail first, it drops the reading of their metadata, sometimes before that has begun; here always."""
    from orbax.checkpoint._src.metadata.array_metadata_store import Store

    reading = Store()._get_array_metadatas(tmp_path)
    del reading


def test_batch_that_does_not_divide(tmp_path):
    with pytest.raises(UserError, match="batch_size 12 does not divide"):
        run(tmp_path, batch_size=12)


def test_exports_prefer_the_moving_average(undisturbed):
    raw, _, _ = load_params(undisturbed, ema=False)
    averaged, meta, step = load_params(undisturbed)
    assert step == 12 and meta["config"]["ema_decay"] == 0.9
    np.testing.assert_array_equal(averaged["student"]["offset"], raw["student"]["offset"])
    assert not np.array_equal(averaged["student"]["layer"]["kernel"], raw["student"]["layer"]["kernel"])


def test_a_finished_run_keeps_its_result(undisturbed):
    again = run(undisturbed)
    assert again.step == 12 and {"eval/score", "train/loss", "train/grad_norm"} <= set(again.metrics)


class InterruptingLate(Interrupting):
    at = 9


def test_a_checkpoint_is_ranked_by_its_own_evaluation(tmp_path):
    """Evaluated at 8, interrupted at 10: the checkpoint of 10 has no score to borrow, and 8 stays as the best."""
    settings = {"every": 2, "keep": 1, "best_metric": "eval/score"}
    assert run(tmp_path, InterruptingLate(16), checkpoint=settings, eval_every=8).step == 10
    folder = tmp_path / "checkpoints"
    assert complete_steps(folder) == [8, 10]
    assert (folder / "8" / "metrics").exists() and not (folder / "10" / "metrics").exists()
