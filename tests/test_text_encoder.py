"""Text-encoder distillation: equation 3, what each mode trains, where gradients flow, and the metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from hypothesis import given
from hypothesis import strategies as st

from nd_jax.distill import text_encoder as te
from nd_jax.distill.base import merge, partition
from nd_jax.distill.registry import build_method
from nd_jax.errors import UserError
from tests.text_encoder_case import tiny_config

rng = np.random.default_rng(0)


def contexts(shape=(3, 5, 4)):
    mask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    return (*(jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)), jnp.asarray(mask, jnp.int32))


@pytest.mark.parametrize(("reduction", "scale"), [("mean", 1 / 4), ("sum", 1.0)])
def test_loss_is_equation_3(reduction, scale):
    student, teacher, mask = contexts()
    config = te.TextEncoderLoss(mse_weight=0.7, cosine_weight=0.3, mse_reduction=reduction)
    loss, parts = te.distillation_loss(student, teacher, mask, config)
    s, t, keep = np.asarray(student), np.asarray(teacher), np.asarray(mask).astype(bool)
    square = ((s - t) ** 2).sum(-1)[keep] * scale
    cosine = ((s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1))[keep]
    assert float(loss.weight) == keep.sum() == 9
    np.testing.assert_allclose(loss.value, (0.7 * square + 0.3 * (1 - cosine)).mean(), rtol=1e-5)
    np.testing.assert_allclose(parts["cosine_distance"].value, (1 - cosine).mean(), rtol=1e-5)


def test_padding_has_no_say():
    student, teacher, mask = contexts()
    junk = jnp.where(mask[..., None] > 0, student, 1e6)
    config = te.TextEncoderLoss()
    for fn in (
        lambda s: te.distillation_loss(s, teacher, mask, config)[0].value,
        lambda s: te.cross_prompt_cosine(s, mask).value,
    ):
        np.testing.assert_allclose(fn(junk), fn(student), rtol=1e-6)


def test_a_zero_context_has_a_finite_gradient():
    _, teacher, mask = contexts()
    loss = lambda s: te.distillation_loss(s, teacher, mask, te.TextEncoderLoss())[0].value
    assert bool(jnp.all(jnp.isfinite(jax.grad(loss)(jnp.zeros_like(teacher)))))


@given(st.integers(2, 4), st.integers(1, 5), st.integers(0, 10_000))
def test_collapse_meter_is_the_mean_over_pairs(prompts, length, seed):
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(prompts, length, 3)).astype(np.float32)
    mask = (draw.random((prompts, length)) < 0.7) | (np.arange(length) == 0)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    tokens = [(b, unit[b, i]) for b in range(prompts) for i in range(length) if mask[b, i]]
    pairs = [u @ v for a, u in tokens for b, v in tokens if a != b]
    got = te.cross_prompt_cosine(jnp.asarray(x), jnp.asarray(mask, jnp.int32)).value
    np.testing.assert_allclose(got, np.mean(pairs), atol=2e-5)


def test_collapse_meter_sees_a_collapse():
    same = jnp.broadcast_to(jnp.ones((1, 1, 4)), (3, 5, 4))
    assert float(te.cross_prompt_cosine(same, jnp.ones((3, 5), jnp.int32)).value) == pytest.approx(1.0, abs=1e-5)


def test_snr_is_over_all_tokens():
    assert te.summarize({"signal": 100.0, "noise": 1.0, "cosine": 0.5}) == {
        "cosine": 0.5,
        "snr_db": pytest.approx(20.0),
    }


BATCH = {
    "ids": jnp.asarray([[5, 6, 7, 1, 0, 0], [8, 9, 1, 0, 0, 0]], jnp.int32),
    "mask": jnp.asarray([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]], jnp.int32),
}


@pytest.mark.parametrize("mode", te.MODES)
def test_each_mode_trains_what_it_says(mode):
    method = build_method(tiny_config(**{"loss.mode": mode, "loss.lora_rank": 2}))
    roles = {name: jax.jit(role.init)() for name, role in method.roles.items()}
    trainable, held = partition(roles["student"], method.roles["student"].trainable)
    groups = {"RM": {"context_adapter"}, "EM": {"context_adapter"}}.get(mode, {"context_adapter", "text_encoder_3"})
    assert set(trainable) == ({"context_adapter", "lora"} if mode == "LoRA" else groups)

    def loss(trainable, teacher):
        return method.losses["student"](
            {"student": merge(trainable, held), "teacher": teacher}, BATCH, jax.random.key(0)
        )[0].value

    value, (student_grad, teacher_grad) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(trainable, roles["teacher"])
    assert np.isfinite(value)
    assert all(not np.any(g) for g in jax.tree.leaves(teacher_grad)), "a gradient reaches the teacher"
    flat = traverse_util.flatten_dict(student_grad, sep="/")
    # B of LoRA starts at zero, so A has no gradient in the first step.
    silent = {path for path, g in flat.items() if not np.any(g)}
    assert silent == ({p for p in flat if p.endswith("/a")} if mode == "LoRA" else set())


def test_modes_deploy_the_released_components():
    for mode in te.MODES:
        config = tiny_config(**{"loss.mode": mode, "loss.lora_rank": 2})
        method = build_method(config)
        deployed = method.deploy({"student": jax.jit(method.roles["student"].init)()})
        assert set(deployed) == {"text_encoder_3", "context_adapter"}
        adapter = deployed["context_adapter"][1]
        assert adapter.output_dims == (config["teacher"]["encoder"]["d_model"] if mode == "EM" else 12)


def test_lora_starts_as_the_plain_student_and_is_merged_on_deploy():
    plain, lora = (build_method(tiny_config(**{"loss.mode": m, "loss.lora_rank": 2})) for m in ("RM", "LoRA"))
    params = jax.jit(lora.roles["student"].init)()
    before = lora.deploy({"student": params})["text_encoder_3"][2]
    jax.tree.map(
        np.testing.assert_array_equal,
        before,
        plain.deploy({"student": jax.jit(plain.roles["student"].init)()})["text_encoder_3"][2],
    )
    kernel = "encoder/blocks/mlp/up/kernel"
    factors = traverse_util.flatten_dict(params["lora"], sep="/")
    factors[f"{kernel}/b"] = jnp.ones_like(factors[f"{kernel}/b"])
    params["lora"] = traverse_util.unflatten_dict(factors, sep="/")
    after = lora.deploy({"student": params})["text_encoder_3"][2]
    want = before["encoder"]["blocks"]["mlp"]["up"]["kernel"] + 8.0 * jnp.sum(factors[f"{kernel}/a"], -1, keepdims=True)
    np.testing.assert_allclose(after["encoder"]["blocks"]["mlp"]["up"]["kernel"], want, rtol=1e-5, atol=1e-6)


def test_bad_values_name_the_key():
    with pytest.raises(UserError, match="mode 'RN' is not one of RM, EM, TDT5, LoRA"):
        build_method(tiny_config(**{"loss.mode": "RN"}))
    config = tiny_config()
    config["student"]["adapter"]["input_dims"] = 20
    with pytest.raises(UserError, match="projection_dim is 16, but the adapter's input_dims is 20"):
        build_method(config)
