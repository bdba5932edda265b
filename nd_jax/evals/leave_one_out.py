"""What a video transformer's output loses without some of its blocks R.

    y   = training state of a latent frame u at a stage (`pyramid.units`), from latents that the whole network sampled
    v   = v⁻ + g (v⁺ - v⁻)                      velocity at y with the guidance of frame u, as in sampling      (1)
    e_v = |v_R - v|^2 / |v|^2                   velocity error, a mean over frames, times and noise             (2)
    e_z = |z_R - z|^2 / |z|^2                   final latents of rollouts from the same noise                   (3)

(2) is one call of the transformer and sees blocks apart from what sampling makes of an error; (3) is what a viewer
sees, and costs a rollout. Guidance enlarges what a block says of the text: without it (2) orders blocks less like (3).
All choices of as many blocks share one compiled program: `keep_blocks` is an index on the block axis, and the network
only knows how many blocks it has.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from nd_jax.generate.config import SamplerConfig
from nd_jax.generate.sampler import RolloutNoise, rollout
from nd_jax.models.mmdit import PyramidMMDiT, keep_blocks
from nd_jax.models.text_conditioning import Conditioning
from nd_jax.pyramid.units import draw_unit_randomness, stage_units, unit_state
from nd_jax.train.sharding import RULES


def without_blocks(model: PyramidMMDiT, params: dict, removed: Sequence[int]) -> tuple[PyramidMMDiT, dict]:
    """The network and its parameters without the blocks `removed`, none of them the last."""
    kept = [k for k in range(model.config.num_layers) if k not in removed]
    pruned, config = keep_blocks(params, model.config, kept)
    return model.clone(config=config), pruned


@functools.partial(jax.jit, static_argnames=("model", "config", "stage"))
def probe_velocity(
    params: dict,
    latents: jax.Array,
    text: Conditioning,
    negative: Conditioning | None,
    keys: jax.Array,
    draw: jax.Array,
    *,
    model: PyramidMMDiT,
    config: SamplerConfig,
    stage: int,
) -> jax.Array:
    """Equation 1 for every row, float32 [B, M, p * p * C].

    Args:
      params: of the transformer.
      latents: normalised, [B, T, H, W, C], float32.
      text, negative: of the rows; `negative` is None without guidance.
      keys: [B], one for each row, which frame, time, noise and corruption it draws.
      draw: int32 scalar; other numbers draw other states.
      model, config, stage: static.
    """
    units = stage_units(model.config, config.video, stage, text.context.shape[1])

    def states(key: jax.Array):
        unit_key, state_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, stage), draw))
        unit = jax.random.randint(unit_key, (), 0, config.video.units)
        return unit, draw_unit_randomness(state_key, units, (1, *latents.shape[1:]))

    unit, randomness = jax.vmap(states)(keys)
    state = unit_state(config.schedule, units, latents, unit, jax.tree.map(lambda x: x[:, 0], randomness))
    branch = lambda t: (state.tokens, t.context, t.pooled, state.timestep, units.geometry(unit, t.mask))
    inputs = branch(text)
    if negative is not None:  # Both branches in one pass, the negative one first.
        inputs = jax.tree.map(lambda *branches: jnp.concatenate(branches), branch(negative), inputs)
    with nn.logical_axis_rules(RULES):
        velocity = model.apply({"params": params}, *inputs, units.output_tokens).velocity
    if negative is None:
        return velocity
    first, later = (1.0 if g is None else g for g in (config.first_guidance, config.guidance))
    guidance = jnp.where(unit == 0, first, later).astype(jnp.float32)[:, None, None]
    unguided, guided = jnp.split(velocity, 2)
    return unguided + guidance * (guided - unguided)


@jax.jit
def relative_error(got: jax.Array, whole: jax.Array) -> jax.Array:
    """|got - whole|^2 / |whole|^2 of every row, float32 [B]."""
    square = lambda x: jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim)))
    return square(got - whole) / square(whole)


def final_latent_error(
    model: PyramidMMDiT,
    params: dict,
    config: SamplerConfig,
    text: Conditioning,
    noise: RolloutNoise,
    negative: Conditioning | None,
    mesh: Mesh | None,
    latents: jax.Array,
    removed: Sequence[int],
) -> jax.Array:
    """Equation 3 of every row, float32 [B]; arguments as in `rollout`, `latents` the whole network's."""
    pruned_model, pruned = without_blocks(model, params, removed)
    return relative_error(rollout(pruned_model, pruned, config, text, noise, negative, mesh=mesh), latents)
