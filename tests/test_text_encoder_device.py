"""experiments.text_encoder_device at tiny size: what its table must say."""

import json

import pytest

from experiments import text_encoder_device
from nd_jax.errors import run_command


def test_only_the_folded_scale_and_the_rewriting_pass_give_accuracy(tmp_path, capsys):
    command = ["--output", str(tmp_path), "--runs", "1", "--variants", "folded", "unfolded", "raw"]
    assert run_command(lambda: text_encoder_device.main(command)) == 0
    assert "| folded | 0.03125 |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "text_encoder_device.json").read_text())["variants"]
    assert rows["folded"]["residual_peak"] == pytest.approx(3e5, rel=0.01)
    assert rows["folded"]["simulator_snr_db"] > 40
    assert rows["unfolded"]["simulator_snr_db"] < 10 and rows["raw"]["simulator_snr_db"] < 0
