"""Videos from prompts.

    python -m experiments.generate --model DIR --prompts prompts.txt --output videos --mode hybrid --image first.png
    python -m experiments.generate --model DIR --prompts prompts.txt --output videos --mode monolithic

A model folder is the released layout (nd_jax/generate/model_folder.py); its generation.json, if it has one, gives the
defaults of everything about the video. OUTPUT gets an MP4 per prompt and generate.json: settings, seconds of every
part, seconds of a call of the transformer per stage. The same command again makes what is missing and nothing else.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nd_jax.errors import UserError, run_command

SUMMARY = "generate.json"


class Job(NamedTuple):
    """One prompt; its id is its place among the prompts, and together with the seed it decides the noise."""

    id: int
    prompt: str
    video: Path
    latents: Path


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
    add("--mode", choices=("hybrid", "monolithic"), help="hybrid continues --image; monolithic makes all frames")
    add("--image", type=Path, metavar="FILE", help="first frame of every video, for mode hybrid")
    add("--seed", type=int, default=0, help="noise of all prompts (default 0)")
    add("--latents", action="store_true", help="also keep NAME.npy: normalised latents, float32 [T, h, w, C]")
    add("--batch", type=int, default=1, metavar="N", help="prompts at once (default 1)")
    add_sampling_options(parser)
    add("--shard", action="store_true", help="split every batch over all devices")
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error("--batch must be at least 1")
    if not 0 <= args.seed < 2**32:
        parser.error("--seed must be from 0 to 4294967295")
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


def open_chosen(args: argparse.Namespace, mode: str | None) -> Any:
    """The `ModelFolder` with what `add_sampling_options` read; sets the default of `args.dtype`."""
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

    model = open_chosen(args, args.mode)
    sampler = model.sampler()
    if (args.image is None) == (model.mode == "hybrid"):
        remedy = "give --image, or --mode monolithic" if args.image is None else "leave --image out, or --mode hybrid"
        raise UserError(f"mode {model.mode} {'starts from an image' if args.image is None else 'takes none'}: {remedy}")
    settings = _settings(args, model, sampler)
    prompts = PromptSource(args.prompts)
    jobs = []
    for id, prompt in enumerate(prompts):
        stem = args.output / file_stem(id, prompt)
        jobs.append(Job(id, prompt, stem.with_name(stem.name + ".mp4"), stem.with_name(stem.name + ".npy")))
    _claim(args.output, settings)

    wanted = lambda job: [job.video, job.latents] if args.latents else [job.video]
    missing = [job for job in jobs if not all(path.exists() for path in wanted(job))]
    result = {"settings": settings, "videos": len(jobs), "made": len(missing), "skipped": len(jobs) - len(missing)}
    if missing:
        result |= _make(args, model, missing)
        result["files"] = [str(path.relative_to(args.output)) for job in jobs for path in wanted(job)]
        write_text(args.output / SUMMARY, json.dumps(result, indent=2) + "\n")
        for units, stages in result["seconds_per_call"].items():
            shown = "  ".join(f"{stage.replace('_', ' ')} {seconds:.3g}" for stage, seconds in stages.items())
            print(f"seconds per transformer call, {units} units: {shown}")
    print(f"{len(missing)} videos made, {result['skipped']} there already: {args.output}")
    return 0


def _settings(args: argparse.Namespace, model: Any, sampler: Any) -> dict[str, Any]:
    """Everything that the numbers of a video depend on, beside its prompt and id."""
    import dataclasses

    image = None
    if args.image:
        try:
            image = hashlib.sha256(args.image.read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{args.image}: cannot be read ({error.strerror}); check --image") from error
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
        **settings,
        **{name: list(value) if isinstance(value, tuple) else value for name, value in sampling.items()},
        "function_evaluations": sampler.function_evaluations,
        "schedule": json.loads(json.dumps(dataclasses.asdict(sampler.schedule))),
    }


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Makes the output folder, or checks that what it holds was made with the same settings."""
    from nd_jax.files import write_text
    from nd_jax.weights.sources import read_json

    path = output / SUMMARY
    if path.exists():
        before = read_json(path).get("settings", {})
        unlike = [name for name in settings if before.get(name) != settings[name]]
        if unlike:
            raise UserError(
                f"{output}: its videos were made with {unlike[0]} {before.get(unlike[0])!r}, not "
                f"{settings[unlike[0]]!r}; choose another --output"
            )
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be created ({error.strerror}); choose another --output") from error
    write_text(path, json.dumps({"settings": settings}, indent=2) + "\n")


def _make(args: argparse.Namespace, model: Any, jobs: list[Job]) -> dict[str, Any]:
    """The pipeline over the missing files: (timings, memory). Latents lie in files between transformer and decoder."""
    import resource
    import time

    import jax
    import jax.numpy as jnp

    from nd_jax.generate import pipeline
    from nd_jax.generate.videos import read_image, write_video
    from nd_jax.train.sharding import make_mesh

    begin, dtype, timings = time.perf_counter(), jnp.dtype(args.dtype), pipeline.Timings()
    mesh = make_mesh({"data": -1}) if args.shard else None
    to_sample = [job for job in jobs if not job.latents.exists()]
    to_decode = [job for job in jobs if not job.video.exists()]
    image = read_image(args.image, model.settings.height, model.settings.width) if args.image else None
    with _progress() as bar:
        if to_sample:
            sampler = model.sampler()
            bar.phase("text", len(to_sample))
            # The last row is the negative prompt's.
            texts = [job.prompt for job in to_sample]
            texts += [model.settings.negative_prompt] if sampler.needs_negative else []
            text = pipeline.encode_prompts(model, texts, dtype, timings, bar.advance)
            negative = jax.tree.map(lambda x: x[-1:], text) if sampler.needs_negative else None
            first_frame = None
            if image is not None:
                bar.phase("first frame", 1)
                first_frame = pipeline.encode_first_frame(model, image, dtype, timings)
            batches = -(-len(to_sample) // args.batch)
            bar.phase("latents", batches * len(sampler.sampled_units) * sampler.video.stages)
            done = iter(to_sample)
            for batch in pipeline.sample_latents(
                model,
                jax.tree.map(lambda x: x[: len(to_sample)], text),
                [job.id for job in to_sample],
                args.seed,
                negative,
                first_frame,
                args.batch,
                dtype,
                mesh,
                timings,
                lambda end: bar.advance(),
            ):
                for latents in batch:
                    _save_array(next(done).latents, latents)
        if to_decode:
            bar.phase("frames", len(to_decode))
            decode = pipeline.video_decoder(model, dtype, timings)
            for job in to_decode:
                write_video(job.video, decode(_load_array(job.latents)), model.settings.frame_rate)
                if not args.latents:
                    job.latents.unlink()
                bar.advance()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "prompts_per_call": args.batch,
        "devices": jax.device_count() if mesh is not None else 1,
        "device": jax.devices()[0].device_kind,
        **timings.summary(),
        "seconds_total": round(time.perf_counter() - begin, 3),
        "peak_memory_gib": round(peak, 3),
    }


def _save_array(path: Path, array: Any) -> None:
    import numpy as np

    from nd_jax.files import replacing

    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def _load_array(path: Path) -> Any:
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not an array that can be read; delete it, it will be made again") from error


class _Bar:
    """One bar a phase on a terminal, elsewhere a line when it begins."""

    def __init__(self, progress: Any):
        self._progress, self._task = progress, None

    def phase(self, name: str, total: int) -> None:
        self._task = self._progress.add_task(name, total=total)
        if self._progress.disable:
            print(f"{name}: {total} to do", flush=True)

    def advance(self) -> None:
        self._progress.advance(self._task)


def _progress() -> Any:
    import contextlib

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())

    @contextlib.contextmanager
    def bar() -> Iterator[_Bar]:
        with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            yield _Bar(progress)

    return bar()


if __name__ == "__main__":
    sys.exit(run_command(main))
