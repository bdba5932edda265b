"""What a training will cost on TPUs, without one: the train steps of a config compiled ahead of time for a topology.

    python -m experiments.plan --config experiments/configs/steps.py:full --topology v5p:2x2x4 --output runs/plan
    python -m experiments.plan --config experiments/configs/teacher.py:full --topology v5e:4x4 --sweep

Topologies are those of libtpu: v5e:4x4, v5p:2x2x4, v6e:4x4, tpu7x:2x2x1, ...; `cpu` stands for the devices of this
process. The steps are the ones that `experiments.train` runs, with the same config, shardings and optimiser, and with
the batch and mesh that its `--topology` sets where `topologies` has an entry. Where the config names no folders, those
of the released sizes are assumed (`plan_sizes`), and the output says so.

DIR/plan.json has everything, the terminal a table. The command exits with 0 when there is an answer, also when the
answer is that the training does not fit ("fits": false); with 1 when the config, the mesh or the topology is wrong.
Compiling takes one to several minutes of a processor for a step of full size. See docs/tpu.md.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.progress import stages
from experiments.config_file import load_config, plain
from experiments.topologies import topology_overrides
from nd_jax.errors import UserError, first_line, run_command
from nd_jax.files import replacing, write_text

PLAN, EXPORTED = "plan.json", ".stablehlo"
CPU = "cpu"
# Of the shortest possible time, what a well-tuned training reaches.
UTILISATION = 0.4
# Splitting heads over more devices leaves each with a product too narrow for the matrix unit.
SWEEP_TENSOR = (1, 2, 4)
# For the compiler alone: no TPU of this machine is touched, and nothing is asked of a cloud's metadata server.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology_devices(name: str, slices: int) -> tuple[Any, list[Any]]:
    """(`chips.Chip` or None for the processors of this machine, devices to compile for).

    Raises:
      UserError: no such topology, or no compiler for it.
    """
    import jax
    from jax.experimental import topologies

    from nd_jax.train.chips import CHIPS

    if name == CPU:
        return None, jax.devices(CPU)
    kind = name.partition(":")[0]
    if kind not in CHIPS:
        raise UserError(f"topology {name!r}: known chips are {', '.join(CHIPS)}, such as v5p:2x2x4, and {CPU!r}")
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        raise UserError(
            "planning for TPUs needs their compiler, which the package libtpu has: pip install -r requirements-plan.txt"
        )
    try:
        found = topologies.get_topology_desc(topology_name=name, platform="tpu", num_slices=slices)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise UserError(
            f"topology {name!r} with {slices} slices is refused ({first_line(error)}): give the chips along each "
            "axis, such as v5e:4x4 or v5p:2x2x4"
        ) from error
    return CHIPS[kind], list(found.devices)


def plan_mesh(
    config: Mapping[str, Any],
    method: Any,
    row: Mapping[str, Any],
    chip: Any,
    devices: Sequence[Any],
    slices: int,
    begin: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """The plan of one mesh as plain data, see docs/tpu.md for the entries.

    Args:
      config: resolved; its `mesh` counts.
      method: of the config.
      row: columns of a batch, see `plan_sizes.batch_row`.
      chip: what the devices are, or None.
      devices: to compile for.
      slices: that they are on.
      begin: told every step before it is compiled.

    Raises:
      UserError: a mesh or a batch that does not divide.
    """
    from nd_jax.train import ahead, sharding

    mesh = sharding.make_mesh(config["mesh"], devices)
    arguments = ahead.step_arguments(config, method, mesh, row)
    resident = ahead.resident_bytes((arguments.state, arguments.frozen, arguments.batch))
    plan: dict[str, Any] = {"mesh": dict(mesh.shape), "resident_bytes": resident, "steps": []}
    if chip and resident > chip.hbm_bytes:
        plan |= {"fits": False, "error": f"state, frozen weights and batch alone take {_gib(resident)}"}
    else:
        for role in dict.fromkeys(method.schedule):
            begin(role)
            plan["steps"].append(step_numbers(ahead.compile_step(role, arguments, mesh, slices), chip, mesh.size))
        plan["fits"] = all(step["fits"] for step in plan["steps"])
        if plan["fits"] and chip:
            plan["time"] = schedule_time(plan["steps"], method.schedule, config["num_steps"])
    if not plan["fits"]:
        plan["suggestion"] = suggestion(config, plan, chip)
    return plan


def step_numbers(step: Any, chip: Any, devices: int) -> dict[str, Any]:
    """A compiled step (`ahead.CompiledStep`) as plain data; `roofline` of a chip is in seconds."""
    import dataclasses

    from nd_jax.train.chips import roofline

    memory, products = step.memory, step.products
    per_device = step.flops.total / devices
    numbers: dict[str, Any] = {
        "role": step.role,
        "fits": memory is not None and (chip is None or memory.peak <= chip.hbm_bytes),
        "error": step.error,
        "memory": dataclasses.asdict(memory) if memory else None,
        "flops": {
            "per_device": per_device,
            "by_dtype": dict(step.flops.by_dtype),
            "bfloat16_share": step.flops.by_dtype.get("bfloat16", 0) / max(step.flops.total, 1),
        },
        "collectives": [dataclasses.asdict(collective) for collective in step.collectives],
        "open_loops": step.flops.open_loops + step.open_loops,
        "compile_seconds": step.seconds,
        "compile_processor_seconds": step.processor_seconds,
    }
    if products:
        numbers["flops"] |= {
            "partitioned": products.flops,
            "recomputed_share": products.recomputed_flops / max(products.flops, 1),
        }
    if chip and products:
        traffic = lambda apart: sum(c.traffic for c in step.collectives if c.across_slices is apart)
        # Work that the partitioner could not divide is done by several devices.
        flops = max(per_device, products.flops)
        # Every product's operands and result pass the memory, and so does the state, once in and once out.
        moved = products.bytes + (memory.arguments + memory.output if memory else 0)
        bounds = roofline(chip, flops, moved, traffic(False), traffic(True))
        bound = max(bounds, key=bounds.get)
        numbers["roofline"] = {"seconds": bounds[bound], "bound": bound, "bounds": dict(bounds), "hbm_bytes": moved}
    return numbers


def schedule_time(steps: Sequence[Mapping[str, Any]], schedule: Sequence[str], num_steps: int) -> dict[str, float]:
    """Mean over the schedule of the steps' shortest times, and hours of the whole training at `UTILISATION`."""
    seconds = {step["role"]: step["roofline"]["seconds"] for step in steps}
    mean = sum(seconds[role] for role in schedule) / len(schedule)
    return {"seconds_per_step": mean, "utilisation": UTILISATION, "hours": mean / UTILISATION * num_steps / 3600}


def suggestion(config: Mapping[str, Any], plan: Mapping[str, Any], chip: Any) -> str:
    """What to change first where a plan does not fit: the state if it fills half the memory, else the activations."""
    mesh, ways = plan["mesh"], []
    if mesh["data"] > 1:
        ways.append(f"--config.mesh.data=1 --config.mesh.fsdp={mesh['data'] * mesh['fsdp']} (a larger fsdp)")
    for group, key in (("model", "frozen_dtype"), ("model", "text_param_dtype"), ("teacher", "param_dtype")):
        if config.get(group, {}).get(key) == "float32":
            ways.append(f"--config.{group}.{key}=bfloat16 (frozen weights of half the size)")
    activations = []
    if config.get("remat") in ("none", "dots", False):
        value = True if config["remat"] is False else "full"
        activations.append(f"--config.remat={value} (the backward pass computes blocks again)")
    per_device = config["batch_size"] // (mesh["data"] * mesh["fsdp"] * config["microbatches"])
    more = _next_microbatches(config, per_device)
    if more:
        activations.append(f"--config.microbatches={more} (a part of the batch at a time)")
    small = chip is None or plan["resident_bytes"] < chip.hbm_bytes / 2
    ordered = activations + ways if small else ways + activations
    return "; or ".join([*ordered, "a topology of more chips, with a larger fsdp"])


def _next_microbatches(config: Mapping[str, Any], per_device: int) -> int | None:
    """The next number of microbatches that leaves every device whole rows, of every stage where there are stages."""
    rows = sum(config.get("objective", {}).get("stage_ratios", (1,)))
    parts = per_device // rows
    larger = [n for n in range(2, parts + 1) if parts % n == 0]
    return config["microbatches"] * larger[0] if larger else None


def export_steps(
    config: Mapping[str, Any], method: Any, row: Mapping[str, Any], chip: Any, devices: Sequence[Any], folder: Path
) -> dict[str, Any]:
    """Writes every step as it is before compilation, see `nd_jax.train.exported`; role -> file and bytes."""
    from nd_jax.train import ahead, exported, sharding

    mesh = sharding.make_mesh(config["mesh"], devices)
    arguments, found = ahead.step_arguments(config, method, mesh, row), {}
    for role in dict.fromkeys(method.schedule):
        data = exported.export_step(role, arguments, mesh, ("tpu",) if chip else (CPU,))
        with replacing(folder / f"{role}{EXPORTED}") as temporary:
            temporary.write_bytes(data)
        found[role] = {"file": f"{role}{EXPORTED}", "bytes": len(data)}
    return found


def mesh_shapes(devices: int, slices: int) -> list[dict[str, int]]:
    """All ways to split a number of devices into data, fsdp and tensor, the largest fsdp first."""
    shapes = []
    for tensor in SWEEP_TENSOR:
        rest, odd = divmod(devices, tensor)
        for fsdp in range(rest, 0, -1):
            if not odd and rest % fsdp == 0 and (rest // fsdp) % slices == 0:
                shapes.append({"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor})
    return shapes


def sweep(config: Mapping[str, Any], method: Any, row: Any, chip: Any, devices: Sequence[Any], slices: int) -> list:
    """Plans of all `mesh_shapes`; one that is not possible has the reason as "error"."""
    shapes, plans = mesh_shapes(len(devices), slices), []
    with stages(len(shapes)) as begin:
        for shape in shapes:
            begin(" x ".join(f"{name} {size}" for name, size in shape.items()))
            try:
                plans.append(plan_mesh(dict(config) | {"mesh": shape}, method, row, chip, devices, slices))
            except UserError as error:
                plans.append({"mesh": shape, "fits": False, "steps": [], "error": str(error)})
    return plans


def best(plans: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The fastest plan that fits; the first one that fits where there are no times."""
    fitting = [plan for plan in plans if plan["fits"]]
    return min(fitting, key=lambda p: p["time"]["seconds_per_step"] if "time" in p else 0.0, default=None)


def closing_line(result: Mapping[str, Any], output: Path) -> str:
    """One sentence: whether it fits, the memory, the time, the file."""
    where = f"{result['devices']} devices of {result['topology']}" + (
        f" x {result['slices']} slices" if result["slices"] > 1 else ""
    )
    plan = best(result["sweep"]) if "sweep" in result else result["plan"]
    if plan is None or not plan["fits"]:
        advice = f"; try {plan['suggestion']}" if plan and "suggestion" in plan else ""
        return f"does not fit {where}{advice}; numbers in {output / PLAN}"
    peak = max(step["memory"]["peak"] for step in plan["steps"])
    limit = f" of {_gib(result['chip']['hbm_bytes'])}" if result["chip"] else ""
    mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items())
    took = ""
    if "time" in plan:
        took = (
            f", {1000 * plan['time']['seconds_per_step']:.0f} ms a step at best, {plan['time']['hours']:.1f} h for "
            f"{result['config']['num_steps']} steps at {UTILISATION:.0%} of that"
        )
    return f"fits {where} ({mesh}): {_gib(peak)}{limit} on each{took}; numbers in {output / PLAN}"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def versions() -> dict[str, str | None]:
    """Of the packages that the numbers depend on."""
    found = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Known arguments, and the `--config.KEY=VALUE` overrides."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.plan",
        description="Compile a config's train steps for a TPU topology and say what they cost; no TPU is needed.",
        epilog="Any config value can be set with --config.KEY=VALUE, such as --config.microbatches=2.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE.py:VARIANT", help="experiments/configs/NAME.py:full")
    parser.add_argument("--topology", required=True, metavar="NAME", help="such as v5e:4x4 or v5p:2x2x4, or cpu")
    parser.add_argument("--slices", type=int, default=1, help="slices of that topology, split along data (default 1)")
    parser.add_argument("--student-blocks", type=int, metavar="N", help="of a pruned student that the config lacks")
    parser.add_argument("--sweep", action="store_true", help="plan every mesh shape; one compilation each")
    parser.add_argument("--export", action="store_true", help="also write the steps as StableHLO, DIR/ROLE.stablehlo")
    parser.add_argument("--output", type=Path, default=Path("runs/plan"), metavar="DIR", help="default runs/plan")
    args, overrides = parser.parse_known_args(argv)
    if args.slices < 1:
        parser.error("--slices: use 1 or more")
    if args.sweep and args.export:
        parser.error("--export goes with one mesh, not with --sweep")
    return args, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args, overrides = parse(argv)
    placed = topology_overrides(args.config, args.topology, args.slices)
    config = plain(load_config(args.config, [*placed, *overrides]))
    os.environ.update(ENVIRONMENT)
    if args.topology != CPU:
        # The TPU compiler ends the process at a flag of another compiler; its own are in LIBTPU_INIT_ARGS.
        os.environ.pop("XLA_FLAGS", None)

    from experiments.plan_report import print_plan, print_sweep
    from experiments.plan_sizes import batch_row, fill_folders
    from nd_jax.distill.registry import build_method, resolve_config
    from nd_jax.train.virtual_devices import order_collectives_of_virtual_devices

    order_collectives_of_virtual_devices()
    chip, devices = topology_devices(args.topology, args.slices)
    with tempfile.TemporaryDirectory() as folder:
        config, assumed = fill_folders(config, Path(folder), args.student_blocks)
        config = resolve_config(config)
        method, row = build_method(config), batch_row(config, Path(folder))
        result = describe(args, config, method, assumed, chip, len(devices)) | {"topology_settings": placed}
        if args.sweep:
            result["sweep"] = sweep(config, method, row, chip, devices, args.slices)
        else:
            with stages(len(set(method.schedule))) as begin:
                result["plan"] = plan_mesh(config, method, row, chip, devices, args.slices, begin)
        args.output.mkdir(parents=True, exist_ok=True)
        if args.export:
            result["exported"] = export_steps(config, method, row, chip, devices, args.output)
    write_text(args.output / PLAN, json.dumps(result, indent=1) + "\n")
    (print_sweep if args.sweep else print_plan)(result)
    print(closing_line(result, args.output))
    return 0


def describe(
    args: argparse.Namespace, config: Mapping[str, Any], method: Any, assumed: Sequence[str], chip: Any, devices: int
) -> dict[str, Any]:
    """What was planned, as plain data."""
    import dataclasses
    import math

    import jax

    count = lambda role: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(role.abstract))
    return {
        "config_file": args.config,
        "topology": args.topology,
        "slices": args.slices,
        "devices": devices,
        "chip": dataclasses.asdict(chip) if chip else None,
        "versions": versions(),
        "assumed_released_sizes": list(assumed),
        "schedule": list(method.schedule),
        "parameters": {name: count(role) for name, role in method.roles.items()},
        "trained": [name for name, role in method.roles.items() if not role.frozen],
        "config": config,
    }


if __name__ == "__main__":
    sys.exit(run_command(main))
