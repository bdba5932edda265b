"""Distillation 3: recovery of a pruned transformer (paper, section on block pruning), in two stages.

    python -m experiments.prune_plan --model TEACHER --prompts FILE --keep 6 --output runs/plan
    python -m experiments.train --config experiments/configs/prune.py:stage1-tiny --workdir runs/stage1 \
        --config.model.folder=TEACHER --config.model.plan=runs/plan/plan.json --config.data.latents=LATENTS
    python -m converters.export_torch --checkpoint runs/stage1 --output runs/stage1_model
    python -m experiments.train --config experiments/configs/prune.py:stage2-tiny --workdir runs/stage2 \
        --config.model.student=runs/stage1_model/diffusion_transformer_320p (and the three above)

stage1        data flow matching alone: the paper's 300 iterations at 3e-5, with its batch of 16 for every stage.
stage2        from stage 1, with a full teacher: features, the teacher's velocity and the data's; the paper's 60,000
              iterations. It gives no weights; ours make the parts of like size on the tiny teacher.
stage1-tiny, stage2-tiny   the same on 2 CPU cores for the toy teacher of 8 blocks.
All need
           --config.model.folder=...   the teacher's model folder
           --config.model.plan=...     plan.json
           --config.data.latents=...   folder written by experiments.prepare with that model
"""

from ml_collections import ConfigDict

from experiments.configs.common import base_config, choose_variant


def get_config(variant: str = "stage1-tiny") -> ConfigDict:
    """Config of a variant: "stage1-tiny", "stage1", "stage2-tiny" or "stage2"."""
    variants = {"stage1-tiny": _stage1_tiny, "stage1": _stage1, "stage2-tiny": _stage2_tiny, "stage2": _stage2}
    return choose_variant("prune.py", variant, variants)


def _base() -> ConfigDict:
    config = base_config(
        "prune",
        "rows",
        remat="full",
        attention="xla",
        model={
            "folder": "",
            # Subfolder of the transformer.
            "transformer": "diffusion_transformer_320p",
            "plan": "",
            # The transformer that stage 1 trained; without one the student is cut out of the teacher.
            "student": "",
            # Of the teacher and the text networks.
            "frozen_dtype": "bfloat16",
        },
        objective={"stage_ratios": (1, 1, 1), "corruption_ratio": 1 / 3, "coupling": "shared"},
        loss={"data_weight": 1.0, "flow_weight": 0.0, "image_weight": 0.0, "text_weight": 0.0, "mapping": "simple"},
        data={
            "latents": "",
            # Folder with tokenizer, tokenizer_2 and tokenizer_3; that of the model by default.
            "tokenizers": "",
            "max_length": 128,
            "clip_max_length": 77,
            "eval_fraction": 0.01,
            "caption_dropout": 0.1,
        },
    )
    config.dtype = "bfloat16"
    config.optimizer.learning_rate = 3e-5
    config.optimizer.warmup_steps = 0
    config.optimizer.decay = "constant"
    config.checkpoint = {"every": 1000, "keep": 3, "best_metric": "eval/velocity_error"}
    config.mesh.data, config.mesh.fsdp = -1, 16
    return config


def _teach(config: ConfigDict) -> ConfigDict:
    config.loss.update({"flow_weight": 1.0, "image_weight": 0.1, "text_weight": 0.1})
    return config


def _stage1() -> ConfigDict:
    config = _base()
    config.update({"num_steps": 300, "batch_size": 48, "log_every": 10, "eval_every": 50})
    config.checkpoint.every = 50
    return config


def _stage2() -> ConfigDict:
    config = _teach(_base())
    config.update({"num_steps": 60_000, "batch_size": 384, "log_every": 10, "eval_every": 1000, "ema_decay": 0.9999})
    return config


def _tiny(config: ConfigDict) -> ConfigDict:
    config.update({"batch_size": 96, "log_every": 20, "eval_every": 100, "remat": "none", "attention": "cached"})
    config.dtype, config.model.frozen_dtype = "float32", "float32"
    config.checkpoint.every = 100
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.data.update({"max_length": 28, "clip_max_length": 28, "eval_fraction": 0.04})
    config.optimizer.update({"name": "muon", "decay": "cosine", "warmup_steps": 20})
    return config


def _stage1_tiny() -> ConfigDict:
    config = _tiny(_stage1())
    config.num_steps = 200
    config.optimizer.learning_rate = 1e-3
    return config


def _stage2_tiny() -> ConfigDict:
    config = _tiny(_stage2())
    config.update({"num_steps": 600, "ema_decay": 0.98})
    config.optimizer.learning_rate = 3e-3
    return config
