"""Checkpoints: state, data position and the whole config together, through Orbax.

A checkpoint `WORKDIR/checkpoints/<steps done>/` has the items

    params      trained role -> parameters
    ema         trained role -> moving average of its trainable parameters, when it is on (exports prefer it)
    optimizer   step, rng, optimiser states
    data        position of the data iterator
    meta        config, method, and source and hash of every frozen role (frozen weights are not saved)

Saving is asynchronous and sharded: every process writes its own shards, uncompressed, and flushes them to the disk. A
save that was cut short leaves a temporary folder that is never read. Restoring takes shardings, so that a run may
continue on another mesh.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from nd_jax.distill.base import merge
from nd_jax.errors import UserError, first_line
from nd_jax.files import write_text
from nd_jax.train.processes import lost_contact
from nd_jax.train.step import TrainState

CONFIG_FILE = "config.json"

# What may differ between a workdir and the config that continues it: how the run is executed, not what it computes.
RUNTIME_KEYS = ("mesh", "attention", "num_steps", "log_every", "eval_every", "checkpoint")


class Checkpointer:
    """Saves and restores `TrainState`s of one workdir.

    Args:
      workdir: the run's folder.
      keep: how many of the latest checkpoints stay.
      best_metric: a metric; the checkpoint with its highest value also stays ("": none).
      meta: what the `meta` item of every checkpoint holds.
    """

    def __init__(self, workdir: Path, keep: int, best_metric: str, meta: Mapping[str, Any]):
        policies = [checkpoint_managers.LatestN(keep)]
        if best_metric:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=lambda m: m[best_metric], n=1, keep_checkpoints_without_metrics=False
                )
            )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            # Makes the manager read the metrics of existing checkpoints when a run resumes.
            best_fn=(lambda m: m[best_metric]) if best_metric else None,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self.folder = (workdir / "checkpoints").resolve()
        self._meta = dict(meta)
        self._best = best_metric
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=_handlers())

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, data_state: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Starts a save; the files are complete when a later call of `wait` returns.

        Raises:
          UserError: this or an earlier save failed (a full disk, say). Earlier checkpoints are untouched.
        """
        if step in self._manager.all_steps():
            return
        best = {self._best: metrics[self._best]} if self._best in metrics else None
        arrays = {name: ocp.args.PyTreeSave(item) for name, item in _array_items(state).items()}
        json_items = {"data": ocp.args.JsonSave(dict(data_state)), "meta": ocp.args.JsonSave(self._meta)}
        items = ocp.args.Composite(**arrays, **json_items)
        with self._reporting(step):
            self._manager.save(step, args=items, metrics=best)

    def wait(self) -> None:
        """Blocks until everything is on disk. Raises UserError as `save`."""
        with self._reporting(None):
            self._manager.wait_until_finished()

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """State and data position.

        Args:
          step: one of the saved steps.
          abstract: `jax.ShapeDtypeStruct`s with the shardings to restore to.

        Raises:
          UserError: the checkpoint is damaged, has other shapes, or was made with other frozen weights.
        """
        where = self.folder / str(step)
        arrays = {name: _restore_args(item) for name, item in _array_items(abstract).items()}
        items = ocp.args.Composite(**arrays, data=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # Orbax and TensorStore raise many types; each means that this folder cannot be read
            if lost_contact(error):
                raise
            raise UserError(_damaged(where, error)) from error
        saved, ours = restored["meta"]["frozen"], self._meta["frozen"]
        for role in ours:
            if saved.get(role) != ours[role]:
                raise UserError(
                    f"checkpoint {where} was made with the frozen {role} {saved.get(role)}, this run has {ours[role]}: "
                    "give the same weights, or another --workdir"
                )
        ema = restored["ema"] if abstract.ema else {}
        state = TrainState(params=restored["params"], ema=ema, **restored["optimizer"])
        return state, restored["data"]

    def close(self) -> None:
        self._manager.close()

    def _reporting(self, step: int | None) -> "_SaveErrors":
        return _SaveErrors(self, step)


class _SaveErrors:
    """Turns a failed save into a one-line error that says what is still good."""

    def __init__(self, checkpointer: Checkpointer, step: int | None):
        self._checkpointer, self._step = checkpointer, step

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None or not isinstance(error, Exception) or lost_contact(error):
            return
        what = "a checkpoint" if self._step is None else f"the checkpoint of step {self._step} or the one before it"
        raise UserError(
            f"could not save {what} in {self._checkpointer.folder} ({first_line(error)}): free disk space and run the "
            f"same command again; complete checkpoints: {complete_steps(self._checkpointer.folder) or 'none'}"
        ) from error


ARRAY_ITEMS, JSON_ITEMS = ("params", "optimizer", "ema"), ("data", "meta")


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    """Item -> how it is written. Checkpoints of earlier versions, which are compressed, are read by the same ones."""
    # Trained float32 values shrink by 6 %, for three times the processor time of writing them as they are.
    arrays = {name: ocp.PyTreeCheckpointHandler(use_compression=False) for name in ARRAY_ITEMS}
    return arrays | {name: ocp.JsonCheckpointHandler() for name in JSON_ITEMS}


def _restore_args(item: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(item, restore_args=ocp.checkpoint_utils.construct_restore_args(item))


def _array_items(state: TrainState) -> dict[str, Any]:
    optimizer = {"step": state.step, "rng": state.rng, "opt_state": state.opt_state}
    return {"params": state.params, "optimizer": optimizer} | ({"ema": state.ema} if state.ema else {})


def _damaged(where: Path, error: BaseException) -> str:
    others = [s for s in complete_steps(where.parent) if s != int(where.name)]
    remedy = f"remove that folder to continue from step {others[-1]}" if others else "remove that folder to start anew"
    return f"checkpoint {where} cannot be read ({first_line(error)}): {remedy}"


def complete_steps(folder: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit()) if folder.exists() else []


def abstract_with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes and dtypes with shardings attached, what `restore` takes."""
    attach = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(attach, abstract, shardings)


def claim_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Writes the config into a new workdir; refuses a workdir that another config made.

    Raises:
      UserError: names the keys that differ. `RUNTIME_KEYS` may differ.
    """
    path = workdir / CONFIG_FILE
    if path.exists():
        differences = _differences(json.loads(path.read_text()), json.loads(json.dumps(config)))
        if differences:
            shown = "; ".join(f"{key}: {old!r} there, {new!r} here" for key, old, new in differences[:5])
            more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
            raise UserError(f"{workdir} was made by another config ({shown}{more}): choose another --workdir")
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write to workdir {workdir} ({error.strerror or error})") from error


def _differences(old: Mapping, new: Mapping, prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for key in sorted(set(old) | set(new)):
        path = prefix + key
        if path in RUNTIME_KEYS or old.get(key) == new.get(key):
            continue
        if isinstance(old.get(key), Mapping) and isinstance(new.get(key), Mapping):
            found += _differences(old[key], new[key], path + ".")
        else:
            found.append((path, old.get(key), new.get(key)))
    return found


def load_params(workdir: Path, step: int | None = None, ema: bool = True) -> tuple[dict, dict, int]:
    """Parameters of a checkpoint as numpy arrays, its meta, and its step (for exports; no mesh needed).

    Args:
      workdir: a run's folder.
      step: which checkpoint; the latest when None.
      ema: take the moving averages of trained parameters where the run kept them.

    Raises:
      UserError: there is none, or it is damaged.
    """
    folder = (workdir / "checkpoints").resolve()
    steps = complete_steps(folder)
    if not steps:
        raise UserError(f"{workdir} has no checkpoint in {folder}: give the --workdir of a training run")
    if step is not None and step not in steps:
        raise UserError(f"{workdir} has no checkpoint of step {step}: the steps are {steps}")
    step = steps[-1] if step is None else step
    where = folder / str(step)
    try:
        meta = json.loads((where / "meta" / "metadata").read_text())
        params = _read_arrays(where / "params")
        averages = _read_arrays(where / "ema") if ema and (where / "ema").exists() else {}
    except Exception as error:  # as in `Checkpointer.restore`
        raise UserError(_damaged(where, error)) from error
    params = {role: merge(tree, averages.get(role, {})) for role, tree in params.items()}
    return params, meta, step


def _read_arrays(folder: Path) -> dict:
    """One item of a checkpoint on the host."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        structure = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), structure)
        return checkpointer.restore(folder, restore_args=as_numpy)
