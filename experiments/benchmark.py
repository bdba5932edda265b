"""Speed against the usual PyTorch implementations, or against the same without one thing, side by side in one run.

    python -m experiments.benchmark [--suite NAME ...] [--repeats N] [--output FILE.json]

Both sides of a case run in this process, in turn, on the same processors: A B, B A, A B, ... so that whatever else the
machine does meets both alike. The ratio of a case is the median of the ratios within the pairs; below 1 nd_jax is
faster. Compilation and first runs do not count. Processor time is given beside the time on the clock: on a machine
that others use, it is the steadier of the two. There PyTorch's threads, which wait for one another after every
operation, also lose more than ours: `taskset -c 0 python -m experiments.benchmark` compares one thread with one.
"""

import argparse
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from converters.progress import stages
from nd_jax.errors import UserError, run_command
from nd_jax.files import write_text

# Needs more than a processor, so it runs where it is named.
ON_REQUEST = ("joint_block_gpu",)
WARM_UP = 2
PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers")


def joint_block() -> Iterable[Any]:
    from experiments.benchmark_networks import joint_block_cases

    return joint_block_cases()


def joint_block_gpu() -> Iterable[Any]:
    from experiments.benchmark_gpu import gpu_cases

    return gpu_cases()


def t5_layer() -> Iterable[Any]:
    from experiments.benchmark_networks import t5_layer_cases

    return t5_layer_cases()


def decoder() -> Iterable[Any]:
    from experiments.benchmark_decoder import decoder_cases

    return decoder_cases()


def data() -> Iterable[Any]:
    from experiments.benchmark_data import data_cases

    return data_cases(threads())


def checkpoint() -> Iterable[Any]:
    from experiments.benchmark_checkpoint import checkpoint_cases

    return checkpoint_cases()


def loop() -> Iterable[Any]:
    from experiments.benchmark_checkpoint import loop_cases

    return loop_cases()


def weights() -> Iterable[Any]:
    from experiments.benchmark_weights import weight_cases

    return weight_cases()


def compilation() -> Iterable[Any]:
    from experiments.benchmark_compile import compile_cases

    return compile_cases()


# Name -> what it compares, and the function that gives its cases (`benchmark_case.Case`).
SUITES: dict[str, tuple[str, Callable[[], Iterable[Any]]]] = {
    "joint_block": ("a joint block of the video transformer, against diffusers, float32, full size", joint_block),
    "joint_block_gpu": ("the same on a GPU, bfloat16, eight rows, attention by cuDNN and by XLA", joint_block_gpu),
    "decoder": ("the tiny decoder, streaming, against plain PyTorch in channels-last, float32, full size", decoder),
    "t5_layer": ("a layer of the T5 v1.1 XXL encoder, against transformers, float32, full size", t5_layer),
    "data": ("prompts, cached latents and decoded clips, against PyTorch's DataLoader", data),
    "checkpoint": ("save and restore, against torch.save and torch.load", checkpoint),
    "loop": ("what the loader and a checkpoint cost training steps, against steps without", loop),
    "weights": ("import and export of weights, against reading and writing the same in PyTorch", weights),
    "compilation": ("compiling with the compilation cache, against compiling anew", compilation),
}


def time_pair(ours: Callable[[], Any], reference: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Runs both in turn; seconds of every run, on the clock and of processor time.

    Returns:
      {"nd_jax": ..., "reference": ...}, each {"seconds": [...], "processor_seconds": [...]} of `repeats` runs.
    """
    sides = {"nd_jax": ours, "reference": reference}
    for run in sides.values():
        for _ in range(WARM_UP):
            run()
    times: dict[str, Any] = {side: {"seconds": [], "processor_seconds": []} for side in sides}
    for repeat in range(repeats):
        for side in sorted(sides, reverse=bool(repeat % 2)):
            clock, processor = time.perf_counter(), time.process_time()
            sides[side]()
            times[side]["processor_seconds"].append(time.process_time() - processor)
            times[side]["seconds"].append(time.perf_counter() - clock)
    return times


def summarise(times: dict[str, Any]) -> dict[str, Any]:
    """`time_pair` with its statistics.

    Returns:
      per side the runs and their minimum, median and maximum; `ratio` the median within the pairs, `ratio_range` its
      quartiles, `ratio_of_minima` of the fastest runs, `processor_ratio` of the medians of processor time.
    """
    ours, reference = times["nd_jax"], times["reference"]
    pairs = [a / b for a, b in zip(ours["seconds"], reference["seconds"], strict=True)]
    quartiles = statistics.quantiles(pairs, n=4) if len(pairs) > 1 else [pairs[0]] * 3
    median = lambda side, key: statistics.median(side[key])
    spread = lambda side: {
        "minimum": min(side["seconds"]),
        "median": median(side, "seconds"),
        "maximum": max(side["seconds"]),
        "processor_median": median(side, "processor_seconds"),
    }
    return {
        "ratio": statistics.median(pairs),
        "ratio_range": [quartiles[0], quartiles[2]],
        "ratio_of_minima": min(ours["seconds"]) / min(reference["seconds"]),
        "processor_ratio": median(ours, "processor_seconds") / median(reference, "processor_seconds"),
        "nd_jax": {**spread(ours), **ours},
        "reference": {**spread(reference), **reference},
    }


def run_cases(suite: str, cases: Iterable[Any], repeats: int, begin: Callable[[str], None]) -> list[dict[str, Any]]:
    """Results of a suite, one dictionary a case; `begin` is told the name of each."""
    results = []
    for case in cases:
        begin(case.name)
        load = os.getloadavg()[0]
        ours, reference = case.build()
        summary = summarise(time_pair(ours, reference, repeats))
        results.append(
            {"suite": suite, "case": case.name, "against": case.reference, **case.sizes, "load_before": load, **summary}
            | rates(case, summary)
            | {"load_after": os.getloadavg()[0]}
        )
    return results


def rates(case: Any, summary: dict[str, Any]) -> dict[str, Any]:
    """What a case says beyond times: `rate` of both sides in its `unit` a second, from the medians; `waited`, the
    seconds that each run kept the training loop waiting, and `waited_share`, their median over that of a run."""
    found: dict[str, Any] = {}
    if case.amount:
        found["rate"] = {side: case.amount / summary[side]["median"] for side in ("nd_jax", "reference")}
        found["rate"]["unit"] = f"{case.unit}/s"
    if case.waited:
        timed = case.waited[-len(summary["nd_jax"]["seconds"]) :]
        found["waited"] = timed
        found["waited_share"] = statistics.median(timed) / summary["nd_jax"]["median"]
    return found


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, processors this process may use, JAX's device, versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    import jax

    return {
        "processor": models[0] if models else "unknown",
        "threads": threads(),
        "device": jax.devices()[0].device_kind,
        "versions": versions,
    }


def threads() -> int:
    """Processors this process may use; XLA starts that many threads."""
    return len(os.sched_getaffinity(0))


def print_table(results: Sequence[dict[str, Any]]) -> None:
    """Ratios and times on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table("case", "ratio", "quartiles", "of minima", "processor", "nd_jax, s", "reference, s", "rates", "load")
    spread = lambda side: f"{side['median']:.3g} ({side['minimum']:.3g}-{side['maximum']:.3g})"
    for r in results:
        low, high = r["ratio_range"]
        table.add_row(
            r["case"],
            f"{r['ratio']:.3g}",
            f"{low:.3g}-{high:.3g}",
            f"{r['ratio_of_minima']:.3g}",
            f"{r['processor_ratio']:.3g}",
            spread(r["nd_jax"]),
            f"{r['against']}: {spread(r['reference'])}",
            shown_rates(r),
            f"{r['load_before']:.1f}-{r['load_after']:.1f}",
        )
    # A log has no width of its own, and nine columns do not fit the 80 that are then assumed.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def shown_rates(result: dict[str, Any]) -> str:
    """`rates` in a cell: ours and the other side's, and the share of time that a loop waited."""
    shown = []
    if "rate" in result:
        rate = result["rate"]
        shown.append(f"{rate['nd_jax']:.3g}, {rate['reference']:.3g} {rate['unit']}")
    if "waited_share" in result:
        shown.append(f"waited {100 * result['waited_share']:.2g} %")
    return "; ".join(shown)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    suites = "\n".join(f"  {name:15} {what}" for name, (what, _) in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmark",
        description="Time nd_jax and its counterparts in turn; print and write the ratios.",
        epilog=f"suites:\n{suites}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--suite", action="append", choices=SUITES, help=f"repeatable; default: all but {', '.join(ON_REQUEST)}"
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each side (default 15)")
    parser.add_argument("--output", type=Path, default=Path("benchmark.json"), help="JSON (default benchmark.json)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: give at least 1")
    if not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: the folder {args.output.parent} does not exist; create it first")
    from converters.packages import need

    need("torch", "diffusers")
    import torch

    torch.set_num_threads(threads())
    names = args.suite or [name for name in SUITES if name not in ON_REQUEST]
    chosen = {name: list(SUITES[name][1]()) for name in names}
    results = []
    with stages(sum(map(len, chosen.values()))) as begin:
        for name, cases in chosen.items():
            results += run_cases(name, cases, args.repeats, begin)
    write_text(args.output, json.dumps({"machine": machine(), "repeats": args.repeats, "results": results}, indent=1))
    print_table(results)
    slower = sum(r["ratio"] > 1 for r in results)
    print(f"{len(results)} cases on {threads()} threads, nd_jax slower in {slower}; numbers in {args.output}")


if __name__ == "__main__":
    sys.exit(run_command(main))
