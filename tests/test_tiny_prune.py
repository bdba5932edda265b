"""The pruning walk: its commands, random choices, velocities on held-out states, and its table and report."""

import importlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from converters import export_torch
from experiments import evaluate, tiny_prune, train
from experiments import tiny_prune_report as report
from experiments.config_file import load_config, plain
from experiments.evaluate_rollouts import TEACHER
from nd_jax.data.registry import build_data
from nd_jax.data.tokenizers import build_unigram_tokenizer
from nd_jax.data.toy_prompts import toy_prompts
from nd_jax.distill import registry
from nd_jax.distill.pruning_plan import PruningPlan, read_plan, write_plan
from nd_jax.errors import UserError
from nd_jax.train.checkpoint import claim_workdir
from nd_jax.weights.folder import load_component, save_component
from tests import teacher_case

CONFIG = teacher_case.CONFIG.replace("teacher.py:tiny", "prune.py:stage1-tiny")
BLOCKS = 5
ROOT = Path(__file__).parent.parent


def parsed(workdir, *more):
    return tiny_prune.parse(["--teacher", "toy", "--workdir", str(workdir), "--seed", "3", *more])


# --- stages -----------------------------------------------------------------------------------------------------------


def test_stage_commands_are_the_public_ones(tmp_path):
    walked = tiny_prune.stages(parsed(tmp_path, "--stage2-steps", "7", "--train=--config.batch_size=24"))
    assert tuple(walked) == tiny_prune.NAMES
    for name, stage in walked.items():
        assert (stage.command is None) == (name in ("prompts", "choices", "report"))
        assert stage.command is None or stage.command[2].split(".")[0] in ("experiments", "converters")
    student = f"--config.model.student={tmp_path}/models/stage1/diffusion_transformer_320p"
    for name in tiny_prune.TRAININGS:
        command = walked[name].command
        variant = "stage1-tiny" if name == "stage1" else "stage2-tiny"
        assert command[2:5] == ["experiments.train", "--config", f"experiments/configs/prune.py:{variant}"]
        for given in ("seed=3", "model.folder=toy", f"model.plan={tmp_path}/plan/plan.json", "batch_size=24"):
            assert f"--config.{given}" in command
        assert ("--config.num_steps=7" in command) == (name != "stage1")
        assert (student in command) == (name in ("stage2", "stage2_no_features"))
        weights = [part for part in command if "_weight" in part]
        assert weights == (list(tiny_prune.WITHOUT_FEATURES) if name == "stage2_no_features" else [])
    for what in ("velocity", "rollouts"):
        models = [f"{tmp_path}/models/{name}" for name in (*tiny_prune.STUDENTS, *tiny_prune.RANDOM)]
        begin = walked[what].command.index("--student") + 1
        assert walked[what].command[begin : begin + len(models)] == models


def test_commands_accept_their_arguments(tmp_path):
    args = parsed(tmp_path, "--stage1-steps", "7", "--train=--config.batch_size=24")
    for stage in tiny_prune.stages(args).values():
        if stage.command is None:
            continue
        module, given = importlib.import_module(stage.command[2]), stage.command[3:]
        if module is train:
            command, overrides = train.parse(given)
            config = plain(load_config(str(ROOT / command.config), overrides))
            assert (config["seed"], config["batch_size"], config["model"]["folder"]) == (3, 24, "toy")
        else:
            parse = export_torch.parse_args if module is export_torch else module.parse
            assert parse(given)


def test_clips_are_of_the_right_model_and_as_many(tmp_path):
    walked = tiny_prune.stages(parsed(tmp_path, "--clips", "80", "--random-clips", "20"))
    value = lambda name, flag: walked[name].command[walked[name].command.index(flag) + 1]
    assert "--transformer" not in walked["clips_teacher"].command
    for name, model, clips, batch in (
        ("clips_stage2", "stage2", "80", "50"),
        ("clips_pruned", "pruned", "80", "50"),
        ("clips_plan", "pruned", "20", "20"),
        ("clips_random_4", "random_4", "20", "20"),
    ):
        assert value(name, "--transformer") == f"{tmp_path}/models/{model}"
        assert (value(name, "--clips"), value(name, "--batch")) == (clips, batch)
        assert value(name, "--model") == "toy"


def test_given_latents_are_used(tmp_path):
    walked = tiny_prune.stages(parsed(tmp_path, "--latents", "cached"))
    assert "latents" not in walked and "--config.data.latents=cached" in walked["stage1"].command


def test_calibration_and_training_keep_away_from_the_evaluations(tmp_path):
    args = parsed(tmp_path)
    assert tiny_prune.write_prompts(args) == {"count": 32, "seed": 3003}
    assert (tmp_path / "prompts.txt").read_text().splitlines() == toy_prompts(32, 3003)
    command = tiny_prune.stages(args)["latents"].command
    assert command[command.index("--seed") + 1] == "2003"


def test_what_the_walk_refuses(tmp_path):
    with pytest.raises(UserError, match="toy: has no diffusion_transformer_320p"):
        tiny_prune.main(["--teacher", "toy", "--workdir", str(tmp_path)])
    with pytest.raises(SystemExit):
        parsed(tmp_path, "--clips", "0")


# --- random choices ---------------------------------------------------------------------------------------------------


def test_random_choices_are_seeded_differ_and_keep_the_last_block():
    plan = PruningPlan(8, (0, 1, 3, 4, 6, 7))
    for seed in range(20):
        choices = tiny_prune.random_choices(plan, 5, seed)
        assert choices == tiny_prune.random_choices(plan, 5, seed)
        assert len(set(choices)) == 5 and plan.removed not in choices
        assert all(len(set(removed)) == 2 and max(removed) < 7 for removed in choices)
    assert len({tuple(tiny_prune.random_choices(plan, 5, seed)) for seed in range(20)}) > 15
    with pytest.raises(UserError, match=r"1 of 4 blocks can be removed in 2 other ways, and 5 random ones"):
        tiny_prune.random_choices(PruningPlan(4, (0, 1, 3)), 5, 0)


# --- students and velocities ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A random teacher of 5 blocks with its plan, cut students, and the workdir of a training that has not begun."""
    root = tmp_path_factory.mktemp("tiny_prune")
    teacher_case.write_latents(root / "latents")
    method = teacher_method(root, BLOCKS)
    rng = np.random.default_rng(0)
    draw = lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32)
    params = jax.tree.map(draw, method.roles["denoiser"].abstract)
    for name, (network, config, tree) in method.deploy({"denoiser": params}).items():
        save_component(root / "teacher" / name, network, config, tree)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        build_unigram_tokenizer(toy_prompts(60, seed=1), 128, root / "teacher" / name)
    (root / "plan").mkdir()
    write_plan(root / "plan" / "plan.json", PruningPlan(BLOCKS, (0, 3, 4)))
    folders = {"--teacher": "teacher", "--workdir": ".", "--latents": "latents"}
    args = tiny_prune.parse([text for flag, folder in folders.items() for text in (flag, str(root / folder))])
    removed = tiny_prune.cut_students(args)
    command = tiny_prune.stages(args)["stage1"].command[7:]
    config = plain(load_config(CONFIG, [*command, "--config.batch_size=24", "--config.attention='xla'"]))
    claim_workdir(root / "stage1", registry.resolve_config(config))
    return root, removed


def teacher_method(root, blocks):
    sizes = {"data.latents": str(root / "latents"), "model.mmdit.num_layers": blocks}
    return registry.build_method(registry.resolve_config(teacher_case.tiny_config(**sizes)))


def test_students_are_cut_as_their_plans_say(root):
    root, removed = root
    whole = load_component(root / "teacher" / tiny_prune.TRANSFORMER)
    assert removed["pruned"] == [1, 2] and tuple(removed) == ("pruned", *tiny_prune.RANDOM)
    for name, blocks in removed.items():
        plan = read_plan(root / "models" / name / "plan.json")
        assert list(plan.removed) == blocks
        student = load_component(root / "models" / name / tiny_prune.TRANSFORMER)
        assert student.config.num_layers == 3
        kept = np.array(plan.kept[:-1])
        jax.tree.map(
            lambda ours, theirs, kept=kept: np.testing.assert_array_equal(ours, theirs[kept]),
            student.params["blocks"],
            whole.params["blocks"],
        )


def test_velocities_are_those_of_the_teachers_own_method(root):
    """The same rows and states as `teacher` evaluates for a network of the student's size."""
    root, _ = root
    students = [root / "models" / name for name in ("pruned", "random_0")]
    given = ["--run", root / "stage1", "--student", *students, "--output", root / "velocity"]
    assert evaluate.main(["velocity", *map(str, given)]) == 0
    result = json.loads((root / "velocity" / "velocity.json").read_text())
    models = result["models"]
    assert {name: entry["blocks"] for name, entry in models.items()} == {TEACHER: 5, "pruned": 3, "random_0": 3}
    (batch,) = build_data(json.loads((root / "stage1" / "config.json").read_text()), root)[1]
    assert result["rows"] == batch["valid"].sum() == 2
    del batch["example"]
    text = {
        name: load_component(root / "teacher" / name).params
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3")
    }
    transformer = load_component(root / "models" / "pruned" / tiny_prune.TRANSFORMER).params
    params = {"denoiser": {tiny_prune.TRANSFORMER: transformer, **text}}
    for key, mean in jax.jit(teacher_method(root, 3).evaluate)(params, batch).items():
        assert models["pruned"][key] == pytest.approx(float(mean.value), rel=1e-4)
    assert models[TEACHER]["flow_error"] < 1e-8
    assert models["pruned"]["flow_error"] > 1e-3 and models["random_0"]["flow_error"] > 1e-3
    assert models["pruned"]["velocity_error"] != models["random_0"]["velocity_error"]


def test_velocities_of_other_models_are_refused(root, tmp_path):
    root, _ = root
    run = lambda *given: evaluate.main(["velocity", *map(str, given), "--output", str(tmp_path)])
    with pytest.raises(UserError, match=r"text_encoder holds a .*, but "):
        run("--run", root / "stage1", "--student", root / "teacher" / "text_encoder")
    (tmp_path / "config.json").write_text(json.dumps({"method": "teacher"}))
    with pytest.raises(UserError, match="of method 'teacher'; give the workdir of a training of `prune`"):
        run("--run", tmp_path, "--student", root / "models" / "pruned")


# --- table and report -------------------------------------------------------------------------------------------------

ACCURACY = {"teacher": 0.9, "pruned": 0.5, "stage1": 0.6, "stage2_alone": 0.7, "stage2": 0.86, "plan": 0.5}


def accuracy(rate):
    entry = {"rate": rate, "low": rate - 0.05, "high": rate + 0.05}
    return {key: entry for key in report.ATTRIBUTES} | {"all": entry | {"rate": rate / 2}}


@pytest.fixture(scope="module")
def notes():
    """What the stages of a whole walk note, with numbers made up."""
    models = (*tiny_prune.STUDENTS, *tiny_prune.RANDOM)
    spread = lambda value: {"mean": [[value] * 3] * 2, "std": [[0.1] * 3] * 2}
    video = lambda value: {"mean": value, "std": 0.1}
    student = lambda k: {
        "cosine": spread(0.9),
        "snr_db": spread(10.0),
        "video_cosine": video(0.9 - k / 100),
        "video_snr_db": video(9.5),
    }
    velocity = lambda k, name: {"blocks": 6, "velocity_error": 0.1 + k / 100, "flow_error": 0.02}
    result = {
        "plan": {"num_layers": 8, "kept": [0], "strategy": "x", "removed": [{"block": 3}, {"block": 6}]},
        "choices": {name: [0, k + 1] for k, name in enumerate(("pruned", *tiny_prune.RANDOM))},
        "velocity": {"rows": 240, "models": {n: velocity(k, n) for k, n in enumerate(("teacher", *models))}},
        "rollouts": {"prompts": 50, "students": {n: student(k) for k, n in enumerate(models)}, "shown": ["a"]},
    }
    for name in tiny_prune.CLIPS:
        rate = ACCURACY.get(name.removeprefix("clips_"), 0.4)
        result[name] = {"accuracy": accuracy(rate), "frechet_distance": 1.0, "clips": 200}
    names = [name for name in tiny_prune.NAMES if name != "report"]
    return {name: {"result": result.get(name, {}), "seconds": 60.0, "command": f"python -m {name}"} for name in names}


def test_results_say_what_recovers_and_how_random_choices_spread(notes):
    results = report.summarize_walk(notes)
    assert tuple(results["models"]) == ("teacher", *tiny_prune.STUDENTS) == tuple(report.MODELS)
    back = {name: entry["recovered"]["mean"] for name, entry in results["models"].items()}
    expected = {"teacher": 1, "pruned": 0, "stage1": 0.25, "stage2_alone": 0.5, "stage2": 0.9}
    assert {name: back[name] for name in expected} == pytest.approx(expected)
    assert back["stage2_no_features"] == pytest.approx(-0.25)
    assert results["models"]["stage2"]["recovered"]["all"] == pytest.approx(0.9)
    velocities = [results["choices"][name]["velocity_error"] for name in tiny_prune.RANDOM]
    spread = results["spread"]["velocity_error"]
    assert spread["mean"] == pytest.approx(np.mean(velocities)) and spread["std"] == pytest.approx(np.std(velocities))
    assert (spread["min"], spread["max"]) == (min(velocities), max(velocities))
    assert spread["plan_beats_mean"] and spread["plan_beats"] == 5
    assert results["spread"]["mean"]["plan"] == 0.5 and results["spread"]["mean"]["plan_beats"] == 5
    # A tie beats nothing.
    assert not results["spread"]["flow_error"]["plan_beats_mean"] and results["spread"]["flow_error"]["plan_beats"] == 0
    assert results["choices"]["random_1"]["removed"] == [0, 3]


def test_nothing_lost_is_nothing_recovered():
    assert report.recovered(0.5, 0.5, 0.4) is None
    assert report.recovered(0.8, 0.4, 0.6) == pytest.approx(0.5)


def test_table_and_report(notes, tmp_path, capsys):
    from PIL import Image

    results = report.summarize_walk(notes)
    for name in tiny_prune.TRAININGS:
        (tmp_path / name).mkdir()
        line = {"step": 2, "train/loss": 0.5, "train/flow": 0.1, "eval/velocity_error": 0.2}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "rollouts").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "rollouts" / "rollouts.png")
    report.write_prune_report(tmp_path / "report.html", tmp_path, 3, results, notes)
    page = (tmp_path / "report.html").read_text()
    for text in (
        "What recovery brings back",
        "stage 1, then 2 without features",
        "80.35",
        "without 3, 6",
        "5 of 5",
        "python -m stage2_alone",
        "latent frame 1",
    ):
        assert text in page
    report.print_table(results)
    assert "stage 1, then 2 without features" in capsys.readouterr().out
