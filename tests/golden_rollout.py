"""Golden cases of whole rollouts. Their latents are (B, C, T, H, W); ours are channel-last.

Units, stages and steps are those of the case's config. With guidance the text has the negative rows first.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.generate.config import SamplerConfig
from nd_jax.generate.sampler import RolloutNoise, rollout_stages
from nd_jax.models.mmdit import PyramidMMDiT
from nd_jax.models.text_conditioning import Conditioning
from nd_jax.pyramid.layout import VideoSize
from nd_jax.pyramid.noise import noise_pyramid
from nd_jax.pyramid.schedule import PyramidSchedule
from nd_jax.weights.folder import load_params
from nd_jax.weights.mmdit import PYRAMID_MMDIT
from nd_jax.weights.safetensors_io import SafetensorsFile
from tests.golden_kinds import Arrays, Outputs, WeightsOf, tensors


def _channels_last(x: np.ndarray) -> jax.Array:
    return jnp.moveaxis(x, 1, -1)


def _channels_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, 1)


def _config(data: dict, latent_frames: int, height: int, width: int, hybrid: bool) -> SamplerConfig:
    schedule = PyramidSchedule(**data["scheduler"])
    first_guidance, guidance = data["guidance"] or (None, None)
    return SamplerConfig(
        video=VideoSize(latent_frames, height, width, schedule.stages, data["frames_per_unit"]),
        mode="hybrid" if hybrid else "monolithic",
        first_steps=tuple(data["steps_first"]),
        steps=tuple(data["steps_other"]),
        first_guidance=first_guidance,
        guidance=guidance,
        schedule=schedule,
    )


def _jumps(inputs: Arrays, stage: int, units: int) -> jax.Array:
    """Block noise of every unit; a first unit that is given has none."""
    drawn = [inputs.get(f"block_noise.unit{unit}.stage{stage}") for unit in range(units)]
    like = next(noise for noise in drawn if noise is not None)
    return _channels_last(np.concatenate([np.zeros_like(like) if n is None else n for n in drawn], axis=2))


@dataclasses.dataclass(frozen=True)
class RolloutKind:
    """Cases of the public sampling loop."""

    official: str = "neodragon.utils.generation_utils._generate_one_unit + _prepare_past_condition_latents"

    def run(self, case: dict, file: SafetensorsFile) -> Outputs:
        inputs, model_config = tensors(file, "in."), PYRAMID_MMDIT.read_config(case["config"])
        params = load_params(PYRAMID_MMDIT, model_config, WeightsOf(file), str(file.path))
        initial, first_frame = _channels_last(inputs["initial_noise"]), inputs.get("first_frame_latent")
        config = _config(case["data"], *initial.shape[1:4], hybrid=first_frame is not None)
        jumps = [_jumps(inputs, stage, config.video.units) for stage in range(1, config.video.stages)]

        names = ("encoder_hidden_states", "encoder_attention_mask", "pooled_projections")
        rows, batch = Conditioning(*(inputs[name] for name in names)), len(initial)
        text = jax.tree.map(lambda x: x[-batch:], rows)
        negative = jax.tree.map(lambda x: x[:-batch], rows) if config.needs_negative else None
        first_frame = None if first_frame is None else _channels_last(first_frame)

        out = {"downsampled_noise": _channels_first(noise_pyramid(initial, config.video.stages)[0])}
        noise = RolloutNoise(initial, tuple(jumps))
        for end in rollout_stages(PyramidMMDiT(model_config), params, config, text, noise, negative, first_frame):
            out[f"unit{end.unit}.stage{end.stage}"] = _channels_first(end.sample)
        return out | {"latents": _channels_first(end.latents)}

    def numbers(self, case: dict) -> Arrays:
        return {}


KINDS = (RolloutKind(),)
