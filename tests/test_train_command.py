"""`experiments.train` as a user meets it: bad input gives one line that names the thing; folders give the weights."""

import asyncio
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import train as command
from experiments.config_file import load_config, plain
from nd_jax.distill.registry import build_method
from nd_jax.errors import UserError, _ignoring_closed_loops, first_line
from nd_jax.train.deployed import load_deployed
from nd_jax.weights import networks
from nd_jax.weights.folder import save_component
from tests.text_encoder_case import CONFIG, arguments, tiny_config, write_prompts

ROOT = Path(__file__).parent.parent
# Data parallelism alone: sharding has its own tests.
SHORT = {"num_steps": 2, "mesh.data": 8, "mesh.fsdp": 1}


def run(workdir, prompts, **changes):
    overrides = arguments(**({"data.prompts": str(prompts)} | SHORT | changes))
    return command.main(["--config", CONFIG, "--workdir", str(workdir), *overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--config.optimizer.learning_rat=1",
            "unknown config key 'optimizer.learning_rat': did you mean 'learning_rate'?",
        ),
        ("--config.nothing.at.all=1", "unknown config key 'nothing'"),
        ("--config.num_steps=many", "'num_steps' takes a int (now 600), not 'many'"),
        ("--config.loss=1", "'loss' is a group of values"),
        ("--config.seed.x=1", "config key seed is a value, not a group"),
        ("--num_steps=3", "overrides look like --config."),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(UserError) as error:
        load_config(CONFIG, [override])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_unknown_file_and_variant():
    with pytest.raises(UserError, match=r"does not exist: the configs in experiments/configs are .*text_encoder.py"):
        load_config("experiments/configs/text_encodr.py:tiny")
    with pytest.raises(UserError, match="no variant 'huge': use tiny or toy-teacher or full"):
        load_config(CONFIG.replace("tiny", "huge"))


def test_overrides_keep_types_and_full_is_the_papers_run():
    config = load_config(CONFIG, ["--config.optimizer.learning_rate=1", "--config.student.adapter.layer_depths=[8,8]"])
    assert config.optimizer.learning_rate == 1.0 and config.student.adapter.layer_depths == (8, 8)
    full = plain(load_config(CONFIG.replace("tiny", "full")))
    assert full["batch_size"] == 2048 and full["loss"]["mode"] == "RM" and full["loss"]["cosine_weight"] == 0.1
    method = build_method(full)
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    student, teacher = method.roles["student"].abstract, method.roles["teacher"].abstract
    assert count(student["text_encoder_3"]) == 129_551_488 and count(student["context_adapter"]) == 130_041_344
    assert count(teacher["text_encoder"]) == 4_762_310_656
    assert {str(x.dtype) for x in jax.tree.leaves(teacher)} == {"bfloat16"}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "it is empty"), (b"a red circle\n\xff\xfe\n", "prompts.txt:2: not UTF-8"), (None, "prompts.txt")],
)
def test_bad_prompt_files(tmp_path, content, message):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", path)


def test_first_line_of_mute_and_of_talkative_errors():
    assert first_line(RuntimeError()) == "RuntimeError"
    assert first_line(RuntimeError("\n  the cause\ndetails")) == "the cause"
    assert first_line(ValueError("RESOURCE_EXHAUSTED: /a/b: No space left on device [28]")) == "No space left on device"


def test_calls_of_a_closed_event_loop_are_left_out_and_nothing_else():
    seen = []
    hook = _ignoring_closed_loops(seen.append)
    loop = asyncio.new_event_loop()
    loop.close()
    for call in (lambda: loop.call_soon_threadsafe(print), lambda: loop.run_until_complete(None), lambda: 1 / 0):
        try:
            call()
        except (RuntimeError, ZeroDivisionError) as error:  # A thread of C++ hands over the frames from its call on.
            trace = error.__traceback__.tb_next.tb_next or error.__traceback__.tb_next
            hook(SimpleNamespace(exc_type=type(error), exc_value=error, exc_traceback=trace))
    hook(SimpleNamespace(exc_type=RuntimeError, exc_value=None, exc_traceback=None))
    assert [item.exc_type for item in seen] == [RuntimeError, ZeroDivisionError, RuntimeError]


def test_the_command_prints_one_line_and_exits_1(tmp_path):
    args = [sys.executable, "-m", "experiments.train", "--config", CONFIG, "--workdir", str(tmp_path)]
    done = subprocess.run([*args, "--config.sed=1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: unknown config key 'sed': did you mean 'seed'?\n"


def test_a_kernel_for_other_devices_is_refused_before_anything_is_written(tmp_path):
    config = plain(load_config("experiments/configs/teacher.py:tiny", ["--config.attention=splash"]))
    with pytest.raises(UserError, match=r"kernel for TPUs .* \(cpu\): use --config.attention=xla"):
        command.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line_and_keeps_what_was_saved(tmp_path):
    """A limit on the size of files stands in for the disk: writes fail with an OSError in both cases."""
    prompts = write_prompts(tmp_path / "prompts.txt")
    run(tmp_path / "w", prompts)
    args = [sys.executable, "-m", "experiments.train", "--config", CONFIG, "--workdir", str(tmp_path / "w")]
    args += arguments(**({"data.prompts": str(prompts)} | SHORT | {"num_steps": 8}))
    limited = ["bash", "-c", 'ulimit -f 4; exec "$@"', "bash", *args]
    done = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True, check=False)
    # JAX may warn that it could not keep a compiled program either.
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: could not save") and lines[0].endswith("complete checkpoints: [2]")
    assert "Traceback" not in done.stderr and "never awaited" not in done.stderr, done.stderr
    assert load_deployed(tmp_path / "w").step == 2


def test_compiled_programs_are_kept_in_the_workdir_unless_the_environment_says_otherwise(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    assert before and command.cache_folder(tmp_path) is None  # The suite's own, from the environment.
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        assert command.cache_folder(tmp_path) == tmp_path / "compilation_cache"
        monkeypatch.setattr(command.os, "access", lambda path, mode: False)
        assert command.cache_folder(tmp_path) is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_processes_are_joined_as_the_flags_say(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr("nd_jax.train.processes.joined", lambda *args, **kwargs: given.append((args, kwargs)))
    flags = ["--config", CONFIG, "--workdir", str(tmp_path)]
    with command.processes(command.parse(flags)[0], tmp_path / "logs"):
        assert given == []  # A single process joins nothing.
    many = ["--coordinator", "host:1", "--num-processes", "2", "--process-id", "1", "--heartbeat-timeout", "7"]
    command.processes(command.parse([*flags, *many])[0], tmp_path / "logs")
    log = tmp_path / "logs" / "process_1.txt"
    assert given == [((log, "host:1", 2, 1), {"heartbeat_seconds": 7, "start_seconds": 300})]
    with pytest.raises(SystemExit):
        command.parse([*flags, "--coordinator", "host:1"])


def test_teacher_and_student_from_folders(tmp_path):
    """Released layouts in: a T5 encoder, a denoiser of which the embedder is read, and a T5 to start DT5 from."""
    prompts = write_prompts(tmp_path / "prompts.txt")
    method = build_method(tiny_config(**{"teacher.encoder.d_model": 24, "loss.mode": "RM"}))
    teacher, student = (jax.device_get(jax.jit(method.roles[name].init)()) for name in ("teacher", "student"))
    config = networks.T5_ENCODER.read_config({"feed_forward_proj": "gated-gelu", **tiny_config()["teacher"]["encoder"]})
    save_component(
        tmp_path / "t5", networks.T5_ENCODER, dataclasses.replace(config, d_model=24), teacher["text_encoder"]
    )
    save_component(tmp_path / "base", networks.T5_ENCODER, config, student["text_encoder_3"]["encoder"])
    mmdit = tmp_path / "mmdit"
    mmdit.mkdir()
    embedder = teacher["context_embedder"]["context_embedder"]
    tensors = {
        "context_embedder.weight": np.ascontiguousarray(np.asarray(embedder["kernel"]).T),
        "context_embedder.bias": np.asarray(embedder["bias"]),
        "transformer_blocks.0.attn.to_q.weight": np.zeros((4, 4), np.float32),
    }
    save_file(tensors, mmdit / "diffusion_pytorch_model.safetensors")
    sizes = {"_class_name": "PyramidDiffusionMMDiT", "joint_attention_dim": 24, "caption_projection_dim": 12}
    (mmdit / "config.json").write_text(json.dumps(sizes))
    folders = {
        "teacher.text_encoder": str(tmp_path / "t5"),
        "teacher.mmdit": str(mmdit),
        "student.text_encoder_3": str(tmp_path / "base"),
        "loss.mode": "RM",
    }
    assert run(tmp_path / "run", prompts, **folders) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["teacher"]["encoder"]["d_model"] == 24
    # RM keeps DT5 as it was read, and the checkpoint is complete without the folders.
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "gone")
    deployed = load_deployed(tmp_path / "run").components["text_encoder_3"]
    jax.tree.map(np.testing.assert_array_equal, deployed.params["encoder"], student["text_encoder_3"]["encoder"])
    (tmp_path / "gone").rename(tmp_path / "base" / "model.safetensors")

    weights = load_file(tmp_path / "t5" / "model.safetensors")
    weights["encoder.final_layer_norm.weight"] = weights["encoder.final_layer_norm.weight"] + 1.0
    save_file(weights, tmp_path / "t5" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="was made with the frozen teacher"):
        run(tmp_path / "run", prompts, **folders, num_steps=3)


def test_half_a_teacher_is_refused(tmp_path):
    with pytest.raises(UserError, match="give both folders"):
        run(tmp_path / "run", write_prompts(tmp_path / "prompts.txt"), **{"teacher.text_encoder": "t5"})
