"""Compiling the train steps of a config for devices that need not be there, and measuring what they will cost.

The steps are those of `loop.train`, over the same state, shardings and mesh axes; only the arrays are shapes.
"""

import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from nd_jax.distill.base import Distillation
from nd_jax.train import hlo, loop, sharding
from nd_jax.train import step as steps
from nd_jax.train.checkpoint import abstract_with_shardings
from nd_jax.train.collectives import Collective, collectives
from nd_jax.train.cost import Flops, jaxpr_flops


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      arguments: inputs of the step: state, frozen weights, batch.
      elsewhere: what is in memory in training and is no input of this step (frozen weights of the other roles).
      output: results; `alias` of them lie where the state lay.
      temporaries: everything in between.
      code: the program.
      peak: the most that is in use at a time, `elsewhere` included.
    """

    arguments: int
    elsewhere: int
    output: int
    alias: int
    temporaries: int
    code: int
    peak: int


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """One role's step.

    Attributes:
      role: which.
      flops: of all devices together, from the program as JAX wrote it.
      products: of one device, from the program as XLA partitioned it; None when it did not get there.
      collectives: likewise.
      open_loops: loops whose length is not known, their bodies counted once.
      memory: None when the compiler ran out of it.
      error: the compiler's words then.
      seconds, processor_seconds: of tracing and compiling.
    """

    role: str
    flops: Flops
    products: hlo.Products | None
    collectives: tuple[Collective, ...]
    open_loops: int
    memory: Memory | None
    error: str
    seconds: float
    processor_seconds: float


@dataclasses.dataclass(frozen=True)
class StepArguments:
    """What the steps are called with, as shapes with shardings, and the steps.

    Attributes:
      state, frozen, batch: arguments of every step.
      train_steps: trained role -> jitted step.
    """

    state: steps.TrainState
    frozen: dict[str, Any]
    batch: dict[str, jax.ShapeDtypeStruct]
    train_steps: Mapping[str, Any]


def step_arguments(
    config: Mapping[str, Any], method: Distillation, mesh: Mesh, row: Mapping[str, jax.ShapeDtypeStruct]
) -> StepArguments:
    """Args and steps of a resolved config.

    Args:
      config: as `loop.train` takes it.
      method: what it describes.
      mesh: of any devices.
      row: columns of a batch without their first axis.

    Raises:
      UserError: the batch does not divide.
    """
    loop.check_batch(config, mesh)
    optimizers = loop.make_optimizers(config, method)
    abstract = loop.abstract_state(config, method, optimizers)
    shardings = steps.state_shardings(abstract, method, optimizers, mesh)
    frozen = steps.frozen_shardings(method, mesh)
    rows, split = config["batch_size"], sharding.batch_sharding(mesh)
    return StepArguments(
        state=abstract_with_shardings(abstract, shardings),
        frozen={name: abstract_with_shardings(method.roles[name].abstract, s) for name, s in frozen.items()},
        batch={k: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype, sharding=split) for k, x in row.items()},
        train_steps=loop.make_train_steps(config, method, optimizers, shardings, frozen, mesh),
    )


def resident_bytes(tree: Any) -> int:
    """Bytes of shapes with shardings on one device, without padding."""
    return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    count = 1
    for size in leaf.sharding.shard_shape(leaf.shape):
        count *= size
    return count * leaf.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class LoweredStep:
    """One role's step before compilation.

    Attributes:
      lowered: compiles to the step that training runs.
      flops: of all devices together, from the program as JAX wrote it.
      unread: bytes on one device of what the step is given and does not read.
    """

    lowered: jax.stages.Lowered
    flops: Flops
    unread: int

    def memory(self, compiled: jax.stages.Compiled) -> Memory:
        """What the compiler says that `compiled`, made of `lowered`, takes."""
        return _memory(compiled.memory_analysis(), self.unread)


def lower_step(role: str, arguments: StepArguments, mesh: Mesh) -> LoweredStep:
    """Traces and lowers one role's step.

    Args:
      role: which.
      arguments: of `step_arguments`.
      mesh: the mesh of their shardings.
    """
    given = (arguments.state, arguments.frozen, arguments.batch)
    # Without the mesh in context, logical constraints of activations would have no effect.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = arguments.train_steps[role].trace(*given)
        # What jit does too: it drops what no result depends on, and inputs that nothing reads.
        jaxpr, used = partial_eval.dce_jaxpr(traced.jaxpr.jaxpr, [True] * len(traced.jaxpr.jaxpr.outvars))
        lowered = traced.lower()
    unread = [leaf for leaf, is_used in zip(jax.tree.leaves(given), used, strict=True) if not is_used]
    return LoweredStep(lowered, jaxpr_flops(jaxpr), resident_bytes(unread))


def compile_step(role: str, arguments: StepArguments, mesh: Mesh, slices: int = 1) -> CompiledStep:
    """Traces and compiles one role's step.

    Args:
      role: which.
      arguments: of `step_arguments`.
      mesh: the mesh of their shardings.
      slices: of its devices.
    """
    clock, processor = time.perf_counter(), time.process_time()
    step = lower_step(role, arguments, mesh)
    error, memory, module = "", None, None
    with tempfile.TemporaryDirectory() as folder, _uncached():
        try:
            memory = step.memory(step.lowered.compile(compiler_options=_dump_options(folder)))
        except jax.errors.JaxRuntimeError as failure:
            if "RESOURCE_EXHAUSTED" not in str(failure):
                raise
            error = _shortage(str(failure))
        partitioned = _partitioned(Path(folder))
    if partitioned:
        module = hlo.parse(partitioned)
    return CompiledStep(
        role=role,
        flops=step.flops,
        products=hlo.products(module) if module else None,
        collectives=tuple(collectives(module, mesh.size, slices)) if module else (),
        open_loops=len(module.open_loops) if module else 0,
        memory=memory,
        error=error,
        seconds=time.perf_counter() - clock,
        processor_seconds=time.process_time() - processor,
    )


def _memory(found: Any, elsewhere: int) -> Memory:
    arguments, output = found.argument_size_in_bytes, found.output_size_in_bytes
    alias, temporaries = found.alias_size_in_bytes, found.temp_size_in_bytes
    code = found.generated_code_size_in_bytes
    # Results that lie in place of arguments are no further memory.
    peak = arguments + output - alias + temporaries + code
    return Memory(arguments, elsewhere, output, alias, temporaries, code, peak + elsewhere)


def _dump_options(folder: str) -> dict[str, Any]:
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": ".*spmd-partitioning.*"}


def _partitioned(folder: Path) -> str:
    """Text of the module after the partitioner, or as it began, when there is one device and nothing to partition."""
    for pattern in (r"\.after_[\w-]*spmd-partitioning\.", r"\.before_optimizations\.txt$"):
        found = sorted(path for path in folder.iterdir() if re.search(pattern, path.name))
        if found:
            return found[-1].read_text(encoding="utf-8")
    return ""


def _shortage(message: str) -> str:
    """The sentence of XLA's message that has the numbers."""
    found = re.search(r"[^.:\n]*(?:exceeds available|Ran out of memory|exceed)[^\n]*", message)
    return (found.group() if found else message).strip()[:300]


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Compiles for real: JAX's cache of compiled programs would leave nothing to read."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
