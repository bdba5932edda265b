"""Layers of `nd_jax.models` in the forms that the device computes right, for networks that are otherwise unmodified.

    with forms(): y = Network(config).apply({"params": params}, x)

Inside the context every layer that `FORMS` lists is computed by the function there, on its own parameters; everything
else, the order of the layers included, is the model that training uses. The forms change where axes are and how many
there are, never the function:

    group norm   moments over the last axis of [B, G, C / G H W], which become a native norm (`onnx_norm`)    (1)
    attention    softmax(q k^T / sqrt(K) + bias) v on [B, H, L, K]; the bias is a constant of the graph       (2)
    upsampling   pixels beside themselves and DepthToSpace, which become Resize; or, with kernels of
                 `fold_upsampling`, one convolution at the lower resolution and DepthToSpace                  (3)
    gated MLP    value and gate by products of their own, and gelu(max(gate, -6)): in float32 the function is
                 0 below, and there is no tail to spend a quantiser's range on                                (4)
    blocks       a loop over slices of the stacked parameters (`unroll`) instead of a scan                    (5)

The HTP takes rank 4 at most and no GroupNormalization.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from converters import subpixel
from converters.decoder_graph import depth_to_space
from nd_jax.models import image_layers, unet_layers, vae_layers
from nd_jax.weights.table import flatten

Params = Mapping[str, Any]
Form = Callable[..., Any]

GELU_FLOOR = -6.0


@contextlib.contextmanager
def replaced(forms: Mapping[tuple[type, str], Form]) -> Iterator[None]:
    """Within the context, methods of Flax modules are computed by other functions.

    Args:
      forms: (class, method name) -> function of (the method itself, module, its parameters, *the method's arguments).
    """

    def intercept(call, args, kwargs, context):
        form = forms.get((type(context.module), context.method_name))
        if form is None:
            return call(*args, **kwargs)
        return form(call, context.module, context.module.variables.get("params", {}), *args, **kwargs)

    with nn.intercept_methods(intercept):
        yield


def forms(more: Mapping[type, Form] | None = None) -> contextlib.AbstractContextManager:
    """`replaced` by `FORMS` and by those of `more`: class -> function."""
    return replaced({(layer, "__call__"): form for layer, form in {**FORMS, **(more or {})}.items()})


# --- parameters -------------------------------------------------------------------------------------------------------


def unroll(stacked: Params) -> dict[str, Any]:
    """Stacked block parameters -> {"0": ..., "1": ...}; the slices are views."""
    count = len(jax.tree.leaves(stacked)[0])
    return {str(k): jax.tree.map(lambda leaf, k=k: np.asarray(leaf)[k], stacked) for k in range(count)}


def fold_upsampling(conv: Params) -> dict[str, np.ndarray]:
    """The convolution behind a nearest 2x, [3, 3, C, O] -> [3, 3, C, 4 O]: equation 2 of `converters.subpixel`."""
    kernel, bias = np.asarray(conv["kernel"]), np.asarray(conv["bias"])
    return {"kernel": subpixel.behind_nearest(kernel), "bias": np.tile(bias, 4)}


def split_gate(up: Params) -> dict[str, dict[str, np.ndarray]]:
    """The first layer of a gated MLP -> `value` and `gate`."""
    halves = {name: np.split(np.asarray(leaf), 2, axis=-1) for name, leaf in up.items()}
    return {part: {name: halves[name][k] for name in up} for k, part in enumerate(("value", "gate"))}


def count_leaves(params: Params, pattern: str) -> int:
    """How many parameter paths a regular expression matches from their start."""
    return sum(re.match(pattern, path) is not None for path in flatten(params))


# --- layers -----------------------------------------------------------------------------------------------------------


def dense(params: Params, x: jax.Array) -> jax.Array:
    """[B, L, in] -> [B, L, out], with the bias if there is one."""
    y = x @ params["kernel"]
    return y + params["bias"][None, None] if "bias" in params else y


def conv(params: Params, x: jax.Array, strides: tuple[int, int] = (1, 1)) -> jax.Array:
    """[B, H, W, in] -> [B, H / stride, W / stride, out], with half the kernel's zeros around the picture."""
    kernel = params["kernel"]
    around = [(side // 2, side // 2) for side in kernel.shape[:2]]
    module = nn.Conv(kernel.shape[-1], kernel.shape[:2], strides, around, use_bias="bias" in params)
    return module.apply({"params": params}, x)


def group_norm(params: Params, x: jax.Array, groups: int, epsilon: float) -> jax.Array:
    """Equation 1: [B, H, W, C] -> the same."""
    batch, height, width, channels = x.shape
    rows = x.transpose(0, 3, 1, 2).reshape(batch, groups, -1)
    centred = rows - rows.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    planes = normed.reshape(batch, channels, height, width)
    per_channel = lambda name: params[name][None, :, None, None]
    return (planes * per_channel("scale") + per_channel("bias")).transpose(0, 2, 3, 1)


def attend(
    params: Params, x_BLD: jax.Array, context_BSE: jax.Array, heads: int, bias_11LS: jax.Array | None = None
) -> jax.Array:
    """Equation 2 between the projections `query`, `key`, `value` and `out`: [B, L, D], [B, S, E] -> [B, L, D]."""

    def split(name: str, tokens: jax.Array) -> jax.Array:
        y = dense(params[name], tokens)
        return y.reshape(*y.shape[:-1], heads, -1)

    query, key, value = split("query", x_BLD), split("key", context_BSE), split("value", context_BSE)
    logits = jnp.einsum("blhk,bshk->bhls", query * query.shape[-1] ** -0.5, key)
    weights = nn.softmax(logits if bias_11LS is None else logits + bias_11LS)
    mixed = jnp.einsum("bhls,bshk->blhk", weights, value).reshape(x_BLD.shape)
    return dense(params["out"], mixed)


def pixel_attention(params: Params, image: jax.Array, groups: int) -> jax.Array:
    """`vae_layers.FrameAttention` of one frame: [B, H, W, C] -> the same; one head, so that nothing is split."""
    normed = group_norm(params["norm"], image, groups, vae_layers.NORM_EPSILON)
    pixels = normed.reshape(image.shape[0], -1, image.shape[-1])
    query, key, value = (dense(params[name], pixels) for name in ("query", "key", "value"))
    weights = nn.softmax(jnp.einsum("bqc,bkc->bqk", query * image.shape[-1] ** -0.5, key))
    return image + dense(params["out"], jnp.einsum("bqk,bkc->bqc", weights, value)).reshape(image.shape)


# --- forms ------------------------------------------------------------------------------------------------------------


def _group_norm(call, module, params, x):
    return group_norm(params, x, module.groups, module.epsilon)


def _frame_attention(call, module, params, x):
    image = x.reshape(-1, *x.shape[2:])
    return pixel_attention(params, image, module.groups).reshape(x.shape)


def _attention(call, module, params, x, context):
    return attend(params, x, context, module.heads)


def _gated_mlp(call, module, params, x):
    """Equation 4, on parameters of `split_gate`."""
    value, gate = dense(params["value"], x), dense(params["gate"], x)
    return dense(params["down"], value * nn.gelu(jnp.maximum(gate, GELU_FLOOR), approximate=False))


def _image_transformer(call, module, params, image, context):
    """Equation 5, on parameters of `unroll`."""
    batch, width = image.shape[0], image.shape[-1]
    x = group_norm(params["norm"], image, module.groups, unet_layers.TRANSFORMER_NORM_EPSILON)
    x = dense(params["proj_in"], x.reshape(batch, -1, width))
    block = unet_layers.TransformerBlock(module.heads, module.attention)
    for k in range(module.depth):
        with jax.named_scope(f"blocks/{k}"):
            x, _ = block.apply({"params": params["blocks"][str(k)]}, x, context)
    return image + dense(params["proj_out"], x).reshape(image.shape)


def _resize(call, module, params, x, size=None):
    """Equation 3, the first."""
    height, width = size or (2 * x.shape[1], 2 * x.shape[2])
    return conv(params["conv"], depth_to_space(jnp.concatenate([x] * 4, axis=-1))[:, :height, :width])


def folded_upsampling(call, module, params, x, size=None):
    """Equation 3, the second, on parameters of `fold_upsampling`; a form of `image_layers.Upsample`."""
    height, width = size or (2 * x.shape[1], 2 * x.shape[2])
    return depth_to_space(conv(params["conv"], x))[:, :height, :width]


FORMS: dict[type, Form] = {
    image_layers.GroupNorm: _group_norm,
    image_layers.Upsample: _resize,
    vae_layers.FrameAttention: _frame_attention,
    unet_layers.Attention: _attention,
    unet_layers.GatedFeedForward: _gated_mlp,
    unet_layers.ImageTransformer: _image_transformer,
}
