"""Graphs of the CLIP text models.

    clip_l, clip_g        token ids -> the pooled text that the video transformer is conditioned with
    first_frame_clip_l    token ids -> the penultimate states, which are one half of the first frame's context
    first_frame_clip_g    token ids -> the other half, and the pooled text of the first frame

The blocks are those of `nd_jax.models.clip_text`. Exact changes around them:

    causal mask    a constant [1, 1, L, L] of 0 and `MASKED_LOGIT`                                            (1)
    end token      pooled = end_weights x, with weights from the host that are 1 at the end token and 0
                   elsewhere; its position depends on the ids, and there is no Gather with a computed index   (2)
    final norm     of that token alone, since a norm sees one token                                           (3)
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from converters import device_layers
from converters.graph import Graph, GraphOptions, TensorSpec, component_of
from nd_jax.models import clip_text, image_layers
from nd_jax.models.clip_text import CLIPTextConfig
from nd_jax.models.layers import TokenEmbedding
from nd_jax.weights import networks
from nd_jax.weights.folder import Component

# The logits of a trained CLIP reach some tens. The graphs run in FP16, which leaves 55,000 for them.
MASKED_LOGIT = -1e4


def end_weights(ids: np.ndarray, config: CLIPTextConfig) -> np.ndarray:
    """Equation 2: ids int32 [B, L] -> float32 [B, L]."""
    positions = np.asarray(clip_text.eos_positions(ids, config))
    return (np.arange(ids.shape[-1])[None] == positions[:, None]).astype(np.float32)


def causal_bias(length: int) -> np.ndarray:
    """Equation 1."""
    return np.triu(np.full((length, length), MASKED_LOGIT, np.float32), k=1)[None, None]


def device_params(params: Mapping[str, Any], length: int, pooled: bool) -> dict[str, Any]:
    """Parameters of `CLIPText` -> those of the graph, for L tokens; without `pooled` those that the end alone needs."""
    blocks = device_layers.unroll(params["blocks"])
    if not pooled:  # The penultimate states are the last block's input.
        del blocks[str(len(blocks) - 1)]
    ends = {name: params[name] for name in ("final_norm", "text_projection")} if pooled else {}
    return ends | {
        "token_embedding": params["token_embedding"],
        "position_embedding": np.asarray(params["position_embedding"]["embedding"])[:length],
        "blocks": blocks,
        "causal_bias": causal_bias(length),
    }


def encode_on_device(params: Mapping[str, Any], config: CLIPTextConfig, ids: jax.Array) -> list[jax.Array]:
    """ids [B, L] -> the residual stream before the first block and after each that is in `params`, [B, L, D]."""

    def attention(call, module, weights, x_BLD):
        return device_layers.attend(weights, x_BLD, x_BLD, config.num_attention_heads, params["causal_bias"])

    embedding = TokenEmbedding(config.vocab_size, config.hidden_size)
    states = [embedding.apply({"params": params["token_embedding"]}, ids) + params["position_embedding"][None]]
    with device_layers.forms({clip_text.CLIPAttention: attention}):
        for k in range(len(params["blocks"])):
            with jax.named_scope(f"blocks/{k}"):
                states.append(clip_text.CLIPBlock(config).apply({"params": params["blocks"][str(k)]}, states[-1]))
    return states


def pool_on_device(params: Mapping[str, Any], config: CLIPTextConfig, x_BLD: jax.Array, ends: jax.Array) -> jax.Array:
    """Equations 2 and 3 and the projection: the last block's output and weights [B, L] -> text_embeds [B, P]."""
    with jax.named_scope("pooled"):
        norm = image_layers.LayerNorm(config.layer_norm_eps)
        end_B1D = norm.apply({"params": params["final_norm"]}, ends[:, None] @ x_BLD)
        return (end_B1D @ params["text_projection"]["kernel"])[:, 0]


def clip(
    name: str, folder: str, outputs: tuple[str, ...], components: Mapping[str, Component], options: GraphOptions
) -> Graph:
    """`input_ids` int32 [B, L] -> `penultimate` [B, L, D]; with `end_weights` [B, L] -> `pooled` [B, P]; float32.

    L is `max_position_embeddings`, to which the tokenizers pad.

    Args:
      name: of the graph.
      folder: the component's subfolder.
      outputs: those that the graph has. Only for `pooled` are there a projection and the input `end_weights`.
      components: holds the component.
      options: batch, and how GELU is written.

    Raises:
      UserError: a component of another class.
    """
    pooled = "pooled" in outputs
    without = components[folder].network.name == networks.CLIP_TEXT_MODEL.name and not pooled
    component = component_of(components, folder, networks.CLIP_TEXT_MODEL if without else networks.CLIP_TEXT)
    config = component.config
    tokens = (options.batch, config.max_position_embeddings)
    shapes = {"penultimate": (*tokens, config.hidden_size), "pooled": (options.batch, config.projection_dim)}

    def apply(params, ids, *ends):
        states = encode_on_device(params, config, ids)
        found = {"penultimate": states[config.num_hidden_layers - 1]}
        if pooled:
            found["pooled"] = pool_on_device(params, config, states[-1], *ends)
        return tuple(found[output] for output in outputs)

    @jax.jit
    def reference_with(params, ids):
        out = clip_text.CLIPText(config).apply({"params": params}, ids)
        found = {"penultimate": out.penultimate, "pooled": out.text_embeds}
        return tuple(found[output] for output in outputs)

    def sample(rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A random text, and the end token from there on."""
        end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
        lengths = rng.integers(1, tokens[1], size=(tokens[0], 1))
        ids = rng.integers(0, config.vocab_size - 1, size=tokens, dtype=np.int32)
        ids = np.where(np.arange(tokens[1])[None] < lengths, ids, np.int32(end))
        return {"input_ids": ids} | ({"end_weights": end_weights(ids, config)} if pooled else {})

    params = device_params(component.params, tokens[1], pooled)
    inputs = [TensorSpec("input_ids", tokens, "int32")]
    inputs += [TensorSpec("end_weights", tokens, "float32")] if pooled else []
    blocks = len(params["blocks"])
    return Graph(
        name=name,
        inputs=tuple(inputs),
        outputs=tuple(TensorSpec(output, shapes[output], "float32") for output in outputs),
        params=params,
        apply=apply,
        reference=lambda ids, *ends: reference_with(component.params, ids),
        sample=sample,
        native_ops={
            "Gather": 1,
            "LayerNormalization": 2 * blocks + pooled,
            "Softmax": blocks,
            "Gelu": blocks if config.hidden_act == "gelu" else 0,
        },
        expand_gelu=options.gelu == "expanded",
        notes={"masked_logit": MASKED_LOGIT, "eos_token_id": config.eos_token_id},
    )


# name -> (subfolders of the model folder, builder)
CLIP_GRAPHS = {
    name: ((folder,), functools.partial(clip, name, folder, outputs))
    for name, folder, outputs in (
        ("clip_l", "text_encoder", ("pooled",)),
        ("clip_g", "text_encoder_2", ("pooled",)),
        ("first_frame_clip_l", "ssd_1b_text_encoder", ("penultimate",)),
        ("first_frame_clip_g", "ssd_1b_text_encoder_2", ("penultimate", "pooled")),
    )
}
