"""What the full configs run with on TPU slices: one table for `experiments.train --topology` and `experiments.plan`.

An entry is a config on a slice; its values are what `--config.KEY=VALUE` sets, and the command line's own count more.
Of several slices each keeps its rows and its part of the mesh: batch and `mesh.data` are multiplied by their number, so
that gradients alone cross between slices.

    fsdp    16 for transformers and T5-XXL: a shard of more chips is too narrow to be worth gathering, 96 columns of
            1536. 1 for the decoder, whose weights are small beside its activations
    data    what is left of the chips
    rows    the config's batch where it divides among the chips; else a row of every stage on each
    attention   JAX's kernel where the plan says that logits in memory bound the step

docs/tpu.md has the plans of these entries: what was compiled, and what was not.
"""

from collections.abc import Mapping
from pathlib import Path

from nd_jax.errors import UserError

# Chips of a slice.
SLICES = {"v5e:4x4": 16, "v5e:16x16": 256, "v5p:2x2x4": 16, "v5p:4x4x4": 64, "v6e:4x4": 16, "v6e:16x16": 256}


def _settings(
    batch: Mapping[int, int],
    fsdp: int = 16,
    microbatches: Mapping[str, int] | None = None,
    attention: Mapping[str, str] | None = None,
) -> dict[str, dict[str, int | str]]:
    """Slice -> settings: the batch on so many chips, and on some slices its parts and the attention."""
    mesh = lambda chips: {"mesh.data": chips // fsdp, "mesh.fsdp": fsdp, "mesh.tensor": 1}
    parts = lambda name: {"microbatches": (microbatches or {}).get(name, 1)}
    kernel = lambda name: {"attention": attention[name]} if name in (attention or {}) else {}
    return {
        name: {"batch_size": batch[chips], **parts(name), **mesh(chips), **kernel(name)}
        for name, chips in SLICES.items()
    }


# Twenty-four rows on a chip of v5e: a quarter less time at best.
MEMORY_BOUND = {"v5e:4x4": "splash"}
TABLE: dict[str, dict[str, dict[str, int | str]]] = {
    "text_encoder.py:full": _settings({16: 2048, 64: 2048, 256: 2048}),
    # Four clips on a chip take 14.6 GiB, two at a time 9.8.
    "decoder.py:full": _settings({16: 64, 64: 64, 256: 256}, fsdp=1, microbatches={"v5e:4x4": 2}),
    "prune.py:stage1": _settings({16: 48, 64: 192, 256: 768}),
    "prune.py:stage2": _settings({16: 384, 64: 384, 256: 768}, attention=MEMORY_BOUND),
    # The paper's 24 rows are 8 of each stage, and would leave half of 16 chips without.
    "steps.py:full": _settings({16: 48, 64: 192, 256: 768}),
    "teacher.py:full": _settings({16: 384, 64: 384, 256: 768}, attention=MEMORY_BOUND),
}


def topology_overrides(spec: str, topology: str, slices: int = 1) -> list[str]:
    """Settings of a config on `slices` slices of a topology as `load_config` takes them; none without an entry.

    Args:
      spec: the config, "experiments/configs/steps.py:full".
      topology: of a slice, "v5e:4x4".
      slices: how many.
    """
    path, _, variant = spec.partition(":")
    found = TABLE.get(f"{Path(path).name}:{variant}", {}).get(topology, {})
    times = lambda key: slices if key in ("batch_size", "mesh.data") else 1
    return [f"--config.{key}={times(key) * value}" for key, value in found.items()]


def training_overrides(spec: str, topology: str | None, slices: int) -> list[str]:
    """What `--topology` and `--slices` of a training stand for; nothing without a topology.

    Raises:
      UserError: the table has no such entry.
    """
    found = [] if topology is None else topology_overrides(spec, topology, slices)
    if topology is not None and not found:
        raise UserError(
            f"--topology {topology} has no entry for {spec} in experiments/topologies.py: use one of "
            f"{', '.join(SLICES)} with one of {', '.join(TABLE)}, or leave it out and set --config.mesh.data, "
            ".mesh.fsdp and .batch_size"
        )
    return found
