"""The smallest teacher run: config, cached latents and a model folder for tests."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.config_file import load_config, plain
from nd_jax.data import latent_shards
from nd_jax.data.latents import encode_record
from nd_jax.data.tokenizers import build_unigram_tokenizer
from nd_jax.data.toy_prompts import toy_prompts
from nd_jax.distill import registry
from nd_jax.weights.folder import save_component

CONFIG = str(Path(__file__).parent.parent / "experiments" / "configs" / "teacher.py") + ":tiny"
SHAPE = (3, 8, 8, 2)
CLIP = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "projection_dim": 8,
}
MODEL = {
    "mmdit.num_layers": 2,
    "mmdit.attention_head_dim": 4,
    "mmdit.num_attention_heads": 4,
    "mmdit.joint_attention_dim": 16,
    "mmdit.caption_projection_dim": 16,
    "mmdit.pooled_projection_dim": 16,
    **{f"{name}.{k}": v for name in ("text_encoder", "text_encoder_2") for k, v in CLIP.items()},
    **{f"text_encoder_3.{k}": v for k, v in {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_heads": 4}.items()},
}
OVERRIDES = {
    "num_steps": 8,
    "batch_size": 24,
    "log_every": 1,
    "eval_every": 4,
    "checkpoint.every": 2,
    "ema_decay": 0.9,
    "attention": "xla",
    "optimizer.warmup_steps": 1,
    **{f"model.{k}": v for k, v in MODEL.items()},
}


def arguments(**changes: Any) -> list[str]:
    """Command-line overrides; keys with dots are given as a dictionary through `**{"a.b": 1}`."""
    return [f"--config.{key}={value!r}" for key, value in (OVERRIDES | changes).items()]


def tiny_config(**changes: Any) -> dict[str, Any]:
    return plain(load_config(CONFIG, arguments(**changes)))


def write_latents(folder: Path, count: int = 60) -> Path:
    """A folder of latents drawn from a seed."""
    rng = np.random.default_rng(0)
    plan = latent_shards.Plan(
        source="test",
        num_clips=count,
        shard_size=32,
        latent_shape=SHAPE,
        video_frames=17,
        height=64,
        width=64,
        frame_rate=24.0,
        encoder_sha256="test",
    )
    folder.mkdir()
    latent_shards.claim_folder(folder, plan)
    records = [
        encode_record(rng.standard_normal(SHAPE), np.full(SHAPE, 0.1), text, str(k))
        for k, text in enumerate(toy_prompts(count, seed=1))
    ]
    for shard in range(plan.num_shards):
        latent_shards.write_shard(folder, plan, shard, [records[k] for k in plan.clips(shard)])
    latent_shards.write_manifest(folder, latent_shards.summarize(folder, plan, (0.0, 0.0), (1.0, 1.0), ()))
    return folder


def write_model(root: Path, blocks: int) -> Path:
    """A model folder of a random teacher (all gates open) with its text networks and tokenizers, below `root`, where
    `root / "latents"` has latents for it."""
    rng = np.random.default_rng(0)
    config = registry.resolve_config(
        tiny_config(**{"data.latents": str(root / "latents"), "model.mmdit.num_layers": blocks})
    )
    method = registry.build_method(config)
    draw = lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32)
    params = jax.tree.map(draw, method.roles["denoiser"].abstract)
    for name, (network, sizes, tree) in method.deploy({"denoiser": params}).items():
        save_component(root / "teacher" / name, network, sizes, tree)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        build_unigram_tokenizer(toy_prompts(60, seed=1), 128, root / "teacher" / name)
    return root / "teacher"
