"""The benchmark: both sides of a case compute the same, and its numbers are those that were measured."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest

from experiments import benchmark, benchmark_gpu
from experiments.benchmark_decoder import decoder_calls, decoder_cases
from experiments.benchmark_networks import (
    TEXT_TOKENS,
    Case,
    joint_block_arrays,
    joint_block_call,
    joint_block_cases,
    joint_block_params,
    t5_block_calls,
    torch_joint_block,
    torch_joint_block_call,
    torch_t5_block,
)
from nd_jax.errors import UserError, run_command
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.mmdit_block import TokenGeometry
from nd_jax.models.t5 import T5Config
from nd_jax.models.taehv import TAEHVConfig, TAEHVDecoder
from nd_jax.pyramid.layout import VideoSize

CONFIG = MMDiTConfig(num_layers=2, attention_head_dim=8, num_attention_heads=2, sample_size=16, pos_embed_max_size=16)


def numpy(tree):
    return jax.tree.map(np.asarray, tree)


def assert_close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_the_joint_block_is_that_of_diffusers():
    """Without rotation and mask, which the other has not: outputs, and gradients of inputs and of every parameter."""
    image, text = 6, 3
    block = torch_joint_block(CONFIG)
    arrays = joint_block_arrays(CONFIG, image, text)
    no_turn = np.ones((1, image, 4), np.float32), np.zeros((1, image, 4), np.float32)
    mask = np.ones((1, 1, text + image, text + image), bool)
    geometry = TokenGeometry(np.zeros((1, image, CONFIG.inner_dim), np.float32), *no_turn, mask)
    params = joint_block_params(CONFIG, block)
    outputs, (d_params, *d_inputs) = numpy(joint_block_call(CONFIG, params, arrays, geometry, 0, True)())
    their_outputs, their_d_inputs = torch_joint_block_call(block, arrays, True)()
    for got, expected in zip([*outputs, *d_inputs], [*their_outputs, *their_d_inputs], strict=True):
        assert_close(got, expected.detach().numpy())
    for parameter in block.parameters():
        parameter.data = parameter.grad
    their_d_params = joint_block_params(CONFIG, block)
    jax.tree.map(assert_close, d_params, their_d_params)

    forward = joint_block_call(CONFIG, params, arrays, geometry, 0, False)()
    jax.tree.map(assert_close, numpy(forward), outputs)


def test_the_t5_layer_is_that_of_transformers():
    config = T5Config(d_model=16, d_kv=4, d_ff=24, num_heads=2, num_layers=2)
    x = np.random.default_rng(0).standard_normal((1, 9, 16), np.float32)
    ours, theirs = t5_block_calls(config, torch_t5_block(config), x)
    assert_close(np.asarray(ours()[0]), theirs()[0].numpy())


def test_the_tiny_decoder_is_the_same_in_both():
    """Three latent frames, so that states are carried."""
    config = TAEHVConfig(4, (6, 4, 4, 4))
    decoder = TAEHVDecoder(config)
    params = jax.jit(lambda: decoder.init(jax.random.key(1), np.zeros((1, 1, 2, 2, 4), np.float32))["params"])()
    ours, theirs = decoder_calls(config, params, 3, 2, latent_frames=3)
    for got, expected in zip(numpy(ours()), theirs(), strict=True):
        assert_close(got, expected.numpy().transpose(0, 2, 3, 1))
    names = [case.name for case in decoder_cases(config)]
    assert names == [f"tiny decoder, {n} latent frames ({f} video frames)" for n, f in ((1, 1), (7, 49))]


def test_statistics_of_a_case():
    runs = {
        "nd_jax": {"seconds": [1.0, 3.0, 2.0], "processor_seconds": [2.0, 2.0, 2.0]},
        "reference": {"seconds": [2.0, 2.0, 8.0], "processor_seconds": [4.0, 5.0, 9.0]},
    }
    got = benchmark.summarise(runs)
    # Pairs: 0.5, 1.5, 0.25.
    assert got["ratio"] == 0.5 and got["ratio_range"] == [0.25, 1.5]
    assert got["ratio_of_minima"] == 0.5 and got["processor_ratio"] == 0.4
    assert got["nd_jax"]["median"] == 2 and got["reference"]["maximum"] == 8


def test_both_sides_run_in_turn():
    order = []
    times = benchmark.time_pair(lambda: order.append("A"), lambda: order.append("B"), repeats=3)
    assert "".join(order) == "AABB" + "AB" + "BA" + "AB"
    assert all(len(times[side]["seconds"]) == 3 for side in ("nd_jax", "reference"))


def test_a_block_as_on_a_gpu():
    """On a processor here: the same arrays in and arrays of the same shapes out, forward and backward."""
    video = VideoSize(latent_frames=3, height=8, width=8, stages=2)
    cases = list(benchmark_gpu.gpu_cases(CONFIG, video, device="cpu"))
    names = [case.name.removeprefix("joint block by xla, ") for case in cases]
    assert names == [f"{n} tokens, {what}" for n in (140, 164) for what in ("forward", "forward + backward")]
    (forward, their_forward), (backward, their_backward) = (case.build() for case in cases[:2])
    shapes = lambda arrays: [tuple(array.shape) for array in arrays]
    outputs = [(8, 12, CONFIG.inner_dim), (8, TEXT_TOKENS, CONFIG.inner_dim)]
    assert shapes(forward()) == shapes(their_forward()) == outputs
    with jax.numpy_dtype_promotion("standard"):  # The gradient of JAX's own attention mixes dtypes.
        _, *gradients = backward()
    assert shapes(gradients) == shapes(their_backward()) == [*outputs, (8, CONFIG.inner_dim)]
    assert all(np.isfinite(np.asarray(array, np.float32)).all() for array in gradients)


def test_the_gpu_suite_needs_a_gpu():
    with pytest.raises(UserError, match="needs a GPU that JAX and PyTorch both see"):
        list(benchmark.SUITES["joint_block_gpu"][1]())
    assert "joint_block_gpu" in benchmark.ON_REQUEST


def test_the_command_writes_its_numbers(tmp_path, monkeypatch, capsys):
    video = VideoSize(latent_frames=3, height=8, width=8, stages=2)
    cases = lambda: itertools.islice(joint_block_cases(CONFIG, video), 2)
    monkeypatch.setattr(benchmark, "SUITES", {"joint_block": ("tiny", cases)})
    output = tmp_path / "numbers.json"
    assert run_command(lambda: benchmark.main(["--repeats", "2", "--output", str(output)])) == 0
    written = json.loads(output.read_text())
    assert written["repeats"] == 2 and written["machine"]["threads"] >= 1
    # Two frames of history at the coarsest stage and the current one, four tokens each.
    names = [r["case"] for r in written["results"]]
    tokens = TEXT_TOKENS + 3 * 4
    assert names == [f"joint block, stage 0, {tokens} tokens, {what}" for what in ("forward", "forward + backward")]
    for r in written["results"]:
        assert r["tokens"] == tokens and r["ratio"] > 0 and len(r["reference"]["seconds"]) == 2
    shown = capsys.readouterr().out
    assert "ratio" in shown and f"2 cases on {written['machine']['threads']} threads" in shown


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmark.sys.modules, "diffusers", None)
    assert run_command(lambda: benchmark.main(["--output", str(tmp_path / "x.json")])) == 1
    assert "diffusers not installed; run: pip install diffusers" in capsys.readouterr().err
    for bad, says in ((["--repeats", "0"], "at least 1"), (["--output", "/no/such/x.json"], "create it first")):
        assert run_command(lambda bad=bad: benchmark.main(bad)) == 1
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmark.main(["--suite", "no_such"])


def test_cases_are_data():
    case = Case("name", {"tokens": 1}, lambda: (lambda: 1, lambda: 2))
    (result,) = benchmark.run_cases("suite", [case], 1, lambda name: None)
    assert result["suite"] == "suite" and result["tokens"] == 1 and result["case"] == dataclasses.asdict(case)["name"]
