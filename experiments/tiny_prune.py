"""Block pruning of a tiny teacher from the plan to the table: recoveries, random choices beside the plan, a report.

    python -m experiments.tiny_prune --teacher DIR --workdir runs/prune [--seed N] [--keep 6] [--only|--from STAGE]

Every stage is a command that you could type, or a function for what has no command; the report shows the commands. A
stage that is done is not run again: the same command continues an interrupted walk. DIR is a model folder of the toy
world that makes all frames, such as experiments/models/toy_teacher.
"""

import argparse
import functools
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import evaluate_rollouts, evaluate_toy_world, evaluate_velocity
from experiments.stages import Stage, Stages, add_arguments, python, read_results, reader, run_walk
from experiments.tiny_prune_report import RESULTS, print_table, summarize_walk, write_prune_report
from nd_jax.errors import UserError, run_command
from nd_jax.files import write_text

CONFIG = "experiments/configs/prune.py"
TRANSFORMER = "diffusion_transformer_320p"
# Training -> (variant of the config, whether it goes on from stage 1, further arguments).
WITHOUT_FEATURES = ("--config.loss.image_weight=0.0", "--config.loss.text_weight=0.0")
TRAININGS = {
    "stage1": ("stage1-tiny", False, ()),
    "stage2_alone": ("stage2-tiny", False, ()),
    "stage2": ("stage2-tiny", True, ()),
    "stage2_no_features": ("stage2-tiny", True, WITHOUT_FEATURES),
}
STUDENTS = ("pruned", *TRAININGS)
RANDOM = tuple(f"random_{k}" for k in range(5))
SAMPLES = 2  # of every calibration prompt
BATCH = 50  # clips that are sampled at once
# Added to the seed: clips that are trained on, and prompts of the plan. Evaluations use captions and noise of 1000.
CLIPS_SEED, PROMPTS_SEED = 2000, 3000

NAMES = ("latents", "prompts", "plan", "choices")
NAMES += tuple(name for training in TRAININGS for name in (training, f"{training}_export"))
CLIPS = tuple(f"clips_{name}" for name in ("teacher", *STUDENTS, "plan", *RANDOM))
NAMES += ("velocity", "rollouts", *CLIPS, "report")


def stages(args: argparse.Namespace) -> Stages:
    """The walk, in order."""
    work, teacher = args.workdir, args.teacher
    latents = args.latents or work / "latents"
    read = functools.partial(reader, work)
    model = lambda name: work / "models" / name
    walked: Stages = {}
    if args.latents is None:
        toy = ["--toy-world", args.training_clips, "--seed", CLIPS_SEED + args.seed]
        prepare = python("experiments.prepare", *toy, "--model", teacher, "--output", latents)
        walked["latents"] = Stage("encode the clips", lambda: {}, prepare, "latents")
    walked["prompts"] = Stage("write prompts for the plan", lambda: write_prompts(args))
    prompts = ["--prompts", work / "prompts.txt", "--samples", SAMPLES, "--seed", args.seed]
    plan = python(
        "experiments.prune_plan", "--model", teacher, *prompts, "--keep", args.keep, "--output", work / "plan"
    )
    walked["plan"] = Stage("choose the blocks that stay", read("plan", "plan.json"), plan, "plan")
    walked["choices"] = Stage("cut students out of the teacher, by the plan and at random", lambda: cut_students(args))

    for name, (variant, continues, more) in TRAININGS.items():
        given = [f"--config.seed={args.seed}", f"--config.model.folder={teacher}", f"--config.data.latents={latents}"]
        given.append(f"--config.model.plan={work / 'plan' / 'plan.json'}")
        if continues:
            given.append(f"--config.model.student={model('stage1') / TRANSFORMER}")
        steps = args.stage1_steps if name == "stage1" else args.stage2_steps
        given += [] if steps is None else [f"--config.num_steps={steps}"]
        command = ["--config", f"{CONFIG}:{variant}", "--workdir", work / name, *given, *more, *args.train]
        walked[name] = Stage(f"train: {name}", read(name, "result.json"), python("experiments.train", *command), name)
        export = python("converters.export_torch", "--checkpoint", work / name, "--output", model(name))
        walked[f"{name}_export"] = Stage(
            "write its folder", read("models", name, "export.json"), export, f"models/{name}"
        )

    batch = lambda count: ["--batch", min(count, BATCH)]
    students = ["--student", *map(model, (*STUDENTS, *RANDOM))]
    measure = lambda what, *given: python("experiments.evaluate", what, *given, "--output", work / what)
    walked["velocity"] = Stage(
        "measure velocities on held-out states",
        read("velocity", evaluate_velocity.RESULT),
        measure("velocity", "--run", work / "stage1", *students),
        "velocity",
    )
    walked["rollouts"] = Stage(
        "sample beside the teacher",
        read("rollouts", evaluate_rollouts.RESULT),
        measure("rollouts", "--teacher", teacher, *students, "--toy-world", args.rollouts, *batch(args.rollouts)),
        "rollouts",
    )
    # The plan's student once more on as few clips as the random ones, so that they are compared on the same captions.
    cut = {"plan": "pruned"} | {name: name for name in RANDOM}
    for name in ("teacher", *STUDENTS, *cut):
        clips = args.random_clips if name in cut else args.clips
        other = [] if name == "teacher" else ["--transformer", model(cut.get(name, name))]
        command = ["--model", teacher, *other, "--clips", clips, *batch(clips), "--output", work / "clips" / name]
        walked[f"clips_{name}"] = Stage(
            f"generate clips and read them: {name}",
            read("clips", name, evaluate_toy_world.RESULT),
            python("experiments.evaluate", "toy-world", *command),
            f"clips/{name}",
        )
    return walked | {"report": Stage("write the report", lambda: report(args), always=True)}


def write_prompts(args: argparse.Namespace) -> dict[str, Any]:
    """prompts.txt: different captions of a seed of their own."""
    from nd_jax.data.toy_prompts import toy_prompts

    captions = toy_prompts(args.prompts, PROMPTS_SEED + args.seed)
    write_text(args.workdir / "prompts.txt", "\n".join(captions) + "\n")
    return {"count": len(captions), "seed": PROMPTS_SEED + args.seed}


def cut_students(args: argparse.Namespace) -> dict[str, Any]:
    """Model folders of transformers without the plan's blocks, and without as many random ones: name -> removed."""
    from nd_jax.distill.pruning_plan import PruningPlan, read_plan, write_plan
    from nd_jax.models.mmdit import keep_blocks
    from nd_jax.weights.folder import load_component, save_component

    plan = read_plan(args.workdir / "plan" / "plan.json")
    whole = load_component(args.teacher / TRANSFORMER)
    plans = {"pruned": plan}
    for name, removed in zip(RANDOM, random_choices(plan, len(RANDOM), args.seed), strict=True):
        kept = tuple(k for k in range(plan.num_layers) if k not in removed)
        why = dict.fromkeys(removed, f"drawn at random, seed {args.seed}")
        plans[name] = PruningPlan(plan.num_layers, kept, "random", why)
    for name, choice in plans.items():
        folder = args.workdir / "models" / name
        params, config = keep_blocks(whole.params, whole.config, choice.kept)
        save_component(folder / TRANSFORMER, whole.network, config, params)
        write_plan(folder / "plan.json", choice)
    return {name: list(choice.removed) for name, choice in plans.items()}


def random_choices(plan: Any, count: int, seed: int) -> list[tuple[int, ...]]:
    """Removed blocks of `count` different choices of the plan's size, none of them the plan's own or with the last one.

    Raises:
      UserError: there are fewer.
    """
    choices = list(itertools.combinations(range(plan.num_layers - 1), len(plan.removed)))
    others = [choice for choice in choices if choice != plan.removed]
    if len(others) < count:
        raise UserError(
            f"{len(plan.removed)} of {plan.num_layers} blocks can be removed in {len(others)} other ways, and {count} "
            "random ones are compared: use a teacher of more blocks, or another --keep"
        )
    order = np.random.default_rng(seed).permutation(len(others))[:count]
    return [others[k] for k in order]


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Writes results.json and report.html, and prints the table."""
    notes = read_results(args.workdir, stages(args))
    results = summarize_walk(notes)
    write_text(args.workdir / RESULTS, json.dumps(results, indent=1) + "\n")
    path = args.workdir / "report.html"
    write_prune_report(path, args.workdir, args.seed, results, notes)
    print_table(results)
    return {"report": str(path)}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tiny_prune",
        description="Prune a tiny teacher by a plan, recover it in several ways, and measure all of them.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--teacher", type=Path, required=True, metavar="DIR", help="model folder of the toy world")
    add("--workdir", type=Path, required=True, help="everything is written below it; a second run continues")
    add("--seed", type=int, default=0, help="of trainings, plan and random choices (default 0)")
    add("--keep", type=int, default=6, metavar="N", help="blocks that stay, the last one among them (default 6)")
    add("--latents", type=Path, metavar="DIR", help="folder of experiments.prepare with this teacher; made by default")
    add("--training-clips", type=int, default=6000, metavar="N", help="toy clips that are encoded (default 6000)")
    add("--prompts", type=int, default=32, metavar="N", help="captions that the plan samples (default 32)")
    add("--stage1-steps", type=int, metavar="N", help="of stage 1 (default: the config's)")
    add("--stage2-steps", type=int, metavar="N", help="of every stage 2 (default: the config's)")
    add("--clips", type=int, default=200, metavar="N", help="generated and read for every model (default 200)")
    add("--random-clips", type=int, default=100, metavar="N", help="likewise for random choices (default 100)")
    add("--rollouts", type=int, default=50, metavar="N", help="prompts of latents beside the teacher's (default 50)")
    add("--train", action="append", default=[], metavar="ARG", help="further argument of all trainings")
    add_arguments(parser, NAMES)
    args = parser.parse_args(argv)
    for name in ("keep", "training_clips", "prompts", "clips", "random_clips", "rollouts"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: give at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args = parse(argv)
    if not (args.teacher / TRANSFORMER).is_dir():
        raise UserError(f"{args.teacher}: has no {TRANSFORMER}; give a model folder of experiments.toy_teacher")
    run_walk("tiny prune", args.workdir, stages(args), args.only, args.start)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
