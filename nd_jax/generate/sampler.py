"""Rollouts: latent frames one after another, each through the stages of the pyramid.

For unit u (one latent frame) and stage i, coarsest first, with B prompts side by side:

    x_0 = ε_0                                  ε_0: the unit's noise, reduced to the coarsest stage          (1)
    x_i = α_i U(x_{i-1}) + β_i n_i             jump between stages; n_i: block noise of unit and stage       (2)
    x  <- x + (t_{k+1} - t_k) v(x, τ_k, h_i)   Euler steps k = 0 .. n_i - 1 of the stage                     (3)
    v   = v⁻ + g (v⁺ - v⁻)                     guidance g, both branches in one pass, negative first         (4)
    h_i = clips of z_0 .. z_{u-1}, the newest at stage i, the one before at stage i - 1, ...                 (5)
    z_u = x_{S-1}                              where the finest stage ends                                   (6)

Without guidance v = v⁺, in half of the work. Mode "hybrid" is given z_0 and starts at unit 1; "monolithic" makes z_0
too, with steps and guidance of its own. Latents are normalised, and float32 whatever the transformer computes in.
Sources: `pyramid.schedule` for (1) to (3), `pyramid.history` for (5); `generate` of the public Neodragon code.

One compiled program serves all units after the first at one stage (`pyramid.units`: the unit is an array, tokens are
padded to the stage's envelope), and another one the first unit, which has no history. Everything random is an argument.

A rollout can be observed: a function of the residual streams around all blocks is applied to every call of the
transformer, on the device, and what it gives is kept call by call. Without it nothing of that is in the program.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from nd_jax.errors import UserError
from nd_jax.generate.config import SamplerConfig
from nd_jax.models.mmdit import BlockStates, PyramidMMDiT
from nd_jax.models.text_conditioning import Conditioning
from nd_jax.pyramid.layout import patchify
from nd_jax.pyramid.noise import draw_block_noise, latent_pyramid, noise_pyramid, stage_jump
from nd_jax.pyramid.schedule import euler_step
from nd_jax.pyramid.units import stage_units
from nd_jax.train.sharding import RULES, batch_sharding

# --- randomness -------------------------------------------------------------------------------------------------------


@flax.struct.dataclass
class RolloutNoise:
    """Everything random about a rollout, float32. Frame u belongs to unit u; hybrid rollouts do not use frame 0.

    Attributes:
      initial: white, at the finest size, [B, T, H, W, C].
      jumps: block noise (`noise.block_noise`) of stages 1, 2, ..., each [B, T, h_i, w_i, C].
    """

    initial: jax.Array
    jumps: tuple[jax.Array, ...]


def prompt_keys(seed: int, prompt_ids: np.ndarray) -> jax.Array:
    """One key per prompt, [B]: a prompt's video depends on the seed and its id, not on what is sampled beside it."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return fold(jax.random.key(seed), jnp.asarray(prompt_ids, jnp.uint32))


@functools.partial(jax.jit, static_argnums=(1, 2))
def draw_noise(keys: jax.Array, config: SamplerConfig, channels: int) -> RolloutNoise:
    """Noise of every prompt from its own key.

    Args:
      keys: [B], see `prompt_keys`.
      config: gives sizes and γ.
      channels: of the latents.
    """
    video, stages = config.video, config.video.stages
    size = lambda stage: (video.height >> (stages - 1 - stage), video.width >> (stages - 1 - stage))
    shape = lambda stage: (video.latent_frames, *size(stage), channels)

    def one(key: jax.Array) -> RolloutNoise:
        first, *rest = jax.random.split(key, stages)
        jumps = [draw_block_noise(k, (1, *shape(i)), config.schedule.gamma)[0] for i, k in enumerate(rest, 1)]
        return RolloutNoise(jax.random.normal(first, shape(stages - 1), jnp.float32), tuple(jumps))

    return jax.vmap(one)(keys)


# --- one stage of one unit --------------------------------------------------------------------------------------------

# (states of all blocks, image mask [B, N], text mask [B, T]; True for real tokens) -> arrays with rows on axis 0.
Observe = Callable[[BlockStates, jax.Array, jax.Array], Any]


def run_stage(
    params: dict,
    latents: jax.Array,
    sample: jax.Array | None,
    noise: RolloutNoise,
    unit: jax.Array,
    text: Conditioning,
    negative: Conditioning | None,
    *,
    model: PyramidMMDiT,
    config: SamplerConfig,
    stage: int,
    first: bool,
    observe: Observe | None = None,
) -> tuple[jax.Array, jax.Array, Any]:
    """Equations 1 to 6 for one stage: (where it ends [B, 1, h, w, C], latents, with the unit if it is done, observed).

    Args:
      params: of the transformer.
      latents: [B, T, H, W, C], finished up to the unit.
      sample: where the coarser stage ended, [B, 1, h / 2, w / 2, C]; None at stage 0.
      noise: of the rollout.
      unit: int32 scalar.
      text, negative: of every row; `negative` is None without guidance.
      model, config, stage: of the program.
      first: whether this is unit 0; of the program too.
      observe: applied to every call; its arrays come as [B, steps, branches, ...], the negative branch first. Of the
        program too, so give the same function every time. Without it the third result is None.
    """
    video, schedule, finest = config.video, config.schedule, config.video.stages - 1
    steps, guidance = config.unit_settings(first)
    # A video of one frame has only the first unit, so its tables have no room for a history.
    sizes = dataclasses.replace(video, latent_frames=1) if first else video
    units = stage_units(model.config, sizes, stage, text.context.shape[1])
    frame = lambda x: jax.lax.dynamic_slice_in_dim(x, unit, 1, axis=1)

    if stage == 0:
        x = noise_pyramid(frame(noise.initial), video.stages)[0]  # equation 1
    else:
        alpha, beta = schedule.renoise_weights(stage)
        x = stage_jump(sample, frame(noise.jumps[stage - 1]), alpha, beta)  # equation 2
    if guidance is not None:
        text = jax.tree.map(lambda *branches: jnp.concatenate(branches), negative, text)
    rows = text.context.shape[0]
    geometry = units.geometry(jnp.full((rows,), unit), text.mask)
    # All rows are at one unit, so they share what does not depend on the text.
    shared = {name: getattr(geometry, name)[:1] for name in ("positions", "rotary_cos", "rotary_sin")}
    geometry = geometry._replace(**shared)
    history = units.clean_history(latent_pyramid(latents, video.stages), jnp.full((x.shape[0],), unit))  # equation 5

    def step(x: jax.Array, entry: tuple[jax.Array, ...]) -> tuple[jax.Array, Any]:
        timestep, sigma, sigma_next = entry
        tokens = jnp.concatenate([history, patchify(x, units.patch_size)], axis=1)
        tokens = tokens if guidance is None else jnp.concatenate([tokens, tokens])
        out = model.apply(
            {"params": params},
            tokens,
            text.context,
            text.pooled,
            jnp.full((rows,), timestep),
            geometry,
            units.output_tokens,
            return_block_states=observe is not None,
            current_unseen=not first,
        )
        velocity = units.unpack(out.velocity)
        if guidance is not None:  # equation 4
            unguided, guided = jnp.split(velocity, 2)
            velocity = unguided + guidance * (guided - unguided)
        observed = None
        if observe is not None:
            image_mask = jnp.asarray(units.position_index)[jnp.full((rows,), unit)] > 0
            observed = observe(out.states, image_mask, text.mask > 0)
        return euler_step(x, velocity, sigma, sigma_next), observed  # equation 3

    table = schedule.inference_steps(stage, steps[stage])
    entries = (table.timesteps, table.sigmas[:-1], table.sigmas[1:])
    with nn.logical_axis_rules(RULES):
        x, observed = jax.lax.scan(step, x, tuple(jnp.asarray(column, jnp.float32) for column in entries))
    if stage == finest:  # equation 6
        latents = jax.lax.dynamic_update_slice_in_dim(latents, x, unit, axis=1)
    branches = rows // x.shape[0]
    by_row = lambda leaf: jnp.moveaxis(leaf.reshape(len(leaf), branches, -1, *leaf.shape[2:]), 2, 0)
    return x, latents, jax.tree.map(by_row, observed)


@functools.lru_cache
def stage_program(mesh: Mesh | None = None) -> jax.stages.Wrapped:
    """`run_stage` compiled, with donated latents; rows are split over the mesh's data and fsdp axes."""
    # Stated, because shardings that only mean the same would have the next unit compile again.
    shardings = {} if mesh is None else {"out_shardings": batch_sharding(mesh)}
    static = ("model", "config", "stage", "first", "observe")
    return jax.jit(run_stage, static_argnames=static, donate_argnames="latents", **shardings)


# --- the whole rollout ------------------------------------------------------------------------------------------------


class StageEnd(NamedTuple):
    """What a rollout tells after each stage of each unit.

    Attributes:
      unit, stage: which.
      steps: calls of the transformer.
      sample: where the stage ended, [B, 1, h, w, C].
      latents: [B, T, H, W, C]; the rollout's own array until it goes on, so copy what you keep.
      seconds: of the steps; `compile_seconds` come before them, once per program.
      observed: what `observe` gave, [B, steps, branches, ...], or None.
    """

    unit: int
    stage: int
    steps: int
    sample: jax.Array
    latents: jax.Array
    seconds: float
    compile_seconds: float
    observed: Any = None


def rollout_stages(
    model: PyramidMMDiT,
    params: dict,
    config: SamplerConfig,
    text: Conditioning,
    noise: RolloutNoise,
    negative: Conditioning | None = None,
    first_frame: jax.Array | None = None,
    mesh: Mesh | None = None,
    observe: Observe | None = None,
) -> Iterator[StageEnd]:
    """The rollout, stage by stage; arguments as in `rollout`, and `observe` as in `run_stage`."""
    _check(model, config, text, noise, negative, first_frame)
    rows = noise.initial.shape[0]
    if negative is not None:
        negative = jax.tree.map(lambda n, t: jnp.broadcast_to(n, t.shape), negative, text)
    place = lambda tree: jax.tree.map(jnp.asarray, tree)
    if mesh is not None:
        check_rows(rows, mesh)
        place = lambda tree: jax.device_put(tree, batch_sharding(mesh))
    text, noise, negative, first_frame = (place(tree) for tree in (text, noise, negative, first_frame))
    latents = place(jnp.zeros(noise.initial.shape, jnp.float32))
    if config.mode == "hybrid":
        latents = place(latents.at[:, :1].set(first_frame))

    program = stage_program(mesh)
    for unit in config.sampled_units:
        sample, first = None, unit == 0
        steps, guidance = config.unit_settings(first)
        for stage in range(config.video.stages):
            arguments = (params, latents, sample, noise, np.int32(unit), text, None if guidance is None else negative)
            static = dict(model=model, config=config, stage=stage, first=first, observe=observe)
            # Not around the `yield`: the caller's own computations have nothing to do with this mesh.
            with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
                begin = time.perf_counter()
                program.lower(*arguments, **static).compile()  # Free after the first time, and found by the call.
                compiled = time.perf_counter()
                sample, latents, observed = jax.block_until_ready(program(*arguments, **static))
                end = time.perf_counter()
            yield StageEnd(unit, stage, steps[stage], sample, latents, end - compiled, compiled - begin, observed)


def rollout(
    model: PyramidMMDiT,
    params: dict,
    config: SamplerConfig,
    text: Conditioning,
    noise: RolloutNoise,
    negative: Conditioning | None = None,
    first_frame: jax.Array | None = None,
    mesh: Mesh | None = None,
    on_stage: Callable[[StageEnd], None] = lambda end: None,
) -> jax.Array:
    """Samples a batch of videos: normalised latents [B, T, H, W, C], float32.

    Args:
      model: the transformer, with or without a context embedder.
      params: its parameters, on the mesh if there is one.
      config: sizes, steps and guidance.
      text: of the B prompts; the context is what the transformer takes.
      noise: `draw_noise(...)` or given arrays.
      negative: of B negative prompts or of one for all; needed with guidance.
      first_frame: normalised z_0, [B, 1, H, W, C]; needed in mode "hybrid" and refused in the other.
      mesh: splits the B rows over its data and fsdp axes.
      on_stage: called after every stage.

    Raises:
      UserError: arrays that do not fit each other, the transformer or the config.
    """
    for end in rollout_stages(model, params, config, text, noise, negative, first_frame, mesh):
        on_stage(end)
    return end.latents


def _check(
    model: PyramidMMDiT,
    config: SamplerConfig,
    text: Conditioning,
    noise: RolloutNoise,
    negative: Conditioning | None,
    first_frame: jax.Array | None,
) -> None:
    video, sizes = config.video, model.config
    if not config.sampled_units:
        raise UserError(f"a hybrid video of {video.latent_frames} latent frame has nothing to sample: give more frames")
    expected = {"noise": (len(text.context), video.latent_frames, video.height, video.width, sizes.in_channels)}
    found = {"noise": noise.initial.shape}
    for name, conditioning in (("text", text), ("negative", negative)):
        if conditioning is not None:
            rows, tokens = conditioning.context.shape[:2]
            expected[f"{name} context"], found[f"{name} context"] = (
                (rows, text.context.shape[1], sizes.context_dim),
                conditioning.context.shape,
            )
            expected[f"{name} mask"], found[f"{name} mask"] = (rows, tokens), conditioning.mask.shape
            expected[f"{name} pooled"], found[f"{name} pooled"] = (
                (rows, sizes.pooled_projection_dim),
                conditioning.pooled.shape,
            )
    if first_frame is not None:
        expected["first_frame"] = (expected["noise"][0], 1, *expected["noise"][2:])
        found["first_frame"] = first_frame.shape
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise UserError(f"{name} is {list(found[name])} and this rollout needs {list(shape)}")
    if (first_frame is None) == (config.mode == "hybrid"):
        needs = "needs a first_frame" if first_frame is None else "makes its own first_frame: leave it out"
        raise UserError(f"mode {config.mode!r} {needs}")
    if config.needs_negative and (negative is None or len(negative.context) not in (1, len(text.context))):
        raise UserError("guidance needs the negative conditioning of every prompt, or one for all of them")


def check_rows(rows: int, mesh: Mesh) -> None:
    """Raises UserError for a batch that the mesh's data and fsdp axes do not divide."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise UserError(f"a batch of {rows} does not divide among {parts} devices: make it a multiple of {parts}")
