"""`experiments.prepare --teacher-samples`: samples of the right prompts, whatever stops it, whoever shares the work."""

import json

import jax
import numpy as np
import pytest

from experiments import prepare, teacher_samples
from experiments.random_model import write_random_model
from nd_jax.data import latent_shards
from nd_jax.data.latents import LatentSource, LatentTransform, decode_record
from nd_jax.data.loader import Batches, LoaderOptions
from nd_jax.data.toy_prompts import toy_prompts
from nd_jax.errors import UserError
from nd_jax.generate import pipeline
from nd_jax.generate.model_folder import open_model
from nd_jax.train.sharding import make_mesh

PROMPTS = ("a red circle moves left", "a blue square moves up", "ünïcode")
# Another program (rows of a batch, devices) changes a latent by 2e-5 of the largest, as in test_generate; a record's
# float16 may then round to its neighbour, 2^-10 away.
OTHER_PROGRAM = dict(rtol=2**-10, atol=2e-4)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A teacher with random weights and a file of prompts."""
    root = tmp_path_factory.mktemp("teacher_samples")
    write_random_model(root / "model", "tiny-teacher", dtype="float32")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return root


def arguments(root, output, **options):
    """Two samples of three prompts in two shards, each of a full batch and one that is filled up."""
    options = {
        "prompts": root / "prompts.txt",
        "model": root / "model",
        "output": output,
        "samples": 2,
        "batch": 2,
        "shard_size": 3,
    } | options
    return ["--teacher-samples", *(f"--{k.replace('_', '-')}={v}" for k, v in options.items() if v is not None)]


def run(root, output, **options):
    assert prepare.main(arguments(root, output, **options)) == 0


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def normalised(folder):
    """What training gets of every record, [N, T, h, w, C]."""
    source = LatentSource(folder)
    transform = LatentTransform(source.manifest.latent_shift, source.manifest.latent_scale)
    return np.stack([transform(source[k], np.random.default_rng(k))["latents"] for k in range(len(source))])


@pytest.fixture(scope="module")
def made(root):
    run(root, root / "made")
    return root / "made"


def test_training_reads_what_the_teacher_made(root, made):
    model = open_model(root / "model")
    text = pipeline.encode_prompts(model, [*PROMPTS[:2], model.settings.negative_prompt], np.float32)
    rows = lambda part: jax.tree.map(lambda x: x[part], text)
    mesh = make_mesh({"data": 2}, jax.local_devices()[:2])
    # Sample 0 has the noise of experiments.generate: the prompt's place is its id.
    (expected,) = pipeline.sample_latents(
        model, rows(slice(2)), range(2), 0, rows(slice(2, 3)), None, 2, np.float32, mesh
    )
    got, source = normalised(made)[[0, 2]], LatentSource(made)
    assert got.dtype == np.float32 and got.shape[1:] == source.manifest.latent_shape == (2, 8, 8, 4)
    scale = np.array(source.manifest.latent_scale, np.float32)[:, None, None, None]
    for k, x in enumerate(expected):
        mean = source[2 * k]["mean"]
        bound = np.abs(mean) * scale / 2000 + 1e-6  # Float16 alone: 1/2048.
        np.testing.assert_array_less(np.abs(got[k] - x), bound)
        assert np.abs(got[k] - x).max() > 0 and x.std() > 0.1


def test_records_and_manifest(root, made):
    source, model = LatentSource(made), open_model(root / "model")
    records = [source[k] for k in range(len(source))]
    assert [r["caption"] for r in records] == [p for p in PROMPTS for _ in range(2)]
    assert [r["id"] for r in records][:3] == ["prompt-0000000-000", "prompt-0000000-001", "prompt-0000001-000"]
    assert not any(r["std"].any() for r in records)
    m = source.manifest
    assert (m.video_frames, m.height, m.width, m.frame_rate) == (9, 64, 64, 8)
    assert (m.latent_shift, m.latent_scale) == (model.vae.latent_shift, model.vae.latent_scale)
    later = np.stack([r["mean"][1:] for r in records]).astype(np.float64)
    assert (m.later.mean, m.later.std) == (pytest.approx(later.mean()), pytest.approx(later.std()))
    made_with = json.loads((made / "teacher.json").read_text())
    assert made_with["first_steps"] == [2, 1, 1] and made_with["function_evaluations"] == 14
    # The samples differ, of one prompt and of two.
    latents = normalised(made)
    assert min(np.abs(latents[0] - latents[k]).max() for k in range(1, 6)) > 0.1
    batch = next(Batches(source, LatentTransform(m.latent_shift, m.latent_scale), LoaderOptions(global_batch=4)))
    assert batch["latents"].shape == (4, 2, 8, 8, 4)


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches a signal."""


def test_a_killed_run_goes_on(root, made, tmp_path, monkeypatch):
    output, write, written = tmp_path / "again", latent_shards._write, []

    def dying(writer, record, path):
        write(writer, record, path)
        written.append(path)
        if len(written) == 4:
            raise Killed

    monkeypatch.setattr(latent_shards, "_write", dying)
    with pytest.raises(Killed):
        run(root, output)
    kept = {path: path.stat().st_mtime_ns for path in output.glob("latents-*")}
    assert len(kept) == 2 and not (output / "latents.json").exists()
    written.clear()
    run(root, output)
    assert len(written) == 3 and all(path.stat().st_mtime_ns == kept[path] for path in kept)
    assert contents(output) == contents(made)


def test_two_processes_make_what_one_makes(root, made, tmp_path, capsys):
    for process in (1, 0):
        run(root, tmp_path / "shared", num_processes=2, process_id=process)
        assert (tmp_path / "shared" / "latents.json").exists() is (process == 0)
    assert "3 samples at" in (printed := capsys.readouterr().out) and "1 of 2 shards are left to other" in printed
    assert contents(tmp_path / "shared") == contents(made)
    run(root, tmp_path / "shared")
    assert "nothing to sample; 6 records in 2 shards" in capsys.readouterr().out


def test_batches_devices_shards_and_numbers_change_no_sample(root, made, tmp_path, monkeypatch):
    """One row on one device in place of two on two; a sample more of every prompt; the text of a shard at a time."""
    monkeypatch.setattr(teacher_samples, "TEXT_ROWS", 1)
    run(root, tmp_path / "other", batch=1, shard_size=4, samples=3)
    got, expected = normalised(tmp_path / "other").reshape(3, 3, 2, 8, 8, 4), normalised(made)
    np.testing.assert_allclose(got[:, :2].reshape(expected.shape), expected, **OTHER_PROGRAM)


def test_toy_prompts(root, tmp_path):
    run(root, tmp_path / "toy", prompts=None, toy_prompts=2, samples=1, seed=3)
    source = LatentSource(tmp_path / "toy")
    assert [source[k]["caption"] for k in range(2)] == toy_prompts(2, 3)


def test_settings_stand_in_for_the_folders_and_stay(root, tmp_path, capsys):
    """Process 7 has no shard to make, so nothing is sampled."""
    other = dict(frames=17, first_steps="1,2,3", steps="4,4,4", guidance="1,1", negative_prompt="grey")
    given = dict(num_processes=8, process_id=7) | other
    run(root, tmp_path / "latents", **given)
    assert "nothing to sample; 2 of 2 shards are left to other processes" in capsys.readouterr().out
    made_with = json.loads((tmp_path / "latents" / "teacher.json").read_text())
    assert (made_with["mode"], made_with["first_steps"], made_with["steps"]) == ("monolithic", [1, 2, 3], [4, 4, 4])
    assert made_with["first_guidance"] is made_with["guidance"] is None and made_with["negative_prompt"] == "grey"
    assert made_with["video"]["latent_frames"] == 3 and made_with["function_evaluations"] == 6 + 2 * 12
    for change, message in (
        (dict(first_steps=None), r"were made with first_steps \[1, 2, 3\], not \[2, 1, 1\]; choose another"),
        (dict(seed=1), "were made with seed 0, not 1"),
        (dict(samples=1), "were made with samples 2, not 1"),
        (dict(shard_size=2), "shard_size is 3 there and 2 here"),
    ):
        with pytest.raises(UserError, match=message):
            run(root, tmp_path / "latents", **given | change)


def test_seeds_prompts_and_samples_have_noise_of_their_own():
    ids = teacher_samples.noise_ids(np.arange(12), 3)
    assert ids.dtype == np.uint32 and len(set(ids.tolist())) == 12
    assert ids[::3].tolist() == [0, 1, 2, 3]
    assert teacher_samples.noise_ids(np.arange(8), 2)[1::2].tolist() == ids[1::3].tolist()
    assert teacher_samples.noise_ids(np.array([2**32 - 1]), 256).tolist() == [255 << 24 | 2**24 - 1]


@pytest.mark.parametrize("value", [np.nan, np.inf, 7e4])
def test_samples_that_are_no_numbers_are_refused(root, value):
    model = open_model(root / "model")
    latents = np.full((2, 8, 8, 4), value, np.float32)
    good, bad = (
        teacher_samples.sample_records(model, PROMPTS, range(3, 4), 2, [x]) for x in (np.zeros_like(latents), latents)
    )
    mean = decode_record(next(good), latents.shape)["mean"]
    np.testing.assert_allclose(mean[:, 0, 0, 0], model.vae.latent_shift, rtol=2**-11)
    with pytest.raises(UserError, match=r"prompt-0000001-001: the sample of .*diffusion_transformer_384p"):
        next(bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(videos="videos"), "does not go with --videos=videos: give --prompts or --toy-prompts"),
        (dict(toy_world=3), "does not go with --toy-world"),
        (dict(toy_prompts=3), "not allowed with argument --prompts"),
        (dict(prompts=None), "one of the arguments --prompts --toy-prompts is required"),
        (dict(prompts=None, toy_prompts=0), "--toy-prompts is 0: give at least 1"),
        (dict(samples=0), "--samples is 0: give at least 1"),
        (dict(batch=4), "--batch 4 exceeds --shard-size 3"),
        (dict(seed=-1), "--seed must be from 0"),
        (dict(num_processes=2, process_id=2), "--process-id 2 is not below"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(root, tmp_path, change, message, capsys):
    with pytest.raises(SystemExit) as status:
        prepare.main(arguments(root, tmp_path / "latents", **change))
    assert status.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model="absent"), "absent: no such folder; give a model folder"),
        (dict(transformer="other"), "other"),
        (dict(steps="1,1"), r"steps is \[1, 1\]: give 3"),
        (dict(prompts="absent.txt"), r"absent\.txt"),
        (dict(samples=257), "at most 16777216 prompts and 256 samples"),
    ],
)
def test_bad_input_is_one_line(root, tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        prepare.main(arguments(root, tmp_path / "latents", **change))
    assert "\n" not in str(error.value) and not (tmp_path / "latents").exists()


def test_prompts_need_the_flag(root, tmp_path, capsys):
    with pytest.raises(SystemExit):
        prepare.main([f"--model={root}", f"--output={tmp_path / 'latents'}"])
    assert "--teacher-samples with --prompts" in capsys.readouterr().err
