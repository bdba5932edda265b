"""The tiny decoder from a teacher's video VAE: latents, training, model folder, measures, report.

    python -m experiments.tiny_decoder --teacher DIR --workdir runs/decoder [--seed N] [--only STAGE] [--from STAGE]
    python -m experiments.tiny_decoder --teacher DIR --workdir runs/real --videos DIR --captions FILE

Every stage is a command that you could type; the report shows it. A stage that is done is not run again: the same
command continues an interrupted walk. DIR is a model folder with `causal_video_vae`.
"""

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.evaluate_decoder import PICTURE, RESULT, VIDEO
from experiments.stages import Stage, Stages, add_arguments, python, read_results, reader, run_walk
from nd_jax.errors import UserError, run_command

CONFIG = "experiments/configs/decoder.py:tiny"
NAMES = ("latents", "train", "export", "measure", "report")
TRAINING_CLIPS, HELD_OUT_CLIPS = 2048, 64
FRAME_RATE = 8
MEASURES = {"psnr_db": "PSNR, dB", "ssim": "SSIM", "flicker": "flicker", "lpips": "LPIPS"}


def stages(args: argparse.Namespace) -> Stages:
    """The walk, in order."""
    work, vae = args.workdir, args.teacher / "causal_video_vae"
    read = functools.partial(reader, work)
    if args.videos is None:
        source, measured = ["--toy-world", TRAINING_CLIPS, "--seed", args.seed], ["--toy-world", HELD_OUT_CLIPS]
        data = [f"--config.data.toy_clips={TRAINING_CLIPS}"]
    else:
        source = ["--videos", args.videos, "--captions", args.captions, "--frame-rate", args.frame_rate]
        measured = source
        source = [*source, "--frames", 17, "--height", 64, "--width", 64]
        data = [f"--config.data.videos={args.videos}", f"--config.data.captions={args.captions}"]
        data += ["--config.data.toy_clips=0", f"--config.data.frame_rate={args.frame_rate}"]
    latents = python("experiments.prepare", *source, "--model", vae, "--output", work / "latents")
    given = [f"--config.seed={args.seed}", f"--config.model.folder={vae}", f"--config.data.latents={work / 'latents'}"]
    given += [*data, *args.train]
    train = python("experiments.train", "--config", CONFIG, "--workdir", work / "train", *given)
    export = python("converters.export_torch", "--checkpoint", work / "train", "--output", work / "model")
    folders = ["--student", work / "model", "--native", args.teacher, "--output", work / "measure"]
    measure = python("experiments.evaluate", "decoder", *folders, *measured)
    return {
        "latents": Stage("encode the clips", lambda: {}, latents, "latents"),
        "train": Stage("train the tiny decoder", read("train", "result.json"), train, "train"),
        "export": Stage("write its folder", read("model", "export.json"), export, "model"),
        "measure": Stage("decode clips by both decoders", read("measure", RESULT), measure, "measure"),
        "report": Stage("write the report", lambda: report(args), always=True),
    }


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Writes report.html."""
    path = args.workdir / "report.html"
    write_decoder_report(path, args.workdir, args.videos is not None, read_results(args.workdir, stages(args)))
    return {"report": str(path)}


def write_decoder_report(path: Path, workdir: Path, real: bool, notes: Mapping[str, Mapping[str, Any]]) -> None:
    """One self-contained page: measures, curves, pictures and videos side by side."""
    from nd_jax.report.curves import metric_series
    from nd_jax.report.html import Command, Image, LinePlot, Section, Table, Text, Video, write_report

    result = notes["measure"]["result"]
    decoders = [name for name in ("native", "student") if name in result]
    student, native = result["student"], result["native"]
    series = lambda key, label: metric_series(workdir / "train", key, label)
    shown = [name for name in MEASURES if name in student]
    cell = lambda value: f"{value['mean']:.3f} ± {value['std']:.3f}"
    table = [
        [name, f"{result[name]['parameters']:,}", *(cell(result[name][key]) for key in shown)] for name in decoders
    ]
    where = (
        "These clips are of the videos that training saw, too: read the training's held-out curve for others."
        if real
        else "Clips of a seed that training never saw."
    )
    order = ", ".join(result["shown"])
    measures = [
        Table(["decoder", "parameters", *(MEASURES[key] for key in shown)], table, align="l" + "r" * (len(shown) + 1)),
        Text(
            f"{result['clips']} clips, mean and standard deviation over clips. {where} Flicker is how far the changes "
            "from frame to frame are from those of the input."
        ),
        Image((workdir / "measure" / PICTURE).read_bytes(), "Frames side by side", f"From the left: {order}."),
    ]
    for k in range(3):
        if (file := workdir / "measure" / VIDEO.format(k)).is_file():
            measures.append(Video(file.read_bytes(), f"From the left: {order}.", f"Clip {k}"))
    psnr = [series("eval/psnr_db", "student"), series("eval/native_psnr_db", "native decoder")]
    curves = [
        LinePlot("Reconstruction, held-out clips", "step", "PSNR, dB", psnr),
        LinePlot("Loss", "step", "loss", [series("train/loss", "loss")], log_y=True),
    ]
    summary = {
        "PSNR, student": f"{student['psnr_db']['mean']:.2f} dB",
        "PSNR, native decoder": f"{native['psnr_db']['mean']:.2f} dB",
        "Parameters": f"{student['parameters']:,} of {native['parameters']:,}",
        "Total time": f"{sum(note['seconds'] for note in notes.values()) / 60:.0f} min",
    }
    commands = [Command(note["command"]) for note in notes.values() if "command" in note]
    sections = [Section("Measures", measures), Section("Training", curves), Section("Commands", commands)]
    write_report(path, "nd_jax: tiny decoder", summary, sections)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.tiny_decoder",
        description="Train a tiny decoder behind the encoder of a teacher's video VAE, and measure it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--teacher", type=Path, required=True, metavar="DIR", help="model folder with causal_video_vae")
    add("--workdir", type=Path, required=True, help="everything is written below it; a second run continues")
    add("--seed", type=int, default=0, help="of training (default 0)")
    add("--videos", type=Path, metavar="DIR", help="train on these videos in the place of the toy world")
    add("--captions", type=Path, metavar="FILE", help="captions file that selects among the videos")
    text = f"of clips of --videos, per second (default {FRAME_RATE})"
    add("--frame-rate", type=float, default=FRAME_RATE, metavar="F", help=text)
    add("--train", action="append", default=[], metavar="ARG", help="further argument of the training")
    add_arguments(parser, NAMES)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args = parse(argv)
    if (args.videos is None) != (args.captions is None):
        raise UserError("--videos and --captions go together: give both or neither")
    run_walk("tiny decoder", args.workdir, stages(args), args.only, args.start)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
