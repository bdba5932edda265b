"""Attention over a boolean mask, in two implementations behind one switch.

    p = softmax(q k^T / sqrt(K) + b),   b = 0 where a query may see a key and a very negative number elsewhere    (1)
    o = p v                                                                                                     (2)

`xla_attention` is JAX's own and holds the logits of all heads at once. `cached_attention` is for processors: it goes
through samples and heads in steps whose logits stay in the cache, and its backward pass keeps no logits, but makes
them again from the row sums l of (1) (Dao et al. 2022, FlashAttention, appendix B.2):

    p  = exp(q k^T / sqrt(K) + b - l),     l = log sum exp over the keys                                        (3)
    ds = p * (do v^T - sum(do * o)),       dv = p^T do,  dq = ds k / sqrt(K),  dk = ds^T q / sqrt(K)            (4)

Softmax is float32 whatever the dtype of q, k and v.

Shape letters: B batch, L queries, S keys, H heads, K head width, G heads of one step.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Removes a key in float32, and is finite: a query without any key is an average instead of NaN.
MASKED_LOGIT = -1e30

# Logits of one step: 1 MiB in float32, which a second-level cache holds.
LOGITS_AT_ONCE = 1 << 18


def xla_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, unseen: int = 0
) -> jax.Array:
    """Equations 1 and 2 by XLA, of a sequence with itself or with another one.

    Args:
      query: [B, L, H, K].
      key, value: [B, S, H, K].
      mask: bool [B or 1, 1, L, S], queries on axis 2, keys on axis 3; None when every query sees every key.
      unseen: how many of the last tokens the mask hides from all tokens before them; static. Those before are then
        computed without them, which spares unseen * (L - unseen) of the L^2 pairs. For a sequence with itself.

    Returns:
      [B, L, H, K] in the dtype of `value`.
    """
    run = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    # JAX's own code mixes bfloat16 and float32, which a strict caller forbids.
    with jax.numpy_dtype_promotion("standard"):
        return _in_two(lambda q, k, v, mask: run(q, k, v, mask=mask), 1, (query, key, value), mask, unseen)


def cached_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, unseen: int = 0
) -> jax.Array:
    """The same in steps, with equations 3 and 4 for the gradient. It has no forward-mode derivative."""
    batch, length, heads, _ = query.shape
    pairs = length * key.shape[1]
    if batch > 1 and batch * pairs > LOGITS_AT_ONCE:
        samples = (query[:, None], key[:, None], value[:, None])
        if mask is None or mask.shape[0] == 1:
            return jax.lax.map(lambda one: cached_attention(*one, mask, unseen), samples)[:, 0]
        return jax.lax.map(lambda one: cached_attention(*one, unseen), (*samples, mask[:, None]))[:, 0]
    fits = [g for g in range(1, heads + 1) if heads % g == 0 and g * batch * pairs <= LOGITS_AT_ONCE]
    group = max(fits, default=1)
    everything = jnp.zeros((1, 1, 1, 1), jnp.float32)
    bias = everything if mask is None else jnp.where(mask, 0.0, MASKED_LOGIT).astype(jnp.float32)
    steps = lambda x: x.reshape(*x.shape[:2], heads // group, group, -1).transpose(2, 0, 3, 1, 4)
    # The two parts of a step share its copies of q, k and v.
    step = lambda qkv: _in_two(_heads, 2, qkv, bias, unseen)
    mixed = jax.lax.map(step, (steps(query), steps(key), steps(value)))
    return mixed.transpose(1, 3, 0, 2, 4).reshape(query.shape)


def _in_two(run: Callable[..., jax.Array], axis: int, qkv: tuple, mask: jax.Array | None, unseen: int) -> jax.Array:
    """`run` for the tokens before the unseen ones and for those apart; `axis` is that of tokens in q, k and v."""
    if not unseen:
        return run(*qkv, mask)
    seen = mask.shape[-1] - unseen
    first = (jax.lax.slice_in_dim(x, 0, seen, axis=axis) for x in qkv)
    last = jax.lax.slice_in_dim(qkv[0], seen, None, axis=axis)
    return jnp.concatenate([run(*first, mask[..., :seen, :seen]), run(last, *qkv[1:], mask[..., seen:, :])], axis)


def _logits(query_BGLK: jax.Array, key_BGSK: jax.Array, bias: jax.Array) -> jax.Array:
    logits = jnp.einsum("bglk,bgsk->bgls", query_BGLK, key_BGSK, preferred_element_type=jnp.float32)
    return logits * query_BGLK.shape[-1] ** -0.5 + bias


def _heads_forward(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> tuple[jax.Array, tuple]:
    logits = _logits(query, key, bias)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum("bgls,bgsk->bglk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    mixed = (mixed / total).astype(value.dtype)  # dividing K numbers a row instead of S
    return mixed, (query, key, value, bias, mixed, largest + jnp.log(total))


def _heads_backward(saved: tuple, gradient: jax.Array) -> tuple[jax.Array | None, ...]:
    query, key, value, bias, mixed, row_sum = saved
    dtype, scale = query.dtype, query.shape[-1] ** -0.5
    weights = jnp.exp(_logits(query, key, bias) - row_sum)  # equation 3
    product = gradient.astype(jnp.float32) * mixed.astype(jnp.float32)
    inner = jnp.einsum("bglk,bgsk->bgls", gradient, value, preferred_element_type=jnp.float32)
    slope = weights * (inner - jnp.sum(product, axis=-1, keepdims=True))
    slope = (slope * scale).astype(dtype)
    by_query = lambda x, y: jnp.einsum("bgls,bglk->bgsk", x, y)
    d_query = jnp.einsum("bgls,bgsk->bglk", slope, key)
    return d_query, by_query(slope, query), by_query(weights.astype(dtype), gradient), None


@jax.custom_vjp
def _heads(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
    """One step: [B, G, L, K], twice [B, G, S, K], float32 [B or 1, 1, L or 1, S or 1] -> [B, G, L, K]."""
    return _heads_forward(query, key, value, bias)[0]


_heads.defvjp(_heads_forward, _heads_backward)

# The switch: every implementation has the signature of `xla_attention`.
ATTENTION: dict[str, Callable[..., jax.Array]] = {"xla": xla_attention, "cached": cached_attention}


def default_attention() -> str:
    """The implementation for the devices of this process. A program compiled for other devices names its own."""
    return "cached" if jax.default_backend() == "cpu" else "xla"
