"""The video transformer in the form in which the device computes it: a range of its blocks, in float32.

The equations are those of `nd_jax.models.mmdit` and `mmdit_block`; what depends on the unit, the time or the length of
the text comes from the host (`nd_jax.generate.stage_inputs`). Exact rewrites, in the weights wherever they can be:

    W_mod = [W_1, ..., W_6], b_mod likewise:  every modulation is a product of its own, and 1 + g comes out of W c + b
        with b + 1 in the place of b                                                                              (1)
    rows of W_q, b_q, W_k, b_k and of both head norms in the order 0, 2, ..., 1, 3, ...:  the pairs (2k, 2k + 1) that
        turn together become the halves of a head; q k^T does not see the order                                   (2)
    1 / sqrt(K) in the norm of q                                                                                  (3)
    gelu(x) = gelu(max(x, -6)):  in float32 both are 0 below; there is no tail to spend a quantiser's range on    (4)
    the last block's queries, its MLP and the output:  of the current clip alone, which nothing else is read of   (5)

Shape letters as in `mmdit_block`; M tokens of the current clip.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.mmdit_block import HeadNorm, layer_norm

GELU_FLOOR = -6.0
MODULATION = ("attention_shift", "attention_scale", "attention_gate", "mlp_shift", "mlp_scale", "mlp_gate")
LAST_TEXT_MODULATION = ("attention_scale", "attention_shift")

# --- parameters -------------------------------------------------------------------------------------------------------


def device_params(params: Mapping[str, Any], config: MMDiTConfig, blocks: range) -> dict[str, Any]:
    """Parameters of the transformer -> those of `blocks_on_device`, for a range of blocks and the ends that it has.

    Blocks keep their number in the whole network.
    """
    last = config.num_layers - 1
    ours = {"blocks": {str(k): _device_block(_slice(params["blocks"], k), config) for k in blocks if k < last}}
    if blocks.start == 0:
        patch = params["patch_embed"]
        kernel = np.asarray(patch["kernel"]).reshape(config.token_dim, config.inner_dim)
        ours["patch_embed"] = {"kernel": kernel, "bias": patch["bias"]}
        if config.context_embedder:
            ours["context_embedder"] = params["context_embedder"]
    if last in blocks:
        ours["last_block"] = _device_block(params["last_block"], config)
        ours["norm_out"] = _split_modulation(params["norm_out"], ("scale", "shift"))
        ours["proj_out"] = params["proj_out"]
    return ours


def _slice(stacked: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    return jax.tree.map(lambda leaf: np.asarray(leaf)[number], stacked)


def _device_block(block: Mapping[str, Any], config: MMDiTConfig) -> dict[str, Any]:
    return {name: _device_stream(stream, config) for name, stream in block.items()}


def _device_stream(stream: Mapping[str, Any], config: MMDiTConfig) -> dict[str, Any]:
    """Equations 1 to 3 for the weights of a `Stream`."""
    last = "out" not in stream
    order = halves_order(config.attention_head_dim)
    ours = {name: part for name, part in stream.items() if name not in ("modulation", "query", "key")}
    ours["modulation"] = _split_modulation(stream["modulation"], LAST_TEXT_MODULATION if last else MODULATION)
    for name, factor in (("query", config.attention_head_dim**-0.5), ("key", 1.0)):
        ours[name] = {kind: _in_order(leaf, order) for kind, leaf in stream[name].items()}
        scale = np.asarray(stream[f"{name}_norm"]["scale"])[order] * np.float32(factor)
        ours[f"{name}_norm"] = {"scale": scale}
    if last:  # Equation 5: nobody reads what the text would attend to.
        del ours["query"], ours["query_norm"]
    return ours


def halves_order(head_dim: int) -> np.ndarray:
    """Equation 2: channel of the original head at every place, int [K]."""
    return np.concatenate([np.arange(0, head_dim, 2), np.arange(1, head_dim, 2)])


def _in_order(leaf: np.ndarray, order: np.ndarray) -> np.ndarray:
    """[..., H K] with every head's channels in `order`."""
    leaf = np.asarray(leaf)
    return leaf.reshape(*leaf.shape[:-1], -1, len(order))[..., order].reshape(leaf.shape)


def _split_modulation(dense: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Equation 1."""
    kernels = np.split(np.asarray(dense["kernel"]), len(names), axis=-1)
    biases = np.split(np.asarray(dense["bias"]), len(names))
    one = lambda name: np.float32(name.endswith("scale"))
    return {
        name: {"kernel": kernel, "bias": bias + one(name)}
        for name, kernel, bias in zip(names, kernels, biases, strict=True)
    }


def logit_bound(params: Mapping[str, Any], head_dim: int) -> float:
    """The largest |q k^T| / sqrt(K) that the head norms of `device_params` allow (Cauchy-Schwarz)."""
    largest = lambda block, norm: max(
        (float(np.abs(stream[norm]["scale"]).max()) for stream in block.values() if norm in stream), default=0.0
    )
    blocks = [*params["blocks"].values(), *(params[name] for name in ("last_block",) if name in params)]
    # A normalised head has length sqrt(K) before its scale; (3) is in the query's.
    return max(head_dim * largest(block, "query_norm") * largest(block, "key_norm") for block in blocks)


# --- the function -----------------------------------------------------------------------------------------------------


def blocks_on_device(
    params: Mapping[str, Any],
    config: MMDiTConfig,
    blocks: range,
    output_tokens: int,
    streams: tuple[jax.Array, ...],
    conditioning: jax.Array,
    mask: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, ...]:
    """A range of blocks on `device_params`: (velocity [B, M, p * p * C]), or both streams where the last is not in it.

    Args:
      params, config, blocks: see `device_params`.
      output_tokens: M.
      streams: image [B, N, D] and text [B, T, D] before the first block of the range; for block 0 tokens
        [B, N, p * p * C], positions [1, N, D] and context [B, T, context_dim].
      conditioning: silu(temb), [B, D].
      mask: [B, 1, L, L], added to the logits.
      rotary: cosines and sines, [1, N, K / 2] each.
    """
    if blocks.start == 0:
        tokens, positions, text = streams
        image = _dense(params, "patch_embed", tokens) + positions
        if config.context_embedder:
            text = _dense(params, "context_embedder", text)
    else:
        image, text = streams
    block = functools.partial(_block_on_device, config=config, conditioning=conditioning, mask=mask, rotary=rotary)
    last = config.num_layers - 1
    for number in blocks:
        if number < last:
            with jax.named_scope(f"blocks/{number}"):
                image, text = block(params["blocks"][str(number)], image, text)
    if last not in blocks:
        return image, text
    with jax.named_scope("last_block"):
        image, _ = block(params["last_block"], image, text, last=output_tokens)
    with jax.named_scope("norm_out"):
        image = _modulated(image, conditioning, params["norm_out"], "")
    return (_dense(params, "proj_out", image),)


def _block_on_device(
    params: Mapping[str, Any],
    image: jax.Array,
    text: jax.Array,
    *,
    config: MMDiTConfig,
    conditioning: jax.Array,
    mask: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    last: int | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """A block; with `last` current tokens it is the last one, and gives the image stream of these alone (5)."""
    length = text.shape[1]
    with jax.named_scope("image"):
        u = _modulated(image, conditioning, params["image"]["modulation"], "attention_")
        key = rotate_halves(_head_norm(params["image"], "key", u, config), *rotary)
        value = _heads(params["image"], "value", u, config)
        if last is not None:
            seen = image.shape[1] - last
            u, image, mask = u[:, seen:], image[:, seen:], mask[:, :, length + seen :]
            rotary = tuple(table[:, seen:] for table in rotary)
        query = rotate_halves(_head_norm(params["image"], "query", u, config), *rotary)
    with jax.named_scope("text"):
        u = _modulated(text, conditioning, params["text"]["modulation"], "attention_")
        key = jnp.concatenate([_head_norm(params["text"], "key", u, config), key], axis=1)
        value = jnp.concatenate([_heads(params["text"], "value", u, config), value], axis=1)
        if last is None:
            query = jnp.concatenate([_head_norm(params["text"], "query", u, config), query], axis=1)
    with jax.named_scope("attention"):
        mixed = _attention(query, key, value, mask)
    with jax.named_scope("image"):
        ours = mixed if last is not None else mixed[:, length:]
        image = _finish(params["image"], image, ours, conditioning)
    if last is not None:
        return image, None
    with jax.named_scope("text"):
        return image, _finish(params["text"], text, mixed[:, :length], conditioning)


def _dense(params: Mapping[str, Any], name: str, x: jax.Array) -> jax.Array:
    with jax.named_scope(name):
        return nn.Dense(params[name]["kernel"].shape[-1]).apply({"params": params[name]}, x)


def _modulated(x: jax.Array, conditioning: jax.Array, modulation: Mapping[str, Any], part: str) -> jax.Array:
    with jax.named_scope("modulation"):
        scale, shift = (_dense(modulation, f"{part}{name}", conditioning)[:, None] for name in ("scale", "shift"))
        return layer_norm(x) * scale + shift


def _heads(stream: Mapping[str, Any], name: str, u: jax.Array, config: MMDiTConfig) -> jax.Array:
    y = _dense(stream, name, u)
    return y.reshape(*y.shape[:-1], -1, config.attention_head_dim)


def _head_norm(stream: Mapping[str, Any], name: str, u: jax.Array, config: MMDiTConfig) -> jax.Array:
    """On [B, L H, K]: the HTP computes an RMS norm of rank 4 wrong."""
    y = _dense(stream, name, u)
    rows = y.reshape(y.shape[0], -1, config.attention_head_dim)
    rows = HeadNorm(config.attention_head_dim).apply({"params": stream[f"{name}_norm"]}, rows)
    return rows.reshape(*y.shape[:2], -1, config.attention_head_dim)


def rotate_halves(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns channels k and k + K / 2 of heads [B, N, H, K] by the tables [1, N, K / 2]."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def _attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Heads [B, ., H, K] -> [B, queries, D]."""
    logits = jnp.einsum("blhk,bshk->bhls", query, key) + mask
    mixed = jnp.einsum("bhls,bshk->blhk", nn.softmax(logits), value)
    return mixed.reshape(*mixed.shape[:2], -1)


def _finish(stream: Mapping[str, Any], x: jax.Array, mixed: jax.Array, conditioning: jax.Array) -> jax.Array:
    modulation = stream["modulation"]
    with jax.named_scope("modulation"):
        gates = [_dense(modulation, f"{part}_gate", conditioning)[:, None] for part in ("attention", "mlp")]
    x = x + _dense(stream, "out", mixed) * gates[0]
    hidden = _dense(stream, "mlp_up", _modulated(x, conditioning, modulation, "mlp_"))
    hidden = nn.gelu(jnp.maximum(hidden, GELU_FLOOR), approximate=True)
    return x + _dense(stream, "mlp_down", hidden) * gates[1]
