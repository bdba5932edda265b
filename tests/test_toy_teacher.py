"""The toy teacher's walk: its commands, its report and model card, and the evaluation that reads clips back."""

import json

import numpy as np
import pytest

from experiments import evaluate, random_model, stages, toy_teacher
from experiments.toy_teacher_report import write_model_card, write_toy_teacher_report
from nd_jax.errors import UserError
from tests.teacher_case import tiny_config, write_latents


def walk(workdir, videos=None):
    captions = None if videos is None else workdir / "captions.txt"
    return toy_teacher.Walk(workdir, 3, 100, videos, captions, True, ("--config.num_steps=2",))


def test_stage_commands_are_the_public_ones(tmp_path):
    walked = toy_teacher.stages(walk(tmp_path))
    for name, stage in walked.items():
        assert (stage.command is None) == (name in ("untrained_model", "report"))
        assert stage.command is None or stage.command[2].split(".")[0] in ("experiments", "converters")
    trained = [name for name, stage in walked.items() if stage.command and stage.command[2] == "experiments.train"]
    assert trained == ["frames", "vae", "teacher", "wrong"]
    assert all("--config.seed=3" in walked[name].command for name in trained)
    assert "--config.objective.coupling=independent" in walked["wrong"].command
    assert "--config.num_steps=2" in walked["wrong"].command


def test_real_videos_take_the_place_of_the_toy_world(tmp_path):
    walked = toy_teacher.stages(walk(tmp_path, videos=tmp_path / "videos"))
    assert not {"clips", "untrained", "wrong_clips"} & set(walked) and "wrong" in walked
    assert "--toy-world" not in walked["latents"].command and "--videos" in walked["latents"].command
    assert f"--config.data.videos={tmp_path / 'videos'}" in walked["vae"].command
    with pytest.raises(UserError, match="--videos and --captions go together"):
        toy_teacher.main(["--workdir", str(tmp_path), "--videos", str(tmp_path)])


def test_a_stage_of_another_walk_is_refused(tmp_path):
    with pytest.raises(UserError, match="stage wrong is no part of this walk"):
        toy_teacher.main(["--workdir", str(tmp_path), "--only", "wrong"])


def test_an_interrupted_training_ends_the_walk(tmp_path):
    """A training that SIGTERM reached saves and exits with 0: the stages behind it must not take it for done."""
    result = {"step": 577, "interrupted": True}
    walked = {"teacher": stages.Stage("train", lambda: dict(result), stages.python("platform"))}
    with pytest.raises(UserError, match="stage teacher was interrupted; run the same command"):
        stages.run_stages(tmp_path, walked)
    result["interrupted"] = False
    stages.run_stages(tmp_path, walked)
    assert stages.read_results(tmp_path, walked)["teacher"]["result"] == result


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """A folder of random weights, evaluated on two clips."""
    folder = tmp_path_factory.mktemp("evaluated")
    random_model.write_random_model(folder / "model", "tiny-teacher", dtype="float32")
    assert (
        evaluate.main(["toy-world", "--model", f"{folder}/model", "--output", f"{folder}/clips", "--clips", "2"]) == 0
    )
    return folder


def test_evaluation_of_random_weights(evaluated):
    result = json.loads((evaluated / "clips" / "toy_world.json").read_text())
    assert result["chance"]["all"] == pytest.approx(1 / 6 / 4 / 4 / 3)
    assert all(entry["count"] == 2 for entry in result["accuracy"].values())
    # 4 steps of the first latent frame and 3 of the other, both branches of guidance.
    assert result["function_evaluations"] == 14
    assert len(result["shown"]) == 2 and np.isfinite(result["frechet_distance"])
    assert sorted(p.name for p in (evaluated / "clips").iterdir()) == [
        "clip-00.mp4",
        "clip-01.mp4",
        "strips.png",
        "toy_world.json",
    ]


def test_one_clip_is_too_few(tmp_path):
    with pytest.raises(UserError, match="use 2 or more"):
        evaluate.main(["toy-world", "--model", str(tmp_path), "--output", str(tmp_path), "--clips", "1"])


def test_report_and_model_card(evaluated, tmp_path):
    clips = json.loads((evaluated / "clips" / "toy_world.json").read_text())
    latents = write_latents(tmp_path / "latents", 40)
    runs = {"frames": {"eval/psnr_db": 29.5}, "vae": {"eval/psnr_db": 24.25}}
    runs |= {name: {"eval/velocity_error": 0.125} for name in ("teacher", "wrong")}
    for name, metrics in runs.items():
        (tmp_path / name).mkdir()
        lines = [{"step": k, "train/loss": 1.0 / (k + 1), "train/loss_stage0": 0.5, **metrics} for k in range(3)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / name / "config.json").write_text(json.dumps(tiny_config(**{"data.latents": str(latents)})))
    for name in ("clips", "untrained", "wrong_clips"):
        (tmp_path / name).symlink_to(evaluated / "clips")
    results = runs | dict.fromkeys(("clips", "untrained", "wrong_clips"), clips)
    for name, stage in toy_teacher.stages(walk(tmp_path)).items():
        if not stage.always:
            note = {"result": results.get(name, {"causal_video_vae": 2_000_000}), "seconds": 60.0}
            (tmp_path / "stages").mkdir(exist_ok=True)
            (tmp_path / "stages" / f"{name}.json").write_text(json.dumps(note | {"command": "python -m x"}))
    notes = stages.read_results(tmp_path, toy_teacher.stages(walk(tmp_path)))
    write_toy_teacher_report(tmp_path / "report.html", tmp_path, 3, notes)
    page = (tmp_path / "report.html").read_text()
    for text in ("Does it follow its captions?", "wrong objective", "Loss per stage", "24.2 dB", clips["shown"][0]):
        assert text in page
    write_model_card(tmp_path / "README.md", tmp_path, 3, notes)
    card = (tmp_path / "README.md").read_text()
    for text in (
        "--seed 3",
        "8 steps of 24 rows on 40 clips",
        "| untrained |",
        "| causal_video_vae | 2.00 |",
        "24.2 dB",
    ):
        assert text in card
    (tmp_path / "stages" / "clips.json").unlink()
    with pytest.raises(UserError, match="stage clips has not been run"):
        stages.read_results(tmp_path, toy_teacher.stages(walk(tmp_path)))
