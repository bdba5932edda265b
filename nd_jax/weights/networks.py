"""The networks that can be read from and written to model folders.

A `Network` (see `network.py`) ties together what belongs to one class of a released folder: how its config.json is
read and written, its Flax module, and its weight table. Here are T5's and the adapters; `NETWORKS` are all there are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.errors import UserError
from nd_jax.models import context_adapter, t5
from nd_jax.weights.clip import CLIP_TEXT, CLIP_TEXT_MODEL, SAFETY_CHECKER
from nd_jax.weights.first_frame import AUTOENCODER_KL, UNET
from nd_jax.weights.mmdit import PYRAMID_FLOW_MMDIT, PYRAMID_MMDIT
from nd_jax.weights.network import Network, abstract_params, config_fields, flat_shapes
from nd_jax.weights.quicksrnet import QUICKSRNET
from nd_jax.weights.table import KEEP, LINEAR, Weight, WeightTable, rows
from nd_jax.weights.vae import ASYMMETRIC_VIDEO_VAE, CAUSAL_VIDEO_VAE, VIDEO_VAE_ENCODER

# Callers find a network and what can be done with it in one place.
__all__ = ["Network", "abstract_params", "flat_shapes"]

# --- T5 ---------------------------------------------------------------------------------------------------------------


def _read_t5(json: Mapping[str, Any]) -> t5.T5Config:
    activation = json.get("feed_forward_proj", "relu")
    if activation != "gated-gelu":
        raise UserError(
            f"T5 config has feed_forward_proj {activation!r}: only T5 v1.1 encoders (gated-gelu) are supported"
        )
    return t5.T5Config(**config_fields(t5.T5Config, json))


def _t5_json(config: t5.T5Config) -> dict[str, Any]:
    return {
        **dataclasses.asdict(config),
        "dense_act_fn": "gelu_new",
        "feed_forward_proj": "gated-gelu",
        "is_gated_act": True,
        "is_encoder_decoder": False,
        "use_cache": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "model_type": "t5",
    }


def _write_t5(config: t5.T5Config) -> dict[str, Any]:
    return {"architectures": ["T5EncoderModel"], **_t5_json(config), "tie_word_embeddings": False}


def _t5_table(ours: str = "", theirs: str = "") -> WeightTable:
    block, attention, mlp = (theirs + "encoder.block.{}.", "layer.0.SelfAttention.", "layer.1.DenseReluDense.")
    return (
        Weight(
            ours + "token_embedding/embedding",
            theirs + "shared.weight",
            aliases=(theirs + "encoder.embed_tokens.weight",),
        ),
        Weight(ours + "relative_bias", theirs + "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        *rows(
            ours + "blocks/",
            block,
            ("attention_norm/scale", "layer.0.layer_norm.weight", KEEP),
            ("attention/query/kernel", attention + "q.weight", LINEAR),
            ("attention/key/kernel", attention + "k.weight", LINEAR),
            ("attention/value/kernel", attention + "v.weight", LINEAR),
            ("attention/out/kernel", attention + "o.weight", LINEAR),
            ("mlp_norm/scale", "layer.1.layer_norm.weight", KEEP),
            ("mlp/gate/kernel", mlp + "wi_0.weight", LINEAR),
            ("mlp/up/kernel", mlp + "wi_1.weight", LINEAR),
            ("mlp/down/kernel", mlp + "wo.weight", LINEAR),
        ),
        Weight(ours + "final_norm/scale", theirs + "encoder.final_layer_norm.weight"),
    )


def _token_inputs(length: int, with_mask: bool) -> tuple:
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return (ids, ids) if with_mask else (ids,)


T5_ENCODER = Network(
    name="t5_encoder",
    class_names=("T5EncoderModel", "T5ForConditionalGeneration"),
    read_config=_read_t5,
    write_config=_write_t5,
    module=t5.T5Encoder,
    inputs=lambda config: _token_inputs(8, with_mask=True),
    table=lambda config: _t5_table(),
    logical_axes=t5.LOGICAL_AXES,
    ignored=(r"decoder\..*", r"lm_head\.weight"),
)


def _read_distil_t5(json: Mapping[str, Any]) -> t5.DistilT5Config:
    encoder = _read_t5(json)
    width = json.get("project_in_dim", encoder.d_model)
    if width != encoder.d_model:
        raise UserError(f"DistilT5 config has project_in_dim {width} and d_model {encoder.d_model}: they must be equal")
    return t5.DistilT5Config(encoder, json.get("out_dim", json.get("project_out_dim", 4096)))


def _write_distil_t5(config: t5.DistilT5Config) -> dict[str, Any]:
    return {
        "architectures": ["T5EncoderWithProjection"],
        **_t5_json(config.encoder),
        "project_in_dim": config.encoder.d_model,
        "out_dim": config.projection_dim,
        "project_out_dim": config.projection_dim,
    }


DISTIL_T5 = Network(
    name="distil_t5",
    class_names=("T5EncoderWithProjection",),
    read_config=_read_distil_t5,
    write_config=_write_distil_t5,
    module=t5.DistilT5,
    inputs=lambda config: _token_inputs(8, with_mask=True),
    table=lambda config: (
        *_t5_table("encoder/", "encoder."),
        Weight("projection/projection_hidden/kernel", "final_projection.0.weight", LINEAR),
        Weight("projection/projection_out/kernel", "final_projection.3.weight", LINEAR),
    ),
    logical_axes=t5.LOGICAL_AXES,
)

# --- ContextAdapter and the teacher's context embedder ----------------------------------------------------------------


def _adapter_table(config: context_adapter.ContextAdapterConfig) -> WeightTable:
    layers = [(f"hidden_{i}", f"network_layers.{i}.1") for i in range(len(config.layer_depths))]
    layers.append(("out", f"network_layers.{len(layers)}.0"))
    table = []
    for ours, theirs in layers:
        table.append(Weight(f"{ours}/kernel", f"{theirs}.weight", LINEAR))
        if config.use_biases:
            table.append(Weight(f"{ours}/bias", f"{theirs}.bias"))
    return tuple(table)


CONTEXT_ADAPTER = Network(
    name="context_adapter",
    class_names=("ContextAdapter",),
    read_config=lambda json: context_adapter.ContextAdapterConfig(
        **config_fields(context_adapter.ContextAdapterConfig, json)
    ),
    write_config=lambda config: {"_class_name": "ContextAdapter", **dataclasses.asdict(config)},
    module=context_adapter.ContextAdapter,
    inputs=lambda config: (jax.ShapeDtypeStruct((1, 8, config.input_dims), jnp.float32),),
    table=_adapter_table,
    logical_axes=context_adapter.LOGICAL_AXES,
    weights_file="diffusion_pytorch_model.safetensors",
)


def _read_embedder(json: Mapping[str, Any]) -> context_adapter.ContextEmbedderConfig:
    return context_adapter.ContextEmbedderConfig(**config_fields(context_adapter.ContextEmbedderConfig, json))


CONTEXT_EMBEDDER = Network(
    name="context_embedder",
    class_names=("PyramidDiffusionMMDiT",),
    read_config=_read_embedder,
    write_config=lambda config: {"_class_name": "PyramidDiffusionMMDiT", **dataclasses.asdict(config)},
    module=context_adapter.ContextEmbedder,
    inputs=lambda config: (jax.ShapeDtypeStruct((1, 8, config.joint_attention_dim), jnp.float32),),
    table=lambda config: (
        Weight("context_embedder/kernel", "context_embedder.weight", LINEAR),
        Weight("context_embedder/bias", "context_embedder.bias"),
    ),
    logical_axes=context_adapter.LOGICAL_AXES,
    weights_file="diffusion_pytorch_model.safetensors",
    partial=True,
)

NETWORKS = (
    *(T5_ENCODER, DISTIL_T5, CONTEXT_ADAPTER, CONTEXT_EMBEDDER),
    *(CLIP_TEXT, CLIP_TEXT_MODEL, SAFETY_CHECKER),
    *(PYRAMID_MMDIT, PYRAMID_FLOW_MMDIT),
    *(CAUSAL_VIDEO_VAE, ASYMMETRIC_VIDEO_VAE, VIDEO_VAE_ENCODER),
    *(UNET, AUTOENCODER_KL),
    QUICKSRNET,
)


def network_of(json: Mapping[str, Any], where: str) -> Network:
    """The network that a config.json describes: the whole one, a part of it has to be asked for.

    Args:
      json: the file's dictionary.
      where: the file's path, for the message.

    Raises:
      UserError: no class is named, or none that is known here.
    """
    name = class_name(json)
    network = known_network(name)
    if network is None:
        known = sorted(c for n in NETWORKS for c in n.class_names if not n.partial)
        raise UserError(f"{where}: class {name!r} is not supported; known classes are {', '.join(known)}")
    return network


def class_name(json: Mapping[str, Any]) -> str | None:
    """The class that a config.json names, in the spelling of diffusers or of transformers."""
    return json.get("_class_name") or next(iter(json.get("architectures") or ()), None)


def known_network(name: str | None) -> Network | None:
    """The whole network of a released class, None for a class that is not known."""
    return next((n for n in NETWORKS if name in n.class_names and not n.partial), None)
