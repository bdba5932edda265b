"""Train steps as files: StableHLO with shardings, written for devices that need not be there (`jax.export`).

A file is data (a flatbuffer; no pickle and no machine code), so reading one from elsewhere is safe. It holds the
program as JAX wrote it: no weights, but every constant that came from the config and from the folders it names. Who has
it needs neither these nor this version of the source to compile the program for devices of the same number.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import export
from jax.sharding import Mesh

from nd_jax.errors import UserError, first_line
from nd_jax.train.ahead import StepArguments

HEADER = b"nd_jax step 1\n"

Step = Callable[[Any, Any, dict[str, jax.Array]], tuple[Any, dict[str, jax.Array]]]


def export_step(role: str, arguments: StepArguments, mesh: Mesh, platforms: Sequence[str]) -> bytes:
    """One role's step as a file's content.

    Args:
      role: which.
      arguments: of `ahead.step_arguments`.
      mesh: the mesh of their shardings.
      platforms: that the program shall run on, such as ("tpu",).

    Returns:
      `HEADER`, SHA-256 of what follows, and serialised the function ([leaves of the state], [leaves of frozen roles],
      batch) -> ([leaves of the state], metrics): trees of a state have types that a file cannot name.
    """
    trees = jax.tree.structure(arguments.state), jax.tree.structure(arguments.frozen)
    step = arguments.train_steps[role]

    def flat(state: list, frozen: list, batch: dict) -> tuple[list, dict]:
        state, metrics = step(*(jax.tree.unflatten(*pair) for pair in zip(trees, (state, frozen), strict=True)), batch)
        return jax.tree.leaves(state), metrics

    given = jax.tree.leaves(arguments.state), jax.tree.leaves(arguments.frozen), arguments.batch
    jitted = jax.jit(flat, in_shardings=jax.tree.map(lambda x: x.sharding, given), donate_argnums=0)
    # Without the mesh in context, logical constraints of activations would have no effect.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        data = bytes(export.export(jitted, platforms=tuple(platforms))(*given).serialize())
    return HEADER + hashlib.sha256(data).digest() + data


def load_step(data: bytes) -> Step:
    """The step of a file: (state, frozen roles, batch) -> (state, metrics), on as many devices; it donates the state.

    Args:
      data: what `export_step` gave.

    Raises:
      UserError: it is damaged, or of a version that this JAX does not read.
    """
    start = len(HEADER) + hashlib.sha256().digest_size
    digest, content = data[len(HEADER) : start], data[start:]
    # One wrong byte in a constant would be a program, too.
    if not data.startswith(HEADER) or hashlib.sha256(content).digest() != digest:
        raise UserError("not an exported step, or a damaged one: export it again")
    try:
        program = export.deserialize(bytearray(content))
    except Exception as error:  # The reader of flatbuffers has no errors of its own.
        raise UserError(f"cannot read an exported step ({first_line(error)}): export it again") from error

    def step(state: Any, frozen: Any, batch: dict[str, jax.Array]) -> tuple[Any, dict[str, jax.Array]]:
        leaves, metrics = program.call(jax.tree.leaves(state), jax.tree.leaves(frozen), batch)
        return jax.tree.unflatten(jax.tree.structure(state), leaves), metrics

    return jax.jit(step, donate_argnums=0)
