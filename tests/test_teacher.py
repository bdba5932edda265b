"""Teacher training: the loss, its stages, what is deployed, and the real command killed and moved to another mesh."""

import random
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train as train_command
from nd_jax.data.registry import build_data
from nd_jax.distill import registry
from nd_jax.errors import UserError
from nd_jax.train.deployed import load_deployed
from nd_jax.weights.folder import load_component, save_component
from tests import teacher_case
from tests.process_case import assert_close, finish, history, kill_after, start_command


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    return teacher_case.write_latents(tmp_path_factory.mktemp("data") / "latents")


@pytest.fixture(scope="module")
def built(latents, tmp_path_factory):
    """(method, a batch, parameters) of the smallest config."""
    config = registry.resolve_config(teacher_case.tiny_config(**{"data.latents": str(latents)}))
    batches, _ = build_data(config, tmp_path_factory.mktemp("work"))
    batch = {k: jnp.asarray(v) for k, v in next(batches).items() if k != "example"}
    method = registry.build_method(config)
    return method, batch, jax.jit(method.roles["denoiser"].init)()


def test_batch_has_the_columns_and_shapes(built):
    _, batch, _ = built
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
        "latents": ("float32", (24, 3, 8, 8, 2)),
        "ids": ("int32", (24, 28)),
        "mask": ("int32", (24, 28)),
        "clip_ids": ("int32", (24, 28)),
        "clip_2_ids": ("int32", (24, 28)),
    }


def test_a_fresh_network_says_zero_and_every_stage_counts_alike(built):
    """The output layer starts at zero, so the loss is the power of the targets; stages are rows in the ratio 1:1:1."""
    method, batch, params = built
    loss, metrics = jax.jit(method.losses["denoiser"])({"denoiser": params}, batch, jax.random.key(0))
    stages = [metrics[f"loss_stage{i}"] for i in range(3)]
    assert [float(s.weight) for s in stages] == [8.0, 8.0, 8.0]
    assert float(loss.total) == pytest.approx(sum(float(s.total) for s in stages))
    # White latents of variance 1.01: the last stage's target is s eps + (1 - s) U(z_1) - z_2 with s = 3/5.
    schedule_start = 0.6
    expected = schedule_start**2 + (1 - schedule_start) ** 2 / 4 + 1.01 - 2 * (1 - schedule_start) / 4
    assert float(stages[2].value) == pytest.approx(expected, rel=0.1)


def test_gradients_reach_every_parameter_that_has_an_effect(built):
    """Two updates in, because modulations and outputs start at zero."""
    method, batch, params = built
    nudged = jax.tree.map(lambda p: p + 0.02 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    total = lambda p: method.losses["denoiser"]({"denoiser": p}, batch, jax.random.key(0))[0].total
    gradients = jax.jit(jax.grad(total))(nudged)
    still = [
        "/".join(k.key for k in path)
        for path, g in jax.tree_util.tree_leaves_with_path(gradients)
        if not float(jnp.abs(g).max()) > 1e-9
    ]
    # The last block's text queries are dropped with its text output; a key's bias cancels in a softmax of CLIP.
    allowed = ("last_block/text/query", "attention/key/bias", "text/query_norm")
    assert [s for s in still if not any(a in s for a in allowed)] == []


def test_deployed_folders_read_back_equal(built, tmp_path):
    method, _, params = built
    for name, (network, config, tree) in method.deploy({"denoiser": jax.device_get(params)}).items():
        save_component(tmp_path / name, network, config, tree)
        read = load_component(tmp_path / name)
        assert read.config == config
        jax.tree.map(np.testing.assert_array_equal, read.params, tree)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "diffusion_transformer_320p",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    ]


def test_frozen_text_comes_from_a_folder_and_stays_out_of_the_checkpoint(built, latents, tmp_path):
    method, batch, params = built
    text = {n: v for n, v in method.deploy({"denoiser": jax.device_get(params)}).items() if n.startswith("text")}
    for name, (network, config, tree) in text.items():
        save_component(tmp_path / name, network, config, tree)
    changes = {"data.latents": str(latents), "model.train_text": False, "model.text_folder": str(tmp_path)}
    config = registry.resolve_config(teacher_case.tiny_config(**changes))
    frozen = registry.build_method(config)
    assert set(frozen.roles["denoiser"].abstract) == {"diffusion_transformer_320p"}
    given = {"denoiser": {"diffusion_transformer_320p": params["diffusion_transformer_320p"]}}
    given["text"] = frozen.roles["text"].load()
    same = [
        jax.jit(m.losses["denoiser"])(g, batch, jax.random.key(1))[0].total
        for m, g in ((method, {"denoiser": params}), (frozen, given))
    ]
    assert float(same[0]) == float(same[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.coupling": "none"}, "coupling 'none' is not one of shared, independent"),
        ({"objective.stage_ratios": (1, 1)}, "give one for each of 3 stages"),
        ({"model.mmdit.pooled_projection_dim": 12}, "pooled_projection_dim is 12, but the CLIPs put out 16"),
    ],
)
def test_bad_configs_are_named(latents, changes, message):
    config = registry.resolve_config(teacher_case.tiny_config(**{"data.latents": str(latents)} | changes))
    with pytest.raises(UserError, match=message):
        registry.build_method(config)


# --- the command ------------------------------------------------------------------------------------------------------

MESH_2x2x2 = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
MESH_1 = {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1}


def start(workdir, latents, devices=8, **overrides):
    changes = {"data.latents": str(latents)} | overrides
    return start_command(workdir, teacher_case.CONFIG, teacher_case.arguments(**changes), devices)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, latents):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(workdir, latents, **MESH_2x2x2))
    return workdir


def test_eight_devices_equal_one(tmp_path, latents, undisturbed):
    finish(start(tmp_path, latents, devices=1, **MESH_1))
    assert_close(history(tmp_path), history(undisturbed))


def test_a_kill_changes_nothing(tmp_path, latents, undisturbed):
    draw = random.Random(1)
    process = start(tmp_path, latents, **MESH_2x2x2)
    kill_after(process, tmp_path, draw.randint(2, 8), draw.uniform(0.0, 0.2))
    assert process.returncode in (-signal.SIGKILL, 0)
    finish(start(tmp_path, latents, **MESH_2x2x2))
    assert history(tmp_path) == history(undisturbed)


def test_what_is_deployed(undisturbed):
    deployed = load_deployed(undisturbed)
    assert set(deployed.tokenizers) == {"tokenizer", "tokenizer_2", "tokenizer_3"}
    raw = load_deployed(undisturbed, ema=False)
    name = "diffusion_transformer_320p"
    difference = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), deployed.components[name].params, raw.components[name].params
    )
    assert max(jax.tree.leaves(difference)) > 0  # The average lags behind.


def test_latents_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"experiments\.prepare"):
        train_command.main(
            ["--config", teacher_case.CONFIG, "--workdir", str(tmp_path / "w"), f"--config.data.latents={tmp_path}"]
        )
