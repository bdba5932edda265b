"""Benchmark cases of checkpoints, and of what checkpoints and the loader cost a training loop.

save, restore    a state of random numbers through `Checkpointer`, against torch.save and torch.load of the same
                 arrays. Both flush what they write to the same disk. What is read was just written and lies in the
                 system's cache.
training loop    steps of the tiny text encoder, dispatched as `nd_jax.train.loop` does, with one save in as many
                 steps as its config has between two, against the same steps without; and with the loader,
                 against one batch that is used again. The ratio less 1 is the cost as a share of the steps.
"""

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.packages import need
from experiments.benchmark_case import Case
from nd_jax.data.registry import build_data
from nd_jax.data.toy_prompts import toy_prompts
from nd_jax.distill.registry import build_method, resolve_config
from nd_jax.train import loop, sharding
from nd_jax.train import step as steps
from nd_jax.train.checkpoint import Checkpointer
from nd_jax.train.step import TrainState

META = {"method": "benchmark", "config": {}, "frozen": {}}
ARRAYS = 16


# --- files ------------------------------------------------------------------------------------------------------------


def random_state(size: int) -> TrainState:
    """Parameters and one moment of them, together `size` bytes of float32."""
    rng, width = np.random.default_rng(0), size // (2 * ARRAYS * 4)
    arrays = lambda: {f"kernel_{k}": jnp.asarray(rng.standard_normal(width, np.float32)) for k in range(ARRAYS)}
    return TrainState(jnp.int32(0), jnp.zeros(2, jnp.uint32), {"student": arrays()}, {"student": arrays()}, {})


def torch_state(state: TrainState) -> dict[str, Any]:
    """The same arrays as tensors, under flat names."""
    import torch

    groups = {"params": state.params["student"], "moments": state.opt_state["student"]}
    return {f"{g}.{k}": torch.from_numpy(np.array(x)) for g, tree in groups.items() for k, x in tree.items()}


def file_calls(folder: Path, state: TrainState) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """What runs -> (ours, PyTorch's). A save returns when all is written; both have saved once already."""
    need("torch")
    import torch

    saver = Checkpointer(folder, keep=1, best_metric="", meta=META)
    numbers, file = itertools.count(), folder / "state.pt"
    tensors = torch_state(state)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)

    def save() -> None:
        saver.save(next(numbers), state, {"position": 0}, {})
        saver.wait()

    def save_torch() -> None:
        with file.open("wb") as opened:
            torch.save(tensors, opened)
            opened.flush()
            os.fsync(opened.fileno())  # As Orbax does with every file.

    calls = {
        "save": (save, save_torch),
        "restore": (
            lambda: jax.block_until_ready(saver.restore(saver.latest(), abstract)[0]),
            lambda: torch.load(file, weights_only=True),
        ),
    }
    for run in calls["save"]:
        run()
    return calls


# --- training loop ----------------------------------------------------------------------------------------------------


class Loop:
    """Steps of a method in the order of `loop.train`: take a batch, dispatch its step, fetch the metrics before it.

    Args:
      config: resolved; its method has one role, and weights that a seed gives.
      workdir: for what the data needs.
    """

    def __init__(self, config: Mapping[str, Any], workdir: Path):
        method = build_method(config)
        mesh = sharding.make_mesh(config["mesh"])
        optimizers = loop.make_optimizers(config, method)
        abstract = loop.abstract_state(config, method, optimizers)
        shardings = steps.state_shardings(abstract, method, optimizers, mesh)
        frozen = steps.frozen_shardings(method, mesh)
        made = lambda name, where: jax.jit(method.roles[name].init, out_shardings=where)()
        (role,) = steps.trained_roles(method)
        params = {role: made(role, shardings.params[role])}
        create = lambda p: steps.new_state(method, p, optimizers, config["ema_decay"] > 0, config["seed"])
        self.state = jax.jit(create, out_shardings=shardings)(params)
        self.batches, _ = build_data(config, workdir)
        self._frozen = {name: made(name, where) for name, where in frozen.items()}
        self._step = loop.make_train_steps(config, method, optimizers, shardings, frozen, mesh)[role]
        self._mesh = mesh

    def run(self, count: int, next_batch: Callable[[], dict], after: Callable[[int], None] = lambda k: None) -> None:
        """`count` steps; `after` is called when step k is dispatched and the metrics of the one before it are read."""
        pending = None
        with jax.set_mesh(self._mesh):
            for k in range(count):
                on_device = {name: x for name, x in next_batch().items() if name not in loop.HOST_COLUMNS}
                batch = sharding.global_batch(on_device, self._mesh)
                self.state, values = self._step(self.state, self._frozen, batch)
                jax.device_get(pending)
                pending = values
                after(k)
            jax.block_until_ready(self.state)


class Waiting:
    """A function whose calls are timed; `seconds` since the last `take`."""

    def __init__(self, function: Callable[..., Any]):
        self._function, self.seconds = function, 0.0

    def __call__(self, *args: Any) -> Any:
        begin = time.perf_counter()
        result = self._function(*args)
        self.seconds += time.perf_counter() - begin
        return result

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def loader_calls(running: Loop, count: int, waited: list[float]) -> tuple[Callable[[], None], Callable[[], None]]:
    """(steps on the loader's batches, steps on one batch); `waited` gets the seconds in the loader."""
    take, batch = Waiting(lambda: next(running.batches)), next(running.batches)

    def ours() -> None:
        running.run(count, take)
        waited.append(take.take())

    return ours, lambda: running.run(count, lambda: batch)


def save_calls(
    running: Loop, saver: Checkpointer, count: int, waited: list[float]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """(steps with one save after the first, steps without); `waited` gets the seconds in `save` and at the end, until
    it is written."""
    numbers, batch = itertools.count(), next(running.batches)
    # As in training, where a save begins when the last one is written.
    save = Waiting(lambda: saver.save(next(numbers), running.state, running.batches.get_state(), {}))
    wait = Waiting(saver.wait)

    def ours() -> None:
        running.run(count, lambda: batch, lambda k: save() if k == 0 else None)
        wait()
        waited.append(save.take() + wait.take())

    return ours, lambda: running.run(count, lambda: batch)


# --- cases ------------------------------------------------------------------------------------------------------------


def checkpoint_cases(size: int = 1 << 28) -> Iterator[Case]:
    """Save and restore, 256 MiB."""
    for what in ("save", "restore"):

        def build(what=what):
            folder = tempfile.TemporaryDirectory()
            ours, theirs = file_calls(Path(folder.name), random_state(size))[what]
            return lambda: (ours(), folder)[0], theirs

        yield Case(f"{what} {size / 1e6:.0f} MB", {"bytes": size}, build, "PyTorch", amount=size / 1e9, unit="GB")


def tiny_config(folder: Path) -> dict[str, Any]:
    """The tiny text encoder on captions of the built-in grammar."""
    from experiments.config_file import load_config, plain

    (folder / "prompts.txt").write_text("\n".join(toy_prompts(1000)) + "\n")
    config = Path(__file__).parent / "configs" / "text_encoder.py"
    return resolve_config(plain(load_config(f"{config}:tiny", [f"--config.data.prompts={folder / 'prompts.txt'}"])))


def loop_cases(make_config: Callable[[Path], dict[str, Any]] = tiny_config) -> Iterator[Case]:
    """What the loader and a checkpoint cost the steps of one interval between checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        every = make_config(Path(folder))["checkpoint"]["every"]
    for what, reference in (("loader", "one batch"), ("save", "no save")):
        waited: list[float] = []

        def build(what=what, waited=waited):
            folder = tempfile.TemporaryDirectory()
            running = Loop(make_config(Path(folder.name)), Path(folder.name))
            if what == "loader":
                ours, theirs = loader_calls(running, every, waited)
            else:
                saver = Checkpointer(Path(folder.name), keep=2, best_metric="", meta=META)
                ours, theirs = save_calls(running, saver, every, waited)
            return lambda: (ours(), folder)[0], theirs

        name = f"training loop with {what}, {every} steps"
        yield Case(name, {"steps": every}, build, reference, amount=every, unit="steps", waited=waited)
