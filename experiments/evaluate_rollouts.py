"""`experiments.evaluate rollouts`: what students make of a teacher's noise, latent frame by latent frame."""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.errors import UserError

RESULT, PICTURE, REPORT = "rollouts.json", "rollouts.png", "report.html"
TEACHER = "teacher"
# Prompts in the picture, and frames of each.
SHOWN, SHOWN_FRAMES = 4, 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--teacher", required=True, type=Path, metavar="DIR", help="model folder that makes all frames")
    add_student(parser)
    add("--output", required=True, type=Path, metavar="DIR", help=f"{RESULT}, {PICTURE} and {REPORT} go here")
    add("--prompts", type=Path, metavar="FILE", help=".txt, one prompt a line, or .jsonl")
    add("--toy-world", type=int, metavar="N", help="N captions of the toy world in the place of prompts")
    add("--seed", type=int, default=1000, help="of noise and toy captions (default 1000)")
    add("--batch", type=int, default=50, metavar="N", help="prompts at once, split over local devices (default 50)")
    add("--dtype", choices=("bfloat16", "float32"), help="of the networks (default bfloat16; float32 on a CPU)")


def add_student(parser: argparse.ArgumentParser) -> None:
    """--student, one or several."""
    what = "transformer, or folder with one; the rest is the teacher's; several may follow each other"
    parser.add_argument("--student", required=True, nargs="+", action="extend", type=Path, metavar="DIR", help=what)


def find_transformer(folder: Path) -> Path:
    """The component folder of the video transformer, absolute: the folder itself, or the one in a model folder.

    Raises:
      UserError: there is none, or several of which none is for rollouts that make all frames.
    """
    from nd_jax.generate.model_folder import find_transformer as find

    if (folder / "config.json").is_file():
        return folder.resolve()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a transformer, or a model folder with one")
    return (folder / find(folder, "monolithic")).resolve()


def student_names(students: Sequence[Path]) -> dict[str, Path]:
    """Name in results -> component folder: a student is called by the name of the folder that was given.

    Raises:
      UserError: two have one name, or one the teacher's.
    """
    names = [student.resolve().name for student in students]
    for name in names:
        if name == TEACHER or names.count(name) > 1:
            raise UserError(f"--student: {name} is the name of two models; give folders of different names")
    return {name: find_transformer(student) for name, student in zip(names, students, strict=True)}


def evaluate_rollouts(args: argparse.Namespace) -> dict[str, Any]:
    """Samples, compares, and writes what `add_arguments` says; returns what `rollouts.json` holds."""
    import jax
    import jax.numpy as jnp

    from nd_jax.evals.calibration import load_teacher
    from nd_jax.evals.rollouts import Ends, compare_rollouts, rollout_ends, summarize_rollouts, video_latents
    from nd_jax.files import write_text
    from nd_jax.generate.model_folder import ModelFolder, open_model
    from nd_jax.generate.pipeline import encode_prompts, video_decoder
    from nd_jax.train.sharding import make_mesh

    begin = time.perf_counter()
    if args.batch < 1:
        raise UserError(f"--batch is {args.batch}: use 1 or more")
    dtype = jnp.dtype(args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    folders = {TEACHER: open_model(args.teacher, mode="monolithic")}
    # All else of a student, its sampler too, is the teacher's.
    for name, transformer in student_names(args.student).items():
        folders[name] = open_model(args.teacher, str(transformer), mode="monolithic")
    teacher = folders[TEACHER]
    prompts = _prompts(args, teacher.settings)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.output}: cannot be created ({error.strerror}); choose another --output") from error

    sampler = teacher.sampler()
    guided = sampler.needs_negative
    text = encode_prompts(teacher, [*prompts, *[teacher.settings.negative_prompt] * guided], dtype)
    devices = jax.local_devices()[: math.gcd(args.batch, jax.local_device_count())]
    mesh = make_mesh({"data": -1}, devices) if len(devices) > 1 else None
    shown: dict[str, list[np.ndarray]] = {}
    reference: list[Ends] = []
    students: dict[str, Any] = {}
    decode = video_decoder(teacher, dtype)

    def sample(folder: ModelFolder) -> list[Ends]:
        """Every batch without the rows that fill it up; one transformer is in memory at a time."""
        network = load_teacher(folder, dtype, mesh)
        return [
            {place: array[:real] for place, array in rollout_ends(network, batch).items()}
            for batch, real in _batches(text, len(prompts), guided, args)
        ]

    for name, folder in folders.items():
        ends = sample(folder)
        latents = np.concatenate([video_latents(batch) for batch in ends])
        shown[name] = [np.stack(list(decode(video))) for video in latents[:SHOWN]]
        if name == TEACHER:
            reference = ends
            continue
        parts = [compare_rollouts(*pair) for pair in zip(reference, ends, strict=True)]
        students[name] = summarize_rollouts({key: np.concatenate([p[key] for p in parts]) for key in parts[0]})
        students[name]["blocks"] = folder.transformer.num_layers

    result = {
        "teacher": str(args.teacher),
        "blocks": teacher.transformer.num_layers,
        "prompts": len(prompts),
        "seed": args.seed,
        "dtype": str(dtype),
        "sampler": {key: getattr(sampler, key) for key in ("first_steps", "steps", "first_guidance", "guidance")},
        "students": students,
        "shown": prompts[:SHOWN],
        "seconds_total": round(time.perf_counter() - begin, 1),
    }
    _write_picture(args.output / PICTURE, shown)
    write_text(args.output / RESULT, json.dumps(result, indent=1) + "\n")
    _write_report(args.output, result)
    return result


def describe(args: argparse.Namespace, result: dict[str, Any]) -> str:
    """The closing line."""
    shown = "; ".join(
        f"{name} cosine {mean_and_spread(found['video_cosine'], 3)}" for name, found in result["students"].items()
    )
    return f"{result['prompts']} prompts: {shown}: {args.output / REPORT}"


def _prompts(args: argparse.Namespace, settings: Any) -> list[str]:
    from nd_jax.data.prompts import PromptSource
    from nd_jax.data.toy_world import ToyWorld

    if (args.toy_world is None) == (args.prompts is None):
        raise UserError("give --prompts or --toy-world, one of both")
    if args.prompts is not None:
        return list(PromptSource(args.prompts))
    if args.toy_world < 1:
        raise UserError(f"--toy-world is {args.toy_world}: use 1 or more")
    # Those of `experiments.evaluate toy-world`.
    world = ToyWorld(args.toy_world, args.seed, settings.video_frames, settings.height, settings.width)
    return [world[k]["caption"] for k in range(args.toy_world)]


def _batches(text: Any, count: int, guided: bool, args: argparse.Namespace) -> Iterator[tuple[Any, int]]:
    """(full batches, how many of their rows are prompts)."""
    import jax

    from nd_jax.evals.calibration import Batch

    negative = jax.tree.map(lambda x: x[count:], text) if guided else None
    for start in range(0, count, args.batch):
        real = np.arange(start, min(start + args.batch, count))
        rows = np.pad(real, (0, args.batch - len(real)), mode="edge")
        yield Batch(jax.tree.map(lambda x, rows=rows: x[rows], text), negative, rows, args.seed), len(real)


def _write_picture(path: Path, videos: Mapping[str, Sequence[np.ndarray]]) -> None:
    """A row per model; from left to right evenly spaced frames of every prompt."""
    from PIL import Image

    from nd_jax.files import replacing

    def strip(video: np.ndarray) -> np.ndarray:
        return np.concatenate(list(video[np.linspace(0, len(video) - 1, SHOWN_FRAMES).round().astype(int)]), axis=1)

    picture = np.concatenate([np.concatenate([strip(v) for v in row], axis=1) for row in videos.values()])
    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


# --- the report -------------------------------------------------------------------------------------------------------


def rollout_plots(result: Mapping[str, Any], labels: Mapping[str, str]) -> list[Any]:
    """Cosine and SNR of some students over the stages of all units.

    Args:
      result: of `evaluate_rollouts`.
      labels: student -> how the plot calls it.
    """
    from nd_jax.report.html import LinePlot, Series

    plots = []
    for key, y_label in (("cosine", "cosine"), ("snr_db", "SNR, dB")):
        series = []
        for name, label in labels.items():
            means = [value for unit in result["students"][name][key]["mean"] for value in unit]
            series.append(Series(label, list(range(len(means))), means))
        stages = len(next(iter(result["students"].values()))[key]["mean"][0])
        x_label = f"latent frame and stage: frame u ends stage s at {stages} u + s"
        plots.append(LinePlot(f"Against the teacher's latents: {y_label}", x_label, y_label, series))
    return plots


def rollout_image(folder: Path, result: Mapping[str, Any]) -> Any:
    """The picture as a block of a report."""
    from nd_jax.report.html import Image

    order, shown = ", ".join([TEACHER, *result["students"]]), "; ".join(result["shown"])
    caption = f"From the top: {order}. From the left: {shown}."
    return Image((folder / PICTURE).read_bytes(), "Frames of rollouts from the same noise", caption)


def mean_and_spread(value: Mapping[str, Any], digits: int) -> str:
    """A mean and its standard deviation, as text."""
    if value["mean"] is None:
        return "equal"
    return f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f}"


def _write_report(output: Path, result: Mapping[str, Any]) -> None:
    from nd_jax.report.html import Section, Table, Text, write_report

    students = result["students"]
    rows = [
        [name, f"{s['blocks']}", mean_and_spread(s["video_cosine"], 4), mean_and_spread(s["video_snr_db"], 2)]
        for name, s in students.items()
    ]
    blocks = [
        Table(["student", "blocks", "cosine", "SNR, dB"], rows, align="lrrr"),
        Text(f"Latents of whole videos, mean and standard deviation over {result['prompts']} prompts."),
        *rollout_plots(result, {name: name for name in students}),
        rollout_image(output, result),
    ]
    summary = {"Teacher": result["teacher"], "Its blocks": result["blocks"], "Prompts": result["prompts"]}
    write_report(output / REPORT, "Rollouts against the teacher", summary, [Section("From the same noise", blocks)])
