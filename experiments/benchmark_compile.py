"""Benchmark cases of compilation: a program that a restart finds in the compilation cache, against compiling it.

Both sides trace, lower and compile from nothing, as a new process does: a restart pays the one, a first start the
other.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from experiments.benchmark_case import Case

Compile = Callable[[], Any]


@contextlib.contextmanager
def cache_in(folder: Path | None) -> Iterator[None]:
    """JAX's cache of compiled programs in a folder, or off; as it was afterwards."""
    settings = {
        "jax_enable_compilation_cache": folder is not None,
        "jax_compilation_cache_dir": None if folder is None else str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def compile_calls(folder: Path, compile_program: Compile) -> tuple[Compile, Compile]:
    """(compile with the cache in `folder`, without); the first run of ours fills it."""

    def run(cache: Path | None) -> Any:
        jax.clear_caches()
        with cache_in(cache):
            return compile_program()

    return lambda: run(folder), lambda: run(None)


def train_step_program() -> Compile:
    """The train step of the tiny text encoder."""
    from experiments.benchmark_checkpoint import tiny_config
    from nd_jax.data.registry import build_data
    from nd_jax.distill.registry import build_method
    from nd_jax.train.ahead import step_arguments
    from nd_jax.train.sharding import make_mesh

    with tempfile.TemporaryDirectory() as folder:
        config = tiny_config(Path(folder))
        batch = next(build_data(config, Path(folder))[0])
    row = {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in batch.items() if k != "example"}
    mesh = make_mesh(config["mesh"])

    def compile_program() -> Any:
        given = step_arguments(config, build_method(config), mesh, row)
        with jax.set_mesh(mesh):
            return given.train_steps["student"].lower(given.state, given.frozen, given.batch).compile()

    return compile_program


def joint_block_program() -> Compile:
    """A block of the video transformer at full size, forward, 256 image and 128 text tokens."""
    from nd_jax.models.mmdit import MMDiTConfig
    from nd_jax.models.mmdit_block import JointBlock, TokenGeometry

    config, image, text = MMDiTConfig(), 256, 128
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")
    turn = shape(1, image, config.attention_head_dim // 2)
    mask = jax.ShapeDtypeStruct((1, 1, image + text, image + text), "bool")
    geometry = TokenGeometry(shape(1, image, config.inner_dim), turn, turn, mask)
    inputs = shape(1, image, config.inner_dim), shape(1, text, config.inner_dim), shape(1, config.inner_dim)

    def compile_program() -> Any:
        block = JointBlock(config.num_attention_heads, config.attention_head_dim)
        params = jax.eval_shape(lambda *xs: block.init(jax.random.key(0), *xs), *inputs, geometry)
        return jax.jit(block.apply).lower(params, *inputs, geometry).compile()

    return compile_program


def compile_cases() -> Iterator[Case]:
    """A small train step, and a block of the video transformer."""
    for name, make_program in (
        ("train step of the tiny text encoder", train_step_program),
        ("joint block, forward", joint_block_program),
    ):

        def build(make_program=make_program):
            folder = tempfile.TemporaryDirectory()
            ours, theirs = compile_calls(Path(folder.name), make_program())
            return lambda: (ours(), folder)[0], theirs

        yield Case(f"compile {name}, cached", {}, build, "not cached")
