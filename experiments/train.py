"""Trains one distillation.

    python -m experiments.train --config experiments/configs/text_encoder.py:tiny --workdir runs/text_encoder \
        [--config.optimizer.learning_rate=1e-3 ...]

The same command continues a run that was interrupted. Several processes: start the command once in each, with
--coordinator, --num-processes and --process-id (on Cloud TPU pods, --distributed alone finds them).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.config_file import load_config, plain
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
    parser.add_argument("--distributed", action="store_true", help="several processes that find each other (TPU pods)")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, when they cannot find it")
    parser.add_argument("--num-processes", type=int, help="with --coordinator: how many processes run")
    parser.add_argument("--process-id", type=int, help="with --coordinator: which one this is, from 0")
    args, overrides = parser.parse_known_args(argv)
    given = [args.coordinator, args.num_processes, args.process_id]
    if any(g is not None for g in given) and None in given:
        parser.error("--coordinator, --num-processes and --process-id go together")
    return args, overrides


def start_processes(args: argparse.Namespace) -> None:
    """Joins the processes of the job; does nothing for a single one."""
    import jax

    if args.coordinator:
        # Only the CPU backend reads this; without it CPU processes cannot reduce across hosts.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    elif args.distributed:
        jax.distributed.initialize()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args, overrides = parse(argv)
    config = plain(load_config(args.config, overrides))

    from nd_jax.train.allocator import keep_freed_memory

    keep_freed_memory()
    start_processes(args)
    import jax

    from nd_jax.data.registry import build_data
    from nd_jax.distill.registry import build_method, resolve_config
    from nd_jax.files import write_text
    from nd_jax.train.checkpoint import claim_workdir
    from nd_jax.train.loop import train

    config = resolve_config(config)
    claim_workdir(args.workdir, config)
    if not jax.config.jax_compilation_cache_dir:
        # A restarted job should not compile again what it compiled before.
        jax.config.update("jax_compilation_cache_dir", str(args.workdir.resolve() / "compilation_cache"))
    train_batches, eval_batches = build_data(config, args.workdir)
    result = train(config, build_method(config), train_batches, eval_batches.__iter__, args.workdir)
    if jax.process_index() == 0:
        summary = {"step": result.step, "interrupted": result.interrupted, **result.metrics}
        write_text(args.workdir / "result.json", json.dumps(summary, indent=2) + "\n")
        state = "interrupted" if result.interrupted else "finished"
        print(f"{state} at step {result.step}: {args.workdir / 'checkpoints'}, {args.workdir / 'metrics.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
