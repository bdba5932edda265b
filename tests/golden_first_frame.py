"""Golden cases of the first frame: UNet, image autoencoder and LCM sampler. Their images are (B, C, H, W)."""

import jax
import jax.numpy as jnp
import numpy as np

from nd_jax.generate import lcm
from nd_jax.models.autoencoder_kl import AutoencoderKLConfig
from nd_jax.models.unet import UNetConfig
from nd_jax.weights.networks import AUTOENCODER_KL, UNET
from tests.golden_kinds import Arrays, FunctionKind, Kind, Outputs


def _channels_first(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x, -1, 1) if x.ndim == 4 else x


def _channels_last(x: np.ndarray) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def _unet(config: UNetConfig, params: dict, inputs: Arrays) -> Outputs:
    apply = jax.jit(UNET.module(config).apply, static_argnames="return_states")
    latents, names = _channels_last(inputs["sample"]), ("encoder_hidden_states", "text_embeds", "time_ids")
    timestep = jnp.broadcast_to(inputs["timestep"], latents.shape[:1])
    conditions, guidance = [inputs[name] for name in names], inputs.get("timestep_cond")
    out = apply({"params": params}, latents, timestep, *conditions, guidance, return_states=True)
    states = {name.replace("size_embedding", "add_embedding"): state for name, state in out.states.items()}
    blocks = {name.replace("_", "") if name[-1].isdigit() else name: state for name, state in states.items()}
    return {name: _channels_first(x) for name, x in {**blocks, "eps": out.prediction}.items()}


def _autoencoder(config: AutoencoderKLConfig, params: dict, inputs: Arrays) -> Outputs:
    apply, out = jax.jit(AUTOENCODER_KL.module(config).apply, static_argnames="method"), {}
    if "image" in inputs:
        posterior = apply({"params": params}, _channels_last(inputs["image"]), method="encode")
        out |= {name: _channels_first(value) for name, value in posterior._asdict().items()}
    if "latents" in inputs:
        image = apply({"params": params}, _channels_last(inputs["latents"]), method="decode")
        out["decoded"] = _channels_first(image)
    return out


def _lcm(case: dict, inputs: Arrays) -> Outputs:
    settings = dict(case["config"])
    stated = settings.pop("timesteps", None)
    config = lcm.read_lcm_config(settings)
    steps = sum(name.startswith("model_output.") for name in inputs)
    timesteps = tuple(stated or lcm.lcm_timesteps(config, steps))
    schedule, step = lcm.lcm_schedule(config, timesteps), jax.jit(lcm.lcm_step, static_argnums=0)
    out = {
        "alphas_cumprod": lcm.alphas_cumprod(config),
        "timesteps": np.asarray(timesteps),
        "boundary_c_skip_c_out": np.stack(lcm.boundary_scalings(config, timesteps), axis=-1),
    }
    sample = inputs["initial_latents"]
    for k in range(steps):
        sample, denoised = step(config, schedule, k, sample, inputs[f"model_output.{k}"], inputs.get(f"noise.{k}"))
        out |= {f"prev_sample.{k}": sample, f"denoised.{k}": denoised}
    return out


def _lcm_numbers(case: dict) -> Arrays:
    stated = [name for name in ("timesteps", "boundary_c_skip_c_out") if name in case.get("data", {})]
    return {name: np.asarray(case["data"][name], np.float64) for name in stated}


KINDS = (
    Kind("diffusers.UNet2DConditionModel", UNET, _unet),
    Kind("diffusers.AutoencoderKL", AUTOENCODER_KL, _autoencoder),
    FunctionKind("diffusers.LCMScheduler", _lcm, _lcm_numbers),
)
