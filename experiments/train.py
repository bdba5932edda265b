"""Trains one distillation.

    python -m experiments.train --config experiments/configs/text_encoder.py:tiny --workdir runs/text_encoder \
        [--config.optimizer.learning_rate=1e-3 ...]

The same command continues a run that was interrupted. On a TPU slice, --topology v5e:4x4 sets batch and mesh of a full
config; see docs/tpu.md. Several processes: start the command once in each, with
--coordinator, --num-processes and --process-id (on Cloud TPU pods, --distributed alone finds them); see
docs/distributed.md.
"""

import argparse
import contextlib
import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.config_file import load_config, plain
from experiments.topologies import training_overrides
from nd_jax.errors import run_command


def parse(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Known arguments, and the `--config.KEY=VALUE` overrides."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.train",
        description="Train one distillation; the same command continues an interrupted run.",
        epilog="Any config value can be set with --config.KEY=VALUE, such as --config.optimizer.learning_rate=1e-3.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE.py:VARIANT", help="experiments/configs/NAME.py:tiny|full"
    )
    parser.add_argument(
        "--workdir", required=True, type=Path, help="checkpoints, metrics.jsonl and tensorboard/ go here"
    )
    parser.add_argument(
        "--topology", metavar="NAME", help="TPU slice, such as v5e:4x4: batch and mesh of experiments/topologies.py"
    )
    parser.add_argument("--slices", type=int, default=1, help="slices of that topology (default 1)")
    add_process_arguments(parser)
    args, overrides = parser.parse_known_args(argv)
    check_job_arguments(parser, args)
    return args, overrides


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """What `processes` reads."""
    parser.add_argument("--distributed", action="store_true", help="several processes that find each other (TPU pods)")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, when they cannot find it")
    parser.add_argument("--num-processes", type=int, help="with --coordinator: how many processes run")
    parser.add_argument("--process-id", type=int, help="with --coordinator: which one this is, from 0")
    parser.add_argument(
        "--heartbeat-timeout",
        type=int,
        default=60,
        metavar="SECONDS",
        help="a process silent for so long is lost, and all others stop (default 60)",
    )
    parser.add_argument(
        "--start-timeout",
        type=int,
        default=300,
        metavar="SECONDS",
        help="how long processes wait for one another at the start (default 300)",
    )


def check_job_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the command where processes or slices are half described."""
    given = [args.coordinator, args.num_processes, args.process_id]
    if any(g is not None for g in given) and None in given:
        parser.error("--coordinator, --num-processes and --process-id go together")
    if args.slices < 1 or (args.slices > 1 and args.topology is None):
        parser.error("--slices: use 1 or more, with --topology")


def processes(args: argparse.Namespace, logs: Path) -> contextlib.AbstractContextManager[None]:
    """Joins the processes of the job, which write to the folder `logs`; does nothing for a single one."""
    if not (args.coordinator or args.distributed):
        return contextlib.nullcontext()
    from nd_jax.train.processes import joined

    name = socket.gethostname() if args.process_id is None else f"process_{args.process_id}"
    return joined(
        logs / f"{name}.txt",
        args.coordinator,
        args.num_processes,
        args.process_id,
        heartbeat_seconds=args.heartbeat_timeout,
        start_seconds=args.start_timeout,
    )


@contextlib.contextmanager
def job(args: argparse.Namespace, logs: Path) -> Iterator[None]:
    """This process as one that runs train steps, alone or with the others of its job."""
    from nd_jax.train.allocator import keep_freed_memory
    from nd_jax.train.virtual_devices import order_collectives_of_virtual_devices

    keep_freed_memory()
    order_collectives_of_virtual_devices()
    with processes(args, logs):
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args, overrides = parse(argv)
    placed = training_overrides(args.config, args.topology, args.slices)
    config = plain(load_config(args.config, [*placed, *overrides]))

    with job(args, args.workdir / "logs"):
        run(config, args.workdir)
    return 0


def cache_folder(workdir: Path) -> Path | None:
    """Where compiled programs are kept, so that a restarted job need not compile again; None where JAX decides.

    JAX decides when JAX_COMPILATION_CACHE_DIR names a folder, or JAX_ENABLE_COMPILATION_CACHE=false. Nothing is kept in
    a workdir that this process may not write to.
    """
    import jax

    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return None
    return workdir.resolve() / "compilation_cache" if os.access(workdir, os.W_OK) else None


def run(config: dict[str, Any], workdir: Path) -> None:
    """Trains in this process, one of the job's."""
    import jax

    from nd_jax.data.registry import build_data
    from nd_jax.distill.registry import build_method, resolve_config
    from nd_jax.files import write_text
    from nd_jax.models.attention import check_attention
    from nd_jax.train.checkpoint import claim_workdir
    from nd_jax.train.loop import train

    # Before anything is written or read.
    check_attention(config.get("attention", ""))
    config = resolve_config(config)
    claim_workdir(workdir, config)
    if cache := cache_folder(workdir):
        jax.config.update("jax_compilation_cache_dir", str(cache))
    train_batches, eval_batches = build_data(config, workdir)
    result = train(config, build_method(config), train_batches, eval_batches.__iter__, workdir)
    if jax.process_index() == 0:
        summary = {"step": result.step, "interrupted": result.interrupted, **result.metrics}
        write_text(workdir / "result.json", json.dumps(summary, indent=2) + "\n")
        state = "interrupted" if result.interrupted else "finished"
        print(f"{state} at step {result.step}: {workdir / 'checkpoints'}, {workdir / 'metrics.jsonl'}")


if __name__ == "__main__":
    sys.exit(run_command(main))
