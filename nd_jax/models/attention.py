"""Attention over a mask, in four implementations behind one switch.

    p = softmax(q k^T / sqrt(K) + b),   b = 0 where a query may see a key and a very negative number elsewhere    (1)
    o = p v                                                                                                     (2)

`xla_attention` is JAX's own and holds the logits of all heads at once. `cached_attention` is for processors: it goes
through samples and heads in steps whose logits stay in the cache, and its backward pass keeps no logits, but makes
them again from the row sums l of (1) (Dao et al. 2022, FlashAttention, appendix B.2):

    p  = exp(q k^T / sqrt(K) + b - l),     l = log sum exp over the keys                                        (3)
    ds = p * (do v^T - sum(do * o)),       dv = p^T do,  dq = ds k / sqrt(K),  dk = ds^T q / sqrt(K)            (4)

`splash_attention` is for TPUs: a kernel of JAX does (1) to (4) block by block on the chip, and no logits reach its
memory. It takes a mask as an `OrderedMask`, the others as booleans too. `cudnn_attention` is for NVIDIA's GPUs: cuDNN's
kernel does the same there.

Softmax is float32 whatever the dtype of q, k and v.

Shape letters: B batch, L queries, S keys, H heads, K head width, G heads of one step.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from nd_jax.errors import UserError

# Removes a key in float32, and is finite: a query without any key is an average instead of NaN.
MASKED_LOGIT = -1e30

# Logits of one step: 1 MiB in float32, which a second-level cache holds.
LOGITS_AT_ONCE = 1 << 18

# Queries of one step of the TPU kernel, and keys of one product in it; a sequence is padded to a multiple.
KERNEL_BLOCK = 256

# At most so many keys of one step: a v5e's scratch memory holds 4096 but not 8192, and the loop over them is unrolled.
KERNEL_KEYS = 2048


class OrderedMask(NamedTuple):
    """A mask of a sequence with itself, in two numbers a token: a query sees the keys of its group up to a place.

    Attributes:
      last: int32 [B or 1, L], place of the last key that a query may see; its own or a later one.
      groups: int32 [B or 1, L], 0 or more.
    """

    last: jax.Array | np.ndarray
    groups: jax.Array | np.ndarray

    def dense(self) -> jax.Array | np.ndarray:
        """bool [B, 1, L, L], queries on axis 2, keys on axis 3. Numpy arrays give a numpy array."""
        before = np.arange(self.last.shape[1], dtype=np.int32)[None, None] <= self.last[:, :, None]
        return (before & (self.groups[:, :, None] == self.groups[:, None, :]))[:, None]


Mask = jax.Array | np.ndarray | OrderedMask | None


def _dense(mask: Mask) -> jax.Array | np.ndarray | None:
    return mask.dense() if isinstance(mask, OrderedMask) else mask


def xla_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, unseen: int = 0) -> jax.Array:
    """Equations 1 and 2 by XLA, of a sequence with itself or with another one.

    Args:
      query: [B, L, H, K].
      key, value: [B, S, H, K].
      mask: bool [B or 1, 1, L, S], queries on axis 2, keys on axis 3, or an `OrderedMask`; None when every query sees
        every key.
      unseen: how many of the last tokens the mask hides from all tokens before them; static. Those before are then
        computed without them, which spares unseen * (L - unseen) of the L^2 pairs. For a sequence with itself.

    Returns:
      [B, L, H, K] in the dtype of `value`.
    """
    run = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    # JAX's own code mixes bfloat16 and float32, which a strict caller forbids.
    with jax.numpy_dtype_promotion("standard"):
        return _in_two(lambda q, k, v, mask: run(q, k, v, mask=mask), 1, (query, key, value), _dense(mask), unseen)


def cached_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, unseen: int = 0) -> jax.Array:
    """The same in steps, with equations 3 and 4 for the gradient. It has no forward-mode derivative."""
    mask = _dense(mask)
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


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: OrderedMask,
    unseen: int = 0,
    *,
    interpret: bool = False,
) -> jax.Array:
    """The same by JAX's kernel for TPUs, for a sequence with itself. It has no forward-mode derivative.

    Where a mesh is in context, every device runs the kernel for its own rows and heads, as the logical axis rules say;
    they must divide among the devices.

    Args:
      query, key, value: [B, L, H, K].
      mask: an `OrderedMask`.
      unseen: changes nothing; the kernel goes through all pairs of blocks.
      interpret: run the kernel's steps as plain JAX, on any device and slowly: for tests.

    Raises:
      UserError: the devices are no TPUs.
      ValueError: the mask is not an `OrderedMask`.
    """
    if not isinstance(mask, OrderedMask):
        raise ValueError("attention 'splash' takes an OrderedMask, which the geometry of a token layout has")
    if not interpret:
        check_attention("splash")
    mesh = jax.sharding.get_abstract_mesh()
    batch, length = query.shape[:2]
    steps = -(-length // KERNEL_KEYS)
    more = -length % (steps * KERNEL_BLOCK)
    # The kernel scales nothing. Padding is a group of its own.
    query = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)
    heads_first = lambda x: jnp.pad(x.transpose(0, 2, 1, 3), ((0, 0), (0, 0), (0, more), (0, 0)))
    tokens = lambda x, fill: jnp.pad(
        jnp.broadcast_to(x, (batch, length)), ((0, 0), (0, more)), constant_values=np.int32(fill)
    )
    run = jax.vmap(functools.partial(_kernel, keys=(length + more) // steps, interpret=interpret))
    if not mesh.empty:
        by_head = nn.logical_to_mesh_axes(("batch", "activation_heads", "length", None))
        by_token = nn.logical_to_mesh_axes(("batch", "length"))
        specs = (by_head, by_head, by_head, by_token, by_token)
        # What a kernel gives is not checked for equality between devices.
        run = jax.shard_map(run, in_specs=specs, out_specs=by_head, check_vma=False)
    qkv = (heads_first(x) for x in (query, key, value))
    mixed = run(*qkv, tokens(mask.last, length + more - 1), tokens(mask.groups, -1))
    return mixed[:, :, :length].transpose(0, 2, 1, 3)


def _kernel(
    query: jax.Array, key: jax.Array, value: jax.Array, last: jax.Array, groups: jax.Array, keys: int, interpret: bool
) -> jax.Array:
    """One sample, so many keys a step: three [H, L, K] with scaled queries, int32 [L] twice -> [H, L, K]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    # With all keys in a step, gradients of queries need no sum over steps.
    sizes = splash.BlockSizes(
        block_q=KERNEL_BLOCK,
        block_kv=keys,
        block_kv_compute=KERNEL_BLOCK,
        block_q_dkv=KERNEL_BLOCK,
        block_kv_dkv=keys,
        block_kv_dkv_compute=KERNEL_BLOCK,
        use_fused_bwd_kernel=True,
    )
    # The kernel compares `q_sequence`, an integer of every query, with the place of a key.
    info = MaskInfo(data_next=None, mask_next=None, block_mask=None, partial_mask_blocks=None, q_sequence=last)
    run = splash.SplashAttentionKernel(
        fwd_mask_info=info,
        dq_mask_info=None,
        dkv_mask_info=info,
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=_up_to,
        interpret=interpret,
    )
    return run(query, key, value, splash.SegmentIds(groups, groups))


def _up_to(last: jax.Array, place: jax.Array) -> jax.Array:
    return place <= last


def cudnn_attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: Mask, unseen: int = 0) -> jax.Array:
    """The same by cuDNN's kernel for GPUs, in bfloat16 or float16. It has no forward-mode derivative.

    No logits reach the memory; b of equation 1 does, for every pair but not for every head.

    Args:
      query, key, value, mask, unseen: as of `xla_attention`, L, S and `unseen` even.

    Raises:
      UserError: the devices are no GPUs, or the kernel does not take the dtype or the lengths.
    """
    check_attention("cudnn")
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            f"attention 'cudnn' computes in bfloat16 or float16, not {query.dtype}: use --config.dtype=bfloat16, or "
            "--config.attention=xla"
        )
    if query.shape[1] % 2 or key.shape[1] % 2 or unseen % 2:
        raise UserError(
            f"attention 'cudnn' takes even numbers of tokens, not {query.shape[1]} and {key.shape[1]} of which "
            f"{unseen} are unseen by the others: use --config.attention=xla"
        )
    run = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    with jax.numpy_dtype_promotion("standard"):
        return _in_two(lambda q, k, v, mask: run(q, k, v, mask=mask), 1, (query, key, value), _dense(mask), unseen)


# The switch: every implementation has the signature of `xla_attention`.
ATTENTION: dict[str, Callable[..., jax.Array]] = {
    "xla": xla_attention,
    "cached": cached_attention,
    "splash": splash_attention,
    "cudnn": cudnn_attention,
}

# What JAX calls the devices that a kernel is for, and what messages do.
KERNELS = {"splash": (("tpu",), "TPUs"), "cudnn": (("gpu", "cuda"), "NVIDIA's GPUs")}


def check_attention(name: str) -> None:
    """Raises UserError where the devices of the mesh in context, or else of this process, cannot run it."""
    if name not in KERNELS:
        return
    mesh = jax.sharding.get_abstract_mesh()
    platform = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
    platforms, devices = KERNELS[name]
    if platform not in platforms:
        raise UserError(
            f"attention {name!r} is a kernel for {devices} and cannot run on these devices ({platform}): use "
            "--config.attention=xla for accelerators, --config.attention=cached for processors"
        )


def default_attention() -> str:
    """The implementation for the devices of this process. A program compiled for other devices names its own."""
    return "cached" if jax.default_backend() == "cpu" else "xla"
