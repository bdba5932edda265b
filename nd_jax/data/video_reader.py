"""Clips of real videos: any container and codec that FFmpeg reads, at the frame rate and size of the training.

A clip of F frames at rate r that starts at s shows the instants

    t(k) = s + k / r,  k = 0 .. F - 1                                                                (1)

and its frame k is the frame of the video whose time stamp is nearest to t(k), the earlier of two. Frames are resized
to cover the clip's picture (bicubic, antialiased: the filter grows with the reduction), as they are shown: with the
shape of their pixels and their quarter turns. What stands out is cut off on both sides alike, or at random.

Decoding streams: beside the clip itself there are two frames in memory, whatever the length of the video.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.errors import first_line

# Seconds; far below a frame, far above the rounding of a time.
TOLERANCE = 1e-6
# Rows from which a video that names no colour matrix is taken to be BT.709, as players do, and not BT.601.
HD_ROWS = 720
# Seconds before a time to seek to: MPEG-TS and others go to any frame, and decoding starts at the next key frame.
SEEK_MARGINS = (0.0, 10.0)
# A video that would have to grow to more than so many clips' pictures to cover one of them is no picture at all.
MAX_SURPLUS = 64


class UnreadableVideo(Exception):
    """Why a video, or a clip of it, cannot be read: to be reported and left out."""


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a container says of its video.

    Attributes:
      duration: seconds until the last frame is gone.
      video_frames: exact where the container has the number, rounded from the duration elsewhere.
      frame_rate: mean number of frames a second.
      height, width: as shown, turned and with square pixels.
    """

    duration: float
    video_frames: int
    frame_rate: float
    height: int
    width: int


def probe(path: Path) -> VideoInfo:
    """Opens a video and decodes its first frame.

    Raises:
      UnreadableVideo: no video, or none that decodes.
    """
    with _Video(path) as video:
        frame = next(video.frames(), None)
        if frame is None:
            raise UnreadableVideo("has no frames")
        height, width = video.shown_size(frame[1])
        if _turns(frame[1]) % 2:
            height, width = width, height
        duration = video.duration()
        frames = video.stream.frames or round(duration * video.frame_rate)
        return VideoInfo(duration, frames, video.frame_rate, round(height), round(width))


def read_clip(
    path: Path,
    start: float,
    video_frames: int,
    frame_rate: float,
    height: int,
    width: int,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """A clip, uint8 [video_frames, height, width, 3] in sRGB; equation 1.

    Args:
      path: any file that FFmpeg reads.
      start: seconds from the first frame.
      video_frames: number of frames.
      frame_rate: frames per second of the clip.
      height, width: in pixels.
      rng: where to cut out the picture; by default the middle.

    Raises:
      UnreadableVideo: the video does not decode, or ends before the clip does.
    """
    crop = (0.5, 0.5) if rng is None else tuple(rng.random(2))
    clip = np.empty((video_frames, height, width, 3), np.uint8)
    times = start + np.arange(video_frames) / frame_rate
    with _Video(path) as video:
        done, shown, previous = 0, None, None
        for time, frame in video.frames(start):
            while done < video_frames and times[done] <= time:
                nearest = frame
                if previous is not None and times[done] - previous[0] <= time - times[done] + TOLERANCE:
                    nearest = previous[1]
                clip[done] = clip[done - 1] if nearest is shown else video.picture(nearest, height, width, crop)
                done, shown = done + 1, nearest
            if done == video_frames:
                return clip
            previous = (time, frame)
        if previous is None:
            raise UnreadableVideo(f"has no frames at {start:.3f} s")
        end, last = previous
        if times[-1] > end + 0.5 / video.frame_rate + TOLERANCE:
            raise UnreadableVideo(f"ends at {end:.3f} s, before the clip's last frame at {times[-1]:.3f} s")
        clip[done:] = clip[done - 1] if last is shown else video.picture(last, height, width, crop)
        return clip


class _Video:
    """An open video; FFmpeg's errors inside its `with` become `UnreadableVideo`."""

    def __init__(self, path: Path):
        self._path = Path(path)
        self._origin: int | None = None  # Time stamp of the first frame; None as well where frames have none.

    def __enter__(self) -> "_Video":
        self._open()
        return self

    def _open(self) -> None:
        import av

        try:
            # Broken texts in the metadata are nobody's concern here.
            self._container = av.open(str(self._path), metadata_errors="ignore")
        except (av.FFmpegError, OSError) as error:
            raise UnreadableVideo(f"cannot be opened ({_reason(error)})") from error
        if not self._container.streams.video:
            self._container.close()
            raise UnreadableVideo("holds no video")
        self.stream = self._container.streams.video[0]
        rate = self.stream.average_rate or self.stream.guessed_rate
        self.frame_rate = float(rate) if rate else 25.0  # FFmpeg's own guess for raw streams

    def _reopen(self) -> None:
        self._container.close()
        self._open()

    def __exit__(self, kind, error, trace) -> None:
        import av

        self._container.close()
        if isinstance(error, av.FFmpegError):
            raise UnreadableVideo(f"does not decode ({_reason(error)})") from error

    def frames(self, start: float = 0.0) -> Iterator[tuple[float, Any]]:
        """(seconds from the first frame, frame) in the order of time, from a frame at or before `start` on.

        The first frame is decoded in any case: containers disagree with themselves about when it is.
        """
        found = self._timed()
        first = next(found, None)
        if first is not None and start > 0 and self._origin is not None:
            for margin in SEEK_MARGINS:
                found, first = self._seek(max(0.0, start - margin))
                if first is not None and first[0] <= start + TOLERANCE:
                    break
            else:
                # There is no index, or a wrong one: the long way to the same frames.
                self._reopen()
                found = self._timed()
                first = next(found, None)
        if first is not None:
            yield first
            yield from found

    def _seek(self, seconds: float) -> tuple[Iterator, tuple[float, Any] | None]:
        """The frames from near a time on, the first of them apart; None where that is impossible."""
        import av

        try:
            self._container.seek(self._origin + int(seconds / self.stream.time_base), stream=self.stream)
            found = self._timed()
            return found, next(found, None)
        except av.FFmpegError:
            return iter(()), None

    def _timed(self) -> Iterator[tuple[float, Any]]:
        last = -np.inf
        for frame in self._container.decode(self.stream):
            if np.isinf(last) and self._origin is None:
                self._origin, time = frame.pts, 0.0
            elif frame.pts is not None and self._origin is not None:
                time = float((frame.pts - self._origin) * self.stream.time_base)
            else:
                time = last + 1 / self.frame_rate
            if time > last:
                yield time, frame
                last = time

    def duration(self) -> float:
        """Seconds; by a walk over the packets where the container does not know."""
        if self.stream.duration:
            return float(self.stream.duration * self.stream.time_base)
        if self._container.duration:
            return self._container.duration / 1e6
        self._reopen()
        packets = [packet for packet in self._container.demux(self.stream) if packet.size]
        stamps = [packet.pts for packet in packets if packet.pts is not None]
        if not stamps:
            return len(packets) / self.frame_rate
        return float((max(stamps) - min(stamps)) * self.stream.time_base) + 1 / self.frame_rate

    def shown_size(self, frame: Any) -> tuple[float, float]:
        """(height, width) in square pixels, before the frame is turned."""
        aspect = self.stream.sample_aspect_ratio
        return float(frame.height), float(frame.width * aspect) if aspect else float(frame.width)

    def picture(self, frame: Any, height: int, width: int, crop: tuple[float, float]) -> np.ndarray:
        """uint8 [height, width, 3]; `crop` is the share of the surplus that goes at the top and on the left."""
        if frame.is_corrupt:
            raise UnreadableVideo("has damaged frames")
        turns = _turns(frame)
        rows, columns = (width, height) if turns % 2 else (height, width)
        shown_rows, shown_columns = self.shown_size(frame)
        scale = max(rows / shown_rows, columns / shown_columns)
        if shown_rows * shown_columns * scale**2 > MAX_SURPLUS * rows * columns:
            raise UnreadableVideo(f"has a picture of {shown_columns:g}x{shown_rows:g}, far from {columns}x{rows}")
        unnamed_hd = frame.height >= HD_ROWS and frame.colorspace not in (1, 4, 5, 6, 7, 9)
        pixels = frame.to_ndarray(
            format="rgb24",
            height=max(rows, round(shown_rows * scale)),
            width=max(columns, round(shown_columns * scale)),
            interpolation="BICUBIC",
            src_colorspace="ITU709" if unnamed_hd else None,
        )
        pixels = np.rot90(pixels, turns)
        top, left = (round(c * (n - m)) for c, n, m in zip(crop, pixels.shape, (height, width), strict=False))
        return pixels[top : top + height, left : left + width]


def _turns(frame: Any) -> int:
    """Quarter turns, counter-clockwise, by which the frame is to be shown."""
    return round(frame.rotation / 90) % 4


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or first_line(error)
