"""Sizes for a plan where a config names no folders: a folder of the released sizes without any weights.

A config takes its sizes from what it names: model folders, latents, a pruning plan, tokenizers. Whoever plans has none
of them at hand, so `fill_folders` writes their small parts (config.json files, a manifest with a few records of noise,
tokenizers of a hundred words) and names them in the config. From there on a plan reads what training reads.

    model folder   T5 v1.1 XXL, CLIP-L, CLIP-G, Pyramid-Flow's transformer of 24 blocks, its video VAE
    student        the same transformer of 18 blocks
    latents        7 x 40 x 64 x 16: 49 frames of 320 x 512
    text           as many tokens as the config says; 128 of T5 and 77 of the CLIPs in the full ones
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nd_jax.data import latent_shards
from nd_jax.data.latents import encode_record
from nd_jax.data.registry import CLIP_TOKENIZERS, T5_TOKENIZER, build_data
from nd_jax.data.tokenizers import build_unigram_tokenizer
from nd_jax.data.toy_prompts import toy_prompts
from nd_jax.distill.pruning_plan import PruningPlan, write_plan
from nd_jax.distill.transformer_roles import transformer_config
from nd_jax.errors import UserError
from nd_jax.models.clip_text import CLIP_G, CLIP_L
from nd_jax.models.lpips import LPIPSConfig
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.t5 import T5_XXL
from nd_jax.models.video_vae import CausalVideoVAEConfig
from nd_jax.train.loop import HOST_COLUMNS
from nd_jax.weights import networks
from nd_jax.weights.lpips import LPIPS_VGG16
from nd_jax.weights.mmdit import PYRAMID_FLOW_MMDIT
from nd_jax.weights.network import Network
from nd_jax.weights.vae import CAUSAL_VIDEO_VAE

TEACHER = MMDiTConfig(num_layers=24, context_embedder=True)
STUDENT_BLOCKS = 18
LATENT_SHAPE = (7, 40, 64, 16)
VIDEO = {"video_frames": 49, "height": 320, "width": 512, "frame_rate": 24.0}
# Enough to have some to train on and some to hold out.
RECORDS = 4
VOCABULARY = 128
VAE_FOLDER = "causal_video_vae"
TEXT_NETWORKS = {
    "text_encoder": (networks.CLIP_TEXT, CLIP_L),
    "text_encoder_2": (networks.CLIP_TEXT, CLIP_G),
    "text_encoder_3": (networks.T5_ENCODER, T5_XXL),
}


def fill_folders(
    config: Mapping[str, Any], folder: Path, student_blocks: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """(the config with every folder named, the keys that it left empty).

    Args:
      config: plain, not resolved. What it names stays.
      folder: empty; what is missing is written here.
      student_blocks: of a pruned student; where the config names a teacher and this is None, the student is as the
        config has it.

    Raises:
      UserError: a number of blocks that the teacher does not have.
    """
    model, data = dict(config.get("model", {})), dict(config["data"])
    before = {"model": dict(model), "data": dict(data)}
    if config["method"] in ("prune", "steps"):
        if not model["folder"]:
            model["folder"] = str(_write_model(folder / "model", model["transformer"]))
            student_blocks = STUDENT_BLOCKS if student_blocks is None else student_blocks
        transformer = Path(model["folder"]) / model["transformer"]
        channels = transformer_config(transformer)[1].in_channels
        if not model.get("plan", "given"):
            model["plan"] = str(_write_plan(folder / "plan.json", transformer, student_blocks or STUDENT_BLOCKS))
        if config["method"] == "steps" and not model["student"] and student_blocks:
            model["student"] = str(_write_student(folder / "student", transformer, student_blocks))
    else:
        channels = LATENT_SHAPE[-1]
    if config["method"] == "decoder":
        if not model["folder"]:
            model["folder"] = str(_write(folder / VAE_FOLDER, CAUSAL_VIDEO_VAE, CausalVideoVAEConfig()))
        if config["loss"]["perceptual"] == "lpips" and not model["lpips"]:
            model["lpips"] = str(_write(folder / "lpips", LPIPS_VGG16, LPIPSConfig()))
    elif not data.get("latents", "given"):
        data["latents"] = str(_write_latents(folder / "latents", channels))
    if not data.get("prompts", "given"):
        data["prompts"] = str(_write_prompts(folder / "prompts.txt"))
    if "toy_clips" in data and not data["toy_clips"] and not data["videos"]:
        data["toy_clips"] = RECORDS
    for key, name in (("tokenizers", ""), ("tokenizer", T5_TOKENIZER)):
        if not data.get(key, "given") and not (key == "tokenizers" and model.get("folder")):
            data[key] = str(_write_tokenizers(folder) / name)
    after = {"model": model, "data": data}
    filled = [f"{group}.{key}" for group in before for key, was in before[group].items() if after[group][key] != was]
    return dict(config) | ({"model": model} if "model" in config else {}) | {"data": data}, filled


def batch_row(config: Mapping[str, Any], folder: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Columns of a batch without their first axis: what the data of a resolved config gives for one row.

    Args:
      config: every folder that its data needs is named.
      folder: where data may write.
    """
    batches, _ = build_data(dict(config) | {"batch_size": 1}, folder)
    row = next(batches)
    return {k: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for k, x in row.items() if k not in HOST_COLUMNS}


def _write(folder: Path, network: Network, config: Any) -> Path:
    """A component folder that has no weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(network.write_config(config)), encoding="utf-8")
    return folder


def _write_model(folder: Path, transformer: str) -> Path:
    for name, (network, config) in TEXT_NETWORKS.items():
        _write(folder / name, network, config)
    _write(folder / transformer, PYRAMID_FLOW_MMDIT, TEACHER)
    return _write_tokenizers(folder)


def _write_student(folder: Path, transformer: Path, blocks: int) -> Path:
    network, sizes = transformer_config(transformer)
    _check_blocks(blocks, sizes.num_layers)
    return _write(folder, network, dataclasses.replace(sizes, num_layers=blocks))


def _write_plan(path: Path, transformer: Path, blocks: int) -> Path:
    """Any choice of blocks: sizes do not depend on it."""
    layers = transformer_config(transformer)[1].num_layers
    _check_blocks(blocks, layers)
    write_plan(path, PruningPlan(layers, (*range(blocks - 1), layers - 1)))
    return path


def _check_blocks(blocks: int, layers: int) -> None:
    if not 1 <= blocks <= layers:
        raise UserError(f"a student of {blocks} blocks: the teacher has {layers}; set --student-blocks to 1..{layers}")


def _write_tokenizers(folder: Path) -> Path:
    for name in (*CLIP_TOKENIZERS, T5_TOKENIZER):
        if not (folder / name).exists():
            build_unigram_tokenizer(toy_prompts(256, seed=0), VOCABULARY, folder / name)
    return folder


def _write_prompts(path: Path) -> Path:
    path.write_text("\n".join(toy_prompts(RECORDS, seed=0)) + "\n", encoding="utf-8")
    return path


def _write_latents(folder: Path, channels: int) -> Path:
    shape = (*LATENT_SHAPE[:-1], channels)
    plan = latent_shards.Plan("noise", RECORDS, RECORDS, shape, **VIDEO, encoder_sha256="none")
    latent_shards.claim_folder(folder, plan)
    noise = np.random.default_rng(0).standard_normal((RECORDS, *shape), np.float32)
    spread = np.zeros(shape, np.float32)
    prompts = enumerate(toy_prompts(RECORDS, seed=0))
    records = [encode_record(noise[k], spread, text, str(k)) for k, text in prompts]
    latent_shards.write_shard(folder, plan, 0, records)
    latent_shards.write_manifest(folder, latent_shards.summarize(folder, plan, (0.0, 0.0), (1.0, 1.0), ()))
    return folder
