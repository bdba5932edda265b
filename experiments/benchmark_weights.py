"""Benchmark cases of weights that enter and leave, side by side with reading and writing the same files in PyTorch.

    import    safetensors -> our store, against safetensors -> a file of torch.save
    export    our store -> safetensors, against a file of torch.load -> safetensors

Ours also renames and turns every array, checks names, shapes and values' range, and hashes the source. Both sides read
what is in the system's cache.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from converters.packages import need
from experiments.benchmark_case import Case
from nd_jax.models.t5 import T5_XXL, T5Config

WEIGHTS = "model.safetensors"


def write_component(folder: Path, config: T5Config) -> int:
    """A T5 encoder of random weights in bfloat16, in the released layout; bytes of its weights."""
    import jax.numpy as jnp

    from experiments.random_model import random_params
    from nd_jax.weights.folder import save_component
    from nd_jax.weights.networks import T5_ENCODER

    params = random_params(T5_ENCODER, config, np.random.default_rng(0), jnp.dtype("bfloat16"))
    save_component(folder, T5_ENCODER, config, params)
    return (folder / WEIGHTS).stat().st_size


def weight_calls(folder: Path, config: T5Config) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """What runs -> (ours, PyTorch's). Both imports have run once, so that the exports have something to read."""
    need("torch")
    import torch
    from safetensors.torch import load_file, save_file

    from converters.export_torch import export_torch
    from converters.import_torch import import_torch

    source, store, file = folder / "source", folder / "store", folder / "source.pt"
    write_component(source, config)

    calls = {
        "import": (lambda: import_torch(source, store), lambda: torch.save(load_file(source / WEIGHTS), file)),
        "export": (
            lambda: export_torch(store, folder / "export"),
            lambda: save_file(torch.load(file, weights_only=True), folder / WEIGHTS),
        ),
    }
    for run in calls["import"]:
        run()
    return calls


def weight_cases(config: T5Config | None = None) -> Iterator[Case]:
    """The embedding and the first layer of T5 v1.1 XXL, 0.65 GB."""
    import dataclasses
    import math

    import jax

    from nd_jax.weights.networks import T5_ENCODER, abstract_params

    config = config or dataclasses.replace(T5_XXL, num_layers=1)
    size = 2 * sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(T5_ENCODER, config)))
    for what in ("import", "export"):

        def build(what=what):
            folder = tempfile.TemporaryDirectory()
            ours, theirs = weight_calls(Path(folder.name), config)[what]
            return lambda: (ours(), folder)[0], theirs

        name = f"{what} of a T5 encoder, {size / 1e9:.2f} GB"
        yield Case(name, {"bytes": size}, build, "PyTorch", amount=size / 1e9, unit="GB")
