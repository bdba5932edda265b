"""The one exception that a command shows to its user without a traceback, and the way it does so."""

import errno
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Bad input: the message names the thing, its value and the remedy, in one line."""


def first_line(error: BaseException) -> str:
    """What a library's exception says, short enough for our messages: its first line, or its class if it is mute."""
    full = os.strerror(errno.ENOSPC)
    if full in str(error):  # TensorStore puts the operating system's reason behind two screens of paths.
        return full
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line[:300]


def quiet_libraries() -> None:
    """Orbax and its event loop log a traceback for every failure that they also raise; the user needs one line."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # After a failed save TensorStore's threads report its other writes to an event loop that is closed by then: a
    # traceback for each. What was not begun is never awaited.
    sys.unraisablehook = _ignoring_closed_loops(sys.unraisablehook)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _ignoring_closed_loops(hook: Callable[[Any], object]) -> Callable[[Any], None]:
    """An unraisable-exception hook that leaves out what nobody waits for: a thread's call of a closed event loop."""

    def unraisablehook(unraisable: Any) -> None:
        trace = unraisable.exc_traceback
        calls_loop = trace is not None and trace.tb_frame.f_code.co_qualname == "BaseEventLoop.call_soon_threadsafe"
        if not (calls_loop and unraisable.exc_type is RuntimeError):
            hook(unraisable)

    return unraisablehook


def run_command(main: Callable[[], int | None]) -> int:
    """Exit status of a command: a `UserError` becomes `error: ...` on stderr and status 1."""
    quiet_libraries()
    # Tracing makes millions of objects that stay. Collections as frequent as Python's look at all of them again and
    # again: a tenth of a training's start.
    gc.set_threshold(20_000)
    try:
        return main() or 0
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")  # In one piece: `print` writes the end of the line apart.
        return 1
