"""Component folders: tied keys, shards, buffers, dtypes, and folders that do not fit."""

import dataclasses
import errno
import json
import os

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nd_jax.errors import UserError
from nd_jax.models import context_adapter, t5
from nd_jax.weights import folder as folders
from nd_jax.weights import networks, safetensors_io
from nd_jax.weights.folder import component_hash, load_component, read_config, save_component
from nd_jax.weights.table import expand, flatten

CONFIG = t5.T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=12, num_layers=3, num_heads=2)
TIED = ("shared.weight", "encoder.embed_tokens.weight")


def random_params(network, config, dtype=np.float32):
    rng = np.random.default_rng(0)
    abstract = networks.abstract_params(network, config)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(dtype), abstract)


def same(left, right):
    left, right = flatten(left), flatten(right)
    assert set(left) == set(right)
    for path, leaf in left.items():
        assert (leaf.dtype, leaf.shape) == (right[path].dtype, right[path].shape), path
        assert np.asarray(leaf).tobytes() == np.asarray(right[path]).tobytes(), path


@pytest.fixture
def saved(tmp_path):
    """(folder, parameters) of a tiny T5 encoder."""
    params = random_params(networks.T5_ENCODER, CONFIG)
    save_component(tmp_path / "t5", networks.T5_ENCODER, CONFIG, params)
    return tmp_path / "t5", params


def rewrite(folder, edit, name="model.safetensors"):
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name, {"format": "pt"})


def test_shapes_are_traced_once_and_are_the_callers_own():
    traced = []
    inputs = lambda config: traced.append(config) or networks.T5_ENCODER.inputs(config)
    network = dataclasses.replace(networks.T5_ENCODER, inputs=inputs)
    first = networks.abstract_params(network, CONFIG)
    del first["blocks"]
    assert "blocks" in networks.abstract_params(network, CONFIG, np.float32) and traced == [CONFIG]
    half = networks.abstract_params(network, CONFIG, ml_dtypes.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {np.dtype(ml_dtypes.bfloat16)}


def test_round_trip_is_bit_identical_and_runs_of_rows_do_not_matter(saved, monkeypatch):
    folder, params = saved
    component = load_component(folder)
    assert component.network is networks.T5_ENCODER and component.config == CONFIG
    same(component.params, params)
    for run_bytes in (1, 100):
        monkeypatch.setattr(folders, "row_runs", lambda s, i, r=run_bytes: safetensors_io.row_runs(s, i, r))
        same(load_component(folder).params, params)
    tensors = load_file(folder / "model.safetensors")
    assert set(TIED) <= set(tensors)
    kernel = params["blocks"]["mlp"]["gate"]["kernel"]
    assert np.array_equal(tensors["encoder.block.2.layer.1.DenseReluDense.wi_0.weight"], kernel[2].T)


def test_parameters_are_where_jax_does_not_copy_them(saved):
    leaves = jax.tree.leaves(load_component(saved[0]).params)
    assert all(leaf.ctypes.data % folders.ALIGNMENT == 0 for leaf in leaves)
    addresses = [jax.device_put(leaf).unsafe_buffer_pointer() for leaf in leaves]
    assert addresses == [leaf.ctypes.data for leaf in leaves]


def test_dtypes(saved, tmp_path):
    folder, params = saved
    half = load_component(folder, dtype=ml_dtypes.bfloat16)
    same(half.params, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params))
    save_component(tmp_path / "half", networks.T5_ENCODER, CONFIG, params, dtype="bfloat16")
    same(load_component(tmp_path / "half").params, half.params)
    key = "encoder.block.1.layer.0.layer_norm.weight"
    rewrite(folder, lambda t: t.update({key: t[key].astype(np.float64)}))
    assert load_component(folder).params["blocks"]["attention_norm"]["scale"].dtype == np.float64


def test_a_value_that_overflows_the_dtype_is_named(tmp_path):
    params = random_params(networks.T5_ENCODER, CONFIG)
    params["final_norm"]["scale"][3] = 1e5
    with pytest.raises(UserError, match=r"encoder\.final_layer_norm\.weight: its largest value 100000"):
        save_component(tmp_path / "x", networks.T5_ENCODER, CONFIG, params, dtype="float16")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("absent", TIED)
def test_one_tied_key_is_enough(saved, absent):
    folder, params = saved
    rewrite(folder, lambda t: t.pop(absent))
    same(load_component(folder).params, params)


def test_tied_keys_that_differ_are_refused(saved):
    folder, _ = saved
    rewrite(folder, lambda t: t.update({TIED[1]: t[TIED[1]] + 1}))
    with pytest.raises(UserError, match="one tied weight but hold different values"):
        load_component(folder)


def test_one_error_lists_everything_that_does_not_fit(saved):
    folder, _ = saved

    def edit(tensors):
        for key in TIED:
            del tensors[key]
        del tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
        tensors["encoder.final_layer_norm.weight"] = np.zeros(9, np.float32)
        tensors["encoder.block.0.layer.0.layer_norm.weight"] = np.zeros(8, np.int32)
        tensors.update({f"stray.{i}": np.zeros(1, np.float32) for i in range(30)})

    rewrite(folder, edit)
    with pytest.raises(UserError) as error:
        load_component(folder)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message
    assert f"2 missing: {TIED[0]} or {TIED[1]}, encoder.block.1.layer.0.SelfAttention.q.weight" in message
    assert "30 extra: stray.0" in message and "and 20 more" in message
    assert "1 misshapen: encoder.final_layer_norm.weight [9] instead of [8]" in message
    assert "1 not floating-point: encoder.block.0.layer.0.layer_norm.weight int32" in message


def test_known_buffers_and_a_partial_network_ignore_other_tensors(tmp_path):
    config = networks.CLIP_TEXT.read_config(
        dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    save_component(tmp_path / "clip", networks.CLIP_TEXT, config, random_params(networks.CLIP_TEXT, config))
    ids = {"text_model.embeddings.position_ids": np.arange(77)[None]}
    rewrite(tmp_path / "clip", lambda t: t.update(ids))
    component = load_component(tmp_path / "clip")
    assert np.array_equal(component.origin.buffers["text_model.embeddings.position_ids"], np.arange(77)[None])

    embedder = context_adapter.ContextEmbedderConfig(6, 4)
    params = random_params(networks.CONTEXT_EMBEDDER, embedder)
    save_component(tmp_path / "mmdit", networks.CONTEXT_EMBEDDER, embedder, params)
    rewrite(
        tmp_path / "mmdit",
        lambda t: t.update({"proj_out.bias": np.zeros(3, np.float32)}),
        "diffusion_pytorch_model.safetensors",
    )
    component = load_component(tmp_path / "mmdit", networks.CONTEXT_EMBEDDER)
    same(component.params, params)
    assert not component.origin.headers


def shard(folder, names=("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {key: names[i % 2] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({k: v for k, v in tensors.items() if weight_map[k] == name}, folder / name, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_shards(saved):
    folder, params = saved
    index = shard(folder)
    same(load_component(folder).params, params)
    text = index.read_text()
    index.write_text(text.replace("model-00002", "model-00003"))
    with pytest.raises(UserError, match="1 of 2 shards are absent: model-00003-of-00002"):
        load_component(folder)
    weight_map = json.loads(text)["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "ghost": weight_map[TIED[0]]}}))
    with pytest.raises(UserError, match="1 tensors are not in the shard it names: ghost"):
        load_component(folder)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "a\\b", "", 3, ["x"]])
def test_an_index_that_leaves_the_folder_is_refused(saved, name):
    folder, _ = saved
    index = shard(folder)
    index.write_text(json.dumps({"weight_map": {TIED[0]: name}}))
    with pytest.raises(UserError, match="which is not a file of its own folder; refused"):
        load_component(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no such file"),
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ('{"architectures": ["BertModel"]}', "class 'BertModel' is not supported"),
        ('{"architectures": ["T5EncoderModel"]}', "only T5 v1.1 encoders"),
        ('{"_class_name": "ContextAdapter", "skips": [true]}', "one skip per hidden layer"),
        ('{"_class_name": "ContextAdapter", "layer_depths": 3}', "not a config of context_adapter"),
    ],
)
def test_bad_configs_are_named(tmp_path, text, says):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        read_config(tmp_path)
    assert says in str(error.value)


def test_a_folder_without_or_with_two_weights_files(saved):
    folder, _ = saved
    (folder / "model.fp16.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    load_component(folder)  # A copy in another precision stays aside.
    (folder / "other.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="holds 2 weights files"):
        load_component(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match=r"holds no \.safetensors weights"):
        load_component(folder)


def test_replacing_keeps_the_old_folder_until_the_new_one_is_complete(saved, monkeypatch):
    folder, params = saved
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    twice = jax.tree.map(lambda leaf: leaf * 2, params)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_io, "_write_all", full)
        with pytest.raises(UserError, match="the disk is full"):
            save_component(folder, networks.T5_ENCODER, CONFIG, twice)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(folder.parent) == [folder.name]
    save_component(folder, networks.T5_ENCODER, CONFIG, twice)
    same(load_component(folder).params, twice)
    # A process that ended between the two renames leaves the old folder aside; the next save puts it back first.
    folder.rename(folder.with_name(f".{folder.name}.old"))
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_io, "_write_all", full)
        with pytest.raises(UserError, match="the disk is full"):
            save_component(folder, networks.T5_ENCODER, CONFIG, params)
    same(load_component(folder).params, twice)


def test_a_folder_of_something_else_is_not_replaced(saved, tmp_path):
    _, params = saved
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match="exists and is not a folder with config"):
        save_component(tmp_path / "photos", networks.T5_ENCODER, CONFIG, params)
    assert (tmp_path / "photos" / "a.jpg").exists()


def test_parameters_of_another_config_are_refused(saved, tmp_path):
    _, params = saved
    params["final_norm"]["scale"] = np.zeros(9, np.float32)
    with pytest.raises(ValueError, match="final_norm/scale"):
        save_component(tmp_path / "x", networks.T5_ENCODER, CONFIG, params)


def test_the_hash_follows_weights_and_config(saved):
    folder, _ = saved
    first = component_hash(folder)
    (folder / "README.md").write_text("not part of it")
    assert component_hash(folder) == first
    rewrite(folder, lambda t: t["encoder.final_layer_norm.weight"].__setitem__(0, 7.0))
    second = component_hash(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    assert len({first, second, component_hash(folder)}) == 3


def test_every_network_round_trips(tmp_path):
    adapter = context_adapter.ContextAdapterConfig(5, 3, (4, 6), (False, True), use_biases=False)
    dt5 = t5.DistilT5Config(CONFIG, 10)
    for network, config in ((networks.CONTEXT_ADAPTER, adapter), (networks.DISTIL_T5, dt5)):
        params = random_params(network, config)
        save_component(tmp_path / network.name, network, config, params, extra_config={"note": "x"})
        component = load_component(tmp_path / network.name)
        assert component.config == config
        same(component.params, params)
        assert json.loads((tmp_path / network.name / "config.json").read_text())["note"] == "x"
        keys = {key for t in expand(network.table(config), networks.flat_shapes(network, config)) for key in t.keys}
        assert set(load_file(tmp_path / network.name / network.weights_file)) == keys
