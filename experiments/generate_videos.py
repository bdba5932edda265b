"""The work of `experiments.generate`: the parts of the pipeline in turn, over all prompts that lack something.

    NAME.first.npy    latents of the first frame         UNet
    NAME.png          the first frame                    image decoder
    NAME.npy          normalised latents                 transformer
    NAME.small.mp4    the video as the decoder makes it  where super-resolution makes another one and both are wanted
    NAME.mp4          the video

Each part writes what it made, so an interrupted run goes on where it was; what nobody asked for is deleted when its
video is complete.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nd_jax.errors import UserError

PICTURE_LATENTS, PICTURE, LATENTS, SMALL, VIDEO = SUFFIXES = (".first.npy", ".png", ".npy", ".small.mp4", ".mp4")


class Job(NamedTuple):
    """One prompt; its id is its place among the prompts, and together with the seed it decides the noise."""

    id: int
    prompt: str
    stem: Path

    def file(self, suffix: str) -> Path:
        return self.stem.with_name(self.stem.name + suffix)

    def lacks(self, *suffixes: str) -> bool:
        return not all(self.file(suffix).exists() for suffix in suffixes)


class Parts(NamedTuple):
    """What makes the videos, beside the transformer.

    Attributes:
      model: the `ModelFolder`.
      first_frame: a `FirstFrameModel`, or None where an image is given or the transformer makes all frames.
      image: float32 [H, W, 3] in [-1, 1], the first frame of every video, or None.
      super_resolution: "off", "on" or "both".
      safety_frames: how many frames of a video the safety checker looks at; 0 for no checker.
      wanted: suffixes of the files that are to stay.
    """

    model: Any
    first_frame: Any
    image: Any
    super_resolution: str
    safety_frames: int
    wanted: tuple[str, ...]


def make_videos(args: argparse.Namespace, parts: Parts, jobs: Sequence[Job], progress: Any = None) -> dict[str, Any]:
    """Makes what the jobs lack: timings, memory, and the ids that the safety checker flagged.

    `progress` has the methods of `_Bar` and takes its place: phase(name, total), and advance() after each of the total.
    """
    import resource
    import time

    import jax
    import jax.numpy as jnp

    from nd_jax.generate.parts import Timings
    from nd_jax.generate.sampler import check_rows
    from nd_jax.train.sharding import make_mesh

    begin, dtype, timings = time.perf_counter(), jnp.dtype(args.dtype), Timings()
    mesh = make_mesh({"data": -1}) if args.shard else None
    if mesh is not None:
        check_rows(args.batch, mesh)
    to_decode = [job for job in jobs if job.lacks(*{VIDEO, SMALL}.intersection(parts.wanted))]
    to_sample = [job for job in jobs if job.lacks(LATENTS) and (job in to_decode or LATENTS in parts.wanted)]
    to_draw = [job for job in jobs if job.lacks(PICTURE) and (job in to_sample or PICTURE in parts.wanted)]
    unsafe = None
    with _progress() if progress is None else contextlib.nullcontext(progress) as bar:
        if parts.first_frame is not None and to_draw:
            draw_first_frames(args, parts, to_draw, dtype, mesh, timings, bar)
        if to_sample:
            sample_videos(args, parts, to_sample, dtype, mesh, timings, bar)
        if to_decode:
            unsafe = decode_videos(parts, to_decode, dtype, timings, bar)
    for job in jobs:
        tidy(job, parts.wanted)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "prompts_per_call": args.batch,
        "devices": jax.device_count() if mesh is not None else 1,
        "device": jax.devices()[0].device_kind,
        **timings.summary(),
        "seconds_total": round(time.perf_counter() - begin, 3),
        "peak_memory_gib": round(peak, 3),
        **({} if unsafe is None else {"unsafe": unsafe}),
    }


def draw_first_frames(
    args: argparse.Namespace, parts: Parts, jobs: Sequence[Job], dtype: Any, mesh: Any, timings: Any, bar: Any
) -> None:
    """NAME.png of every job."""
    from nd_jax.generate import first_frame
    from nd_jax.generate.videos import to_picture, write_picture

    model, settings = parts.first_frame, parts.model.settings
    size = model.picture_size(settings.height, settings.width)
    to_denoise = [job for job in jobs if job.lacks(PICTURE_LATENTS)]
    if to_denoise:
        bar.phase("first frame: text", len(to_denoise))
        texts = [job.prompt + settings.prompt_modifier for job in to_denoise]
        text = first_frame.encode_prompts(model, texts, dtype, timings, bar.advance)
        bar.phase("first frame: latents", -(-len(to_denoise) // args.batch) * first_frame.STEPS)
        ids, done = [job.id for job in to_denoise], iter(to_denoise)
        for batch in first_frame.sample_latents(
            model, text, ids, args.seed, size, args.batch, dtype, mesh, timings, bar.advance
        ):
            for latents in batch:
                _save_array(next(done).file(PICTURE_LATENTS), latents)
    bar.phase("first frame: pictures", len(jobs))
    decode = first_frame.image_decoder(model, dtype, timings)
    for job in jobs:
        write_picture(job.file(PICTURE), to_picture(decode(_load_array(job.file(PICTURE_LATENTS)))))
        job.file(PICTURE_LATENTS).unlink()
        bar.advance()


def sample_videos(
    args: argparse.Namespace, parts: Parts, jobs: Sequence[Job], dtype: Any, mesh: Any, timings: Any, bar: Any
) -> None:
    """NAME.npy of every job."""
    import jax

    from nd_jax.generate import pipeline

    model, settings, sampler = parts.model, parts.model.settings, parts.model.sampler()
    # The last row is the negative prompt's.
    texts = [job.prompt + settings.prompt_modifier for job in jobs]
    texts += [settings.negative_prompt] if sampler.needs_negative else []
    bar.phase("text", len(texts))
    text = pipeline.encode_prompts(model, texts, dtype, timings, bar.advance)
    negative = jax.tree.map(lambda x: x[-1:], text) if sampler.needs_negative else None
    first_frames = None
    if model.mode == "hybrid":
        bar.phase("first frames", 1 if parts.first_frame is None else len(jobs))
        images = [parts.image] if parts.first_frame is None else _pictures(jobs, settings)
        first_frames = pipeline.encode_first_frames(model, images, dtype, timings, bar.advance)
    bar.phase("latents", -(-len(jobs) // args.batch) * len(sampler.sampled_units) * sampler.video.stages)
    done = iter(jobs)
    for batch in pipeline.sample_latents(
        model,
        jax.tree.map(lambda x: x[: len(jobs)], text),
        [job.id for job in jobs],
        args.seed,
        negative,
        first_frames,
        args.batch,
        dtype,
        mesh,
        timings,
        lambda end: bar.advance(),
    ):
        for latents in batch:
            _save_array(next(done).file(LATENTS), latents)


def decode_videos(parts: Parts, jobs: Sequence[Job], dtype: Any, timings: Any, bar: Any) -> list[int] | None:
    """The MP4 files of every job; the ids that the safety checker flagged, None without one."""
    import numpy as np

    from nd_jax.generate import pipeline, safety
    from nd_jax.generate.super_resolution import upscaler

    root, flagged = parts.model.root, []
    bar.phase("frames", len(jobs))
    decode = pipeline.video_decoder(parts.model, dtype, timings)
    enlarge = None if parts.super_resolution == "off" else upscaler(root, timings)
    if parts.safety_frames:
        checker = safety.safety_checker(root, dtype, timings)
        size = safety.open_safety_checker(root).image_size
    for job in jobs:
        frames, larger = decode(_load_array(job.file(LATENTS))), enlarge
        if parts.safety_frames:
            frames = list(frames)
            if safety.is_unsafe(checker, size, frames, parts.safety_frames):
                flagged.append(job.id)
                print(f"{job.file(VIDEO).name} is black: the safety checker flagged it", flush=True)
                frames = [np.zeros_like(frame) for frame in frames]
                # What the network makes of black need not be black.
                larger = enlarge and (lambda frame: np.zeros_like(enlarge(frame)))
                _hide(job)
        _write_videos(job, frames, larger, parts)
        tidy(job, parts.wanted)
        bar.advance()
    return flagged if parts.safety_frames else None


def _hide(job: Job) -> None:
    """Makes a first frame that was kept black, as its video is."""
    import numpy as np

    from nd_jax.generate.videos import read_picture, write_picture

    if not job.lacks(PICTURE):
        write_picture(job.file(PICTURE), np.zeros_like(read_picture(job.file(PICTURE))))


def _write_videos(job: Job, frames: Iterable[Any], enlarge: Any, parts: Parts) -> None:
    from nd_jax.generate.videos import write_video

    frame_rate = parts.model.settings.frame_rate
    if SMALL in parts.wanted:
        frames = list(frames)
        write_video(job.file(SMALL), frames, frame_rate)
    write_video(job.file(VIDEO), frames if enlarge is None else map(enlarge, frames), frame_rate)


def tidy(job: Job, wanted: Sequence[str]) -> None:
    """Deletes the files of a job that are not wanted."""
    for suffix in SUFFIXES:
        if suffix not in wanted:
            job.file(suffix).unlink(missing_ok=True)


def _pictures(jobs: Sequence[Job], settings: Any) -> Iterator[Any]:
    """The first frames of the jobs at the size of the video."""
    from nd_jax.generate.videos import read_image

    for job in jobs:
        yield read_image(job.file(PICTURE), settings.height, settings.width)


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
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())

    @contextlib.contextmanager
    def bar() -> Iterator[_Bar]:
        with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            yield _Bar(progress)

    return bar()
