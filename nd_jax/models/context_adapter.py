"""ContextAdapter of Neodragon, and the context embedder of the Pyramid-Flow teacher that it stands in for.

    y_0   = act(W_0 x + b_0)
    y_i   = act(W_i [x, y_{i-1}] + b_i)      ([x, .] where `skips[i-1]`)
    out   = out_act(W_n [x, y_{n-1}] + b_n)

With `pre_activation` the activation acts on a layer's input instead of its output, the output layer excepted. GELU is
the exact (erf) one. Agrees with `neodragon.context_adapter.ContextAdapter`.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

ACTIVATIONS = {
    "gelu": partial(nn.gelu, approximate=False),
    "silu": nn.silu,
    "relu": nn.relu,
    "linear": lambda x: x,
}

LOGICAL_AXES = (
    (r"hidden_\d+/kernel$", ("embed", "mlp")),
    (r"(^|/)out/kernel$", ("mlp", "embed")),
    (r"context_embedder/kernel$", ("embed", "mlp")),
)


@dataclasses.dataclass(frozen=True)
class ContextAdapterConfig:
    """Same names and defaults as the public class's config.json."""

    input_dims: int = 4096
    output_dims: int = 1536
    layer_depths: tuple[int, ...] = (4096,) * 4
    skips: tuple[bool, ...] = (True,) * 4
    use_biases: bool = True
    pre_activation: bool = False
    activation_fn: str = "gelu"
    out_activation_fn: str = "linear"

    def __post_init__(self):
        if len(self.layer_depths) != len(self.skips):
            raise ValueError(
                f"layer_depths has {len(self.layer_depths)} entries and skips {len(self.skips)}: "
                "give one skip per hidden layer"
            )
        for name in (self.activation_fn, self.out_activation_fn):
            if name not in ACTIVATIONS:
                raise ValueError(f"activation {name!r} is not one of {sorted(ACTIVATIONS)}")


@dataclasses.dataclass(frozen=True)
class ContextEmbedderConfig:
    """T5-XXL's width and the denoiser's width."""

    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1536


class ContextAdapter(nn.Module):
    """Skip MLP: [..., input_dims] -> [..., output_dims]. Parameters `hidden_0 ... hidden_{n-1}`, `out`."""

    config: ContextAdapterConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        cfg = self.config
        dense = lambda features, name: nn.Dense(
            features,
            use_bias=cfg.use_biases,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            name=name,
        )
        act = ACTIVATIONS[cfg.activation_fn]
        x = x.astype(self.dtype)
        y = x
        for i, depth in enumerate(cfg.layer_depths):
            if i > 0 and cfg.skips[i - 1]:
                y = jnp.concatenate([x, y], axis=-1)
            y = dense(depth, f"hidden_{i}")(act(y) if cfg.pre_activation else y)
            y = nn.with_logical_constraint(y, ("batch", "length", "activation_mlp"))
            y = y if cfg.pre_activation else act(y)
        if cfg.skips and cfg.skips[-1]:
            y = jnp.concatenate([x, y], axis=-1)
        return ACTIVATIONS[cfg.out_activation_fn](dense(cfg.output_dims, "out")(y))


class ContextEmbedder(nn.Module):
    """`context_embedder` of Pyramid-Flow's MMDiT: one linear layer with bias, [..., 4096] -> [..., 1536]."""

    config: ContextEmbedderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(
            self.config.caption_projection_dim, dtype=self.dtype, param_dtype=self.param_dtype, name="context_embedder"
        )(x)
