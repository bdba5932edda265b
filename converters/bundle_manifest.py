"""`model.json` of a bundle: what it says, and how it is read again.

Everything that `converters.bundle_host` computes with, and a program on a phone: files, graphs and their inputs, the
order of the calls, numbers of the samplers, constants. Paths are relative to the bundle and stay inside it.
"""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from converters.chain import parts_of
from nd_jax.errors import UserError
from nd_jax.generate import first_frame as first_frame_module
from nd_jax.generate import lcm
from nd_jax.generate.config import SamplerConfig
from nd_jax.generate.first_frame import FirstFrameModel
from nd_jax.generate.model_folder import ModelFolder
from nd_jax.generate.stage_inputs import DEVICE_MASKED_LOGIT
from nd_jax.models.clip_text import CLIPTextConfig
from nd_jax.models.mmdit import SINUSOID_CHANNELS
from nd_jax.pyramid.units import stage_units
from nd_jax.weights.sources import read_json

MANIFEST, HOST, VERSION = "model.json", "host.safetensors", 1
# What `manifest` gives, beside the version; and what names files.
KEYS = (
    *("mode", "calls", "text_graph", "prompt_modifier", "negative_prompt", "video", "latents", "sampler"),
    *("masked_logit", "time_channels", "first_frame", "dropped_frames", "safety_checker"),
)
FILES = ("graphs", "tokenizers", "host")
# What encodes a prompt for the transformer: of Neodragon, and of a teacher.
TEXT_GRAPHS = ("text_encoder", "t5_encoder")

# What the host computes and which graph it calls, in order. Equations: converters/bundle_host.py.
CALLS = (
    ("first_frame_clip_l", "once", "token ids of the prompt -> `penultimate`, the first channels of `context`"),
    ("first_frame_clip_g", "once", "token ids -> `penultimate`, the other channels, and `pooled` for the UNet"),
    ("unet", "once per entry of first_frame.steps", "equation 6; `conditioning` by the weights unet/* of the host"),
    ("image_decoder", "once", "latents / scaling_factor -> picture, x / 2 + 1/2 clipped to 0..1, rounded to 8 bits"),
    ("vae_encoder", "once", "the picture, or a given one, resized by Lanczos, x / 127.5 - 1 -> equation 7"),
    ("text_encoder", "once per prompt, the negative one too", "token ids and mask -> `context`"),
    ("t5_encoder", "once per prompt, the negative one too", "token ids and mask -> `context`"),
    ("clip_l", "once per prompt, the negative one too", "token ids -> `pooled`, the first channels"),
    ("clip_g", "once per prompt, the negative one too", "token ids -> `pooled`, the other channels"),
    ("mmdit_stage0", "per unit, per entry of its steps, per branch of guidance", "equations 1 to 5"),
    ("mmdit_stage1", "as mmdit_stage0, behind the jump (2)", "equations 1 to 5"),
    ("mmdit_stage2", "as mmdit_stage0, behind the jump (2); its end is the unit's latent frame", "equations 1 to 5"),
    (
        "decoder_stream",
        "per latent frame",
        "equation 8; states start at 0, see `carried`; of the first call "
        "`dropped_frames` frames are dropped; x * 127.5 + 127.5 clipped to 0..255 and truncated is a frame",
    ),
    ("quicksrnet", "per frame", "frame / 255 -> 255 x, rounded"),
)


def text_graph(model: ModelFolder) -> str:
    """Which of `TEXT_GRAPHS` a model folder has."""
    return TEXT_GRAPHS[0] if model.text.context_adapter else TEXT_GRAPHS[1]


def graph_names(model: ModelFolder, first: FirstFrameModel | None, enlarges: bool) -> list[str]:
    """The graphs of a model folder in its mode, in the order of the calls."""
    names = {text_graph(model), "clip_l", "clip_g", "decoder_stream"}
    names |= {f"mmdit_stage{stage}" for stage in range(model.sampler().video.stages)}
    names |= {"vae_encoder"} if model.mode == "hybrid" else set()
    names |= {"first_frame_clip_l", "first_frame_clip_g", "unet", "image_decoder"} if first else set()
    names |= {"quicksrnet"} if enlarges else set()
    return [name for name, *_ in CALLS if name in names]


def manifest(
    model: ModelFolder, first: FirstFrameModel | None, reports: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The content of `model.json`, but for the list of host arrays.

    Args:
      model: the folder.
      first: its first-frame part, or None.
      reports: of `export_onnx.export_loaded`, by graph, in the order of the calls; of a quantised graph with that of
        `quantize.quantize_graph` under "quantised".
    """
    settings, config, vae = model.settings, model.sampler(), model.vae
    video = config.video
    return {
        "version": VERSION,
        "mode": model.mode,
        "graphs": {name: graph_entry(name, report) for name, report in reports.items()},
        "calls": [
            {"graph": name, "when": when, "what": what}
            for name, when, what in CALLS
            if name in reports or parts_of(name, reports)
        ],
        "text_graph": text_graph(model),
        "tokenizers": tokenizer_entries(model, first),
        "prompt_modifier": settings.prompt_modifier,
        "negative_prompt": settings.negative_prompt,
        "video": {
            **{name: getattr(settings, name) for name in ("height", "width", "frame_rate")},
            "frames": settings.video_frames,
            "stages": video.stages,
            "latent_frames": video.latent_frames,
            "latent_height": video.height,
            "latent_width": video.width,
            "latent_channels": model.transformer.in_channels,
            "patch_size": model.transformer.patch_size,
        },
        "latents": {"shift": list(vae.latent_shift), "scale": list(vae.latent_scale)},
        "sampler": sampler_entry(config),
        "masked_logit": DEVICE_MASKED_LOGIT,
        "time_channels": SINUSOID_CHANNELS,
        "first_frame": None if first is None else first_frame_entry(first, settings.height, settings.width),
        # Pyramid-Flow's own decoder is no graph, and so not part of a bundle.
        "dropped_frames": vae.decoder.dropped_frames if hasattr(vae, "decoder") else None,
        "safety_checker": False,
    }


def graph_entry(name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    """One graph; `encodings` are those of its inputs and outputs that are integers, equation 1 of `converters.qdq`."""
    kept = ("inputs", "outputs", "carried", "notes")
    quantised = report.get("quantised")
    return {
        "file": f"graphs/{name}.onnx",
        "data": f"graphs/{name}.onnx.data",
        "precision": quantised["precision"] if quantised else "fp16",
        **{key: report[key] for key in kept},
        "encodings": quantised["encodings"] if quantised else {},
    }


def sampler_entry(config: SamplerConfig) -> dict[str, Any]:
    """Steps, timesteps, stage-local sigmas and jumps of equations 1, 2 and 5."""
    schedule = config.schedule
    stages = range(config.video.stages)

    def unit(first: bool) -> dict[str, Any]:
        steps, guidance = config.unit_settings(first)
        tables = [schedule.inference_steps(stage, steps[stage]) for stage in stages]
        return {
            "guidance": guidance,
            "stages": [{"timesteps": list(table.timesteps), "sigmas": list(table.sigmas)} for table in tables],
        }

    jumps = [dict(zip(("alpha", "beta"), schedule.renoise_weights(stage), strict=True)) for stage in stages[1:]]
    return {
        "first_unit": config.first_unit,
        "units": config.video.units,
        "gamma": schedule.gamma,
        "jumps": [None, *jumps],
        "first": None if config.first_unit else unit(True),
        "later": unit(False),
    }


def tokenizer_entries(model: ModelFolder, first: FirstFrameModel | None) -> dict[str, dict[str, Any]]:
    """Graph -> folder, tokens after padding, vocabulary of the network, and the end token where the graph looks for it.

    An `end_token` of null is the largest id, see `clip_text.eos_positions`.
    """
    t5 = getattr(model.text.text_encoder_3, "encoder", model.text.text_encoder_3)
    entries = {
        text_graph(model): {
            "folder": "tokenizer_3",
            "length": model.settings.text_length,
            "vocab_size": t5.vocab_size,
            "end_token": None,
        },
        "clip_l": _clip_tokenizer("tokenizer", model.text.text_encoder),
        "clip_g": _clip_tokenizer("tokenizer_2", model.text.text_encoder_2),
    }
    if first is not None:
        folders = first_frame_module.TOKENIZER_FOLDERS
        entries["first_frame_clip_l"] = _clip_tokenizer(folders[0], first.text_encoder)
        entries["first_frame_clip_g"] = _clip_tokenizer(folders[1], first.text_encoder_2)
    return entries


def _clip_tokenizer(folder: str, config: CLIPTextConfig) -> dict[str, Any]:
    return {
        "folder": folder,
        "length": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "end_token": None if config.eos_token_id == 2 else config.eos_token_id,
    }


def first_frame_entry(first: FirstFrameModel, height: int, width: int) -> dict[str, Any]:
    """Equation 6: the numbers of every step, sizes that the UNet is told, and the latents."""
    size = first.picture_size(height, width)
    schedule = lcm.lcm_schedule(lcm.SSD_1B, first_frame_module.STEPS)
    columns = {"timestep" if name == "timesteps" else name: column for name, column in schedule._asdict().items()}
    return {
        "height": size[0],
        "width": size[1],
        "latents": [*(side // first.vae.space_factor for side in size), first.unet.in_channels],
        "scaling_factor": first.vae.scaling_factor,
        "time_ids": [*size, 0, 0, *size],
        "time_id_channels": first.unet.addition_time_embed_dim,
        "time_channels": first.unet.block_out_channels[0],
        "steps": [
            {name: column[step].item() for name, column in columns.items()} for step in range(first_frame_module.STEPS)
        ],
    }


def stage_arrays(model: ModelFolder) -> dict[str, np.ndarray]:
    """Tables of equations 3 and 4 (`units.StageUnits`): of the size of the video and the length of the text alone."""
    video, arrays = model.sampler().video, {}
    for stage in range(video.stages):
        units = stage_units(model.transformer, video, stage, model.settings.text_length)
        for name in ("index", "position_index", "positions", "time_ids", "image_groups"):
            arrays[f"stage_{stage}/{name}"] = np.ascontiguousarray(getattr(units, name))
    return arrays | {"rotary_cos": units.rotary_cos, "rotary_sin": units.rotary_sin}


# --- reading ----------------------------------------------------------------------------------------------------------


def read_manifest(bundle: Path) -> dict[str, Any]:
    """`model.json` of a bundle, whose graphs and tokenizers are there.

    Raises:
      UserError: no bundle, another version, a path that leaves the bundle, or a file that is absent.
    """
    path = bundle / MANIFEST
    if not path.is_file():
        raise UserError(f"{bundle}: has no {MANIFEST}; make a bundle with converters.bundle")
    model = read_json(path)
    if model.get("version") != VERSION:
        raise UserError(
            f"{path}: version {model.get('version')!r}, this program reads {VERSION}; make the bundle again"
        )
    lacking = [key for key in KEYS if key not in model]
    lacking += [key for key in FILES if not isinstance(model.get(key), dict)]
    if lacking:
        raise UserError(f"{path}: has no {lacking[0]!r}; make the bundle again with converters.bundle")
    entries = [(f"graph {name}", graph, "file") for name, graph in model["graphs"].items()]
    entries += [(f"tokenizer of {name}", entry, "folder") for name, entry in model["tokenizers"].items()]
    for what, entry, key in (*entries, ("host arrays", model["host"], "file")):
        bundle_path(bundle, entry.get(key) if isinstance(entry, dict) else None, what)
    return model


def bundle_path(bundle: Path, name: Any, what: str) -> Path:
    """The path of a file or folder that a bundle names.

    Raises:
      UserError: a path that is absolute, has "..", leads elsewhere by a link, or is absent.
    """
    relative = PurePosixPath(name) if isinstance(name, str) and name else None
    if relative is None or relative.is_absolute() or ".." in relative.parts or "\\" in name:
        raise UserError(f"{bundle}: {what} is at {name!r}, which is no path inside the bundle; refused")
    path = bundle / relative
    if not path.resolve().is_relative_to(bundle.resolve()):
        raise UserError(f"{bundle}: {what} at {name!r} is a link that leaves the bundle; refused")
    if not path.exists():
        raise UserError(f"{bundle}: {what} is missing, {name} is not there; make the bundle again")
    return path
