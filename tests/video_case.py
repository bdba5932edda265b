"""Small videos for tests, made on the spot."""

from fractions import Fraction

import av
import numpy as np

HEIGHT, WIDTH = 32, 48


def grey_frames(count):
    """Frame k is all of `level(k)`."""
    return [np.full((HEIGHT, WIDTH, 3), level(k), np.uint8) for k in range(count)]


def level(frame):
    """The grey of a frame; neighbours differ by more than any codec does."""
    return 20 + 10 * frame


def frame_numbers(clip):
    """The numbers of grey frames in a clip."""
    return np.round((clip.mean(axis=(1, 2, 3)) - 20) / 10).astype(int).tolist()


def write_video(path, frames, rate=10, stamps=None, aspect=None, colorspace="ITU601", **stream_options):
    """H.264 with a key frame every 5 frames; other suffixes than .mkv have the index in front.

    Args:
      path: its suffix decides the container.
      frames: uint8 [H, W, 3] each.
      rate: frames per second.
      stamps: time stamps in 1 / rate seconds, 0, 1, 2, ... by default.
      aspect: width of a pixel over its height.
      colorspace: of the conversion from RGB; the file does not name it.
      stream_options: `codec` and `pix_fmt`.
    """
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    pix_fmt = stream_options.get("pix_fmt", "yuv420p")
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(stream_options.get("codec", "libx264"), rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, rate)
        if stream.codec_context.name == "libx264":
            stream.options = {"crf": "4", "g": "5"}
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for stamp, pixels in zip(stamps or range(len(frames)), frames, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format=pix_fmt, dst_colorspace=colorspace)
            frame.colorspace = 2  # Unnamed.
            frame.pts, frame.time_base = stamp, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def noise_frames(count):
    """Frames of which each takes many bytes."""
    return list(np.random.default_rng(0).integers(0, 255, (count, HEIGHT, WIDTH, 3), np.uint8))


def cut_short(path, share=0.6):
    """Drops the end of a file, whose header may still promise it."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    return path
