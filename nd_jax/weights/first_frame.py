"""The networks of the first frame in model folders: diffusers' UNet (SSD-1B, SDXL) and image autoencoder."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.models import autoencoder_kl, unet
from nd_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from nd_jax.models.unet import TIME_IDS, UNet, UNetConfig, down_stages, mid_depth, up_stages
from nd_jax.weights.network import Network, strict_config_fields
from nd_jax.weights.table import WeightTable, conv2d, linear, norm, rows

UNET_CLASS = "UNet2DConditionModel"
AUTOENCODER_CLASS = "AutoencoderKL"

# What diffusers takes for keys that a config.json lacks: its own defaults, which are those of Stable Diffusion 1.
UNET_ABSENT = {
    "sample_size": None,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}

# What the public class can be told and this network always is.
UNET_FIXED = {
    "act_fn": ("silu",),
    "addition_embed_type": ("text_time",),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
    "upcast_attention": (False, None),
    "use_linear_projection": (True,),
}
# The first is of another kind of `addition_embed_type`, the second of training.
UNET_UNUSED = ("addition_embed_type_num_heads", "dropout")

AUTOENCODER_ABSENT = {"block_out_channels": (64,), "layers_per_block": 1, "scaling_factor": 0.18215, "sample_size": 32}
AUTOENCODER_FIXED = {
    "act_fn": ("silu",),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
    "shift_factor": (None,),
    "use_post_quant_conv": (True,),
    "use_quant_conv": (True,),
}


def _residual_rows(ours: str, theirs: str, shortcut: bool, time: bool) -> WeightTable:
    return rows(
        f"{ours}/",
        f"{theirs}.",
        *norm("norm1", "norm1"),
        *conv2d("conv1", "conv1"),
        *(linear("time", "time_emb_proj") if time else ()),
        *norm("norm2", "norm2"),
        *conv2d("conv2", "conv2"),
        *(conv2d("shortcut", "conv_shortcut") if shortcut else ()),
    )


# --- UNet -------------------------------------------------------------------------------------------------------------


def _transformer_rows(ours: str, theirs: str) -> WeightTable:
    attention = lambda name, key: (
        *linear(f"{name}/query", f"{key}.to_q", bias=False),
        *linear(f"{name}/key", f"{key}.to_k", bias=False),
        *linear(f"{name}/value", f"{key}.to_v", bias=False),
        *linear(f"{name}/out", f"{key}.to_out.0"),
    )
    ends = (*norm("norm", "norm"), *linear("proj_in", "proj_in"), *linear("proj_out", "proj_out"))
    return (
        *rows(f"{ours}/", f"{theirs}.", *ends),
        *rows(
            f"{ours}/blocks/",
            f"{theirs}.transformer_blocks.{{}}.",
            *norm("self_norm", "norm1"),
            *attention("self_attention", "attn1"),
            *norm("cross_norm", "norm2"),
            *attention("cross_attention", "attn2"),
            *norm("mlp_norm", "norm3"),
            *linear("mlp/up", "ff.net.0.proj"),
            *linear("mlp/down", "ff.net.2"),
        ),
    )


def unet_table(config: UNetConfig) -> WeightTable:
    """Rows of the whole UNet."""
    table = list(
        rows(
            "",
            "",
            *conv2d("conv_in", "conv_in"),
            *linear("time_embedding/hidden", "time_embedding.linear_1"),
            *linear("time_embedding/out", "time_embedding.linear_2"),
            *linear("size_embedding/hidden", "add_embedding.linear_1"),
            *linear("size_embedding/out", "add_embedding.linear_2"),
            *norm("norm_out", "conv_norm_out"),
            *conv2d("conv_out", "conv_out"),
        )
    )
    if config.time_cond_proj_dim is not None:
        table += rows("", "", *linear("guidance_projection", "time_embedding.cond_proj", bias=False))
    for way, stages in (("down", down_stages(config)), ("up", up_stages(config))):
        for i, stage in enumerate(stages):
            theirs = f"{way}_blocks.{i}"
            for j, (inputs, depth) in enumerate(zip(stage.inputs, stage.depths, strict=True)):
                ours = f"{stage.name}_block_{j}"
                table += _residual_rows(ours, f"{theirs}.resnets.{j}", inputs != stage.width, time=True)
                if depth:
                    table += _transformer_rows(f"{ours}_transformer", f"{theirs}.attentions.{j}")
            if stage.resamples:
                table += rows("", "", *conv2d(f"{stage.name}_sample/conv", f"{theirs}.{way}samplers.0.conv"))
    if config.mid_block_type is not None:
        table += _residual_rows("mid_block_0", "mid_block.resnets.0", shortcut=False, time=True)
        if mid_depth(config):
            table += _transformer_rows("mid_block_0_transformer", "mid_block.attentions.0")
            table += _residual_rows("mid_block_1", "mid_block.resnets.1", shortcut=False, time=True)
    return tuple(table)


def _read_unet(json: Mapping[str, Any]) -> UNetConfig:
    return UNetConfig(**strict_config_fields(UNetConfig, json, UNET_ABSENT, UNET_FIXED, UNET_UNUSED))


def _write_unet(config: UNetConfig) -> dict[str, Any]:
    fixed = {key: values[0] for key, values in UNET_FIXED.items()}
    return {"_class_name": UNET_CLASS, **dataclasses.asdict(config), **fixed}


def _unet_inputs(config: UNetConfig) -> tuple:
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    guidance = config.time_cond_proj_dim
    return (
        array(1, 8, 8, config.in_channels),
        array(1),
        array(1, 2, config.cross_attention_dim),
        array(1, config.pooled_dim),
        array(1, TIME_IDS),
        None if guidance is None else array(1, guidance),
    )


UNET = Network(
    name="unet",
    class_names=(UNET_CLASS,),
    read_config=_read_unet,
    write_config=_write_unet,
    module=UNet,
    inputs=_unet_inputs,
    table=unet_table,
    logical_axes=unet.LOGICAL_AXES,
    weights_file="diffusion_pytorch_model.safetensors",
)

# --- image autoencoder ------------------------------------------------------------------------------------------------


def _half_rows(half: str) -> WeightTable:
    """What encoder and decoder have alike: the first and last convolutions and the mid block."""
    return (
        *rows(
            f"{half}/",
            f"{half}.",
            *conv2d("conv_in", "conv_in"),
            *norm("norm_out", "conv_norm_out"),
            *conv2d("conv_out", "conv_out"),
        ),
        *_residual_rows(f"{half}/mid/block_0", f"{half}.mid_block.resnets.0", shortcut=False, time=False),
        *_residual_rows(f"{half}/mid/block_1", f"{half}.mid_block.resnets.1", shortcut=False, time=False),
        *rows(
            f"{half}/mid/attention/",
            f"{half}.mid_block.attentions.0.",
            *norm("norm", "group_norm"),
            *linear("query", "to_q"),
            *linear("key", "to_k"),
            *linear("value", "to_v"),
            *linear("out", "to_out.0"),
        ),
    )


def autoencoder_table(config: AutoencoderKLConfig) -> WeightTable:
    """Rows of both halves."""
    table = [*rows("", "", *conv2d("quant_conv", "quant_conv"), *conv2d("post_quant_conv", "post_quant_conv"))]
    for half, way, widths, layers in (
        ("encoder", "down", config.block_out_channels, config.layers_per_block),
        ("decoder", "up", config.block_out_channels[::-1], config.layers_per_block + 1),
    ):
        table += _half_rows(half)
        previous = widths[0]
        for i, width in enumerate(widths):
            ours, theirs = f"{half}/{way}_{i}", f"{half}.{way}_blocks.{i}"
            for j in range(layers):
                table += _residual_rows(f"{ours}_block_{j}", f"{theirs}.resnets.{j}", width != previous, time=False)
                previous = width
            if i < len(widths) - 1:
                table += rows("", "", *conv2d(f"{ours}_sample/conv", f"{theirs}.{way}samplers.0.conv"))
    return tuple(table)


def _block_types(blocks: int) -> dict[str, list[str]]:
    return {"down_block_types": ["DownEncoderBlock2D"] * blocks, "up_block_types": ["UpDecoderBlock2D"] * blocks}


def _read_autoencoder(json: Mapping[str, Any]) -> AutoencoderKLConfig:
    blocks = len({**AUTOENCODER_ABSENT, **json}["block_out_channels"])
    fixed = AUTOENCODER_FIXED | {key: (types,) for key, types in _block_types(blocks).items()}
    return AutoencoderKLConfig(**strict_config_fields(AutoencoderKLConfig, json, AUTOENCODER_ABSENT, fixed))


def _write_autoencoder(config: AutoencoderKLConfig) -> dict[str, Any]:
    fixed = {key: values[0] for key, values in AUTOENCODER_FIXED.items()}
    types = _block_types(len(config.block_out_channels))
    return {"_class_name": AUTOENCODER_CLASS, **dataclasses.asdict(config), **types, **fixed}


AUTOENCODER_KL = Network(
    name="autoencoder_kl",
    class_names=(AUTOENCODER_CLASS,),
    read_config=_read_autoencoder,
    write_config=_write_autoencoder,
    module=AutoencoderKL,
    inputs=lambda config: (
        jax.ShapeDtypeStruct((1, config.space_factor, config.space_factor, config.in_channels), jnp.float32),
    ),
    table=autoencoder_table,
    logical_axes=autoencoder_kl.LOGICAL_AXES,
    weights_file="diffusion_pytorch_model.safetensors",
)
