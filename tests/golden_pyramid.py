"""Golden cases of `nd_jax.pyramid`. Their arrays are (B, C, T, H, W); ours are channel-last.

A case may hold any number of settings, runs, units and stages: what exists is read from its config and its inputs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.pyramid import history, noise, training
from nd_jax.pyramid.schedule import PyramidSchedule, euler_step
from tests.golden_kinds import Arrays, FunctionKind, Outputs


def channels_last(x: np.ndarray) -> jax.Array:
    return jnp.moveaxis(x, 1, -1)


def channels_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, 1)


def _scheduler(case: dict, inputs: Arrays) -> Outputs:
    schedules = [PyramidSchedule(**config) for config in case["config"]["configs"]]
    out = {}
    for c, (schedule, data) in enumerate(zip(schedules, case["data"]["configs"], strict=True)):
        for stage in range(schedule.stages):
            out[f"config{c}.stage{stage}.timesteps"] = schedule.timesteps[stage]
            out[f"config{c}.stage{stage}.sigmas"] = schedule.sigmas
        numbers = _schedule_numbers(schedule, [int(count) for count in data["get_stage_timesteps"]])
        out |= {f"config{c}.{name}": value for name, value in numbers.items()}
    step = case["data"]["step"]
    steps = schedules[0].inference_steps(step["stage"], step["num_inference_steps"])
    sigma, sigma_next = steps.sigmas[step["step_index"] : step["step_index"] + 2].tolist()
    # Element by element, so the layout does not matter.
    out["step.prev_sample"] = euler_step(
        jnp.asarray(inputs["step.sample"]), jnp.asarray(inputs["step.model_output"]), sigma, sigma_next
    )
    return out


def _schedule_numbers(schedule: PyramidSchedule, step_counts: list[int]) -> dict[str, np.ndarray]:
    """The numbers of a schedule under the names of the JSON."""
    stages, tables = range(schedule.stages), schedule.timesteps.astype(np.float64)
    steps = {n: [schedule.inference_steps(stage, n) for stage in stages] for n in step_counts}
    lists = {
        "stage_range": schedule.stage_range,
        "start_sigmas": schedule.start_sigmas,
        "end_sigmas": schedule.end_sigmas,
        "orig_start_sigmas": schedule.orig_start_sigmas,
        "timestep_ratios": schedule.timestep_ratios,
        "timesteps_per_stage_first_second_last": tables[:, [0, 1, -1]],
        "sigmas_per_stage_first_second_last": [schedule.sigmas[[0, 1, -1]]] * schedule.stages,
        "upsample_alpha_beta_per_stage": [schedule.renoise_weights(stage) for stage in stages[1:]],
        "timestep_per_stage_range": tables[:, 0] - tables[:, -1],
        **{f"get_stage_timesteps.{n}": [stage.timesteps for stage in steps[n]] for n in step_counts},
        **{f"get_stage_sigmas.{n}": [stage.sigmas for stage in steps[n]] for n in step_counts},
    }
    return {name: np.asarray(value, np.float64) for name, value in lists.items()}


def _expected_schedule_numbers(case: dict) -> Arrays:
    expected = {}
    for c, data in enumerate(case["data"]["configs"]):
        for name, value in data.items():
            if isinstance(value, dict):
                expected |= {f"config{c}.{name}.{n}": np.asarray(table) for n, table in value.items()}
            elif isinstance(value, list):  # A setting is a plain number, and no output.
                rows = value[1:] if name == "upsample_alpha_beta_per_stage" else value
                expected[f"config{c}.{name}"] = np.asarray(rows, np.float64)
    return expected


def _stage_transition(case: dict, inputs: Arrays) -> Outputs:
    schedule = PyramidSchedule(**case["config"])
    weights = [schedule.renoise_weights(stage) for stage in range(1, schedule.stages)]
    # The factor of the covariance is what block noise does to each unit vector of a block.
    units = noise.block_noise(jnp.eye(4).reshape(4, 1, 2, 2, 1), schedule.gamma).reshape(4, 4)
    out = {"block_noise_covariance": units.T @ units, "alpha_beta": np.asarray(weights)}
    for stage, (alpha, beta) in enumerate(weights, 1):
        if f"stage{stage}.latents" in inputs:
            latents, drawn = (channels_last(inputs[f"stage{stage}.{name}"]) for name in ("latents", "block_noise"))
            out[f"stage{stage}.renoised"] = channels_first(noise.stage_jump(latents, drawn, alpha, beta))
    for name in (name for name in inputs if name.endswith("latents") and not name.startswith("stage")):
        prefix = "pyramid" if name == "pyramid.latents" else f"{name.removesuffix('.latents')}.pyramid"
        levels = noise.latent_pyramid(channels_last(inputs[name]), schedule.stages)
        out |= {f"{prefix}.{stage}": channels_first(level) for stage, level in enumerate(levels)}
    levels = noise.noise_pyramid(channels_last(inputs["noise"]), schedule.stages)
    out |= {f"downsample_noise.{k}": channels_first(level) for k, level in enumerate(reversed(levels))}
    return out


def _expected_weights(case: dict) -> Arrays:
    return {"alpha_beta": np.asarray(case["data"]["alpha_beta"][1:])}


def _past_conditions(case: dict, inputs: Arrays) -> Outputs:
    stages, out = case["config"]["num_stages"], {}
    for prefix in sorted({name.partition(".")[0] for name in inputs}):
        parts = sorted(name for name in inputs if name.startswith(f"{prefix}.generated"))
        latents = channels_last(np.concatenate([inputs[name] for name in parts], axis=2))
        out |= _clips_of_every_unit(prefix, int(prefix.removeprefix("fpu")), stages, latents)
    return out


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _clips_of_every_unit(prefix: str, frames_per_unit: int, stages: int, latents: jax.Array) -> Outputs:
    """Here every unit has `frames_per_unit` frames, the first one too."""
    pyramid, out = noise.latent_pyramid(latents, stages), {}
    for unit in range(1, latents.shape[1] // frames_per_unit + 1):
        for stage in range(stages):
            plan = history.history_plan(unit * frames_per_unit, stage, frames_per_unit)
            for k, clip in enumerate(history.history_clips(pyramid, plan)):
                out[f"{prefix}.unit{unit}.stage{stage}.clip{k}"] = channels_first(clip)
    return out


def _training_state(case: dict, inputs: Arrays) -> Outputs:
    config, out = case["config"], {}
    schedule = PyramidSchedule(**config["scheduler"])
    for name, run in case["data"]["runs"].items():
        latents, drawn = (channels_last(inputs[f"{name}.{key}"]) for key in ("latents", "noise"))
        stages, timesteps = training.columns_to_stage(run["sample_ratios"]), []
        for k, stage in enumerate(stages):
            if run["temporal_pyramid"]:
                units = run["num_units_low_mid_high"][stage]
                task = training.autoregressive_task(stage, units - 1, config["frame_per_unit"])
            else:
                task = training.full_sequence_task(stage, latents.shape[1])
            column = f"{name}.col{k}"
            randomness = training.Randomness(
                noise=drawn[k :: len(stages), task.start : task.stop],
                u=jnp.asarray(inputs[f"{column}.u"]),
                corruption=jnp.asarray(inputs.get(f"{column}.cond_u", np.zeros_like(inputs[f"{column}.u"]))),
                history=tuple(channels_last(inputs[f"{column}.clip_noise{clip}"]) for clip in range(len(task.history))),
            )
            state = _jitted_state(schedule, task, latents[k :: len(stages)], randomness, config["corrupt_ratio"])
            for clip, value in enumerate((*state.history, state.noisy)):
                out[f"{column}.clip{clip}"] = channels_first(value)
            out[f"{column}.ratio"], out[f"{column}.timestep"] = state.sigma, state.timestep
            out[f"{column}.target"] = channels_first(state.target)
            timesteps.append(state.timestep)
        out[f"{name}.timesteps_interleaved"] = training.interleave(timesteps)
    return out | {name: _stage_lengths(name, len(lengths)) for name, lengths in _expected_lengths(case).items()}


_jitted_state = jax.jit(training.training_state, static_argnums=(0, 1, 4))


def _stage_lengths(name: str, calls: int) -> np.ndarray:
    """Lengths [calls, 3] of the length sampler's first calls; the name holds its settings."""
    settings = {key: int(value) for key, _, value in (part.partition("=") for part in name.split(","))}
    longest = training.most_units(settings["max_temporal_length"], settings["frames_per_unit"])
    sampler = functools.partial(
        training.units_per_stage,
        stages=3,
        max_units=longest,
        available_units=settings["max_units"],
        sync_group=settings["video_sync_group"],
        rank=settings["rank"],
    )
    return np.asarray([sampler(counter) for counter in range(1, calls + 1)])


def _expected_lengths(case: dict) -> Arrays:
    return {name: np.asarray(rows) for name, rows in case["data"]["sampled_stage_lengths_low_mid_high"].items()}


KINDS = (
    FunctionKind(
        "neodragon.pyramid_scheduler.PyramidFlowMatchEulerDiscreteScheduler", _scheduler, _expected_schedule_numbers
    ),
    FunctionKind(
        "neodragon.utils.generation_utils._upsample_pyramidal_latent / _sample_block_noise / _downsample_noise_2x / "
        "_get_pyramid_latent",
        _stage_transition,
        _expected_weights,
    ),
    FunctionKind("neodragon.utils.generation_utils._prepare_past_condition_latents", _past_conditions),
    FunctionKind(
        "pyramid_dit.PyramidDiTForVideoGeneration.add_pyramid_noise / add_pyramid_noise_with_temporal_pyramid",
        _training_state,
        _expected_lengths,
    ),
)
