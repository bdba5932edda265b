"""The first frame from a prompt: both CLIP text models, SSD-1B's UNet in LCM steps, the image autoencoder's decoder.

    context = [penultimate(CLIP-L), penultimate(CLIP-G)],   pooled = projection(CLIP-G)                            (1)
    x       = z_0;   x <- lcm_step(x, UNet(x, t_k, context, pooled, sizes), z_{k+1}),   k = 0 .. 3                 (2)
    picture = decoder(x / scaling_factor), from [-1, 1] to [0, 1]                                                  (3)

The components are the `ssd_1b_*` subfolders of the released layout. Settings are those of the public pipeline: four
steps at timesteps 999, 749, 499, 249, no guidance, and a picture of twice the video's height and width, 640 x 1024 at
the released size. Agrees with `diffusers.StableDiffusionXLPipeline` and `LCMScheduler` at the same noise.

As in `pipeline`, each function loads its own part and frees it, what passes between them is numpy, and a prompt's
picture depends on the seed and its id alone.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from nd_jax.errors import UserError
from nd_jax.generate import lcm
from nd_jax.generate.parts import Timings, each_row, open_tokenizer, place_params
from nd_jax.generate.sampler import check_rows, prompt_keys
from nd_jax.generate.videos import to_unit
from nd_jax.models.attention import default_attention
from nd_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, denormalize_latents
from nd_jax.models.clip_text import CLIPText, CLIPTextConfig
from nd_jax.models.unet import LOGICAL_AXES, UNet, UNetConfig
from nd_jax.train.sharding import RULES, batch_sharding, param_shardings
from nd_jax.weights import networks
from nd_jax.weights.folder import read_config
from nd_jax.weights.network import abstract_params

UNET_FOLDER = "ssd_1b_unet"
VAE_FOLDER = "ssd_1b_vae"
TEXT_FOLDERS = ("ssd_1b_text_encoder", "ssd_1b_text_encoder_2")
TOKENIZER_FOLDERS = ("ssd_1b_tokenizer", "ssd_1b_tokenizer_2")

STEPS = 4
PICTURE_SCALE = 2  # Height and width of the picture over those of the video.
GUIDANCE_SCALE = 0.0  # Told to networks that take one; nothing is guided.

# Of a prompt's key; the rollout's noise and the posterior's sample are streams 0 and 1.
NOISE_STREAM = 2


class FirstFrameText(NamedTuple):
    """Equation 1 of every prompt: `context` [N, L, E] and `pooled` [N, P]."""

    context: jax.Array
    pooled: jax.Array


@dataclasses.dataclass(frozen=True)
class FirstFrameModel:
    """The first-frame part of a model folder whose configs were read, and no weights.

    Attributes:
      root: the model folder.
      text_encoder, text_encoder_2: CLIP-L and CLIP-G.
      unet: the denoiser.
      vae: the image autoencoder.
    """

    root: Path
    text_encoder: CLIPTextConfig
    text_encoder_2: CLIPTextConfig
    unet: UNetConfig
    vae: AutoencoderKLConfig

    def picture_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the picture for a video.

        Raises:
          UserError: a size that the autoencoder cannot have.
        """
        size, factor = (PICTURE_SCALE * height, PICTURE_SCALE * width), self.vae.space_factor
        if size[0] % factor or size[1] % factor:
            raise UserError(f"a first frame of {size[0]} x {size[1]} pixels: {VAE_FOLDER} makes multiples of {factor}")
        return size


def has_first_frame(folder: Path) -> bool:
    """Whether a model folder makes first frames from prompts."""
    return (folder / UNET_FOLDER).is_dir()


def open_first_frame(folder: Path) -> FirstFrameModel:
    """Reads the configs of the first-frame part of a model folder.

    Raises:
      UserError: an absent or damaged component, or components that do not belong together.
    """
    absent = [name for name in (UNET_FOLDER, VAE_FOLDER, *TEXT_FOLDERS) if not (folder / name).is_dir()]
    if absent:
        raise UserError(f"{folder}: has no {absent[0]}, so it makes no first frame; download it, or give an image")
    network, clip, _ = read_config(folder / TEXT_FOLDERS[0])
    if network not in (networks.CLIP_TEXT, networks.CLIP_TEXT_MODEL):
        raise UserError(f"{folder / TEXT_FOLDERS[0]}: holds a {network.name}, but a CLIP text model belongs there")
    clip_2 = read_config(folder / TEXT_FOLDERS[1], networks.CLIP_TEXT)[1]
    unet = read_config(folder / UNET_FOLDER, networks.UNET)[1]
    vae = read_config(folder / VAE_FOLDER, networks.AUTOENCODER_KL)[1]
    for what, one, other in (
        ("channels of the text context", clip.hidden_size + clip_2.hidden_size, unet.cross_attention_dim),
        ("channels of the pooled text", clip_2.projection_dim, unet.pooled_dim),
        ("latent channels of the image autoencoder", vae.latent_channels, unet.in_channels),
        ("channels of the latents", unet.in_channels, unet.out_channels),
    ):
        if one != other:
            raise UserError(f"{folder}: {one} {what}, but {UNET_FOLDER} has {other}; its parts are of unlike models")
    return FirstFrameModel(folder, clip, clip_2, unet, vae)


# --- text -------------------------------------------------------------------------------------------------------------


def encode_prompts(
    model: FirstFrameModel,
    prompts: Sequence[str],
    dtype: Any = jnp.bfloat16,
    timings: Timings | None = None,
    on_prompt: Callable[[], None] = lambda: None,
) -> FirstFrameText:
    """Equation 1, numpy, one row for every prompt.

    Args:
      model: the folder.
      prompts: any text, the empty one too.
      dtype: of parameters, computation and result.
      timings: gets the part "first_frame_text".
      on_prompt: called after every prompt.

    Raises:
      UserError: damaged weights, or a tokenizer that does not fit them.
    """
    timings = timings or Timings()
    configs = (model.text_encoder, model.text_encoder_2)
    with timings.of("first_frame_text", "load"):
        tokenize = [
            open_tokenizer(model.root / name, config.vocab_size, config.max_position_embeddings)
            for name, config in zip(TOKENIZER_FOLDERS, configs, strict=True)
        ]
        params = [place_params(model.root / name, None, dtype) for name in TEXT_FOLDERS]

    @jax.jit
    def encode(params: list[dict], ids: list[jax.Array]) -> FirstFrameText:
        outs = [
            CLIPText(config, dtype=dtype).apply({"params": tree}, row)
            for config, tree, row in zip(configs, params, ids, strict=True)
        ]
        return FirstFrameText(jnp.concatenate([out.penultimate for out in outs], axis=-1), outs[1].text_embeds)

    ids = ([tokens(prompt)["ids"][None] for tokens in tokenize] for prompt in prompts)
    return each_row(encode, params, ids, timings, "first_frame_text", on_prompt)


# --- latents ----------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=1)
def draw_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """z_0 .. z_4 of equation 2 from each key: float32 [B, STEPS + 1, *shape]. The last one is multiplied by 0."""
    return jax.vmap(lambda key: jax.random.normal(key, (STEPS + 1, *shape), jnp.float32))(keys)


def unet_step(
    params: dict, x: jax.Array, noise: jax.Array, step: jax.Array, text: FirstFrameText, *, unet: UNet, size: tuple
) -> jax.Array:
    """One step of equation 2: [B, h, w, C] -> the same, float32.

    Args:
      params: of the UNet.
      x: latents.
      noise: z of the step.
      step: its number, int32 scalar.
      text: of every row.
      unet, size: the network, and height and width of the picture in pixels; of the program.
    """
    batch, schedule = x.shape[0], lcm.lcm_schedule(lcm.SSD_1B, STEPS)
    time_ids = jnp.asarray([[*size, 0, 0, *size]], jnp.float32)
    channels = unet.config.time_cond_proj_dim
    guidance = None if channels is None else lcm.guidance_embedding(jnp.full((batch,), GUIDANCE_SCALE), channels)
    timestep = jnp.full((batch,), jnp.asarray(schedule.timesteps)[step].astype(jnp.float32))
    with nn.logical_axis_rules(RULES):
        out = unet.apply(
            {"params": params}, x, timestep, text.context, text.pooled, jnp.repeat(time_ids, batch, axis=0), guidance
        )
    return lcm.lcm_step(lcm.SSD_1B, schedule, step, x, out.prediction, noise)[0]


@functools.lru_cache
def step_program(mesh: Mesh | None = None) -> jax.stages.Wrapped:
    """`unet_step` compiled; rows are split over the mesh's data and fsdp axes."""
    shardings = {} if mesh is None else {"out_shardings": batch_sharding(mesh)}
    return jax.jit(unet_step, static_argnames=("unet", "size"), **shardings)


def denoise(
    unet: UNet,
    params: dict,
    text: FirstFrameText,
    noise: jax.Array,
    size: tuple[int, int],
    mesh: Mesh | None = None,
    timings: Timings | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> jax.Array:
    """Equation 2: latents [B, h, w, C], float32, times the scaling factor.

    Args:
      unet: the network.
      params: its parameters, on the mesh if there is one.
      text: of the B prompts.
      noise: [B, STEPS + 1, h, w, C], see `draw_noise`.
      size: height and width of the picture in pixels, which the network is told.
      mesh: splits the rows over its data and fsdp axes.
      timings: gets the part "first_frame_unet" and the seconds of every call.
      on_step: called after every step.

    Raises:
      UserError: rows that do not divide among the devices.
    """
    timings, place = timings or Timings(), lambda tree: jax.tree.map(jnp.asarray, tree)
    if mesh is not None:
        check_rows(noise.shape[0], mesh)
        place = lambda tree: jax.device_put(tree, batch_sharding(mesh))
    x, text, program = place(noise[:, 0]), place(text), step_program(mesh)
    for step in range(STEPS):
        arguments, static = (params, x, place(noise[:, step + 1]), np.int32(step), text), dict(unet=unet, size=size)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            with timings.of("first_frame_unet", "compile"):
                program.lower(*arguments, **static).compile()  # Free after the first time, and found by the call.
            begin = time.perf_counter()
            with timings.of("first_frame_unet", "run"):
                x = jax.block_until_ready(program(*arguments, **static))
            timings.calls["first_frame", "unet"].append(time.perf_counter() - begin)
        on_step()
    return x


def sample_latents(
    model: FirstFrameModel,
    text: FirstFrameText,
    ids: Sequence[int],
    seed: int,
    size: tuple[int, int],
    batch: int = 1,
    dtype: Any = jnp.bfloat16,
    mesh: Mesh | None = None,
    timings: Timings | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Iterator[list[np.ndarray]]:
    """Latents of all prompts' pictures, a batch at a time.

    Args:
      model: the folder.
      text: one row per prompt.
      ids: one per prompt, for its noise.
      seed: of all prompts.
      size: height and width of the picture, `FirstFrameModel.picture_size`.
      batch: prompts at once; the last batch is filled up.
      dtype: of the UNet's parameters and computation.
      mesh: splits the batch, and the weights if it has axes for them.
      timings: gets the part "first_frame_unet".
      on_step: called after every step of every batch.

    Yields:
      Latents of the prompts of a batch, float32 [h, w, C] each, in order.
    """
    timings = timings or Timings()
    unet = UNet(model.unet, dtype=dtype, param_dtype=dtype, attention=default_attention())
    shardings = None
    if mesh is not None:
        shardings = param_shardings(abstract_params(networks.UNET, model.unet), LOGICAL_AXES, mesh)
    with timings.of("first_frame_unet", "load"):
        params = place_params(model.root / UNET_FOLDER, networks.UNET, dtype, shardings=shardings)
    shape = (*(side // model.vae.space_factor for side in size), model.unet.in_channels)
    for start in range(0, len(ids), batch):
        real = np.arange(start, min(start + batch, len(ids)))
        rows = np.pad(real, (0, batch - len(real)), mode="edge")
        keys = jax.vmap(jax.random.fold_in, (0, None))(prompt_keys(seed, np.asarray(ids)[rows]), NOISE_STREAM)
        batch_text = jax.tree.map(lambda x, rows=rows: x[rows], text)
        latents = denoise(unet, params, batch_text, draw_noise(keys, shape), size, mesh, timings, on_step)
        yield list(np.asarray(latents)[: len(real)])


# --- pictures ---------------------------------------------------------------------------------------------------------


def image_decoder(
    model: FirstFrameModel, dtype: Any = jnp.bfloat16, timings: Timings | None = None
) -> Callable[[np.ndarray], np.ndarray]:
    """Loads the decoder of equation 3; the result turns latents [h, w, C] into a picture, float32 [H, W, 3].

    Args:
      model: the folder.
      dtype: of parameters and computation.
      timings: gets the part "first_frame_decoder".
    """
    timings = timings or Timings()
    with timings.of("first_frame_decoder", "load"):
        keep = ("decoder/", "post_quant_conv/")
        params = place_params(model.root / VAE_FOLDER, networks.AUTOENCODER_KL, dtype, keep)
    vae = AutoencoderKL(model.vae, dtype=dtype)
    program = jax.jit(lambda params, z: vae.apply({"params": params}, z, method="decode").astype(jnp.float32))

    @functools.cache
    def compiled(shape: tuple[int, ...]) -> jax.stages.Compiled:
        with timings.of("first_frame_decoder", "compile"):
            return program.lower(params, jax.ShapeDtypeStruct(shape, jnp.float32)).compile()

    def decode(latents: np.ndarray) -> np.ndarray:
        z = denormalize_latents(model.vae, jnp.asarray(latents, jnp.float32)[None])
        decoder = compiled(z.shape)
        with timings.of("first_frame_decoder", "run"):
            return to_unit(np.asarray(decoder(params, z))[0])

    return decode
