"""Block importance against direct computations, the strategies, plans in files, and the command that makes them."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import prune_plan
from experiments.random_model import component_configs, random_params, write_random_model
from nd_jax.distill.pruning_plan import BY_HAND, PruningPlan, read_plan, write_plan
from nd_jax.errors import UserError
from nd_jax.evals import block_importance as bi
from nd_jax.evals import calibration
from nd_jax.evals.leave_one_out import final_latent_error, probe_velocity, without_blocks
from nd_jax.generate.model_folder import open_model
from nd_jax.generate.pipeline import encode_prompts
from nd_jax.generate.sampler import draw_noise, rollout, stage_program
from nd_jax.models.mmdit import BlockStates
from nd_jax.pyramid import noise as pyramid_noise
from nd_jax.pyramid.history import history_clips, history_plan
from nd_jax.pyramid.layout import token_layout
from nd_jax.weights.folder import save_component
from nd_jax.weights.safetensors_io import SafetensorsFile

GOLDEN = Path(__file__).parent / "golden"
BLOCKS, IDLE = 4, 1
PROMPTS = ("a red circle moves left slowly", "a blue square moves up quickly", "there is a green cross moving down")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A teacher of four blocks, one of which does nothing, and prompts."""
    root = tmp_path_factory.mktemp("prune")
    write_random_model(root / "model", "tiny-teacher", dtype="float32")
    name = "diffusion_transformer_384p"
    network, config = component_configs("tiny-teacher")[0][name]
    config = dataclasses.replace(config, num_layers=BLOCKS)
    params = random_params(network, config, np.random.default_rng(1), np.float32)
    for stream in ("image", "text"):  # No gate opens.
        for leaf in params["blocks"][stream]["modulation"].values():
            leaf[IDLE] = 0
    save_component(root / "model" / name, network, config, params)
    settings = root / "model" / "generation.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "first_steps": [1, 1, 1], "video_frames": 17}))
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return root


@pytest.fixture(scope="module")
def teacher(root):
    return calibration.load_teacher(open_model(root / "model"), np.float32)


@pytest.fixture(scope="module")
def batch(root):
    text = encode_prompts(open_model(root / "model"), (*PROMPTS[:2], ""), np.float32)
    rows = lambda *at: jax.tree.map(lambda x: x[np.array(at)], text)
    return calibration.Batch(rows(0, 1), rows(2), (5, 7), 0)


@pytest.fixture(scope="module")
def observed(teacher, batch):
    return calibration.observe_rollouts(teacher, batch)


# --- importance -------------------------------------------------------------------------------------------------------


def direct(states, masks):
    """Equation 1 by loops over blocks, samples and tokens."""
    blocks, rows = len(states) - 1, len(masks)
    out = np.zeros((blocks, rows))
    for k in range(blocks):
        for row in range(rows):
            pairs = [(states[k][row][n], states[k + 1][row][n]) for n in np.flatnonzero(masks[row])]
            cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs]
            out[k, row] = 1 - np.mean(cosines)
    return out


@pytest.mark.parametrize("case", ["mmdit_history", "teacher_context_embedder"])
def test_importance_of_golden_block_states(case):
    with SafetensorsFile(GOLDEN / f"{case}.safetensors") as file:
        read = lambda stream: [
            file.read(name).astype(np.float64) for k in range(99) if (name := f"out.block{k}.{stream}") in file.keys()
        ]
        image, text, mask = read("image"), read("text"), file.read("in.encoder_attention_mask") > 0
    # The golden states are those behind blocks: of the first, its input is missing.
    assert len(image) == len(text) + 1 >= 3
    everything = np.ones(image[0].shape[:2], bool)
    stack = lambda states: jnp.asarray(np.stack(states), jnp.float32)
    got = bi.block_influence(BlockStates(stack(image), stack(text)), jnp.asarray(everything), jnp.asarray(mask))
    np.testing.assert_allclose(got[0], direct(image, everything), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got[1], direct(text, mask), rtol=1e-4, atol=1e-6)
    assert got[0].dtype == jnp.float32 and float(got[0].min()) > 1e-4


def test_tokens_that_are_padding_do_not_count():
    rng = np.random.default_rng(0)
    image, text = rng.standard_normal((3, 2, 5, 4)), rng.standard_normal((2, 2, 3, 4))
    image_mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
    text_mask = np.array([[1, 1, 0], [0, 0, 0]], bool)
    states = BlockStates(jnp.asarray(image, jnp.float32), jnp.asarray(text, jnp.float32))
    got = bi.block_influence(states, jnp.asarray(image_mask), jnp.asarray(text_mask))
    np.testing.assert_allclose(got[0], direct(image, image_mask), rtol=1e-5)
    np.testing.assert_allclose(got[1][:, :1], direct(text[:, :1], text_mask[:1]), rtol=1e-5)
    assert got[1][0, 1] == 0


def test_observing_a_rollout_changes_nothing(teacher, batch, observed):
    noise = draw_noise(batch.keys()[0], teacher.config, teacher.model.config.in_channels)
    latents = rollout(teacher.model, teacher.params, teacher.config, batch.text, noise, batch.negative)
    np.testing.assert_allclose(observed[1], latents, rtol=0, atol=2e-5 * float(jnp.abs(latents).max()))
    calls = calibration.rollout_calls(teacher.config)
    assert observed[0]["image"].shape == (2, len(calls), BLOCKS)
    assert observed[0]["text"].shape == (2, len(calls), BLOCKS - 1)
    assert len(calls) == teacher.config.function_evaluations
    # The idle block leaves both streams as they are.
    assert np.abs(observed[0]["image"][..., IDLE]).max() < 1e-5 < 1e-3 < observed[0]["image"][..., IDLE - 1].min()
    assert np.abs(observed[0]["text"][..., IDLE]).max() < 1e-5


@pytest.mark.parametrize(("unit", "branch"), [(0, "prompt"), (1, "negative"), (2, "prompt")])
def test_what_is_observed_is_the_call_itself(teacher, batch, observed, unit, branch):
    """The first step of a unit without any padding, whose input is noise and the frames before."""
    noise = draw_noise(batch.keys()[0], teacher.config, teacher.model.config.in_channels)
    latents = np.asarray(observed[1])[1:]
    history = history_clips(pyramid_noise.latent_pyramid(latents[:, :unit], 3), history_plan(unit, 0)) if unit else []
    clips = [*history, pyramid_noise.noise_pyramid(noise.initial[1:, unit : unit + 1], 3)[0]]
    text = batch.negative if branch == "negative" else jax.tree.map(lambda x: x[1:], batch.text)
    layout = token_layout(teacher.model.config, [clip.shape[1:4] for clip in clips], text.mask.shape[1])
    timestep = teacher.config.schedule.inference_steps(0, 1).timesteps[:1].astype(np.float32)
    run = jax.jit(lambda p, *given: teacher.model.apply({"params": p}, *given, return_block_states=True).states)
    states = run(
        teacher.params, layout.pack(clips), text.context, text.pooled, timestep, layout.geometry(np.asarray(text.mask))
    )
    image = direct(np.asarray(states.image, np.float64), np.ones((1, layout.image_length), bool))
    call = calibration.rollout_calls(teacher.config).index(calibration.Call(unit, 0, 0, branch))
    np.testing.assert_allclose(observed[0]["image"][1, call], image[:, 0], rtol=0, atol=1e-4)
    real = np.asarray(text.mask) > 0
    text_influence = direct(np.asarray(states.text, np.float64), real)
    np.testing.assert_allclose(observed[0]["text"][1, call], text_influence[:, 0], rtol=0, atol=1e-4)


# --- one block left out -----------------------------------------------------------------------------------------------


def test_an_idle_block_is_not_missed(teacher, batch, observed):
    probe = calibration.Probe(teacher, batch, observed[1], 1)
    before = probe_velocity._cache_size()
    errors = np.stack([probe.error_without((k,)) for k in teacher.removable], axis=-1)
    # A program for each stage, whatever block is left out.
    assert probe_velocity._cache_size() - before == 3
    assert errors.shape == (2, 3, BLOCKS - 1)
    assert errors[..., IDLE].max() < 1e-8 < 1e-3 < np.delete(errors, IDLE, axis=-1).min()
    np.testing.assert_allclose(probe.error_without((0, IDLE)), errors[..., 0], rtol=1e-3)


def test_a_rollout_without_a_block_is_that_of_the_smaller_network(teacher, batch, observed):
    before = stage_program()._cache_size()
    errors = calibration.rollout_errors(teacher, batch, observed[1])
    assert stage_program()._cache_size() - before == 6
    assert errors.shape == (2, BLOCKS - 1) and errors[:, IDLE].max() < 1e-6 < errors[:, 0].min()
    model, params = without_blocks(teacher.model, teacher.params, (2,))
    assert model.config.num_layers == BLOCKS - 1
    noise = draw_noise(batch.keys()[0], teacher.config, model.config.in_channels)
    got = np.asarray(rollout(model, params, teacher.config, batch.text, noise, batch.negative), np.float64)
    whole = np.asarray(observed[1], np.float64)
    axes = (1, 2, 3, 4)
    np.testing.assert_allclose(errors[:, 2], ((got - whole) ** 2).sum(axes) / (whole**2).sum(axes), rtol=1e-3)
    again = final_latent_error(
        model, params, teacher.config, batch.text, noise, batch.negative, None, jnp.asarray(got, jnp.float32), ()
    )
    assert float(again.max()) < 1e-9


# --- rank correlation and strategies ----------------------------------------------------------------------------------

SCORES = st.lists(st.integers(0, 6), min_size=3, max_size=9)


@given(SCORES, st.randoms(use_true_random=False))
def test_spearman_is_pearson_of_mean_ranks(values, random):
    other = random.sample(values, len(values))
    scipy_like = lambda v: np.array([np.mean([i + 1 for i, w in enumerate(sorted(v)) if w == x]) for x in v])
    np.testing.assert_allclose(bi.ranks(np.array(values)), scipy_like(values))
    rho = bi.spearman(np.array(values), np.array(other))
    if len(set(values)) == 1:
        assert np.isnan(rho)
    else:
        assert rho == pytest.approx(np.corrcoef(scipy_like(values), scipy_like(other))[0, 1])
        assert bi.spearman(np.array(values), -np.array(values)) == pytest.approx(-1)


def test_the_interval_holds_what_prompts_disagree_about():
    rng = np.random.default_rng(0)
    shared = np.arange(12.0)
    sure = bi.correlation(shared + 0.1 * rng.standard_normal((20, 12)), shared + 0.1 * rng.standard_normal((20, 12)))
    assert sure.spearman > 0.95 and sure.low > 0.9 and sure.p_value < 0.01
    unsure = bi.correlation(rng.standard_normal((20, 12)), rng.standard_normal((20, 12)))
    assert unsure.low <= unsure.spearman <= unsure.high and unsure.high - unsure.low > 0.3
    assert unsure.p_value > 0.01
    low, high = bi.mean_interval(rng.standard_normal((400, 3)))
    np.testing.assert_allclose(high - low, 2 * 1.96 / 20, rtol=0.25)


@given(st.data())
def test_strategies_remove_the_least_and_never_the_last(data):
    blocks = data.draw(st.integers(2, 8))
    keep = data.draw(st.integers(1, blocks - 1))
    numbers = lambda size: np.array(data.draw(st.lists(st.integers(0, 9), min_size=size, max_size=size)), float)
    cost = numbers(blocks - 1)
    evidence = bi.Evidence(numbers(blocks), numbers(blocks - 1), lambda removed: float(cost[list(removed)].sum()))
    ranked = bi.ranks(evidence.image[:-1]) + bi.ranks(evidence.text)
    by = {"visual": evidence.image[:-1], "text": evidence.text, "rank_sum": ranked, "leave_one_out": cost}
    assert set(by) == set(bi.STRATEGIES) == set(prune_plan.STRATEGY_NAMES)
    for name, score in by.items():
        kept, why = bi.choose(name, evidence, keep)
        plan = PruningPlan(blocks, kept, name, why)
        assert len(kept) == keep and set(plan.removed) == set(why) and kept[-1] == blocks - 1
        assert max(score[list(why)]) <= min([score[k] for k in kept[:-1]], default=np.inf)


def test_greedy_choices_see_what_is_gone_already():
    # Either of 0 and 1 does for the other; 2 is worth more than one of them alone.
    errors = {(0,): 1.0, (1,): 1.1, (2,): 2.0, (0, 1): 9.0, (0, 2): 3.0}
    evidence = bi.Evidence(np.zeros(4), np.zeros(3), errors.__getitem__)
    kept, why = bi.choose("leave_one_out", evidence, 2)
    assert kept == (1, 3) and list(why) == [0, 2]
    assert why[2] == "left out with 0: velocity error 3, least of 2 candidates"


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_is_read_as_written_and_after_an_edit(tmp_path):
    path, plan = tmp_path / "plan.json", PruningPlan(4, (0, 3), "text", {1: "x", 2: "y"}, {"text": [1.5, 0.1, 0.2]})
    write_plan(path, plan)
    assert read_plan(path) == plan and json.loads(path.read_text())["removed"][0] == {"block": 1, "why": "x"}
    path.write_text(path.read_text().replace('"kept": [0, 3]', '"kept": [1, 3]'))
    edited = read_plan(path)
    assert edited.removed == (0, 2) and edited.why == {2: "y"}
    write_plan(path, edited)
    assert json.loads(path.read_text())["removed"][0] == {"block": 0, "why": BY_HAND}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": [0, 1, 2]}, r"plan\.json: kept lacks the last block 3: it has no text output"),
        ({"kept": []}, "kept lacks the last block 3"),
        ({"kept": [1, 0, 3]}, "kept has 0 after 1: give every block once"),
        ({"kept": [1, 1, 3]}, "kept has 1 after 1"),
        ({"kept": [0, 4]}, "kept names block 4: the 4 blocks are numbered 0 to 3"),
        ({"kept": [True, 3]}, "kept names block True"),
        ({"kept": "0, 3"}, "kept is '0, 3'; give a list"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"version": 2}, "not a pruning plan of version 1"),
        ({"removed": [1]}, r"removed is \[1\]"),
    ],
)
def test_bad_plans_are_named(tmp_path, change, message):
    path = tmp_path / "plan.json"
    write_plan(path, PruningPlan(4, (0, 3)))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_plan(path)


# --- the command ------------------------------------------------------------------------------------------------------


def run(root, output, *more, keep=2):
    command = ["--model", root / "model", "--prompts", root / "prompts.txt", "--output", output, "--keep", keep]
    sizes = ["--samples", 1, "--batch", 2, "--probes", 4, "--draws", 1]
    return prune_plan.main([str(part) for part in (*command, *sizes, *more)])


@pytest.fixture(scope="module")
def planned(root):
    assert run(root, root / "plan") == 0
    return root / "plan"


def test_a_plan_with_its_scores_and_report(planned):
    plan = read_plan(planned / "plan.json")
    assert plan.num_layers == BLOCKS and len(plan.kept) == 2 and IDLE in plan.removed and plan.kept[-1] == BLOCKS - 1
    assert {name: len(values) for name, values in plan.scores.items()} == {
        "image": BLOCKS,
        "text": BLOCKS - 1,
        "velocity_error": BLOCKS - 1,
        "final_latent_error": BLOCKS - 1,
    }
    assert all(np.argmin(values) == IDLE for values in plan.scores.values())
    summary = json.loads((planned / "importance.json").read_text())
    assert [(s["units"], s["stage"], s["step"]) for s in summary["steps"]] == [
        (units, stage, 0) for units in ("first", "later") for stage in range(3)
    ]
    assert set(summary["branches"]) == {"negative", "prompt"} and summary["probes"] == 3
    means = np.mean([branch["image"] for branch in summary["branches"].values()], axis=0)
    np.testing.assert_allclose(means, plan.scores["image"], rtol=1e-6, atol=1e-9)
    for name in ("image", "text"):
        low, mean, high = (np.array(summary[name][key]) for key in ("low", "mean", "high"))
        assert (low <= mean).all() and (mean <= high).all()
    page = (planned / "report.html").read_text()
    assert "Do visual and text importance agree?" in page and plan.why[IDLE] in page


def test_devices_change_nothing(teacher, batch, planned):
    """The command splits a batch over two devices; here is one."""
    one, _ = calibration.observe_rollouts(teacher, dataclasses.replace(batch, ids=(0, 1)))
    with SafetensorsFile(planned / "parts" / "batch-00000-of-00002.safetensors") as file:
        for name, expected in one.items():
            np.testing.assert_allclose(file.read(name), expected, rtol=0, atol=1e-4)


def test_processes_and_an_interruption_give_the_same_plan(root, planned, tmp_path, capsys, monkeypatch):
    output = tmp_path / "shared"
    assert run(root, output, "--num-processes", 2, "--process-id", 1) == 0
    assert "1 of 2 batches are left to other processes" in capsys.readouterr().out
    assert not (output / "plan.json").exists()

    def interrupted(self, batch, latents):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # Before the choice of the second block.
        patched.setattr(prune_plan.Measuring, "probe", interrupted)
        patched.setattr(prune_plan, "measure_missing", lambda args, folder, work, bar: 0)
        shutil.copy(planned / "parts" / "batch-00000-of-00002.safetensors", output / "parts")
        with pytest.raises(KeyboardInterrupt):
            run(root, output)
    assert not (output / "plan.json").exists()
    assert run(root, output) == 0
    assert (output / "plan.json").read_bytes() == (planned / "plan.json").read_bytes()
    one, other = (json.loads((folder / "importance.json").read_text()) for folder in (planned, output))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_another_choice_measures_nothing_again(root, planned, tmp_path, capsys, monkeypatch):
    output = tmp_path / "again"
    shutil.copytree(planned, output)
    monkeypatch.delattr(prune_plan, "Measuring")
    for strategy in ("visual", "text", "rank_sum", "leave_one_out"):
        assert run(root, output, "--strategy", strategy, keep=3) == 0
        plan = read_plan(output / "plan.json")
        assert plan.strategy == strategy and plan.removed == (IDLE,)
    assert "nothing to measure; visual and text importance correlate by" in capsys.readouterr().out


def test_what_the_command_refuses(root, planned, tmp_path):
    for keep in (0, BLOCKS):
        with pytest.raises(UserError, match=f"{keep} of 4 blocks to keep: use 1 to 3; the last block is always kept"):
            run(root, tmp_path / "out", keep=keep)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="measured with seed 0, not 1; choose another --output"):
        run(root, planned, "--seed", 1)
    damaged = tmp_path / "damaged"
    shutil.copytree(planned, damaged)
    part = damaged / "parts" / "batch-00001-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"00001-of-00002\.safetensors: damaged .*delete it"):
        run(root, damaged)
