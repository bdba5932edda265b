"""The work behind the page of `experiments.demo`: what a request may ask for, and one video after another.

A request is a JSON object; what it leaves out is as the model folder has it, except for the prompt:

    prompt            text
    seed              0 to 4294967295                                  0
    mode              "hybrid" or "monolithic"                         the folder's
    steps             Euler steps per stage, coarsest first            the mode's
    first_steps       the same for the first latent frame, monolithic  the mode's
    super_resolution  true or false                                    true where the folder has a quicksrnet
    image             PNG, JPEG or WebP in base64, the first frame     made from the prompt

The video is that of `experiments.generate` for the same settings and a file with this prompt alone.
"""

import argparse
import base64
import dataclasses
import io
import secrets
import shutil
import threading
import time
import traceback
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from nd_jax.errors import UserError, first_line

IMAGE_BYTES = 10 * 2**20
IMAGE_SIDE = 4096
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP")
PROMPT_LENGTH = 2000
STEPS = 100  # At most, of a stage: one request should not hold the page for hours.
WAITING = 8  # Jobs behind the one that runs.
KEPT = 20  # Finished jobs whose videos can still be seen.


class QueueFull(UserError):
    """Too many jobs wait already."""


class Request(NamedTuple):
    """What a video is made from; `image` is uint8 [H, W, 3] or None."""

    prompt: str
    seed: int
    mode: str
    steps: tuple[int, ...] | None
    first_steps: tuple[int, ...] | None
    super_resolution: bool
    image: Any


# --- what the folder allows -------------------------------------------------------------------------------------------


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """What the page can offer, as plain data; `args` as `experiments.demo.parse` gives them.

    Raises:
      UserError: a model folder that makes no video in any mode.
    """
    from experiments.generate import open_chosen
    from nd_jax.generate import first_frame, super_resolution
    from nd_jax.generate.config import MODES

    default, modes = open_chosen(args, None).mode, {}
    for mode in (default, *(mode for mode in MODES if mode != default)):
        try:
            sampler = open_chosen(args, mode).sampler()
        except UserError:
            if mode == default:
                raise
            continue  # The folder has nothing for the other mode.
        modes[mode] = {"steps": sampler.steps, "takes_image": mode == "hybrid"}
        modes[mode]["first_steps"] = sampler.first_steps if mode == "monolithic" else None
        modes[mode]["needs_image"] = mode == "hybrid" and not first_frame.has_first_frame(args.model)
    settings, large = open_chosen(args, default).settings, None
    if super_resolution.has_super_resolution(args.model):
        large = super_resolution.open_super_resolution(args.model).scaling_factor
    names = ("height", "width", "video_frames", "frame_rate")
    return {
        "model": args.model.resolve().name,
        "mode": default,
        "modes": modes,
        "super_resolution": large,
        "image_bytes": IMAGE_BYTES,
        **{name: getattr(settings, name) for name in names},
    }


# --- what a request asks for ------------------------------------------------------------------------------------------


def read_request(values: Any, about: Mapping[str, Any]) -> Request:
    """Checks what came from outside.

    Args:
      values: parsed JSON of any kind.
      about: of `describe`.

    Raises:
      UserError: anything that is not as the head of this file says.
    """
    if not isinstance(values, dict):
        raise UserError("the request is not a JSON object; send one with a prompt")
    unknown = sorted(set(values) - set(Request._fields))
    if unknown:
        raise UserError(f"{unknown[0]!r} is unknown; a request has {', '.join(Request._fields)}")
    prompt, seed, mode = values.get("prompt", ""), values.get("seed", 0), values.get("mode", about["mode"])
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("there is no prompt: say in words what the video shows")
    prompt = " ".join(prompt.split())
    if len(prompt) > PROMPT_LENGTH:
        raise UserError(f"the prompt has {len(prompt)} characters: use at most {PROMPT_LENGTH}")
    if any("\ud800" <= character <= "\udfff" for character in prompt):  # JSON can say half of a UTF-16 pair.
        raise UserError("the prompt is not valid Unicode: type it again")
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise UserError(f"seed is {_shown(seed)}: give a whole number from 0 to {2**32 - 1}")
    if not isinstance(mode, str) or mode not in about["modes"]:
        raise UserError(f"mode is {_shown(mode)}: this model has {' and '.join(about['modes'])}")
    offered = about["modes"][mode]
    large = values.get("super_resolution", about["super_resolution"] is not None)
    if not isinstance(large, bool):
        raise UserError(f"super_resolution is {_shown(large)}: give true or false")
    if large and about["super_resolution"] is None:
        raise UserError("this model has no super-resolution: leave it off")
    image = values.get("image")
    if image is not None:
        if not offered["takes_image"]:
            raise UserError(f"mode {mode} takes no image: remove it, or choose mode hybrid")
        image = read_upload(image)
    elif offered["needs_image"]:
        raise UserError("this model makes no first frame from a prompt: choose an image, or another mode")
    steps = (_steps(values, name, offered[name]) for name in ("steps", "first_steps"))
    return Request(prompt, seed, mode, *steps, large, image)


def _steps(values: Mapping[str, Any], name: str, usual: tuple[int, ...] | None) -> tuple[int, ...] | None:
    steps = values.get(name)
    if steps is None:
        return usual
    if usual is None:
        raise UserError(f"{name} is {_shown(steps)}, but this mode has none: leave it out")
    well = isinstance(steps, list) and len(steps) == len(usual)
    if not well or not all(type(n) is int and 1 <= n <= STEPS for n in steps):
        example = ", ".join(map(str, usual))
        raise UserError(f"{name} is {_shown(steps)}: give {len(usual)} whole numbers from 1 to {STEPS}, as {example}")
    return tuple(steps)


def _shown(value: Any) -> str:
    """A value of a request, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def read_upload(text: Any) -> Any:
    """An uploaded image, base64 of a file: uint8 [H, W, 3].

    The formats are few, and the size is looked at before a pixel is decoded: the file comes from anybody.

    Raises:
      UserError: too large, or no image of these formats.
    """
    import numpy as np
    from PIL import Image

    wrong = UserError("the image cannot be read: choose a PNG, JPEG or WebP file")
    if not isinstance(text, str):
        raise wrong
    too_large = UserError(
        f"the image is too large: choose one of at most {IMAGE_BYTES // 2**20} MB and {IMAGE_SIDE} pixels a side"
    )
    if len(text) > IMAGE_BYTES * 4 // 3 + 4:
        raise too_large
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=IMAGE_FORMATS) as image:
            if max(image.size) > IMAGE_SIDE:
                raise too_large
            return np.asarray(image.convert("RGB"))
    except Image.DecompressionBombError as error:
        raise too_large from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # Pillow has all of them for damaged files.
        raise wrong from error


# --- one video after another ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Part:
    """A part of a job: how much of it is done, and when it began and ended, seconds of `time.perf_counter`."""

    name: str
    total: int
    begin: float
    done: int = 0
    end: float | None = None


class Progress:
    """What `make_videos` tells, one `Part` after another; once `stopping` is set, it raises at the next step."""

    def __init__(self, stopping: threading.Event):
        self._stopping, self.parts = stopping, []

    def phase(self, name: str, total: int) -> None:
        self.close()
        self.parts.append(Part(name, total, time.perf_counter()))

    def advance(self) -> None:
        if self._stopping.is_set():
            raise UserError("the page was closed before the video was complete; start it again")
        self.parts[-1].done += 1

    def close(self) -> None:
        """Ends the last part."""
        if self.parts:
            self.parts[-1].end = self.parts[-1].end or time.perf_counter()

    def rows(self) -> list[dict[str, Any]]:
        """Plain data."""
        now = time.perf_counter()
        return [
            {"part": p.name, "done": p.done, "total": p.total, "seconds": round((p.end or now) - p.begin, 1)}
            for p in tuple(self.parts)
        ]


@dataclasses.dataclass
class DemoJob:
    """A video that was asked for, and the `Future` of what `state` adds when it is there."""

    id: str
    progress: Progress
    future: Future


class Jobs:
    """All jobs of a page. One runs at a time, in the order of the requests.

    Args:
      args: as `experiments.demo.parse` gives them.
      folder: for videos; each job has a folder in it.

    Attributes:
      about: of `describe`.
    """

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.about = describe(args)
        self._args, self._folder = args, folder
        self._jobs: dict[str, DemoJob] = {}
        self._lock, self._stopping = threading.Lock(), threading.Event()
        self._pool = ThreadPoolExecutor(1, "video")

    def submit(self, values: Any) -> str:
        """The id of a new job for a request.

        Raises:
          UserError: a request that is not as it should be, or a model folder that has changed.
          QueueFull: too many wait.
        """
        request = read_request(values, self.about)
        id = secrets.token_hex(8)
        with self._lock:
            waiting = sum(not job.future.done() for job in self._jobs.values())
            if waiting > WAITING:
                raise QueueFull(f"{waiting} videos are waited for already: ask again when some are done")
            self._forget()
            prepared, progress = self._prepare(id, request), Progress(self._stopping)
            future = self._pool.submit(self._run, progress, request, *prepared)
            future.add_done_callback(_tell_unexpected)
            self._jobs[id] = DemoJob(id, progress, future)
        return id

    def state(self, id: str) -> dict[str, Any]:
        """What the page shows of a job: `state` is waiting, running, done or failed.

        Raises:
          KeyError: no such job, or one so old that it was forgotten.
        """
        with self._lock:
            job, all_jobs = self._jobs[id], list(self._jobs.values())
        shown = {"id": id, "parts": job.progress.rows()}
        if not job.future.done():
            before = sum(not other.future.done() for other in all_jobs[: all_jobs.index(job)])
            return shown | {"state": "running" if job.future.running() else "waiting", "before": before}
        if job.future.cancelled():
            return shown | {"state": "failed", "error": "the page is being closed; start it again"}
        error = job.future.exception()
        if error is None:
            return shown | {"state": "done", "video": f"/jobs/{id}/video.mp4", **job.future.result()}
        if isinstance(error, UserError):
            return shown | {"state": "failed", "error": str(error)}
        what = f"{type(error).__name__}: {first_line(error)}"
        return shown | {"state": "failed", "error": f"{what}. The terminal of experiments.demo has the whole message."}

    def video(self, id: str) -> bytes:
        """The MP4 of a job that is done.

        Raises:
          KeyError: there is none.
        """
        if self.state(id)["state"] != "done":
            raise KeyError(id)
        try:
            return (self._folder / id / "video.mp4").read_bytes()
        except FileNotFoundError as error:
            raise KeyError(id) from error

    def close(self) -> int:
        """Ends the job that runs at its next step, and drops those that wait; how many videos were made."""
        self._stopping.set()
        self._pool.shutdown(cancel_futures=True)
        futures = [job.future for job in self._jobs.values()]
        return sum(not future.cancelled() and future.exception() is None for future in futures)

    def _forget(self) -> None:
        """Drops the oldest finished jobs and their files."""
        finished = [id for id, job in self._jobs.items() if job.future.done()]
        for id in finished[: max(0, len(finished) + 1 - KEPT)]:
            del self._jobs[id]
            shutil.rmtree(self._folder / id, ignore_errors=True)

    def _prepare(self, id: str, request: Request) -> tuple[argparse.Namespace, Any]:
        """(options of `experiments.generate`, its `Parts`) for a request; makes the job's folder."""
        from experiments.generate import open_chosen, open_parts
        from nd_jax.generate.videos import write_picture

        folder, chosen = self._folder / id, request._asdict()
        folder.mkdir()
        chosen["super_resolution"] = "on" if request.super_resolution else "off"
        if request.image is not None:
            chosen["image"] = folder / "image.png"
            write_picture(chosen["image"], request.image)
        args = argparse.Namespace(**(vars(self._args) | chosen), output=folder)
        return args, open_parts(args, open_chosen(args, request.mode))

    def _run(self, progress: Progress, request: Request, args: argparse.Namespace, parts: Any) -> dict[str, Any]:
        from experiments.generate import video_settings
        from experiments.generate_videos import Job, make_videos

        settings = video_settings(args, parts, parts.model.sampler())
        names = ("seed", "mode", "steps", "first_steps", "video_frames", "frame_rate", "function_evaluations")
        # The id is the prompt's number in the file of prompts that a command would read.
        made = make_videos(args, parts, [Job(0, request.prompt, args.output / "video")], progress)
        progress.close()
        return {
            "prompt": request.prompt,
            "settings": {name: settings[name] for name in names if name in settings},
            "seconds": made["seconds"],
            "seconds_total": made["seconds_total"],
            "unsafe": bool(made.get("unsafe")),
        }


def _tell_unexpected(future: Future) -> None:
    """Prints the traceback of what is not a user's error."""
    error = None if future.cancelled() else future.exception()
    if error is not None and not isinstance(error, UserError):
        traceback.print_exception(error)
