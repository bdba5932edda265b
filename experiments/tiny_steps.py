"""Step distillation of a tiny teacher: its own samples, the students, what they make of captions, a report.

    python -m experiments.tiny_steps --teacher DIR --workdir runs/steps [--seed N] [--only|--from STAGE]

Every stage is a command that you could type; the report shows it. A stage that is done is not run again: the same
command continues an interrupted walk. DIR is a model folder of the toy world that makes all frames, such as
experiments/models/toy_teacher; --student takes a pruned transformer of it to start from.
"""

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import evaluate_steps, evaluate_toy_world
from experiments.stages import Stage, Stages, add_arguments, python, read_results, reader, run_walk
from experiments.tiny_steps_report import RESULTS, print_table, summarize_walk, write_steps_report
from nd_jax.errors import UserError, run_command
from nd_jax.files import write_text

CONFIG = "experiments/configs/steps.py"
TRANSFORMER = "diffusion_transformer_320p"
# Student -> (variant of the config, its steps a stage).
TRAININGS = {
    "finetune": ("finetune-tiny", 1),
    "progressive": ("progressive-tiny", 1),
    "dmd": ("tiny", 1),
    "dmd4": ("tiny", 4),
}
# Clips of the teacher: label -> further arguments; its own settings first.
NO_GUIDANCE = ("--guidance", "1,1")
TEACHERS = {"teacher": (), "teacher_111": ("--steps", "1,1,1", *NO_GUIDANCE)}
BATCH = 50  # clips that are sampled at once
# Added to the seed of the captions that the teacher samples. Evaluations use captions and noise of 1000.
PROMPTS_SEED = 4000

NAMES = ("latents",)
NAMES += tuple(name for training in TRAININGS for name in (training, f"{training}_export"))
NAMES += tuple(f"clips_{name}" for name in (*TEACHERS, *TRAININGS))
NAMES += (*(f"predictions_{name}" for name in TRAININGS), "report")


def stages(args: argparse.Namespace) -> Stages:
    """The walk, in order."""
    work, teacher = args.workdir, args.teacher
    latents = args.latents or work / "latents"
    read = functools.partial(reader, work)
    walked: Stages = {}
    if args.latents is None:
        given = ["--toy-prompts", args.prompts, "--samples", args.samples, "--seed", PROMPTS_SEED + args.seed]
        given += ["--batch", min(64, args.prompts * args.samples), "--model", teacher, "--output", latents]
        samples = python("experiments.prepare", "--teacher-samples", *given)
        walked["latents"] = Stage("sample the teacher", read("latents", "teacher.json"), samples, "latents")

    guidance = json.loads((teacher / "generation.json").read_text())["guidance"]
    for name, (variant, count) in TRAININGS.items():
        given = [f"--config.seed={args.seed}", f"--config.model.folder={teacher}", f"--config.data.latents={latents}"]
        given += [f"--config.objective.steps={(count,) * 3}", f"--config.model.guidance={tuple(guidance)}"]
        given += [] if args.student is None else [f"--config.model.student={args.student}"]
        command = ["--config", f"{CONFIG}:{variant}", "--workdir", work / name, *given, *args.train]
        walked[name] = Stage(f"train: {name}", read(name, "result.json"), python("experiments.train", *command), name)
        export = python("converters.export_torch", "--checkpoint", work / name, "--output", work / "models" / name)
        walked[f"{name}_export"] = Stage(
            "write its model folder",
            lambda name=name, count=count: complete_folder(args, name, count),
            export,
            f"models/{name}",
        )

    folders = {name: (teacher, more) for name, more in TEACHERS.items()}
    folders |= {name: (work / "models" / name, ()) for name in TRAININGS}
    for name, (folder, more) in folders.items():
        command = ["--model", folder, *more, "--clips", args.clips, "--batch", min(args.clips, BATCH)]
        walked[f"clips_{name}"] = Stage(
            f"generate clips and read them: {name}",
            read("clips", name, evaluate_toy_world.RESULT),
            python("experiments.evaluate", "toy-world", *command, "--output", work / "clips" / name),
            f"clips/{name}",
        )
    for name in TRAININGS:
        command = ["steps", "--run", work / name, "--output", work / "predictions" / name]
        walked[f"predictions_{name}"] = Stage(
            f"draw predictions side by side: {name}",
            read("predictions", name, evaluate_steps.RESULT),
            python("experiments.evaluate", *command),
            f"predictions/{name}",
        )
    return walked | {"report": Stage("write the report", lambda: report(args), always=True)}


def complete_folder(args: argparse.Namespace, name: str, count: int) -> dict[str, Any]:
    """Makes an exported student a whole model folder: the teacher's other networks, and its own steps, unguided."""
    folder = args.workdir / "models" / name
    exported = json.loads((folder / "export.json").read_text())
    for source in args.teacher.iterdir():
        if source.is_dir() and not (folder / source.name).exists():
            shutil.copytree(source, folder / source.name)
    settings = json.loads((args.teacher / "generation.json").read_text())
    settings |= {"first_steps": [count] * 3, "steps": [count] * 3, "guidance": [1.0, 1.0]}
    write_text(folder / "generation.json", json.dumps(settings, indent=2) + "\n")
    return exported


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Writes results.json and report.html, and prints the table."""
    notes = read_results(args.workdir, stages(args))
    results = summarize_walk(notes)
    write_text(args.workdir / RESULTS, json.dumps(results, indent=1) + "\n")
    path = args.workdir / "report.html"
    write_steps_report(path, args.workdir, args.seed, results, notes)
    print_table(results)
    return {"report": str(path)}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tiny_steps",
        description="Distil a tiny teacher to few steps in several ways, and measure all of them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--teacher", type=Path, required=True, metavar="DIR", help="model folder of the toy world")
    add("--workdir", type=Path, required=True, help="everything is written below it; a second run continues")
    add("--student", type=Path, metavar="DIR", help="transformer that students start from (default: the teacher's)")
    add("--seed", type=int, default=0, help="of trainings and of the teacher's samples (default 0)")
    add("--latents", type=Path, metavar="DIR", help="folder of experiments.prepare --teacher-samples; made by default")
    add(
        "--prompts",
        type=int,
        default=288,
        metavar="N",
        help="different captions that the teacher samples (default 288)",
    )
    add("--samples", type=int, default=4, metavar="K", help="of every caption (default 4)")
    add("--clips", type=int, default=200, metavar="N", help="generated and read for every model (default 200)")
    add("--train", action="append", default=[], metavar="ARG", help="further argument of all trainings")
    add_arguments(parser, NAMES)
    args = parser.parse_args(argv)
    for name in ("prompts", "samples", "clips"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}: give at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args = parse(argv)
    for needed in (TRANSFORMER, "generation.json"):
        if not (args.teacher / needed).exists():
            raise UserError(f"{args.teacher}: has no {needed}; give a model folder of experiments.toy_teacher")
    run_walk("tiny steps", args.workdir, stages(args), args.only, args.start)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
