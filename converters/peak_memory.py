"""The largest memory that a process has had."""

import re
import resource
import sys
from pathlib import Path


def peak_bytes() -> int:
    """Largest resident memory of this process so far, in bytes.

    Linux has it in /proc: `getrusage` counts what the parent had before the exec, too, and is for other systems.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if found:
        return int(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
