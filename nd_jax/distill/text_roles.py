"""The frozen text networks of a model folder, as the role "text" of methods that start from a whole model."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from nd_jax.distill.base import Params, Role
from nd_jax.distill.folders import folder_config, folders_hash, tuples
from nd_jax.models import t5
from nd_jax.models.clip_text import CLIPTextConfig
from nd_jax.models.context_adapter import ContextAdapterConfig
from nd_jax.models.text_conditioning import LOGICAL_AXES, TextEncoders
from nd_jax.weights import networks
from nd_jax.weights.folder import load_component
from nd_jax.weights.network import Network, abstract_params

ADAPTER = "context_adapter"


def text_sizes(root: Path) -> dict[str, dict[str, Any]]:
    """Sizes of a folder's text networks as plain data: two CLIPs, and T5 or DT5 with its ContextAdapter.

    Raises:
      UserError: a subfolder holds another network, or none.
    """
    sizes = {}
    for name in ("text_encoder", "text_encoder_2"):
        sizes[name] = dataclasses.asdict(folder_config(root / name, networks.CLIP_TEXT)[1])
    network, t5_sizes = folder_config(root / "text_encoder_3", networks.T5_ENCODER, networks.DISTIL_T5)
    sizes["text_encoder_3"] = dataclasses.asdict(t5_sizes)
    if network is networks.DISTIL_T5:
        sizes[ADAPTER] = dataclasses.asdict(folder_config(root / ADAPTER, networks.CONTEXT_ADAPTER)[1])
    return sizes


def text_encoders(sizes: Mapping[str, Mapping[str, Any]]) -> TextEncoders:
    """`TextEncoders` of `text_sizes`; entries of other names are ignored.

    Raises:
      TypeError, ValueError: sizes that there are not, or that do not fit together.
    """
    t5_sizes, adapter = dict(sizes["text_encoder_3"]), None
    if ADAPTER in sizes:
        adapter = ContextAdapterConfig(**tuples(sizes[ADAPTER]))
        t5_config = t5.DistilT5Config(**t5_sizes | {"encoder": t5.T5Config(**t5_sizes["encoder"])})
    else:
        t5_config = t5.T5Config(**t5_sizes)
    clips = [CLIPTextConfig(**sizes[name]) for name in ("text_encoder", "text_encoder_2")]
    return TextEncoders(*clips, t5_config, adapter)


def text_role(root: Path, encoders: TextEncoders, dtype: str = "float32") -> Role:
    """The frozen role: parameter trees under the names of the subfolders, in `dtype`."""
    parts = _networks(encoders)
    abstract = {name: abstract_params(network, sizes, jnp.dtype(dtype)) for name, (network, sizes) in parts.items()}

    def load() -> Params:
        return {name: load_component(root / name, network, dtype).params for name, (network, _) in parts.items()}

    folders = [root / name for name in parts]
    return Role(
        abstract=abstract,
        logical_axes=LOGICAL_AXES,
        source=", ".join(map(str, folders)),
        sha256=lambda: folders_hash(folders),
        load=load,
    )


def _networks(encoders: TextEncoders) -> dict[str, tuple[Network, Any]]:
    distilled = encoders.context_adapter is not None
    parts = {
        "text_encoder": (networks.CLIP_TEXT, encoders.text_encoder),
        "text_encoder_2": (networks.CLIP_TEXT, encoders.text_encoder_2),
        "text_encoder_3": (networks.DISTIL_T5 if distilled else networks.T5_ENCODER, encoders.text_encoder_3),
    }
    return parts | ({ADAPTER: (networks.CONTEXT_ADAPTER, encoders.context_adapter)} if distilled else {})
