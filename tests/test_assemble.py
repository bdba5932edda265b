"""Model folders out of several: the transformer loses its context embedder behind an adapter, and blocks by a plan."""

import json

import jax
import numpy as np
import pytest

from experiments import assemble, evaluate, random_model
from nd_jax.distill.pruning_plan import PruningPlan, write_plan
from nd_jax.errors import UserError
from nd_jax.generate.model_folder import open_model
from nd_jax.weights.folder import load_component
from nd_jax.weights.mmdit import PYRAMID_FLOW_MMDIT, PYRAMID_MMDIT
from nd_jax.weights.vae import ASYMMETRIC_VIDEO_VAE, CAUSAL_VIDEO_VAE


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random teacher of Pyramid-Flow's kind, a random student of Neodragon's, and what was assembled of them."""
    root = tmp_path_factory.mktemp("assemble")
    random_model.write_random_model(root / "teacher", "tiny-teacher", dtype="float32")
    random_model.write_random_model(root / "student", "tiny", dtype="float32")
    given = ["--model", root / "teacher", "--text", root / "student", "--output", root / "text"]
    assert assemble.main(list(map(str, given))) == 0
    return root


def same(one, other):
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_an_adapter_takes_the_place_of_the_context_embedder(folders):
    before = load_component(folders / "teacher" / "diffusion_transformer_384p")
    after = load_component(folders / "text" / "diffusion_transformer_320p")
    assert (before.network, after.network) == (PYRAMID_FLOW_MMDIT, PYRAMID_MMDIT)
    kept = {name: tree for name, tree in before.params.items() if name != "context_embedder"}
    assert same(kept, after.params) and not after.config.context_embedder
    for name, source in (("text_encoder_3", "student"), ("context_adapter", "student"), ("text_encoder", "teacher")):
        assert same(load_component(folders / "text" / name).params, load_component(folders / source / name).params)
    # DT5 alone would mean mode hybrid; the folder goes on making all frames.
    model = open_model(folders / "text")
    assert (model.mode, model.settings.guidance) == ("monolithic", (3, 2))
    report = json.loads((folders / "text" / "assemble.json").read_text())
    assert report["sources"]["tokenizer_3"] == str(folders / "student" / "tokenizer_3")
    assert report["sources"]["tokenizer"] == str(folders / "teacher" / "tokenizer")
    embedder = jax.tree.leaves(before.params["context_embedder"])
    counted = [assemble.count_parameters(folders / name) for name in ("teacher", "text")]
    t5 = load_component(folders / "teacher" / "text_encoder_3").params
    assert counted[0]["context"] == sum(x.size for x in [*jax.tree.leaves(t5), *embedder])
    assert counted[0]["transformer"] == counted[1]["transformer"] == sum(x.size for x in jax.tree.leaves(kept))
    assert report["parameters"] == counted[1]
    assert counted[1]["total"] == sum(counted[1][name] for name in ("context", "pooled", "transformer", "decoder"))


def test_decoder_plan_and_steps(folders):
    write_plan(folders / "plan.json", PruningPlan(2, (1,)))
    given = ["--model", folders / "text", "--decoder", folders / "student", "--plan", folders / "plan.json"]
    given += ["--steps", "1,1,1", "--guidance", "1,1", "--output", folders / "small"]
    assert assemble.main(list(map(str, given))) == 0
    model = open_model(folders / "small")
    assert model.transformer.num_layers == 1 and model.vae_network is ASYMMETRIC_VIDEO_VAE
    assert open_model(folders / "text").vae_network is CAUSAL_VIDEO_VAE  # Left as it was.
    sampler = model.sampler()
    assert sampler.function_evaluations == 6 and not sampler.needs_negative
    whole, cut = (load_component(folders / name / "diffusion_transformer_320p").params for name in ("text", "small"))
    assert same(whole["last_block"], cut["last_block"]) and "blocks" not in cut
    # The same again replaces the folder; its transformer goes into another one.
    assert assemble.main(list(map(str, given))) == 0
    report = assemble.assemble(folders / "text", folders / "other", transformer=folders / "small", mode="hybrid")
    assert report["generation"]["mode"] == "hybrid" and open_model(folders / "other").transformer.num_layers == 1


def test_what_does_not_fit_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match="has no context_adapter; give what"):
        assemble.assemble(folders / "teacher", tmp_path / "out", text=folders / "teacher")
    with pytest.raises(UserError, match="channels"):  # T5's context for a transformer without an embedder.
        assemble.assemble(folders / "teacher", tmp_path / "out", transformer=_wider(folders, tmp_path))
    write_plan(tmp_path / "plan.json", PruningPlan(3, (0, 2)))
    with pytest.raises(UserError, match=r"plans for 3 blocks and .* has 2"):
        assemble.assemble(folders / "text", tmp_path / "out", plan=tmp_path / "plan.json")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"exists and is not a folder with assemble\.json"):
        assemble.assemble(folders / "text", tmp_path / "mine")
    assert not (tmp_path / "out").exists()


def _wider(folders, tmp_path):
    """A copy of the student's transformer that says it takes other pooled text."""
    source, target = folders / "student" / "diffusion_transformer_320p", tmp_path / "diffusion_transformer_320p"
    target.mkdir()
    config = json.loads((source / "config.json").read_text()) | {"pooled_projection_dim": 24}
    (target / "config.json").write_text(json.dumps(config))
    (target / "diffusion_pytorch_model.safetensors").write_bytes(
        (source / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    return target


def test_the_world_draws_first_frames_for_mode_hybrid(folders, tmp_path):
    """An assembled folder makes clips; with a given first frame it needs the later latent frames alone."""
    given = ["toy-world", "--model", str(folders / "text"), "--mode", "hybrid", "--clips", "2", "--batch", "2"]
    assert evaluate.main([*given, "--steps", "1,1,1", "--guidance", "1,1", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "toy_world.json").read_text())
    assert result["mode"] == "hybrid" and result["function_evaluations"] == 3
    assert set(result["seconds"]) == {"text", "encoder", "transformer", "decoder"}
