"""The toy world: clips depend on seed and index alone and show, whole and in place, what their captions say."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nd_jax.data import toy_prompts, toy_world
from nd_jax.data.loader import Batches, LoaderOptions
from nd_jax.errors import UserError

SHAPE = {"video_frames": 9, "height": 48, "width": 64}
SCENE = toy_world.Scene("green", "triangle", "right", "medium", "large", "navy", (0.5, 0.5))


scenes = st.builds(
    toy_world.Scene,
    st.sampled_from(toy_prompts.COLOURS),
    st.sampled_from(toy_prompts.SHAPES),
    st.sampled_from(toy_prompts.DIRECTIONS),
    st.sampled_from(toy_prompts.SPEEDS),
    st.sampled_from(toy_prompts.SIZES),
    st.sampled_from(toy_prompts.BACKGROUNDS),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
# The world


@given(scenes, st.integers(1, 17), st.integers(32, 70), st.integers(32, 70))
def test_the_shape_is_whole_in_every_frame_and_where_it_should_be(scene, frames, height, width):
    video = toy_world.render(scene, frames, height, width)
    assert video.shape == (frames, height, width, 3) and video.dtype == np.uint8
    empty = np.array(toy_world.BACKGROUND[scene.background]) * np.linspace(0.85, 1.15, height)[:, None]
    empty = np.broadcast_to(np.round(255 * empty)[:, None], (height, width, 3))
    object_mask = (video != empty).any(-1)
    assert object_mask[:, 1:-1, 1:-1].any((1, 2)).all()
    for edge in (object_mask[:, 0], object_mask[:, -1], object_mask[:, :, 0], object_mask[:, :, -1]):
        assert not edge.any()

    colour = 255 * np.array(toy_world.PALETTE[scene.colour])
    channel = np.abs(colour - empty.mean((0, 1))).argmax()
    coverage = (video[..., channel] - empty[..., channel]) / (colour[channel] - empty[..., channel])
    x = coverage.sum(1) @ (np.arange(width) + 0.5) / coverage.sum((1, 2))
    y = coverage.sum(2) @ (np.arange(height) + 0.5) / coverage.sum((1, 2))
    expected = toy_world.centres(scene, frames, height, width)
    np.testing.assert_allclose(np.stack([x, y], 1), expected, atol=0.25)


def test_a_speed_is_a_distance_per_frame_of_the_whole_clip():
    long, short = toy_world.render(SCENE, 17, 48, 64), toy_world.render(SCENE, 9, 48, 64)
    np.testing.assert_array_equal(short, long[:9])
    path = toy_world.centres(SCENE, 17, 48, 64)
    np.testing.assert_allclose(path[-1] - path[0], [48 * toy_world.TRAVEL["medium"], 0])
    fast = toy_world.centres(dataclasses.replace(SCENE, speed="fast", direction="up"), 33, 48, 64, clip_frames=33)
    np.testing.assert_allclose(fast[-1] - fast[0], [0, -48 * toy_world.TRAVEL["fast"]])


def test_clips_depend_on_seed_and_index_alone():
    first, again = toy_world.ToyWorld(20, seed=4, **SHAPE), toy_world.ToyWorld(30, seed=4, **SHAPE)
    for index in (19, 3, 0):
        np.testing.assert_array_equal(first[index]["video"], again[index]["video"])
        assert first[index]["caption"] == again[index]["caption"]
    assert len({first[index]["scene"] for index in range(20)}) == 20
    assert first[3]["scene"] != toy_world.ToyWorld(20, seed=5, **SHAPE)[3]["scene"]
    for index in (-1, 20):
        with pytest.raises(IndexError):
            first[index]


def test_fingerprints_tell_worlds_apart():
    worlds = [
        {},
        {"seed": 1},
        {"num_clips": 9},
        {"video_frames": 8},
        {"height": 50},
        {"width": 66},
        {"clip_frames": 18},
    ]
    prints = [toy_world.ToyWorld(**({"num_clips": 8} | SHAPE | change)).fingerprint for change in worlds]
    assert len(set(prints)) == len(worlds)
    assert prints[0] == toy_world.ToyWorld(8, **SHAPE).fingerprint


def test_every_attribute_is_drawn_evenly():
    rng = np.random.default_rng(0)
    drawn = [toy_world.sample_scene(rng) for _ in range(2400)]
    for field, count in {"colour": 6, "shape": 4, "direction": 4, "speed": 3, "size": 2, "background": 4}.items():
        seen = Counter(getattr(scene, field) for scene in drawn)
        assert len(seen) == count
        assert all(abs(n / 2400 - 1 / count) < 0.04 for n in seen.values())


def test_batches_take_it_as_a_source():
    world = toy_world.ToyWorld(12, **SHAPE)

    def transform(record, rng):
        return {"video": record["video"].astype(np.float32) / 127.5 - 1}

    batches = Batches(world, transform, LoaderOptions(global_batch=4, seed=1, num_threads=2))
    first = next(batches)
    assert first["video"].shape == (4, 9, 48, 64, 3)
    state = batches.get_state()
    second = next(batches)
    batches.set_state(state)
    np.testing.assert_array_equal(next(batches)["example"], second["example"])
    np.testing.assert_array_equal(first["video"][2], transform(world[int(first["example"][2])], None)["video"])
    other = Batches(toy_world.ToyWorld(12, seed=1, **SHAPE), transform, LoaderOptions(global_batch=4, seed=1))
    with pytest.raises(UserError, match="resume with the same"):
        other.set_state(state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: toy_world.ToyWorld(0), "0 clips"),
        (lambda: toy_world.ToyWorld(1, seed=-1), "seed -1"),
        (lambda: toy_world.ToyWorld(1, height=24), "24x64"),
        (lambda: toy_world.ToyWorld(1, video_frames=18), "raise clip_frames"),
        (lambda: toy_world.outline_distance("star", 0.0, 0.0, 1.0), "'star'"),
        (lambda: toy_prompts.toy_prompts(10**7), "ask for fewer"),
    ],
)
def test_errors_name_the_value(make, message):
    with pytest.raises(UserError, match=message):
        make()


# The language


@given(scenes, st.integers(0, 2**32))
def test_captions_name_what_the_scene_has(scene, seed):
    text = toy_world.caption(scene, np.random.default_rng(seed))
    assert toy_prompts.parse_caption(text) == {name: getattr(scene, name) for name in toy_prompts.ATTRIBUTES}


def test_captions_vary_and_a_scene_has_only_captions_of_the_grammar():
    rng = np.random.default_rng(0)
    assert len({toy_world.caption(SCENE, rng) for _ in range(300)}) > 150


def test_prompts_are_different_readable_and_repeatable():
    prompts = toy_prompts.toy_prompts(3000, seed=2)
    assert len(set(prompts)) == 3000
    assert prompts == toy_prompts.toy_prompts(3000, seed=2) != toy_prompts.toy_prompts(3000, seed=3)
    wanted = [tuple(toy_prompts.parse_caption(prompt).values()) for prompt in prompts]
    assert len(set(map(frozenset, wanted))) == 6 * 4 * 4 * 3
    assert not any("{" in prompt or "  " in prompt for prompt in prompts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a red circle moves left", "no speed"),
        ("a circle moves left slowly", "no colour"),
        ("a red blue circle moves left slowly", "two colours, red and blue"),
        ("a red circle moves left slowly and quickly", "two speeds"),
    ],
)
def test_a_caption_outside_the_grammar_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        toy_prompts.parse_caption(text)
