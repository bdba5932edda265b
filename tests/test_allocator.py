"""The allocator setting: memory that is freed and asked for again is not zeroed by the kernel again."""

import subprocess
import sys

import pytest

# Page faults of 20 blocks of 40 MB, one after another. A process of its own: the setting lasts as long as its process.
PROGRAM = """
import resource, sys
import numpy as np
from nd_jax.train.allocator import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(10_000_000, np.float32)
before = faults()
for _ in range(20):
    np.ones(10_000_000, np.float32)
print(faults() - before)
"""


def page_faults(how):
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=120)
    if done.returncode == 3:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator alone is told")
def test_freed_memory_is_used_again():
    kept, returned = page_faults("keep"), page_faults("default")
    assert kept < 1000
    # With transparent huge pages a fault is 2 MiB instead of 4 KiB.
    assert returned >= 20 * 40_000_000 // 2**21
