"""The commands for VBench: its folder of videos, whatever stops the work, and scores by a package like it."""

import json

import pytest

from experiments import evaluate, evaluate_vbench
from experiments.random_model import write_random_model
from nd_jax.errors import UserError
from nd_jax.evals import vbench
from nd_jax.generate import videos
from tests.vbench_case import clip, full_info

# --- vbench-generate --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model of random weights and VBench's file of prompts."""
    root = tmp_path_factory.mktemp("vbench")
    write_random_model(root / "model", "tiny-teacher", dtype="float32")
    full_info(root)
    return root


def generate(root, output, **options):
    options = {"model": root / "model", "prompts": root / "VBench_full_info.json", "output": output} | options
    options = {"samples": 2, "batch": 2, "dtype": "float32"} | options
    return evaluate.main(
        ["vbench-generate", *(f"--{k.replace('_', '-')}={v}" for k, v in options.items() if v is not None)]
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def made(root):
    assert generate(root, root / "made") == 0
    return root / "made"


def test_the_folder_is_what_vbench_reads(root, made):
    prompts = ("a red circle", "a cat, by Hokusai", "ünïcode ")
    assert set(contents(made)) == {f"{prompt}-{k}.mp4" for prompt in prompts for k in range(2)}
    assert len(set(contents(made).values())) == 6
    record = json.loads((root / "made.json").read_text())
    assert (record["prompts"], record["samples"], record["made"], record["missing"]) == (3, 2, 6, 0)
    assert record["settings"]["seed"] == 0 and record["runs"][0]["seconds"]["transformer"]["run"] > 0
    assert not (root / "made.work").exists()


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches a signal."""


def test_an_interrupted_run_goes_on(root, made, tmp_path, monkeypatch, capsys):
    """Killed while its third video is written, and again when one of two is moved; nothing is made or sampled twice."""
    output, write, replace = tmp_path / "videos", videos.write_video, evaluate_vbench.os.replace
    written = []

    def dying(path, *rest):
        if len(written) == 2:
            raise Killed
        written.append(path)
        return write(path, *rest)

    monkeypatch.setattr(videos, "write_video", dying)
    with pytest.raises(Killed):
        generate(root, output)
    assert not list(output.iterdir())
    kept = {path.read_bytes(): path.stat().st_mtime_ns for path in (tmp_path / "videos.work").glob("*.mp4")}
    assert len(kept) == 2
    monkeypatch.setattr(
        evaluate_vbench.os, "replace", lambda old, new: replace(old, new) or (_ for _ in ()).throw(Killed)
    )
    with pytest.raises(Killed):
        generate(root, output)
    assert len(list(output.iterdir())) == 1
    latents = next((tmp_path / "videos.work").glob("*.npy"))
    latents.with_name(f".{latents.name}.1.tmp").write_text("what a writer that was killed left")
    monkeypatch.setattr(evaluate_vbench.os, "replace", replace)
    monkeypatch.setattr(videos, "write_video", lambda *rest: written.append(rest[0]) or write(*rest))
    assert generate(root, output) == 0
    assert "4 videos made, 2 there already" in capsys.readouterr().out
    assert len(written) == 6 and contents(output) == contents(made) and not (tmp_path / "videos.work").exists()
    record = json.loads((tmp_path / "videos.json").read_text())
    assert "transformer" not in record["runs"][0]["seconds"]
    times = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert kept.items() <= {path.read_bytes(): time for path, time in times.items()}.items()
    assert generate(root, output) == 0
    assert "0 videos made, 6 there already" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in output.iterdir()}


def test_processes_prompts_and_samples_change_no_video(root, made, tmp_path, capsys):
    """Shares of two processes are made one after the other, of one sample before the second, in batches of 2."""
    output = tmp_path / "shared"
    for samples, process in ((1, 1), (1, 0), (2, 0), (2, 1)):
        assert generate(root, output, samples=samples, num_processes=2, process_id=process) == 0
    assert "1 videos made, 0 there already, 2 left to other" in capsys.readouterr().out
    assert contents(output) == contents(made)
    assert generate(root, tmp_path / "one", dimension="scene", samples=1) == 0
    assert contents(tmp_path / "one") == {"ünïcode -0.mp4": contents(made)["ünïcode -0.mp4"]}


def test_noise_is_of_the_prompt_and_the_sample():
    ids = {evaluate_vbench.noise_id(prompt, sample) for prompt in ("a", "b", "1 a") for sample in range(5)}
    assert len(ids) == 15 and all(0 <= id < 2**32 for id in ids)


def test_another_folder_is_left_alone(root, made, tmp_path):
    with pytest.raises(UserError, match=r"made with seed 0, not 1; choose another --output"):
        generate(root, made, seed=1)
    (tmp_path / "texts.txt").write_text("one\n")
    (tmp_path / "prompts.txt").write_text("two\n")
    with pytest.raises(UserError, match="made with augmented None, not '"):
        generate(root, made, prompts=tmp_path / "prompts.txt", augmented=tmp_path / "texts.txt")
    other = tmp_path / "other"
    other.mkdir()
    (other / "film.mp4").write_text("a film")
    with pytest.raises(UserError, match=r"holds film\.mp4, which this command did not make"):
        generate(root, other)
    assert [path.name for path in other.iterdir()] == ["film.mp4"] and not (tmp_path / "other.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(samples=0), "--samples is 0"),
        (dict(num_processes=2, process_id=2), "--process-id 2 is not below"),
        (dict(seed=-1), "--seed is -1"),
        (dict(model="absent"), "absent: no such folder"),
        (dict(prompts="absent.txt"), "absent.txt: cannot be read"),
    ],
)
def test_options_that_do_not_fit(root, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        generate(root, tmp_path / "videos", **options)
    assert not list(tmp_path.iterdir())


# --- vbench-score -----------------------------------------------------------------------------------------------------

# A package with VBench's interface: a score is the number of videos / 100, except that one dimension fails.
PACKAGE = """
import json, os
class VBench:
    def __init__(self, device, full_info_dir, output_path):
        os.makedirs(output_path, exist_ok=True)
        self.device, self.info, self.output = device, full_info_dir, output_path
    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False, read_frame=False, **kwargs):
        (dimension,) = dimension_list
        assert self.device == ("device", "cpu") and local
        videos = [f"{entry['prompt_en']}-{k}.mp4" for entry in json.load(open(self.info)) for k in range(5)
                  if dimension in entry["dimension"] and os.path.exists(f"{videos_path}/{entry['prompt_en']}-{k}.mp4")]
        if dimension == "scene" and os.environ.get("NO_SCENE"):
            raise RuntimeError("no weights")
        with open(f"{self.output}/{name}_eval_results.json", "w") as file:
            json.dump({dimension: [len(videos) / 100, [{"video_path": v, "video_results": 1} for v in videos]]}, file)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The package on the path of the processes that are started, with torch as far as it is needed."""
    folder = tmp_path / "packages"
    (folder / "vbench").mkdir(parents=True)
    (folder / "vbench" / "__init__.py").write_text(PACKAGE)
    (folder / "torch.py").write_text("def device(name):\n    return 'device', name\n")
    full_info(folder / "vbench")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.fixture
def clips(tmp_path):
    """All videos of VBench's file of prompts, five of each."""
    folder = tmp_path / "clips"
    folder.mkdir()
    videos.write_video(tmp_path / "clip.mp4", clip())
    for prompt in ("a red circle", "a cat, by Hokusai", "ünïcode "):
        for k in range(5):
            (folder / f"{prompt}-{k}.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes())
    return folder


def score(folder, output, *more):
    return evaluate.main(["vbench-score", f"--videos={folder}", f"--output={output}", *map(str, more)])


DIMENSIONS = ("--dimension", "temporal_flickering", "color", "appearance_style", "scene", "--device=cpu", "--local")


def test_scores_of_the_package_and_ours(tmp_path, package, clips, monkeypatch, capfd):
    output = tmp_path / "scores.json"
    monkeypatch.setenv("NO_SCENE", "1")
    with pytest.raises(UserError, match=r"VBench failed at scene \(exit status 1\)"):
        score(clips, output, *DIMENSIONS)
    assert "no weights" in capfd.readouterr().err
    assert list(json.loads(output.read_text())) == ["temporal_flickering", "color", "appearance_style"]
    monkeypatch.delenv("NO_SCENE")
    (tmp_path / "scores.json.vbench" / "color_eval_results.json").unlink()
    assert score(clips, output, *DIMENSIONS) == 0
    printed = capfd.readouterr().out
    assert "color: VBench begins" not in printed and "4 dimensions scored; without subject_consistency" in printed
    results = json.loads(output.read_text())
    assert results["temporal_flickering"][0] == vbench.video_flickering(clips / "a red circle-0.mp4")
    assert len(results["temporal_flickering"][1]) == 5
    assert [results[name][0] for name in ("color", "appearance_style", "scene")] == [0.05, 0.05, 0.05]
    assert vbench.read_scores([output, tmp_path / "scores.json.vbench"])["scene"] == 0.05


def test_flickering_needs_no_package(tmp_path, clips, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    info, output = full_info(tmp_path), tmp_path / "scores.json"
    for arguments in (DIMENSIONS, ("--dimension=temporal_flickering",)):
        with pytest.raises(
            UserError, match=r"has no package vbench: .*pip install vbench.*--python vbench-env/bin/python"
        ):
            score(clips, output, *arguments)
    assert score(clips, output, "--dimension=temporal_flickering", f"--prompts={info}") == 0
    assert list(json.loads(output.read_text())) == ["temporal_flickering"]
    with pytest.raises(UserError, match="absent-python: cannot be run"):
        score(clips, tmp_path / "other.json", "--python=absent-python")


def test_folders_that_vbench_would_misread_are_refused(tmp_path, clips):
    flickering = ("--dimension=temporal_flickering", f"--prompts={full_info(tmp_path)}")
    output = tmp_path / "scores.json"
    lost = clips / "a red circle-3.mp4"
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 5 videos of temporal_flickering, such as 'a red circle-3\.mp4'"):
        score(clips, output, *flickering)
    assert score(clips, output, *flickering, "--allow-missing") == 0
    assert len(json.loads(output.read_text())["temporal_flickering"][1]) == 4
    lost.write_bytes(content)
    later = output.stat().st_mtime + 10
    evaluate_vbench.os.utime(lost, (later, later))
    with pytest.raises(UserError, match=r"scores\.json: is older than a red circle-3\.mp4; delete it"):
        score(clips, output, *flickering)
    (clips / "notes.txt").write_text("notes")
    with pytest.raises(UserError, match=r"holds notes\.txt, which is no \.mp4"):
        score(clips, output, *flickering)
    with pytest.raises(UserError, match="absent: cannot be read"):
        score(tmp_path / "absent", output, *flickering)
