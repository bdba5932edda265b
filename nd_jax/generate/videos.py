"""Video and image files: H.264 in MP4 by PyAV, pictures by Pillow. Frames are in [-1, 1] in the networks."""

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np

from nd_jax.errors import UserError
from nd_jax.files import replacing

# x264's scale of quality: 18 is commonly taken to be without visible loss.
QUALITY = "18"


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Float in [-1, 1], not necessarily clamped -> uint8, as the public code does: x * 127.5 + 127.5, clip, truncate.

    Raises:
      UserError: a value is not a number.
    """
    return np.clip(_finite(frames) * 127.5 + 127.5, 0, 255).astype(np.uint8)


def to_unit(image: np.ndarray) -> np.ndarray:
    """Float in [-1, 1], not necessarily clamped -> float32 in [0, 1], as diffusers' pipelines give pictures.

    Raises:
      UserError: a value is not a number.
    """
    return np.clip(_finite(image) / 2 + 0.5, 0, 1)


def to_picture(image: np.ndarray) -> np.ndarray:
    """Float in [0, 1] -> uint8, rounded to the nearest, as diffusers' pipelines do."""
    return np.round(image * 255).astype(np.uint8)


def _finite(frames: np.ndarray) -> np.ndarray:
    frames = np.asarray(frames, np.float32)
    if not np.isfinite(frames).all():
        raise UserError("the decoded frames hold NaN or infinity: the weights are damaged, or bfloat16 is too narrow")
    return frames


def write_video(path: Path, frames: Iterable[np.ndarray], frame_rate: float = 24) -> int:
    """Writes an MP4 that appears when it is complete.

    Args:
      path: the file.
      frames: uint8 [H, W, 3] each, H and W even; taken one at a time.
      frame_rate: per second.

    Returns:
      The number of frames.

    Raises:
      UserError: no frames, odd or changing sizes, a frame rate that is not positive, or a disk that refuses.
    """
    import av

    if not 0 < frame_rate <= 1000:
        raise UserError(f"frame_rate is {frame_rate}: give frames per second, such as 24")
    stream, count = None, 0
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        for array in frames:
            if stream is None:
                height, width = array.shape[:2]
                if height % 2 or width % 2:
                    raise UserError(f"{path}: frames of {height} x {width} cannot be H.264 (4:2:0): use even sides")
                stream = container.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1001))
                stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
                # x264's macroblock tree writes the same small frames in one of several ways, by chance.
                stream.options = {"crf": QUALITY, "x264-params": "mbtree=0"}
            if array.shape != (height, width, 3) or array.dtype != np.uint8:
                raise UserError(
                    f"{path}: frame {count} is {array.dtype} {list(array.shape)}, the first one is uint8 "
                    f"[{height}, {width}, 3]"
                )
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            container.mux(stream.encode(frame))
            count += 1
        if stream is None:
            raise UserError(f"{path}: has no frames to write")
        container.mux(stream.encode())
    return count


def read_picture(path: str | os.PathLike) -> np.ndarray:
    """An image file: uint8 [H, W, 3].

    Raises:
      UserError: no such file, or none that Pillow reads.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or "not an image that can be read"
        raise UserError(f"{path}: {reason}; give a PNG, JPEG or WebP file") from error


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Writes uint8 [H, W, 3] as a PNG that appears when it is complete.

    Raises:
      UserError: a disk that refuses.
    """
    from PIL import Image

    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")


def to_first_frame(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture as a frame of a video: uint8 [H, W, 3] -> float32 [height, width, 3] in [-1, 1].

    Resized by Lanczos as in the public code. Nothing is cut off; another aspect ratio is stretched.
    """
    from PIL import Image

    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized, np.float32) / 127.5 - 1


def read_image(path: str | os.PathLike, height: int, width: int) -> np.ndarray:
    """An image file as one frame: float32 [height, width, 3] in [-1, 1].

    Raises:
      UserError: no such file, or none that Pillow reads.
    """
    return to_first_frame(read_picture(path), height, width)
