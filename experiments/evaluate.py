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
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments import (
    evaluate_decoder,
    evaluate_rollouts,
    evaluate_steps,
    evaluate_vbench,
    evaluate_vbench_scores,
    evaluate_velocity,
)
from experiments.generate import numbers, whole_numbers
from nd_jax.errors import UserError, run_command

RESULT, STRIPS = "toy_world.json", "strips.png"
# Clips in the picture, and frames of each.
SHOWN, SHOWN_FRAMES = 12, 5


# Command -> what its line in the help says, its description, and what adds its options; `toy-world` is in this file.
COMMANDS = {
    "decoder": (
        "how well does a tiny decoder do beside the one that it stands in for?",
        "Decode the latents of clips by a tiny decoder and by its native one, and compare.",
        evaluate_decoder.add_arguments,
    ),
    "rollouts": (
        "how far are students' latents from a teacher's?",
        "Sample with a teacher and its students from the same noise, and compare latents.",
        evaluate_rollouts.add_arguments,
    ),
    "velocity": (
        "what are the errors of transformers on held-out states?",
        "Measure transformers on the held-out states of a training of `prune`.",
        evaluate_velocity.add_arguments,
    ),
    "steps": (
        "what do student, teacher and fake model make of the same rows?",
        "Draw predictions of a training of `steps` side by side.",
        evaluate_steps.add_arguments,
    ),
    "vbench-generate": (
        "make the videos that VBench looks at",
        "Make {prompt}-{sample}.mp4 for all prompts; the same command again makes only what is missing.",
        evaluate_vbench.add_generate_arguments,
    ),
    "vbench-score": (
        "score such videos with the vbench package",
        "Score videos in VBench's dimensions; the same command again scores only what is missing.",
        evaluate_vbench_scores.add_score_arguments,
    ),
    "vbench-total": (
        "what is VBench's total of such scores?",
        "Quality, semantic and total score as on VBench's leaderboard.",
        evaluate_vbench_scores.add_total_arguments,
    ),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.evaluate", description="Measure a model folder.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    toy = commands.add_parser(
        "toy-world",
        help="do generated clips show what their captions say?",
        description="Generate clips of toy captions and read them back.",
        allow_abbrev=False,
    )
    add = toy.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="model folder in the released layout")
    add("--output", required=True, type=Path, metavar="DIR", help=f"{RESULT}, {STRIPS} and clip-*.mp4 go here")
    what = "transformer in the place of the model's, or a folder with one"
    add("--transformer", type=Path, metavar="DIR", help=what)
    what = "hybrid: go on from first frames that the world draws (default monolithic: the model makes all frames)"
    add("--mode", choices=("hybrid", "monolithic"), default="monolithic", help=what)
    add("--steps", type=whole_numbers, metavar="A,B,C", help="of all latent frames (default: generation.json's)")
    add("--guidance", type=numbers, metavar="A,B", help="of the first latent frame and of the others; 1 is none")
    add("--clips", type=int, default=200, metavar="N", help="how many (default 200)")
    add("--seed", type=int, default=1000, help="of captions and noise (default 1000)")
    add("--batch", type=int, default=50, metavar="N", help="clips at once (default 50)")
    for name, (question, description, add_arguments) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=question, description=description, allow_abbrev=False))
    return parser.parse_args(argv)


def toy_world(args: argparse.Namespace) -> dict[str, Any]:
    """Generates, reads and writes; returns what `toy_world.json` holds."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from nd_jax.data.toy_checker import accuracy
    from nd_jax.data.toy_features import features, frechet_distance
    from nd_jax.data.toy_prompts import ATTRIBUTES, COLOURS, DIRECTIONS, SHAPES, SPEEDS
    from nd_jax.data.toy_world import ToyWorld
    from nd_jax.files import write_text
    from nd_jax.generate import pipeline
    from nd_jax.generate.model_folder import open_model
    from nd_jax.generate.videos import write_video

    if args.clips < 2:
        raise UserError(f"--clips is {args.clips}: use 2 or more")
    begin = time.perf_counter()
    transformer = None if args.transformer is None else str(evaluate_rollouts.find_transformer(args.transformer))
    chosen = {"steps": args.steps, "first_steps": args.steps, "guidance": args.guidance}
    model = open_model(args.model, transformer, mode=args.mode, **chosen)
    try:  # Before the work, not behind it.
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.output}: cannot be created ({error.strerror}); choose another --output") from error
    settings, sampler = model.settings, model.sampler()
    world = ToyWorld(args.clips, args.seed, settings.video_frames, settings.height, settings.width)
    captions = [world[k]["caption"] for k in range(args.clips)]
    timings = pipeline.Timings()
    text = pipeline.encode_prompts(model, [*captions, settings.negative_prompt], jnp.float32, timings)
    prompts, negative = (jax.tree.map(lambda x, part=part: x[part], text) for part in (slice(-1), slice(-1, None)))
    first = None
    if args.mode == "hybrid":
        drawn = (world[k]["video"][0].astype(np.float32) / 127.5 - 1 for k in range(args.clips))
        first = pipeline.encode_first_frames(model, drawn, jnp.float32, timings)
    batches = pipeline.sample_latents(
        model, prompts, range(args.clips), args.seed, negative, first, args.batch, jnp.float32, None, timings
    )
    latents = [row for batch in batches for row in batch]
    # Once without the clock: what it compiles is kept, and the seconds below are of decoding.
    list(pipeline.video_decoder(model, jnp.float32)(latents[0]))
    decode = pipeline.video_decoder(model, jnp.float32, timings)
    videos = [np.stack(list(decode(row))) for row in latents]

    choices = dict(zip(ATTRIBUTES, (COLOURS, SHAPES, DIRECTIONS, SPEEDS), strict=True))
    chance = {name: 1 / len(words) for name, words in choices.items()}
    drawn = np.stack([features(world[k]["video"]) for k in range(args.clips)])
    result = {
        "model": str(args.model),
        "transformer": str(args.transformer or model.parts["transformer"]),
        "mode": args.mode,
        "clips": args.clips,
        "seed": args.seed,
        "sampler": {name: getattr(sampler, name) for name in ("first_steps", "steps", "first_guidance", "guidance")},
        "function_evaluations": sampler.function_evaluations,
        "accuracy": accuracy(videos, captions),
        "chance": chance | {"all": float(np.prod(list(chance.values())))},
        "frechet_distance": frechet_distance(np.stack([features(video) for video in videos]), drawn),
        **timings.summary(),
        "seconds_total": round(time.perf_counter() - begin, 1),
    }
    for k, video in enumerate(videos[:SHOWN]):
        write_video(args.output / f"clip-{k:02d}.mp4", video, settings.frame_rate)
    _write_strips(args.output / STRIPS, videos[:SHOWN])
    result["shown"] = captions[:SHOWN]
    write_text(args.output / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def _write_strips(path: Path, videos: Sequence[Any]) -> None:
    """One row per clip, evenly spaced frames from left to right."""
    import numpy as np
    from PIL import Image

    from nd_jax.files import replacing

    frames = np.linspace(0, len(videos[0]) - 1, SHOWN_FRAMES).round().astype(int)
    picture = np.concatenate([np.concatenate(list(video[frames]), axis=1) for video in videos])
    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args = parse(argv)
    if args.command == "decoder":
        result = evaluate_decoder.evaluate_decoder(args)
        names = [name for name in ("student", "native") if name in result]
        shown = "; ".join(
            f"{n} {result[n]['psnr_db']['mean']:.2f} dB, SSIM {result[n]['ssim']['mean']:.3f}" for n in names
        )
        print(f"{result['clips']} clips: {shown}: {args.output / evaluate_decoder.RESULT}")
        return 0
    if args.command == "rollouts":
        result = evaluate_rollouts.evaluate_rollouts(args)
        shown = "; ".join(
            f"{name} cosine {evaluate_rollouts.mean_and_spread(found['video_cosine'], 3)}"
            for name, found in result["students"].items()
        )
        print(f"{result['prompts']} prompts: {shown}: {args.output / evaluate_rollouts.REPORT}")
        return 0
    if args.command == "velocity":
        result = evaluate_velocity.evaluate_velocity(args)
        shown = "; ".join(f"{name} {found['velocity_error']:.4f}" for name, found in result["models"].items())
        print(f"velocity error of {result['rows']} rows: {shown}: {args.output / evaluate_velocity.RESULT}")
        return 0
    if args.command == "steps":
        result = evaluate_steps.evaluate_steps(args)
        shown = ", ".join(result["columns"])
        print(f"step {result['step']}: {shown}: {args.output / evaluate_steps.PICTURE}")
        return 0
    if args.command == "vbench-generate":
        print(evaluate_vbench.describe_generate(args, evaluate_vbench.vbench_generate(args)))
        return 0
    if args.command == "vbench-score":
        print(evaluate_vbench_scores.describe_score(args, evaluate_vbench_scores.vbench_score(args)))
        return 0
    if args.command == "vbench-total":
        print(evaluate_vbench_scores.describe_total(args, evaluate_vbench_scores.vbench_total(args)))
        return 0
    result = toy_world(args)
    rates = ", ".join(
        f"{name} {entry['rate']:.1%} (chance {result['chance'][name]:.1%})"
        for name, entry in result["accuracy"].items()
    )
    print(f"{args.clips} clips: {rates}: {args.output / RESULT}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
