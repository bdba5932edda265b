"""CLIP text models (CLIP-L and CLIP-G), with projection or without: pooled and penultimate states.

Agrees with `transformers.CLIPTextModelWithProjection` and `CLIPTextModel`. Pre-norm blocks with causal attention and no
padding mask, as the public pipelines run them. Shape letters as in `t5.py`, P for the projection width.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from nd_jax.models.image_layers import LayerNorm
from nd_jax.models.layers import TokenEmbedding

ACTIVATIONS = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": partial(nn.gelu, approximate=False),
}

LOGICAL_AXES = (
    (r"token_embedding/embedding$", ("vocab", "embed")),
    (r"attention/(query|key|value)/kernel$", ("layers", "embed", "heads")),
    (r"attention/(query|key|value)/bias$", ("layers", "heads")),
    (r"attention/out/kernel$", ("layers", "heads", "embed")),
    (r"mlp/up/kernel$", ("layers", "embed", "mlp")),
    (r"mlp/up/bias$", ("layers", "mlp")),
    (r"mlp/down/kernel$", ("layers", "mlp", "embed")),
    (r"text_projection/kernel$", ("embed", "mlp")),
)


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Same names as `transformers.CLIPTextConfig`; the defaults are CLIP-L (ViT-L/14).

    `projection_dim` is None for a model without projection, whatever its config.json says.
    """

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    projection_dim: int | None = 768
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407

    def __post_init__(self):
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not one of {sorted(ACTIVATIONS)}")
        if self.num_hidden_layers < 1:
            raise ValueError("num_hidden_layers must be at least 1: the penultimate state is the last block's input")


CLIP_L = CLIPTextConfig()
CLIP_G = CLIPTextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
)


class CLIPTextOutput(NamedTuple):
    """`penultimate` [B, L, D] (the last block's input); `last_hidden_state` [B, L, D], normed.

    `text_embeds` [B, P] is None without a projection.
    """

    text_embeds: jax.Array | None
    penultimate: jax.Array
    last_hidden_state: jax.Array


class CLIPBlock(nn.Module):
    """Pre-norm transformer block: [B, L, D] -> [B, L, D].

    Attributes:
      config: sizes; those of the vision tower have the same names.
      dtype, param_dtype: of computation and parameters.
      is_causal: whether a token sees none behind it.
    """

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    is_causal: bool = True

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        kwargs = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        norm = partial(LayerNorm, self.config.layer_norm_eps, self.param_dtype)
        attention = CLIPAttention(self.config, is_causal=self.is_causal, name="attention", **kwargs)
        x_BLD = x_BLD + attention(norm(name="attention_norm")(x_BLD))
        x_BLD = x_BLD + CLIPFeedForward(self.config, name="mlp", **kwargs)(norm(name="mlp_norm")(x_BLD))
        return nn.with_logical_constraint(x_BLD, ("batch", "length", "activation_embed"))


class CLIPAttention(nn.Module):
    """Self-attention with biases."""

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    is_causal: bool = True

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        cfg = self.config
        dense = partial(nn.Dense, cfg.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype)
        heads = lambda name: dense(name=name)(x_BLD).reshape(*x_BLD.shape[:-1], cfg.num_attention_heads, -1)
        # JAX's own code mixes bfloat16 and float32, which a strict caller forbids.
        with jax.numpy_dtype_promotion("standard"):
            qkv = (heads(name) for name in ("query", "key", "value"))
            mixed = jax.nn.dot_product_attention(*qkv, is_causal=self.is_causal)
        return dense(name="out")(mixed.reshape(x_BLD.shape))


class CLIPFeedForward(nn.Module):
    """Two linear layers with the config's activation between them."""

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = ACTIVATIONS[self.config.hidden_act](dense(self.config.intermediate_size, name="up")(x_BLD))
        return dense(self.config.hidden_size, name="down")(hidden)


class _ScannedBlock(nn.Module):
    config: Any
    dtype: Any
    param_dtype: Any
    is_causal: bool

    @nn.compact
    def __call__(self, carry, _):
        block = CLIPBlock(self.config, self.dtype, self.param_dtype, self.is_causal)
        nn.share_scope(self, block)
        x_BLD, _ = carry
        # The carry keeps the block's input, so that the scan ends with the penultimate state at no extra memory.
        return (block(x_BLD), x_BLD), None


def clip_blocks(config: Any, dtype: Any, param_dtype: Any, is_causal: bool) -> nn.Module:
    """All blocks, their parameters stacked on axis 0: ((x, x), None) -> ((last state, the one before), None)."""
    blocks = nn.scan(
        _ScannedBlock,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=config.num_hidden_layers,
    )
    return blocks(config, dtype, param_dtype, is_causal, name="blocks")


class CLIPText(nn.Module):
    """CLIP text model, with projection or without. Block parameters are stacked on axis 0 (`blocks/...`)."""

    config: CLIPTextConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: jax.Array) -> CLIPTextOutput:
        """Args: ids int32 [B, L], L at most `max_position_embeddings`, padded as the model's tokenizer pads."""
        cfg = self.config
        embed = partial(
            TokenEmbedding,
            features=cfg.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.initializers.normal(0.02),
        )
        positions = jnp.arange(ids.shape[-1])
        tokens = embed(cfg.vocab_size, name="token_embedding")(ids)
        x_BLD = tokens + embed(cfg.max_position_embeddings, name="position_embedding")(positions)[None]
        blocks = clip_blocks(cfg, self.dtype, self.param_dtype, is_causal=True)
        (x_BLD, penultimate_BLD), _ = blocks((x_BLD, x_BLD), None)
        last_BLD = LayerNorm(cfg.layer_norm_eps, self.param_dtype, name="final_norm")(x_BLD)
        if cfg.projection_dim is None:
            return CLIPTextOutput(None, penultimate_BLD, last_BLD)
        pooled_BD = jnp.take_along_axis(last_BLD, eos_positions(ids, cfg)[:, None, None], axis=1)[:, 0]
        project = nn.Dense(
            cfg.projection_dim, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype, name="text_projection"
        )
        return CLIPTextOutput(project(pooled_BD), penultimate_BLD, last_BLD)


def eos_positions(ids: jax.Array, config: CLIPTextConfig) -> jax.Array:
    """Position of the first end-of-sequence token, int32 [B].

    Configs published before transformers corrected them say `eos_token_id` 2; with them the position is that of the
    largest id, which is the end token in CLIP's vocabulary.
    """
    if config.eos_token_id == 2:
        return jnp.argmax(ids, axis=-1)
    return jnp.argmax(ids == config.eos_token_id, axis=-1)
