"""The quickstart: its commands and how they build on each other, its tables, and its report."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from converters import export_torch
from experiments import quickstart, quickstart_device, stages, teacher_samples, train
from experiments import quickstart_table as tables
from experiments.config_file import load_config, plain
from experiments.quickstart_report import write_quickstart_report
from nd_jax.errors import UserError
from nd_jax.generate.videos import write_picture, write_video

ROOT = Path(__file__).parent.parent
IN_PROCESS = ("teacher", "captions", "report")


def parsed(workdir, *more):
    return quickstart.parse(["--workdir", str(workdir), "--seed", "3", *more])


# --- stages -----------------------------------------------------------------------------------------------------------


def test_stage_commands_are_the_public_ones(tmp_path):
    walked = quickstart.stages(parsed(tmp_path))
    assert tuple(walked) == quickstart.NAMES
    for name, stage in walked.items():
        assert (stage.command is None) == (name in IN_PROCESS)
        assert stage.command is None or stage.command[2].split(".")[0] in ("experiments", "converters")
    trained = [name for name, stage in walked.items() if stage.command and stage.command[2] == "experiments.train"]
    assert trained == ["text", "decoder", "stage1", "stage2", "dmd"]
    assert all("--config.seed=3" in walked[name].command for name in trained)


def test_commands_accept_their_arguments(tmp_path):
    args = parsed(tmp_path, "--text-steps", "7", "--dmd-steps", "9", "--clips", "20")
    walked = quickstart.stages(args)
    configs = {}
    for name, stage in walked.items():
        if stage.command is None:
            continue
        module, given = importlib.import_module(stage.command[2]), stage.command[3:]
        if module is train:
            command, overrides = train.parse(given)
            configs[name] = plain(load_config(str(ROOT / command.config), overrides))
        else:
            parse = module.parse_args if module is export_torch else module.parse
            parse = teacher_samples.parse if "--teacher-samples" in given else parse
            assert parse(given)
    assert (configs["text"]["num_steps"], configs["dmd"]["num_steps"]) == (7, 9)
    assert configs["stage1"]["model"]["folder"] == f"{tmp_path}/models/decoder"
    assert configs["dmd"]["model"]["student"] == f"{tmp_path}/models/pruned/diffusion_transformer_320p"
    # The decoder's clips are those of its latents: drawn from the same seed, as many.
    latents = walked["latents"].command
    assert latents[latents.index("--seed") + 1] == str(configs["decoder"]["seed"])
    assert latents[latents.index("--toy-world") + 1] == str(configs["decoder"]["data"]["toy_clips"])
    clips = [stage.command for name, stage in walked.items() if name.startswith("clips_")]
    assert len(clips) == len(tables.MODELS) and all("20" in command for command in clips)


def test_every_stage_reads_what_an_earlier_one_wrote(tmp_path):
    """No command names a path below the workdir that nothing before it makes."""
    work = str(tmp_path)
    made = {"captions.txt", "plan_captions.txt", quickstart_device.PROMPTS, "samples", "capture"}
    for name, stage in quickstart.stages(parsed(tmp_path)).items():
        if stage.command is None:
            continue
        paths = [part.split("=")[-1] for part in stage.command if work in part]
        below = [path.removeprefix(work + "/") for path in paths]
        outputs = [
            stage.command[stage.command.index(flag) + 1] for flag in ("--output", "--workdir") if flag in stage.command
        ]
        own = {path.removeprefix(work + "/") for path in outputs}
        for path in set(below) - own - ({"capture"} if name == "videos" else set()):
            assert any(path == known or path.startswith(known + "/") for known in made), (name, path)
        made |= own
        if stage.folder:
            assert any(path == stage.folder or path.startswith(stage.folder + "/") for path in own), name


def test_captions_of_every_purpose_differ(tmp_path):
    args = parsed(tmp_path)
    counts = quickstart.write_captions(args)
    assert counts == {"captions.txt": 4000, "plan_captions.txt": 16, "video_captions.txt": 8}
    lines = [(tmp_path / name).read_text().splitlines() for name in counts]
    assert [len(part) for part in lines] == [4000, 16, 8] and lines[1][:8] != lines[2]
    caption = quickstart.stages(args)["bundle_video"].command
    assert caption[caption.index("--prompt") + 1] == lines[2][0]


def test_the_teacher_ships_or_is_trained(tmp_path):
    model = lambda *more: quickstart.teacher_folder(parsed(tmp_path, *more))
    assert model() == model("--from", "text") == quickstart.SHIPPED
    assert model("--from", "teacher") == model("--only", "teacher") == tmp_path / "teacher" / "model"
    walked = quickstart.stages(parsed(tmp_path, "--from", "teacher"))
    assert walked["teacher"].command[2:] == [
        "experiments.toy_teacher",
        "--workdir",
        f"{tmp_path}/teacher",
        "--seed",
        "3",
    ]
    # Asked for once, it is the teacher of the walk that goes on.
    (tmp_path / "teacher").mkdir()
    assert model() == tmp_path / "teacher" / "model"


def test_wrong_counts_are_refused(tmp_path):
    for given in (("--clips", "1"), ("--samples", "3"), ("--videos", "3"), ("--keep", "0"), ("--only", "nothing")):
        with pytest.raises(SystemExit):
            parsed(tmp_path, *given)
    with pytest.raises(UserError, match="stage teacher has not been run"):
        quickstart.main(["--workdir", str(tmp_path), "--only", "report"])


# --- tables and report ------------------------------------------------------------------------------------------------


def clips_note(correct, seconds, evaluations):
    """What a stage of clips notes: of 20 clips so many have shape and speed right, and all have the rest."""
    rate = lambda count: {"correct": count, "rate": count / 20, "low": max(0, count / 20 - 0.1), "high": count / 20}
    accuracy = {"colour": rate(20), "shape": rate(correct), "direction": rate(20), "speed": rate(correct)}
    return {
        "accuracy": accuracy | {"all": rate(correct - 2)},
        "clips": 20,
        "frechet_distance": 3 - correct / 10,
        "function_evaluations": evaluations,
        "seconds": {"text": {"load": 9.0, "run": 0.2}, "transformer": {"compile": 9.0, "run": seconds}},
        "shown": ["a red circle", "a blue <b>cross</b>", "a green square", "a cyan circle"],
    }


def parameters(**changes):
    counts = {"context": 1000, "pooled": 10, "transformer": 8000, "decoder": 900} | changes
    return {"parameters": counts | {"total": sum(counts.values())}}


def chip_note(precision, snr, size):
    report = {"precision": precision, "compile_seconds": 1.5, "compile_peak_bytes": 2e8, "binary_bytes": size}
    return report | {"simulator": {"snr_db": {"a": snr, "b": snr + 1}, "samples": 2}}


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A workdir with metrics and clips, and the notes of all stages, with numbers made up."""
    work = tmp_path_factory.mktemp("quickstart")
    results = {name: {} for name in quickstart.NAMES}
    right = dict(teacher=20, text=19, decoder=18, pruned=17, student=16, hybrid=18, teacher_111=10, cut=4, stage1=12)
    for name, correct in right.items():
        steps = 9 if name in ("student", "teacher_111") else 6 if name == "hybrid" else 144
        results[f"clips_{name}"] = clips_note(correct, 0.01 * steps, steps)
        (work / "clips" / name).mkdir(parents=True)
        for k in range(3):
            rng = np.random.default_rng(k)
            frames = rng.integers(0, 255, (5, 16, 16, 3), np.uint8)
            write_video(work / "clips" / name / f"clip-{k:02d}.mp4", frames, 8)
    cut = {"context": 400, "decoder": 90, "transformer": 6000}
    results |= {
        "teacher": parameters(),
        "text_model": parameters(context=400),
        "decoder_model": parameters(context=400, decoder=90),
        **{name: parameters(**cut) for name in ("cut_model", "pruned_model", "student")},
        "text": {"eval/cosine": 0.98, "eval/snr_db": 14.0, "train/loss": 1.0},
        "plan": {
            "num_layers": 4,
            "kept": [0, 2, 3],
            "removed": [{"block": 1, "why": "least"}],
            "scores": {"image": [0.3, 0.1, 0.2, 0.4], "text": [0.2, 0.2, 0.1], "velocity_error": [0.9, 0.1, 0.3]},
        },
        "bundle": {g: {"nodes": 100, "snr_db": {"a": 110.0, "b": 120.0}} for g in quickstart_device.GRAPHS},
        "bundle_video": {"psnr_db": 61.0},
        **{f"chip_{g}": chip_note("fp16", 50.0, 1_000_000) for g in quickstart_device.GRAPHS},
        **{f"chip_{g}_w8a16": chip_note("w8a16", 35.0, 500_000) for g in quickstart_device.QUANTISED},
    }
    results["chip_mmdit_stage1"]["simulator"]["snr_db"]["b"] = 44.0
    measured = lambda size, psnr: (
        {"parameters": size} | {key: {"mean": value, "std": 0.1} for key, value in (("psnr_db", psnr), ("ssim", 0.9))}
    )
    decoders = {"native": measured(900, 28.0), "student": measured(90, 26.0)}
    results["decoder_measure"] = decoders | {"clips": 20, "shown": ["input", "native", "student"]}
    (work / "reconstructed").mkdir()
    write_picture(work / "reconstructed" / "decoder.png", np.zeros((16, 16, 3), np.uint8))
    metrics = {
        "text": ("train/mse", "eval/cosine", "eval/collapse_student", "eval/collapse_teacher"),
        "decoder": ("eval/psnr_db", "eval/native_psnr_db", "train/loss"),
        "stage1": ("eval/velocity_error",),
        "stage2": (
            "eval/velocity_error",
            "eval/flow_error",
            *(f"train/{k}" for k in ("data", "flow", "image", "text")),
        ),
        "dmd": tuple(
            f"eval/{k}_stage{i}" for k in ("std_ratio", "clean_error", "fake_error", "direction_norm") for i in range(3)
        ),
    }
    for name, keys in metrics.items():
        (work / name).mkdir()
        lines = [json.dumps({"step": step} | {key: 1.0 / (step + 1) for key in keys}) for step in (0, 10)]
        (work / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    notes = {}
    for name in quickstart.NAMES[:-1]:
        notes[name] = {"result": results[name], "seconds": 2.0, "cpu_seconds": 3.0}
        if name not in IN_PROCESS:
            notes[name] |= {"command": f"python -m {name}", "peak_bytes": 2_500_000_000 if name == "dmd" else 10**9}
    return work, notes


def test_results_add_up(walk):
    results = tables.summarize_walk(walk[1], quickstart.PARTS)
    student = results["models"]["student"]
    assert student["accuracy"]["mean"] == pytest.approx((1 + 0.8 + 1 + 0.8) / 4)
    assert student["kept"] == pytest.approx(0.9) and student["kept_all"] == pytest.approx(14 / 18)
    assert student["seconds_per_clip"]["total"] == pytest.approx((0.2 + 0.09) / 20)  # No loading, no compiling.
    device = results["device"]
    assert device["binary_bytes"] == {"fp16": 7_000_000, "w8a16": 3_000_000 + 4 * 500_000}
    assert device["lowest_snr_db"] == {"fp16": 44.0, "w8a16": 35.0}
    assert sum(results["seconds"].values()) == 2.0 * (len(quickstart.NAMES) - 1)
    assert sum(results["seconds_by_part"].values()) == pytest.approx(sum(results["seconds"].values()))


def test_tables(walk):
    results = tables.summarize_walk(walk[1], quickstart.PARTS)
    headers, rows = tables.cumulative_table(results)
    assert [row[0] for row in rows] == [label for label, _ in tables.CUMULATIVE.values()]
    column = lambda name: [row[headers.index(name)] for row in rows]
    assert column("mean, %") == ["100.0", "97.5", "95.0", "92.5", "90.0", "95.0"]
    assert column("parameters") == ["9,910", "9,310", "8,500", "6,500", "6,500", "6,500"]
    assert column("NFE") == ["144", "144", "144", "144", "9", "6"]
    assert column("chip, MB") == ["–"] * 4 + ["7.0 / 5.0", "–"] and column("chip, dB")[4] == "44 / 35"
    assert tables.text_table(results)[1][1][:5] == ["DT5, ContextAdapter", "0.26 B", "79.64", "400", "97.5"]
    assert tables.decoder_table(results)[1][1] == ["tiny", "9.91 M", "80.25", "90", "26.00", "0.900", "95.0", "80.0"]
    pruning = tables.pruning_table(results)[1]
    assert [row[4] for row in pruning] == ["95.0", "60.0", "80.0", "92.5"] and pruning[1][1] == "–"
    assert [row[2] + " " + row[4] for row in tables.steps_table(results)[1]] == ["480 144", "21 9", "21 9", "18 + 4 6"]
    device = tables.device_table(results)[1]
    assert len(device) == 11 and device[3][:4] == ["mmdit_stage0", "FP16", "–", "50.0"]
    assert device[7][:4] == ["mmdit_stage0", "W8A16", "29", "35.0"]
    assert len(tables.attribute_table(results)[1]) == len(tables.MODELS)
    assert tables.seconds_table(results)[1][4] == ["+ one step a stage", "10.0", "–", "4.5", "–", "14.5"]


def test_report_has_tables_curves_clips_and_commands(walk, tmp_path):
    work, notes = walk
    path = tmp_path / "report.html"
    write_quickstart_report(path, work, 3, tables.summarize_walk(notes, quickstart.PARTS), notes)
    page = path.read_text()
    assert page.count("<video") == 3 and page.count("<img") == 4
    assert "a blue &lt;b&gt;cross&lt;/b&gt;" in page and "<b>cross" not in page
    assert page.count('<figure class="plot">') == 12 and "block 1 (removed)" in page
    for name in quickstart.NAMES:
        assert (f"python -m {name}<" in page) == (name not in IN_PROCESS)
    assert "2.50 GB (dmd)" in page and "44.0 dB (FP16)" in page and "144 → 9" in page
    assert "no values" not in page


def test_a_walk_of_stubs_is_continued_and_reported(walk, tmp_path, monkeypatch, capsys):
    """The command itself: stages that are done are kept, and the report is written every time."""
    work, notes = walk
    ran = []

    def stubs(args):
        real = quickstart_stages(args)
        return {
            name: stages.Stage(stage.what, lambda n=name: ran.append(n) or notes[n]["result"])
            if name != "report"
            else stage
            for name, stage in real.items()
        }

    quickstart_stages = quickstart.stages
    monkeypatch.setattr(quickstart, "stages", stubs)
    for name, note in notes.items():  # All but the last of the device's stages were done.
        (work / "stages").mkdir(exist_ok=True)
        if name != quickstart.NAMES[-2]:
            kept = {key: value for key, value in note.items() if key != "command"}
            (work / "stages" / f"{name}.json").write_text(json.dumps(kept))
    for _ in range(2):
        assert quickstart.main(["--workdir", str(work)]) == 0
    assert ran == [quickstart.NAMES[-2]]
    out = capsys.readouterr().out
    assert out.count("quickstart done in") == 2 and "one step a stage" in out
    assert json.loads((work / "results.json").read_text())["models"]["student"]["kept"] == pytest.approx(0.9)
    assert (work / "report.html").stat().st_size > 10_000
