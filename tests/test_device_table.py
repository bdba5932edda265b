"""The table of a model folder's graphs on a chip: the commands of a row, what is not done again, what fails."""

import importlib
import json
import re
import shutil
import sys
import time

import numpy as np
import pytest

from experiments import device_steps, device_table
from experiments.device_steps import Step, read_note, run_steps
from experiments.random_model import write_random_model
from nd_jax.errors import UserError, run_command
from nd_jax.files import state_of_files, write_text


def counted(tmp_path, name, code="", **more):
    """A step that appends to NAME.runs, writes NAME.out, and does `code`."""
    body = f"import pathlib, sys, time; open('{tmp_path}/{name}.runs', 'a').write('x'); "
    body += f"pathlib.Path('{tmp_path}/{name}.out').touch(); {code}"
    return Step(name, [sys.executable, "-c", body], files=(tmp_path / f"{name}.out",), **more)


def runs(tmp_path, name):
    path = tmp_path / f"{name}.runs"
    return len(path.read_text()) if path.exists() else 0


def test_steps_that_are_done_are_not_done_again(tmp_path):
    steps = [counted(tmp_path, "a"), counted(tmp_path, "b", after=("a",)), counted(tmp_path, "c", after=("a", "b"))]
    run_steps(tmp_path, steps)
    run_steps(tmp_path, steps)
    assert [runs(tmp_path, name) for name in "abc"] == [1, 1, 1]
    # What is gone is made again when a later step needs it, and what builds on it as well.
    (tmp_path / "a.out").unlink()
    run_steps(tmp_path, steps)
    assert [runs(tmp_path, name) for name in "abc"] == [1, 1, 1]
    changed = counted(tmp_path, "c", "print(1)", after=("a", "b"))
    run_steps(tmp_path, [*steps[:2], changed])
    assert [runs(tmp_path, name) for name in "abc"] == [2, 2, 2]
    # Another command at the beginning.
    run_steps(tmp_path, [counted(tmp_path, "a", "print(2)"), steps[1], changed])
    assert [runs(tmp_path, name) for name in "abc"] == [3, 3, 3]
    note = read_note(tmp_path, "a")
    assert note["peak_bytes"] > 2**20 and note["seconds"] > 0 and note["command"].startswith("python -c ")


def test_steps_follow_the_files_that_they_read(tmp_path):
    """Written anew, even of the same size, or gone; files elsewhere do not matter."""
    weights, config = tmp_path / "vae" / "model.safetensors", tmp_path / "generation.json"
    weights.parent.mkdir()
    weights.write_bytes(b"0123")
    steps = [counted(tmp_path, "a", reads=(weights.parent, config)), counted(tmp_path, "b", after=("a",))]
    for change, count in (
        (lambda: None, 1),
        (lambda: (tmp_path / "other.txt").touch(), 1),
        (lambda: write_text(weights, "4567"), 2),
        (lambda: config.write_text("{}"), 3),
        (lambda: weights.unlink(), 4),
        (lambda: None, 4),
    ):
        change()
        run_steps(tmp_path, steps)
        assert [runs(tmp_path, name) for name in "ab"] == [count, count]


def test_a_step_that_fails_is_done_again(tmp_path):
    say = "print('first\\nerror: the thing is 3; make it 2'); sys.exit(1)"
    failing = counted(tmp_path, "a", say)
    for _ in range(2):
        with pytest.raises(UserError, match="a: the thing is 3; make it 2"):
            run_steps(tmp_path, [failing, counted(tmp_path, "b", after=("a",))])
    assert (runs(tmp_path, "a"), runs(tmp_path, "b")) == (2, 0)
    assert read_note(tmp_path, "a")["error"] == "the thing is 3; make it 2"
    with pytest.raises(UserError, match="a: ended by SIGKILL, as when memory runs out"):
        run_steps(tmp_path, [counted(tmp_path, "a", "import os; os.kill(os.getpid(), 9)")])


def test_a_limit_ends_the_children_too(tmp_path):
    """It is noted, and tried again with more time only."""
    child = f"import subprocess; subprocess.run(['sh', '-c', 'sleep 4; touch {tmp_path}/late'])"
    with pytest.raises(UserError, match="took more than 1 s"):
        run_steps(tmp_path, [counted(tmp_path, "a", child, limit=1)])
    run_steps(tmp_path, [counted(tmp_path, "a", child, limit=1)])
    assert runs(tmp_path, "a") == 1 and read_note(tmp_path, "a")["limit"] == 1
    time.sleep(3.5)
    assert not (tmp_path / "late").exists()
    assert not device_steps.is_done(tmp_path, counted(tmp_path, "a", child, limit=2))


@pytest.mark.parametrize(("count", "held"), [(2, 1), (4, 2), (8, 2), (32, 8)])
def test_some_samples_are_held_out(tmp_path, count, held):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(count):
        np.savez(source / f"{i:02}.npz", x=np.full(3, i, np.float32))
    np.savez(tmp_path / "stack.npz", x=np.arange(count, dtype=np.float32)[:, None])
    for place in (source, tmp_path / "stack.npz"):
        assert device_table.split_samples(place, tmp_path / "row") == held
        kept = [sorted((tmp_path / "row" / name).iterdir()) for name in ("calibration", "held_out")]
        assert [len(files) for files in kept] == [count - held, held]
        values = {np.load(file)["x"][0] for files in kept for file in files}
        assert values == set(range(count))


def test_one_sample_is_not_enough(tmp_path):
    np.savez(tmp_path / "stack.npz", x=np.zeros((1, 2), np.float32))
    with pytest.raises(UserError, match="holds 1 samples; two are needed"):
        device_table.split_samples(tmp_path / "stack.npz", tmp_path / "row")


def test_the_commands_of_parts(tmp_path):
    """Blocks of the transformer, and which samples they have."""
    (tmp_path / "capture" / "mmdit_stage1").mkdir(parents=True)
    step = device_table.export_step(
        tmp_path / "m", tmp_path, "mmdit_stage1_blocks0-6", "t", tmp_path / "capture", False, ["--allow-overflow"]
    )
    command = " ".join(step.command)
    assert "--graph mmdit_stage1 " in command and "--blocks 0:6" in command and "--transformer t" in command
    assert command.endswith("--allow-overflow") and step.files[0].name == "mmdit_stage1_blocks0-6.onnx"
    source = lambda graph: device_table.sample_source(tmp_path, graph, tmp_path / "capture")
    assert source("mmdit_stage1_blocks0-6") == source("mmdit_stage1") == tmp_path / "capture" / "mmdit_stage1"
    assert source("mmdit_stage1_blocks6-12").name == "mmdit_stage1_blocks6-12.inputs.npz"
    assert device_table.has_plan("mmdit_stage1_blocks6-12") and not device_table.has_plan("clip_l")


@pytest.fixture
def in_process(monkeypatch):
    """Commands of this repository in this process, which saves their imports; a process takes what they are told."""
    begun = []

    def run(folder, step):
        begun.append(step.name)
        assert step.command[1] == "-m" and step.command[2].startswith("converters.")
        (folder / "steps").mkdir(parents=True, exist_ok=True)
        note = {"command": device_steps._shown(step.command), "seconds": 1, "cpu_seconds": 1, "peak_bytes": 1}
        note["reads"] = state_of_files(step.reads)
        main = importlib.import_module(step.command[2]).main
        try:
            assert main(step.command[3:]) == 0
        except UserError as error:
            note["error"] = str(error)
        path = folder / "steps" / f"{step.name}.json"
        path.write_text(json.dumps(note | {"finished": time.time()}))
        if "error" in note:
            raise UserError(f"{step.name}: {note['error']}")

    monkeypatch.setattr(device_steps, "_run", run)
    return begun


def test_a_row_fails_and_the_next_one_follows(tmp_path, in_process, capsys):
    """Both precisions of a graph of random weights; one whose component is damaged; and the same command again."""
    write_random_model(tmp_path / "model", "tiny", dtype="float32")
    weights = next((tmp_path / "model" / "text_encoder").glob("*.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    command = ["--model", tmp_path / "model", "--output", tmp_path / "table", "--graphs", "clip_l,quicksrnet"]
    command = [*map(str, command), "--run", "2", "--export=--height=16", "--export=--width=16"]
    assert device_table.main(command) == 1
    table = json.loads((tmp_path / "table" / "device_table.json").read_text())
    failed, fp16, w8a16 = table["rows"]
    assert list(failed["error"]) == ["export"] and str(weights.parent) in failed["error"]["export"]
    assert (fp16["precision"], w8a16["precision"]) == ("fp16", "w8a16") and not fp16["error"] | w8a16["error"]
    for row in (fp16, w8a16):
        assert row["inputs"] == "random" and row["compile"]["precision"] == row["precision"]
        assert row["simulator"]["samples"] == 2 and row["compile"]["traffic"]["dram_read_bytes"] > 0
    snr = [row["simulator"]["snr_db"]["large_frame"] for row in (fp16, w8a16)]
    assert snr[0] > 45 and snr[0] > snr[1] > 0
    out = capsys.readouterr().out
    assert re.search(r"^\| quicksrnet \| FP16 +\| random", out, re.MULTILINE)
    assert "clip_l, fp16: export: " in out and "3 rows, 1 with an error" in out
    assert in_process == [
        *("export", "export", "compile_fp16_8-elite", "simulate_fp16_8-elite"),
        *("quantize", "compile_w8a16_8-elite", "simulate_w8a16_8-elite"),
    ]

    # A named graph needs no other part of the folder.
    in_process.clear()
    weights.write_bytes(whole)
    for path in (tmp_path / "model").iterdir():
        if path.is_dir() and path.name not in ("text_encoder", "tokenizer"):
            shutil.rmtree(path)
    assert device_table.main([*command[:5], "clip_l", *command[6:8], "--precisions", "fp16", "--lean"]) == 0
    assert in_process == ["export", "compile_fp16_8-elite", "simulate_fp16_8-elite"]
    rows = json.loads((tmp_path / "table" / "device_table.json").read_text())["rows"]
    assert [row["graph"] for row in rows] == ["clip_l", "quicksrnet", "quicksrnet"] and rows[1:] == [fp16, w8a16]

    # Weights that are written again are measured again.
    in_process.clear()
    weights.write_bytes(whole)
    assert device_table.main([*command[:5], "clip_l", *command[6:8], "--precisions", "fp16", "--lean"]) == 0
    assert in_process == ["export", "compile_fp16_8-elite", "simulate_fp16_8-elite"]
    assert not list((tmp_path / "table" / "clip_l").glob("*.data"))


def test_traffic_names_what_is_outside_vtcm():
    traffic = {"dram_read_bytes": 102_000_000, "outside_read_bytes": 98_000_000}
    traffic |= {"dram_write_bytes": 6_500_000, "outside_write_bytes": 20_000}
    compiled = {"compile_cpu_seconds": 1.0, "compile_peak_bytes": 2e9, "binary_bytes": 3e6, "traffic": traffic}
    row = {"graph": "unet", "precision": "fp16", "inputs": "random", "compile": compiled}
    assert device_table.cells(row)[8:11] == ["3", "102 (outside VTCM 98)", "6.5"]


def test_bad_choices(tmp_path, capsys):
    write_random_model(tmp_path / "model", "tiny", dtype="float32")
    call = lambda *more: device_table.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "t"), *more])
    for more, message in (
        (("--model", str(tmp_path / "none")), "none: no such folder; give a model folder"),
        (("--graphs", "mmdit"), "graph 'mmdit' does not exist; choose among"),
        (("--precisions", "int4"), "precision 'int4' is unknown"),
        (("--soc", "z80"), "chip 'z80' is not known"),
        (("--capture", str(tmp_path / "nothing")), "no such folder; make it with experiments.generate --capture"),
    ):
        assert run_command(lambda more=more: call(*more)) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="holds the table of /x; choose another --output"):
        (tmp_path / "t").mkdir()
        (tmp_path / "t" / "device_table.json").write_text('{"model": "/x", "rows": []}')
        call()
