"""Optimisers: what Muon takes for matrices, and that its updates have the size of Adam's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nd_jax.errors import UserError
from nd_jax.train import optimizer
from tests.toy_method import toy_config

rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)


def muon(**changes):
    config = toy_config()["optimizer"] | {"name": "muon", "warmup_steps": 0, "clip_norm": 0.0, "weight_decay": 0.0}
    return optimizer.make_optimizer(config | {"decay": "constant", **changes}, 10)


def update(params, grads, **changes):
    tx = muon(**changes)
    with jax.numpy_dtype_promotion("standard"):  # As in the train step: optax raises floats to integer powers.
        return jax.jit(lambda: tx.update(grads, tx.init(params), params)[0])()


def test_kernels_are_matrices_and_nothing_else_is():
    block = {"mlp": {"kernel": draw(3, 8, 4), "bias": draw(3, 4)}, "modulation": {"kernel": draw(3, 8, 4)}}
    params = {
        "blocks": block,
        "conv": {"kernel": draw(3, 3, 5, 8)},
        "embedding": draw(7, 4),
        "norm": {"scale": draw(4)},
    }
    axes = optimizer.kernel_axes(params)
    assert axes["blocks"]["mlp"]["kernel"] == optax.contrib.MuonDimensionNumbers((1,), (2,))
    assert axes["conv"]["kernel"] == optax.contrib.MuonDimensionNumbers((0, 1, 2), (3,))
    others = [axes["blocks"]["mlp"]["bias"], axes["blocks"]["modulation"]["kernel"], axes["embedding"], axes["norm"]]
    assert others == [None, None, None, {"scale": None}]


def test_updates_of_kernels_are_orthogonal_and_as_large_as_adams():
    params = {"layer": {"kernel": draw(12, 8)}}
    # Gradients of unlike directions and very unlike sizes.
    grads = {"layer": {"kernel": draw(12, 8) * jnp.geomspace(1e-1, 1.0, 8)[None]}}
    step = update(params, grads, learning_rate=0.1)["layer"]["kernel"]
    singular = np.linalg.svd(step, compute_uv=False)
    # Five Newton-Schulz steps bring singular values near to 1, not to 1.
    assert singular.max() / singular.min() < 2.5
    assert np.sqrt(np.mean(np.square(step))) == pytest.approx(0.1 * optimizer.MUON_RMS, rel=0.25)


def test_stacked_blocks_are_one_matrix_each():
    kernel, grad = draw(2, 6, 4), draw(2, 6, 4)
    stacked = update({"blocks": {"kernel": kernel}}, {"blocks": {"kernel": grad}})["blocks"]["kernel"]
    for k in range(2):
        alone = update({"layer": {"kernel": kernel[k]}}, {"layer": {"kernel": grad[k]}})["layer"]["kernel"]
        np.testing.assert_allclose(stacked[k], alone, rtol=1e-4, atol=1e-7)


def test_other_parameters_get_adamw():
    params, grads = {"norm": {"scale": draw(4)}}, {"norm": {"scale": draw(4)}}
    config = toy_config()["optimizer"]
    betas = dict(b1=config["beta1"], b2=config["beta2"], eps=config["epsilon"])
    # Muon's Adam looks one step ahead, as its own momentum does.
    adam = optax.adamw(config["learning_rate"], weight_decay=0.02, nesterov=True, **betas)
    with jax.numpy_dtype_promotion("standard"):
        expected = adam.update(grads, adam.init(params), params)[0]
    found = update(params, grads, weight_decay=0.02)
    np.testing.assert_allclose(found["norm"]["scale"], expected["norm"]["scale"], rtol=1e-6)


def test_unknown_optimizer_is_named():
    with pytest.raises(UserError, match=r"optimizer\.name is 'lion': use 'adam', 'adamw' or 'muon'"):
        muon(name="lion")
