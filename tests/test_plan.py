"""`experiments.plan`: the steps of training, compiled for other devices, and the sizes that a config leaves out."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import plan
from experiments.config_file import load_config, plain
from experiments.plan_sizes import batch_row, fill_folders
from nd_jax.distill.registry import build_method, resolve_config
from nd_jax.errors import UserError
from nd_jax.train import ahead, loop, sharding
from nd_jax.train import step as steps
from nd_jax.train.chips import CHIPS
from tests.toy_method import WIDTH, toy_method

CONFIGS = Path(__file__).parent.parent / "experiments" / "configs"
# Checked against the released state dicts in tests/layouts.
STUDENT_18, EMBEDDER, TEACHER_24 = 1_512_155_200, 4096 * 1536 + 1536, 2_028_334_144
T5_XXL = 4_762_310_656

TOY = {
    "seed": 0,
    "num_steps": 30,
    "batch_size": 16,
    "microbatches": 1,
    "ema_decay": 0.9,
    "mesh": {"data": 2, "fsdp": 4, "tensor": 1},
    "optimizer": plain(load_config(f"{CONFIGS}/text_encoder.py:tiny"))["optimizer"],
}
TOY_ROW = {"x": jax.ShapeDtypeStruct((WIDTH,), np.float32), "weight": jax.ShapeDtypeStruct((), np.float32)}


def toy_plan(**changes):
    return plan.plan_mesh(TOY | changes, toy_method(), TOY_ROW, None, jax.devices(), 1)


@pytest.fixture(scope="module")
def planned():
    return toy_plan()


def test_the_plan_is_of_the_step_that_trains(planned):
    """Arguments, results and temporaries are those of the step that the loop would run on these devices."""
    method, mesh = toy_method(), sharding.make_mesh(TOY["mesh"])
    with jax.set_mesh(mesh):
        optimizers = loop.make_optimizers(TOY, method)
        shardings = steps.state_shardings(loop.abstract_state(TOY, method, optimizers), method, optimizers, mesh)
        frozen_shardings = steps.frozen_shardings(method, mesh)
        place = lambda n, s: jax.jit(method.roles[n].init, out_shardings=s)()
        params = {n: place(n, s) for n, s in shardings.params.items()}
        state = jax.jit(lambda p: steps.new_state(method, p, optimizers, True, 0), out_shardings=shardings)(params)
        frozen = {n: place(n, s) for n, s in frozen_shardings.items()}
        batch = sharding.global_batch({"x": np.ones((16, WIDTH), np.float32), "weight": np.ones(16, np.float32)}, mesh)
        train_steps = loop.make_train_steps(TOY, method, optimizers, shardings, frozen_shardings, mesh)
        real = train_steps["student"].lower(state, frozen, batch).compile().memory_analysis()
    memory = next(step["memory"] for step in planned["steps"] if step["role"] == "student")
    assert memory["arguments"] == real.argument_size_in_bytes
    assert memory["output"] == real.output_size_in_bytes and memory["alias"] == real.alias_size_in_bytes
    assert memory["temporaries"] == real.temp_size_in_bytes
    # One device's share of what is in memory before the step.
    held = [shard.data.nbytes for x in jax.tree.leaves((state, frozen, batch)) for shard in x.addressable_shards[:1]]
    assert planned["resident_bytes"] == sum(held)


def test_a_plan_counts_every_role(planned):
    assert [step["role"] for step in planned["steps"]] == ["fake", "student"] and planned["fits"]
    for step in planned["steps"]:
        # Forward of the role and of the teacher, and the gradient of the role's kernel.
        assert step["flops"]["per_device"] == 3 * 2 * 16 * WIDTH * WIDTH / 8
        assert step["flops"]["partitioned"] == step["flops"]["per_device"]
        assert step["flops"]["by_dtype"].keys() == {"float32"} and step["open_loops"] == 0
        # Both float32 kernels are gathered from the four devices that hold their rows.
        gathered = [c["bytes"] for c in step["collectives"] if (c["kind"], c["devices"]) == ("all-gather", 4)]
        assert sum(gathered) >= 2 * 4 * WIDTH * WIDTH
        assert any(c["kind"] == "all-reduce" for c in step["collectives"])


def test_microbatches_are_counted_like_the_whole_batch():
    half = toy_plan(microbatches=2)
    for step in half["steps"]:
        assert step["flops"]["per_device"] == step["flops"]["partitioned"] == 3 * 2 * 16 * WIDTH * WIDTH / 8


def test_what_another_role_needs_is_in_memory_too():
    """A step reads its own optimiser state alone, but what it does not read stays where it is."""
    method, mesh = toy_method(), sharding.make_mesh(TOY["mesh"])
    arguments = ahead.step_arguments(TOY, method, mesh, TOY_ROW)
    unread = jax.ShapeDtypeStruct((64, 4), np.float32, sharding=sharding.batch_sharding(mesh))
    more = ahead.StepArguments(arguments.state, arguments.frozen, arguments.batch | {"unread": unread}, {})
    more.train_steps["student"] = jax.jit(lambda state, frozen, batch: (state, batch["x"].sum()), donate_argnums=0)
    memory = ahead.compile_step("student", more, mesh).memory
    frozen = ahead.resident_bytes(arguments.frozen)
    assert memory.elsewhere == frozen + 64 * 4 * 4 // 8 + ahead.resident_bytes(arguments.batch["weight"])
    assert memory.peak >= memory.arguments + memory.elsewhere


# In a process of its own, whose memory nothing else fills; kernels of 16 MiB, whose blocks go back when they are freed.
# Few rows: the workspace of matrix products, which is in no plan, grows with them and depends on how devices overlap.
MEASURED = """
import ctypes, gc, json, re
from pathlib import Path
from tests import toy_method as toy

toy.WIDTH = 2048

import jax
import jax.numpy as jnp
from nd_jax.train import ahead, sharding

def memory(name):
    return 1024 * int(re.search(rf"{name}:\\s*(\\d+) kB", Path("/proc/self/status").read_text()).group(1))

method, config = toy.toy_method(), toy.toy_config(batch_size=1024)
mesh = sharding.make_mesh(config["mesh"])
row = {"x": jax.ShapeDtypeStruct((toy.WIDTH,), jnp.float32), "weight": jax.ShapeDtypeStruct((), jnp.float32)}
arguments = ahead.step_arguments(config, method, mesh, row)
planned = ahead.compile_step("student", arguments, mesh).memory
given = (arguments.state, arguments.frozen, arguments.batch)
ones = lambda: jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), given)
with jax.set_mesh(mesh):
    step = arguments.train_steps["student"].lower(*given).compile()
    fill = jax.jit(ones, out_shardings=jax.tree.map(lambda x: x.sharding, given)).lower().compile()

    def run():
        state, frozen, batch = jax.block_until_ready(fill())
        for _ in range(2):
            # A step that is dispatched while another one runs has memory of its own already.
            state, _ = jax.block_until_ready(step(state, frozen, batch))

    run()  # Brings in code and the workspace of matrix products, which belong to the process and to no program.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # The peak from here on.
    run()
print(json.dumps({"planned": mesh.size * planned.peak, "measured": memory("VmHWM") - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read from Linux's /proc")
def test_planned_memory_is_what_eight_devices_take():
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURED]
    ran = subprocess.run(command, cwd=CONFIGS.parent.parent, env=env, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["planned"] > 1e8
    assert abs(found["measured"] / found["planned"] - 1) < 0.05, found


@pytest.mark.parametrize(
    ("spec", "roles"),
    [
        ("teacher.py:full", {"denoiser": TEACHER_24}),
        ("prune.py:stage1", {"student": STUDENT_18 + EMBEDDER}),
        ("prune.py:stage2", {"student": STUDENT_18 + EMBEDDER, "teacher": TEACHER_24}),
        (
            "steps.py:full",
            {"student": STUDENT_18 + EMBEDDER, "fake": STUDENT_18 + EMBEDDER, "teacher": TEACHER_24},
        ),
        ("text_encoder.py:full", {"teacher": T5_XXL + EMBEDDER}),
        ("decoder.py:full", {}),
    ],
)
def test_full_size_methods_build_without_any_folder(spec, roles, tmp_path):
    overrides = ["--config.data.video_frames=9", "--config.data.height=64", "--config.data.width=64"]
    overrides += [f"--config.data.{crop}.{k}=0" for crop in ("crop", "eval_crop") for k in ("video_frames", "height")]
    overrides += [f"--config.data.{crop}.width=0" for crop in ("crop", "eval_crop")]
    # Drawing clips takes longer than all else, and sizes of networks do not depend on them.
    config = plain(load_config(f"{CONFIGS}/{spec}", overrides if spec.startswith("decoder") else []))
    config, assumed = fill_folders(config, tmp_path)
    config = resolve_config(config)
    method, row = build_method(config), batch_row(config, tmp_path)
    count = lambda role: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(role.abstract))
    assert {name: count(method.roles[name]) for name in roles} == roles
    assert assumed
    shapes = {name: column.shape for name, column in row.items()}
    if "latents" in shapes:
        assert shapes == {
            "latents": (7, 40, 64, 16),
            "ids": (128,),
            "mask": (128,),
            "clip_ids": (77,),
            "clip_2_ids": (77,),
        }
        assert sum(leaf.size for leaf in jax.tree.leaves(method.roles["text"].abstract["text_encoder_3"])) == T5_XXL


def test_what_a_config_names_stays(tmp_path):
    config = plain(
        load_config(f"{CONFIGS}/steps.py:full", ["--config.model.student=mine", "--config.data.latents=own"])
    )
    filled, assumed = fill_folders(config, tmp_path, 12)
    assert (filled["model"]["student"], filled["data"]["latents"]) == ("mine", "own")
    assert assumed == ["model.folder"]
    with pytest.raises(UserError, match="the teacher has 24"):
        fill_folders(plain(load_config(f"{CONFIGS}/prune.py:stage2")), tmp_path / "other", 25)


def test_meshes_of_a_sweep():
    shapes = plan.mesh_shapes(16, 1)
    assert shapes[0] == {"data": 1, "fsdp": 16, "tensor": 1} and len(shapes) == 5 + 4 + 3
    assert all(math.prod(shape.values()) == 16 for shape in shapes)
    assert all(shape["data"] % 2 == 0 for shape in plan.mesh_shapes(32, 2))
    swept = plan.sweep(TOY | {"batch_size": 1}, toy_method(), TOY_ROW, None, jax.devices()[:2], 1)
    # One row does not divide among two devices, but one device's tensor halves share it.
    assert [p["fits"] for p in swept] == [False, False, True] and "does not divide" in swept[0]["error"]
    assert plan.best(swept) is swept[2]


def test_suggestions_go_where_the_memory_is():
    config = {"remat": "none", "batch_size": 384, "microbatches": 1, "model": {"frozen_dtype": "float32"}}
    config["objective"] = {"stage_ratios": [1, 1, 1]}
    chip, mesh = CHIPS["v5e"], {"data": 2, "fsdp": 8, "tensor": 1}
    first = lambda resident: plan.suggestion(config, {"mesh": mesh, "resident_bytes": resident}, chip).split(";")[0]
    assert "remat=full" in first(chip.hbm_bytes // 4)
    assert "mesh.fsdp=16" in first(chip.hbm_bytes)
    # 24 rows a device are 8 of each stage, which two parts can share.
    assert "--config.microbatches=2" in plan.suggestion(config, {"mesh": mesh, "resident_bytes": 0}, chip)
    config["batch_size"] = 48
    assert "microbatches" not in plan.suggestion(config, {"mesh": mesh, "resident_bytes": 0}, chip)


def test_a_mesh_over_slices_needs_data():
    class Device:
        def __init__(self, number):
            self.slice_index = number // 4

    with pytest.raises(UserError, match="does not divide among 2 slices"):
        sharding.make_mesh({"data": 1, "fsdp": -1}, [Device(k) for k in range(8)])


def test_bad_topologies(capsys):
    with pytest.raises(UserError, match="known chips are v4, v5e"):
        plan.topology_devices("v9:2x2", 1)
    if importlib.util.find_spec("libtpu") is None:
        with pytest.raises(UserError, match="requirements-plan"):
            plan.topology_devices("v5e:2x2", 1)


SMALL = [
    *("--config.student.encoder.num_layers=1", "--config.teacher.encoder.num_layers=1"),
    *("--config.student.adapter.layer_depths=(128,)", "--config.data.max_length=16", "--config.dtype='bfloat16'"),
]


# In a process of its own: the compiler's library would read the flags that tests give to XLA.
ON_TPU = """
import json, sys
from pathlib import Path
from experiments import plan

*text, output = sys.argv[1:]
assert plan.main([*text, f"--output={output}/fits"]) == 0
assert plan.main([*text, f"--config.batch_size={1 << 32}", f"--output={output}/large"]) == 0

import jax, numpy
from nd_jax.train import ahead, sharding

chip, devices = plan.topology_devices("v5e:2x2", 1)
mesh = sharding.make_mesh({"data": 4, "fsdp": 1}, devices)
large = jax.ShapeDtypeStruct((1 << 34,), numpy.float32, sharding=sharding.batch_sharding(mesh))
double = jax.jit(lambda state, frozen, batch: 2 * batch["x"])
step = ahead.compile_step("role", ahead.StepArguments({}, {}, {"x": large}, {"role": double}), mesh)
Path(output, "refused.json").write_text(json.dumps(plan.step_numbers(step, chip, 4)))

from flax import linen as nn
from nd_jax.models.attention import OrderedMask, splash_attention

rows = lambda dtype, *head: jax.ShapeDtypeStruct((4, 408, *head), dtype, sharding=sharding.batch_sharding(mesh))

def attend(x, last, groups):
    with nn.logical_axis_rules(sharding.RULES):
        return splash_attention(x, x, x, OrderedMask(last, groups)).astype("float32").sum()

with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jax.jit(jax.grad(attend)).lower(rows("bfloat16", 24, 64), rows("int32"), rows("int32"))
Path(output, "kernel.txt").write_text(lowered.compile().as_text())
slices = plan.topology_devices("v5e:2x2", 2)[1]
hybrid = sharding.make_mesh({"data": 2, "fsdp": 4}, slices)
assert [d.slice_index for d in hybrid.devices.flat] == [0] * 4 + [1] * 4
# The processors of this machine are left alone.
assert jax.devices()[0].platform == "cpu" and float(jax.numpy.ones(3).sum()) == 3.0
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed")
def test_a_plan_for_a_tpu(tmp_path):
    text = [f"--config={CONFIGS}/text_encoder.py:tiny", "--topology=v5e:2x2", *SMALL]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", ON_TPU, *text, str(tmp_path)]
    ran = subprocess.run(command, cwd=CONFIGS.parent.parent, env=env, capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "fits" / plan.PLAN).read_text())
    (step,) = result["plan"]["steps"]
    assert result["plan"]["fits"] and result["devices"] == 4 and result["plan"]["mesh"]["fsdp"] == 4
    assert 0 < step["memory"]["arguments"] < step["memory"]["peak"] < result["chip"]["hbm_bytes"]
    assert step["flops"]["partitioned"] == step["flops"]["per_device"] and step["flops"]["bfloat16_share"] > 0.9
    assert {c["kind"] for c in step["collectives"]} >= {"all-gather", "all-reduce"}
    assert step["roofline"]["bound"] in step["roofline"]["bounds"] and result["plan"]["time"]["hours"] > 0
    # A batch that alone is too large needs no compiler.
    large = json.loads((tmp_path / "large" / plan.PLAN).read_text())["plan"]
    assert not large["fits"] and not large["steps"] and "alone take" in large["error"]
    assert "--config.remat=True" in large["suggestion"]
    said = [line for line in ran.stdout.splitlines() if "numbers in" in line]
    assert said[0].startswith("fits 4 devices of v5e:2x2") and said[1].startswith("does not fit 4 devices of v5e:2x2")
    # The attention kernel compiles, forward and backward, and every chip runs it for its own rows.
    kernel = (tmp_path / "kernel.txt").read_text()
    assert {"splash_mha_fwd", "splash_mha_dkv"} <= set(re.findall(r"splash_mha_[a-z]+", kernel))
    assert "tpu_custom_call" in kernel and not re.search(r"all-(gather|reduce|to-all)|permute", kernel)
    # What the compiler refuses, it explains: 16 GiB a device come in, and as many go out.
    refused = json.loads((tmp_path / "refused.json").read_text())
    assert not refused["fits"] and refused["memory"] is None and "15.75G" in refused["error"]
