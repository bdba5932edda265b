"""The whole paper at toy scale: four distillations of the toy teacher, the student they make, its way to a chip.

    python -m experiments.quickstart --workdir runs/quickstart [--seed N] [--only STAGE] [--from STAGE]

    teacher -> text encoder -> tiny decoder -> pruning and recovery -> few steps -> model folder -> ONNX -> Hexagon

The teacher ships with the repository; `--from teacher` trains one anew, for over an hour. Distillations follow each
other as in the paper: each one's student is the next one's teacher or start, and clips of every student are made, read
back and compared. Every stage is a command that you could type, or a function for what has no command; the report shows
the commands. A stage that is done is not run again: the same command continues an interrupted walk.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import assemble, evaluate_decoder, evaluate_toy_world, quickstart_device
from experiments.quickstart_table import RESULTS, print_table, summarize_walk
from experiments.stages import Stage, Stages, add_arguments, python, read_results, reader, run_walk
from nd_jax.errors import run_command
from nd_jax.files import write_text

CONFIGS = "experiments/configs"
SHIPPED = Path("experiments/models/toy_teacher")
TRANSFORMER = assemble.TRANSFORMER
BATCH = 64  # clips that are sampled at once
# Added to the seed of captions: of the text encoder, the plan, the teacher's samples. Evaluations
# use 1000.
TEXT_SEED, PLAN_SEED, SAMPLES_SEED = 5000, 3000, 4000
ONE_STEP = ("--steps", "1,1,1", "--guidance", "1,1")

# Option -> (default, what it is).
SIZES = {
    "captions": (4000, "captions that the text encoder learns from"),
    "text_steps": (800, "of the text encoder"),
    "training_clips": (1024, "toy clips that are encoded, for the decoder and for pruning"),
    "decoder_steps": (1200, "of the tiny decoder"),
    "plan_captions": (16, "captions that the pruning plan samples"),
    "stage1_steps": (60, "of the recovery's first stage"),
    "stage2_steps": (200, "of its second"),
    "samples": (512, "clips that the teacher samples, four of a caption"),
    "dmd_steps": (450, "of step distillation: one of three updates the student"),
    "clips": (64, "that are generated and read back for every model"),
    "videos": (8, "of the student by experiments.generate, whose inputs calibrate its graphs"),
}
PER_CAPTION = 4
PROBES = 8  # captions of the plan on which blocks are left out
# Of the videos' inputs some are for calibration and two are run.
LEAST = {"samples": PER_CAPTION, "clips": 2, "videos": 4}

# Stage -> about how many seconds it takes on two idle cores, for the bar; a few for the others.
SECONDS = {
    **{"clips_teacher": 30, "clips_teacher_111": 18, "clips_text": 30, "clips_decoder": 20, "clips_cut": 25},
    **{"clips_stage1": 18, "clips_pruned": 18, "clips_student": 18, "clips_hybrid": 18},
    **{"text": 22, "latents": 40, "decoder": 110, "decoder_measure": 10, "plan": 70, "stage1": 60, "stage2": 140},
    **{"samples": 50, "dmd": 200, "videos": 25, "bundle": 45, "quantize_decoder_stream": 14},
}
FEW_SECONDS = 4
# Part of the walk -> its stages.
PARTS = {
    "teacher": ("teacher", "clips_teacher", "clips_teacher_111"),
    "text encoder": ("captions", "text", "text_export", "text_model", "clips_text"),
    "decoder": ("latents", "decoder", "decoder_export", "decoder_model", "decoder_measure", "clips_decoder"),
    "pruning": (
        *("plan", "cut_model", "clips_cut", "stage1", "stage1_export", "clips_stage1"),
        *("stage2", "stage2_export", "pruned_model", "clips_pruned"),
    ),
    "steps": ("samples", "dmd", "dmd_export", "student", "clips_student", "clips_hybrid"),
    "chip": quickstart_device.NAMES,
}
NAMES = (*(name for names in PARTS.values() for name in names), "report")


def stages(args: argparse.Namespace) -> Stages:
    """The walk, in order."""
    walked = {
        **teacher_stages(args),
        **text_stages(args),
        **decoder_stages(args),
        **pruning_stages(args),
        **steps_stages(args),
        **quickstart_device.device_stages(args, args.workdir / "models/student"),
    }
    walked["report"] = Stage("write the report", lambda: report(args), always=True)
    return {name: dataclasses.replace(stage, seconds=SECONDS.get(name, FEW_SECONDS)) for name, stage in walked.items()}


# --- what the stages share --------------------------------------------------------------------------------------------


def teacher_folder(args: argparse.Namespace) -> Path:
    """The shipped teacher, or the one that this walk trains, or was once asked to train."""
    trained = "teacher" in (args.start, args.only) or (args.workdir / "teacher").is_dir()
    return args.workdir / "teacher" / "model" if trained else SHIPPED


def train_stage(args: argparse.Namespace, name: str, what: str, config: str, *overrides: str) -> Stages:
    """A training in WORKDIR/NAME, and its export to WORKDIR/NAME_model."""
    work = args.workdir
    given = [f"--config.seed={args.seed}", *(f"--config.{override}" for override in overrides)]
    train = python("experiments.train", "--config", f"{CONFIGS}/{config}", "--workdir", work / name, *given)
    out = f"exported/{name}"
    export = python("converters.export_torch", "--checkpoint", work / name, "--output", work / out)
    return {
        name: Stage(what, reader(work, name, "result.json"), train, name),
        f"{name}_export": Stage("write its folder", reader(work, out, "export.json"), export, out),
    }


def model_stage(args: argparse.Namespace, name: str, what: str, *given: object) -> Stage:
    """Puts the model folder WORKDIR/models/NAME together."""
    out = f"models/{name}"
    command = python("experiments.assemble", *given, "--output", args.workdir / out)
    return Stage(what, reader(args.workdir, out, assemble.REPORT), command, out)


def clips_stage(args: argparse.Namespace, name: str, model: Path, *given: object) -> Stages:
    """Clips of a model, read back."""
    out = f"clips/{name}"
    command = ["--model", model, *given, "--clips", args.clips, "--batch", min(args.clips, BATCH)]
    command = python("experiments.evaluate", "toy-world", *command, "--output", args.workdir / out)
    what = f"generate clips and read them: {name}"
    return {f"clips_{name}": Stage(what, reader(args.workdir, out, evaluate_toy_world.RESULT), command, out)}


# --- stages -----------------------------------------------------------------------------------------------------------


def teacher_stages(args: argparse.Namespace) -> Stages:
    """The teacher, and how it does with its own steps and with one a stage."""
    folder = teacher_folder(args)
    train = None
    if folder != SHIPPED:
        train = python("experiments.toy_teacher", "--workdir", args.workdir / "teacher", "--seed", args.seed)
    what = "take the teacher that ships" if train is None else "train the teacher"
    return {
        "teacher": Stage(what, lambda: describe_teacher(folder), train, "teacher"),
        **clips_stage(args, "teacher", folder),
        **clips_stage(args, "teacher_111", folder, *ONE_STEP),
    }


def text_stages(args: argparse.Namespace) -> Stages:
    """Distillation 1: DT5 and ContextAdapter for the teacher's T5 and context embedder."""
    work, teacher = args.workdir, teacher_folder(args)
    folders = (
        f"data.prompts={work / 'captions.txt'}",
        f"data.tokenizer={teacher / 'tokenizer_3'}",
        f"teacher.text_encoder={teacher / 'text_encoder_3'}",
        f"teacher.mmdit={teacher / TRANSFORMER}",
        f"num_steps={args.text_steps}",
    )
    return {
        "captions": Stage("write captions", lambda: write_captions(args)),
        **train_stage(args, "text", "distil the text encoder", "text_encoder.py:toy-teacher", *folders),
        "text_model": model_stage(
            *(args, "text", "the teacher with it", "--model", teacher, "--text", work / "exported/text")
        ),
        **clips_stage(args, "text", work / "models/text"),
    }


def decoder_stages(args: argparse.Namespace) -> Stages:
    """Distillation 2: the tiny decoder."""
    work, teacher = args.workdir, teacher_folder(args)
    toy = ["--toy-world", args.training_clips, "--seed", args.seed]
    latents = python("experiments.prepare", *toy, "--model", teacher, "--output", work / "latents")
    given = (
        f"model.folder={teacher / 'causal_video_vae'}",
        f"data.latents={work / 'latents'}",
        f"data.toy_clips={args.training_clips}",
        f"num_steps={args.decoder_steps}",
        # So few steps that more of them teach more than more clips in each.
        "batch_size=8",
        "eval_every=400",
        "checkpoint.every=400",
    )
    exported = work / "exported/decoder"
    measure = [
        "--student",
        exported,
        "--native",
        teacher,
        "--toy-world",
        args.clips,
        "--output",
        work / "reconstructed",
    ]
    return {
        "latents": Stage("encode clips", lambda: {}, latents, "latents"),
        **train_stage(args, "decoder", "train the tiny decoder", "decoder.py:tiny", *given),
        "decoder_model": model_stage(
            *(args, "decoder", "the model so far with it", "--model", work / "models/text", "--decoder", exported)
        ),
        "decoder_measure": Stage(
            "decode clips by both decoders",
            reader(work, "reconstructed", evaluate_decoder.RESULT),
            python("experiments.evaluate", "decoder", *measure),
            "reconstructed",
        ),
        **clips_stage(args, "decoder", work / "models/decoder"),
    }


def pruning_stages(args: argparse.Namespace) -> Stages:
    """Distillation 3: blocks are chosen and taken out, and two trainings bring back what that costs."""
    work, base = args.workdir, args.workdir / "models/decoder"
    plan = work / "plan" / "plan.json"
    measured = ["--samples", 1, "--probes", PROBES, "--draws", 2, "--seed", args.seed, "--keep", args.keep]
    choose = ["--model", base, "--prompts", work / "plan_captions.txt", *measured, "--output", work / "plan"]
    given = (f"model.folder={base}", f"model.plan={plan}", f"data.latents={work / 'latents'}")
    student = f"model.student={work / 'exported/stage1' / TRANSFORMER}"
    stage1, stage2 = (f"num_steps={steps}" for steps in (args.stage1_steps, args.stage2_steps))
    return {
        "plan": Stage(
            "choose the blocks that stay",
            reader(work, "plan", "plan.json"),
            python("experiments.prune_plan", *choose),
            "plan",
        ),
        "cut_model": model_stage(args, "cut", "the model without the others", "--model", base, "--plan", plan),
        **clips_stage(args, "cut", work / "models/cut"),
        **train_stage(args, "stage1", "recover: the data's velocity", "prune.py:stage1-tiny", *given, stage1),
        **clips_stage(args, "stage1", base, "--transformer", work / "exported/stage1"),
        **train_stage(args, "stage2", "recover: teacher and features", "prune.py:stage2-tiny", *given, student, stage2),
        "pruned_model": model_stage(
            *(args, "pruned", "the model so far with it", "--model", base, "--transformer", work / "exported/stage2")
        ),
        **clips_stage(args, "pruned", work / "models/pruned"),
    }


def steps_stages(args: argparse.Namespace) -> Stages:
    """Distillation 4: one step a stage, on what the teacher itself generates; then the whole student."""
    work, base = args.workdir, args.workdir / "models/decoder"
    prompts = ["--toy-prompts", args.samples // PER_CAPTION, "--samples", PER_CAPTION]
    given = [*prompts, "--seed", SAMPLES_SEED + args.seed, "--batch", min(64, args.samples)]
    samples = ["--teacher-samples", *given, "--model", teacher_folder(args), "--output", work / "samples"]
    overrides = (
        f"model.folder={base}",
        f"model.student={work / 'models/pruned' / TRANSFORMER}",
        f"data.latents={work / 'samples'}",
        f"num_steps={args.dmd_steps}",
    )
    parts = ["--model", work / "models/pruned", "--transformer", work / "exported/dmd", *ONE_STEP]
    student = work / "models/student"
    return {
        "samples": Stage(
            "sample the teacher",
            reader(work, "samples", "teacher.json"),
            python("experiments.prepare", *samples),
            "samples",
        ),
        **train_stage(args, "dmd", "distil to one step a stage", "steps.py:tiny", *overrides),
        "student": model_stage(args, "student", "the whole student", *parts),
        **clips_stage(args, "student", student),
        **clips_stage(args, "hybrid", student, "--mode", "hybrid"),
    }


def describe_teacher(folder: Path) -> dict[str, Any]:
    """What is noted of the teacher."""
    return {"folder": str(folder), "parameters": assemble.count_parameters(folder)}


def write_captions(args: argparse.Namespace) -> dict[str, Any]:
    """captions.txt of the text encoder and plan_captions.txt, each of a seed of its own, and those of the videos."""
    from nd_jax.data.toy_prompts import toy_prompts

    captions = {
        "captions.txt": toy_prompts(args.captions, TEXT_SEED + args.seed),
        "plan_captions.txt": toy_prompts(args.plan_captions, PLAN_SEED + args.seed),
        quickstart_device.PROMPTS: quickstart_device.video_captions(args),
    }
    for name, lines in captions.items():
        write_text(args.workdir / name, "\n".join(lines) + "\n")
    return {name: len(lines) for name, lines in captions.items()}


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Writes results.json and report.html, and prints the table."""
    from experiments.quickstart_report import write_quickstart_report

    notes = read_results(args.workdir, stages(args))
    results = summarize_walk(notes, PARTS)
    write_text(args.workdir / RESULTS, json.dumps(results, indent=1) + "\n")
    path = args.workdir / "report.html"
    write_quickstart_report(path, args.workdir, args.seed, results, notes)
    print_table(results)
    return {"report": str(path)}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.quickstart",
        description="The whole paper at toy scale: four distillations, the student they make, its way to a chip.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="everything is written below it; a second run continues")
    add("--seed", type=int, default=0, help="of trainings and of what they learn from (default 0)")
    add("--soc", default="8-elite", help="chip, see converters.compile_hexagon (default 8-elite)")
    add("--keep", type=int, default=6, metavar="N", help="blocks that stay, the last one among them (default 6)")
    for name, (default, what) in SIZES.items():
        what = f"steps {what}" if name.endswith("steps") else what
        add(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N", help=f"{what} (default {default})")
    add_arguments(parser, NAMES)
    args = parser.parse_args(argv)
    for name in ("keep", *SIZES):
        least = LEAST.get(name, 1)
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: give at least {least}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args = parse(argv)
    run_walk("quickstart", args.workdir, stages(args), args.only, args.start)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
