"""The sizes of a model folder's videos, which graphs have unless the user says otherwise."""

from pathlib import Path
from typing import Any

from nd_jax.generate import first_frame
from nd_jax.generate.model_folder import VAE, GenerationSettings, read_settings
from nd_jax.models.autoencoder_kl import AutoencoderKLConfig
from nd_jax.models.clip_text import CLIP_L
from nd_jax.models.video_vae import VideoEncoderConfig, latent_frames, latent_size
from nd_jax.weights.folder import read_config


def folder_sizes(model_dir: Path, settings: GenerationSettings | None = None) -> dict[str, int]:
    """The sizes among `graph.GraphOptions`: of texts, frames and latents.

    From generation.json, or for 49 frames of 320 x 512 and 128 tokens without one; the latents' share of that is the
    folder's own autoencoders', and the tokens of the first frame its text encoder's; the released ones' where it lacks
    them. `settings` take the place of generation.json.

    Raises:
      UserError: a bad value in generation.json, a video that the VAE cannot take, a damaged config of it.
    """
    settings = settings or read_settings(model_dir)
    vae = _config(model_dir / VAE, VideoEncoderConfig())
    image_vae = _config(model_dir / first_frame.VAE_FOLDER, AutoencoderKLConfig())
    clip = _config(model_dir / first_frame.TEXT_FOLDERS[0], CLIP_L)
    height, width = latent_size(vae, settings.height, settings.width)
    return {
        "length": settings.text_length,
        "latent_height": height,
        "latent_width": width,
        "latent_frames": latent_frames(vae, settings.video_frames),
        "height": settings.height,
        "width": settings.width,
        "image_latent_height": first_frame.PICTURE_SCALE * settings.height // image_vae.space_factor,
        "image_latent_width": first_frame.PICTURE_SCALE * settings.width // image_vae.space_factor,
        "context_length": clip.max_position_embeddings,
    }


def _config(folder: Path, otherwise: Any) -> Any:
    return read_config(folder)[1] if folder.is_dir() else otherwise
