"""Attention in steps, without the pairs that a mask hides, and by a kernel, against plain attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from nd_jax.errors import UserError
from nd_jax.models import attention
from nd_jax.models.attention import (
    ATTENTION,
    OrderedMask,
    cached_attention,
    cudnn_attention,
    splash_attention,
    xla_attention,
)
from nd_jax.models.mmdit import MMDiTConfig, PyramidMMDiT
from nd_jax.models.mmdit_block import JointBlock, vector_dot_general
from nd_jax.pyramid.layout import VideoSize, video_layouts
from nd_jax.pyramid.units import stage_units
from nd_jax.train.cost import jaxpr_flops
from nd_jax.train.sharding import RULES, make_mesh
from nd_jax.weights.mmdit import PYRAMID_MMDIT
from nd_jax.weights.network import abstract_params

BATCH, LENGTH, HEADS, WIDTH, UNSEEN = 2, 7, 6, 4, 3


def case(dtype=jnp.float32, mask_batch=BATCH):
    """(q, k, v), a mask that hides the last tokens from the rest, and a gradient of the output."""
    rng = np.random.default_rng(0)
    draw = lambda: jnp.asarray(rng.standard_normal((BATCH, LENGTH, HEADS, WIDTH), np.float32), dtype)
    mask = (rng.random((mask_batch, 1, LENGTH, LENGTH)) < 0.6) | np.eye(LENGTH, dtype=bool)
    mask[:, :, :-UNSEEN, -UNSEEN:] = False
    return (draw(), draw(), draw()), mask, draw()


def outputs_and_gradients(run, qkv, gradient):
    def both(qkv, gradient):
        output, pullback = jax.vjp(run, *qkv)
        return output, *pullback(gradient)

    return jax.jit(both)(qkv, gradient)


def plain(mask):
    """Equations 1 and 2 as they stand, float32."""

    def run(query, key, value):
        query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
        logits = jnp.einsum("blhk,bshk->bhls", query, key) / np.sqrt(WIDTH).astype(np.float32)
        return jnp.einsum("bhls,bshk->blhk", jax.nn.softmax(jnp.where(mask, logits, -jnp.inf)), value)

    return run


# All at once; two heads of both samples at once; one sample after another, its heads by two; each head alone.
@pytest.mark.parametrize("limit", [10_000, 2 * BATCH * LENGTH**2, 2 * LENGTH**2 - 1 + BATCH, 1])
@pytest.mark.parametrize("mask_batch", [1, BATCH])
def test_steps_change_nothing(limit, mask_batch, monkeypatch):
    monkeypatch.setattr(attention, "LOGITS_AT_ONCE", limit)
    qkv, mask, gradient = case(mask_batch=mask_batch)
    got = outputs_and_gradients(lambda *qkv: cached_attention(*qkv, mask), qkv, gradient)
    for g, e in zip(got, outputs_and_gradients(plain(mask), qkv, gradient), strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=2e-6 * float(jnp.abs(e).max()))


@pytest.mark.parametrize("implementation", ["xla", "cached"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_hidden_pairs_can_be_left_out(implementation, dtype):
    qkv, mask, gradient = case(dtype)
    # The gradient of JAX's own attention mixes dtypes, as its output does.
    with jax.numpy_dtype_promotion("standard" if implementation == "xla" else "strict"):
        got = outputs_and_gradients(lambda *qkv: ATTENTION[implementation](*qkv, mask, UNSEEN), qkv, gradient)
    expected = outputs_and_gradients(plain(mask), qkv, gradient.astype(jnp.float32))
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        tolerance = (2e-6 if dtype == jnp.float32 else 2e-2) * float(jnp.abs(e).max())
        np.testing.assert_allclose(g.astype(jnp.float32), e.astype(jnp.float32), rtol=0, atol=tolerance)
    # Were a pair not hidden, leaving it out would show.
    seen = mask.copy()
    seen[:, :, 0, -1] = True
    other = outputs_and_gradients(plain(seen), qkv, gradient.astype(jnp.float32))
    assert not np.allclose(got[0].astype(jnp.float32), other[0], atol=3e-2)


def test_a_query_without_keys_is_finite():
    qkv, mask, gradient = case()
    mask[:, :, 2] = False
    for array in outputs_and_gradients(lambda *qkv: cached_attention(*qkv, mask), qkv, gradient):
        assert np.isfinite(array).all()


CONFIG = MMDiTConfig(
    in_channels=3, num_layers=2, attention_head_dim=8, num_attention_heads=2, pooled_projection_dim=6, sample_size=16,
    pos_embed_max_size=16,
)  # fmt: skip
TEXT_MASK = np.array([[1, 1, 1, 0], [1, 1, 0, 0]])


def test_the_transformer_without_hidden_pairs_is_the_transformer():
    """Every stream of every token, padding included, and the gradient of every parameter."""
    layouts = video_layouts(CONFIG, VideoSize(latent_frames=4, height=16, width=16), TEXT_MASK.shape[1])
    layout = layouts[2, 1]
    assert layout.current_unseen and layout.padding and not layouts[0, 1].current_unseen
    rng = np.random.default_rng(1)
    draw = lambda *shape: (0.3 * rng.standard_normal(shape)).astype(np.float32)
    params = jax.tree.map(lambda leaf: draw(*leaf.shape), abstract_params(PYRAMID_MMDIT, CONFIG))
    tokens = draw(2, layout.image_length, CONFIG.token_dim)
    inputs = (tokens, draw(2, 4, CONFIG.context_dim), draw(2, 6), np.array([386.0, 900.0], np.float32))

    def run(attention, unseen):
        model = PyramidMMDiT(CONFIG, attention=attention)

        def loss(params):
            out = model.apply(
                {"params": params}, *inputs, layout.geometry(TEXT_MASK), layout.output_tokens, True, unseen
            )
            return jnp.sum(jnp.square(out.velocity)), out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    expected = run("xla", False)
    for got in (run("xla", True), run("cached", True)):
        jax.tree.map(
            lambda g, e: np.testing.assert_allclose(g, e, rtol=0, atol=2e-5 * max(float(jnp.abs(e).max()), 1e-6)),
            got,
            expected,
        )


# The shortest block that the kernel takes; `interpret` runs it here.
BLOCK = 128
VIDEO = VideoSize(latent_frames=4, height=32, width=32)
UNITS = jnp.array([3, 0, 2, 1])
TEXT_MASKS = jnp.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])


# Sequences of 68 tokens, one block, and of 164, two, with all keys in a step or not; rows have 0 to 96 of padding.
@pytest.mark.parametrize(
    ("stage", "dtype", "keys"), [(0, jnp.float32, 256), (1, jnp.float32, 128), (1, jnp.bfloat16, 256)]
)
def test_the_kernel_is_plain_attention(stage, dtype, keys, monkeypatch):
    """Of every token, padding included, for rows of all units."""
    monkeypatch.setattr(attention, "KERNEL_BLOCK", BLOCK)
    monkeypatch.setattr(attention, "KERNEL_KEYS", keys)
    mask = stage_units(CONFIG, VIDEO, stage, TEXT_MASKS.shape[1]).geometry(UNITS, TEXT_MASKS).mask
    rng = np.random.default_rng(3)
    shape = (len(UNITS), mask.last.shape[1], 2, 8)
    assert shape[1] == (68, 164)[stage]
    *qkv, gradient = (jnp.asarray(rng.standard_normal(shape, np.float32), dtype) for _ in range(4))
    got = outputs_and_gradients(lambda *qkv: splash_attention(*qkv, mask, interpret=True), qkv, gradient)
    *qkv, gradient = (x.astype(jnp.float32) for x in (*qkv, gradient))
    expected = outputs_and_gradients(lambda *qkv: xla_attention(*qkv, mask), qkv, gradient)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        np.testing.assert_allclose(g.astype(jnp.float32), e, rtol=0, atol=1e-5 if dtype == jnp.float32 else 4e-2)
    # Were all tokens of one group, it would show.
    wrong = OrderedMask(mask.last, jnp.zeros_like(mask.groups))
    other = outputs_and_gradients(lambda *qkv: xla_attention(*qkv, wrong), qkv, gradient)
    assert not np.allclose(got[0].astype(jnp.float32), other[0], atol=1e-1)


def test_a_block_with_the_kernel_on_a_mesh(monkeypatch):
    """Rows over data and fsdp, heads over tensor, and computed again for the gradient of every parameter."""
    monkeypatch.setattr(attention, "KERNEL_BLOCK", BLOCK)
    monkeypatch.setitem(ATTENTION, "splash", functools.partial(splash_attention, interpret=True))
    geometry = stage_units(CONFIG, VIDEO, 0, TEXT_MASKS.shape[1]).geometry(UNITS, TEXT_MASKS)
    rng = np.random.default_rng(4)
    draw = lambda *shape: (0.3 * rng.standard_normal(shape)).astype(np.float32)
    inputs = (draw(4, 64, 16), draw(4, 4, 16), draw(4, 16))
    block = nn.remat(JointBlock)(heads=2, head_dim=8, last=True)
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), *inputs, geometry))
    params = jax.tree.map(lambda leaf: draw(*leaf.shape), shapes)

    def run(attention):
        def loss(params):
            with nn.logical_axis_rules(RULES):
                image, _ = block.clone(attention=attention).apply(params, *inputs, geometry)
            return jnp.sum(jnp.square(image)), image

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    expected = run("cached")
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        got = run("splash")
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=0, atol=2e-5 * max(float(jnp.abs(e).max()), 1e-6)),
        got,
        expected,
    )


def test_the_kernel_says_what_it_needs():
    qkv, mask, _ = case()
    with pytest.raises(ValueError, match="takes an OrderedMask"):
        splash_attention(*qkv, mask)
    ordered = OrderedMask(np.full((1, LENGTH), LENGTH - 1, np.int32), np.zeros((1, LENGTH), np.int32))
    with pytest.raises(UserError, match=r"kernel for TPUs .* \(cpu\): use --config.attention=xla"):
        splash_attention(*qkv, ordered)


@pytest.fixture
def with_cudnn(monkeypatch):
    """JAX asks the machine for cuDNN before it traces a call; tracing itself needs none."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(attention, "check_attention", lambda name: None)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)


def test_what_cudnn_computes_is_counted(with_cudnn):
    """Two products of all pairs forward, five backward; of the pairs that a mask hides, those left out do not count."""
    shapes = [jax.ShapeDtypeStruct((2, 8, 6, 16), jnp.bfloat16)] * 3
    mask = np.ones((1, 1, 8, 8), bool)
    run = lambda *qkv: jnp.sum(cudnn_attention(*qkv, mask, 2).astype(jnp.float32))
    pair = 2 * 2 * 6 * 16  # 2 K operations of every sample and head
    pairs = 6 * 6 + 2 * 8
    assert jaxpr_flops(jax.make_jaxpr(run)(*shapes)).by_dtype == {"bfloat16": 2 * pairs * pair}
    assert jaxpr_flops(jax.make_jaxpr(jax.grad(run))(*shapes)).by_dtype == {"bfloat16": 7 * pairs * pair}


def test_cudnn_says_what_it_needs(with_cudnn):
    qkv, mask, _ = case()
    with pytest.raises(UserError, match="bfloat16 or float16, not float32"):
        cudnn_attention(*qkv, mask)
    with pytest.raises(UserError, match="even numbers of tokens, not 7 and 7"):
        cudnn_attention(*(x.astype(jnp.bfloat16) for x in qkv), mask)


def test_cudnn_is_for_gpus():
    with pytest.raises(UserError, match=r"kernel for NVIDIA's GPUs .* \(cpu\): use --config.attention=xla"):
        cudnn_attention(*case(jnp.bfloat16)[0], None)


def test_unseen_needs_a_length():
    network = PyramidMMDiT(CONFIG)
    inputs = PYRAMID_MMDIT.inputs(CONFIG)
    with pytest.raises(ValueError, match="give output_tokens"):
        jax.eval_shape(lambda *args: network.init(jax.random.key(0), *args, current_unseen=True), *inputs)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_gradient_of_a_modulation(batch):
    rng = np.random.default_rng(2)
    x, kernel, gradient = (rng.standard_normal(shape, np.float32) for shape in ((batch, 5), (5, 8), (batch, 8)))
    output, pullback = jax.vjp(vector_dot_general, x, kernel)
    d_x, d_kernel = pullback(gradient)
    for got, expected in ((output, x @ kernel), (d_x, gradient @ kernel.T), (d_kernel, x.T @ gradient)):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
