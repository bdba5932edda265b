"""The smallest text-encoder run: config and prompts for tests."""

from pathlib import Path
from typing import Any

from experiments.config_file import load_config, plain
from nd_jax.data.toy_prompts import toy_prompts

CONFIG = str(Path(__file__).parent.parent / "experiments" / "configs" / "text_encoder.py") + ":tiny"
ENCODER = {"vocab_size": 128, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}

OVERRIDES = {
    "num_steps": 12,
    "batch_size": 8,
    "log_every": 1,
    "eval_every": 6,
    "checkpoint.every": 2,
    "data.tokenizer_vocab": 128,
    "data.max_length": 24,
    "student.projection_dim": 16,
    "student.adapter.layer_depths": (16, 16),
    "teacher.context_dim": 12,
    **{f"{side}.encoder.{k}": v for side in ("student", "teacher") for k, v in ENCODER.items()},
}


def arguments(**changes: Any) -> list[str]:
    """Command-line overrides; keys with dots are given as a dictionary through `**{"a.b": 1}`."""
    return [f"--config.{key}={value!r}" for key, value in (OVERRIDES | changes).items()]


def tiny_config(**changes: Any) -> dict[str, Any]:
    return plain(load_config(CONFIG, arguments(**changes)))


def write_prompts(path: Path, count: int = 64) -> Path:
    path.write_text("\n".join(toy_prompts(count, seed=3)) + "\n")
    return path
