"""Distillation 4: few steps a stage (paper, section on step distillation).

    python -m experiments.prepare --teacher-samples --model TEACHER --prompts FILE --output latents
    python -m experiments.train --config experiments/configs/steps.py:tiny --workdir runs/steps \
        --config.model.folder=TEACHER --config.data.latents=latents

full          pyramidal DMD to 1-1-1 steps: 5000 updates of the student and 10,000 of the fake model, Adam at 1e-6 for
              both, 8 samples for every stage.
progressive   baseline: one step of the student for four guided ones of the teacher.
finetune      baseline: flow matching at the student's own steps alone.
tiny, progressive-tiny, finetune-tiny   the same on 2 CPU cores for the toy teacher.
All need
           --config.model.folder=...   the teacher's model folder
           --config.data.latents=...   what it generates (experiments.prepare --teacher-samples)
           --config.model.student=...  a transformer's folder, to start from a pruned student instead of the teacher
Other students: --config.objective.steps='(4, 4, 4)'; --config.objective.first_frame=False where the first latent frame
is always given (mode hybrid).
"""

from ml_collections import ConfigDict

from experiments.configs.common import base_config, choose_variant


def get_config(variant: str = "tiny") -> ConfigDict:
    """Config of a variant: "tiny", "full", and either baseline by its name, alone or with "-tiny"."""
    names = {"full": "dmd", "tiny": "dmd"}
    names |= {f"{name}{size}": name for name in ("progressive", "finetune") for size in ("", "-tiny")}
    small = lambda name: name.endswith("tiny")
    variants = {v: (lambda v=v, m=m: (_tiny if small(v) else _full)(m)) for v, m in names.items()}
    return choose_variant("steps.py", variant, variants)


def _base(name: str) -> ConfigDict:
    return base_config(
        "steps",
        "rows",
        remat="full",
        attention="xla",
        model={
            "folder": "",
            # Subfolder of the transformer.
            "transformer": "diffusion_transformer_320p",
            # Transformers to start from: the teacher's own and the student's by default.
            "student": "",
            "fake": "",
            # The teacher's guidance, of the first latent frame and of the others, and what it leads away from.
            "guidance": (7.0, 5.0),
            "negative_prompt": "",
            # Of the teacher and the text networks.
            "frozen_dtype": "bfloat16",
        },
        steps={"name": name, "fake_updates": 2, "teacher_substeps": 4, "std_ratio_limits": (0.2, 5.0)},
        # Beyond the paper: rows whose history the student made itself, with a probability that rises to this one from
        # step `start` on, over `ramp` steps.
        student_history={"probability": 0.0, "start": 0, "ramp": 1000},
        objective={
            "steps": (1, 1, 1),
            "stage_ratios": (1, 1, 1),
            "first_frame": True,
            "corruption_ratio": 0.0,
            "clean_form": "extrapolated",
            "tau_grid": (1.0, 0.75, 0.5, 0.25),
            "dmd_weight": 1.0,
            "cauchy_weight": 0.01,
        },
        data={
            "latents": "",
            # Folder with tokenizer, tokenizer_2 and tokenizer_3; that of the model by default.
            "tokenizers": "",
            "max_length": 128,
            "clip_max_length": 77,
            "eval_fraction": 0.01,
            # A student without guidance always has a caption.
            "caption_dropout": 0.0,
        },
    )


def _full(name: str) -> ConfigDict:
    config = _base(name)
    updates = 5000
    config.update({"num_steps": 3 * updates if name == "dmd" else updates, "batch_size": 24, "ema_decay": 0.0})
    config.update({"log_every": 10, "eval_every": 500})
    config.checkpoint = {"every": 500, "keep": 5, "best_metric": "eval/clean_error"}
    config.dtype = "bfloat16"
    config.optimizer.update({"learning_rate": 1e-6, "warmup_steps": 0, "decay": "constant"})
    config.mesh.data, config.mesh.fsdp = -1, 16
    return config


def _tiny(name: str) -> ConfigDict:
    config = _full(name)
    config.update({"num_steps": 1500 if name == "dmd" else 500, "batch_size": 48, "ema_decay": 0.98})
    config.update({"remat": "none", "attention": "cached", "log_every": 30, "eval_every": 150})
    config.dtype, config.model.frozen_dtype = "float32", "float32"
    config.checkpoint.every = 150
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.data.update({"max_length": 28, "clip_max_length": 28, "eval_fraction": 0.04})
    config.model.guidance = (3.0, 3.0)
    config.optimizer.update({"learning_rate": 1e-4, "warmup_steps": 20, "decay": "cosine"})
    return config
