"""The one exception that a command shows to its user without a traceback, and the way it does so."""

import errno
import logging
import os
import sys
from collections.abc import Callable


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


def run_command(main: Callable[[], int | None]) -> int:
    """Exit status of a command: a `UserError` becomes `error: ...` on stderr and status 1."""
    quiet_libraries()
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
