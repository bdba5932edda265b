"""The networks and the sampler of the first frame against diffusers, and their way into and out of model folders."""

import json
import math

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from converters import export_torch, import_torch
from nd_jax.errors import UserError
from nd_jax.generate import lcm
from nd_jax.models.attention import ATTENTION
from nd_jax.models.autoencoder_kl import AutoencoderKL, denormalize_latents, normalize_latents
from nd_jax.models.unet import UNet, UNetConfig, up_stages
from nd_jax.train.sharding import RULES, make_mesh, param_shardings
from nd_jax.weights import networks, store
from nd_jax.weights.folder import load_component, read_config, save_component
from nd_jax.weights.networks import AUTOENCODER_KL, UNET
from nd_jax.weights.table import expand, flatten, to_ours

TOLERANCE = 2e-5  # Of the largest number: that of the golden cases.

# What SSD-1B and its golden case lack: text in the finest blocks and in the middle, unlike numbers of layers, depths
# that differ within a block, a guidance scale, and sides that two does not divide.
UNET_JSON = dict(
    block_out_channels=[8, 12],
    down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    mid_block_type="UNetMidBlock2DCrossAttn",
    up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
    layers_per_block=[1, 2],
    norm_num_groups=2,
    norm_eps=1e-3,
    cross_attention_dim=10,
    transformer_layers_per_block=[1, [2, 1]],
    reverse_transformer_layers_per_block=[[1, 2, 1], 1],
    attention_head_dim=[2, 3],
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=29,
    time_cond_proj_dim=6,
)
AUTOENCODER_JSON = dict(
    block_out_channels=[6, 12],
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
    latent_channels=3,
    layers_per_block=1,
    norm_num_groups=3,
    scaling_factor=0.7,
)


def redraw(model):
    """A torch model whose parameters all matter, norms and biases too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(noise / math.sqrt(math.prod(tensor.shape[1:])))
            else:
                tensor.copy_(0.1 * noise + ("norm" in name and name.endswith("weight")))
    return model.eval()


@pytest.fixture(scope="module")
def torch_unet():
    return redraw(diffusers.UNet2DConditionModel(**UNET_JSON))


@pytest.fixture(scope="module")
def torch_autoencoder():
    return redraw(diffusers.AutoencoderKL(**AUTOENCODER_JSON))


def ours(network, model):
    """(config, parameters) of a torch model; every one of its tensors has to be in the table."""
    config = network.read_config(json.loads(model.to_json_string()))
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    shapes = networks.flat_shapes(network, config)
    theirs = {key: tensor.shape for tensor in expand(network.table(config), shapes) for key in tensor.keys}
    assert theirs == {key: array.shape for key, array in state.items()}
    return config, to_ours(state, network.table(config), shapes)


def normal(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def assert_close(got, expected, tolerance=TOLERANCE):
    assert got.shape == expected.shape
    assert float(np.abs(np.asarray(got) - expected).max()) <= tolerance * float(np.abs(expected).max())


def first(image):
    """Channel-last -> torch tensor, channels first."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 1)))


def last(tensor):
    return np.moveaxis(tensor.detach().numpy(), 1, -1)


# --- networks ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet(torch_unet):
    return ours(UNET, torch_unet)


@pytest.fixture(scope="module")
def unet_inputs():
    time_ids = np.array([[640, 1024, 0, 0, 640, 1024], [37, 5, 2, 1, 64, 8]], np.float32)
    timestep, guidance = np.array([999.0, 249.0], np.float32), normal(2, 6)
    return normal(2, 7, 5, 4), timestep, normal(2, 3, 10), normal(2, 5), time_ids, guidance


def test_the_unet_agrees_with_diffusers(torch_unet, unet, unet_inputs):
    config, params = unet
    latents, timestep, context, pooled, time_ids, guidance = unet_inputs
    apply = jax.jit(UNet(config, attention="cached").apply, static_argnames="return_states")
    out = apply({"params": params}, *unet_inputs, return_states=True)
    with torch.no_grad():
        expected = torch_unet(
            first(latents),
            torch.from_numpy(timestep),
            torch.from_numpy(context),
            timestep_cond=torch.from_numpy(guidance),
            added_cond_kwargs={"text_embeds": torch.from_numpy(pooled), "time_ids": torch.from_numpy(time_ids)},
        ).sample
    assert out.prediction.dtype == jnp.float32
    assert_close(out.prediction, last(expected))
    shapes = {name: state.shape for name, state in out.states.items()}
    assert shapes == {
        **dict.fromkeys(("time_embedding", "size_embedding"), (2, 32)),
        **{"down_0": (2, 4, 3, 8), "down_1": (2, 4, 3, 12), "mid": (2, 4, 3, 12)},
        **{"up_0": (2, 7, 5, 12), "up_1": (2, 7, 5, 8)},
    }


def test_the_unet_says_what_guidance_it_takes(unet, unet_inputs):
    config, params = unet
    with pytest.raises(ValueError, match="time_cond_proj_dim is 6 and no guidance is given"):
        UNet(config).apply({"params": params}, *unet_inputs[:-1])
    with pytest.raises(ValueError, match="attention 'flash' is not one of"):
        UNet(config, attention="flash")


def test_the_autoencoder_agrees_with_diffusers(torch_autoencoder):
    config, params = ours(AUTOENCODER_KL, torch_autoencoder)
    image = normal(2, 9, 7, 3)  # Odd sides lose their last row and column.
    call = jax.jit(AutoencoderKL(config).apply, static_argnames="method")
    posterior = call({"params": params}, image, method="encode")
    with torch.no_grad():
        expected = torch_autoencoder.encode(first(image)).latent_dist
        decoded = torch_autoencoder.decode(expected.mean).sample
    assert posterior.mean.shape == (2, 4, 3, 3)
    assert_close(posterior.mean, last(expected.mean))
    assert_close(posterior.logvar, last(expected.logvar))
    assert_close(call({"params": params}, last(expected.mean), method="decode"), last(decoded))
    assert_close(posterior.kl(), expected.kl().numpy())
    scaled = normalize_latents(config, posterior.mean)
    assert_close(scaled, 0.7 * last(expected.mean))
    assert_close(denormalize_latents(config, scaled), last(expected.mean))


@pytest.mark.parametrize(
    ("network", "settings", "kernels"),
    [
        (
            UNET,
            UNET_JSON,
            {
                "down_0_block_0_transformer/blocks/self_attention/query/kernel": (None, "fsdp", "tensor"),
                "down_0_block_0_transformer/blocks/mlp/down/kernel": (None, "tensor", "fsdp"),
                "time_embedding/hidden/kernel": ("fsdp", "tensor"),
                "mid_block_0/conv1/kernel": (None, None, None, "fsdp"),
            },
        ),
        (
            AUTOENCODER_KL,
            AUTOENCODER_JSON,
            {
                "encoder/down_1_block_0/conv1/kernel": (None, None, None, "fsdp"),
                "decoder/mid/attention/query/kernel": (None, "fsdp"),
            },
        ),
    ],
    ids=["unet", "autoencoder_kl"],
)
def test_half_precision_on_a_mesh(network, settings, kernels):
    """No operation mixes dtypes, every layer takes the mesh's rules, and kernels are split."""
    mesh, config = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4]), network.read_config(settings)
    module = network.module(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), *network.inputs(config))
    assert (out.prediction.dtype == jnp.float32) if network is UNET else (out.dtype == jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.bfloat16)}
    specs = flatten(param_shardings(variables["params"], network.logical_axes, mesh))
    split = {path: tuple(sharding.spec) for path, sharding in specs.items() if any(sharding.spec)}
    assert {path: split[path] for path in kernels} == kernels


@pytest.mark.parametrize("implementation", ("xla", "cached"))  # the TPU kernel is for a sequence with itself
@pytest.mark.parametrize("masked", [False, True])
def test_attention_to_another_sequence(implementation, masked, monkeypatch):
    monkeypatch.setattr("nd_jax.models.attention.LOGITS_AT_ONCE", 30)  # A sample at a time, its heads by two.
    query, key, value = (normal(2, length, 4, 3, seed=seed) for seed, length in enumerate((5, 3, 3)))
    mask = np.random.default_rng(0).random((2, 1, 5, 3)) < 0.7 if masked else None
    logits = np.einsum("blhk,bshk->bhls", query, key) / math.sqrt(3)
    weights = jax.nn.softmax(np.where(True if mask is None else mask, logits, -1e9), axis=-1)
    expected = np.einsum("bhls,bshk->blhk", weights, value)
    assert_close(ATTENTION[implementation](*map(jnp.asarray, (query, key, value)), mask), expected, 2e-6)


# --- sampler ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        *(({}, steps) for steps in (1, 2, 4, 8)),
        *(({"original_inference_steps": 4, "steps_offset": 1, "set_alpha_to_one": False}, steps) for steps in (1, 4)),
        ({"prediction_type": "v_prediction", "timestep_scaling": 2.0, "num_train_timesteps": 700}, 3),
        ({"prediction_type": "sample", "beta_start": 0.001, "beta_end": 0.02}, 2),
    ],
)
def test_sampling_agrees_with_diffusers(settings, steps):
    scheduler = diffusers.LCMScheduler(**settings)
    scheduler.set_timesteps(steps)
    config = lcm.read_lcm_config(json.loads(scheduler.to_json_string()))
    schedule = lcm.lcm_schedule(config, steps)
    assert schedule.timesteps.tolist() == scheduler.timesteps.tolist()
    np.testing.assert_allclose(lcm.alphas_cumprod(config), scheduler.alphas_cumprod.numpy(), rtol=2e-5, atol=0)
    sample = normal(2, 3, 4)
    for k, timestep in enumerate(scheduler.timesteps):
        prediction = normal(2, 3, 4, seed=k)
        noise = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(k)).numpy()
        expected = scheduler.step(
            torch.from_numpy(prediction),
            timestep,
            torch.from_numpy(sample),
            generator=torch.Generator().manual_seed(k),
        )
        got, denoised = lcm.lcm_step(config, schedule, k, sample, prediction, noise)
        assert_close(denoised, expected.denoised.numpy(), 1e-5)
        assert_close(got, expected.prev_sample.numpy(), 1e-5)
        sample = expected.prev_sample.numpy()
    without, denoised = lcm.lcm_step(config, schedule, steps - 1, sample, prediction)
    assert np.array_equal(without, denoised)
    assert np.array_equal(lcm.lcm_step(config, schedule, steps - 1, sample, prediction, noise)[0], denoised)


def test_the_released_timesteps():
    assert lcm.lcm_timesteps(lcm.SSD_1B, 4) == (999, 749, 499, 249)
    by_number, given = lcm.lcm_schedule(lcm.SSD_1B, 4), lcm.lcm_schedule(lcm.LCMConfig(), (999, 749, 499, 249))
    for one, other in zip(by_number, given, strict=True):
        assert np.array_equal(one, other)


def test_the_guidance_embedding_is_that_of_the_pipeline():
    scales = np.array([1.0, 1.5, 8.0], np.float32)
    embed = diffusers.StableDiffusionXLPipeline.get_guidance_scale_embedding
    expected = embed(None, torch.from_numpy(scales) - 1, 32).numpy()
    # Angles reach 7000, where float32 has a step of 5e-4.
    assert_close(lcm.guidance_embedding(scales, 32), expected, 2e-3)


# --- model folders ----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path, torch_unet, torch_autoencoder):
    """The first-frame part of a model folder as the public libraries write it."""
    root = tmp_path / "model"
    torch_unet.save_pretrained(root / "ssd_1b_unet")
    torch_autoencoder.save_pretrained(root / "ssd_1b_vae")
    clip = dict(vocab_size=9, hidden_size=4, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2)
    for name, settings in (
        ("ssd_1b_text_encoder", {"hidden_act": "quick_gelu", "projection_dim": 4}),
        ("ssd_1b_text_encoder_2", {"hidden_act": "gelu", "projection_dim": 5}),
    ):
        config = transformers.CLIPTextConfig(**clip, **settings, bos_token_id=7, eos_token_id=8)
        transformers.CLIPTextModelWithProjection(config).save_pretrained(root / name)
    for name in ("ssd_1b_tokenizer", "ssd_1b_tokenizer_2"):
        (root / name).mkdir()
        (root / name / "vocab.json").write_text("{}")
    return root


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_folder_comes_back_byte_by_byte(model, tmp_path):
    report = import_torch.import_torch(model, tmp_path / "store")
    assert {name: entry["network"] for name, entry in report["components"].items()} == {
        "ssd_1b_unet": "unet",
        "ssd_1b_vae": "autoencoder_kl",
        "ssd_1b_text_encoder": "clip_text",
        "ssd_1b_text_encoder_2": "clip_text",
    }
    assert report["copied"] == ["ssd_1b_tokenizer", "ssd_1b_tokenizer_2"] and not report["skipped"]
    export_torch.export_torch(tmp_path / "store", tmp_path / "out")
    (tmp_path / "out" / "export.json").unlink()
    assert files(tmp_path / "out") == files(model)
    stored = store.load_stored(tmp_path / "store", "ssd_1b_unet")
    jax.tree.map(np.testing.assert_array_equal, stored.params, load_component(model / "ssd_1b_unet").params)


@pytest.mark.parametrize(
    ("name", "network", "public"),
    [
        ("ssd_1b_unet", UNET, diffusers.UNet2DConditionModel),
        ("ssd_1b_vae", AUTOENCODER_KL, diffusers.AutoencoderKL),
    ],
)
def test_what_we_write_loads_in_diffusers(name, network, public, model, tmp_path):
    component = load_component(model / name)
    save_component(tmp_path / name, network, component.config, component.params)
    loaded, info = public.from_pretrained(tmp_path / name, output_loading_info=True, low_cpu_mem_usage=False)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = public.from_pretrained(model / name, low_cpu_mem_usage=False).state_dict()
    assert {key: True for key in expected} == {
        key: torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items()
    }


# --- configs ----------------------------------------------------------------------------------------------------------


def test_depths_of_ssd_1b():
    stages = up_stages(UNetConfig())
    assert [stage.depths for stage in stages] == [(4, 4, 10), (2, 1, 1), (0, 0, 0)]
    assert [stage.inputs for stage in stages] == [(2560, 2560, 1920), (1920, 1280, 960), (960, 640, 640)]
    symmetric = UNetConfig(transformer_layers_per_block=(1, 2, 10), reverse_transformer_layers_per_block=None)
    assert [stage.depths for stage in up_stages(symmetric)] == [(10,) * 3, (2,) * 3, (0,) * 3]


@pytest.mark.parametrize(
    ("network", "changes", "says"),
    [
        (UNET, {"upcast_attention": True}, "upcast_attention is True: only False or None is supported"),
        (UNET, {"use_linear_projection": False}, "use_linear_projection is False: only True"),
        (UNET, {"use_linear_projection": ...}, "use_linear_projection is False, the default of the released class"),
        (UNET, {"a_new_setting": 3}, "a_new_setting is 3: this setting is not supported"),
        (UNET, {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types has 'AttnDownBlock2D'"),
        (UNET, {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type is 'UNetMidBlock2DSimple"),
        (UNET, {"layers_per_block": [1]}, "layers_per_block has 1 entries, block_out_channels 2"),
        (UNET, {"transformer_layers_per_block": [1, [2]]}, r"transformer_layers_per_block\[1\] is \(2,\): give"),
        (UNET, {"reverse_transformer_layers_per_block": None}, "give reverse_transformer_layers_per_block, too"),
        (UNET, {"attention_head_dim": 5}, "attention_head_dim 5 does not divide the width 8"),
        (UNET, {"norm_num_groups": 3}, "norm_num_groups 3 does not divide the width 8"),
        (UNET, {"projection_class_embeddings_input_dim": 24}, "the six sizes alone take 24"),
        (AUTOENCODER_KL, {"shift_factor": 0.1}, "shift_factor is 0.1: only None is supported"),
        (AUTOENCODER_KL, {"latents_mean": [0.0]}, r"latents_mean is \[0.0\]"),
        (AUTOENCODER_KL, {"up_block_types": ["AttnUpDecoderBlock2D"] * 2}, "up_block_types is"),
        (AUTOENCODER_KL, {"norm_num_groups": 4}, "norm_num_groups 4 does not divide the width 6"),
    ],
)
def test_a_setting_that_is_not_supported_is_named(network, changes, says, tmp_path):
    known = {UNET.name: UNET_JSON, AUTOENCODER_KL.name: AUTOENCODER_JSON}[network.name]
    given = {"_class_name": network.class_names[0], **known, **changes}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({key: value for key, value in given.items() if value is not ...}))
    with pytest.raises(UserError, match=says) as error:
        read_config(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: lcm.read_lcm_config({"thresholding": True}), "thresholding is True: only False"),
        (lambda: lcm.read_lcm_config({"use_karras_sigmas": True}), "use_karras_sigmas is True"),
        (lambda: lcm.read_lcm_config({"prediction_type": "flow"}), "prediction_type is 'flow'"),
        (lambda: lcm.LCMConfig(original_inference_steps=2000), "original_inference_steps is 2000"),
        (lambda: lcm.lcm_schedule(lcm.SSD_1B, 8), "8 steps: give 1 to 4"),
        (lambda: lcm.lcm_schedule(lcm.SSD_1B, 0), "0 steps"),
        (lambda: lcm.lcm_schedule(lcm.SSD_1B, (499, 999)), r"timesteps \[499, 999\]: give falling"),
        (lambda: lcm.lcm_schedule(lcm.SSD_1B, (1000,)), "give falling numbers of 999"),
    ],
)
def test_a_bad_schedule_is_named(make, says):
    with pytest.raises(UserError, match=says):
        make()
