"""A pyramid whose answers are known: Gaussian mixtures, the exact velocity of their stages, and energy distance.

Clean latents are z | k ~ N(μ_k, σ² I), component k with probability p_k. Down(.) averages blocks of 2 x 2, so that at
every stage z_i | k ~ N(Down(..(μ_k)), σ_i² I) with σ_{i-1} = σ_i / 2 is a mixture of the same kind. With the stage's
s and e, P(x) = U(Down(x)) and R = I - P (at stage 0: P = 0), point and velocity of a path (`pyramid.paths`) are

    y = a_P P z + a_R R z + b ε,        v = c_P P z + c_R R z + d ε                                             (1)
    a_P = t (1 - s) + (1 - t) (1 - e),  a_R = (1 - t) (1 - e),  b = t s + (1 - t) e                             (2)
    c_P = e - s,                        c_R = -(1 - e),         d = s - e                                       (3)

linear in z and ε, which given k are Gaussian and independent. So for both subspaces, Q one of P and R,

    Q y | k     ~ N(a_Q Q μ_k, V_Q I),  V_Q = a_Q² σ_i² + b²                                                    (4)
    E[Q v | y, k] = c_Q Q μ_k + (c_Q a_Q σ_i² + d b) / V_Q (Q y - a_Q Q μ_k)                                    (5)
    r_k         = softmax_k(log p_k - |P y - a_P P μ_k|² / 2 V_P - |R y - a_R R μ_k|² / 2 V_R)                  (6)
    E[v | y]    = Σ_k r_k E[v | y, k]                             what a perfect network says                   (7)

    ED(X, Y)    = 2 E|x - y| - E|x - x'| - E|y - y'|              0 only where both distributions are equal     (8)

Sources: paths, Pyramid-Flow (arXiv 2410.05954), section 3.2; (8), Székely and Rizzo, Energy statistics (2013).
"""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.pyramid import paths
from nd_jax.pyramid.noise import halve, latent_pyramid, upsample
from nd_jax.pyramid.schedule import PyramidSchedule


@flax.struct.dataclass
class GaussianMixture:
    """Latent frames from K Gaussians of one width.

    Attributes:
      means: μ_k, [K, 1, H, W, C].
      log_weights: log p_k, [K].
      sigma: σ, [].
    """

    means: jax.Array
    log_weights: jax.Array
    sigma: jax.Array


def circle_mixture(
    size: int, components: int, radius: float, pattern: float, sigma: float, seed: int = 0
) -> GaussianMixture:
    """Components at equal distances on a circle, each with a pattern of its own; two channels, equal weights.

    The mean of a component over the frame is its point on the circle. Around it lies, for every halving, a pattern of
    random signs, two of each in every block of four, which that halving averages away: every stage has structure that
    no coarser one has.

    Args:
      size: rows and columns, a power of 2.
      components: K.
      radius: of the circle.
      pattern: what a halving's pattern adds to a value or takes from it.
      sigma: σ.
      seed: of the signs.
    """
    angle = 2 * np.pi * np.arange(components) / components
    means = radius * np.stack([np.cos(angle), np.sin(angle)], axis=-1)[:, None, None, None, :]
    rng = np.random.default_rng(seed)
    while means.shape[2] < size:
        blocks = means.shape[2]
        signs = rng.permuted(np.broadcast_to([1.0, 1.0, -1.0, -1.0], (components, blocks, blocks, 2, 4)), axis=-1)
        signs = signs.reshape(components, blocks, blocks, 2, 2, 2).transpose(0, 1, 4, 2, 5, 3)
        signs = signs.reshape(components, 1, 2 * blocks, 2 * blocks, 2)
        means = np.repeat(np.repeat(means, 2, axis=2), 2, axis=3) + pattern * signs
    return GaussianMixture(
        means=jnp.asarray(means, jnp.float32),
        log_weights=jnp.full((components,), -np.log(components), jnp.float32),
        sigma=jnp.float32(sigma),
    )


def mixture_pyramid(mixture: GaussianMixture, stages: int) -> tuple[GaussianMixture, ...]:
    """The mixture at every stage, coarsest first."""
    levels = latent_pyramid(mixture.means, stages)
    return tuple(
        mixture.replace(means=means, sigma=mixture.sigma / 2 ** (stages - 1 - i)) for i, means in enumerate(levels)
    )


def sample_mixture(mixture: GaussianMixture, key: jax.Array, count: int) -> jax.Array:
    """Latents z, [count, 1, H, W, C]."""
    component_key, noise_key = jax.random.split(key)
    component = jax.random.categorical(component_key, mixture.log_weights, shape=(count,))
    noise = jax.random.normal(noise_key, (count, *mixture.means.shape[1:]), jnp.float32)
    return mixture.means[component] + mixture.sigma * noise


def exact_velocity(
    schedule: PyramidSchedule, stage: int, mixture: GaussianMixture, state: jax.Array, t: jax.Array
) -> jax.Array:
    """E[v | y] (7), [B, 1, h, w, C].

    Args:
      schedule, stage: static; give s and e.
      mixture: at the stage (`mixture_pyramid`).
      state: y, [B, 1, h, w, C].
      t: [B].
    """
    start, end = schedule.flow_range(stage)
    blocks = (lambda x: upsample(halve(x))) if stage else jnp.zeros_like
    b, d = paths.noise_share(schedule, stage, t), start - end
    signal = (1 - t) * (1 - end)
    # (a_Q, c_Q, Q y, Q μ) of both subspaces.
    state_blocks, mean_blocks = blocks(state), blocks(mixture.means)
    parts = (
        (signal + t * (1 - start), end - start, state_blocks, mean_blocks),
        (signal, -(1 - end), state - state_blocks, mixture.means - mean_blocks),
    )
    logits = mixture.log_weights[None]
    moments = []
    for a, c, y, mean in parts:
        variance = jnp.square(a * mixture.sigma) + jnp.square(b)
        off = y[:, None] - a[:, None, None, None, None, None] * mean[None]  # [B, K, 1, h, w, C]
        logits = logits - jnp.sum(jnp.square(off), axis=(2, 3, 4, 5)) / (2 * variance)[:, None]
        gain = (c * a * jnp.square(mixture.sigma) + d * b) / variance
        moments.append(c * mean[None] + paths.per_sample(gain, off) * off)
    share = jax.nn.softmax(logits, axis=1)
    return jnp.einsum("bk,bk...->b...", share, sum(moments))


def energy_distance(x: jax.Array, y: jax.Array, chunk: int = 64) -> float:
    """ED (8) of two samples with rows on axis 0, at least two each, everything else flattened.

    Without bias, thus around 0 and also below it for samples of one distribution. Memory is that of `chunk` rows
    against all others.
    """
    x, y = (jnp.asarray(rows, jnp.float32).reshape(len(rows), -1) for rows in (x, y))
    n, m = len(x), len(y)
    # A row is no partner of itself; its distance of 0 is in the sum.
    within = lambda rows, count: _mean_distance(rows, rows, chunk) * count / (count - 1)
    return 2 * _mean_distance(x, y, chunk) - within(x, n) - within(y, m)


def _mean_distance(x: jax.Array, y: jax.Array, chunk: int) -> float:
    """Mean of |x - y| over all pairs; over rows in float64, as the distances of (8) nearly cancel."""
    return float(np.mean(np.asarray(_row_distances(x, y, chunk), np.float64)))


@functools.partial(jax.jit, static_argnames="chunk")
def _row_distances(x: jax.Array, y: jax.Array, chunk: int) -> jax.Array:
    to_all = lambda row: jnp.mean(jnp.sqrt(jnp.sum(jnp.square(row[None] - y), axis=-1)))
    return jax.lax.map(to_all, x, batch_size=min(chunk, len(x)))
