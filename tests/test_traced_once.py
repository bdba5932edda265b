"""`apply_network`: the network's own numbers and gradients, from one trace for all calls of the same shapes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nd_jax.models.traced_once import apply_network

X = jnp.asarray(np.random.default_rng(0).standard_normal((8, 6)), jnp.float32)


class Layer(nn.Module):
    """A product whose result has a logical axis; it says when it is traced."""

    width: int = 4

    @nn.compact
    def __call__(self, x, scale: float = 1.0):
        TRACED.append(x.shape)
        return nn.with_logical_constraint(scale * jnp.tanh(nn.Dense(self.width)(x)), ("batch", None))


TRACED = []


@pytest.fixture
def params():
    params = Layer().init(jax.random.key(0), X)["params"]
    jax.clear_caches()
    TRACED.clear()
    return params


def test_numbers_and_gradients_are_those_of_apply(params):
    plain = lambda params, x: jnp.sum(Layer().apply({"params": params}, x, scale=3.0) ** 2)
    shared = lambda params, x: jnp.sum(apply_network(Layer(), params, x, scale=3.0) ** 2)
    want, got = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(params, X) for f in (plain, shared))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_calls_of_the_same_shapes_are_traced_once(params):
    """By whichever parameters and under gradients too; other shapes, sizes and settings have traces of their own."""

    def loss(params, others, x):
        both = apply_network(Layer(), params, x) + jax.lax.stop_gradient(apply_network(Layer(), others, 2 * x))
        return jnp.sum(both)

    jax.jit(lambda *given: (jax.grad(loss)(*given), loss(*given))).trace(params, params, X)
    assert TRACED == [X.shape]
    jax.eval_shape(lambda: apply_network(Layer(), params, X[:2]))
    jax.eval_shape(lambda: apply_network(Layer(), params, X, scale=2.0))
    assert TRACED == [X.shape, (2, 6), X.shape]


def test_rules_of_logical_axes_are_not_of_an_earlier_trace(params):
    def text(rules):
        with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
            with nn.logical_axis_rules(rules):
                return str(jax.make_jaxpr(lambda x: apply_network(Layer(), params, x))(X))

    assert "sharding_constraint" not in text(())
    assert "sharding_constraint" in text((("batch", "data"),))
    assert "sharding_constraint" not in text(())
