"""From a training workdir to a model folder: what is exported is what was trained, and PyTorch computes the same."""

import jax
import numpy as np
import pytest

from converters import export_torch, import_torch
from converters.numerics import snr_db
from converters.torch_reference import text_encoder_context
from experiments import train
from nd_jax.errors import UserError
from nd_jax.models import context_adapter, t5
from nd_jax.train.deployed import load_deployed
from nd_jax.weights.folder import load_component
from tests.text_encoder_case import CONFIG, arguments, write_prompts


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two steps in mode LoRA, whose export merges the updates."""
    folder = tmp_path_factory.mktemp("deploy")
    prompts = write_prompts(folder / "prompts.txt")
    changes = {"num_steps": 2, "checkpoint.every": 1, "eval_every": 2, "loss.mode": "LoRA", "loss.lora_rank": 2}
    overrides = arguments(**{"data.prompts": str(prompts), "optimizer.learning_rate": 0.1} | changes)
    assert train.main(["--config", CONFIG, "--workdir", str(folder / "run"), *overrides]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def model(workdir):
    folder = workdir.parent / "model"
    assert export_torch.main(["--checkpoint", str(workdir), "--output", str(folder)]) == 0
    return folder


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_folder_holds_the_last_checkpoint_bit_by_bit(workdir, model):
    deployed = load_deployed(workdir)
    assert deployed.step == 2 and set(deployed.components) == {"text_encoder_3", "context_adapter"}
    for name, component in deployed.components.items():
        read = load_component(model / name)
        assert read.config == component.config
        assert_same(read.params, component.params)
    assert (model / "tokenizer_3" / "spiece.model").exists()
    first = load_deployed(workdir, step=1).components["context_adapter"].params
    assert not np.array_equal(first["out"]["kernel"], deployed.components["context_adapter"].params["out"]["kernel"])


def test_a_store_of_the_folder_exports_the_same_bytes(model, tmp_path):
    assert import_torch.main(["--source", str(model), "--output", str(tmp_path / "store")]) == 0
    assert export_torch.main(["--checkpoint", str(tmp_path / "store"), "--output", str(tmp_path / "again")]) == 0
    for path in model.rglob("*.safetensors"):
        assert (tmp_path / "again" / path.relative_to(model)).read_bytes() == path.read_bytes()


def test_pytorch_computes_the_same_context(workdir, model):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 60, (2, 24)).astype(np.int32)
    mask = (np.arange(24)[None] < [[24], [9]]).astype(np.int32)
    parts = load_deployed(workdir).components
    encoder = t5.DistilT5(parts["text_encoder_3"].config)
    hidden = jax.jit(encoder.apply)({"params": parts["text_encoder_3"].params}, ids, mask)
    adapter = context_adapter.ContextAdapter(parts["context_adapter"].config)
    context = jax.jit(adapter.apply)({"params": parts["context_adapter"].params}, hidden)
    assert snr_db(np.asarray(context), text_encoder_context(model, ids, mask)) > 110


def test_missing_checkpoints_are_named(workdir, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint of step 7: the steps are \[1, 2\]"):
        load_deployed(workdir, step=7)
    with pytest.raises(UserError, match="has no checkpoint"):
        load_deployed(tmp_path)
