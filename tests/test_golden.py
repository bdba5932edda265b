"""The golden cases pass, and the runner fails what it must fail."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests import golden

CASES = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in CASES.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_case(name):
    result = golden.run_case(CASES / f"{name}.json")
    assert result.ok, result.line()


def test_the_cases_are_there():
    assert len(NAMES) >= 7
    assert set(NAMES) == {path.stem for path in CASES.glob("*.safetensors")}


@pytest.fixture
def copied(tmp_path):
    """A folder with one case under another name: its class decides how it runs."""
    for suffix in ("json", "safetensors"):
        shutil.copy(CASES / f"context_adapter_mixed.{suffix}", tmp_path / f"another.{suffix}")
    return tmp_path


def change(folder, edit):
    path = folder / "another.json"
    case = json.loads(path.read_text())
    edit(case)
    path.write_text(json.dumps(case))


def test_a_renamed_case_runs(copied, capsys):
    assert golden.main([str(copied)]) == 0
    assert "another" in capsys.readouterr().out


def test_a_wrong_number_fails(copied, capsys):
    tensors = load_file(copied / "another.safetensors")
    tensors["out.y"].flat[3] += 1e-3 * abs(tensors["out.y"]).max()
    save_file(tensors, copied / "another.safetensors")
    assert golden.main([str(copied)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_an_unknown_kind_fails(copied, capsys):
    change(copied, lambda case: case.update(official="neodragon.mmdit.PyramidMMDiT"))
    assert golden.main([str(copied)]) == 1
    assert "unknown kind" in capsys.readouterr().out


def test_an_output_that_is_not_computed_fails(copied, capsys):
    tensors = load_file(copied / "another.safetensors")
    save_file({**tensors, "out.z": tensors["out.y"]}, copied / "another.safetensors")
    assert golden.main([str(copied)]) == 1
    assert "not computed: z" in capsys.readouterr().out


def test_missing_parts_fail(copied):
    change(copied, lambda case: case.pop("official"))
    assert golden.main([str(copied)]) == 1
    (copied / "another.json").unlink()
    assert golden.main([str(copied)]) == 1
    (copied / "another.safetensors").unlink()
    assert golden.main([str(copied)]) == 1
