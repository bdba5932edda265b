"""Clips of real files: the right frames, the right part of the picture, and no file that ends a run."""

import json
import struct
import wave

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nd_jax.data.captions import read_captions
from nd_jax.data.loader import Batches, LoaderOptions
from nd_jax.data.video_reader import UnreadableVideo, probe, read_clip
from nd_jax.data.videos import ClipTransform, VideoFolder
from nd_jax.errors import UserError
from tests.video_case import HEIGHT, WIDTH, cut_short, frame_numbers, grey_frames, noise_frames, write_video

FRAMES, RATE = 20, 10


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "grey.mp4", grey_frames(FRAMES), RATE)


def two_halves(axis, height=HEIGHT, width=WIDTH):
    """Black above or on the left, white elsewhere."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[(slice(None),) * axis + (slice(picture.shape[axis] // 2, None),)] = 255
    return picture


# --- time -------------------------------------------------------------------------------------------------------------


def nearest(stamps, times):
    """Index of the nearest stamp, the earlier of two (a tie is one to within the rounding of a time)."""
    distance = np.abs(np.asarray(stamps)[None] - np.asarray(times)[:, None])
    return [int(np.flatnonzero(row <= row.min() + 1e-6)[0]) for row in distance]


@given(st.floats(0, 1.5), st.floats(2.0, 60.0), st.integers(1, 6))
def test_a_clip_has_the_frames_nearest_in_time(grey, start, frame_rate, video_frames):
    times = start + np.arange(video_frames) / frame_rate
    read = lambda: read_clip(grey, start, video_frames, frame_rate, HEIGHT, WIDTH)
    if times[-1] > (FRAMES - 0.5) / RATE:
        with pytest.raises(UnreadableVideo, match=r"ends at 1\.900 s"):
            read()
        return
    clip = read()
    assert clip.shape == (video_frames, HEIGHT, WIDTH, 3) and clip.dtype == np.uint8
    assert frame_numbers(clip) == nearest(np.arange(FRAMES) / RATE, times)


def test_the_earlier_of_two_frames_is_taken(grey):
    assert frame_numbers(read_clip(grey, 0.05, 5, RATE, HEIGHT, WIDTH)) == [0, 1, 2, 3, 4]
    assert frame_numbers(read_clip(grey, 0.65, 4, 5.0, HEIGHT, WIDTH)) == [6, 8, 10, 12]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_stamps_count_and_not_numbers_of_frames(tmp_path, suffix):
    stamps = [0, 1, 2, 9, 10, 15]
    path = write_video(tmp_path / f"uneven{suffix}", grey_frames(6), RATE, stamps)
    clip = read_clip(path, 0.1, 8, 5.0, HEIGHT, WIDTH)
    assert frame_numbers(clip) == nearest(np.array(stamps) / RATE, 0.1 + np.arange(8) / 5) == [1, 2, 2, 3, 3, 4, 5, 5]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi", ".ts", ".flv", ".h264", ".gif", ".webm"])
def test_containers(tmp_path, suffix):
    rate = 25  # A raw stream does not name its own.
    codec = {".gif": dict(codec="gif", pix_fmt="rgb8"), ".webm": dict(codec="libvpx-vp9")}.get(suffix, {})
    path = write_video(tmp_path / f"video{suffix}", grey_frames(FRAMES), rate, **codec)
    info = probe(path)
    assert (info.height, info.width) == (HEIGHT, WIDTH)
    assert info.frame_rate == pytest.approx(rate)
    assert abs(info.video_frames - FRAMES) <= 2
    assert info.duration == pytest.approx(info.video_frames / rate, abs=0.01)
    assert frame_numbers(read_clip(path, 0.48, 3, rate, HEIGHT, WIDTH)) == [12, 13, 14]


# --- the picture ------------------------------------------------------------------------------------------------------


def read_picture(path, height, width, rng=None):
    return read_clip(path, 0.0, 1, RATE, height, width, rng)[0].astype(int)


def assert_black_then_white(picture, axis, middle, blur):
    lines = picture.mean(axis=(1 - axis, 2))
    assert lines[: middle - blur].max() < 12 and lines[middle + blur :].min() > 243


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 16), (64, 64), (32, 48), (16, 48), (30, 46)])
def test_the_middle_is_cut_out(tmp_path, height, width):
    for axis, size in ((0, height), (1, width)):
        path = write_video(tmp_path / f"{axis}.mp4", [two_halves(axis)] * 2)
        assert_black_then_white(read_picture(path, height, width), axis, size // 2, 4)


def test_a_random_cut_out_stays_inside(tmp_path):
    path = write_video(tmp_path / "halves.mp4", [two_halves(1)] * 2)
    middles = set()
    for seed in range(8):
        rows = read_picture(path, 32, 32, np.random.default_rng(seed)).mean(axis=(0, 2))
        middles.add(int((rows < 128).sum()))
    assert middles <= set(range(8, 25)) and len(middles) > 3


def test_pixels_that_are_not_square(tmp_path):
    path = write_video(tmp_path / "wide.mp4", [two_halves(1)] * 2, aspect=2)
    assert (probe(path).height, probe(path).width) == (HEIGHT, 2 * WIDTH)
    # 96 x 32 as shown: a third of it is left, all of the blurred edge in the middle.
    assert_black_then_white(read_picture(path, 32, 32), 1, 16, 4)
    assert_black_then_white(read_picture(path, 16, 48), 1, 24, 4)


@pytest.mark.parametrize(("matrix", "axis", "flipped"), [((0, 1, -1, 0), 1, True), ((-1, 0, 0, -1), 0, True)])
def test_turned_videos_are_shown_upright(tmp_path, matrix, axis, flipped):
    path = write_video(tmp_path / "turned.mp4", [two_halves(0)] * 2)
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4 + 40  # The matrix of a version 0 track header.
    a, b, c, d = (value << 16 for value in matrix)
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    shown = (WIDTH, HEIGHT) if axis == 1 else (HEIGHT, WIDTH)
    assert (probe(path).height, probe(path).width) == shown
    picture = read_picture(path, *shown)
    assert_black_then_white(255 - picture if flipped else picture, axis, shown[axis] // 2, 2)


def test_fine_patterns_become_grey_and_not_moire(tmp_path):
    pattern = np.indices((96, 144)).sum(0) % 2 * 255
    frames = [np.repeat(pattern[..., None], 3, -1).astype(np.uint8)] * 2
    path = write_video(tmp_path / "fine.mkv", frames, codec="ffv1", pix_fmt="yuv444p")
    picture = read_picture(path, 32, 48)[4:-4, 4:-4]
    assert np.abs(picture - 127.5).max() < 16


@pytest.mark.parametrize(("height", "matrix"), [(32, "ITU601"), (720, "ITU709")])
def test_colours_of_videos_that_name_no_matrix(tmp_path, height, matrix):
    colour = np.array([200, 40, 90])
    frame = np.broadcast_to(colour, (height, WIDTH, 3)).astype(np.uint8)
    path = write_video(tmp_path / "colour.mp4", [frame] * 2, colorspace=matrix)
    assert np.abs(read_picture(path, height, WIDTH) - colour).max() <= 4


# --- what cannot be read ----------------------------------------------------------------------------------------------


def broken_files(folder):
    """Name -> what is said of it when it is opened."""
    (folder / "text.mp4").write_text("no video at all")
    (folder / "empty.mp4").write_bytes(b"")
    with wave.open(str(folder / "sound.wav"), "wb") as sound:
        sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(8000), sound.writeframes(bytes(16000))
    write_video(folder / "short.mp4", grey_frames(3), RATE)
    return {"text.mp4": "opened", "empty.mp4": "opened", "sound.wav": "no video", "short.mp4": "too short"}


def test_broken_files_are_unreadable_and_nothing_worse(tmp_path):
    for name, reason in broken_files(tmp_path).items():
        if name != "short.mp4":
            with pytest.raises(UnreadableVideo, match=reason):
                probe(tmp_path / name)
        with pytest.raises(UnreadableVideo):
            read_clip(tmp_path / name, 0.0, 5, RATE, HEIGHT, WIDTH)
    cut = cut_short(write_video(tmp_path / "cut.mp4", noise_frames(FRAMES), RATE))
    assert probe(cut).video_frames == FRAMES  # The header still says so.
    with pytest.raises(UnreadableVideo):
        read_clip(cut, 0.0, FRAMES, RATE, HEIGHT, WIDTH)
    assert not list(tmp_path.glob("*.tmp"))


def folder_of(tmp_path, names, captions="captions.jsonl", **options):
    path = tmp_path / captions
    path.write_text("".join(json.dumps({"video": name, "caption": f"of {name}"}) + "\n" for name in names))
    options = dict(video_frames=5, height=16, width=16, frame_rate=RATE) | options
    return VideoFolder(tmp_path, path, **options)


def test_a_picture_of_another_world_is_unreadable(tmp_path):
    path = write_video(tmp_path / "line.mp4", [np.zeros((2, 600, 3), np.uint8)] * 5)
    with pytest.raises(UnreadableVideo, match="600x2, far from 16x32"):
        read_clip(path, 0.0, 5, RATE, 32, 16)


def test_a_folder_reports_what_it_leaves_out(tmp_path):
    reasons = broken_files(tmp_path)
    (tmp_path / "inner").mkdir()
    write_video(tmp_path / "inner" / "good.mp4", grey_frames(FRAMES), RATE)
    write_video(tmp_path / "unnamed.mkv", grey_frames(FRAMES), RATE)
    source = folder_of(tmp_path, [*reasons, "absent.mp4", "inner/good.mp4"])
    skipped = dict(source.skipped)
    assert skipped.keys() == {*reasons, "absent.mp4", "unnamed.mkv"}
    assert all(reasons[name] in skipped[name] for name in reasons)
    assert "not in the folder" in skipped["absent.mp4"] and "no caption" in skipped["unnamed.mkv"]
    assert len(source) == 4 and source[1]["id"] == "inner/good.mp4@0.500"
    for k in (3, 0):
        record = source[k]
        assert record["caption"] == "of inner/good.mp4"
        assert frame_numbers(record["video"]) == list(range(5 * k, 5 * k + 5))
    with pytest.raises(IndexError):
        source[4]


def test_clips_are_spread_over_the_video(tmp_path):
    write_video(tmp_path / "a.mp4", grey_frames(FRAMES), RATE)
    starts = lambda **options: [clip.start for clip in folder_of(tmp_path, ["a.mp4"], **options).clips]
    assert starts(clips_per_video=1) == [0.0]
    assert starts(clips_per_video=4) == pytest.approx([0.0, 0.5, 1.0, 1.5])
    assert starts(clips_per_video=99) == pytest.approx(np.arange(16) / 10)
    assert starts(video_frames=FRAMES) == [0.0]
    assert starts(video_frames=FRAMES, clips_per_video=9) == [0.0]
    for number in (None, 1, 7, 99):
        source = folder_of(tmp_path, ["a.mp4"], clips_per_video=number, frame_rate=7.3)
        assert len({tuple(frame_numbers(source.read(k)["video"])) for k in range(len(source))}) == len(source)


def test_the_fingerprint_depends_on_files_captions_and_options(tmp_path):
    write_video(tmp_path / "a.mp4", grey_frames(FRAMES), RATE)
    first = folder_of(tmp_path, ["a.mp4"])
    assert folder_of(tmp_path, ["a.mp4"], captions="again.jsonl").fingerprint == first.fingerprint
    changes = [dict(height=32), dict(width=32), dict(frame_rate=9.0), dict(video_frames=9), dict(clips_per_video=2)]
    others = [folder_of(tmp_path, ["a.mp4"], **change).fingerprint for change in changes]
    write_video(tmp_path / "a.mp4", grey_frames(FRAMES)[::-1] + grey_frames(1), RATE)
    others.append(folder_of(tmp_path, ["a.mp4"]).fingerprint)
    assert len({first.fingerprint, *others}) == 1 + len(others)


def test_training_on_clips_passes_over_damage(tmp_path, capsys):
    write_video(tmp_path / "good.mp4", grey_frames(FRAMES), RATE)
    cut_short(write_video(tmp_path / "cut.mp4", noise_frames(FRAMES), RATE), 0.4)
    source = folder_of(tmp_path, ["good.mp4", "cut.mp4"])
    assert len(source) == 8
    with pytest.raises(UnreadableVideo):
        source.read(7)
    for _ in range(2):
        assert source[7]["id"] == "good.mp4@0.000"
    assert capsys.readouterr().err.count("cut.mp4@1.500") == 1
    batch = next(Batches(source, ClipTransform(), LoaderOptions(global_batch=8)))
    assert batch["video"].shape == (8, 5, 16, 16, 3)


def test_training_decodes_the_clips_that_fit_in_memory_once(tmp_path, monkeypatch):
    from nd_jax.data import videos

    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mkv", grey_frames(5), RATE)
    (tmp_path / "captions.txt").write_text("a.mkv\tone\nb.mkv\ttwo\n")
    folder = VideoFolder(tmp_path, tmp_path / "captions.txt", 5, HEIGHT, WIDTH, RATE)
    decoded = []
    monkeypatch.setattr(videos, "read_clip", lambda path, *rest: decoded.append(path) or read_clip(path, *rest))
    monkeypatch.setattr(videos, "CACHE_BYTES", 5 * HEIGHT * WIDTH * 3)
    clips = [folder[k] for k in (0, 1, 0, 1, 0)]
    # Threads of other tests may still be reading ahead.
    mine = [path.name for path in decoded if path.parent == tmp_path]
    assert mine == ["a.mkv", "b.mkv", "b.mkv"]
    np.testing.assert_array_equal(clips[0]["video"], clips[4]["video"])


def test_a_folder_without_any_clip_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"none of 4 captioned videos .*text\.mp4 cannot be opened"):
        folder_of(tmp_path, broken_files(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        VideoFolder(tmp_path / "absent", tmp_path / "captions.jsonl", 5, 16, 16, RATE)
    with pytest.raises(UserError, match="use positive numbers"):
        folder_of(tmp_path, ["short.mp4"], clips_per_video=0)


# --- captions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.jsonl", '{"video": "a.mp4", "caption": "one, two"}\r\n\n{"video": "b/c.mp4", "caption": "é", "more": 1}\n'),
        ("c.csv", 'more,video,caption\n1,a.mp4,"one, two"\n2,b/c.mp4,é\n'),
        ("c.txt", "a.mp4\tone, two\r\n\nb/c.mp4\té"),
    ],
)
def test_captions_come_in_three_forms(tmp_path, name, text):
    for mark in ("", "\ufeff"):
        (tmp_path / name).write_text(mark + text, encoding="utf-8", newline="")
        assert read_captions(tmp_path / name) == {"a.mp4": "one, two", "b/c.mp4": "é"}


@pytest.mark.parametrize("name", ["../a.mp4", "/etc/a.mp4", "b/../../a.mp4", "..\\a.mp4", "a\0.mp4"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(UserError, match=r"captions\.jsonl:1: the name .* leaves the folder"):
        folder_of(tmp_path, [name])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.jsonl", '{"video": "a"}\n', r"c\.jsonl:1: caption is None"),
        ("c.jsonl", '{"video": "a", "caption": "x"}\n{broken\n', r"c\.jsonl:2: broken JSON"),
        ("c.jsonl", "[1]\n", r"c\.jsonl:1: a JSON object"),
        ("c.jsonl", '{"video": "a", "caption": "\\ud800"}\n', r"c\.jsonl:1: caption has a lone surrogate"),
        ("c.jsonl", '{"video": "a", "caption": "x"}\n' * 2, r"c\.jsonl:2: the video 'a' comes twice"),
        ("c.csv", "video,text\na,b\n", r"c\.csv:1: the header lacks the column caption"),
        ("c.csv", 'video,caption\na,"b\n', r"c\.csv:\d: broken CSV"),
        ("c.csv", "video,caption\na\n", r"c\.csv:2: caption is None"),
        ("c.txt", "a b\n", r"c\.txt:1: no tab"),
        ("c.txt", "a\t \n", r"c\.txt:1: caption is ' '"),
        ("c.txt", "\n", "holds no captions"),
        ("c.xml", "", "suffix '.xml' is unknown"),
    ],
)
def test_malformed_captions_name_their_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_captions(tmp_path / name)
    assert "\n" not in str(error.value)


# --- transform --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1))
def test_clips_are_scaled_and_cut(seed):
    # Every value tells its place.
    frames, rows, columns = np.indices((17, 24, 32))
    record = {"video": np.stack([frames, rows, columns], -1).astype(np.uint8)}
    rng = np.random.default_rng(seed)
    whole = ClipTransform()(record, rng)["video"]
    assert whole.dtype == np.float32
    np.testing.assert_allclose(whole, record["video"] / 127.5 - 1, atol=1e-6)
    part = ClipTransform(9, 16, 8)(record, rng)["video"]
    first = part[0, 0, 0]
    np.testing.assert_allclose(part, whole[:9, :16, :8] - whole[0, 0, 0] + first, atol=1e-6)
    assert ((first + 1) * 127.5 <= np.array([8, 8, 24]) + 1e-3).all()


def test_impossible_parts_are_refused():
    for sizes, message in (((8, None, None), "8k"), ((None, 12, None), "height 12"), ((None, None, 0), "width 0")):
        with pytest.raises(UserError, match=message):
            ClipTransform(*sizes)
    with pytest.raises(UserError, match="has no part of 16"):
        ClipTransform(None, 16)({"video": np.zeros((9, 8, 16, 3), np.uint8)}, np.random.default_rng(0))
