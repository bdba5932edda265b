"""Videos from prompts.

    python -m experiments.generate --model DIR --prompts prompts.txt --output videos
    python -m experiments.generate --model DIR --prompts prompts.txt --output videos --image first.png
    python -m experiments.generate --model DIR --prompts prompts.txt --output videos --mode monolithic

A model folder is the released layout (nd_jax/generate/model_folder.py); its generation.json, if it has one, gives the
defaults of everything about the video. In mode hybrid the first frame is made from the prompt, or given. A folder with
a `quicksrnet` makes large videos. OUTPUT gets an MP4 per prompt and generate.json: settings, seconds of every part,
seconds of a call of the transformer per stage. The same command again makes what is missing and nothing else.
--capture DIR also keeps real inputs of every graph for the device (experiments/capture.py). docs/generate.md says more.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.generate_videos import LATENTS, PICTURE, SMALL, VIDEO, Job, Parts, make_videos
from nd_jax.errors import UserError, run_command

SUMMARY = "generate.json"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.generate",
        description="Make a video for every prompt; the same command again makes only what is missing.",
        epilog="What is not given comes from generation.json in the model folder, or is that of the released model.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="model folder in the released layout")
    add("--prompts", required=True, type=Path, metavar="FILE", help=".txt, one prompt a line, or .jsonl")
    add("--output", required=True, type=Path, metavar="DIR", help="MP4 files and generate.json go here")
    add("--mode", choices=("hybrid", "monolithic"), help="hybrid continues a first frame; monolithic makes all")
    add(
        "--image",
        type=Path,
        metavar="FILE",
        help="first frame of every video, for mode hybrid (default: made from each prompt)",
    )
    add("--seed", type=int, default=0, help="noise of all prompts (default 0)")
    add("--latents", action="store_true", help="also keep NAME.npy: normalised latents, float32 [T, h, w, C]")
    add("--keep-first-frames", action="store_true", help="also keep NAME.png: the first frame made from the prompt")
    add(
        "--super-resolution",
        choices=("off", "on", "both"),
        help="large videos; both: also NAME.small.mp4 (default on where the model has a quicksrnet)",
    )
    add_prompt_modifier(parser)
    add("--safety-frames", type=int, default=1, metavar="N", help="frames that are checked, 0 for none (default 1)")
    add("--batch", type=int, default=1, metavar="N", help="prompts at once (default 1)")
    add_sampling_options(parser)
    add("--shard", action="store_true", help="split every batch over all devices")
    add("--capture", type=Path, metavar="DIR", help="also write samples of every graph's inputs, to calibrate on")
    add("--capture-samples", type=int, default=32, metavar="N", help="of each graph (default 32)")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error("--batch must be at least 1")
    if not 0 <= args.seed < 2**32:
        parser.error("--seed must be from 0 to 4294967295")
    if args.safety_frames < 0:
        parser.error("--safety-frames must be 0 or more")
    if args.capture_samples < 1:
        parser.error("--capture-samples must be at least 1")
    return args


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options that stand in the place of a model folder's generation.json, and the choice of networks."""
    add = parser.add_argument
    add("--height", type=int, metavar="PIXELS", help="of the video (default 320)")
    add("--width", type=int, metavar="PIXELS", help="of the video (default 512)")
    add("--frames", type=int, metavar="N", help="8k + 1 video frames (default 49)")
    add("--steps", type=whole_numbers, metavar="A,B,C", help="Euler steps per stage, coarsest first")
    add("--first-steps", type=whole_numbers, metavar="A,B,C", help="the same for the first latent frame")
    add("--guidance", type=numbers, metavar="A,B", help="of the first latent frame and of the others; 1 is none")
    add("--negative-prompt", metavar="TEXT", help="what guidance leads away from (default empty)")
    add("--transformer", metavar="NAME", help="subfolder of the model, where it has several transformers")
    add("--dtype", choices=("bfloat16", "float32"), help="of the networks (default bfloat16; float32 on a CPU)")


def add_prompt_modifier(parser: argparse.ArgumentParser) -> None:
    """Of commands whose prompts are not also captions of what they make."""
    parser.add_argument("--prompt-modifier", metavar="TEXT", help="put behind every prompt (default empty)")


def open_chosen(args: argparse.Namespace, mode: str | None) -> Any:
    """The `ModelFolder` with what the options above read; sets the default of `args.dtype`."""
    import jax

    from nd_jax.generate.model_folder import open_model

    # XLA computes bfloat16 in float32 on a CPU and holds float32 copies of the weights: it would only cost.
    args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return open_model(
        args.model,
        args.transformer,
        mode=mode,
        height=args.height,
        width=args.width,
        video_frames=args.frames,
        steps=args.steps,
        first_steps=args.first_steps,
        guidance=args.guidance,
        prompt_modifier=getattr(args, "prompt_modifier", None),
        negative_prompt=args.negative_prompt,
    )


def whole_numbers(text: str) -> tuple[int, ...]:
    """Argument type A,B,...: whole numbers."""
    return tuple(int(part) for part in text.split(","))


def numbers(text: str) -> tuple[float, ...]:
    """Argument type A,B,...: numbers."""
    return tuple(float(part) for part in text.split(","))


def file_stem(id: int, prompt: str) -> str:
    """Name of a prompt's files: its id, its words as far as they are safe in a name, and a hash of all of it."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-")
    return "-".join(part for part in (f"{id:05d}", words, hashlib.sha256(prompt.encode()).hexdigest()[:8]) if part)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args = parse(argv)

    from nd_jax.data.prompts import PromptSource
    from nd_jax.files import write_text

    if args.capture is not None:
        from experiments.capture import capture_samples, is_captured

    model = open_chosen(args, args.mode)
    sampler = model.sampler()
    parts = open_parts(args, model)
    settings = video_settings(args, parts, sampler)
    prompts = PromptSource(args.prompts)
    jobs = [Job(id, prompt, args.output / file_stem(id, prompt)) for id, prompt in enumerate(prompts)]
    unsafe_before = _claim(args.output, settings).get("unsafe", [])
    to_capture = args.capture is not None and not is_captured(args.capture, args.capture_samples, settings)

    missing = [job for job in jobs if job.lacks(*parts.wanted)]
    result = {"settings": settings, "videos": len(jobs), "made": len(missing), "skipped": len(jobs) - len(missing)}
    if missing:
        if not parts.safety_frames:
            why = f"{args.model} has none" if args.safety_frames else "--safety-frames is 0"
            print(f"safety checker: off, {why}")
        result |= make_videos(args, parts, missing)
        if parts.safety_frames:
            result["unsafe"] = sorted({*unsafe_before, *result["unsafe"]})
        result["files"] = [str(job.file(suffix).relative_to(args.output)) for job in jobs for suffix in parts.wanted]
        write_text(args.output / SUMMARY, json.dumps(result, indent=2) + "\n")
        for what, calls in result["seconds_per_call"].items():
            shown = "  ".join(f"{part.replace('_', ' ')} {seconds:.3g}" for part, seconds in calls.items())
            of = "call of the first frame" if what == "first_frame" else f"transformer call, {what} units"
            print(f"seconds per {of}: {shown}")
    print(f"{len(missing)} videos made, {result['skipped']} there already: {args.output}")
    if to_capture:
        texts = {job.id: job.prompt for job in jobs}
        counts = capture_samples(model, texts, args.capture, args.capture_samples, args.seed, parts.image, settings)
        print(f"{sum(counts.values())} samples of {len(counts)} graphs: {args.capture}")
    return 0


def open_parts(args: argparse.Namespace, model: Any) -> Parts:
    """What goes with the transformer, as far as configs and files say.

    Args:
      args: image, keep_first_frames, latents, super_resolution and safety_frames, as `parse` gives them.
      model: the `ModelFolder`.

    Raises:
      UserError: options that do not go together, or an image or a component that is absent or damaged.
    """
    from nd_jax.generate import first_frame, safety, super_resolution
    from nd_jax.generate.videos import read_image

    settings, drawn, image = model.settings, None, None
    if args.image and model.mode != "hybrid":
        raise UserError(f"mode {model.mode} takes no image: leave --image out, or --mode hybrid")
    if args.image:
        image = read_image(args.image, settings.height, settings.width)
    elif model.mode == "hybrid":
        if not first_frame.has_first_frame(args.model):
            raise UserError(
                f"mode hybrid starts from an image, and {args.model} has no {first_frame.UNET_FOLDER} to make one: "
                "give --image, or --mode monolithic"
            )
        drawn = first_frame.open_first_frame(args.model)
        drawn.picture_size(settings.height, settings.width)
    if args.keep_first_frames and drawn is None:
        raise UserError("--keep-first-frames: no first frame is made from a prompt here; leave it out")
    large = args.super_resolution or ("on" if super_resolution.has_super_resolution(args.model) else "off")
    if large != "off":
        super_resolution.open_super_resolution(args.model)
    kept = {SMALL: large == "both", LATENTS: args.latents, PICTURE: args.keep_first_frames}
    wanted = (VIDEO, *(suffix for suffix, keep in kept.items() if keep))
    checked = args.safety_frames if safety.has_safety_checker(args.model) else 0
    if checked:
        safety.open_safety_checker(args.model)
    return Parts(model, drawn, image, large, checked, wanted)


def video_settings(args: argparse.Namespace, parts: Parts, sampler: Any) -> dict[str, Any]:
    """Everything that the numbers of a video depend on, beside its prompt and id; None for what is not used."""
    import dataclasses

    from nd_jax.generate.first_frame import STEPS

    image, model = None, parts.model
    if args.image:
        image = hashlib.sha256(args.image.read_bytes()).hexdigest()
    kept = ("height", "width", "video_frames", "frame_rate", "negative_prompt", "text_length")
    settings = {name: getattr(model.settings, name) for name in kept}
    sampling = {name: getattr(sampler, name) for name in ("mode", "steps", "guidance")}
    if model.mode == "monolithic":
        sampling |= {"first_steps": sampler.first_steps, "first_guidance": sampler.first_guidance}
    return {
        "model": str(args.model.resolve()),
        "transformer": model.parts["transformer"],
        "seed": args.seed,
        "dtype": args.dtype,
        "image": image,
        "first_frame_steps": STEPS if parts.first_frame else None,
        "super_resolution": None if parts.super_resolution == "off" else parts.super_resolution,
        "safety_frames": parts.safety_frames or None,
        "prompt_modifier": model.settings.prompt_modifier or None,
        **settings,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in sampling.items()},
        "function_evaluations": sampler.function_evaluations,
        "schedule": json.loads(json.dumps(dataclasses.asdict(sampler.schedule))),
    }


def _claim(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Makes the output folder, or checks that what it holds was made with the same settings; the last summary."""
    from nd_jax.files import write_text
    from nd_jax.weights.sources import read_json

    path = output / SUMMARY
    if path.exists():
        summary = read_json(path)
        before = summary.get("settings", {})
        unlike = [name for name in settings if before.get(name) != settings[name]]
        if unlike:
            raise UserError(
                f"{output}: its videos were made with {unlike[0]} {before.get(unlike[0])!r}, not "
                f"{settings[unlike[0]]!r}; choose another --output"
            )
        return summary
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be created ({error.strerror}); choose another --output") from error
    summary = {"settings": settings}
    write_text(path, json.dumps(summary, indent=2) + "\n")
    return summary


if __name__ == "__main__":
    sys.exit(run_command(main))
