"""The video transformer in model folders: Neodragon's PyramidMMDiT, and Pyramid-Flow's with the context embedder."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.errors import UserError
from nd_jax.models.mmdit import LOGICAL_AXES, MMDiTConfig, PyramidMMDiT
from nd_jax.models.mmdit_block import TokenGeometry
from nd_jax.models.positions import position_table
from nd_jax.weights.network import Network, config_fields
from nd_jax.weights.table import CONV2D, KEEP, LINEAR, Weight, WeightTable, rows

POSITION_BUFFER = "pos_embed.pos_embed"

QK_NORM = {"qk_norm": "rms_norm"}

# The public Pyramid-Flow class is several models; its released weights are this one. Its own defaults are not, so a
# config.json that lacks one of these is taken to mean the released model.
RELEASED_SETTINGS = {
    "pos_embed_type": "sincos",
    "temp_pos_embed_type": "rope",
    "add_temp_pos_embed": True,
    "use_temporal_causal": True,
    "use_t5_mask": True,
    "interp_condition_pos": True,
    **QK_NORM,
}
TEACHER_LAYERS = 24


def _linear(ours: str, theirs: str) -> tuple:
    return (f"{ours}/kernel", f"{theirs}.weight", LINEAR), (f"{ours}/bias", f"{theirs}.bias", KEEP)


def _block_rows(ours: str, theirs: str, last: bool) -> WeightTable:
    table = [
        *_linear("image/modulation", "norm1.linear"),
        *_linear("text/modulation", "norm1_context.linear"),
        ("image/query_norm/scale", "attn.norm_q.weight", KEEP),
        ("image/key_norm/scale", "attn.norm_k.weight", KEEP),
        ("text/query_norm/scale", "attn.norm_add_q.weight", KEEP),
        ("text/key_norm/scale", "attn.norm_add_k.weight", KEEP),
        *_linear("image/query", "attn.to_q"),
        *_linear("image/key", "attn.to_k"),
        *_linear("image/value", "attn.to_v"),
        *_linear("text/query", "attn.add_q_proj"),
        *_linear("text/key", "attn.add_k_proj"),
        *_linear("text/value", "attn.add_v_proj"),
        *_linear("image/out", "attn.to_out.0"),
        *_linear("image/mlp_up", "ff.net.0.proj"),
        *_linear("image/mlp_down", "ff.net.2"),
    ]
    if not last:
        table += [
            *_linear("text/out", "attn.to_add_out"),
            *_linear("text/mlp_up", "ff_context.net.0.proj"),
            *_linear("text/mlp_down", "ff_context.net.2"),
        ]
    return rows(ours, theirs, *table)


def mmdit_table(config: MMDiTConfig) -> WeightTable:
    """Rows of the whole transformer; the stacked blocks are 0 .. num_layers - 2."""
    last = config.num_layers - 1
    return (
        *patch_embed_rows(),
        *rows(
            "",
            "",
            *_linear("timestep_embedder/hidden", "time_text_embed.timestep_embedder.linear_1"),
            *_linear("timestep_embedder/out", "time_text_embed.timestep_embedder.linear_2"),
            *_linear("pooled_embedder/hidden", "time_text_embed.text_embedder.linear_1"),
            *_linear("pooled_embedder/out", "time_text_embed.text_embedder.linear_2"),
            *(_linear("context_embedder", "context_embedder") if config.context_embedder else ()),
        ),
        *(_block_rows("blocks/", "transformer_blocks.{}.", last=False) if last else ()),
        *_block_rows("last_block/", f"transformer_blocks.{last}.", last=True),
        *rows("", "", *_linear("norm_out", "norm_out.linear"), *_linear("proj_out", "proj_out")),
    )


def patch_embed_rows(ours: str = "patch_embed/") -> WeightTable:
    return (
        Weight(f"{ours}kernel", "pos_embed.proj.weight", CONV2D),
        Weight(f"{ours}bias", "pos_embed.proj.bias"),
    )


def _read(json: Mapping[str, Any], settings: Mapping[str, Any], **values: Any) -> MMDiTConfig:
    for key, needed in settings.items():
        if json.get(key, needed) != needed:
            raise UserError(f"{key} is {json[key]!r}: only video transformers with {key} {needed!r} are supported")
    given = {key: value for key, value in json.items() if key != "context_embedder"}
    return MMDiTConfig(**{**values, **config_fields(MMDiTConfig, given)})


def _write(config: MMDiTConfig, class_name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {key: value for key, value in dataclasses.asdict(config).items() if key != "context_embedder"}
    return {"_class_name": class_name, **sizes, **settings}


def _inputs(config: MMDiTConfig) -> tuple:
    image, text, length = 2, 2, 4
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    rotary = array(1, image, config.attention_head_dim // 2)
    mask = jax.ShapeDtypeStruct((1, 1, length, length), jnp.bool_)
    return (
        array(1, image, config.token_dim),
        array(1, text, config.context_dim),
        array(1, config.pooled_projection_dim),
        array(1),
        TokenGeometry(array(1, image, config.inner_dim), rotary, rotary, mask),
    )


_COMMON = dict(
    module=PyramidMMDiT,
    inputs=_inputs,
    table=mmdit_table,
    logical_axes=LOGICAL_AXES,
    weights_file="diffusion_pytorch_model.safetensors",
    ignored=(re.escape(POSITION_BUFFER),),
    buffers=lambda config: {POSITION_BUFFER: lambda: position_table(config)},
)

PYRAMID_MMDIT = Network(
    name="pyramid_mmdit",
    class_names=("PyramidMMDiT",),
    read_config=lambda json: _read(json, QK_NORM),
    write_config=lambda config: _write(config, "PyramidMMDiT", {}),
    **_COMMON,
)

PYRAMID_FLOW_MMDIT = Network(
    name="pyramid_flow_mmdit",
    class_names=("PyramidDiffusionMMDiT",),
    read_config=lambda json: _read(json, RELEASED_SETTINGS, num_layers=TEACHER_LAYERS, context_embedder=True),
    write_config=lambda config: _write(config, "PyramidDiffusionMMDiT", RELEASED_SETTINGS),
    **_COMMON,
)
