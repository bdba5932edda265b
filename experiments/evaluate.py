"""Measures of a model folder.

    python -m experiments.evaluate toy-world --model DIR --output DIR [--clips 200] [--seed 1000]
    python -m experiments.evaluate decoder --student DIR --native DIR --toy-world 64 --output DIR
    python -m experiments.evaluate rollouts --teacher DIR --student DIR [DIR ...] --prompts FILE --output DIR
    python -m experiments.evaluate velocity --run DIR --student DIR [DIR ...] --output DIR
    python -m experiments.evaluate steps --run DIR --output DIR
    python -m experiments.evaluate vbench-generate --model DIR --prompts FILE [FILE ...] --output DIR
    python -m experiments.evaluate vbench-score --videos DIR --output FILE
    python -m experiments.evaluate vbench-total --scores FILE [FILE ...]

toy-world   makes a clip for every caption of a toy world that training never saw and reads colour, shape, direction and
            speed back (nd_jax/data/toy_checker.py): accuracy with 95 % intervals beside chance, a Frechet distance to
            drawn clips, and a picture of the first ones. For models that were trained on the toy world. In mode hybrid
            the first frames are the world's own, which stands in for a model of pictures.
decoder     decodes the latents of clips by a tiny decoder and by the one that it stands in for: PSNR, SSIM, flicker
            and, with its weights, LPIPS; a picture and videos with all of them side by side.
rollouts    samples with a teacher and its students from the same noise: cosine and SNR of the latents for every latent
            frame and stage, a report, and a picture with all of them side by side.
velocity    errors of transformers on the held-out states of a training of `prune`.
steps       a picture of what student, teacher and fake model of a training of `steps` make of the same held-out rows.
vbench-*    videos for VBench, its scores, and its quality, semantic and total score (docs/evaluation.md).
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

from experiments import (
    evaluate_decoder,
    evaluate_rollouts,
    evaluate_steps,
    evaluate_toy_world,
    evaluate_vbench,
    evaluate_vbench_scores,
    evaluate_velocity,
)
from nd_jax.errors import run_command


@dataclasses.dataclass(frozen=True)
class Command:
    """One measure.

    Attributes:
      question: its line in the help.
      description: the first line of its own help.
      add_arguments: adds its options to a parser.
      evaluate: options -> result; writes files.
      describe: options and result -> the closing line.
    """

    question: str
    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    evaluate: Callable[[argparse.Namespace], dict[str, Any]]
    describe: Callable[[argparse.Namespace, dict[str, Any]], str]


COMMANDS = {
    "toy-world": Command(
        "do generated clips show what their captions say?",
        "Generate clips of toy captions and read them back.",
        evaluate_toy_world.add_arguments,
        evaluate_toy_world.evaluate_toy_world,
        evaluate_toy_world.describe,
    ),
    "decoder": Command(
        "how well does a tiny decoder do beside the one that it stands in for?",
        "Decode the latents of clips by a tiny decoder and by its native one, and compare.",
        evaluate_decoder.add_arguments,
        evaluate_decoder.evaluate_decoder,
        evaluate_decoder.describe,
    ),
    "rollouts": Command(
        "how far are students' latents from a teacher's?",
        "Sample with a teacher and its students from the same noise, and compare latents.",
        evaluate_rollouts.add_arguments,
        evaluate_rollouts.evaluate_rollouts,
        evaluate_rollouts.describe,
    ),
    "velocity": Command(
        "what are the errors of transformers on held-out states?",
        "Measure transformers on the held-out states of a training of `prune`.",
        evaluate_velocity.add_arguments,
        evaluate_velocity.evaluate_velocity,
        evaluate_velocity.describe,
    ),
    "steps": Command(
        "what do student, teacher and fake model make of the same rows?",
        "Draw predictions of a training of `steps` side by side.",
        evaluate_steps.add_arguments,
        evaluate_steps.evaluate_steps,
        evaluate_steps.describe,
    ),
    "vbench-generate": Command(
        "make the videos that VBench looks at",
        "Make {prompt}-{sample}.mp4 for all prompts; the same command again makes only what is missing.",
        evaluate_vbench.add_generate_arguments,
        evaluate_vbench.vbench_generate,
        evaluate_vbench.describe_generate,
    ),
    "vbench-score": Command(
        "score such videos with the vbench package",
        "Score videos in VBench's dimensions; the same command again scores only what is missing.",
        evaluate_vbench_scores.add_score_arguments,
        evaluate_vbench_scores.vbench_score,
        evaluate_vbench_scores.describe_score,
    ),
    "vbench-total": Command(
        "what is VBench's total of such scores?",
        "Quality, semantic and total score as on VBench's leaderboard.",
        evaluate_vbench_scores.add_total_arguments,
        evaluate_vbench_scores.vbench_total,
        evaluate_vbench_scores.describe_total,
    ),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.evaluate", description="Measure a model folder.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(
            commands.add_parser(name, help=command.question, description=command.description, allow_abbrev=False)
        )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args = parse(argv)
    command = COMMANDS[args.command]
    print(command.describe(args, command.evaluate(args)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
