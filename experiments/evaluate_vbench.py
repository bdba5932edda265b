"""`experiments.evaluate vbench-generate`: the videos that VBench looks at, for all prompts and five samples of each.

DIR gets nothing but `{prompt}-{sample}.mp4`, since VBench takes any other file there for a video. Settings and seconds
are in DIR.json, and what an interrupted run had made of unfinished videos in DIR.work, both beside DIR; the same
command goes on with it. A finished video is moved into DIR and never made again.

The noise of a video comes from the seed, the prompt and the number of the sample alone, so it does not matter which
process makes it, or what else is in the files of prompts. Processes share the work by `--num-processes N
--process-id k` on one file system and know nothing of each other.
"""

import argparse
import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from nd_jax.errors import UserError

# Videos whose unfinished parts lie in DIR.work, and whose texts in memory, at once.
TOGETHER = 512


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    from experiments.generate import add_prompt_modifier, add_sampling_options

    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="model folder in the released layout")
    what = "VBench_full_info.json, .txt with a prompt a line, or .jsonl; several may follow each other"
    add("--prompts", required=True, nargs="+", action="extend", type=Path, metavar="FILE", help=what)
    add("--output", required=True, type=Path, metavar="DIR", help="{prompt}-{sample}.mp4 go here")
    add_dimension(parser, "the prompts of these alone (default all)")
    add("--augmented", type=Path, metavar="FILE", help=".txt with a text for the model in the place of every prompt")
    add("--samples", type=int, default=5, metavar="N", help="of every prompt (default 5, as many as VBench reads)")
    add("--mode", choices=("hybrid", "monolithic"), help="hybrid continues a first frame; monolithic makes all")
    add("--image", type=Path, metavar="FILE", help="first frame of every video (default: made from each prompt)")
    add("--super-resolution", choices=("off", "on"), help="large videos (default on where the model has a quicksrnet)")
    add("--seed", type=int, default=0, help="of the noise (default 0)")
    add("--batch", type=int, default=1, metavar="N", help="videos at once (default 1)")
    add_sampling_options(parser)
    add_prompt_modifier(parser)
    add("--shard", action="store_true", help="split every batch over all devices")
    add("--num-processes", type=int, default=1, help="how many processes share the work")
    add("--process-id", type=int, default=0, help="which one this is, from 0")
    # What VBench measures is a video, not whether a checker blackened it.
    parser.set_defaults(latents=False, keep_first_frames=False, safety_frames=0)


def add_dimension(parser: argparse.ArgumentParser, what: str) -> None:
    """--dimension, one or several."""
    parser.add_argument("--dimension", nargs="+", action="extend", default=[], metavar="NAME", help=what)


def noise_id(prompt: str, sample: int) -> int:
    """The id, below 2^32, that with the seed decides the noise of a video.

    VBench's 4720 videos have 4720 different ones; where two collide, two prompts get the same noise, which is harmless.
    """
    return int.from_bytes(hashlib.sha256(f"{sample} {prompt}".encode()).digest()[:4], "little")


def check_arguments(args: argparse.Namespace) -> None:
    for name in ("samples", "batch", "num_processes"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}: use 1 or more")
    if not 0 <= args.process_id < args.num_processes:
        raise UserError(f"--process-id {args.process_id} is not below --num-processes {args.num_processes}")
    if not 0 <= args.seed < 2**32:
        raise UserError(f"--seed is {args.seed}: use 0 to 4294967295")


def beside(output: Path, suffix: str) -> Path:
    """A path of the folder's name and a suffix, next to the folder."""
    output = output.resolve()
    return output.with_name(output.name + suffix)


def open_generator(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """(parts of the pipeline, everything that a video depends on beside its prompt and sample)."""
    from experiments import generate

    model = generate.open_chosen(args, args.mode)
    parts = generate.open_parts(args, model)
    return parts, generate.video_settings(args, parts, model.sampler())


def vbench_generate(args: argparse.Namespace) -> dict[str, Any]:
    """Makes this process's missing videos; returns what `DIR.json` holds."""
    from experiments.generate import file_stem
    from experiments.generate_videos import VIDEO, Job, make_videos
    from nd_jax.evals.vbench_prompts import read_prompts, video_name
    from nd_jax.files import write_text

    check_arguments(args)
    prompts = read_prompts(args.prompts, args.dimension, args.augmented)
    parts, settings = open_generator(args)
    if args.augmented:
        settings["augmented"] = hashlib.sha256(args.augmented.read_bytes()).hexdigest()
    work, record = beside(args.output, ".work"), beside(args.output, ".json")
    claim(args.output, settings)

    jobs: dict[Path, Job] = {}
    for sample in range(args.samples):
        for prompt, text, _ in prompts:
            id = noise_id(prompt, sample)
            jobs[args.output / video_name(prompt, sample)] = Job(id, text, work / file_stem(id, prompt))
    mine = list(jobs)[args.process_id :: args.num_processes]
    # An earlier run was stopped between making them and moving them.
    collect({path: jobs[path] for path in mine if not path.exists() and not jobs[path].lacks(VIDEO)})
    missing = [path for path in mine if not path.exists()]
    result = {"settings": settings, "prompts": len(prompts), "samples": args.samples, "videos": len(jobs)}
    result |= {"made": len(missing), "skipped": len(mine) - len(missing), "runs": []}
    for start in range(0, len(missing), TOGETHER):
        work.mkdir(exist_ok=True)
        some = {path: jobs[path] for path in missing[start : start + TOGETHER]}
        result["runs"].append(make_videos(args, parts, list(some.values())))
        collect(some)
    result["missing"] = sum(not path.exists() for path in jobs)
    if not result["missing"]:
        clear(work, {job.stem.name for job in jobs.values()})
    write_text(record, json.dumps(result, indent=1) + "\n")
    return result


def claim(output: Path, settings: dict[str, Any]) -> None:
    """Makes the output folder, or checks that its videos were made with the same settings.

    Raises:
      UserError: they were not, nobody knows, or the folder cannot be made.
    """
    from nd_jax.files import write_text
    from nd_jax.weights.sources import read_json

    record = beside(output, ".json")
    settings = json.loads(json.dumps(settings))
    if record.exists():
        before = read_json(record).get("settings", {})
        unlike = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if unlike:
            raise UserError(
                f"{output}: its videos were made with {unlike[0]} {before.get(unlike[0])!r}, not "
                f"{settings.get(unlike[0])!r}; choose another --output"
            )
    try:
        output.mkdir(parents=True, exist_ok=True)
        other = next((path.name for path in output.iterdir() if path.suffix != ".mp4" or not record.exists()), None)
        if output.resolve().stat().st_dev != record.parent.stat().st_dev:
            raise UserError(f"{output}: is a file system of its own; give a folder inside of it as --output")
    except OSError as error:
        raise UserError(f"{output}: cannot be created ({error.strerror}); choose another --output") from error
    if other is not None:
        raise UserError(f"{output}: holds {other}, which this command did not make; choose an empty --output")
    if not record.exists():
        write_text(record, json.dumps({"settings": settings}, indent=1) + "\n")


def collect(jobs: dict[Path, Any]) -> None:
    """Moves finished videos to their places."""
    from experiments.generate_videos import VIDEO

    for path, job in jobs.items():
        try:
            os.replace(job.file(VIDEO), path)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror}); check the disk and the name") from error


def clear(work: Path, stems: set[str]) -> None:
    """Removes what killed writers left of some jobs, and the folder if nothing of others is in it."""
    for path in work.glob(".*.tmp"):
        if path.name[1:].split(".")[0] in stems:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        work.rmdir()


def describe_generate(args: argparse.Namespace, result: dict[str, Any]) -> str:
    """The closing line."""
    left = f", {result['missing']} left to other processes" if result["missing"] else ""
    return f"{result['made']} videos made, {result['skipped']} there already{left}: {args.output}"
