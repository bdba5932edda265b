"""Virtual devices of a CPU: collectives in one order on all of them.

`XLA_FLAGS=--xla_force_host_platform_device_count=8` makes eight devices of one CPU. XLA's CPU runtime starts whatever
has its inputs, and keeps collectives in order only within one computation: a collective that does not depend on a loop
may start before or after those in the loop. Two devices that choose differently wait for each other until XLA aborts
the process, 40 seconds later. The scheduler that XLA uses by default places independent work side by side and makes
that likely; the one that saves memory places it one after another.
"""

import os
import re

ORDERED = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"


def order_collectives_of_virtual_devices() -> None:
    """Adds the scheduler to XLA_FLAGS where they ask for virtual devices; a scheduler that they name already stays.

    Call it before anything asks JAX for devices.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    counts = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    # Of a flag that is given twice, XLA takes the last.
    if counts and int(counts[-1]) > 1 and "--xla_cpu_scheduler_type=" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {ORDERED}"
