"""A text encoder of a few thousand random weights, as a model folder, for the tests of the device route."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from nd_jax.models.context_adapter import ContextAdapterConfig
from nd_jax.models.t5 import DistilT5Config, T5Config
from nd_jax.weights import networks
from nd_jax.weights.folder import Component, save_component

ENCODER = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
ADAPTER = ContextAdapterConfig(input_dims=24, output_dims=16, layer_depths=(24, 24), skips=(True, True))
LENGTH = 16


def random_params(network: networks.Network, config: Any, rng: np.random.Generator) -> dict[str, Any]:
    """Norm scales near 1, embeddings and tables N(0, 1), kernels N(0, 1 / fan in)."""

    def leaf(path: tuple, spec: jax.ShapeDtypeStruct) -> np.ndarray:
        name, noise = path[-1].key, rng.standard_normal(spec.shape).astype(np.float32)
        if name == "scale":
            return 1 + 0.1 * noise
        return noise * np.float32(spec.shape[-2] ** -0.5) if name == "kernel" else noise

    return jax.tree_util.tree_map_with_path(leaf, networks.abstract_params(network, config))


def components(residual_gain: float = 1.0, adapter: ContextAdapterConfig = ADAPTER) -> dict[str, Component]:
    """Both components; `residual_gain` multiplies the residual stream."""
    rng = np.random.default_rng(0)
    dt5_config = DistilT5Config(ENCODER, ADAPTER.input_dims)
    dt5 = random_params(networks.DISTIL_T5, dt5_config, rng)
    blocks, gain = dt5["encoder"]["blocks"], np.float32(residual_gain)
    for module, name in (
        (blocks["attention"]["out"], "kernel"),
        (blocks["mlp"]["down"], "kernel"),
        (dt5["encoder"]["token_embedding"], "embedding"),
    ):
        module[name] = module[name] * gain
    return {
        "text_encoder_3": Component(networks.DISTIL_T5, dt5_config, dt5),
        "context_adapter": Component(
            networks.CONTEXT_ADAPTER, adapter, random_params(networks.CONTEXT_ADAPTER, adapter, rng)
        ),
    }


def write_model(folder: Path, residual_gain: float = 1.0) -> Path:
    """The components as a model folder in the released layout."""
    for name, component in components(residual_gain).items():
        save_component(folder / name, component.network, component.config, component.params)
    return folder
