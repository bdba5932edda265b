"""The checker and the features of toy clips see only pixels: they agree with captions on good clips and not on bad."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nd_jax.data import toy_checker, toy_features, toy_prompts, toy_world
from nd_jax.errors import UserError

SHAPE = {"video_frames": 9, "height": 48, "width": 64}
SCENE = toy_world.Scene("green", "triangle", "right", "medium", "large", "navy", (0.5, 0.5))


def clips(count, seed=0, **changes):
    world = toy_world.ToyWorld(count, seed, **(SHAPE | changes))
    items = [world[i] for i in range(count)]
    return [item["video"] for item in items], [item["caption"] for item in items]


@pytest.fixture(scope="module")
def clean():
    return clips(200)


def halve(video):
    frames, height, width, _ = video.shape
    return video.reshape(frames, height // 2, 2, width // 2, 2, 3).mean((2, 4))


def blur(video, sigma):
    for axis in (1, 2):
        index = np.arange(video.shape[axis])
        kernel = np.exp(-0.5 * ((index[:, None] - index) / sigma) ** 2)
        kernel /= kernel.sum(1, keepdims=True)
        video = np.moveaxis(np.tensordot(kernel, video, (1, axis)), 0, axis)
    return video


def noisy(video, rng, sigma):
    return video + sigma * rng.normal(size=video.shape)


def coded(video, _):
    """Block transform coding with 8x8 cosines and a step that leaves one to three values a block."""
    k = np.arange(8)
    basis = np.cos(np.pi * (k + 0.5) * k[:, None] / 8) / 2
    basis[0] /= np.sqrt(2)
    frames, height, width, _ = video.shape
    blocks = video.reshape(frames, height // 8, 8, width // 8, 8, 3)
    values = np.einsum("ai,thiwjc,bj->thawbc", basis, blocks, basis)
    return np.einsum("ai,thawbc,bj->thiwjc", basis, np.round(values / 0.7) * 0.7, basis).reshape(video.shape)


DISTORTIONS = {
    "half size, blur, noise": lambda video, rng: noisy(blur(halve(video), 0.7), rng, 0.05),
    "strong noise": lambda video, rng: noisy(video, rng, 0.1),
    "strong blur": lambda video, rng: blur(video, 2.5),
    "block coding": coded,
    "colour drift": lambda video, rng: video * rng.uniform(0.75, 1.1, 3) + rng.uniform(-0.05, 0.08, 3),
    "washed out": lambda video, rng: (video + video.mean(-1, keepdims=True)) / 2,
    "flicker": lambda video, rng: video * rng.uniform(0.8, 1.2, (len(video), 1, 1, 1)),
}


def rates(result):
    return {name: row["rate"] for name, row in result.items()}


# The checker


def test_clean_clips_are_read_without_error(clean):
    result = toy_checker.accuracy(*clean)
    assert min(rates(result).values()) >= 0.99, rates(result)
    assert result["all"]["count"] == 200


@pytest.mark.parametrize(
    "size", [(17, 64, 64), (9, 32, 32), (5, 40, 64), (13, 96, 70)], ids=lambda size: "x".join(map(str, size))
)
def test_clean_clips_of_other_sizes_are_read(size):
    frames, height, width = size
    result = toy_checker.accuracy(*clips(30, seed=1, video_frames=frames, height=height, width=width))
    assert min(rates(result).values()) >= 0.99, rates(result)


def test_longer_worlds_are_read_with_their_own_clip_frames():
    videos, captions = clips(20, seed=2, video_frames=33, height=32, width=32, clip_frames=33)
    assert rates(toy_checker.accuracy(videos, captions, clip_frames=33))["all"] == 1
    assert rates(toy_checker.accuracy(videos, captions))["speed"] < 0.6


@pytest.mark.parametrize("name", DISTORTIONS)
def test_distorted_clips_are_read(name):
    rng = np.random.default_rng(1)
    videos, captions = clips(50, seed=3, height=48)
    result = toy_checker.accuracy([DISTORTIONS[name](video / 255, rng) for video in videos], captions)
    assert min(rates(result)[attribute] for attribute in toy_prompts.ATTRIBUTES) >= 0.95, rates(result)


def test_wrong_captions_are_right_by_chance_only(clean):
    _, others = clips(200, seed=9)
    result = rates(toy_checker.accuracy(clean[0], others))
    for name, choices in {"colour": 6, "shape": 4, "direction": 4, "speed": 3}.items():
        assert abs(result[name] - 1 / choices) < 0.08, result
    assert result["all"] < 0.03


@given(st.integers(0, 2**32))
def test_flipping_and_reversing_a_clip_turns_its_direction(seed):
    scene = toy_world.sample_scene(np.random.default_rng(seed))
    video = toy_world.render(scene, 9, 48, 64)
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}[scene.direction]
    mirrored = opposite if scene.direction in ("left", "right") else scene.direction
    assert toy_checker.read_scene(video[:, :, ::-1]).direction == mirrored
    reversed_clip = toy_checker.read_scene(video[::-1])
    assert reversed_clip.direction == opposite
    assert (reversed_clip.speed, reversed_clip.shape, reversed_clip.colour) == (scene.speed, scene.shape, scene.colour)


def half_empty():
    video = toy_world.render(SCENE, 9, 48, 64)
    video[:5] = video[:1, :1, :1]
    return video


BROKEN = {
    "noise": lambda rng: rng.random((9, 48, 64, 3)),
    "faint noise": lambda rng: 0.5 + 0.1 * rng.normal(size=(9, 48, 64, 3)),
    "smooth noise": lambda rng: blur(2 * rng.normal(size=(9, 48, 64, 3)), 4) + 0.5,
    "still smooth noise": lambda rng: np.repeat(blur(2 * rng.normal(size=(1, 48, 64, 3)), 4) + 0.5, 9, 0),
    "grey": lambda rng: np.full((9, 48, 64, 3), 0.5),
    "black": lambda rng: np.zeros((9, 48, 64, 3), np.uint8),
    "not finite": lambda rng: np.full((9, 48, 64, 3), np.nan),
    "faint object": lambda rng: 0.3 + 0.1 * toy_world.render(SCENE, 9, 48, 64) / 255,
    "object in half of the frames": lambda rng: half_empty(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_video_without_an_object_is_unreadable(name):
    video = BROKEN[name](np.random.default_rng(0))
    reading = toy_checker.read_scene(video)
    assert {getattr(reading, attribute) for attribute in toy_prompts.ATTRIBUTES} == {toy_checker.UNREADABLE}
    assert reading.reason
    result = toy_checker.accuracy([video], ["a green triangle moves right steadily"])
    assert result["all"]["unreadable"] == 1 and result["colour"]["rate"] == 0


def moved(offsets):
    """The first frame of a clip, shifted in each frame by (x, y) pixels."""
    scene = dataclasses.replace(SCENE, size="small")
    frame = toy_world.render(scene, 1, 48, 64)[0]
    return np.stack([np.roll(frame, (y, x), (0, 1)) for x, y in offsets])


@pytest.mark.parametrize(
    ("offsets", "shape", "direction", "speed"),
    [
        ([(0, 0)] * 9, "triangle", "unreadable", "unreadable"),
        ([(0, 0)], "triangle", "unreadable", "unreadable"),
        ([(t, t) for t in range(9)], "triangle", "unreadable", "fast"),
        ([(0, -t) for t in range(9)], "triangle", "up", "medium"),
        ([(4 * t - 16, 0) for t in range(9)], "triangle", "right", "unreadable"),
        ([(12 * (t % 2), 0) for t in range(9)], "unreadable", "unreadable", "unreadable"),
    ],
    ids=["still", "one frame", "diagonal", "up", "too fast", "jumping"],
)
def test_only_motion_of_the_world_is_read(offsets, shape, direction, speed):
    reading = toy_checker.read_scene(moved(offsets))
    assert (reading.colour, reading.shape, reading.direction, reading.speed) == ("green", shape, direction, speed)


def test_a_colour_outside_the_palette_is_unreadable():
    video = toy_world.render(SCENE, 9, 48, 64) / 255
    grey = np.repeat(video.mean(-1, keepdims=True), 3, -1)
    reading = toy_checker.read_scene(2 * grey)
    assert (reading.colour, reading.shape, reading.direction) == ("unreadable", "triangle", "right")


def test_check_compares_attribute_by_attribute():
    video = toy_world.render(SCENE, 9, 48, 64)
    wrong = toy_checker.check(video, "a green square moves right quickly")
    assert wrong == {"colour": True, "shape": False, "direction": True, "speed": False}


def test_wilson_interval_is_the_published_one():
    np.testing.assert_allclose(toy_checker.wilson_interval(8, 10), (0.4902, 0.9433), atol=1e-4)
    assert toy_checker.wilson_interval(0, 20)[0] == 0 and toy_checker.wilson_interval(20, 20)[1] == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: toy_checker.read_scene(np.zeros((9, 48, 64))), r"\(9, 48, 64\)"),
        (lambda: toy_checker.read_scene(np.zeros((9, 48, 64, 3), np.int32)), "int32"),
        (lambda: toy_checker.read_scene(np.zeros((9, 48, 64, 3)), clip_frames=1), "clip_frames 1"),
        (lambda: toy_checker.accuracy([], []), "no videos"),
        (lambda: toy_checker.accuracy([toy_world.render(SCENE, 9, 48, 64)], []), "one caption for each"),
        (lambda: toy_features.features(np.full((9, 48, 64, 3), np.nan)), "not finite"),
        (lambda: toy_features.frechet_distance(np.zeros((1, 3)), np.zeros((5, 3))), r"\(1, 3\)"),
        (lambda: toy_features.frechet_distance(np.zeros((5, 3)), np.full((5, 3), np.inf)), "finite"),
    ],
)
def test_errors_name_the_value(make, message):
    with pytest.raises(UserError, match=message):
        make()


# Features and the distance


def feature_set(videos):
    return np.stack([toy_features.features(video) for video in videos])


def test_distance_grows_with_corruption():
    real, others = (clips(40, seed=seed, height=32, width=32)[0] for seed in (0, 1))
    real = feature_set(real)
    rng = np.random.default_rng(0)
    same = toy_features.frechet_distance(real, feature_set(others))
    assert toy_features.frechet_distance(real, real) < 1e-6
    for corrupt, amounts in {
        lambda video, sigma: noisy(video, rng, sigma): (0.03, 0.06, 0.12),
        blur: (0.7, 1.5, 3.0),
        lambda video, part: (1 - part) * video + part * video.mean(-1, keepdims=True): (0.4, 0.7, 1.0),
        lambda video, part: video * rng.uniform(1 - part, 1 + part, (len(video), 1, 1, 1)): (0.1, 0.3, 0.5),
        lambda video, part: video[(np.arange(len(video)) * (1 - part)).astype(int)]: (0.6, 0.8, 1.0),
    }.items():
        distances = [
            toy_features.frechet_distance(real, feature_set([corrupt(video / 255, amount) for video in others]))
            for amount in amounts
        ]
        assert [same, *distances] == sorted([same, *distances]), (same, distances)
        assert distances[-1] > 2 * same


def test_features_say_what_they_are_called():
    other = dataclasses.replace(SCENE, colour="red", direction="up", speed="fast", shape="cross")
    values = feature_set([toy_world.render(scene, 9, 48, 64) for scene in (SCENE, other)])
    rows = [dict(zip(toy_features.FEATURES, row, strict=True)) for row in values]
    travel = np.array([[row["travel_x"], row["travel_y"]] for row in rows]) * toy_features.FEATURES["travel_x"]
    np.testing.assert_allclose(travel, [[0.25, 0], [0, -0.48]], atol=0.02)
    assert rows[0]["part_green"] > 0.7 > 0.1 > rows[0]["part_red"]
    assert rows[1]["part_red"] > 0.7 > 0.1 > rows[1]["part_green"]
    assert rows[1]["fourfold"] > 0.5 > rows[0]["fourfold"]


@pytest.mark.parametrize("shape", [(1, 32, 32, 3), (2, 9, 9, 3), (5, 40, 33, 3)])
def test_features_are_finite_without_an_object(shape):
    for video in (np.zeros(shape), np.random.default_rng(0).random(shape), np.ones(shape, np.uint8)):
        values = toy_features.features(video)
        assert values.shape == (len(toy_features.FEATURES),) and values.dtype == np.float32
        assert np.isfinite(values).all()


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(2, 12), st.integers(2, 12))
def test_distance_equals_the_one_by_matrix_square_roots(seed, dimensions, first_count, second_count):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(first_count, dimensions)), rng.normal(size=(second_count, dimensions)) * 2 + 1

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T

    a, b = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (first, second))
    cross = root(root(a) @ b @ root(a))
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum() + np.trace(a + b - 2 * cross)
    measured = toy_features.frechet_distance(first, second)
    # The square roots of rounding errors, 1e-8 each, limit the reference and not what is tested.
    np.testing.assert_allclose(measured, expected, atol=1e-5)
    np.testing.assert_allclose(toy_features.frechet_distance(second, first), measured, atol=1e-9)
    np.testing.assert_allclose(toy_features.frechet_distance(first, first + 3), 9 * dimensions, rtol=1e-9)
