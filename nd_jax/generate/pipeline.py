"""From prompts to frames with the networks of a model folder, one part after another.

    prompts -> text networks -> conditioning -> transformer -> latents -> decoder -> frames
    image -> video encoder -> posterior -> sampled and normalised first latent frame (mode "hybrid")

Each function loads its own part and frees it when it is done, so that the peak of memory is that of the largest part:
call them one after another. What passes between them is numpy on the host.

Prompts have ids. A prompt's noise comes from the seed and its id, text is encoded prompt by prompt, and batches are
always full, so a prompt's video does not depend on which others are made with it.
"""

import contextlib
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nd_jax.data.tokenizers import Tokenize, load_tokenizer
from nd_jax.errors import UserError
from nd_jax.generate.model_folder import ModelFolder
from nd_jax.generate.sampler import StageEnd, draw_noise, prompt_keys, rollout
from nd_jax.generate.videos import to_uint8
from nd_jax.models.attention import default_attention
from nd_jax.models.mmdit import LOGICAL_AXES, PyramidMMDiT
from nd_jax.models.text_conditioning import Conditioning, encode_text
from nd_jax.models.video_chunks import decode_chunks, stream
from nd_jax.models.video_vae import Posterior, VideoVAEEncoder, denormalize_latents, normalize_latents
from nd_jax.train.sharding import param_shardings
from nd_jax.weights.folder import load_component
from nd_jax.weights.network import Network, abstract_params
from nd_jax.weights.table import flatten, unflatten
from nd_jax.weights.vae import ASYMMETRIC_VIDEO_VAE, VIDEO_VAE_ENCODER


class Timings:
    """Seconds of every part.

    Attributes:
      seconds: {part: {"load" | "compile" | "run": seconds}}.
      calls: {("first" | "later", stage): seconds of a call of the transformer in each rollout's stages}; a call is one
        step of a whole batch, with both branches of guidance.
    """

    def __init__(self):
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.calls: dict[tuple[str, int], list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def of(self, part: str, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[part][what] += time.perf_counter() - begin

    def stage(self, end: StageEnd) -> None:
        """Notes a stage of a rollout."""
        self.seconds["transformer"]["compile"] += end.compile_seconds
        self.seconds["transformer"]["run"] += end.seconds
        self.calls["later" if end.unit else "first", end.stage].append(end.seconds / end.steps)

    def summary(self) -> dict[str, Any]:
        """Plain data: seconds, and the median of a call per stage."""
        calls: dict[str, dict[str, float]] = defaultdict(dict)
        for (units, stage), seconds in sorted(self.calls.items()):
            calls[units][f"stage_{stage}"] = round(float(np.median(seconds)), 4)
        parts = {part: {what: round(s, 3) for what, s in whats.items()} for part, whats in self.seconds.items()}
        return {"seconds": parts, "seconds_per_call": dict(calls)}


def _load(folder: Path, network: Network | None, dtype: Any, keep: tuple[str, ...] = (), shardings: Any = None) -> dict:
    """Parameters on the device or on a mesh. Host arrays go one by one, so that there are never two whole copies."""
    flat = flatten(load_component(folder, network, dtype).params)
    for path in [path for path in flat if keep and not path.startswith(keep)]:
        del flat[path]
    places, placed = flatten(shardings) if shardings else {}, {}
    while flat:
        path, array = flat.popitem()
        placed[path] = jax.block_until_ready(jax.device_put(array, places.get(path)))
        del array
    return unflatten(placed)


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
            _tokenize(model.root / name, sizes.vocab_size, length)
            for name, sizes, length in (
                ("tokenizer_3", t5, model.settings.text_length),
                ("tokenizer", clip, clip.max_position_embeddings),
                ("tokenizer_2", clip_2, clip_2.max_position_embeddings),
            )
        ]
        names = [field.name for field in dataclasses.fields(encoders) if field.name in model.parts]
        params = {name: _load(model.path(name), None, dtype) for name in names}
    encode = jax.jit(lambda params, batch: encode_text(encoders, params, batch, dtype))
    rows = []
    for prompt in prompts:
        t5_tokens, clip_tokens, clip_2_tokens = (tokens(prompt) for tokens in tokenize)
        batch = {**t5_tokens, "clip_ids": clip_tokens["ids"], "clip_2_ids": clip_2_tokens["ids"]}
        batch = {name: ids[None] for name, ids in batch.items()}
        if not rows:
            with timings.of("text", "compile"):
                encode.lower(params, batch).compile()
        with timings.of("text", "run"):
            rows.append(jax.device_get(encode(params, batch)))
        on_prompt()
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)


def _tokenize(folder: Path, vocab_size: int, length: int) -> Tokenize:
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > vocab_size:
        raise UserError(f"{folder}: {len(tokenizer)} tokens do not fit an encoder of {vocab_size}; copy the right one")
    return Tokenize(tokenizer, length)


# --- first frame ------------------------------------------------------------------------------------------------------


def encode_first_frame(
    model: ModelFolder, image: np.ndarray, dtype: Any = jnp.bfloat16, timings: Timings | None = None
) -> Posterior:
    """Posterior of an image as a clip of one frame, numpy.

    Args:
      model: the folder.
      image: float [H, W, 3] in [-1, 1], see `videos.read_image`.
      dtype: of parameters and computation; the posterior is float32.
      timings: gets the part "encoder".
    """
    timings = timings or Timings()
    with timings.of("encoder", "load"):
        params = _load(model.path("vae"), VIDEO_VAE_ENCODER, dtype)
    encoder = VideoVAEEncoder(model.vae, dtype=dtype)
    video = jnp.asarray(image, dtype)[None, None]
    encode = jax.jit(lambda params, video: encoder.apply({"params": params}, video, method="encode"))
    with timings.of("encoder", "compile"):
        encode.lower(params, video).compile()
    with timings.of("encoder", "run"):
        return jax.device_get(encode(params, video))


# --- latents ----------------------------------------------------------------------------------------------------------


def sample_latents(
    model: ModelFolder,
    text: Conditioning,
    ids: Sequence[int],
    seed: int,
    negative: Conditioning | None = None,
    first_frame: Posterior | None = None,
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
      first_frame: of one image for all prompts, needed in mode "hybrid"; every prompt draws its own sample.
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
        params = _load(model.path("transformer"), model.transformer_network, dtype, shardings=shardings)

    def report(end: StageEnd) -> None:
        timings.stage(end)
        on_stage(end)

    for start in range(0, len(ids), batch):
        real = np.arange(start, min(start + batch, len(ids)))
        rows = np.pad(real, (0, batch - len(real)), mode="edge")
        keys = jax.vmap(jax.random.split)(prompt_keys(seed, np.asarray(ids)[rows]))
        frames = None if first_frame is None else _draw_first_frames(model, first_frame, keys[:, 1])
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


def _draw_first_frames(model: ModelFolder, posterior: Posterior, keys: jax.Array) -> jax.Array:
    """A normalised sample of the posterior for every key, [B, 1, h, w, C]."""
    draw = lambda key: Posterior(*(moment[0] for moment in posterior)).sample_with_key(key)
    return normalize_latents(model.vae, jax.vmap(draw)(keys))


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
        params = _load(model.path("vae"), model.vae_network, dtype, keep=("decoder/", "post_quant_conv/"))
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
