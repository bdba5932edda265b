"""Recovery of a pruned transformer: equations 3 to 7, the cut, and the real command killed, resumed and moved."""

import dataclasses
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters import export_torch
from experiments.config_file import load_config, plain
from nd_jax.data.registry import build_data
from nd_jax.data.tokenizers import build_unigram_tokenizer
from nd_jax.data.toy_prompts import toy_prompts
from nd_jax.distill import prune, registry
from nd_jax.distill.pruning_plan import PruningPlan, write_plan
from nd_jax.errors import UserError
from nd_jax.models.mmdit import BlockStates, MMDiTConfig, PyramidMMDiT, keep_blocks
from nd_jax.weights.folder import load_component, save_component
from nd_jax.weights.mmdit import PYRAMID_MMDIT
from nd_jax.weights.network import abstract_params
from tests import teacher_case
from tests.process_case import assert_close, finish, history, kill_after, start_command

CONFIG = teacher_case.CONFIG.replace("teacher.py:tiny", "prune.py:stage2-tiny")
KEPT = (0, 2, 3)
OVERRIDES = {
    "num_steps": 6,
    "batch_size": 24,
    "log_every": 1,
    "eval_every": 3,
    "checkpoint.every": 2,
    "ema_decay": 0.9,
    "attention": "xla",
    "optimizer.warmup_steps": 1,
}

rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder with a random teacher of 4 blocks (all gates open), tokenizers, latents and a plan."""
    root = tmp_path_factory.mktemp("prune")
    latents = teacher_case.write_latents(root / "latents")
    config = registry.resolve_config(
        teacher_case.tiny_config(**{"data.latents": str(latents), "model.mmdit.num_layers": 4})
    )
    method = registry.build_method(config)
    draw = lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32)
    params = jax.tree.map(draw, method.roles["denoiser"].abstract)
    for name, (network, sizes, tree) in method.deploy({"denoiser": params}).items():
        save_component(root / "teacher" / name, network, sizes, tree)
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        build_unigram_tokenizer(toy_prompts(60, seed=1), 128, root / "teacher" / name)
    write_plan(root / "plan.json", PruningPlan(4, KEPT))
    return root


def arguments(root, **changes):
    places = {"model.folder": "teacher", "model.plan": "plan.json", "data.latents": "latents"}
    values = OVERRIDES | {key: str(root / place) for key, place in places.items()} | changes
    return [f"--config.{key}={value!r}" for key, value in values.items()]


def tiny_config(root, **changes):
    return registry.resolve_config(plain(load_config(CONFIG, arguments(root, **changes))))


@pytest.fixture(scope="module")
def built(root, tmp_path_factory):
    """(method, its roles' parameters, a batch)."""
    config = tiny_config(root)
    method = registry.build_method(config)
    batches, _ = build_data(config, tmp_path_factory.mktemp("work"))
    batch = {k: jnp.asarray(v) for k, v in next(batches).items() if k != "example"}
    return method, {name: role.load() for name, role in method.roles.items()}, batch


def test_mapped_states_are_equation_6():
    assert prune.mapped_states((0, 2, 3), "simple") == (1, 3, 4)
    assert prune.mapped_states((0, 2, 3), "next") == (2, 3, 4)
    assert prune.mapped_states((3,), "next") == prune.mapped_states((3,), "simple") == (4,)


@given(st.integers(1, 4), st.integers(0, 10_000))
def test_feature_losses_are_equations_4_and_5(blocks, seed):
    draw = np.random.default_rng(seed)
    normal = lambda *shape: draw.normal(size=shape).astype(np.float32)
    student = BlockStates(normal(blocks + 1, 2, 5, 3), normal(blocks, 2, 4, 3))
    teacher = BlockStates(normal(blocks, 2, 5, 3), normal(blocks - 1, 2, 4, 3))
    image_mask, text_mask = draw.integers(0, 2, (2, 5)) == 1, draw.integers(0, 2, (2, 4))
    image_mask[:, 0], text_mask[:, 0] = True, 1
    got = jax.jit(prune.feature_losses)(student, teacher, image_mask, text_mask)
    for row in range(2):
        seen, read = image_mask[row], text_mask[row] == 1
        image = [np.square(student.image[k + 1, row][seen] - teacher.image[k, row][seen]).mean() for k in range(blocks)]
        np.testing.assert_allclose(got[0][row], np.mean(image), rtol=1e-4)
        angles = [
            1 - np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))
            for k in range(blocks - 1)
            for a, b in zip(student.text[k + 1, row][read], teacher.text[k, row][read], strict=True)
        ]
        np.testing.assert_allclose(got[1][row], np.mean(angles) if angles else 0.0, rtol=1e-3, atol=1e-5)


def test_the_student_is_cut_out_of_the_teacher(root, built):
    _, roles, _ = built
    whole = load_component(root / "teacher" / "diffusion_transformer_320p")
    kept, config = keep_blocks(whole.params, whole.config, KEPT)
    jax.tree.map(np.testing.assert_array_equal, roles["student"]["diffusion_transformer_320p"], kept)
    assert config.num_layers == 3


def test_loss_is_the_weighted_sum_and_only_the_student_learns(built):
    method, roles, batch = built

    def loss(student, teacher):
        mean, parts = method.losses["student"](
            roles | {"student": student, "teacher": teacher}, batch, jax.random.key(0)
        )
        return mean.value, parts

    (value, parts), (mine, theirs) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        roles["student"], roles["teacher"]
    )
    expected = sum(w * parts[n].value for n, w in (("data", 1.0), ("flow", 1.0), ("image", 0.1), ("text", 0.1)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert all(float(part.value) > 0 for part in parts.values())
    assert not any(np.any(g) for g in jax.tree.leaves(theirs)) and any(np.any(g) for g in jax.tree.leaves(mine))


@pytest.mark.parametrize("mapping", ["simple", "next"])
def test_an_unpruned_student_has_the_teachers_features(root, built, mapping, tmp_path):
    """With all blocks left, all terms but the data's are 0, whichever state they are compared with."""
    _, roles, batch = built
    write_plan(tmp_path / "all.json", PruningPlan(4, (0, 1, 2, 3)))
    method = registry.build_method(
        tiny_config(root, **{"model.plan": str(tmp_path / "all.json"), "loss.mapping": mapping})
    )
    given = roles | {"student": roles["teacher"]}
    _, parts = jax.jit(method.losses["student"])(given, batch, jax.random.key(0))
    assert float(parts["data"].value) > 0.1
    for name in ("flow", "image", "text"):
        assert abs(float(parts[name].value)) < 1e-5, name


def test_stage_1_needs_no_teacher(root):
    weights = {"loss.flow_weight": 0.0, "loss.image_weight": 0.0, "loss.text_weight": 0.0}
    assert set(registry.build_method(tiny_config(root, **weights)).roles) == {"student", "text"}
    stage1 = plain(load_config(CONFIG.replace("stage2", "stage1"), arguments(root)))
    assert set(registry.build_method(registry.resolve_config(stage1)).roles) == {"student", "text"}


def test_evaluation_says_how_far_from_data_and_teacher(built):
    method, roles, batch = built
    means = jax.jit(method.evaluate)(roles, batch | {"valid": jnp.arange(24) < 20})
    got = method.summarize({name: float(mean.value) for name, mean in means.items()})
    stages = {f"velocity_error_stage{i}" for i in range(3)}
    assert set(got) == stages | {"velocity_error", "flow_error", "image_error", "text_error"}
    assert got["velocity_error"] == pytest.approx(np.mean([got[name] for name in stages]))
    assert float(means["flow_error_stage0"].weight) == 20


def test_stages_in_turn_killed_moved_and_resumed(root, tmp_path):
    """Stage 1, its folder, stage 2 from it; killed and continued, and the same on another mesh."""
    stage1 = CONFIG.replace("stage2", "stage1")
    one = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1}
    finish(start_command(tmp_path / "stage1", stage1, arguments(root, **one), 1))
    assert export_torch.main(["--checkpoint", str(tmp_path / "stage1"), "--output", str(tmp_path / "model")]) == 0
    student = tmp_path / "model" / "diffusion_transformer_320p"
    assert load_component(student).config.num_layers == 3
    given = lambda **mesh: arguments(root, **{"model.student": str(student)}, **mesh)
    start = lambda name, devices, **mesh: start_command(tmp_path / name, CONFIG, given(**mesh), devices)
    finish(start("whole", 1, **one))
    killed = start("killed", 1, **one)
    kill_after(killed, tmp_path / "killed", 4, 0.05)
    assert killed.returncode in (-signal.SIGKILL, 0)
    finish(start("killed", 1, **one))
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    finish(start("mesh", 8, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}))
    assert_close(history(tmp_path / "mesh"), history(tmp_path / "whole"))


def test_full_size_by_shape():
    """24 -> 18 blocks without the context embedder."""
    teacher = MMDiTConfig(num_layers=24)
    kept = [k for k in range(24) if k not in (3, 7, 11, 14, 18, 20)]
    pruned = jax.eval_shape(lambda p: keep_blocks(p, teacher, kept)[0], abstract_params(PYRAMID_MMDIT, teacher))
    assert sum(leaf.size for leaf in jax.tree.leaves(pruned)) == 1_512_155_200
    student = dataclasses.replace(teacher, num_layers=18)
    expected = abstract_params(PYRAMID_MMDIT, student)
    assert jax.tree.map(lambda x: x.shape, pruned) == jax.tree.map(lambda x: x.shape, expected)
    assert PyramidMMDiT(student).config.num_layers == 18


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.folder": ""}, r"config\.model\.folder is empty"),
        ({"model.plan": ""}, r"config\.model\.plan is empty"),
        ({"loss.mapping": "last"}, r"loss\.mapping is 'last'"),
        ({"loss.image_weight": -1.0}, r"loss\.image_weight is -1\.0"),
        (
            {f"loss.{name}_weight": 0.0 for name in ("data", "flow", "image", "text")},
            "nothing would be learned",
        ),
    ],
)
def test_bad_values_are_named(root, changes, message):
    with pytest.raises(UserError, match=message):
        registry.build_method(tiny_config(root, **changes))


def test_a_plan_or_student_of_another_model_is_refused(root, tmp_path):
    write_plan(tmp_path / "plan.json", PruningPlan(5, (0, 4)))
    with pytest.raises(UserError, match=r"plans for 5 blocks and .* has 4"):
        tiny_config(root, **{"model.plan": str(tmp_path / "plan.json")})
    with pytest.raises(UserError, match="give the transformer that stage 1 trained by this plan"):
        tiny_config(root, **{"model.student": str(root / "teacher" / "diffusion_transformer_320p")})
