"""Where numbers go: `WORKDIR/metrics.jsonl`, TensorBoard, and the terminal.

One JSON object a line with `step` and slash-separated names (`train/loss`, `eval/cosine`, `eval/snr_db`). After a crash
the file may hold lines past the checkpoint that the run resumes from; they are removed on resume, so that the file
always tells one history.
"""

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax

from nd_jax.errors import UserError
from nd_jax.files import write_text


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file. A last line cut short by a kill is dropped."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


class MetricsWriter:
    """Writes from process 0 alone; the others hold a writer that does nothing."""

    def __init__(self, workdir: Path, resume_step: int):
        self._active = jax.process_index() == 0
        if not self._active:
            return
        from tensorboardX import SummaryWriter

        path = workdir / "metrics.jsonl"
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if not self._active:
            return
        try:
            self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self._file.name}: cannot be written ({error.strerror}): free disk space and run the command again"
            ) from error
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if not self._active:
            return
        # What is still buffered failed in `write` already.
        with contextlib.suppress(OSError):
            self._file.close()
        self._board.close()


class Progress:
    """A rich bar on a terminal, one line a log interval elsewhere; silent on other processes.

    Shows the step, units a second, time left and the last values.
    """

    def __init__(self, start: int, total: int, batch: int, unit: str):
        self._batch, self._unit, self._total = batch, unit, total
        self._active = jax.process_index() == 0
        self._last_step, self._last_time = start, time.monotonic()
        self._bar = None
        if self._active and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("train"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task("train", total=total, completed=start, text="")
            self._bar.start()

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, values: Mapping[str, float]) -> float:
        """Shows values; returns units a second since the last report."""
        now = time.monotonic()
        rate = (step - self._last_step) * self._batch / max(now - self._last_time, 1e-9)
        left = (self._total - step) * self._batch / max(rate, 1e-9)
        self._last_step, self._last_time = step, now
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=f"{rate:.0f} {self._unit}/s  {shown}")
        elif self._active:
            print(f"step {step}/{self._total}  {rate:.0f} {self._unit}/s  {left:.0f} s left  {shown}", flush=True)
        return rate

    def message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text)
        elif self._active:
            print(text, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
