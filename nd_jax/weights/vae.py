"""The causal video VAE in model folders: Pyramid-Flow's class, Neodragon's, and the encoder half of either."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.errors import UserError
from nd_jax.models.taehv import GROUPS, MEMORY_BLOCKS
from nd_jax.models.video_vae import (
    LOGICAL_AXES,
    AsymmetricCausalVideoVAE,
    AsymmetricVideoVAEConfig,
    CausalVideoVAE,
    CausalVideoVAEConfig,
    VideoEncoderConfig,
    VideoVAEEncoder,
)
from nd_jax.weights.network import Network, config_fields
from nd_jax.weights.table import CONV2D, CONV3D, KEEP, LINEAR, WeightTable, rows

NATIVE_CLASS = "CausalVideoVAE"
ASYMMETRIC_CLASS = "AsymmetricCausalVideoVAE"

# What the public classes can be told and these networks always are.
ENCODER_SETTINGS = {"encoder_act_fn": "silu"}
NATIVE_SETTINGS = {**ENCODER_SETTINGS, "encoder_double_z": True, "decoder_act_fn": "silu", "interpolate": False}
BLOCK_TYPES = {
    "encoder_down_block_types": "DownEncoderBlockCausal3D",
    "decoder_up_block_types": "UpDecoderBlockCausal3D",
}

# Places in the public tiny decoder's list of blocks: a group is 3 memory blocks, upsampling, growth, convolution.
TINY_FIRST_GROUP, TINY_GROUP_LENGTH = 3, 6


def _conv(ours: str, theirs: str) -> tuple:
    return (f"{ours}/kernel", f"{theirs}.conv.weight", CONV3D), (f"{ours}/bias", f"{theirs}.conv.bias", KEEP)


def _norm(ours: str, theirs: str) -> tuple:
    return (f"{ours}/scale", f"{theirs}.weight", KEEP), (f"{ours}/bias", f"{theirs}.bias", KEEP)


def _linear(ours: str, theirs: str) -> tuple:
    return (f"{ours}/kernel", f"{theirs}.weight", LINEAR), (f"{ours}/bias", f"{theirs}.bias", KEEP)


def _conv2d(ours: str, theirs: str) -> tuple:
    return (f"{ours}/kernel", f"{theirs}.weight", CONV2D), (f"{ours}/bias", f"{theirs}.bias", KEEP)


def _residual_rows(ours: str, theirs: str, shortcut: bool = False) -> WeightTable:
    return rows(
        f"{ours}/",
        f"{theirs}.",
        *_norm("norm1", "norm1"),
        *_conv("conv1", "conv1"),
        *_norm("norm2", "norm2"),
        *_conv("conv2", "conv2"),
        *(_conv("shortcut", "conv_shortcut") if shortcut else ()),
    )


def _frame_rows(ours: str) -> WeightTable:
    """What encoder and native decoder have alike: the first and last convolutions and the mid block."""
    return (
        *rows(
            ours,
            ours.replace("/", "."),
            *_conv("conv_in", "conv_in"),
            *_norm("norm_out", "conv_norm_out"),
            *_conv("conv_out", "conv_out"),
        ),
        *_residual_rows(f"{ours}mid/block_0", f"{ours[:-1]}.mid_block.resnets.0"),
        *_residual_rows(f"{ours}mid/block_1", f"{ours[:-1]}.mid_block.resnets.1"),
        *rows(
            f"{ours}mid/attention/",
            f"{ours[:-1]}.mid_block.attentions.0.",
            *_norm("norm", "group_norm"),
            *_linear("query", "to_q"),
            *_linear("key", "to_k"),
            *_linear("value", "to_v"),
            *_linear("out", "to_out.0"),
        ),
    )


def encoder_table(config: VideoEncoderConfig) -> WeightTable:
    """Rows of `encoder` and `quant_conv`."""
    table, previous = [*_frame_rows("encoder/")], config.encoder_block_out_channels[0]
    for i, width in enumerate(config.encoder_block_out_channels):
        ours, theirs = f"encoder/down_{i}_", f"encoder.down_blocks.{i}."
        for j in range(config.encoder_layers_per_block[i]):
            table += _residual_rows(f"{ours}block_{j}", f"{theirs}resnets.{j}", width != previous)
            previous = width
        if config.encoder_spatial_down_sample[i]:
            table += rows("", "", *_conv(f"{ours}space", f"{theirs}downsamplers.0.conv"))
        if config.encoder_temporal_down_sample[i]:
            table += rows("", "", *_conv(f"{ours}time", f"{theirs}temporal_downsamplers.0.conv"))
    return (*table, *rows("", "", *_conv("quant_conv", "quant_conv")))


def native_decoder_table(config: CausalVideoVAEConfig) -> WeightTable:
    """Rows of `post_quant_conv` and Pyramid-Flow's `decoder`."""
    widths = config.decoder_block_out_channels[::-1]
    table, previous = [*_frame_rows("decoder/")], widths[0]
    for i, width in enumerate(widths):
        ours, theirs = f"decoder/up_{i}_", f"decoder.up_blocks.{i}."
        for j in range(config.decoder_layers_per_block[i]):
            table += _residual_rows(f"{ours}block_{j}", f"{theirs}resnets.{j}", width != previous)
            previous = width
        if config.decoder_spatial_up_sample[i]:
            table += rows("", "", *_conv(f"{ours}space/conv", f"{theirs}upsamplers.0.conv"))
        if config.decoder_temporal_up_sample[i]:
            table += rows("", "", *_conv(f"{ours}time/conv", f"{theirs}temporal_upsamplers.0.conv"))
    return (*table, *rows("", "", *_conv("post_quant_conv", "post_quant_conv")))


def tiny_decoder_table(config: AsymmetricVideoVAEConfig) -> WeightTable:
    """Rows of `post_quant_conv` and Neodragon's `decoder`, a list of 23 blocks."""
    conv_in, conv_out = 1, TINY_FIRST_GROUP + GROUPS * TINY_GROUP_LENGTH + 1
    table = [*_conv2d("conv_in", f"blocks.{conv_in}"), *_conv2d("conv_out", f"blocks.{conv_out}")]
    for group in range(GROUPS):
        first = TINY_FIRST_GROUP + group * TINY_GROUP_LENGTH
        for block in range(MEMORY_BLOCKS):
            ours, theirs = f"memory_{group * MEMORY_BLOCKS + block}", f"blocks.{first + block}.conv"
            for layer in range(3):
                table += _conv2d(f"{ours}/convs_{layer}", f"{theirs}.{2 * layer}")
        table.append((f"grow_{group}/kernel", f"blocks.{first + 4}.conv.weight", CONV2D))
        table.append((f"conv_{group}/kernel", f"blocks.{first + 5}.weight", CONV2D))
    return (*rows("decoder/", "decoder.", *table), *rows("", "", *_conv("post_quant_conv", "post_quant_conv")))


def _read(config_class: type, json: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    for key, needed in settings.items():
        if json.get(key, needed) != needed:
            raise UserError(f"{key} is {json[key]!r}: only video VAEs with {key} {needed!r} are supported")
    for key, needed in BLOCK_TYPES.items():
        for block in json.get(key, ()):
            if block != needed:
                raise UserError(f"{key} has {block!r}: only video VAEs with {needed} are supported")
    return config_class(**config_fields(config_class, json))


def _read_encoder(json: Mapping[str, Any]) -> VideoEncoderConfig:
    """The encoder's part of either class, with the normalisation that the class has by default."""
    whole = CausalVideoVAEConfig if json.get("_class_name") == NATIVE_CLASS else AsymmetricVideoVAEConfig
    values = {name: getattr(whole, name) for name in ("latent_shift", "latent_scale")}
    return _read(VideoEncoderConfig, {**values, **json}, ENCODER_SETTINGS)


def _write_encoder(config: VideoEncoderConfig) -> dict[str, Any]:
    blocks = [BLOCK_TYPES["encoder_down_block_types"]] * len(config.encoder_block_out_channels)
    return {**dataclasses.asdict(config), **ENCODER_SETTINGS, "encoder_down_block_types": blocks}


def _write_native(config: CausalVideoVAEConfig) -> dict[str, Any]:
    blocks = [BLOCK_TYPES["decoder_up_block_types"]] * len(config.decoder_block_out_channels)
    names = {"_class_name": NATIVE_CLASS, "decoder_up_block_types": blocks, "downsample_scale": config.space_factor}
    return {**names, **_write_encoder(config), **NATIVE_SETTINGS}


def _write_asymmetric(config: VideoEncoderConfig) -> dict[str, Any]:
    scales = {
        "temporal_downsample_scale": config.time_factor,
        "spatial_downsample_scale": config.space_factor,
    }
    return {"_class_name": ASYMMETRIC_CLASS, **_write_encoder(config), **scales}


def _inputs(config: VideoEncoderConfig) -> tuple:
    return (jax.ShapeDtypeStruct((1, 1, 8, 8, config.encoder_in_channels), jnp.float32),)


_COMMON = dict(inputs=_inputs, logical_axes=LOGICAL_AXES, weights_file="diffusion_pytorch_model.safetensors")

CAUSAL_VIDEO_VAE = Network(
    name="causal_video_vae",
    class_names=(NATIVE_CLASS,),
    read_config=lambda json: _read(CausalVideoVAEConfig, json, NATIVE_SETTINGS),
    write_config=_write_native,
    module=CausalVideoVAE,
    table=lambda config: (*encoder_table(config), *native_decoder_table(config)),
    **_COMMON,
)

ASYMMETRIC_VIDEO_VAE = Network(
    name="asymmetric_video_vae",
    class_names=(ASYMMETRIC_CLASS,),
    read_config=lambda json: _read(AsymmetricVideoVAEConfig, json, ENCODER_SETTINGS),
    write_config=_write_asymmetric,
    module=AsymmetricCausalVideoVAE,
    table=lambda config: (*encoder_table(config), *tiny_decoder_table(config)),
    **_COMMON,
)

VIDEO_VAE_ENCODER = Network(
    name="video_vae_encoder",
    class_names=(NATIVE_CLASS, ASYMMETRIC_CLASS),
    read_config=_read_encoder,
    write_config=_write_asymmetric,
    module=VideoVAEEncoder,
    table=encoder_table,
    partial=True,
    **_COMMON,
)
