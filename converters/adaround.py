"""Rounding of weights that is learned: up or down, layer by layer (AdaRound, Nagel et al. 2020, arXiv:2004.10568).

For one output channel w with step s and inputs x, equations 21 to 24 of the paper:

    q   = s clip(floor(w / s) + h(v), -127, 127)                                                    (1)
    h   = clip(1.2 sigmoid(v) - 0.1, 0, 1)                                                          (2)
    min over v   mean (w x - q x)^2 + L sum (1 - |2 h(v) - 1|^b)                                    (3)

by Adam from the v at which h is what floor has cut off, so that q = w. The first term is (w - q)^T H (w - q) with
H = mean x x^T, so that nothing but H has to be known of the inputs; it is taken in units of the error of nearest
rounding, which makes L the same for all layers. b falls from 20 to 2, which drives every h to 0 or 1; in the first
fifth of the iterations the second term is left out. `converters.rounding` goes through the weights once and may move
one by more than a step; where the two were measured (docs/quantisation.md) it was better, and much faster.
"""

import functools

import numpy as np

ITERATIONS = 4000
WARM_UP = 0.2
LEARNING_RATE = 0.03
WEIGHT = 0.1
FIRST_EXPONENT, LAST_EXPONENT = 20.0, 2.0
STRETCH = 1.2, -0.1


def learn_rounding(
    weight_ON: np.ndarray, moments_NN: np.ndarray, scales_O: np.ndarray, levels: int = 127, iterations: int = ITERATIONS
) -> np.ndarray:
    """Equations 1 to 3: the multiples of their channel's step that stand for the weights, int8 [O, N].

    Args:
      weight_ON: one row per output channel.
      moments_NN: mean x x^T over the layer's inputs x, ordered like a row.
      scales_O: step of every channel.
      levels: largest multiple.
      iterations: of Adam.
    """
    import jax.numpy as jnp

    steps = (weight_ON / scales_O[:, None]).astype(np.float32)
    floor = np.floor(steps)
    nearest = np.clip(np.round(steps), -levels, levels) - steps
    # Per channel, the error of nearest rounding in steps: the unit of the first term.
    unit = np.maximum(np.einsum("on,nm,om->o", nearest, moments_NN, nearest, optimize=True), 1e-12)
    up = _learn(*(jnp.asarray(x, jnp.float32) for x in (steps, moments_NN, unit)), levels=levels, iterations=iterations)
    return np.clip(floor + (np.asarray(up) >= 0.5), -levels, levels).astype(np.int8)


@functools.cache
def _compiled():
    import jax

    return jax.jit(_learn_in_jax, static_argnames=("levels", "iterations"))


def _learn(steps, moments, unit, *, levels, iterations):
    return _compiled()(steps, moments, unit, levels=levels, iterations=iterations)


def _learn_in_jax(steps, moments, unit, *, levels, iterations):
    """h(v) at the end, [O, N]."""
    import jax
    import jax.numpy as jnp

    slope, foot = STRETCH
    soft = lambda v: jnp.clip(slope * jax.nn.sigmoid(v) + foot, 0.0, 1.0)
    floor = jnp.floor(steps)
    start = jnp.clip((steps - floor - foot) / slope, 1e-4, 1 - 1e-4)

    def loss(v, exponent, weight):
        error = jnp.clip(floor + soft(v), -levels, levels) - steps
        first = (jnp.einsum("on,nm,om->o", error, moments, error) / unit).sum()
        return first + weight * (1 - jnp.abs(2 * soft(v) - 1) ** exponent).sum()

    def step(carry, i):
        v, mean, square = carry
        progress = jnp.clip((i / iterations - WARM_UP) / (1 - WARM_UP), 0.0, 1.0)
        exponent = LAST_EXPONENT + 0.5 * (FIRST_EXPONENT - LAST_EXPONENT) * (1 + jnp.cos(jnp.pi * progress))
        gradient = jax.grad(loss)(v, exponent, jnp.where(i < WARM_UP * iterations, 0.0, WEIGHT))
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        scale = jnp.sqrt(1 - 0.999 ** (i + 1)) / (1 - 0.9 ** (i + 1))
        return (v - LEARNING_RATE * scale * mean / (jnp.sqrt(square) + 1e-8), mean, square), None

    v = jnp.log(start / (1 - start))
    (v, *_), _ = jax.lax.scan(
        step, (v, jnp.zeros_like(v), jnp.zeros_like(v)), jnp.arange(iterations, dtype=jnp.float32)
    )
    return soft(v)
