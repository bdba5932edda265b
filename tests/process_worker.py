"""One process of a job that trains the toy method and writes down which examples it read; a command for other tests.

    python -m tests.process_worker WORKDIR [--coordinator HOST:PORT --num-processes N --process-id I]

Four devices over all processes. An epoch is six batches, so that every id comes exactly once in six steps.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

from nd_jax.data.loader import Batches, LoaderOptions
from nd_jax.errors import run_command
from nd_jax.train.loop import train
from nd_jax.train.processes import joined
from tests.toy_method import WIDTH, ToyBatches, toy_config, toy_method

BATCH, EXAMPLES, DEVICES = 16, 96, 4


class Numbers:
    """Example i is the number i."""

    fingerprint = "numbers"

    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        return index


def transform(index, rng):
    own = np.random.default_rng(index)
    return {"x": own.normal(size=WIDTH).astype(np.float32), "weight": np.float32(own.integers(1, 5))}


class Counted:
    """Batches whose examples are written to a file as they are taken, before they are trained on."""

    def __init__(self, batches, path, pause):
        self._batches, self._file, self._pause = batches, path.open("a", buffering=1), pause

    def __next__(self):
        time.sleep(self._pause)
        position = self._batches.get_state()["position"]
        batch = next(self._batches)
        rows = len(batch["example"]) * jax.process_index() + np.arange(len(batch["example"]))
        line = {"position": position, "rows": rows.tolist(), "examples": batch["example"].tolist()}
        self._file.write(json.dumps(line) + "\n")
        return batch

    def get_state(self):
        return self._batches.get_state()

    def set_state(self, state):
        self._batches.set_state(state)


def eval_rows():
    """This process's part of one held-out batch."""
    batch, rows = next(ToyBatches(BATCH)), BATCH // jax.process_count()
    mine = slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)
    yield {name: values[mine] for name, values in batch.items()}


def run(args):
    config = toy_config(num_steps=args.steps, batch_size=BATCH, mesh={"data": 2, "fsdp": 2})
    options = LoaderOptions(BATCH, 0, jax.process_index(), jax.process_count())
    examples = args.workdir / "examples"
    examples.mkdir(parents=True, exist_ok=True)
    name = f"{jax.process_index()}_of_{jax.process_count()}.jsonl"
    batches = Counted(Batches(Numbers(), transform, options), examples / name, args.pause)
    result = train(config, toy_method(), batches, eval_rows, args.workdir)
    print(f"{'interrupted' if result.interrupted else 'finished'} at step {result.step}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds before every step")
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    parser.add_argument("--heartbeat-timeout", type=int, default=60)
    parser.add_argument("--start-timeout", type=int, default=300)
    args = parser.parse_args()
    job = contextlib.nullcontext()
    if args.coordinator:
        log = args.workdir / "logs" / f"process_{args.process_id}.txt"
        given = args.coordinator, args.num_processes, args.process_id
        job = joined(log, *given, args.heartbeat_timeout, args.start_timeout)
    with job:
        run(args)


if __name__ == "__main__":
    sys.exit(run_command(main))
