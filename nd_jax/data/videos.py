"""Clips of a folder of videos with captions, as records, and what training on clips makes of them.

How a clip is read is in `nd_jax.data.video_reader`, how captions are written in `nd_jax.data.captions`. Whatever does
not open, is too short or has no caption is left out and told, and never ends a run.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.data.captions import read_captions
from nd_jax.data.video_reader import TOLERANCE, UnreadableVideo, probe, read_clip
from nd_jax.errors import UserError

# Files that a folder of videos is asked about when some have no caption; a caption may name any file.
SUFFIXES = ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .wmv .flv .ogv .gif .y4m".split()
PROBE_THREADS = 8
# Decoded clips that training keeps: decoding the same few ones at every epoch would take longer than their steps.
CACHE_BYTES = 1 << 28

# Factors of the released video VAE, to which crops fit.
TIME_FACTOR, SPACE_FACTOR = 8, 8


@dataclasses.dataclass(frozen=True)
class Clip:
    """A part of a video: its name in the folder, the start in seconds, the caption."""

    video: str
    start: float
    caption: str

    @property
    def id(self) -> str:
        return f"{self.video}@{self.start:.3f}"


class VideoFolder:
    """Clips of the captioned videos of a folder; a `Source` of `nd_jax.data.loader`.

    Construction opens every video (in threads) and decides which clips there are. Videos that do not open, are too
    short or lack a caption, and captions without a video, are left out and told in `skipped`.

    Args:
      videos: the folder.
      captions: see `nd_jax.data.captions`.
      video_frames, height, width, frame_rate: of a clip.
      clips_per_video: clips that are spread evenly over each video, overlapping where it is short; by default as many
        as follow one another without overlap.

    Attributes:
      clips: in the order of the captions file.
      skipped: (name, reason) of what was left out.
      fingerprint: SHA-256 (hex) over the names and sizes of files, captions and options.

    Raises:
      UserError: no such folder, a bad captions file, impossible sizes, or no clip at all.
    """

    def __init__(
        self,
        videos: Path,
        captions: Path,
        video_frames: int,
        height: int,
        width: int,
        frame_rate: float,
        clips_per_video: int | None = None,
    ):
        self._folder = Path(videos)
        self._options = (video_frames, frame_rate, height, width)
        if not self._folder.is_dir():
            raise UserError(f"{videos}: no such folder; name the folder that holds the videos")
        if min(video_frames, height, width, 1 if clips_per_video is None else clips_per_video) < 1 or frame_rate <= 0:
            raise UserError(
                f"clips of {video_frames} frames of {height}x{width} at {frame_rate}/s, {clips_per_video} a video: "
                "use positive numbers"
            )
        named = read_captions(captions)
        self.clips: list[Clip] = []
        skipped: list[tuple[str, str]] = []
        with ThreadPoolExecutor(PROBE_THREADS) as pool:
            for (name, caption), found in zip(
                named.items(), pool.map(self._starts(clips_per_video), named), strict=True
            ):
                if isinstance(found, UnreadableVideo):
                    skipped.append((name, str(found)))
                else:
                    self.clips += [Clip(name, start, caption) for start in found]
        files = (path for path in self._folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        names = sorted(path.relative_to(self._folder).as_posix() for path in files)
        skipped += [(name, "has no caption") for name in names if name not in named]
        self.skipped = tuple(skipped)
        if not self.clips:
            reasons = "; ".join(f"{name} {reason}" for name, reason in skipped[:3])
            raise UserError(f"{videos}: none of {len(named)} captioned videos gives a clip ({reasons}); give others")
        sizes = {clip.video: (self._folder / clip.video).stat().st_size for clip in self.clips}
        identity = [self._options, *((c.video, sizes[c.video], c.start, c.caption) for c in self.clips)]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._told: set[str] = set()
        self._cache: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def ids(self) -> list[str]:
        """Names of all clips."""
        return [clip.id for clip in self.clips]

    def read(self, index: int) -> dict[str, Any]:
        """{"video": uint8 [video_frames, height, width, 3], "caption": str, "id": str}.

        Raises:
          UnreadableVideo: the clip does not decode, although the video opened.
          IndexError: `index` is not in 0 .. len - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        clip = self.clips[index]
        video = read_clip(self._folder / clip.video, clip.start, *self._options)
        return {"video": video, "caption": clip.caption, "id": clip.id}

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`read`, for training on clips: a clip that does not decode is told once, and the next one takes its place.

        Raises:
          UserError: no clip decodes.
        """
        for step in range(len(self)):
            place = (index + step) % len(self) if step else index
            try:
                return self._cached(place)
            except UnreadableVideo as error:
                if self.clips[place].id not in self._told:
                    self._told.add(self.clips[place].id)
                    print(f"{self.clips[place].id}: {error}; the next clip takes its place", file=sys.stderr)
        raise UserError(f"{self._folder}: none of {len(self)} clips decodes; give other videos")

    def _cached(self, index: int) -> dict[str, Any]:
        """`read`, from memory where the clip is among the first that fit there."""
        if index not in self._cache:
            record = self.read(index)
            if (len(self._cache) + 1) * record["video"].nbytes > CACHE_BYTES:
                return record
            self._cache[index] = record
        return dict(self._cache[index])

    def _starts(self, clips_per_video: int | None):
        """Function of a video's name: the starts of its clips in seconds, or why there are none."""
        video_frames, frame_rate, *_ = self._options

        def starts(name: str) -> list[float] | UnreadableVideo:
            path = self._folder / name
            if not path.is_file():
                return UnreadableVideo("is not in the folder")
            try:
                info = probe(path)
            except UnreadableVideo as error:
                return error
            # Room of the first frame, so that the last one is not behind the last frame of the video.
            room = info.duration - 1 / info.frame_rate - (video_frames - 1) / frame_rate
            if room < -0.5 / info.frame_rate - TOLERANCE:
                return UnreadableVideo(
                    f"is too short: {info.duration:.3f} s, and {video_frames} frames at {frame_rate:g}/s are needed"
                )
            room = max(room, 0.0)
            if clips_per_video is None:
                return [k * video_frames / frame_rate for k in range(int(room * frame_rate / video_frames + 1e-6) + 1)]
            # No two clips that begin with the same frame.
            spread = np.linspace(0, room, clips_per_video)
            frames = np.unique(np.floor(spread * info.frame_rate + TOLERANCE))
            return [float(frame / info.frame_rate) for frame in frames]

        return starts


# --- transform --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ClipTransform:
    """Record transform of training on clips: {"video": float32 [F, H, W, 3] in [-1, 1]}.

    Attributes:
      video_frames: 8k + 1 consecutive frames from a random start; all by default.
      height, width: of a random cut-out, multiples of 8; the whole picture by default.
    """

    video_frames: int | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self):
        if self.video_frames is not None and (self.video_frames < 1 or self.video_frames % TIME_FACTOR != 1):
            raise UserError(f"video_frames {self.video_frames} does not fit the video VAE: use {TIME_FACTOR}k + 1")
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None and (size < 1 or size % SPACE_FACTOR):
                raise UserError(f"{name} {size} does not fit the video VAE: use a multiple of {SPACE_FACTOR}")

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        video = random_part(record["video"], (self.video_frames, self.height, self.width), rng)
        return {"video": symmetric_floats(video)}


def random_part(video: np.ndarray, sizes: tuple[int | None, ...], rng: np.random.Generator) -> np.ndarray:
    """A part of a clip [F, H, W, ...] at a random place; a size of None is the whole axis.

    Raises:
      UserError: the clip is smaller than the part.
    """
    for axis, wanted in enumerate(sizes):
        if wanted is None:
            continue
        if wanted > video.shape[axis]:
            raise UserError(
                f"a clip of {'x'.join(map(str, video.shape[:3]))} (frames x height x width) has no part of "
                f"{wanted} along its axis {axis}; read larger clips or train on smaller parts"
            )
        first = int(rng.integers(video.shape[axis] - wanted + 1))
        video = video.take(range(first, first + wanted), axis)
    return video


def symmetric_floats(video: np.ndarray) -> np.ndarray:
    """uint8 -> float32 in [-1, 1]."""
    return video.astype(np.float32) / np.float32(127.5) - np.float32(1)
