"""Kills random processes of a job at random moments and counts what that costs.

    python -m tests.kill_job WORKDIR [--kills 10] [--processes 2 4 1] [--steps 60] [--seed 0]

Starts the job, kills one of its processes with SIGKILL, waits until the others have stopped, reads every checkpoint
that is there, starts it again (with the next number of processes, in turn), and so on; the last start runs to the end.
Then compares with an undisturbed job of the first number of processes. The test suite does the same with fewer kills.
"""

import argparse
import dataclasses
import json
import logging
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from nd_jax.train.checkpoint import complete_steps, load_params
from tests.process_case import finish, free_port, history, logged_lines, start_module
from tests.process_worker import BATCH, DEVICES, EXAMPLES

BATCHES_OF_AN_EPOCH = EXAMPLES // BATCH
# Seconds before every step of a job that will be killed.
PAUSE = 0.05


@dataclasses.dataclass
class Kill:
    """One kill: where it came, and what the other processes did.

    Attributes:
      processes, victim: of how many, and which.
      running: whether all were running when it came.
      lines: of metrics when it came.
      stopped_after: seconds until the last of the others had ended.
      statuses: exit statuses of the others.
      errors: their lines that begin with `error: `.
      output: all that they printed.
      checkpoints: steps of the checkpoints that were there afterwards; all could be read.
    """

    processes: int
    victim: int
    running: bool
    lines: int
    stopped_after: float
    statuses: list[int]
    errors: list[str]
    output: str
    checkpoints: list[int]


def start_job(workdir, processes, steps, heartbeat=60, pause=0.0):
    """All processes of a job, which waits for so many seconds before every step."""
    given = [str(workdir), "--steps", str(steps), "--heartbeat-timeout", str(heartbeat), "--pause", str(pause)]
    if processes == 1:
        return [start_module("tests.process_worker", given, DEVICES)]
    given += ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(processes)]
    name = "tests.process_worker"
    return [start_module(name, [*given, "--process-id", str(i)], DEVICES // processes) for i in range(processes)]


def wait_for_lines(job, workdir, lines):
    """Until the job has written so many lines of metrics, or one of its processes has ended."""
    while all(p.poll() is None for p in job) and logged_lines(workdir) < lines:
        time.sleep(0.005)


def kill(job, victim, workdir, how=signal.SIGKILL, timeout=600):
    """Sends the signal to one process and waits for the others."""
    lines, running = logged_lines(workdir), all(p.poll() is None for p in job)
    job[victim].send_signal(how)
    clock = time.monotonic()
    others = [p for i, p in enumerate(job) if i != victim]
    outputs = [p.communicate(timeout=timeout)[0] for p in others]
    seconds = time.monotonic() - clock
    job[victim].kill()
    job[victim].communicate()
    steps = complete_steps(workdir / "checkpoints")
    for step in steps:
        load_params(workdir, step)
    return Kill(
        processes=len(job),
        victim=victim,
        running=running,
        lines=lines,
        stopped_after=seconds,
        statuses=[p.returncode for p in others],
        errors=[line for output in outputs for line in output.splitlines() if line.startswith("error: ")],
        output="\n".join(outputs),
        checkpoints=steps,
    )


def kill_and_finish(workdir, kills, processes, steps, seed, heartbeat=60, starts=1, tell=lambda kill: None):
    """Kills so often, then lets the job end, in at most so many starts; the numbers of processes take turns."""
    draw, done = random.Random(seed), []
    for index, lines in enumerate(sorted(draw.sample(range(1, steps - 2), kills))):
        # The last steps take longer than the wait: no job ends before it is killed.
        job = start_job(workdir, processes[index % len(processes)], steps, heartbeat, PAUSE)
        wait_for_lines(job, workdir, lines)
        time.sleep(draw.uniform(0.0, 2 * PAUSE))
        done.append(kill(job, draw.randrange(len(job)), workdir))
        tell(done[-1])
    for start in range(starts):
        try:
            finish(*start_job(workdir, processes[kills % len(processes)], steps, heartbeat))
            return done
        except AssertionError as error:
            # On a busy machine processes may come too far apart for Gloo, which has a limit of its own.
            if start + 1 == starts:
                raise
            print(f"a start failed:\n{error}", flush=True)


def count_examples(workdir, steps):
    """(lost, duplicated, changed) examples of a run.

    Every epoch must have read every id once. A batch that was read again after a kill counts once, and as changed
    where it was not the same.
    """
    read, changed = np.full((steps, BATCH), -1), 0
    for path in (workdir / "examples").iterdir():
        for line in path.read_text().split("\n")[:-1]:
            record = json.loads(line)
            row = read[record["position"]]
            for at, example in zip(record["rows"], record["examples"], strict=True):
                changed += row[at] not in (-1, example)
                row[at] = example
    lost = duplicated = 0
    for epoch in np.split(read, range(BATCHES_OF_AN_EPOCH, steps, BATCHES_OF_AN_EPOCH)):
        counts = Counter(epoch[epoch >= 0].tolist())
        lost += epoch.size - len(counts)
        duplicated += sum(counts.values()) - len(counts)
    return lost, duplicated, changed


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.kill_job")
    parser.add_argument("workdir", type=Path, help="a new folder")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, nargs="+", default=[2], help="of every start, in turn")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.getLogger("absl").setLevel(logging.CRITICAL)

    def tell(k):
        when = f"at {k.lines} lines" if k.running else "too late"
        print(
            f"{k.processes} processes, killed {k.victim} {when}: the others ended after {k.stopped_after:.1f} s with "
            f"{k.statuses} and {len(k.errors)} error lines; whole checkpoints {k.checkpoints}",
            flush=True,
        )

    given = args.processes, args.steps, args.seed
    kill_and_finish(args.workdir / "undisturbed", 0, *given, starts=3)
    kills = kill_and_finish(args.workdir / "killed", args.kills, *given, starts=3, tell=tell)
    want, got = history(args.workdir / "undisturbed"), history(args.workdir / "killed")
    equal, difference = sum(got[k] == want[k] for k in want), max(abs(got[k] - want[k]) for k in want)
    lost, duplicated, changed = count_examples(args.workdir / "killed", args.steps)
    print(
        f"{sum(k.running for k in kills)} kills, {len(want)} numbers in {args.steps} steps: {equal} equal bit by bit, "
        f"largest difference {difference:.3g}; examples lost {lost}, duplicated {duplicated}, changed {changed}; the "
        f"others ended within {max(k.stopped_after for k in kills):.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
