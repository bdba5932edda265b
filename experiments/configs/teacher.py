"""The teacher: Pyramid-Flow's video transformer, trained by pyramidal flow matching on cached latents.

    python -m experiments.prepare --toy-world 4000 --model VAE --output latents        (or --videos DIR --captions FILE)
    python -m experiments.train --config experiments/configs/teacher.py:tiny --workdir runs/teacher \
        --config.data.latents=latents

tiny   2 CPU cores, an hour: 8 blocks of width 96 with their own small text networks, which train too, on clips of
       the toy world; `python -m experiments.toy_teacher` runs everything from the VAE to the model folder.
full   Pyramid-Flow's sizes: 24 blocks of width 1536, frozen T5-XXL and CLIPs in bfloat16 in the step. Needs
           --config.data.latents=...            folder written by experiments.prepare
           --config.data.tokenizers=...         model folder with tokenizer, tokenizer_2 and tokenizer_3
           --config.model.text_folder=...       model folder with text_encoder, text_encoder_2 and text_encoder_3
           --config.model.transformer_folder=... to go on from released weights instead of random ones
       Batch and learning rate are the order of the public training scripts; the paper trains no teacher of its own.

The objective's `coupling` "independent" is the wrong one, for comparison; see nd_jax/pyramid/units.py.
"""

from ml_collections import ConfigDict

from experiments.configs.common import base_config, choose_variant


def get_config(variant: str = "tiny") -> ConfigDict:
    """Config of a variant: "tiny" or "full"."""
    return choose_variant("teacher.py", variant, {"tiny": _tiny, "full": _full})


def _base() -> ConfigDict:
    config = base_config(
        "teacher",
        "rows",
        remat="none",
        attention="xla",
        objective={"stage_ratios": (1, 1, 1), "corruption_ratio": 1 / 3, "coupling": "shared"},
        data={
            "latents": "",
            "tokenizers": "",
            "tokenizer_vocab": 128,
            "max_length": 128,
            "clip_max_length": 77,
            "eval_fraction": 0.01,
            "caption_dropout": 0.1,
        },
    )
    config.ema_decay = 0.9999
    config.optimizer.weight_decay = 1e-4
    return config


def _tiny() -> ConfigDict:
    config = _base()
    clip = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 28,
        "projection_dim": 32,
        "eos_token_id": 1,
    }
    config.update(
        {
            "num_steps": 11_000,
            "batch_size": 96,
            "log_every": 20,
            "eval_every": 500,
            "checkpoint": {"every": 500, "keep": 2, "best_metric": "eval/velocity_error"},
            "model": {
                "transformer_folder": "",
                "text_folder": "",
                "train_text": True,
                "text_seed": 1,
                "text_param_dtype": "float32",
                "mmdit": {
                    "sample_size": 32,
                    "num_layers": 8,
                    "attention_head_dim": 24,
                    "num_attention_heads": 4,
                    "joint_attention_dim": 64,
                    "caption_projection_dim": 96,
                    "pooled_projection_dim": 64,
                    "pos_embed_max_size": 16,
                },
                "text_encoder": dict(clip),
                "text_encoder_2": dict(clip, hidden_act="gelu"),
                "text_encoder_3": {
                    "vocab_size": 128,
                    "d_model": 64,
                    "d_kv": 16,
                    "d_ff": 128,
                    "num_layers": 2,
                    "num_heads": 4,
                },
            },
        }
    )
    config.attention = "cached"
    config.ema_decay = 0.995
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 100
    config.data.max_length = 28
    config.data.clip_max_length = 28
    config.data.eval_fraction = 0.04
    return config


def _full() -> ConfigDict:
    config = _base()
    clip_l = {
        "vocab_size": 49408,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 77,
        "projection_dim": 768,
        "eos_token_id": 49407,
    }
    clip_g = dict(
        clip_l,
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
    )
    config.update(
        {
            "num_steps": 100_000,
            "batch_size": 384,
            "log_every": 10,
            "eval_every": 1000,
            "checkpoint": {"every": 1000, "keep": 3, "best_metric": "eval/velocity_error"},
            "model": {
                "transformer_folder": "",
                "text_folder": "",
                "train_text": False,
                "text_seed": 1,
                "text_param_dtype": "bfloat16",
                "mmdit": {
                    "sample_size": 128,
                    "num_layers": 24,
                    "attention_head_dim": 64,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 4096,
                    "caption_projection_dim": 1536,
                    "pooled_projection_dim": 2048,
                    "pos_embed_max_size": 192,
                },
                "text_encoder": clip_l,
                "text_encoder_2": clip_g,
                "text_encoder_3": {
                    "vocab_size": 32128,
                    "d_model": 4096,
                    "d_kv": 64,
                    "d_ff": 10240,
                    "num_layers": 24,
                    "num_heads": 64,
                },
            },
        }
    )
    config.dtype = "bfloat16"
    config.remat = "full"
    config.mesh.data, config.mesh.fsdp = -1, 16
    return config
