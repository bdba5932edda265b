"""Every network through a store and back, byte by byte, and the memory that reading a store takes."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from converters import export_torch, import_torch
from converters.import_torch import import_torch as import_model
from experiments import round_trip
from experiments.random_model import component_configs, write_random_model
from nd_jax.errors import UserError
from nd_jax.weights import networks, store
from nd_jax.weights.folder import save_component

COMMANDS = {"converters.import_torch": import_torch, "converters.export_torch": export_torch}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for size in ("tiny", "tiny-teacher"):
        write_random_model(root / size, size)
    return root


@pytest.fixture
def in_process(monkeypatch):
    """The two commands without the processes: starting Python and JAX 32 times takes longer than all they do."""

    def run(module, *args):
        assert COMMANDS[module].main(list(map(str, args))) == 0
        return {"seconds": 1.0, "cpu_seconds": 0.5}

    monkeypatch.setattr(round_trip, "_run", run)


def test_the_full_teacher_has_the_released_sizes():
    parts, _ = component_configs("teacher")
    sizes = {n: sum(leaf.size for leaf in jax.tree.leaves(networks.abstract_params(*p))) for n, p in parts.items()}
    assert sizes == {
        "text_encoder": 123_650_304,
        "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
        "causal_video_vae": 335_402_067,
        "diffusion_transformer_384p": 2_028_334_144,
    }


@pytest.mark.parametrize("size", ["tiny", "tiny-teacher"])
def test_all_components_come_back_byte_by_byte(models, size, in_process, tmp_path, capsys):
    assert round_trip.main(["--model", str(models / size), "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / round_trip.REPORT).read_text())
    folders = set(component_configs(size)[0])
    assert set(report["components"]) == folders and len(folders) == (11 if size == "tiny" else 5)
    assert report["identical"] and all(row["different"] == [] for row in report["components"].values())
    row = report["components"]["text_encoder_3"]
    assert row["dtypes"] == ["bfloat16"] and row["bytes"] == 2 * row["parameters"]
    assert row["export"]["ratio"] == pytest.approx(row["export"]["peak_bytes"] / row["bytes"])
    assert not any((tmp_path / round_trip.COPIES).iterdir())
    printed = capsys.readouterr().out
    assert printed.count("| yes |") == len(folders) and "came back byte by byte" in printed.splitlines()[-1]


def test_a_difference_is_found_and_fails(models, in_process, tmp_path, monkeypatch):
    run = round_trip._run

    def damage(module, *args):
        done = run(module, *args)
        if module == "converters.export_torch":
            (weights,) = (tmp_path / round_trip.COPIES).rglob("quicksrnet/model/**/*.safetensors")
            content = bytearray(weights.read_bytes())
            content[-1] ^= 1
            weights.write_bytes(content)
        return done

    monkeypatch.setattr(round_trip, "_run", damage)
    arguments = ["--model", str(models / "tiny"), "--output", str(tmp_path), "--components", "quicksrnet"]
    with pytest.raises(UserError, match=r"came back otherwise: quicksrnet: .*\.safetensors"):
        round_trip.main(arguments)
    assert json.loads((tmp_path / round_trip.REPORT).read_text())["identical"] is False
    with pytest.raises(UserError, match=r"--components x: .* has only causal_video_vae, "):
        round_trip.main([*arguments[:-1], "x"])


def test_the_same_command_again_does_what_is_missing(models, in_process, tmp_path, monkeypatch):
    arguments = ["--model", str(models / "tiny"), "--output", str(tmp_path), "--components"]
    assert round_trip.main([*arguments, "quicksrnet"]) == 0
    run, sources = round_trip._run, []
    monkeypatch.setattr(round_trip, "_run", lambda module, *args: (sources.append(args[1].name), run(module, *args))[1])
    assert round_trip.main([*arguments, "quicksrnet,context_adapter"]) == 0
    assert sources == ["context_adapter", "store"]
    report = json.loads((tmp_path / round_trip.REPORT).read_text())
    assert set(report["components"]) == {"quicksrnet", "context_adapter"}
    with pytest.raises(UserError, match=r"holds the report of .*tiny; choose another --output"):
        round_trip.main(["--model", str(models / "tiny-teacher"), "--output", str(tmp_path)])


def test_files_of_one_side_only_are_differences(tmp_path):
    for name, files in (("one", "ab"), ("other", "bc")):
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("same")
    assert round_trip.different_files(tmp_path / "one", tmp_path / "other") == ["a", "c"]


def test_the_commands_as_processes(models, tmp_path):
    """Their own memory, and their own message when they fail."""
    row = round_trip.round_trip(models / "tiny" / "context_adapter", tmp_path / "scratch", keep=True)
    assert row["identical"] and (tmp_path / "scratch" / "store" / "model.json").is_file()
    for way in ("import", "export"):
        assert 0 < row[way]["cpu_seconds"] and 0 < row[way]["seconds"] and 5e7 < row[way]["peak_bytes"] < 4e9
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^converters\.import_torch: .*class None is not supported"):
        round_trip.round_trip(tmp_path / "broken", tmp_path / "scratch")


def test_parameters_are_read_one_after_another_the_largest_first(models, tmp_path, monkeypatch):
    import_model(models / "tiny", tmp_path / "store", component="context_adapter")
    read, original = [], store.ocp.type_handlers.NumpyHandler.deserialize

    async def deserialize(self, infos, args=None):
        arrays = await original(self, infos, args)
        read.append([array.size for array in arrays])
        return arrays

    monkeypatch.setattr(store.ocp.type_handlers.NumpyHandler, "deserialize", deserialize)
    store.load_stored(tmp_path / "store", "context_adapter")
    assert len(read) == 6 and all(len(sizes) == 1 for sizes in read)
    assert read == sorted(read, reverse=True)


MEMORY = """
import json, sys
from converters.peak_memory import peak_bytes
from nd_jax.weights.store import load_stored
load_stored(sys.argv[1], "small")
before = peak_bytes()
component = load_stored(sys.argv[1], "large")
print(json.dumps(peak_bytes() - before))
"""


def test_reading_a_store_holds_little_more_than_the_component(tmp_path):
    """Equal matrices, one after another. All at once, as Orbax reads them, it is 1.2 times and more."""
    from nd_jax.models.context_adapter import ContextAdapterConfig

    sizes = {}
    for name, width, layers in (("small", 8, 1), ("large", 2048, 7)):
        config = ContextAdapterConfig(width, width, (width,) * layers, (True,) * layers)
        shapes = networks.abstract_params(networks.CONTEXT_ADAPTER, config)
        params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes)
        save_component(tmp_path / "model" / name, networks.CONTEXT_ADAPTER, config, params)
        sizes[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    import_model(tmp_path / "model", tmp_path / "store")
    child = [sys.executable, "-c", MEMORY, str(tmp_path / "store")]
    done = subprocess.run(child, capture_output=True, text=True, check=True)
    assert 0.5 < json.loads(done.stdout) / sizes["large"] < 1.15
