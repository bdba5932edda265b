"""VBench: its totals on published rows, its flickering, and its prompts."""

import itertools
import json
import re
import zipfile

import numpy as np
import pytest

from experiments import evaluate
from nd_jax.errors import UserError
from nd_jax.evals import vbench
from nd_jax.evals.vbench_prompts import read_prompts, video_name
from nd_jax.generate import videos
from tests.vbench_case import clip, full_info

# --- totals -----------------------------------------------------------------------------------------------------------

# Total, quality, semantic and the scores of VBench's leaderboard in its order of columns, percent, as printed in the
# tables of Goku (arXiv 2502.04896) and Show-o2 (arXiv 2506.15564).
COLUMNS = (
    "subject_consistency background_consistency temporal_flickering motion_smoothness dynamic_degree aesthetic_quality "
    "imaging_quality object_class multiple_objects human_action color spatial_relationship scene appearance_style "
    "temporal_style overall_consistency"
).split()
LEADERBOARD = {
    "VideoCrafter-2.0": "80.44 82.20 73.42  96.85 98.22 98.41 97.73 42.50 63.13 67.22 "
    "92.55 40.66 95.00 92.92 35.86 55.29 25.13 25.84 28.23",
    "AnimateDiff-V2": "80.27 82.90 69.75  95.30 97.68 98.75 97.76 40.83 67.16 70.10 "
    "90.90 36.88 92.60 87.47 34.60 50.19 22.42 26.03 27.04",
    "Gen-2": "80.58 82.47 73.03  97.61 97.61 99.56 99.58 18.89 66.96 67.42 "
    "90.92 55.47 89.20 89.49 66.91 48.91 19.34 24.12 26.17",
    "CogVideoX-5B": "81.61 82.75 77.04  96.23 96.52 98.66 96.92 70.97 61.98 62.90 "
    "85.23 62.11 99.40 82.81 66.35 53.20 24.91 25.38 27.59",
    "ModelScope": "75.75 78.05 66.54  89.87 95.29 98.28 95.79 66.39 52.06 58.57 "
    "82.25 38.98 92.40 81.72 33.68 39.26 23.39 25.37 25.67",
    "Kling": "81.85 83.39 75.68  98.33 97.60 99.30 99.40 46.94 61.21 65.62 "
    "87.24 68.05 93.40 89.90 73.03 50.86 19.62 24.17 26.42",
}
# (total, quality, semantic) of the paper's tables of Neodragon.
NEODRAGON = [
    (81.61, 83.68, 73.36),
    (78.39, 81.58, 65.63),
    (80.00, 83.52, 65.89),
    (80.04, 83.52, 66.11),
    (80.21, 83.54, 66.90),
    (80.35, 83.82, 66.48),
]


def row(name):
    """((total, quality, semantic), scores) of the leaderboard, as fractions."""
    values = [float(word) / 100 for word in LEADERBOARD[name].split()]
    return values[:3], dict(zip(COLUMNS, values[3:], strict=True))


@pytest.mark.parametrize("name", LEADERBOARD)
def test_totals_are_those_of_the_leaderboard(name):
    """All numbers are rounded to 0.01 %; a range below 0.3 enlarges that of a score, weights of 1/6.5 reduce it."""
    published, scores = row(name)
    got = vbench.totals(scores)
    np.testing.assert_allclose([got.total, got.quality, got.semantic], published, rtol=0, atol=1.2e-4)


@pytest.mark.parametrize(("total", "quality", "semantic"), NEODRAGON)
def test_neodragons_rows(total, quality, semantic, capsys):
    """Rounding of all three leaves at most 0.005 + 0.005."""
    assert abs(vbench.total_score(quality, semantic) - total) <= 0.01 + 1e-9
    assert evaluate.main(["vbench-total", f"--quality={quality}", f"--semantic={semantic}"]) == 0
    printed = float(capsys.readouterr().out.split("total ")[1])
    assert abs(printed - total) <= 0.01 + 1e-9


def test_ranges_and_weights():
    lowest = {name: d.minimum for name, d in vbench.DIMENSIONS.items()}
    highest = {name: d.maximum for name, d in vbench.DIMENSIONS.items()}
    assert vbench.totals(lowest) == (0, 0, 0)
    np.testing.assert_allclose(vbench.totals(highest), 1, rtol=1e-12)
    # Of the quality dimensions only this one counts half: 0.5 / 6.5 of quality, which is 4/5 of the total.
    np.testing.assert_allclose(vbench.totals(lowest | {"dynamic_degree": 1.0}).total, 0.8 * 0.5 / 6.5, rtol=1e-12)
    np.testing.assert_allclose(vbench.totals(lowest | {"color": 1.0}).total, 0.2 / 9, rtol=1e-12)


def test_all_result_files_of_vbench_are_read(tmp_path, capsys):
    published, scores = row("Kling")
    names = list(scores)
    results = {name: [scores[name], [{"video_path": "a-0.mp4", "video_results": 0.5}]] for name in names}
    for name in names[:8]:
        (tmp_path / f"{name}_eval_results.json").write_text(json.dumps({name: results[name]}))
        (tmp_path / f"{name}_full_info.json").write_text(json.dumps([{"prompt_en": "a", "dimension": [name]}]))
    spaced = {name.replace("_", " ").title(): scores[name] for name in names[8:12]}
    (tmp_path / "spaced.json").write_text(json.dumps({**spaced, "Model": "Kling", "Videos": []}))
    with zipfile.ZipFile(tmp_path / "rest.zip", "w") as archive:
        archive.writestr("evaluation_results/rest.json", json.dumps({name: results[name] for name in names[12:]}))
        archive.writestr("__MACOSX/._rest.json", b"\0")
    paths = [tmp_path, tmp_path / "rest.zip"]
    assert vbench.read_scores(paths) == scores
    output = tmp_path / "total" / "total.json"
    output.parent.mkdir()
    assert evaluate.main(["vbench-total", "--scores", *map(str, paths), f"--output={output}"]) == 0
    printed = re.fullmatch(r"quality (.*), semantic (.*), total (.*): (.*)\n", capsys.readouterr().out).groups()
    assert printed[3] == str(output)
    np.testing.assert_allclose([float(printed[k]) / 100 for k in (2, 0, 1)], published, rtol=0, atol=1.2e-4)
    written = json.loads(output.read_text())
    assert abs(written["total"] - published[0]) < 1e-4 and written["scores"] == scores
    np.testing.assert_allclose(written["normalized"]["scene"], 0.5086 / 0.8222, rtol=1e-12)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a.json": {"color": 0.5, "colour": 0.5}},
            r"no score for subject_consistency, .*there is colour, which VBench",
        ),
        (
            {"a.json": {"color": 0.5}, "b.json": {"color": [0.6, []]}},
            r"color is 0\.5 in .*a\.json and 0\.6 in .*b\.json",
        ),
        ({"a.json": {"color": None}}, r"a\.json: color is null, not a score"),
        ({"a.json": {"color": [True, []]}}, r"a\.json: color is \[true, \[\]\], not a score"),
        ({"a.json": []}, "not a JSON object of dimensions"),
        ({}, "holds no scores"),
    ],
)
def test_scores_that_are_none_are_named(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    paths = [tmp_path / name for name in files] or [tmp_path]
    with pytest.raises(UserError, match=message) as error:
        evaluate.main(["vbench-total", "--scores", *map(str, paths)])
    assert "\n" not in str(error.value)


def test_percent_and_half_a_pair_are_refused(tmp_path):
    _, scores = row("Kling")
    with pytest.raises(UserError, match=r"color is 89\.9: scores are fractions"):
        vbench.totals(scores | {"color": 89.9})
    for arguments in ([], ["--quality=80"], ["--quality=80", "--semantic=70", f"--scores={tmp_path}"]):
        with pytest.raises(UserError, match="give --scores, or --quality with --semantic"):
            evaluate.main(["vbench-total", *arguments])


# --- temporal flickering ----------------------------------------------------------------------------------------------


def exact_flickering(frames):
    """Equation 4 in whole numbers up to the last division."""
    values = [[int(value) for value in frame.ravel()] for frame in frames]
    pairs = itertools.pairwise(values)
    distance = sum(abs(a - b) for one, two in pairs for a, b in zip(one, two, strict=True))
    return 1 - distance / ((len(values) - 1) * len(values[0]) * 255)


def test_flickering_is_vbenchs():
    """The number is what vbench 0.1.5 makes of the same frames: (255 - mean of its `mae_seq`) / 255."""
    assert vbench.temporal_flickering(clip()) == 0.6193559235217525
    assert abs(0.6193559235217525 - exact_flickering(clip())) < 1e-6
    assert vbench.temporal_flickering([clip()[0]] * 3) == 1
    black_and_white = [np.full((4, 4, 3), value, np.uint8) for value in (0, 255, 0)]
    assert vbench.temporal_flickering(black_and_white) == 0


def test_flickering_of_files(tmp_path):
    import av

    smooth = np.clip(clip().astype(int) // 4 + 90, 0, 255).astype(np.uint8)
    for name, frames in (("moving.mp4", smooth), ("still.mp4", [smooth[0]] * 4)):
        videos.write_video(tmp_path / name, frames)
    with av.open(str(tmp_path / "moving.mp4")) as container:
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    mean, results = vbench.folder_flickering([tmp_path / "moving.mp4", tmp_path / "still.mp4"])
    moving, still = (result["video_results"] for result in results)
    assert abs(moving - exact_flickering(decoded)) < 1e-6
    assert 0.5 < moving < still and mean == np.mean([moving, still])
    assert results[0]["video_path"] == str(tmp_path / "moving.mp4")


def test_videos_without_flickering_are_named(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    videos.write_video(tmp_path / "one.mp4", clip()[:1])
    for name, message in (("text", "text.mp4: not a video"), ("one", "one.mp4: a video of fewer than two frames")):
        with pytest.raises(UserError, match=message):
            vbench.video_flickering(tmp_path / f"{name}.mp4")


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_of_all_formats(tmp_path):
    found = read_prompts([full_info(tmp_path)])
    assert [(p.prompt, p.dimensions) for p in found] == [
        ("a red circle", ("temporal_flickering", "color")),
        ("a cat, by Hokusai", ("appearance_style",)),
        ("ünïcode ", ("scene",)),
    ]
    assert [p.prompt for p in read_prompts([full_info(tmp_path)], ["scene", "color"])] == ["a red circle", "ünïcode "]
    (tmp_path / "scene.txt").write_text("  a barn \nan alley\na barn\n")
    assert read_prompts([tmp_path / "scene.txt"])[0] == ("a barn", "a barn", ("scene",))
    (tmp_path / "some.jsonl").write_text('{"prompt": "a barn", "dimensions": ["color"]}\n\n{"prompt": "an owl"}\n')
    both = read_prompts([tmp_path / "scene.txt", tmp_path / "some.jsonl"])
    assert [(p.prompt, p.dimensions) for p in both] == [
        ("a barn", ("scene", "color")),
        ("an alley", ("scene",)),
        ("an owl", ()),
    ]


def test_longer_texts_keep_the_prompts_names(tmp_path):
    (tmp_path / "all.txt").write_text("a barn\nan alley\n")
    (tmp_path / "longer.txt").write_text("a barn " * 100 + "\nan alley/street\n")
    found = read_prompts([tmp_path / "all.txt"], augmented=tmp_path / "longer.txt")
    assert [p.prompt for p in found] == ["a barn", "an alley"] and len(found[0].text) == 699
    (tmp_path / "longer.txt").write_text("one\n")
    with pytest.raises(UserError, match="1 texts for 2 prompts"):
        read_prompts([tmp_path / "all.txt"], augmented=tmp_path / "longer.txt")
    with pytest.raises(UserError, match=r"goes with one \.txt file"):
        read_prompts([full_info(tmp_path)], augmented=tmp_path / "longer.txt")


@pytest.mark.parametrize(
    ("name", "content", "dimensions", "message"),
    [
        ("a.txt", "one/two\n", [], r"prompt 'one/two': holds a /"),
        ("a.txt", "long " * 60, [], "its file's name would have 305 bytes, above 255; give VBench's short prompts"),
        ("a.txt", "one\n", ["scene"], "does not tell its prompts' dimensions"),
        ("a.txt", "one\n", ["scenes"], "dimension 'scenes' is unknown; VBench's are subject_consistency"),
        ("scene.txt", "one\n", ["color"], "holds no prompt of color"),
        ("a.json", '{"prompt_en": "one"}', [], "not a list of prompts"),
        ("a.json", '[{"prompt": "one"}]', [], "entry 1: no text under 'prompt_en'"),
        ("a.json", '[{"prompt_en": "one", "dimension": "color"}]', [], "'dimension' is not a list"),
        ("a.jsonl", "{", [], "not valid JSON"),
        ("a.csv", "one", [], "suffix '.csv' is unknown"),
    ],
)
def test_prompts_that_do_not_fit_are_named(tmp_path, name, content, dimensions, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_prompts([tmp_path / name], dimensions)


def test_names_have_room_to_the_last_byte():
    assert len(video_name("é" * 124 + "e", 0).encode()) == 255
    with pytest.raises(UserError, match="256 bytes"):
        video_name("é" * 125, 0)
