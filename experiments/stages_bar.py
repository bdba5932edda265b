"""How far a walk is: one bar over all of its stages on a terminal, a line a stage elsewhere."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Of its weight, what a stage that runs may fill; the rest comes when it is done.
MOST = 0.97
# Seconds of the weights that must have passed before the pace of this machine counts.
WARM = 20.0
LINE = 60  # characters of a command's last line


def time_left(weights: Mapping[str, float], done: float, now: float, elapsed: float) -> float:
    """Seconds left of a walk.

    Args:
      weights: expected seconds of every stage.
      done: sum of those that are done.
      now: weight of the stage that runs, as far as it is.
      elapsed: seconds since the beginning.
    """
    passed = done + now
    pace = elapsed / passed if passed > WARM else 1.0
    return max(sum(weights.values()) - passed, 0.0) * pace


class Bar:
    """A bar with stage, share and time left; use it as a context manager.

    Args:
      weights: stage -> expected seconds of all that will run, in order.
      tick: seconds between two updates.

    Attributes:
      shown: whether there is a terminal to show it on.
    """

    def __init__(self, weights: Mapping[str, float], tick: float):
        self._weights, self._tick = weights, tick
        self._done, self._current, self._bar = 0.0, "", None
        self._begin = self._stage_begin = time.monotonic()
        self.shown = sys.stderr.isatty() and len(weights) > 1

    def __enter__(self) -> "Bar":
        if self.shown:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.fields[stage]}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
            columns += (TimeElapsedColumn(), TextColumn("{task.fields[left]}"), TextColumn("{task.fields[line]}"))
            self._bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=1 / self._tick)
            self._task = self._bar.add_task("", total=sum(self._weights.values()), stage="", left="", line="")
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, name: str, what: str) -> None:
        """A stage begins; the one before it is done."""
        self._done += self._weights.get(self._current, 0.0)
        self._current, self._stage_begin = name, time.monotonic()
        place = f"[{list(self._weights).index(name) + 1}/{len(self._weights)}]"
        self.message(f"== {name}: {what}")
        if self._bar is not None:
            self._bar.update(self._task, stage=f"{place} {name}", line="")
            self.tick()

    def tick(self, log: Path | None = None) -> None:
        """Time passed; `log` is what the command has printed so far."""
        if self._bar is None:
            return
        now, weight = time.monotonic(), self._weights[self._current]
        share = min(now - self._stage_begin, MOST * weight)
        left = time_left(self._weights, self._done, share, now - self._begin)
        minutes, seconds = divmod(round(left), 60)
        line = {} if log is None else {"line": last_line(log)}
        self._bar.update(self._task, completed=self._done + share, left=f"{minutes}:{seconds:02d} left", **line)

    def message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)


def last_line(log: Path) -> str:
    """The last words that a command printed, without what would be read as markup."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 400))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "")[:LINE].replace("[", "(").replace("]", ")")
