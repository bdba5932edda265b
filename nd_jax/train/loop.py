"""The training loop: one for every method.

The device never waits for the host: the step is dispatched, then the metrics of the step before it are fetched, then
the next batch is read. Two things wait on purpose: checkpoints, because a step's metrics must be known to be finite
before its state is saved, and evaluation.
"""

import dataclasses
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from nd_jax.distill.base import Distillation, Mean
from nd_jax.errors import UserError
from nd_jax.train import checkpoint, metrics, optimizer, sharding
from nd_jax.train import step as steps
from nd_jax.train.processes import lost_contact


class BatchIterator(Protocol):
    """Endless iterator over this process's rows, whose position can be saved and set."""

    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: Mapping[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: `step` reached, `interrupted` by SIGTERM, the last metrics of each kind."""

    step: int
    interrupted: bool
    metrics: dict[str, float]


class Diverged(UserError):
    """A loss or gradient is not finite, or a metric left the limits that its method sets."""


# Columns of a batch that stay on the host: they identify examples and are no input of a loss.
HOST_COLUMNS = ("example",)


def train(
    config: Mapping[str, Any],
    method: Distillation,
    train_batches: BatchIterator,
    eval_batches: Callable[[], Iterable[dict[str, np.ndarray]]],
    workdir: Path,
) -> Result:
    """Trains until `config["num_steps"]`, resuming from the newest checkpoint of the workdir.

    Args:
      config: plain dictionary; the keys used here are seed, num_steps, batch_size, unit, mesh, microbatches,
        ema_decay, optimizer (one, or one per role under its name), log_every, eval_every and checkpoint (every, keep,
        best_metric).
      method: losses and roles.
      train_batches: rows of this process.
      eval_batches: makes an iterator over all held-out rows, padded to a constant shape.
      workdir: checkpoints, metrics.jsonl, tensorboard/ and config.json.

    Raises:
      Diverged: a loss or gradient norm was not finite, or an evaluation is out of the method's limits; nothing bad
        was saved.
      UserError: bad config, other workdir, damaged checkpoint, full disk.
    """
    checkpoint.claim_workdir(workdir, config)
    mesh = sharding.make_mesh(config["mesh"])
    check_batch(config, mesh)
    roles = steps.trained_roles(method)
    optimizers = make_optimizers(config, method)
    schedules = {r: optimizer.make_schedule(_optimizer_config(config, r), _updates(config, method, r)) for r in roles}

    with jax.set_mesh(mesh), StopSignal() as stop:
        abstract = abstract_state(config, method, optimizers)
        shardings = steps.state_shardings(abstract, method, optimizers, mesh)
        frozen_shardings = steps.frozen_shardings(method, mesh)
        frozen = {n: _materialise(method.roles[n], s) for n, s in frozen_shardings.items()}
        meta = {
            "method": method.name,
            "config": config,
            "frozen": {n: {"source": method.roles[n].source, "sha256": method.roles[n].sha256()} for n in frozen},
        }
        saver = checkpoint.Checkpointer(
            workdir, config["checkpoint"]["keep"], config["checkpoint"]["best_metric"], meta
        )
        start = saver.latest() or 0
        if start:
            state, data_state = saver.restore(start, checkpoint.abstract_with_shardings(abstract, shardings))
            train_batches.set_state(data_state)
        else:
            params = {n: _materialise(method.roles[n], shardings.params[n]) for n in roles}
            create = lambda p: steps.new_state(method, p, optimizers, config["ema_decay"] > 0, config["seed"])
            state = jax.jit(create, out_shardings=shardings)(params)

        train_steps = make_train_steps(config, method, optimizers, shardings, frozen_shardings, mesh)
        eval_step = steps.make_eval_step(method, shardings, frozen_shardings, mesh)

        writer = metrics.MetricsWriter(workdir, start)
        progress = metrics.Progress(start, config["num_steps"], config["batch_size"], config["unit"])
        if start:
            progress.message(f"resuming from step {start} of {saver.folder}")
        last = _last_metrics(workdir)
        pending: _Pending | None = None

        def settle() -> None:
            """Fetches the pending metrics, checks them, and logs them when it is their turn."""
            nonlocal pending
            if pending is None:
                return
            done, pending = pending, None
            values = {f"train/{k}": float(v) for k, v in jax.device_get(done.values).items()}
            _check_finite(values, done, saver)
            progress.advance(done.step)
            if done.step % config["log_every"] == 0 or done.step == config["num_steps"]:
                values["train/learning_rate"] = float(schedules[done.role](done.update))
                last.update(values)
                shown = {"loss": values["train/loss"], "grad_norm": values["train/grad_norm"]}
                rate = progress.report(done.step, shown)
                writer.write(done.step, values | {f"time/{config['unit']}_per_s": rate})

        def evaluate(step: int) -> None:
            nonlocal evaluated
            evaluated = step
            values = {
                f"eval/{k}": v for k, v in _evaluate(eval_step, state, frozen, eval_batches, method, mesh).items()
            }
            last.update(values)
            writer.write(step, values)
            progress.message(f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items()))
            _check_limits(values, method, step, saver)

        step, saved, evaluated = start, start, None
        try:
            if start == 0:
                evaluate(0)
            while step < config["num_steps"]:
                role = method.schedule[step % len(method.schedule)]
                batch = next(train_batches)
                on_device = {k: v for k, v in batch.items() if k not in HOST_COLUMNS}
                state, values = train_steps[role](state, frozen, sharding.global_batch(on_device, mesh))
                step += 1
                settle()
                update = _updates_before(step, method, role) - 1
                pending = _Pending(step, role, update, values, batch.get("example"))
                finished = step == config["num_steps"]
                if step % config["eval_every"] == 0 or finished:
                    settle()
                    evaluate(step)
                stopping = stop.requested(step, config["log_every"])
                if step % config["checkpoint"]["every"] == 0 or finished or stopping:
                    settle()
                    # A checkpoint is ranked by an evaluation of itself, not by one of an earlier state.
                    ranked = last if evaluated == step else {}
                    saver.save(step, state, train_batches.get_state(), ranked)
                    saved = step
                if stopping and not finished:
                    saver.wait()
                    progress.message(
                        f"SIGTERM: saved step {saved} in {saver.folder}; the same command continues from there"
                    )
                    return Result(step, True, dict(last))
            saver.wait()
            return Result(step, False, dict(last))
        finally:
            progress.close()
            writer.close()
            _close(saver)


@dataclasses.dataclass(frozen=True)
class _Pending:
    """Metrics of a dispatched step, still on the device."""

    step: int
    role: str
    update: int
    values: dict[str, jax.Array]
    examples: np.ndarray | None


class StopSignal:
    """Remembers SIGTERM, so that the loop can save and leave between two steps.

    With several processes the flag is shared by a collective every `interval` steps: all processes must stop at the
    same step, whichever of them was told to.
    """

    def __init__(self):
        self._set = threading.Event()

    def __enter__(self) -> "StopSignal":
        # Signal handlers belong to the main thread; elsewhere (a notebook's worker, a test) there is nothing to catch.
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._set.set())
        return self

    def __exit__(self, *_):
        if self._main:
            signal.signal(signal.SIGTERM, self._previous)

    def requested(self, step: int, interval: int) -> bool:
        if jax.process_count() == 1:
            return self._set.is_set()
        if step % interval:
            return False
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.array(self._set.is_set()))))


def _last_metrics(workdir: Path) -> dict[str, float]:
    """The latest value of every metric of an earlier part of the run, so that a finished run still has a result."""
    lines = metrics.read_metrics(workdir / "metrics.jsonl")
    return {k: v for line in lines for k, v in line.items() if k.startswith(("train/", "eval/"))}


def make_optimizers(config: Mapping[str, Any], method: Distillation) -> steps.Optimizers:
    """Trained role -> its optimiser, whose schedule spans the updates of that role alone."""
    make = lambda role: optimizer.make_optimizer(_optimizer_config(config, role), _updates(config, method, role))
    return {role: make(role) for role in steps.trained_roles(method)}


def make_train_steps(
    config: Mapping[str, Any],
    method: Distillation,
    optimizers: steps.Optimizers,
    shardings: steps.TrainState,
    frozen_shardings: dict,
    mesh: jax.sharding.Mesh,
) -> dict[str, Callable]:
    """Trained role -> its jitted step, see `step.make_train_step`."""
    numbers = {name: config[name] for name in ("microbatches", "ema_decay")}
    return {
        role: steps.make_train_step(method, role, optimizers[role], shardings, frozen_shardings, mesh, **numbers)
        for role in steps.trained_roles(method)
    }


def check_batch(config: Mapping[str, Any], mesh: jax.sharding.Mesh) -> None:
    """Raises UserError unless the batch divides among the devices and microbatches."""
    rows, micro = config["batch_size"], config["microbatches"]
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % (split * micro):
        raise UserError(
            f"batch_size {rows} does not divide by data x fsdp x microbatches = {mesh.shape['data']} x "
            f"{mesh.shape['fsdp']} x {micro}: change batch_size, mesh or microbatches"
        )


def _optimizer_config(config: Mapping[str, Any], role: str) -> Mapping[str, Any]:
    return config["optimizer"].get(role, config["optimizer"])


def _updates_before(step: int, method: Distillation, role: str) -> int:
    """How many of the first `step` steps update a role."""
    whole, rest = divmod(step, len(method.schedule))
    return whole * method.schedule.count(role) + method.schedule[:rest].count(role)


def _updates(config: Mapping[str, Any], method: Distillation, role: str) -> int:
    return _updates_before(config["num_steps"], method, role)


def abstract_state(config: Mapping[str, Any], method: Distillation, optimizers: steps.Optimizers) -> steps.TrainState:
    """Shapes and dtypes of the state."""
    params = {n: method.roles[n].abstract for n in steps.trained_roles(method)}
    return jax.eval_shape(lambda p: steps.new_state(method, p, optimizers, config["ema_decay"] > 0, 0), params)


def _materialise(role: Any, shardings: dict) -> dict:
    """The role's weights on the mesh: computed there from a seed, or read on the host and placed."""
    if role.init is not None:
        return jax.jit(role.init, out_shardings=shardings)()
    return sharding.place(role.load(), shardings)


def _evaluate(eval_step, state, frozen, eval_batches, method: Distillation, mesh) -> dict[str, float]:
    totals: dict[str, np.ndarray] = {}
    for batch in eval_batches():
        on_device = {k: v for k, v in batch.items() if k not in HOST_COLUMNS}
        means: dict[str, Mean] = eval_step(state.params, frozen, sharding.global_batch(on_device, mesh))
        for name, mean in jax.device_get(means).items():
            totals[name] = totals.get(name, 0.0) + np.array([mean.total, mean.weight], np.float64)
    return method.summarize({name: float(t / max(w, 1e-8)) for name, (t, w) in totals.items()})


def _check_finite(values: Mapping[str, float], done: _Pending, saver: checkpoint.Checkpointer) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if not bad:
        return
    kept = _last_good(saver)
    ids = [] if done.examples is None else [int(i) for i in done.examples]
    shown = ", ".join(map(str, ids[:64])) + (f" and {len(ids) - 64} more" if len(ids) > 64 else "")
    raise Diverged(
        f"{bad[0]} is {values[bad[0]]} at step {done.step}; examples of that batch: {shown}; {kept}. "
        "Lower the learning rate, clip gradients (optimizer.clip_norm), or look at those examples"
    )


def _check_limits(values: Mapping[str, float], method: Distillation, step: int, saver: checkpoint.Checkpointer) -> None:
    for name, (low, high) in method.limits.items():
        if not low <= values[f"eval/{name}"] <= high:
            raise Diverged(
                f"collapse: {name} is {values[f'eval/{name}']:.4g} at step {step}, outside of {low:g} to {high:g}; "
                f"{_last_good(saver)}. Go on from an earlier checkpoint with a lower learning rate; see the curves of "
                "metrics.jsonl for when it began"
            )


def _last_good(saver: checkpoint.Checkpointer) -> str:
    good = saver.latest()
    return f"last good checkpoint: {saver.folder / str(good)}" if good is not None else "no checkpoint was saved yet"


def _close(saver: checkpoint.Checkpointer) -> None:
    """Waits for saves in flight. An error that is already on its way is not replaced by a second one."""
    in_flight = sys.exc_info()[1]
    if lost_contact(in_flight):
        return  # A save needs all processes.
    try:
        saver.close()
    except Exception as error:
        if in_flight is None:
            raise UserError(
                f"could not finish saving to {saver.folder} ({error}): free disk space and run again"
            ) from error
