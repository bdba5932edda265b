"""Step distillation as methods: roles, health, baselines, the walk, and the real command killed, resumed and moved."""

import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import tiny_steps
from experiments.config_file import load_config, plain
from nd_jax.data.registry import build_data
from nd_jax.distill import registry, steps_training
from nd_jax.errors import UserError
from nd_jax.train.loop import Diverged, train
from tests import teacher_case
from tests.process_case import assert_close, finish, history, kill_after, start_command

CONFIG = teacher_case.CONFIG.replace("teacher.py:tiny", "steps.py:")
OVERRIDES = {
    "num_steps": 6,
    "batch_size": 24,
    "log_every": 1,
    "eval_every": 3,
    "checkpoint.every": 2,
    "ema_decay": 0.9,
    "attention": "xla",
    "optimizer.warmup_steps": 1,
    "steps.std_ratio_limits": (0.0, 1e9),
}
# Rows of the middle stage alone, for what does not depend on the stage: a third of the program to compile.
ONE_STAGE = {"objective.stage_ratios": (0, 1, 0), "batch_size": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder with a random teacher of 2 blocks and latents."""
    root = tmp_path_factory.mktemp("steps")
    teacher_case.write_latents(root / "latents")
    teacher_case.write_model(root, 2)
    return root


def arguments(root, **changes):
    places = {"model.folder": str(root / "teacher"), "data.latents": str(root / "latents")}
    return [f"--config.{key}={value!r}" for key, value in (OVERRIDES | places | changes).items()]


def tiny_config(root, variant="tiny", **changes):
    return registry.resolve_config(plain(load_config(CONFIG + variant, arguments(root, **changes))))


def test_the_walks_stages_are_public_commands(tmp_path):
    """Students go on from the teacher's samples; every one is exported, read and drawn."""
    teacher = tmp_path / "teacher"
    (teacher / "diffusion_transformer_320p").mkdir(parents=True)
    (teacher / "generation.json").write_text(json.dumps({"guidance": [3.0, 2.0], "steps": [8, 8, 8]}))
    given = ["--teacher", str(teacher), "--workdir", str(tmp_path / "work"), "--seed", "7", "--prompts", "20"]
    walked = tiny_steps.stages(tiny_steps.parse(given))
    assert list(walked) == list(tiny_steps.NAMES)
    assert all(
        stage.command is None or stage.command[2].split(".")[0] in ("experiments", "converters")
        for stage in walked.values()
    )
    assert {"--teacher-samples", "20", "4007"} <= set(walked["latents"].command)
    trained = [stage.command for stage in walked.values() if stage.command and stage.command[2] == "experiments.train"]
    assert len(trained) == 4 and all("--config.model.guidance=(3.0, 2.0)" in command for command in trained)
    assert "--config.objective.steps=(4, 4, 4)" in walked["dmd4"].command
    assert {"--steps", "1,1,1", "--guidance", "1,1"} <= set(walked["clips_teacher_111"].command)
    with pytest.raises(UserError, match=r"has no generation\.json"):
        (teacher / "generation.json").unlink()
        tiny_steps.main(given)


@pytest.fixture(scope="module")
def built(root, tmp_path_factory):
    """(method, its roles' parameters, a batch)."""
    config = tiny_config(root)
    method = registry.build_method(config)
    batches, _ = build_data(config, tmp_path_factory.mktemp("work"))
    batch = {k: jnp.asarray(v) for k, v in next(batches).items() if k != "example"}
    return method, {name: role.load() for name, role in method.roles.items()}, batch


def test_each_role_learns_from_its_own_loss_alone(built):
    method, roles, batch = built
    names = ("student", "fake", "teacher")
    given = {name: roles[name] for name in names}

    @jax.jit
    def grads(given):
        loss = lambda role: lambda given: method.losses[role](roles | given, batch, jax.random.key(0))[0].value
        return {role: jax.grad(loss(role))(given) for role in ("student", "fake")}

    moved = jax.device_get(grads(given))
    learns = lambda tree: any(np.any(x) for x in jax.tree.leaves(tree))
    assert {role: [name for name in names if learns(moved[role][name])] for role in moved} == {
        "student": ["student"],
        "fake": ["fake"],
    }


def test_the_roles_and_their_turns(built, root):
    method, roles, _ = built
    assert method.schedule == ("fake", "fake", "student")
    assert set(roles) == {"student", "fake", "teacher", "text"}
    negative = tiny_config(root)["model"]["negative"]
    assert negative["ids"][0] == 1 and sum(negative["mask"]) == 1


def test_evaluation_shows_health(built):
    method, roles, batch = built
    means = jax.jit(method.evaluate)(roles, batch | {"valid": jnp.arange(24) < 20})
    got = method.summarize({name: float(mean.value) for name, mean in means.items()})
    assert set(method.limits) <= set(got)
    for name in ("clean_error", "std_ratio", "mean_shift", "direction_norm", "fake_error", "cauchy"):
        assert all(np.isfinite(got[f"{name}_stage{i}"]) for i in range(3))
    largest = max(float(np.abs(x).max()) for x in jax.tree.leaves(roles["student"]))
    assert got["student_largest_weight"] == pytest.approx(largest) and "fake_largest_weight" in got


def test_moments_are_said_as_ratio_and_shift():
    stage = {
        "student_mean": 3.0,
        "student_square": 13.0,
        "teacher_mean": 1.0,
        "teacher_square": 2.0,
        "clean_error": 0.5,
    }
    got = steps_training.summarize({f"{k}_stage0": v for k, v in stage.items()}, 1)
    assert got == {"clean_error_stage0": 0.5, "clean_error": 0.5, "std_ratio_stage0": 2.0, "mean_shift_stage0": 2.0}


@pytest.mark.parametrize("variant", ["progressive-tiny", "finetune-tiny"])
def test_baselines_lower_their_loss(root, variant, tmp_path):
    """On the real loop: the student's velocity at its own steps comes nearer to its target, and the fake is absent."""
    config = tiny_config(
        root,
        variant,
        **ONE_STAGE,
        **{"num_steps": 20, "eval_every": 20, "checkpoint.every": 20, "optimizer.learning_rate": 1e-2},
    )
    method = registry.build_method(config)
    assert set(method.roles) == set(steps_training.ROLES[config["steps"]["name"]])
    batches, held_out = build_data(config, tmp_path)
    train(config, method, batches, held_out.__iter__, tmp_path)
    losses = [value for (_, name), value in sorted(history(tmp_path).items()) if name == "train/loss"]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])


def test_collapse_ends_the_run_with_a_message(root, tmp_path):
    config = tiny_config(root, "finetune-tiny", **{"steps.std_ratio_limits": (0.999999, 1.000001)})
    batches, held_out = build_data(config, tmp_path)
    with pytest.raises(Diverged, match=r"collapse: std_ratio_stage0 is .* at step 0, outside of .*no checkpoint"):
        train(config, registry.build_method(config), batches, held_out.__iter__, tmp_path)


def test_killed_moved_and_resumed(root, tmp_path):
    """Across both optimisers and their turns: killed and continued is the same bit by bit, another mesh nearly so."""
    one = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1}
    start = lambda name, devices, **mesh: start_command(
        tmp_path / name, CONFIG + "tiny", arguments(root, **ONE_STAGE, **mesh), devices
    )
    finish(start("whole", 1, **one))
    killed = start("killed", 1, **one)
    kill_after(killed, tmp_path / "killed", 4, 0.05)
    assert killed.returncode in (-signal.SIGKILL, 0)
    finish(start("killed", 1, **one))
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    finish(start("mesh", 8, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}))
    assert_close(history(tmp_path / "mesh"), history(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.folder": ""}, r"config\.model\.folder is empty"),
        ({"objective.steps": (1, 1)}, r"steps \(1, 1\): give one positive number"),
        ({"objective.clean_form": "x"}, "clean_form 'x' is not one of"),
        ({"objective.tau_grid": (0.0, 1.0)}, "tau_grid .* above 0"),
        ({"steps.name": "gan"}, r"steps\.name 'gan' is not one of dmd, progressive, finetune"),
    ],
)
def test_bad_values_are_named(root, changes, message):
    with pytest.raises(UserError, match=message):
        registry.build_method(tiny_config(root, **changes))


def test_a_student_of_another_model_is_refused(root, tmp_path):
    other = tmp_path / "other"
    folder = root / "teacher" / "diffusion_transformer_320p"
    other.mkdir()
    sizes = json.loads((folder / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(sizes | {"pos_embed_max_size": 32}))
    (other / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="differ in more than their number of blocks"):
        tiny_config(root, **{"model.student": str(other)})
