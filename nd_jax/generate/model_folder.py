"""What of a model folder makes videos: its components, checked against each other, and its `generation.json`.

Components are those of the released layout; which transformer is read depends on the mode:

    hybrid      diffusion_transformer_320p                 with context_adapter
    monolithic  diffusion_transformer_320p_multistep_t2v   with context_adapter_multistep_t2v, if the folder has them

or the folder's only `diffusion_transformer*`. A transformer with its own context embedder goes with T5 and no adapter.

`generation.json`, which a folder need not have, holds the defaults for its videos; all keys are optional:

    height, width      of the video, pixels                                                       320, 512
    video_frames       8k + 1                                                                     49
    frame_rate         per second                                                                 24
    mode               "hybrid" (from a given first frame, or from one of the
                       ssd_1b_* components, see `first_frame`) or "monolithic"  hybrid; with T5: monolithic
    steps              Euler steps per stage, coarsest first                    1, 1, 1; monolithic: 10, 10, 10
    first_steps        the same for the first latent frame (monolithic)         20, 20, 20
    guidance           of the first latent frame and of the others, 1 for none  1, 1; monolithic: 7, 5
    prompt_modifier    put behind every prompt, for the first frame too         ""
    negative_prompt    what guidance leads away from                            ""
    text_length        tokens of T5                                             128
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nd_jax.errors import UserError
from nd_jax.generate.config import MODES, SamplerConfig, hybrid, monolithic
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.text_conditioning import TextEncoders
from nd_jax.models.video_vae import VideoEncoderConfig, latent_frames, latent_size
from nd_jax.pyramid.layout import VideoSize
from nd_jax.weights import networks
from nd_jax.weights.folder import read_config
from nd_jax.weights.mmdit import PYRAMID_FLOW_MMDIT, PYRAMID_MMDIT
from nd_jax.weights.network import Network
from nd_jax.weights.sources import read_json
from nd_jax.weights.vae import ASYMMETRIC_VIDEO_VAE, CAUSAL_VIDEO_VAE

GENERATION = "generation.json"
TRANSFORMER, MULTISTEP = "diffusion_transformer_320p", "_multistep_t2v"
VAE = "causal_video_vae"


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """The entries of `generation.json`; None where the mode decides.

    Raises:
      UserError: a value is not what it should be.
    """

    height: int = 320
    width: int = 512
    video_frames: int = 49
    frame_rate: float = 24
    mode: str | None = None
    steps: tuple[int, ...] | None = None
    first_steps: tuple[int, ...] | None = None
    guidance: tuple[float, float] | None = None
    prompt_modifier: str = ""
    negative_prompt: str = ""
    text_length: int = 128

    def __post_init__(self):
        for name in ("height", "width", "video_frames", "text_length"):
            if not _is_count(getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)!r}: give a positive whole number")
        for name in ("steps", "first_steps"):
            counts = getattr(self, name)
            if counts is not None and (not isinstance(counts, tuple) or not counts or not all(map(_is_count, counts))):
                raise UserError(f"{name} is {counts!r}: give a list of positive whole numbers, one a stage")
        if not _is_number(self.frame_rate) or self.frame_rate <= 0:
            raise UserError(f"frame_rate is {self.frame_rate!r}: give frames per second, such as 24")
        pair = self.guidance
        if pair is not None and (not isinstance(pair, tuple) or len(pair) != 2 or not all(map(_is_number, pair))):
            raise UserError(f"guidance is {pair!r}: give two numbers, for the first latent frame and for the others")
        if self.mode is not None and self.mode not in MODES:
            raise UserError(f"mode is {self.mode!r}: give one of {', '.join(MODES)}")
        for name in ("prompt_modifier", "negative_prompt"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"{name} is {getattr(self, name)!r}: give a text")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def read_settings(folder: Path) -> GenerationSettings:
    """The settings of a model folder.

    Raises:
      UserError: an unknown key or a bad value, with the file.
    """
    path = folder / GENERATION
    if not path.exists():
        return GenerationSettings()
    values, known = read_json(path), [f.name for f in dataclasses.fields(GenerationSettings)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise UserError(f"{path}: {unknown[0]!r} is unknown; the keys are {', '.join(known)}")
    try:
        return GenerationSettings(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A model folder whose configs were read, and no weights.

    Attributes:
      root: the folder.
      parts: component -> subfolder: the names of `TextEncoders`, "transformer" and "vae".
      text: sizes of the text networks.
      transformer: of the video transformer.
      transformer_network: which of the two classes it is.
      vae: of the video VAE.
      vae_network: which of the two classes it is.
      settings: of generation.json, what the caller changed, and the mode.
    """

    root: Path
    parts: Mapping[str, str]
    text: TextEncoders
    transformer: MMDiTConfig
    transformer_network: Network
    vae: VideoEncoderConfig
    vae_network: Network
    settings: GenerationSettings

    def path(self, part: str) -> Path:
        return self.root / self.parts[part]

    @property
    def mode(self) -> str:
        return self.settings.mode

    def sampler(self) -> SamplerConfig:
        """How to sample with these settings.

        Raises:
          UserError: sizes that the VAE or the pyramid cannot have.
        """
        s = self.settings
        factor = self.vae.space_factor
        if s.height % factor or s.width % factor:
            raise UserError(f"a video of {s.height} x {s.width} pixels: give multiples of {4 * factor}")
        video = VideoSize(latent_frames(self.vae, s.video_frames), *latent_size(self.vae, s.height, s.width))
        # At 1 the negative branch has no weight, and need not be computed.
        scales = [None if scale == 1 else scale for scale in s.guidance or ()]
        if s.mode == "hybrid":
            return hybrid(video, s.steps, scales[1] if scales else None)
        return monolithic(video, s.first_steps, s.steps, *scales)


def open_model(folder: Path, transformer: str | None = None, **changes: Any) -> ModelFolder:
    """Reads the configs of a model folder.

    Args:
      folder: the folder.
      transformer: subfolder of the transformer, where the folder holds several that the mode does not tell apart; or
        the absolute path of one that takes its place, such as a pruned one.
      **changes: entries of `GenerationSettings` to put in the place of the folder's; None changes nothing.

    Raises:
      UserError: an absent or damaged component, or components that do not belong together.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a model folder in the released layout")
    settings = dataclasses.replace(read_settings(folder), **{k: v for k, v in changes.items() if v is not None})
    text_3, text_3_config, _ = read_config(folder / "text_encoder_3")
    if text_3 not in (networks.T5_ENCODER, networks.DISTIL_T5):
        raise UserError(f"{folder / 'text_encoder_3'}: holds a {text_3.name}, but a T5 or DistilT5 belongs there")
    distilled = text_3 is networks.DISTIL_T5
    settings = dataclasses.replace(settings, mode=settings.mode or ("hybrid" if distilled else "monolithic"))

    parts = {"transformer": transformer or find_transformer(folder, settings.mode), "vae": VAE}
    clips = [read_config(folder / name, networks.CLIP_TEXT)[1] for name in ("text_encoder", "text_encoder_2")]
    adapter = None
    if distilled:
        # The multistep transformer has an adapter of its own.
        suffix = MULTISTEP if parts["transformer"].endswith(MULTISTEP) else ""
        parts["context_adapter"] = f"context_adapter{suffix}"
        adapter = read_config(folder / parts["context_adapter"], networks.CONTEXT_ADAPTER)[1]
    parts |= {name: name for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
    try:
        text = TextEncoders(*clips, text_3_config, adapter)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    network, mmdit, _ = read_config(folder / parts["transformer"])
    vae_network, vae, _ = read_config(folder / VAE)
    if network not in (PYRAMID_MMDIT, PYRAMID_FLOW_MMDIT):
        raise UserError(f"{folder / parts['transformer']}: holds a {network.name}, not a video transformer")
    if vae_network not in (CAUSAL_VIDEO_VAE, ASYMMETRIC_VIDEO_VAE):
        raise UserError(f"{folder / VAE}: holds a {vae_network.name}, not a video VAE")
    for what, one, other in (
        ("channels of the text context", text.context_dim, mmdit.context_dim),
        ("channels of the pooled text", text.pooled_dim, mmdit.pooled_projection_dim),
        ("latent channels of the video VAE", vae.encoder_out_channels, mmdit.in_channels),
    ):
        if one != other:
            raise UserError(
                f"{folder}: {one} {what}, but {parts['transformer']} takes {other}; its parts are of unlike models"
            )
    return ModelFolder(folder, parts, text, mmdit, network, vae, vae_network, settings)


def find_transformer(folder: Path, mode: str) -> str:
    """The subfolder of the transformer for a mode.

    Raises:
      UserError: there is none, or several of which none is the mode's.
    """
    preferred = [TRANSFORMER + MULTISTEP] if mode == "monolithic" else []
    for name in (*preferred, TRANSFORMER):
        if (folder / name).is_dir():
            return name
    found = sorted(path.name for path in folder.glob("diffusion_transformer*") if path.is_dir())
    if len(found) != 1:
        has = f"has several transformers ({', '.join(found)})" if found else "has no diffusion_transformer*"
        raise UserError(f"{folder}: {has}; name one of its subfolders as the transformer")
    return found[0]
