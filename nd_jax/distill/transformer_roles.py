"""The video transformer of a model folder as a role: frozen as a teacher, or trained from what the folder holds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from nd_jax.data.latents import read_manifest
from nd_jax.distill.base import Params, Role
from nd_jax.distill.folders import folder_config, folders_hash, text_hash
from nd_jax.distill.teacher import TRANSFORMER
from nd_jax.errors import UserError
from nd_jax.models.mmdit import LOGICAL_AXES, MMDiTConfig, keep_blocks
from nd_jax.weights.folder import load_component
from nd_jax.weights.mmdit import PYRAMID_FLOW_MMDIT, PYRAMID_MMDIT
from nd_jax.weights.network import Network, abstract_params

NETWORKS = (PYRAMID_FLOW_MMDIT, PYRAMID_MMDIT)


def transformer_config(folder: Path) -> tuple[Network, MMDiTConfig]:
    """Network, with or without a context embedder, and sizes of a transformer's folder.

    Raises:
      UserError: it holds another network, or none.
    """
    return folder_config(folder, *NETWORKS)


def network_of(name: str) -> Network:
    """The network of that name, which `transformer_config` gave."""
    return {network.name: network for network in NETWORKS}[name]


def latent_size(latents: str | Path, folder: Path, sizes: MMDiTConfig) -> dict[str, int]:
    """`VideoSize` of a folder of latents as plain data.

    Raises:
      UserError: the latents are not of that transformer's channels.
    """
    frames, height, width, channels = read_manifest(Path(latents)).latent_shape
    if channels != sizes.in_channels:
        raise UserError(
            f"{folder} takes latents of {sizes.in_channels} channels and {latents} has {channels}: "
            "prepare the latents with the VAE of that model"
        )
    return {"latent_frames": frames, "height": height, "width": width}


def frozen_transformer(folder: Path, network: Network, sizes: MMDiTConfig, dtype: str) -> Role:
    """The folder's transformer in `dtype`, frozen."""
    return Role(
        abstract={TRANSFORMER: abstract_params(network, sizes, jnp.dtype(dtype))},
        logical_axes=LOGICAL_AXES,
        source=str(folder),
        sha256=lambda: folders_hash([folder]),
        load=lambda: {TRANSFORMER: load_component(folder, network, dtype).params},
    )


def trained_transformer(folder: Path, network: Network, sizes: MMDiTConfig, kept: Sequence[int] | None = None) -> Role:
    """The folder's transformer in float32, to be trained; with `kept`, those of its blocks alone.

    Args:
      folder: of the transformer.
      network: what it holds.
      sizes: of what trains, thus with `len(kept)` blocks.
      kept: block numbers, or None for all.
    """
    blocks = "" if kept is None else json.dumps(list(kept))

    def load() -> Params:
        component: Any = load_component(folder, network, "float32")
        params = component.params
        return {TRANSFORMER: params if kept is None else keep_blocks(params, component.config, kept)[0]}

    return Role(
        abstract={TRANSFORMER: abstract_params(network, sizes)},
        logical_axes=LOGICAL_AXES,
        source=f"{folder}, blocks {blocks}" if blocks else str(folder),
        sha256=lambda: text_hash(folders_hash([folder]) + blocks),
        load=load,
        trainable=("^",),
    )
