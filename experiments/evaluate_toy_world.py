"""Clips of the toy world, generated and read back: do they show what their captions say?"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.evaluate_rollouts import find_transformer
from experiments.generate import numbers, whole_numbers
from nd_jax.errors import UserError

RESULT, STRIPS = "toy_world.json", "strips.png"
# Clips in the picture, and frames of each.
SHOWN, SHOWN_FRAMES = 12, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
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


def evaluate_toy_world(args: argparse.Namespace) -> dict[str, Any]:
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
    transformer = None if args.transformer is None else str(find_transformer(args.transformer))
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


def describe(args: argparse.Namespace, result: dict[str, Any]) -> str:
    """The closing line."""
    rates = ", ".join(
        f"{name} {entry['rate']:.1%} (chance {result['chance'][name]:.1%})"
        for name, entry in result["accuracy"].items()
    )
    return f"{args.clips} clips: {rates}: {args.output / RESULT}"


def _write_strips(path: Path, videos: Sequence[Any]) -> None:
    """One row per clip, evenly spaced frames from left to right."""
    import numpy as np
    from PIL import Image

    from nd_jax.files import replacing

    frames = np.linspace(0, len(videos[0]) - 1, SHOWN_FRAMES).round().astype(int)
    picture = np.concatenate([np.concatenate(list(video[frames]), axis=1) for video in videos])
    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")
