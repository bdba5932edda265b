"""Strict settings for every test, in the environment so that the processes which tests start have them too."""

import gc
import os
import signal
import sys
from pathlib import Path

from hypothesis import settings

if "jax" in sys.modules:
    raise RuntimeError(
        "a pytest plugin imported jax before tests/conftest.py could configure it: disable it with -p no:"
    )

ROOT = Path(__file__).parent.parent

os.environ["JAX_PLATFORMS"] = "cpu"
# Compilation takes most of the suite's time. Without LLVM's optimisations and with XLA's older generator of fused loops
# it takes a sixth; the tolerances stay what they are. Flags of the caller come later and win, so the suite also runs
# with programs compiled as usual: XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true
# --xla_llvm_disable_expensive_passes=false" make test.
QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
)
# As nd_jax.train.virtual_devices does for trainings.
ORDERED = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = " ".join((*QUICK, ORDERED, os.environ.get("XLA_FLAGS", ""), DEVICES))
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
# What was compiled is kept for the other worker, for processes that tests start and for the next run; Bazel's caller
# says where.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# As `nd_jax.errors.run_command` does for commands.
gc.set_threshold(20_000)

# A suite that a script starts in the background ignores SIGINT, and so would the processes that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("nd_jax", deadline=None, derandomize=True, max_examples=20, database=None)
settings.load_profile("nd_jax")

# The files that take longest, longest first: a worker that starts one of them last works on while the others are done.
SLOW = (
    "test_teacher",
    "test_prune",
    "test_processes",
    "test_faults",
    "test_steps_training",
    "test_prune_plan",
    "test_tiny_prune",
    "test_teacher_samples",
    "test_super_resolution",
    "test_rollouts",
    "test_first_frame",
    "test_first_frame_pipeline",
    "test_safety_checker",
    "test_demo",
    "test_mmdit_graph",
    "test_export_graphs",
    "test_bundle",
    "test_sampler",
    "test_decoder_training",
    "test_video_vae_training",
    "test_import_export",
    "test_shipped_teacher",
    "test_toy_teacher",
    "test_generate",
    "test_prepare",
    "test_train_command",
    "test_loop",
)


def pytest_collection_modifyitems(items):
    order = {name: k for k, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.stem, len(SLOW)))
