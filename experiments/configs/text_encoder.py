"""Distillation 1, the text encoder: DT5 + ContextAdapter for T5-XXL + context embedder.

    python -m experiments.train --config experiments/configs/text_encoder.py:tiny --workdir runs/text_encoder

tiny   2 CPU cores, about a minute: random teacher with T5's initialisation, prompts from a grammar or from your file.
toy-teacher   likewise, for a toy teacher (experiments.toy_teacher), whose T5 and context embedder mean something: a
       student with less than half of their parameters. Needs data.prompts and, of the teacher's model folder,
           --config.data.tokenizer=MODEL/tokenizer_3  --config.teacher.text_encoder=MODEL/text_encoder_3
           --config.teacher.mmdit=MODEL/diffusion_transformer_320p
full   the paper's run: 1.4M prompts, global batch 2048, T5-XXL in bfloat16 run on the fly. Needs
           --config.data.prompts=...          text, JSONL or ArrayRecord files
           --config.data.tokenizer=...        tokenizer_3 folder of the released model
           --config.teacher.text_encoder=...  T5 v1.1 XXL encoder, transformers layout
           --config.teacher.mmdit=...         diffusion transformer of Pyramid-Flow (its context embedder is read)
           --config.student.text_encoder_3=...  DT5, or flan-t5-base to start from
       One step at 2048 prompts is 192 TFLOP a chip on v5e:4x4. The paper reports VBench 80.31 -> 79.64 for mode RM;
       the number of steps is not given there, 20,000 is our guess.

Modes (`loss.mode`): RM (deployed), EM, TDT5, LoRA; see nd_jax/distill/text_encoder.py.
"""

from ml_collections import ConfigDict

from experiments.configs.common import base_config, choose_variant


def get_config(variant: str = "tiny") -> ConfigDict:
    """Config of a variant: "tiny", "toy-teacher" or "full"."""
    return choose_variant("text_encoder.py", variant, {"tiny": _tiny, "toy-teacher": _toy_teacher, "full": _full})


def _base() -> ConfigDict:
    config = base_config(
        "text_encoder",
        "prompts",
        remat=False,
        loss={
            "mode": "RM",
            "mse_weight": 1.0,
            "cosine_weight": 0.1,
            "mse_reduction": "mean",
            "lora_rank": 16,
            "lora_alpha": 16.0,
        },
        data={
            "prompts": "",
            "prompt_key": "prompt",
            "tokenizer": "",
            "tokenizer_vocab": 32128,
            "max_length": 128,
            "eval_fraction": 0.001,
            "caption_dropout": 0.0,
            "skip_bad": False,
        },
    )
    config.optimizer.beta2 = 0.999
    return config


def _tiny() -> ConfigDict:
    config = _base()
    width = 64
    encoder = {"vocab_size": 256, "d_model": width, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    config.update(
        {
            "num_steps": 600,
            "batch_size": 32,
            "log_every": 20,
            "eval_every": 50,
            "checkpoint": {"every": 100, "keep": 2, "best_metric": "eval/cosine"},
            "student": {
                "text_encoder_3": "",
                "context_adapter": "",
                "encoder": dict(encoder),
                "projection_dim": width,
                "adapter": {"layer_depths": (128, 128, 128, 128)},
            },
            "teacher": {
                "text_encoder": "",
                "mmdit": "",
                "encoder": dict(encoder, num_layers=3),
                "context_dim": 48,
                "param_dtype": "float32",
                "seed": 1,
            },
        }
    )
    # A random DT5 carries no meaning, so it has to train too; with released weights RM is the mode to run.
    config.loss.mode = "TDT5"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 50
    # Few enough pieces that a thousand prompts show each of them often.
    config.data.tokenizer_vocab = 256
    config.data.max_length = 64
    config.data.eval_fraction = 0.1
    return config


def _toy_teacher() -> ConfigDict:
    config = _tiny()
    config.update({"num_steps": 800, "batch_size": 64, "eval_every": 100})
    config.optimizer.learning_rate = 5e-3
    config.student.encoder.update({"vocab_size": 128, "d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2})
    config.student.adapter.layer_depths = (32, 32, 32, 32)
    config.data.update({"tokenizer_vocab": 128, "max_length": 28})
    # Guidance asks for the context of the empty caption, too.
    config.data.caption_dropout = 0.05
    return config


def _full() -> ConfigDict:
    config = _base()
    config.update(
        {
            "num_steps": 20_000,
            "batch_size": 2048,
            "log_every": 10,
            "eval_every": 500,
            "checkpoint": {"every": 500, "keep": 3, "best_metric": "eval/cosine"},
            "student": {
                "text_encoder_3": "",
                "context_adapter": "",
                "encoder": {
                    "vocab_size": 32128,
                    "d_model": 768,
                    "d_kv": 64,
                    "d_ff": 2048,
                    "num_layers": 12,
                    "num_heads": 12,
                },
                "projection_dim": 4096,
                "adapter": {"layer_depths": (4096,) * 4},
            },
            "teacher": {
                "text_encoder": "",
                "mmdit": "",
                "encoder": {
                    "vocab_size": 32128,
                    "d_model": 4096,
                    "d_kv": 64,
                    "d_ff": 10240,
                    "num_layers": 24,
                    "num_heads": 64,
                },
                "context_dim": 1536,
                "param_dtype": "bfloat16",
                "seed": 1,
            },
        }
    )
    config.dtype = "bfloat16"
    config.remat = True
    # Split over more than 16 chips, a shard of the weights gets too small to be worth gathering; beyond, copy them.
    config.mesh.data, config.mesh.fsdp = -1, 16
    return config
