"""Import into a store and export out of it: the same bytes, from safetensors, shards and PyTorch's own files."""

import json
import os
import pickle
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from converters import export_torch, import_torch
from converters.torch_files import TorchFile
from nd_jax.errors import UserError, run_command
from nd_jax.models import context_adapter, t5
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.train.deployed import Deployed
from nd_jax.weights import networks, store
from nd_jax.weights.folder import Component, load_component, save_component
from nd_jax.weights.sources import hash_files
from tests.test_folder import CONFIG, TIED, random_params, rewrite, same, shard

ADAPTER = context_adapter.ContextAdapterConfig(10, 4, (6, 6), (True, True))
DT5 = t5.DistilT5Config(CONFIG, 10)
MMDIT = MMDiTConfig(
    sample_size=8,
    in_channels=2,
    num_layers=3,
    attention_head_dim=4,
    num_attention_heads=2,
    joint_attention_dim=6,
    caption_projection_dim=8,
    pooled_projection_dim=4,
    pos_embed_max_size=4,
    context_embedder=True,
)
MMDIT_FILE = "diffusion_pytorch_model.safetensors"
POSITIONS = "pos_embed.pos_embed"


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def model(tmp_path):
    """A model folder of the released layout, its own spelling in every part of it."""
    root = tmp_path / "model"
    root.mkdir()
    save_component(root / "text_encoder", networks.T5_ENCODER, CONFIG, random_params(networks.T5_ENCODER, CONFIG))
    shard(root / "text_encoder")
    save_component(root / "text_encoder_3", networks.DISTIL_T5, DT5, random_params(networks.DISTIL_T5, DT5))
    rewrite(root / "text_encoder_3", lambda t: t.pop(f"encoder.{TIED[1]}"))
    half = random_params(networks.CONTEXT_ADAPTER, ADAPTER, ml_dtypes.bfloat16)
    half["hidden_0"]["bias"] = half["hidden_0"]["bias"].astype(np.float32)
    save_component(root / "context_adapter", networks.CONTEXT_ADAPTER, ADAPTER, half)
    (root / "context_adapter" / "config.json").write_text(
        json.dumps({"_diffusers_version": "0.36.0", **networks.CONTEXT_ADAPTER.write_config(ADAPTER)})
    )
    clip = networks.CLIP_TEXT.read_config(
        dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    save_component(root / "text_encoder_2", networks.CLIP_TEXT, clip, random_params(networks.CLIP_TEXT, clip))
    rewrite(root / "text_encoder_2", lambda t: t.update({"text_model.embeddings.position_ids": np.arange(77)[None]}))
    mmdit = root / "diffusion_transformer_384p"
    save_component(mmdit, networks.PYRAMID_FLOW_MMDIT, MMDIT, random_params(networks.PYRAMID_FLOW_MMDIT, MMDIT))
    # Another library's sines, different in the last digits.
    rewrite(mmdit, lambda t: t.update({POSITIONS: t[POSITIONS] * np.float32(1 + 1e-6)}), MMDIT_FILE)
    (root / "image_encoder").mkdir()
    (root / "image_encoder" / "config.json").write_text('{"architectures": ["CLIPVisionModelWithProjection"]}')
    (root / "tokenizer_3").mkdir()
    (root / "tokenizer_3" / "tokenizer.json").write_text("{}")
    return root


def test_a_model_folder_comes_back_byte_by_byte(model, tmp_path, capsys):
    assert import_torch.main(["--source", str(model), "--output", str(tmp_path / "store")]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("imported 5 components, ") and captured.out.count("\n") == 1
    assert "skipped image_encoder: class CLIPVisionModelWithProjection is not supported" in captured.err
    report = json.loads((tmp_path / "store" / "import.json").read_text())
    assert set(report["components"]) == {
        *("text_encoder", "text_encoder_2", "text_encoder_3", "context_adapter", "diffusion_transformer_384p")
    }
    assert report["skipped"] == {"image_encoder": "class CLIPVisionModelWithProjection is not supported"}
    assert report["copied"] == ["tokenizer_3"]
    assert report["components"]["context_adapter"]["dtypes"] == ["bfloat16", "float32"]

    assert export_torch.main(["--checkpoint", str(tmp_path / "store"), "--output", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("exported 5 components, ") and not captured.err
    exported = files(tmp_path / "out")
    assert json.loads(exported.pop("export.json"))["skipped"] == {}
    expected = {n: b for n, b in files(model).items() if not n.startswith("image_encoder")}
    assert exported == expected


def test_arrays_survive_export_and_import(model, tmp_path):
    import_torch.import_torch(model, tmp_path / "one")
    export_torch.export_torch(tmp_path / "one", tmp_path / "out")
    import_torch.import_torch(tmp_path / "out", tmp_path / "two")
    one, two = store.load_store(tmp_path / "one"), store.load_store(tmp_path / "two")
    assert set(one) == set(two)
    for name in two:
        assert one[name].config == two[name].config
        same(one[name].params, two[name].params)
        same(one[name].params, load_component(model / name).params)


def test_export_in_another_dtype(model, tmp_path):
    import_torch.import_torch(model, tmp_path / "store", component="text_encoder_3")
    export_torch.export_torch(tmp_path / "store", tmp_path / "out", dtype="bfloat16")
    tensors = load_file(tmp_path / "out" / "text_encoder_3" / "model.safetensors")
    assert {t.dtype.name for t in tensors.values()} == {"bfloat16"}
    assert {f"encoder.{key}" for key in TIED} <= set(tensors)


def test_a_training_run_is_exported_through_its_checkpoint(tmp_path, monkeypatch):
    """Only the call is checked here: reading checkpoints is the training package's own business."""
    params = jax.tree.map(jax.numpy.asarray, random_params(networks.CONTEXT_ADAPTER, ADAPTER))
    asked = []

    def load_deployed(workdir, step, ema):
        asked.append((workdir, step))
        return Deployed({"context_adapter": Component(networks.CONTEXT_ADAPTER, ADAPTER, params)}, {}, 7)

    monkeypatch.setattr(export_torch, "load_deployed", load_deployed)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    arguments = ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out"), "--step", "7"]
    assert export_torch.main(arguments) == 0
    assert asked == [(tmp_path / "run", 7)]
    same(load_component(tmp_path / "out" / "context_adapter").params, params)


def test_a_single_component_folder_and_a_single_file(model, tmp_path):
    import_torch.import_torch(model / "diffusion_transformer_384p", tmp_path / "a")
    assert list(store.read_store(tmp_path / "a")["components"]) == ["diffusion_transformer_384p"]
    weights = model / "text_encoder_3" / "model.safetensors"
    import_torch.import_torch(weights, tmp_path / "b", component="student")
    same(store.load_stored(tmp_path / "b", "student").params, load_component(model / "text_encoder_3").params)
    shutil.copy(weights, tmp_path / "dt5.safetensors")
    with pytest.raises(UserError, match="give --config FILE"):
        import_torch.import_torch(tmp_path / "dt5.safetensors", tmp_path / "c")
    report = import_torch.import_torch(
        tmp_path / "dt5.safetensors",
        tmp_path / "c",
        networks.DISTIL_T5,
        config=model / "text_encoder_3" / "config.json",
    )
    assert list(report["components"]) == ["dt5"]


def test_only_the_context_embedder_of_a_transformer(model, tmp_path, capsys):
    """Asked for, it is what the whole transformer has as a subtree; it cannot be exported as a released class."""
    source = model / "diffusion_transformer_384p"
    assert (
        import_torch.main([*f"--source {source} --output {tmp_path / 'a'}".split(), "--network", "context_embedder"])
        == 0
    )
    part, whole = store.load_stored(tmp_path / "a", "context_embedder"), load_component(source)
    assert part.config == context_adapter.ContextEmbedderConfig(6, 8)
    same(part.params, {"context_embedder": whole.params["context_embedder"]})
    capsys.readouterr()
    assert export_torch.main(["--checkpoint", str(tmp_path / "a"), "--output", str(tmp_path / "out")]) == 0
    assert "skipped context_embedder" in capsys.readouterr().err


def test_the_position_table_follows_from_the_config(model, tmp_path):
    """It is written without having been read, kept where another library rounded it, refused where it is another."""
    source = model / "diffusion_transformer_384p"
    tensors = load_file(source / MMDIT_FILE)
    assert tensors[POSITIONS].shape == (1, 16, 8)
    component = load_component(source)
    assert set(component.origin.buffers) == {POSITIONS}
    save_component(tmp_path / "fresh", component.network, component.config, component.params)
    fresh = load_file(tmp_path / "fresh" / MMDIT_FILE)
    assert set(fresh) == set(tensors)
    np.testing.assert_allclose(fresh[POSITIONS], tensors[POSITIONS], rtol=0, atol=2e-6)
    assert not load_component(tmp_path / "fresh").origin.buffers
    save_component(tmp_path / "half", component.network, component.config, component.params, dtype="bfloat16")
    assert load_file(tmp_path / "half" / MMDIT_FILE)[POSITIONS].dtype == ml_dtypes.bfloat16
    load_component(tmp_path / "half")

    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"sample_size": 16}))
    with pytest.raises(UserError, match=r"pos_embed differs by .* give the config.json of these weights"):
        load_component(source)
    (source / "config.json").write_text(json.dumps(config | {"pos_embed_max_size": 8}))
    with pytest.raises(UserError, match=r"pos_embed is \[1, 16, 8\] and config.json makes it \[1, 64, 8\]"):
        load_component(source)
    (source / "config.json").write_text(json.dumps(config | {"pos_embed_type": "rope"}))
    with pytest.raises(UserError, match="pos_embed_type is 'rope': only"):
        load_component(source)


def test_restoring_onto_devices(model, tmp_path):
    import_torch.import_torch(model / "context_adapter", tmp_path / "store")
    expected = store.load_stored(tmp_path / "store", "context_adapter").params
    mesh = jax.make_mesh((2,), ("fsdp",))
    split = lambda leaf: jax.sharding.NamedSharding(mesh, jax.P("fsdp" if leaf.ndim == 2 else None))
    shardings = jax.tree.map(split, expected)
    placed = store.load_stored(tmp_path / "store", "context_adapter", shardings).params
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == shardings
    same(placed, expected)


def torch_state(folder):
    tensors = load_file(folder / "model.safetensors")
    bits = lambda a: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return {k: bits(v) if v.dtype == ml_dtypes.bfloat16 else torch.from_numpy(v) for k, v in tensors.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{key}": tensor for key, tensor in state.items()}},
    ],
    ids=["plain", "state_dict", "model and module."],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(model, tmp_path, wrap, zipped):
    folder = model / "text_encoder_3"
    expected = load_component(folder, dtype="bfloat16").params
    save_component(folder, networks.DISTIL_T5, DT5, expected)
    state = torch_state(folder)
    (folder / "model.safetensors").unlink()
    torch.save(wrap(state), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    import_torch.import_torch(folder, tmp_path / "store")
    same(store.load_stored(tmp_path / "store", "text_encoder_3").params, expected)


def test_sharded_torch_files(model, tmp_path):
    folder = model / "text_encoder_3"
    expected = load_component(folder).params
    state = torch_state(folder)
    (folder / "model.safetensors").unlink()
    weight_map = {key: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, key in enumerate(state)}
    for name in set(weight_map.values()):
        torch.save({k: v for k, v in state.items() if weight_map[k] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    import_torch.import_torch(folder, tmp_path / "store")
    same(store.load_stored(tmp_path / "store", "text_encoder_3").params, expected)


class Code:
    def __reduce__(self):
        return (os.mkdir, ("this-folder-must-not-appear",))


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_a_pickle_with_code_is_refused_and_not_run(model, tmp_path, monkeypatch, capsys, save):
    monkeypatch.chdir(tmp_path)
    folder = model / "text_encoder_3"
    (folder / "model.safetensors").unlink()
    save({"weight": Code()}, folder / "pytorch_model.bin")
    assert run_command(lambda: import_torch.main(["--source", str(folder), "--output", str(tmp_path / "store")])) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "pytorch_model.bin: refused" in error and "mkdir" in error and "convert it to safetensors" in error
    assert not (tmp_path / "this-folder-must-not-appear").exists() and not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: path.write_bytes(b""), "truncated"),
        (lambda path: path.write_bytes(b"not a checkpoint at all"), "or no PyTorch file"),
        (lambda path: torch.save([torch.zeros(1)], path), "holds list, no state dict"),
        (lambda path: torch.save({"a": torch.zeros(1), "step": 3}, path), "no tensors (step)"),
        (lambda path: torch.save({"model": {}, "state_dict": {}}, path), "several state dicts"),
        (lambda path: torch.save({"a": torch.zeros(1).to_sparse()}, path), "only dense tensors"),
    ],
)
def test_bad_torch_files_are_named(tmp_path, make, says):
    path = tmp_path / "x.pt"
    make(path)
    with pytest.raises(UserError, match=r"x\.pt") as error:
        TorchFile(path)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_truncated_torch_file(tmp_path):
    torch.save({"a": torch.zeros(100)}, tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-200])
    with pytest.raises(UserError, match="truncated"):
        TorchFile(tmp_path / "x.pt")


def test_a_damaged_store_is_named(model, tmp_path):
    import_torch.import_torch(model / "context_adapter", tmp_path / "store")
    pristine = files(tmp_path / "store")
    for name in pristine:
        if name == "import.json":
            continue
        path = tmp_path / "store" / name
        path.write_bytes(pristine[name][:-2])  # The last byte alone may be a newline.
        with pytest.raises(UserError, match=r"import the weights again|copy or download"):
            store.load_store(tmp_path / "store")
        path.write_bytes(pristine[name])
    store.load_store(tmp_path / "store")
    with pytest.raises(UserError, match="has no component 'x'; it has context_adapter"):
        store.load_stored(tmp_path / "store", "x")
    index = json.loads((tmp_path / "store" / "model.json").read_text())
    index["components"]["../x"] = index["components"]["context_adapter"]
    (tmp_path / "store" / "model.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside of the store"):
        store.read_store(tmp_path / "store")


def test_a_full_disk_is_one_line(model, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert (
        run_command(
            lambda: import_torch.main(["--source", str(model / "context_adapter"), "--output", str(tmp_path / "store")])
        )
        == 1
    )
    assert "context_adapter: needs" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["model"]


def test_a_failed_import_leaves_the_old_store(model, tmp_path):
    import_torch.import_torch(model, tmp_path / "store")
    before = hash_files([p for p in (tmp_path / "store").rglob("*") if p.is_file()])
    path = model / "text_encoder_3" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match="truncated"):
        import_torch.import_torch(model, tmp_path / "store")
    assert hash_files([p for p in (tmp_path / "store").rglob("*") if p.is_file()]) == before
    assert sorted(os.listdir(tmp_path)) == ["model", "store"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--source", "absent", "--output", "x"], "no such file or folder"),
        (["--source", "empty", "--output", "x"], "holds no supported component"),
        (["--source", "model", "--output", "x", "--network", "t5_encoder"], "only for a single component"),
        (["--source", "model", "--output", "x", "--component", "nothing"], "has only"),
        (["--source", "model", "--output", "x", "--config", "c.json"], "only for a single weights file"),
        (["--source", "model", "--output", "model"], "is not a folder with model.json"),
    ],
)
def test_bad_arguments(model, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert run_command(lambda: import_torch.main(arguments)) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and says in error
    assert not (tmp_path / "x").exists()


def test_export_of_what_is_no_checkpoint(model, tmp_path, capsys):
    assert run_command(lambda: export_torch.main(["--checkpoint", str(model), "--output", str(tmp_path / "out")])) == 1
    assert "neither a store (model.json) nor a training workdir" in capsys.readouterr().err
    import_torch.import_torch(model / "context_adapter", tmp_path / "store")
    arguments = ["--checkpoint", str(tmp_path / "store"), "--output", str(tmp_path / "out"), "--step", "3"]
    assert run_command(lambda: export_torch.main(arguments)) == 1
    assert "which have no steps" in capsys.readouterr().err


def test_a_mixed_stack_keeps_every_blocks_dtype(tmp_path):
    """Blocks of unlike dtypes share one array here, and get their own dtype back."""
    folder = tmp_path / "t5"
    save_component(folder, networks.T5_ENCODER, CONFIG, random_params(networks.T5_ENCODER, CONFIG))
    tensors = load_file(folder / "model.safetensors")
    key = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    save_file({**tensors, key: tensors[key].astype(np.float16)}, folder / "model.safetensors", {"format": "pt"})
    import_torch.import_torch(folder, tmp_path / "store")
    export_torch.export_torch(tmp_path / "store", tmp_path / "out")
    assert files(tmp_path / "out" / "t5") == files(folder)
