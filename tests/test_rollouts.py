"""Rollouts of students beside their teacher's: the measures, the command, and a student that is a transformer alone."""

import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import evaluate
from experiments.evaluate_rollouts import find_transformer
from experiments.random_model import write_random_model
from nd_jax.errors import UserError
from nd_jax.evals import calibration, rollouts
from nd_jax.generate.model_folder import open_model
from nd_jax.generate.pipeline import encode_prompts, sample_latents
from nd_jax.models.mmdit import keep_blocks
from nd_jax.weights.folder import load_component, save_component

TRANSFORMER = "diffusion_transformer_384p"
PROMPTS = (
    "a red circle moves left slowly",
    "a blue square moves up quickly",
    "there is a green cross moving down",
    "a small cyan triangle moves right",
)
# Two batches, the second filled up. It shares no factor with the devices, so that all tests share the programs of one.
BATCH = 3


# --- measures ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_measures_are_equations_1_and_2(seed, scale):
    rng = np.random.default_rng(seed)
    z, other = (scale * rng.standard_normal((3, 1, 2, 2, 4)).astype(np.float32) for _ in range(2))
    for row in range(3):
        a, b = z[row].ravel().astype(float), other[row].ravel().astype(float)
        expected = a @ b / np.sqrt((a @ a) * (b @ b))
        np.testing.assert_allclose(rollouts.cosine(z, other)[row], expected, rtol=1e-9, atol=1e-12)
        power = 10 * np.log10((a @ a) / ((a - b) @ (a - b)))
        np.testing.assert_allclose(rollouts.snr_db(z, other)[row], power, rtol=1e-9, atol=1e-9)


def test_measures_of_equal_opposite_and_empty_latents():
    z = np.arange(1.0, 9.0).reshape(2, 4)
    assert np.all(rollouts.snr_db(z, z) == np.inf)
    np.testing.assert_allclose(rollouts.cosine(z, -3 * z), -1)
    np.testing.assert_allclose(rollouts.snr_db(z, 0.9 * z), 20)
    zeros = np.zeros_like(z)
    assert np.all(rollouts.cosine(z, zeros) == 0) and np.allclose(rollouts.snr_db(z, zeros), 0)


def test_places_and_the_summary_over_prompts():
    rng = np.random.default_rng(0)
    size = {0: 1, 1: 2, 2: 4}
    draw = lambda: {(u, s): rng.standard_normal((5, 1, size[s], size[s], 3)) for u in range(2) for s in range(3)}
    ends, other = draw(), draw()
    found = rollouts.compare_rollouts(ends, other)
    assert found["cosine"].shape == found["snr_db"].shape == (5, 2, 3)
    for unit, stage in ends:
        expected = rollouts.snr_db(ends[unit, stage], other[unit, stage])
        np.testing.assert_array_equal(found["snr_db"][:, unit, stage], expected)
    videos = [np.concatenate([e[0, 2], e[1, 2]], axis=1) for e in (ends, other)]
    np.testing.assert_array_equal(rollouts.video_latents(ends), videos[0])
    np.testing.assert_array_equal(found["video_cosine"], rollouts.cosine(*videos))
    summary = rollouts.summarize_rollouts(found)
    assert summary["cosine"]["mean"][1][2] == pytest.approx(found["cosine"][:, 1, 2].mean())
    assert summary["video_snr_db"]["std"] == pytest.approx(found["video_snr_db"].std())
    # Equal latents have no SNR that JSON knows.
    same = rollouts.summarize_rollouts(rollouts.compare_rollouts(ends, ends))
    assert same["video_snr_db"] == {"mean": None, "std": None} and same["snr_db"]["mean"] == [[None] * 3] * 2
    assert same["video_cosine"]["mean"] == pytest.approx(1)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A teacher, the same as a student, and students without its only removable block; prompts."""
    root = tmp_path_factory.mktemp("rollouts")
    write_random_model(root / "teacher", "tiny-teacher", dtype="float32")
    whole = load_component(root / "teacher" / TRANSFORMER)
    save_component(root / "same" / "diffusion_transformer_320p", whole.network, whole.config, whole.params)
    params, config = keep_blocks(whole.params, whole.config, (1,))
    save_component(root / "pruned" / "diffusion_transformer_320p", whole.network, config, params)
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return root


def run(root, output, *students, source=None):
    source = source or ("--prompts", root / "prompts.txt")
    folders = ["--teacher", root / "teacher", "--student", *(root / name for name in students), "--output", output]
    return evaluate.main(["rollouts", *map(str, (*folders, *source, "--batch", BATCH))])


@pytest.fixture(scope="module")
def measured(root):
    assert run(root, root / "measured", "same", "pruned") == 0
    return json.loads((root / "measured" / "rollouts.json").read_text())


def test_the_teacher_is_itself_and_a_block_less_is_not(measured):
    same, pruned = (measured["students"][name] for name in ("same", "pruned"))
    assert (measured["prompts"], measured["blocks"], same["blocks"], pruned["blocks"]) == (4, 2, 2, 1)
    assert same["video_cosine"]["mean"] == pytest.approx(1) and same["video_snr_db"]["mean"] is None
    assert pruned["video_cosine"]["mean"] < 1 - 1e-4 and pruned["video_snr_db"]["mean"] < 40
    cosines, snrs = np.array(pruned["cosine"]["mean"]), np.array(pruned["snr_db"]["mean"])
    assert cosines.shape == snrs.shape == (2, 3) and np.isfinite(snrs).all()
    assert np.all(np.array(pruned["cosine"]["std"]) > 0)


def test_rollouts_are_those_of_generation(root, measured):
    """The same latents as `sample_latents`, whatever is sampled beside them."""
    teacher = open_model(root / "teacher", mode="monolithic")
    student = open_model(root / "teacher", str(find_transformer(root / "pruned")), mode="monolithic")
    text = encode_prompts(teacher, [*PROMPTS, ""], np.float32)
    rows = lambda *at: jax.tree.map(lambda x: x[np.array(at)], text)
    sampled = []
    for folder in (teacher, student):
        batches = sample_latents(folder, rows(0, 1, 2, 3), range(4), 1000, rows(4), None, BATCH, np.float32)
        sampled.append(np.stack([latents for batch in batches for latents in batch]))
    cosine = rollouts.cosine(*sampled)
    assert measured["students"]["pruned"]["video_cosine"]["mean"] == pytest.approx(cosine.mean(), abs=1e-5)
    network = calibration.load_teacher(student, np.float32)
    ends = rollouts.rollout_ends(network, calibration.Batch(rows(0, 1, 2), rows(4), (0, 1, 2), 1000))
    assert set(ends) == {(unit, stage) for unit in range(2) for stage in range(3)}
    np.testing.assert_allclose(rollouts.video_latents(ends), sampled[1][:BATCH], atol=1e-4)


def test_picture_and_report(root, measured):
    from PIL import Image

    # Three models; four prompts of five frames of 64 x 64 pixels.
    with Image.open(root / "measured" / "rollouts.png") as picture:
        assert picture.size == (4 * 5 * 64, 3 * 64)
    page = (root / "measured" / "report.html").read_text()
    for text in ("pruned", "equal", "SNR, dB", PROMPTS[0]):
        assert text in page


def test_the_toy_world_reads_clips_of_another_transformer(root, tmp_path):
    given = ["--model", root / "teacher", "--clips", 2, "--batch", BATCH]
    for name in ("same", "pruned"):
        more = ["--transformer", root / name, "--output", tmp_path / name]
        assert evaluate.main(["toy-world", *map(str, (*given, *more))]) == 0
    same, pruned = (json.loads((tmp_path / name / "toy_world.json").read_text()) for name in ("same", "pruned"))
    assert pruned["transformer"] == str(root / "pruned")
    assert same["frechet_distance"] != pruned["frechet_distance"]


def test_what_the_command_refuses(root, tmp_path):
    refused = lambda message: pytest.raises(UserError, match=message)
    with refused("give --prompts or --toy-world, one of both"):
        run(root, tmp_path, "pruned", source=("--prompts", root / "prompts.txt", "--toy-world", 2))
    with refused("--toy-world is 0: use 1 or more"):
        run(root, tmp_path, "pruned", source=("--toy-world", 0))
    with refused("nowhere: no such folder; give a transformer"):
        run(root, tmp_path, "nowhere")
    with refused("pruned is the name of two models"):
        run(root, tmp_path, "pruned", "pruned")
    with refused("teacher is the name of two models"):
        run(root, tmp_path, "teacher")
    with refused("text_encoder: holds a .*, not a video transformer"):
        run(root, tmp_path, "teacher/text_encoder")
