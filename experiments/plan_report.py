"""Tables of `experiments.plan` on the terminal."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

# A log has no width of its own, and the columns do not fit the 80 that are then assumed.
LOG_WIDTH = 150


def print_plan(result: Mapping[str, Any]) -> None:
    """A row a step, then a row a kind of collective."""
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    plan, chip = result["plan"], result["chip"]
    millions = ", ".join(
        f"{name} {count / 1e6:,.1f} M{'' if name in result['trained'] else ' (frozen)'}"
        for name, count in result["parameters"].items()
    )
    console.print(f"parameters: {millions}")
    if result["assumed_released_sizes"]:
        console.print(f"not in the config, so of the released sizes: {', '.join(result['assumed_released_sizes'])}")
    placed = [setting.removeprefix("--config.") for setting in result["topology_settings"]]
    console.print(f"of experiments/topologies.py: {', '.join(placed) or 'nothing, so the mesh of the config'}")
    if "error" in plan:
        console.print(plan["error"])
    if not plan["steps"]:
        return
    limit = f", of {chip['hbm_bytes'] / 2**30:.2f} GiB" if chip else ""
    steps = Table(
        "step",
        "arguments",
        "temporaries",
        f"peak{limit}",
        "TFLOP",
        "bfloat16",
        "again",
        "to others, GB",
        "at best, ms",
        "bound",
        "compile, s",
        title=f"on each of {result['devices']} devices, {_mesh(plan)}, batch {result['config']['batch_size']}"
        f" in {result['config']['microbatches']} parts",
    )
    for step in plan["steps"]:
        steps.add_row(step["role"], *_memory(step), *_work(step), f"{step['compile_seconds']:.0f}")
    console.print(steps)
    for step in plan["steps"]:
        if step["error"]:
            console.print(f"{step['role']}: {step['error']}")
        if step["open_loops"]:
            console.print(f"{step['role']}: {step['open_loops']} loops of unknown length count once")
    kinds = Table("step", "collective", "dtype", "devices", "count", "result, GB", "to others, GB", "slices")
    for step in plan["steps"]:
        for c in step["collectives"]:
            sizes = (f"{c['bytes'] / 1e9:.3f}", f"{c['traffic'] / 1e9:.3f}", "across" if c["across_slices"] else "")
            kinds.add_row(step["role"], c["kind"], c["dtype"], str(c["devices"]), str(c["count"]), *sizes)
    if kinds.row_count:
        console.print(kinds)


def print_sweep(result: Mapping[str, Any]) -> None:
    """A row a mesh shape; of several steps, the largest peak and the mean time."""
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    table = Table("data", "fsdp", "tensor", "fits", "peak, GiB", "to others, GB", "at best, ms", "bound", "or why not")
    for plan in result["sweep"]:
        steps = plan["steps"]
        peaks = [step["memory"]["peak"] for step in steps if step["memory"]]
        sent = [sum(c["traffic"] for c in step["collectives"]) for step in steps]
        bounds = dict.fromkeys(step["roofline"]["bound"] for step in steps if "roofline" in step)
        why = plan.get("error") or "; ".join(step["error"] for step in steps if step["error"])
        table.add_row(
            *(str(size) for size in plan["mesh"].values()),
            "yes" if plan["fits"] else "no",
            f"{max(peaks) / 2**30:.2f}" if peaks else "",
            f"{max(sent) / 1e9:.2f}" if sent else "",
            f"{1000 * plan['time']['seconds_per_step']:.1f}" if "time" in plan else "",
            ", ".join(bounds),
            why[:70],
        )
    console.print(table)


def _mesh(plan: Mapping[str, Any]) -> str:
    return " x ".join(f"{name} {size}" for name, size in plan["mesh"].items())


def _memory(step: Mapping[str, Any]) -> tuple[str, ...]:
    memory = step["memory"]
    if memory is None:
        return "", "", "too much"
    return tuple(f"{memory[name] / 2**30:.2f}" for name in ("arguments", "temporaries", "peak"))


def _work(step: Mapping[str, Any]) -> tuple[str, ...]:
    flops, roofline = step["flops"], step.get("roofline")
    again = f"{flops['recomputed_share']:.0%}" if "recomputed_share" in flops else ""
    best = (f"{1000 * roofline['seconds']:.1f}", roofline["bound"]) if roofline else ("", "")
    sent = sum(c["traffic"] for c in step["collectives"]) / 1e9
    return f"{flops['per_device'] / 1e12:.3g}", f"{flops['bfloat16_share']:.0%}", again, f"{sent:.2f}", *best
