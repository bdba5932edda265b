"""How long a training's steps take on the devices of this machine, and what memory, without any weights or data.

    python -m experiments.step_time --config experiments/configs/steps.py:full --topology v5e:4x4
    python -m experiments.step_time --config experiments/configs/prune.py:stage2 \\
        --config.mesh.data=1 --config.mesh.fsdp=1 --config.batch_size=24

The steps are the ones that `experiments.train` runs and `experiments.plan` plans, compiled for these devices and
really run. Weights that the config reads from files are random ones of the same shapes, and what it leaves open has
the released sizes (`plan_sizes`), as in a plan. Several processes are started as for a training, with the arguments of
`experiments.train`.

OUTPUT/step_time.json has everything, the terminal a table. Nothing that was trained is kept.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.progress import stages
from experiments.config_file import load_config, plain
from experiments.plan import suggestion, versions
from experiments.topologies import training_overrides
from experiments.train import add_process_arguments, check_job_arguments, job
from nd_jax.errors import UserError, run_command
from nd_jax.files import write_text

REPORT = "step_time.json"
WARM_UP = 2
# Of kernels and embeddings that are read from files: activations stay near 1 at the released widths.
WEIGHT_STD = 0.02


def random_weights(abstract: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A parameter tree of the given shapes (traceable): normal kernels and embeddings, scales of 1, biases of 0."""
    import jax
    import jax.numpy as jnp
    from flax import traverse_util

    def draw(key: Any, path: str, leaf: Any) -> Any:
        name = path.rsplit("/", 1)[-1]
        if name == "scale":
            return jnp.ones(leaf.shape, leaf.dtype)
        if name == "bias":
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(WEIGHT_STD, leaf.dtype) * jax.random.normal(key, leaf.shape, leaf.dtype)

    flat = traverse_util.flatten_dict(dict(abstract), sep="/")
    keys = jax.random.split(jax.random.key(seed), len(flat))
    drawn = {path: draw(key, path, leaf) for key, (path, leaf) in zip(keys, flat.items(), strict=True)}
    return traverse_util.unflatten_dict(drawn, sep="/")


def make_arrays(config: Mapping[str, Any], method: Any, arguments: Any, batch: Mapping[str, Any], mesh: Any) -> tuple:
    """(state, frozen weights, batch) on the devices, with the shardings of `arguments` (`ahead.StepArguments`)."""
    import jax

    from nd_jax.train import loop, sharding
    from nd_jax.train import step as steps

    lies = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)

    def weights(name: str, shardings: Mapping[str, Any]) -> dict[str, Any]:
        role = method.roles[name]
        make = role.init or (lambda: random_weights(role.abstract, config["seed"]))
        return jax.jit(make, out_shardings=shardings)()

    optimizers = loop.make_optimizers(config, method)
    create = lambda p: steps.new_state(method, p, optimizers, config["ema_decay"] > 0, config["seed"])
    params = {name: weights(name, lies(tree)) for name, tree in arguments.state.params.items()}
    # Donated, or the parameters would be in memory twice.
    state = jax.jit(create, out_shardings=lies(arguments.state), donate_argnums=0)(params)
    frozen = {name: weights(name, lies(tree)) for name, tree in arguments.frozen.items()}
    return state, frozen, sharding.global_batch(batch, mesh)


def time_step(step: Callable[..., Any], arrays: tuple, repeats: int, length: int) -> tuple[list[float], dict, tuple]:
    """Runs a step again and again, and waits after every `length` of them: a training does not wait for single steps.

    Returns:
      (seconds of a step in each of `repeats` rows of `length` steps, its last metrics, arrays to go on with).
    """
    import jax

    state, frozen, batch = arrays
    times, values = [], {}
    for row in range(repeats + 1):
        count = length if row else WARM_UP
        start = time.perf_counter()
        for _ in range(count):
            state, values = step(state, frozen, batch)
        jax.block_until_ready((state, values))
        times.append((time.perf_counter() - start) / count)
    return times[1:], {name: float(value) for name, value in values.items()}, (state, frozen, batch)


def step_numbers(
    role: str, times: Sequence[float], lowered: Any, compiled: Any, values: Mapping[str, float], mesh: Any
) -> dict[str, Any]:
    """A measured step as plain data; `of_peak` where the peak of the devices is known."""
    import dataclasses

    from nd_jax.train.chips import peak_flops

    # A process knows the memory of its own devices alone.
    seconds, device = statistics.median(times), mesh.local_devices[0]
    rate = lowered.flops.total / mesh.size / seconds
    peak, statistic = peak_flops(device.device_kind), device.memory_stats() or {}
    return {
        "role": role,
        "seconds": seconds,
        "seconds_range": [min(times), max(times)],
        "flops_per_device": lowered.flops.total / mesh.size,
        "open_loops": lowered.flops.open_loops,
        "flops_per_second": rate,
        "of_peak": rate / peak if peak else None,
        "planned_memory": dataclasses.asdict(lowered.memory(compiled)),
        "process_peak_bytes": statistic.get("peak_bytes_in_use"),
        "finite": all(map(math.isfinite, values.values())),
        "metrics": dict(values),
    }


def measure(
    config: Mapping[str, Any], folder: Path, repeats: int, length: int, begin: Callable[[str], None]
) -> dict[str, Any]:
    """Every role's step of a resolved config.

    Args:
      config: every folder that its data needs is named.
      folder: where data may write.
      repeats, length: of `time_step`.
      begin: told every step before it is compiled.

    Raises:
      UserError: a mesh or batch that does not divide, or one that does not fit the memory.
    """
    import jax

    from nd_jax.data.registry import build_data
    from nd_jax.distill.registry import build_method
    from nd_jax.train import ahead, sharding
    from nd_jax.train.loop import HOST_COLUMNS

    mesh, method = sharding.make_mesh(config["mesh"]), build_method(config)
    columns = next(build_data(config, folder)[0])
    batch = {name: column for name, column in columns.items() if name not in HOST_COLUMNS}
    row = {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in batch.items()}
    found: dict[str, Any] = {"mesh": dict(mesh.shape), "steps": []}
    with jax.set_mesh(mesh):
        arguments = ahead.step_arguments(config, method, mesh, row)
        try:
            arrays = make_arrays(config, method, arguments, batch, mesh)
            for role in dict.fromkeys(method.schedule):
                begin(role)
                start = time.perf_counter()
                lowered = ahead.lower_step(role, arguments, mesh)
                compiled = lowered.lowered.compile()
                seconds = time.perf_counter() - start
                times, values, arrays = time_step(compiled, arrays, repeats, length)
                numbers = step_numbers(role, times, lowered, compiled, values, mesh)
                found["steps"].append(numbers | {"compile_seconds": seconds})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            resident = ahead.resident_bytes((arguments.state, arguments.frozen, arguments.batch))
            plan = {"mesh": dict(mesh.shape), "resident_bytes": resident}
            raise UserError(
                f"the memory of a device ({mesh.devices.flat[0].device_kind}) is too small: state, frozen weights and "
                f"batch alone take {resident / 2**30:.2f} GiB of it; try {suggestion(config, plan, None)}"
            ) from error
    seconds = {step["role"]: step["seconds"] for step in found["steps"]}
    found["seconds_per_step"] = sum(seconds[role] for role in method.schedule) / len(method.schedule)
    found["rows_per_second"] = config["batch_size"] / found["seconds_per_step"]
    return found


def print_table(result: Mapping[str, Any]) -> None:
    """A row a step."""
    from rich.console import Console
    from rich.table import Table

    from experiments.plan_report import LOG_WIDTH

    mesh = " x ".join(f"{name} {size}" for name, size in result["mesh"].items())
    columns = ("step", "ms (range)", "TFLOP", "TFLOP/s", "of peak", "planned, GiB", "peak of the process", "compile, s")
    table = Table(
        *columns, title=f"on each of {result['devices']} x {result['device']}, {mesh}, batch {result['batch_size']}"
    )
    gib = lambda count: "" if count is None else f"{count / 2**30:.2f}"
    for step in result["steps"]:
        low, high = step["seconds_range"]
        table.add_row(
            step["role"],
            f"{1000 * step['seconds']:.1f} ({1000 * low:.1f}-{1000 * high:.1f})",
            f"{step['flops_per_device'] / 1e12:.3g}",
            f"{step['flops_per_second'] / 1e12:.3g}",
            "" if step["of_peak"] is None else f"{step['of_peak']:.0%}",
            gib(step["planned_memory"]["peak"]),
            gib(step["process_peak_bytes"]),
            f"{step['compile_seconds']:.0f}",
        )
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    console.print(table)
    for step in result["steps"]:
        if not step["finite"]:
            console.print(f"{step['role']}: its metrics are not finite, with random weights: {step['metrics']}")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Known arguments, and the `--config.KEY=VALUE` overrides."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.step_time",
        description="Run a config's train steps on the devices of this machine with random weights, and time them.",
        epilog="Any config value can be set with --config.KEY=VALUE, such as --config.batch_size=24.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE.py:VARIANT", help="experiments/configs/NAME.py:full")
    parser.add_argument("--topology", metavar="NAME", help="TPU slice: batch and mesh of experiments/topologies.py")
    parser.add_argument("--slices", type=int, default=1, help="slices of that topology (default 1)")
    parser.add_argument("--student-blocks", type=int, metavar="N", help="of a pruned student that the config lacks")
    parser.add_argument("--steps", type=int, default=10, help="of one measurement (default 10)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each role (default 3)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/step_time"), metavar="DIR", help="default runs/step_time"
    )
    add_process_arguments(parser)
    args, overrides = parser.parse_known_args(argv)
    check_job_arguments(parser, args)
    if args.steps < 1 or args.repeats < 1:
        parser.error("--steps, --repeats: use 1 or more")
    return args, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args, overrides = parse(argv)
    placed = training_overrides(args.config, args.topology, args.slices)
    config = plain(load_config(args.config, [*placed, *overrides]))

    with job(args, args.output / "logs"):
        run(args, config)
    return 0


def run(args: argparse.Namespace, config: Mapping[str, Any]) -> None:
    """Measures in this process, one of the job's; the first one reports."""
    import jax

    from experiments.plan_sizes import fill_folders
    from nd_jax.distill.registry import resolve_config
    from nd_jax.models.attention import check_attention

    check_attention(config.get("attention", ""))
    first = jax.process_index() == 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config, assumed = fill_folders(config, folder, args.student_blocks)
        config = resolve_config(config)
        with stages(None) as begin:
            found = measure(config, folder, args.repeats, args.steps, begin)
    if not first:
        return
    devices = jax.devices()
    result = {
        "config_file": args.config,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "versions": versions(),
        "assumed_released_sizes": assumed,
        "batch_size": config["batch_size"],
        "steps_of_a_measurement": args.steps,
        **found,
        "config": config,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    write_text(args.output / REPORT, json.dumps(result, indent=1) + "\n")
    print_table(result)
    print(
        f"{1000 * result['seconds_per_step']:.0f} ms a step of the schedule, {result['rows_per_second']:.1f} "
        f"{config['unit']}/s; numbers in {args.output / REPORT}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
