"""CLIP in model folders: text models with projection and without, and the safety checker around a vision tower."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.models import clip_text, safety_checker
from nd_jax.models.clip_text import CLIPTextConfig
from nd_jax.models.safety_checker import SafetyCheckerConfig
from nd_jax.weights.network import Network, config_fields
from nd_jax.weights.table import CONV2D, LINEAR, Weight, WeightTable, linear, norm, rows


def _block_rows(theirs: str) -> WeightTable:
    return rows(
        "blocks/",
        f"{theirs}.encoder.layers.{{}}.",
        *norm("attention_norm", "layer_norm1"),
        *linear("attention/query", "self_attn.q_proj"),
        *linear("attention/key", "self_attn.k_proj"),
        *linear("attention/value", "self_attn.v_proj"),
        *linear("attention/out", "self_attn.out_proj"),
        *norm("mlp_norm", "layer_norm2"),
        *linear("mlp/up", "mlp.fc1"),
        *linear("mlp/down", "mlp.fc2"),
    )


# --- text -------------------------------------------------------------------------------------------------------------


def _text_table(config: CLIPTextConfig) -> WeightTable:
    table = (
        Weight("token_embedding/embedding", "text_model.embeddings.token_embedding.weight"),
        Weight("position_embedding/embedding", "text_model.embeddings.position_embedding.weight"),
        *_block_rows("text_model"),
        *rows("", "text_model.", *norm("final_norm", "final_layer_norm")),
    )
    projection = Weight("text_projection/kernel", "text_projection.weight", LINEAR)
    return table if config.projection_dim is None else (*table, projection)


def _text_inputs(config: CLIPTextConfig) -> tuple:
    return (jax.ShapeDtypeStruct((1, min(8, config.max_position_embeddings)), jnp.int32),)


def _write_text(config: CLIPTextConfig, architecture: str) -> dict[str, Any]:
    fields = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    return {"architectures": [architecture], "model_type": "clip_text_model", **fields}


CLIP_TEXT = Network(
    name="clip_text",
    class_names=("CLIPTextModelWithProjection",),
    read_config=lambda json: CLIPTextConfig(**config_fields(CLIPTextConfig, json)),
    write_config=lambda config: _write_text(config, "CLIPTextModelWithProjection"),
    module=clip_text.CLIPText,
    inputs=_text_inputs,
    table=_text_table,
    logical_axes=clip_text.LOGICAL_AXES,
    ignored=(r"text_model\.embeddings\.position_ids",),
)

# The first of the two encoders of SDXL and SSD-1B. Its config.json has a projection_dim that means nothing.
CLIP_TEXT_MODEL = dataclasses.replace(
    CLIP_TEXT,
    name="clip_text_model",
    class_names=("CLIPTextModel",),
    read_config=lambda json: CLIPTextConfig(**{**config_fields(CLIPTextConfig, json), "projection_dim": None}),
    write_config=lambda config: _write_text(config, "CLIPTextModel"),
)

# --- safety checker ---------------------------------------------------------------------------------------------------

# What transformers takes for keys that a vision_config lacks: its own defaults, which are those of ViT-B/32.
VISION_ABSENT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 32,
}


def _read_checker(json: Mapping[str, Any]) -> SafetyCheckerConfig:
    # The projection_dim within vision_config is that of another class.
    vision = {**VISION_ABSENT, **json.get("vision_config", {}), "projection_dim": json.get("projection_dim", 512)}
    return SafetyCheckerConfig(**config_fields(SafetyCheckerConfig, vision))


def _write_checker(config: SafetyCheckerConfig) -> dict[str, Any]:
    return {
        "architectures": ["StableDiffusionSafetyChecker"],
        "model_type": "clip",
        "projection_dim": config.projection_dim,
        "vision_config": {"model_type": "clip_vision_model", **dataclasses.asdict(config)},
    }


def _checker_table(config: SafetyCheckerConfig) -> WeightTable:
    tower = "vision_model.vision_model"
    return (
        Weight("class_embedding", f"{tower}.embeddings.class_embedding"),
        Weight("position_embedding", f"{tower}.embeddings.position_embedding.weight"),
        Weight("patch_embedding/kernel", f"{tower}.embeddings.patch_embedding.weight", CONV2D),
        # The missing letters are theirs.
        *rows("", f"{tower}.", *norm("pre_norm", "pre_layrnorm"), *norm("post_norm", "post_layernorm")),
        *_block_rows(tower),
        Weight("visual_projection/kernel", "visual_projection.weight", LINEAR),
        Weight("concept_embeds", "concept_embeds"),
        Weight("special_care_embeds", "special_care_embeds"),
        Weight("concept_thresholds", "concept_embeds_weights"),
        Weight("special_care_thresholds", "special_care_embeds_weights"),
    )


SAFETY_CHECKER = Network(
    name="safety_checker",
    class_names=("StableDiffusionSafetyChecker",),
    read_config=_read_checker,
    write_config=_write_checker,
    module=safety_checker.SafetyChecker,
    inputs=lambda config: (
        jax.ShapeDtypeStruct((1, config.image_size, config.image_size, config.num_channels), jnp.float32),
    ),
    table=_checker_table,
    logical_axes=safety_checker.LOGICAL_AXES,
    ignored=(r"vision_model\.vision_model\.embeddings\.position_ids",),
)
