"""Strict settings for every test, in the environment so that the processes which tests start have them too."""

import os
import sys
from pathlib import Path

from hypothesis import settings

if "jax" in sys.modules:
    raise RuntimeError(
        "a pytest plugin imported jax before tests/conftest.py could configure it: disable it with -p no:"
    )

ROOT = Path(__file__).parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
# Compilation takes most of the suite's time, so its results are kept for the next run; Bazel's caller says where.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

settings.register_profile("nd_jax", deadline=None, derandomize=True, max_examples=20, database=None)
settings.load_profile("nd_jax")
