"""The allocator setting: memory that is freed and asked for again is not zeroed by the kernel again."""

import subprocess
import sys

import pytest

# Page faults of a second round of blocks. A process of its own: the setting lasts as long as its process.
PROGRAM = """
import resource, sys
import numpy as np
from nd_jax.train.allocator import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
count, megabytes = int(sys.argv[2]), int(sys.argv[3])
blocks = lambda: [np.ones(megabytes << 18, np.float32) for _ in range(count)]
blocks()
before = faults()
blocks()
print(faults() - before)
"""


def page_faults(how, count, megabytes):
    arguments = [how, str(count), str(megabytes)]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=120)
    if done.returncode == 3:
        pytest.skip("not glibc")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator alone is told")
# More than the largest int of bytes too: a limit of 2 GiB had the tiny teacher's step zero its memory at every call.
@pytest.mark.parametrize(("count", "megabytes"), [(20, 40), (9, 256)])
def test_freed_memory_is_used_again(count, megabytes):
    kept = page_faults("keep", count, megabytes)
    assert kept < 1000
    if count == 20:
        # With transparent huge pages a fault is 2 MiB instead of 4 KiB.
        assert page_faults("default", count, megabytes) >= count * megabytes // 2
