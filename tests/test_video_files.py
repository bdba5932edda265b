"""MP4 files and first frames: what is written is read back, and a file appears whole or not at all."""

import av
import numpy as np
import pytest
from PIL import Image

from nd_jax.errors import UserError
from nd_jax.generate.videos import read_image, to_uint8, write_video


def clip(frames=9, height=32, width=48):
    """A bright square that moves to the right over a smooth ground, uint8 [F, H, W, 3]."""
    ground = np.linspace(30, 120, width)[None, None, :, None]
    video = np.broadcast_to(ground, (frames, height, width, 3)).copy()
    for t in range(frames):
        video[t, 8:20, 2 + 3 * t : 14 + 3 * t] = 230
    return video.astype(np.uint8)


def test_frames_come_back(tmp_path):
    video, path = clip(), tmp_path / "clip.mp4"
    assert write_video(path, iter(video), frame_rate=24) == 9
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.average_rate, stream.width, stream.height) == (24, 48, 32)
        read = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert read.shape == video.shape
    # Chroma has half of the resolution; the grey test clip has none.
    assert np.abs(read.astype(int) - video).mean() < 3
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


def test_a_failure_leaves_no_file(tmp_path):
    def frames():
        yield from clip(3)
        raise RuntimeError("decoder failed")

    with pytest.raises(RuntimeError, match="decoder failed"):
        write_video(tmp_path / "clip.mp4", frames())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("frames", "rate", "message"),
    [
        ([], 24, "has no frames"),
        (clip(2, 31), 24, "31 x 48 cannot be H.264"),
        ([*clip(1), *clip(1, 16)], 24, r"frame 1 is uint8 \[16, 48, 3\]"),
        (clip(2), 0, "frame_rate is 0"),
    ],
)
def test_frames_that_cannot_be_written_are_named(tmp_path, frames, rate, message):
    with pytest.raises(UserError, match=message):
        write_video(tmp_path / "clip.mp4", frames, rate)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"clip\.mp4: cannot be written"):
        write_video(tmp_path / "absent" / "clip.mp4", clip(2))


def test_eight_bits_are_clipped_and_truncated():
    got = to_uint8(np.array([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0]))
    np.testing.assert_array_equal(got, [0, 0, 127, 254, 255, 255])
    with pytest.raises(UserError, match="NaN"):
        to_uint8(np.array([np.nan]))


def test_an_image_becomes_a_frame(tmp_path):
    Image.fromarray(clip(1)[0]).save(tmp_path / "frame.png")
    same = read_image(tmp_path / "frame.png", 32, 48)
    np.testing.assert_array_equal(np.round((same + 1) * 127.5).astype(np.uint8), clip(1)[0])
    small = read_image(tmp_path / "frame.png", 16, 24)
    assert small.shape == (16, 24, 3) and small.dtype == np.float32
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png: not an image"):
        read_image(tmp_path / "text.png", 8, 8)
    with pytest.raises(UserError, match=r"absent\.png: No such file"):
        read_image(tmp_path / "absent.png", 8, 8)
