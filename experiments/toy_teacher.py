"""The toy teacher from nothing: a video VAE, its latents, the pyramidal transformer, a model folder and its measures.

    python -m experiments.toy_teacher --workdir runs/toy_teacher [--seed N] [--only STAGE] [--from STAGE]
    python -m experiments.toy_teacher --workdir runs/real --videos DIR --captions FILE

Every stage is a command that you could type; the report shows it. A stage that is done is not run again: the same
command continues an interrupted walk. With --videos the same networks train on your videos; the captions of the toy
world are then not measured.
"""

import argparse
import dataclasses
import functools
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.stages import Stage, Stages, add_arguments, python, read_results, reader, run_walk
from experiments.toy_teacher_report import print_table, write_model_card, write_toy_teacher_report
from nd_jax.errors import UserError, run_command
from nd_jax.files import write_text

VAE_CONFIG = "experiments/configs/video_vae.py:tiny"
TEACHER_CONFIG = "experiments/configs/teacher.py:tiny"
TRAINING_CLIPS = 8000
GENERATION = {
    "height": 64,
    "width": 64,
    "video_frames": 17,
    "frame_rate": 8,
    "mode": "monolithic",
    "first_steps": [8, 8, 8],
    "steps": [8, 8, 8],
    "guidance": [3.0, 3.0],
    "text_length": 28,
}


@dataclasses.dataclass(frozen=True)
class Walk:
    """What the stages share.

    Attributes:
      workdir: everything is written below it.
      seed: of training; held-out captions have another.
      clips: toy clips that are encoded for the transformer.
      videos, captions: real videos in the place of the toy world, or None.
      compare: also train with the wrong objective.
      train: further arguments of the transformer's training.
      train_vae: further arguments of the VAE's training.
      frame_rate: of clips that are cut out of videos, per second.
    """

    workdir: Path
    seed: int
    clips: int
    videos: Path | None
    captions: Path | None
    compare: bool
    train: tuple[str, ...] = ()
    train_vae: tuple[str, ...] = ()
    frame_rate: float = GENERATION["frame_rate"]

    @property
    def generation(self) -> dict[str, Any]:
        """What generation.json says."""
        return GENERATION | {"frame_rate": self.frame_rate}


def stages(walk: Walk) -> Stages:
    """The walk, in order."""
    work = walk.workdir
    read = functools.partial(reader, work)
    if walk.videos is None:
        source, vae_source = ["--toy-world", walk.clips, "--seed", walk.seed], []
        size = []
    else:
        source = ["--videos", walk.videos, "--captions", walk.captions]
        flags = {"--frames": "video_frames", "--height": "height", "--width": "width", "--frame-rate": "frame_rate"}
        size = [text for flag, key in flags.items() for text in (flag, walk.generation[key])]
        vae_source = [f"--config.data.videos={walk.videos}", f"--config.data.captions={walk.captions}"]
        vae_source += ["--config.data.toy_clips=0", f"--config.data.frame_rate={walk.frame_rate}"]
    train = lambda config, folder, *given: python(
        "experiments.train", "--config", config, "--workdir", work / folder, f"--config.seed={walk.seed}", *given
    )
    export = lambda folder, model: python("converters.export_torch", "--checkpoint", work / folder, "--output", model)
    teacher = lambda folder, *given: train(
        TEACHER_CONFIG, folder, f"--config.data.latents={work / 'latents'}", *walk.train, *given
    )
    prepare = python("experiments.prepare", *source, *size, "--model", work / "vae_model", "--update-normalization")
    from_frames = f"--config.model.folder={work / 'frames_model' / 'causal_video_vae'}"
    walked = {
        "frames": Stage(
            "train the video VAE on single frames",
            read("frames", "result.json"),
            train(VAE_CONFIG + "-frames", "frames", *vae_source, *walk.train_vae),
            "frames",
        ),
        "frames_export": Stage(
            "write its folder",
            lambda: _sizes(work / "frames_model"),
            export("frames", work / "frames_model"),
            "frames_model",
        ),
        "vae": Stage(
            "train it on clips",
            read("vae", "result.json"),
            train(VAE_CONFIG, "vae", from_frames, *vae_source, *walk.train_vae),
            "vae",
        ),
        "vae_export": Stage(
            "write its folder", lambda: _sizes(work / "vae_model"), export("vae", work / "vae_model"), "vae_model"
        ),
        "latents": Stage("encode the clips", lambda: {}, [*prepare, "--output", str(work / "latents")], "latents"),
        "teacher": Stage("train the transformer", read("teacher", "result.json"), teacher("teacher"), "teacher"),
        "export": Stage(
            "write the model folder",
            lambda: complete_folder(walk, work / "model"),
            export("teacher", work / "model"),
            "model",
        ),
    }
    if walk.videos is None:
        walked |= measures(walk, "")
    if walk.compare:
        wrong = teacher("wrong", "--config.objective.coupling=independent")
        walked["wrong"] = Stage("the same with the wrong objective", read("wrong", "result.json"), wrong, "wrong")
        walked["wrong_export"] = Stage(
            "write its model folder",
            lambda: complete_folder(walk, work / "wrong_model"),
            export("wrong", work / "wrong_model"),
            "wrong_model",
        )
        if walk.videos is None:
            walked |= measures(walk, "wrong_")
    return walked | {"report": Stage("write the report", lambda: report(walk), always=True)}


def measures(walk: Walk, prefix: str) -> Stages:
    """Generated clips of held-out captions, and what an untrained transformer makes of them."""
    work = walk.workdir
    evaluate = lambda model, name: python(
        "experiments.evaluate", "toy-world", "--model", work / model, "--output", work / name
    )
    read = lambda name: reader(work, name, "toy_world.json")
    measured = {
        f"{prefix}clips": Stage(
            "generate clips and read them",
            read(f"{prefix}clips"),
            evaluate(f"{prefix}model", f"{prefix}clips"),
            f"{prefix}clips",
        )
    }
    if not prefix:
        measured["untrained_model"] = Stage("the same networks before training", lambda: write_untrained(walk))
        measured["untrained"] = Stage(
            "generate and read clips of these",
            read("untrained"),
            evaluate("untrained_model", "untrained"),
            "untrained",
        )
    return measured


def complete_folder(walk: Walk, model: Path) -> dict[str, Any]:
    """Adds the VAE and generation.json to an exported transformer: a whole model folder. Returns its sizes."""
    shutil.copytree(walk.workdir / "vae_model" / "causal_video_vae", model / "causal_video_vae", dirs_exist_ok=True)
    write_text(model / "generation.json", json.dumps(walk.generation, indent=2) + "\n")
    return _sizes(model)


def _sizes(model: Path) -> dict[str, Any]:
    """Bytes of the weights of every component."""
    return {path.parent.name: path.stat().st_size for path in sorted(model.glob("*/*.safetensors"))}


def write_untrained(walk: Walk) -> dict[str, Any]:
    """A model folder with the transformer and text networks as training found them."""
    import jax

    from nd_jax.distill.registry import build_method
    from nd_jax.train.checkpoint import CONFIG_FILE
    from nd_jax.weights.folder import save_component

    source, target = walk.workdir / "model", walk.workdir / "untrained_model"
    method = build_method(json.loads((walk.workdir / "teacher" / CONFIG_FILE).read_text()))
    params = jax.device_get(jax.jit(method.roles["denoiser"].init)())
    for name, (network, config, tree) in method.deploy({"denoiser": params}).items():
        save_component(target / name, network, config, tree)
    for tokenizer in source.glob("tokenizer*"):
        shutil.copytree(tokenizer, target / tokenizer.name, dirs_exist_ok=True)
    return complete_folder(walk, target)


def report(walk: Walk) -> dict[str, Any]:
    """Writes report.html and the model folder's README, and prints the table."""
    done = read_results(walk.workdir, stages(walk))
    path = walk.workdir / "report.html"
    write_toy_teacher_report(path, walk.workdir, walk.seed, done)
    if walk.videos is None:
        write_model_card(walk.workdir / "model" / "README.md", walk.workdir, walk.seed, done)
        print_table(done)
    return {"report": str(path)}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    names = ("frames", "frames_export", "vae", "vae_export", "latents", "teacher", "export", "clips")
    names += ("untrained_model", "untrained", "wrong", "wrong_export", "wrong_clips", "report")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.toy_teacher",
        description="Train the toy teacher: video VAE -> latents -> transformer -> model folder -> measured clips.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="everything is written below it; a second run continues")
    add("--seed", type=int, default=0, help="of training (default 0)")
    add("--clips", type=int, default=TRAINING_CLIPS, help=f"toy clips to train on (default {TRAINING_CLIPS})")
    add("--videos", type=Path, metavar="DIR", help="train on these videos in the place of the toy world")
    add("--captions", type=Path, metavar="FILE", help="their captions, see experiments.prepare")
    rate = GENERATION["frame_rate"]
    add(
        "--frame-rate", type=float, default=rate, metavar="F", help=f"of clips of --videos, per second (default {rate})"
    )
    add("--compare", action="store_true", help="also train with the wrong objective (independent noise per stage)")
    add("--train", action="append", default=[], metavar="ARG", help="further argument of the transformer's training")
    add("--train-vae", action="append", default=[], metavar="ARG", help="further argument of the VAE's training")
    add_arguments(parser, names)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if (args.videos is None) != (args.captions is None):
        raise UserError("--videos and --captions go together: give both or neither")
    walk = Walk(
        *(args.workdir, args.seed, args.clips, args.videos, args.captions, args.compare),
        *(tuple(args.train), tuple(args.train_vae), args.frame_rate),
    )
    run_walk("toy teacher", args.workdir, stages(walk), args.only, args.start)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
