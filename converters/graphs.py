"""The graphs that leave JAX for the device: inputs, parameters, function to trace, and the model it must agree with.

A graph applies the Flax modules of `nd_jax.models`; it holds no second model. What differs from training is the
surroundings: blocks run in a Python loop on slices of the stacked parameters, tables that depend on shapes alone
are gathered on the host and enter as constants, and masks are finite within FP16.

A later graph is one more function in `GRAPHS`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters import (
    clip_graph,
    decoder_graph,
    device_layers,
    first_frame_graph,
    mmdit_graph,
    quicksrnet_graph,
    residual_scale,
    vae_graph,
)
from converters.graph import TRANSFORMER, Graph, GraphOptions, TensorSpec, component_of
from nd_jax.errors import UserError
from nd_jax.models import t5
from nd_jax.models.context_adapter import ContextAdapter
from nd_jax.models.layers import TokenEmbedding
from nd_jax.weights import networks
from nd_jax.weights.folder import Component, load_component

# Added to the logits of padded keys. T5 does not divide its logits by sqrt(d_kv), so they reach the hundreds and -100
# would not remove a key; -1e4 exceeds them by far, and leaves 55,000 for the logits themselves before FP16 ends.
DEVICE_MASKED_LOGIT = -1e4


def load_graph(name: str, model_dir: str | Path, options: GraphOptions) -> Graph:
    """Graph `name` with the weights of a model folder in the released layout.

    Raises:
      UserError: unknown graph, or a component that is missing or does not load.
    """
    if name not in GRAPHS:
        raise UserError(f"graph {name!r} does not exist; choose one of {', '.join(sorted(GRAPHS))}")
    folders = component_folders(name, model_dir, options.transformer)
    return GRAPHS[name][1]({part: _load_component(folder) for part, folder in folders.items()}, options)


def component_folders(name: str, model_dir: str | Path, transformer: str = TRANSFORMER) -> dict[str, Path]:
    """Component that graph `name` is made of -> its folder, where `transformer` is the subfolder of the transformer."""
    return {part: Path(model_dir) / (transformer if part == TRANSFORMER else part) for part in GRAPHS[name][0]}


def _load_component(folder: Path) -> Component:
    # bfloat16 and FP16 checkpoints too: TFLite and tf2onnx know neither, and the device rounds the weights itself.
    return load_component(folder, dtype=np.float32)


def random_tokens(rng: np.random.Generator, count: int, length: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and masks, int32 [count, length] each: random ids up to a random length, then padding."""
    lengths = rng.integers(min(4, length), length + 1, size=(count, 1))
    mask = (np.arange(length)[None, :] < lengths).astype(np.int32)
    ids = rng.integers(0, vocab_size, size=(count, length), dtype=np.int32)
    return ids * mask, mask


def position_bias(relative_bias: np.ndarray, length: int, config: t5.T5Config) -> np.ndarray:
    """The learned table gathered for every (query, key) pair: float32 [1, H, L, L]."""
    buckets = t5.relative_position_buckets(
        length, config.relative_attention_num_buckets, config.relative_attention_max_distance
    )
    return np.ascontiguousarray(np.asarray(relative_bias, np.float32)[buckets].transpose(2, 0, 1)[None])


def encode(params: Mapping[str, Any], ids: jax.Array, mask: jax.Array, config: t5.T5Config) -> list[jax.Array]:
    """T5 encoder on sliced parameters: the residual stream before the first block and after each, [B, L, D] each."""
    x_BLD = TokenEmbedding(config.vocab_size, config.d_model).apply({"params": params["token_embedding"]}, ids)
    padded_B11L = ((mask.astype(jnp.float32) - 1.0) * -DEVICE_MASKED_LOGIT)[:, None, None, :]
    bias_BHLL = params["position_bias"] + padded_B11L
    block = t5.T5Block(config)
    residuals = [x_BLD]
    for i in range(config.num_layers):
        with jax.named_scope(f"encoder/blocks/{i}"):
            residuals.append(block.apply({"params": params["blocks"][str(i)]}, residuals[-1], bias_BHLL))
    return residuals


def encode_hidden(params: Mapping[str, Any], ids: jax.Array, mask: jax.Array, config: t5.T5Config) -> jax.Array:
    """The end of `encode` behind the final norm, [B, L, D]."""
    x_BLD = encode(params, ids, mask, config)[-1]
    with jax.named_scope("encoder/final_norm"):
        return t5.RMSNorm(config.layer_norm_epsilon).apply({"params": params["final_norm"]}, x_BLD)


def text_encoder(components: Mapping[str, Component], options: GraphOptions) -> Graph:
    """DT5 and ContextAdapter: `input_ids`, `attention_mask` int32 [B, L] -> `context` float32 [B, L, D_out].

    Args:
      components: "text_encoder_3" (DistilT5) and "context_adapter", each with `config` and `params`.
      options: sizes and residual scale.

    Raises:
      UserError: a component of another class, widths that do not fit, or an invalid residual scale.
    """
    dt5 = component_of(components, "text_encoder_3", networks.DISTIL_T5)
    adapter = component_of(components, "context_adapter", networks.CONTEXT_ADAPTER)
    if dt5.config.projection_dim != adapter.config.input_dims:
        raise UserError(
            f"text_encoder_3 gives width {dt5.config.projection_dim} and context_adapter takes "
            f"{adapter.config.input_dims}: the two components do not belong together"
        )
    encoder, config, notes = _device_encoder(dt5.params["encoder"], dt5.config.encoder, options)
    params = {"encoder": encoder, "projection": dt5.params["projection"], "context_adapter": adapter.params}
    adapter_module = ContextAdapter(adapter.config)

    def apply(params, ids, mask):
        projection = t5.DistilT5Projection(dt5.config.projection_dim)
        hidden = projection.apply({"params": params["projection"]}, encode_hidden(params["encoder"], ids, mask, config))
        return (adapter_module.apply({"params": params["context_adapter"]}, hidden),)

    @jax.jit
    def reference_with(dt5_params, adapter_params, ids, mask):
        hidden = t5.DistilT5(dt5.config).apply({"params": dt5_params}, ids, mask)
        return (adapter_module.apply({"params": adapter_params}, hidden),)

    activations = [adapter.config.activation_fn] * len(adapter.config.layer_depths) + [adapter.config.out_activation_fn]
    return _token_graph(
        "text_encoder",
        config,
        options,
        adapter.config.output_dims,
        more_gelus=activations.count("gelu"),
        params=params,
        apply=apply,
        reference=lambda ids, mask: reference_with(dt5.params, adapter.params, ids, mask),
        notes=notes,
    )


def t5_encoder(components: Mapping[str, Component], options: GraphOptions) -> Graph:
    """T5 alone, of a teacher: `input_ids`, `attention_mask` int32 [B, L] -> `context` float32 [B, L, D].

    Args:
      components: "text_encoder_3" (T5 encoder).
      options: sizes and residual scale.

    Raises:
      UserError: a component of another class, or an invalid residual scale.
    """
    component = component_of(components, "text_encoder_3", networks.T5_ENCODER)
    encoder, config, notes = _device_encoder(component.params, component.config, options)
    model = t5.T5Encoder(component.config)
    reference = jax.jit(lambda params, ids, mask: (model.apply({"params": params}, ids, mask).hidden,))
    return _token_graph(
        "t5_encoder",
        config,
        options,
        config.d_model,
        params={"encoder": encoder},
        apply=lambda params, ids, mask: (encode_hidden(params["encoder"], ids, mask, config),),
        reference=lambda ids, mask: reference(component.params, ids, mask),
        notes=notes,
    )


def _device_encoder(
    params: Mapping[str, Any], released: t5.T5Config, options: GraphOptions
) -> tuple[dict[str, Any], t5.T5Config, dict[str, Any]]:
    """Parameters of a T5 encoder -> (those of `encode`, scale folded; the config that goes with them; notes)."""
    encoder = {name: leaf for name, leaf in params.items() if name != "relative_bias"}
    encoder["blocks"] = device_layers.unroll(encoder["blocks"])
    encoder["position_bias"] = position_bias(params["relative_bias"], options.length, released)

    def residual_peak() -> float:
        ids, mask = options.calibration or random_tokens(
            np.random.default_rng(options.seed), 4, options.length, released.vocab_size
        )
        return residual_scale.peak(lambda *args: encode(*args, released), encoder, ids, mask)

    scale, measured = residual_scale.choose(options.residual_scale, residual_peak)
    config = dataclasses.replace(released, layer_norm_epsilon=released.layer_norm_epsilon * scale**2)
    notes = {"residual_scale": scale, "residual_peak": measured, "masked_logit": DEVICE_MASKED_LOGIT}
    return residual_scale.fold(encoder, scale), config, notes


def _token_graph(
    name: str, config: t5.T5Config, options: GraphOptions, width: int, more_gelus: int = 0, **parts: Any
) -> Graph:
    """A graph from ids and masks to a context of `width` channels by a T5 encoder and what is behind it."""
    tokens = (options.batch, options.length)

    def sample(rng: np.random.Generator) -> dict[str, np.ndarray]:
        ids, mask = random_tokens(rng, *tokens, config.vocab_size)
        return {"input_ids": ids, "attention_mask": mask}

    return Graph(
        name=name,
        inputs=(TensorSpec("input_ids", tokens, "int32"), TensorSpec("attention_mask", tokens, "int32")),
        outputs=(TensorSpec("context", (*tokens, width), "float32"),),
        sample=sample,
        native_ops={
            "Gather": 1,
            "RMSNormalization": 2 * config.num_layers + 1,
            "Softmax": config.num_layers,
            "Gelu": config.num_layers + more_gelus,
        },
        expand_gelu=options.gelu == "expanded",
        **parts,
    )


# name -> (subfolders of the model folder, builder)
GRAPHS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Component], GraphOptions], Graph]]] = {
    "text_encoder": (("text_encoder_3", "context_adapter"), text_encoder),
    "t5_encoder": (("text_encoder_3",), t5_encoder),
    "decoder_stream": (("causal_video_vae",), decoder_graph.decoder_stream),
    **mmdit_graph.STAGE_GRAPHS,
    **clip_graph.CLIP_GRAPHS,
    "vae_encoder": ((vae_graph.VAE,), vae_graph.vae_encoder),
    "unet": ((first_frame_graph.UNET_FOLDER,), first_frame_graph.unet),
    "image_decoder": ((first_frame_graph.VAE_FOLDER,), first_frame_graph.image_decoder),
    "quicksrnet": ((quicksrnet_graph.FOLDER,), quicksrnet_graph.quicksrnet),
}
