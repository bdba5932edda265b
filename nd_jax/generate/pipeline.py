"""From prompts to frames with the networks of a model folder, one part after another.

    prompts -> text networks -> conditioning -> transformer -> latents -> decoder -> frames
    images -> video encoder -> posteriors -> sampled and normalised first latent frames (mode "hybrid")

Images come from files or from `first_frame`, and `super_resolution` may follow.

Each function loads its own part and frees it when it is done, so that the peak of memory is that of the largest part:
call them one after another. What passes between them is numpy on the host.

Prompts have ids. A prompt's noise comes from the seed and its id, text is encoded prompt by prompt, and batches are
always full, so a prompt's video does not depend on which others are made with it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nd_jax.generate.model_folder import ModelFolder
from nd_jax.generate.parts import Timings, each_row, open_tokenizer, place_params
from nd_jax.generate.sampler import StageEnd, draw_noise, prompt_keys, rollout
from nd_jax.generate.videos import to_uint8
from nd_jax.models.attention import default_attention
from nd_jax.models.mmdit import LOGICAL_AXES, PyramidMMDiT
from nd_jax.models.text_conditioning import Conditioning, encode_text
from nd_jax.models.video_chunks import decode_chunks, stream
from nd_jax.models.video_vae import Posterior, VideoVAEEncoder, denormalize_latents, normalize_latents
from nd_jax.train.sharding import param_shardings
from nd_jax.weights.network import abstract_params
from nd_jax.weights.vae import ASYMMETRIC_VIDEO_VAE, VIDEO_VAE_ENCODER

# --- text -------------------------------------------------------------------------------------------------------------


def encode_prompts(
    model: ModelFolder,
    prompts: Sequence[str],
    dtype: Any = jnp.bfloat16,
    timings: Timings | None = None,
    on_prompt: Callable[[], None] = lambda: None,
) -> Conditioning:
    """Conditioning of every prompt, numpy, one row each.

    Args:
      model: the folder.
      prompts: any text, the empty one too.
      dtype: of parameters, computation and result.
      timings: gets the part "text".
      on_prompt: called after every prompt.

    Raises:
      UserError: damaged weights, or a tokenizer that does not fit them.
    """
    timings = timings or Timings()
    encoders = model.text
    t5 = getattr(encoders.text_encoder_3, "encoder", encoders.text_encoder_3)
    clip, clip_2 = encoders.text_encoder, encoders.text_encoder_2
    with timings.of("text", "load"):
        tokenize = [
            open_tokenizer(model.root / name, sizes.vocab_size, length)
            for name, sizes, length in (
                ("tokenizer_3", t5, model.settings.text_length),
                ("tokenizer", clip, clip.max_position_embeddings),
                ("tokenizer_2", clip_2, clip_2.max_position_embeddings),
            )
        ]
        names = [field.name for field in dataclasses.fields(encoders) if field.name in model.parts]
        params = {name: place_params(model.path(name), None, dtype) for name in names}
    encode = jax.jit(lambda params, batch: encode_text(encoders, params, batch, dtype))

    def batch(prompt: str) -> dict[str, np.ndarray]:
        t5_tokens, clip_tokens, clip_2_tokens = (tokens(prompt) for tokens in tokenize)
        columns = {**t5_tokens, "clip_ids": clip_tokens["ids"], "clip_2_ids": clip_2_tokens["ids"]}
        return {name: ids[None] for name, ids in columns.items()}

    return each_row(encode, params, map(batch, prompts), timings, "text", on_prompt)


# --- first frame ------------------------------------------------------------------------------------------------------


def encode_first_frames(
    model: ModelFolder,
    images: Iterable[np.ndarray],
    dtype: Any = jnp.bfloat16,
    timings: Timings | None = None,
    on_image: Callable[[], None] = lambda: None,
) -> Posterior:
    """Posterior of every image as a clip of one frame, numpy, one row each.

    Args:
      model: the folder.
      images: float [H, W, 3] in [-1, 1] each, see `videos.read_image`; taken one at a time.
      dtype: of parameters and computation; the posterior is float32.
      timings: gets the part "encoder".
      on_image: called after every image.
    """
    timings = timings or Timings()
    with timings.of("encoder", "load"):
        params = place_params(model.path("vae"), VIDEO_VAE_ENCODER, dtype)
    encoder = VideoVAEEncoder(model.vae, dtype=dtype)
    encode = jax.jit(lambda params, video: encoder.apply({"params": params}, video, method="encode"))
    videos = (jnp.asarray(image, dtype)[None, None] for image in images)
    return each_row(encode, params, videos, timings, "encoder", on_image)


# --- latents ----------------------------------------------------------------------------------------------------------


def sample_latents(
    model: ModelFolder,
    text: Conditioning,
    ids: Sequence[int],
    seed: int,
    negative: Conditioning | None = None,
    first_frames: Posterior | None = None,
    batch: int = 1,
    dtype: Any = jnp.bfloat16,
    mesh: Mesh | None = None,
    timings: Timings | None = None,
    on_stage: Callable[[StageEnd], None] = lambda end: None,
) -> Iterator[list[np.ndarray]]:
    """Rollouts of all prompts, a batch at a time.

    Args:
      model: the folder; its settings say how to sample.
      text: one row per prompt.
      ids: one per prompt, for its noise.
      seed: of all prompts.
      negative: one row, needed with guidance.
      first_frames: one row per prompt, or one for all of them, needed in mode "hybrid"; every prompt draws its own
        sample.
      batch: prompts at once; the last batch is filled up.
      dtype: of the transformer's parameters and computation.
      mesh: splits the batch, and the weights if it has axes for them.
      timings: gets the part "transformer".
      on_stage: called after every stage of every batch.

    Yields:
      Normalised latents of the prompts of a batch, float32 [T, h, w, C] each, in order.
    """
    timings = timings or Timings()
    config, channels = model.sampler(), model.transformer.in_channels
    transformer = PyramidMMDiT(model.transformer, dtype=dtype, param_dtype=dtype, attention=default_attention())
    shardings = None
    if mesh is not None:
        shardings = param_shardings(abstract_params(model.transformer_network, model.transformer), LOGICAL_AXES, mesh)
    with timings.of("transformer", "load"):
        params = place_params(model.path("transformer"), model.transformer_network, dtype, shardings=shardings)

    def report(end: StageEnd) -> None:
        timings.stage(end)
        on_stage(end)

    for start in range(0, len(ids), batch):
        real = np.arange(start, min(start + batch, len(ids)))
        rows = np.pad(real, (0, batch - len(real)), mode="edge")
        keys = jax.vmap(jax.random.split)(prompt_keys(seed, np.asarray(ids)[rows]))
        frames = None if first_frames is None else _draw_first_frames(model, first_frames, rows, keys[:, 1])
        latents = rollout(
            transformer,
            params,
            config,
            jax.tree.map(lambda x, rows=rows: x[rows], text),
            draw_noise(keys[:, 0], config, channels),
            negative if config.needs_negative else None,
            frames,
            mesh,
            report,
        )
        yield list(np.asarray(latents)[: len(real)])


def _draw_first_frames(model: ModelFolder, posterior: Posterior, rows: np.ndarray, keys: jax.Array) -> jax.Array:
    """A normalised sample for every key, of the posterior's row or of its only one: [B, 1, h, w, C]."""
    rows = rows if len(posterior.mean) > 1 else np.zeros_like(rows)
    draw = lambda key, *moments: Posterior(*moments).sample_with_key(key)
    return normalize_latents(model.vae, jax.vmap(draw)(keys, *(jnp.asarray(moment)[rows] for moment in posterior)))


# --- frames -----------------------------------------------------------------------------------------------------------


def video_decoder(
    model: ModelFolder, dtype: Any = jnp.bfloat16, timings: Timings | None = None
) -> Callable[[np.ndarray], Iterator[np.ndarray]]:
    """Loads the decoder; the result turns normalised latents [T, h, w, C] into uint8 frames [H, W, 3], one by one.

    Args:
      model: the folder.
      dtype: of parameters and computation.
      timings: gets the part "decoder"; compilation of its first frames is part of "run".
    """
    timings = timings or Timings()
    with timings.of("decoder", "load"):
        params = place_params(model.path("vae"), model.vae_network, dtype, keep=("decoder/", "post_quant_conv/"))
    vae = model.vae_network.module(model.vae, dtype=dtype)
    chunks = stream if model.vae_network is ASYMMETRIC_VIDEO_VAE else decode_chunks

    def decode(latents: np.ndarray) -> Iterator[np.ndarray]:
        z = denormalize_latents(model.vae, jnp.asarray(latents, jnp.float32)[None])
        videos = chunks(vae, params, z.astype(dtype))
        while True:
            with timings.of("decoder", "run"):
                video = next(videos, None)
                if video is None:
                    return
                frames = to_uint8(np.asarray(video[0].astype(jnp.float32)))
            yield from frames

    return decode
