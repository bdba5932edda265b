"""Cached latents: what is written is read again, statistics are exact, and damage is told by name."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nd_jax.data.latent_shards import Plan, Running, Skipped, claim_folder, summarize, write_manifest, write_shard
from nd_jax.data.latents import (
    LatentSource,
    LatentTransform,
    Manifest,
    decode_record,
    encode_record,
    read_manifest,
)
from nd_jax.data.loader import Batches, EvalBatches, LoaderOptions
from nd_jax.errors import UserError
from nd_jax.models.text_conditioning import TEXT_COLUMNS
from nd_jax.models.video_vae import CausalVideoVAEConfig, normalize_latents

SHAPE = (3, 2, 4, 5)
SHIFT, SCALE = (0.25, -0.5), (2.0, 0.75)
PLAN = Plan("clips", 7, 3, SHAPE, 17, 16, 32, 24.0, "encoder")


def posterior(seed, shape=SHAPE):
    rng = np.random.default_rng(seed)
    return 3 * rng.standard_normal(shape, np.float32) + 1, rng.random(shape, np.float32)


def fill(folder, plan=PLAN, unreadable=()):
    claim_folder(folder, plan)
    record = lambda k: encode_record(*posterior(k, plan.latent_shape), f"caption {k}", f"clip {k}")
    for shard in range(plan.num_shards):
        results = [Skipped(f"clip {k}", "broken") if k in unreadable else record(k) for k in plan.clips(shard)]
        write_shard(folder, plan, shard, results)
    manifest = summarize(folder, plan, SHIFT, SCALE, [("short.mp4", "is too short")])
    write_manifest(folder, manifest)
    return manifest


@pytest.fixture
def folder(tmp_path):
    fill(tmp_path / "latents", unreadable=(1,))
    return tmp_path / "latents"


# --- records ----------------------------------------------------------------------------------------------------------


@given(
    st.tuples(*[st.integers(1, 3)] * 4), st.integers(0, 99), st.floats(1e-3, 1e3), st.text(st.characters(codec="utf-8"))
)
def test_records_come_back(shape, seed, size, caption):
    mean, std = (np.float32(size) * part for part in posterior(seed, shape))
    record = decode_record(encode_record(mean, std, caption, "é"), shape)
    assert (record["caption"], record["id"]) == (caption, "é")
    for key, expected in (("mean", mean), ("std", std)):
        assert record[key].dtype == np.float32
        np.testing.assert_allclose(record[key], expected, rtol=2**-11, atol=2**-25)


def test_parts_of_a_record_and_foreign_ones_are_refused():
    raw = encode_record(*posterior(0), "caption", "id")
    for end in (*range(0, len(raw) - 1, 7), len(raw) - 1):
        with pytest.raises(ValueError):
            decode_record(raw[:end], SHAPE)
    with pytest.raises(ValueError, match="cut short"):
        decode_record(raw + b"\0", SHAPE)
    with pytest.raises(ValueError, match=r"has the shape .* where the manifest has"):
        decode_record(raw, (1, *SHAPE[1:]))
    for header in (b"[]", b'{"id": 1, "caption": "a", "shape": []}', b"\xff", b"{" * 10_000):
        with pytest.raises(ValueError):
            decode_record(len(header).to_bytes(4, "little") + header, SHAPE)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_latents_that_are_no_numbers_are_refused(value):
    with pytest.raises(UserError, match=r"clip 3: its latents"):
        encode_record(np.full(SHAPE, value, np.float32), np.ones(SHAPE, np.float32), "caption", "clip 3")


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_comes_back(folder):
    source = LatentSource(folder)
    assert len(source) == 6 and len(source.manifest.shards) == 3
    for index, clip in ((5, 6), (0, 0), (1, 2), (4, 5)):
        record = source[index]
        assert (record["id"], record["caption"]) == (f"clip {clip}", f"caption {clip}")
        np.testing.assert_allclose(record["mean"], posterior(clip)[0], rtol=2**-11)
    with pytest.raises(IndexError):
        source[6]
    manifest = read_manifest(folder)
    assert isinstance(manifest, Manifest) and manifest.num_records == 6 and manifest.latent_shape == SHAPE
    assert (manifest.latent_shift, manifest.latent_scale) == (SHIFT, SCALE)
    assert manifest.skipped == (("short.mp4", "is too short"), ("clip 1", "broken"))
    assert json.loads((folder / "latents.json").read_text())["num_records"] == 6


def test_statistics_equal_numpy(folder):
    source = LatentSource(folder)
    mean = np.stack([source[k]["mean"] for k in range(6)]).astype(np.float64)
    std = np.stack([source[k]["std"] for k in range(6)]).astype(np.float64)
    for moments, frames in ((source.manifest.first, slice(0, 1)), (source.manifest.later, slice(1, None))):
        m, s = mean[:, frames], std[:, frames]
        assert moments.count == m.size
        assert moments.mean == pytest.approx(m.mean(), rel=1e-12)
        assert moments.std == pytest.approx(np.sqrt(m.var() + np.square(s).mean()), rel=1e-12)


@given(st.integers(0, 99), st.lists(st.integers(0, 40), min_size=1, max_size=5), st.sampled_from([0.0, 1e6]))
def test_moments_do_not_depend_on_the_parts(seed, cuts, offset):
    values = np.random.default_rng(seed).standard_normal(41) + offset
    parts = np.split(values, sorted(cuts))
    running = Running()
    for part in parts:
        running.add(part, np.zeros_like(part))
    assert running.count == 41
    assert running.moments().mean == pytest.approx(values.mean(), rel=1e-12, abs=1e-12)
    assert running.moments().std == pytest.approx(values.std(), rel=1e-8)


def test_moments_are_those_of_samples(folder):
    source, rng = LatentSource(folder), np.random.default_rng(0)
    transform = LatentTransform((0.0, 0.0), (1.0, 1.0))
    samples = np.stack([transform(source[k], rng)["latents"] for _ in range(300) for k in range(6)])
    for moments, drawn in ((source.manifest.first, samples[:, 0]), (source.manifest.later, samples[:, 1:])):
        assert drawn.mean() == pytest.approx(moments.mean, abs=0.01)
        assert drawn.std() == pytest.approx(moments.std, rel=0.01)


def test_clips_of_one_frame_have_no_later_ones(tmp_path):
    manifest = fill(tmp_path / "images", dataclasses.replace(PLAN, latent_shape=(1, *SHAPE[1:])))
    assert manifest.later is None and read_manifest(tmp_path / "images").later is None
    assert LatentSource(tmp_path / "images")[0]["mean"].shape == (1, *SHAPE[1:])


def test_equal_records_have_equal_fingerprints(tmp_path, folder):
    fill(tmp_path / "again", unreadable=(1,))
    fill(tmp_path / "other", unreadable=(2,))
    prints = [LatentSource(path).fingerprint for path in (folder, tmp_path / "again", tmp_path / "other")]
    assert prints[0] == prints[1] != prints[2]


def test_shards_without_records_have_no_file(tmp_path):
    manifest = fill(tmp_path / "latents", unreadable=(3, 4, 5))
    assert [shard.records for shard in manifest.shards] == [3, 1]
    assert LatentSource(tmp_path / "latents")[3]["id"] == "clip 6"
    with pytest.raises(UserError, match=r"none of 7 clips could be read .*clip 0 broken"):
        fill(tmp_path / "nothing", unreadable=range(7))
    assert not (tmp_path / "nothing" / "latents.json").exists()


def test_damage_is_told_by_name(tmp_path, folder):
    with pytest.raises(UserError, match=r"absent/latents\.json: no such file; .*experiments\.prepare"):
        LatentSource(tmp_path / "absent")
    path = folder / "latents-00001-of-00003.array_record"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(UserError, match=r"latents-00001-of-00003\.array_record: has \d+ bytes"):
        LatentSource(folder)
    path.write_bytes(bytes(len(content)))
    with pytest.raises(UserError, match=r"latents-00001-of-00003\.array_record: (damaged|holds 0 records)"):
        LatentSource(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"latents-00001-of-00003\.array_record: cannot be read"):
        LatentSource(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "is of the format"),
        ({"format": "other"}, "is of the format"),
        ({"latent_shape": [3, 2]}, "damaged"),
        ({"shards": [{"file": "a"}]}, "damaged"),
        ({"first": None}, "damaged"),
        ({"shards": [{"file": "../a", "records": 1, "bytes": 1, "sha256": ""}]}, "not a file of its own folder"),
        ({"shards": []}, "has no records"),
    ],
)
def test_foreign_manifests_are_refused(folder, change, message):
    path = folder / "latents.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        LatentSource(folder)


def test_records_of_another_shape_than_the_manifest_are_refused(folder):
    path = folder / "latents.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latent_shape": [3, 4, 2, 5]}))
    with pytest.raises(UserError, match=r"latents-00000-of-00003\.array_record: record 0 has the shape"):
        LatentSource(folder)[0]


# --- transform --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 99))
def test_the_transform_normalises_as_the_model_does(seed):
    mean, std = posterior(seed)
    config = CausalVideoVAEConfig(latent_shift=SHIFT, latent_scale=SCALE)
    transform = LatentTransform(SHIFT, SCALE)
    got = transform({"mean": mean, "std": std, "caption": ""}, np.random.default_rng(seed))["latents"]
    rng = np.random.default_rng(seed)
    rng.random()  # The caption's draw comes first.
    z = mean + std * rng.standard_normal(SHAPE, np.float32)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, normalize_latents(config, jnp.asarray(z)[None])[0], rtol=1e-6, atol=1e-6)


def spelled(salt):
    return lambda text: {"ids": np.array([salt, len(text)], np.int32), "mask": np.array([1, 1], np.int32)}


def test_captions_are_dropped_for_all_encoders_at_once():
    mean, std = posterior(0)
    record, rng = {"mean": mean, "std": std, "caption": "four"}, np.random.default_rng(0)
    transform = LatentTransform(SHIFT, SCALE, spelled(0), spelled(1), spelled(2), caption_dropout=0.25)
    drawn = [transform(record, rng) for _ in range(400)]
    assert {"latents", *TEXT_COLUMNS} == drawn[0].keys()
    lengths = np.array([[row[column][1] for column in ("ids", "clip_ids", "clip_2_ids")] for row in drawn])
    assert (lengths == lengths[:, :1]).all() and set(lengths[:, 0]) == {0, 4}
    assert (lengths[:, 0] == 0).mean() == pytest.approx(0.25, abs=0.07)
    assert [drawn[0][column][0] for column in ("ids", "clip_ids", "clip_2_ids")] == [0, 1, 2]
    with pytest.raises(UserError, match=r"caption_dropout 1\.5"):
        LatentTransform(SHIFT, SCALE, caption_dropout=1.5)


def test_the_loader_takes_them(folder):
    source, options = LatentSource(folder), LoaderOptions(global_batch=4, num_threads=2)
    transform = LatentTransform(SHIFT, SCALE, spelled(0))
    batch = next(Batches(source, transform, options))
    assert batch["latents"].shape == (4, *SHAPE) and batch["ids"].shape == (4, 2)
    last = list(EvalBatches(source, transform, options, range(6)))[-1]
    assert last["valid"].tolist() == [True, True, False, False]
