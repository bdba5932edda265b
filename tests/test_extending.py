"""docs/extending.md as its readers use it: its files into a copy of the tree, its lines into the registries, and its
commands there."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters.numerics import snr_db
from converters.onnx_check import run_on_cpu
from nd_jax.data.registry import build_data
from nd_jax.distill.registry import build_method
from nd_jax.errors import UserError
from nd_jax.train.metrics import read_metrics
from tests.test_architecture import imports, violations
from tests.text_encoder_case import arguments, write_prompts

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COPIED = ("nd_jax", "converters", "experiments", "tests/__init__.py", "tests/conftest.py", "pyproject.toml")
SIZES = {"input_dims": 24, "hidden_dims": 40, "output_dims": 16}
# Commands of the page one after another in one process: starting Python and its packages takes longer than they do.
DRIVER = """
import json, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv = command
    try:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
"""


def page_blocks() -> list[tuple[str, str]]:
    """(language, text) of every fence of the page."""
    return FENCE.findall((ROOT / "docs" / "extending.md").read_text(encoding="utf-8"))


def write_file(tree: Path, text: str) -> None:
    """A Python fence, whose first line names its file."""
    name, _, content = text.partition("\n")
    path = tree / name.removeprefix("# ")
    assert not path.exists(), f"{path} is there already: the example needs another name"
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")


def insert_lines(tree: Path, text: str) -> None:
    """A diff fence: behind the file's name, lines that the file has once, and below each the lines that come next."""
    name, *lines = text.splitlines()
    place = 0  # Of the line before, in the file.
    path = tree / name.removeprefix(" # ")
    content = path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line.startswith("+"):
            place += 1
            content.insert(place, line[1:])
        else:
            assert content.count(line[1:]) == 1, f"{path} has {line[1:]!r} {content.count(line[1:])} times"
            place = content.index(line[1:])
    path.write_text("\n".join(content) + "\n", encoding="utf-8")


def page_commands(blocks: list[tuple[str, str]]) -> list[list[str]]:
    """Module and arguments of every command of the page."""
    lines = [line for language, text in blocks if language == "sh" for line in text.splitlines()]
    assert all(line.startswith("python -m ") for line in lines), lines
    return [line.removeprefix("python -m ").split() for line in lines]


def shortened(command: list[str]) -> list[str]:
    """A training of a few steps and a few parameters; other commands as they are."""
    changes = {"num_steps": 4, "eval_every": 4, "checkpoint.every": 4, "mesh.data": 8, "mesh.fsdp": 1}
    return [*command, *arguments(**changes)] if command[0] == "experiments.train" else command


def write_released(folder: Path) -> None:
    """A component folder as its authors would publish it."""
    rng, (inputs, hidden, outputs) = np.random.default_rng(0), SIZES.values()
    shapes = {"gate_proj.weight": (hidden, inputs), "up_proj.weight": (hidden, inputs)}
    shapes |= {"down_proj.weight": (outputs, hidden), "down_proj.bias": (outputs,)}
    tensors = {key: rng.standard_normal(shape, np.float32) * np.float32(0.2) for key, shape in shapes.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"_class_name": "GatedAdapter", **SIZES}))


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The copy, in which everything on the page was done."""
    tree = tmp_path_factory.mktemp("extending") / "tree"
    skipped = shutil.ignore_patterns("__pycache__", "toy_teacher")  # The second is weights.
    for name in COPIED:
        source, target = ROOT / name, tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target, ignore=skipped) if source.is_dir() else shutil.copy(source, target)
    blocks = page_blocks()
    for language, text in blocks:
        if language != "sh":
            {"python": write_file, "diff": insert_lines}[language](tree, text)
    write_prompts(tree / "prompts.txt")
    write_released(tree / "released" / "gated_adapter")
    commands = [shortened(command) for command in page_commands(blocks)]
    tested = [path for command in commands if command[0] == "pytest" for path in command[1:]]
    # The tests come first, because their settings do.
    ordered = [["pytest", "-p", "no:cacheprovider", *tested], *(c for c in commands if c[0] != "pytest")]
    driver = [sys.executable, "-c", DRIVER, json.dumps(ordered)]
    done = subprocess.run(driver, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return tree


def test_the_method_trains_by_its_equation_and_is_delivered(tree):
    lines = read_metrics(tree / "runs" / "relational" / "metrics.jsonl")
    trained = [line for line in lines if "train/loss" in line]
    assert len(trained) == 4
    for line in trained:
        mse, cosine, relation = (line[f"train/{part}"] for part in ("mse", "cosine_distance", "relation"))
        assert relation > 0 and line["train/loss"] == pytest.approx(mse + 0.1 * cosine + 1.0 * relation, rel=1e-5)
    assert all(0 < line["eval/relation"] < 4 for line in lines if "eval/cosine" in line)
    names = {path.name for path in (tree / "runs" / "relational_model").iterdir() if path.is_dir()}
    assert names == {"text_encoder_3", "context_adapter", "tokenizer_3"}


def test_the_network_comes_back_byte_by_byte(tree):
    for name in ("config.json", "model.safetensors"):
        given, exported = (tree / folder / "gated_adapter" / name for folder in ("released", "model"))
        assert exported.read_bytes() == given.read_bytes()


def test_its_graph_is_the_released_function(tree):
    """Against numpy, on the tensors as they were published."""
    w = load_file(tree / "released" / "gated_adapter" / "model.safetensors")
    x = np.random.default_rng(1).standard_normal((1, 16, SIZES["input_dims"]), np.float32)
    gate, up = x @ w["gate_proj.weight"].T, x @ w["up_proj.weight"].T
    expected = (gate / (1 + np.exp(-gate)) * up) @ w["down_proj.weight"].T + w["down_proj.bias"]
    (computed,) = run_on_cpu(tree / "onnx" / "gated_adapter.onnx", [{"hidden": x}])
    assert snr_db(expected, computed["context"]) > 110
    assert json.loads((tree / "onnx" / "w8a16.json").read_text())["snr_db"]["quantised"]["context"] > 34


@pytest.mark.parametrize(("graph", "lowest", "highest"), [("gated_adapter", 45, 110), ("w8a16", 34, 70)])
def test_the_simulator_has_run_its_binaries(tree, graph, lowest, highest):
    simulator = json.loads((tree / "hexagon" / f"{graph}_8-elite.json").read_text())["simulator"]
    assert simulator["samples"] == 2 and lowest < simulator["snr_db"]["context"] < highest


def test_the_files_keep_the_rules_of_the_tree():
    files = [text.partition("\n") for language, text in page_blocks() if language == "python"]
    own = {
        name.removeprefix("# "): source for name, _, source in files if name.startswith(("# nd_jax", "# converters"))
    }
    assert len(own) == 3
    for name, source in own.items():
        module = name.removesuffix(".py").replace("/", ".")
        assert violations(module, imports(source, module, is_package=False)) == []


# --- a method in a module of one's own --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text_encodr", "no_such_package.method", "", ".method", "a..b", "text encoder"])
def test_a_method_that_is_not_there_is_named(name):
    for build in (build_method, lambda config: build_data(config, Path())):
        with pytest.raises(
            UserError, match=rf"^method is {re.escape(repr(name))}: known methods are decoder, .*video_vae"
        ):
            build({"method": name})


def test_a_module_that_is_no_method_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_a_method.py").write_text("def build_data(config, workdir): ...\n")
    (tmp_path / "broken_method.py").write_text("import a_package_that_is_not_installed\n")
    with pytest.raises(UserError, match="half_a_method', a module without resolve_config and build_method"):
        build_data({"method": "half_a_method"}, tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_installed"):
        build_method({"method": "broken_method"})
