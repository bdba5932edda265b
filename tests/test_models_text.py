"""Text encoders against transformers."""

import json

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers.models.t5.modeling_t5 import T5Attention

from nd_jax.models import clip_text, t5
from nd_jax.weights import networks
from nd_jax.weights.folder import save_component
from nd_jax.weights.safetensors_io import SafetensorsFile
from nd_jax.weights.table import to_ours

TINY_T5 = t5.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_buckets_agree_beyond_512_positions():
    length = 640
    distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    theirs = T5Attention._relative_position_bucket(distance, bidirectional=True, num_buckets=32, max_distance=128)
    assert np.array_equal(t5.relative_position_buckets(length, 32, 128), theirs.numpy())


def test_exported_dt5_loads_into_transformers_and_agrees(tmp_path):
    """The folder's encoder keys are T5EncoderModel's behind `encoder.`; hidden states agree, padding included."""
    config = t5.DistilT5Config(TINY_T5, projection_dim=20)
    ids = np.random.default_rng(0).integers(2, 40, (2, 10), dtype=np.int32)
    mask = np.array([[1] * 10, [1] * 6 + [0] * 4], np.int32)
    params = jax.jit(t5.DistilT5(config).init)(jax.random.key(0), ids, mask)["params"]
    save_component(tmp_path / "text_encoder_3", networks.DISTIL_T5, config, params)

    raw = json.loads((tmp_path / "text_encoder_3" / "config.json").read_text())
    model = transformers.T5EncoderModel(transformers.T5Config(**raw)).eval()
    with SafetensorsFile(tmp_path / "text_encoder_3" / "model.safetensors") as file:
        state = {key: torch.from_numpy(file.read(key)) for key in file.keys()}
    projection = [state.pop(f"final_projection.{i}.weight") for i in (0, 3)]
    model.load_state_dict({key.removeprefix("encoder."): tensor for key, tensor in state.items()}, strict=True)

    with torch.no_grad():
        hidden = model(torch.from_numpy(ids).long(), torch.from_numpy(mask)).last_hidden_state
        projected = torch.relu(hidden @ projection[0].T) @ projection[1].T
    ours = jax.jit(lambda p: t5.T5Encoder(TINY_T5).apply({"params": p["encoder"]}, ids, mask).hidden)(params)
    np.testing.assert_allclose(ours, hidden.numpy(), rtol=0, atol=2e-5 * float(hidden.abs().max()))
    ours = jax.jit(t5.DistilT5(config).apply)({"params": params}, ids, mask)
    np.testing.assert_allclose(ours, projected.numpy(), rtol=0, atol=2e-5 * float(projected.abs().max()))


@pytest.mark.parametrize(("eos", "act"), [(2, "quick_gelu"), (37, "gelu")])
def test_clip_agrees(eos, act):
    """With eos_token_id 2 the pooled position is that of the largest id, otherwise of the first end token."""
    sizes = dict(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=9,
        projection_dim=12,
        hidden_act=act,
        eos_token_id=eos,
    )
    torch.manual_seed(0)
    model = transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(**sizes, bos_token_id=1, pad_token_id=0)
    ).eval()
    config = networks.CLIP_TEXT.read_config(sizes)
    ids = np.array([[1, 9, 2, 39, 37, 37, 5, 2, 0], [1, 37, 2, 5, 39, 8, 37, 0, 0]], np.int32)
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    params = to_ours(state, networks.CLIP_TEXT.table(config), networks.flat_shapes(networks.CLIP_TEXT, config))
    ours = jax.jit(clip_text.CLIPText(config).apply)({"params": params}, ids)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long(), output_hidden_states=True)
    for got, expected in (
        (ours.text_embeds, theirs.text_embeds),
        (ours.penultimate, theirs.hidden_states[-2]),
        (ours.last_hidden_state, theirs.last_hidden_state),
    ):
        np.testing.assert_allclose(got, expected.numpy(), rtol=0, atol=2e-5 * float(expected.abs().max()))
    positions = clip_text.eos_positions(ids, config)
    assert positions.tolist() == ([3, 4] if eos == 2 else [4, 1])
