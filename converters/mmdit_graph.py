"""Graphs `mmdit_stage0`, `mmdit_stage1`, ...: a call of the video transformer at a stage, or a range of its blocks.

One graph serves all units of its stage. What tells them apart, and the time, are inputs that the host computes
(`nd_jax.generate.stage_inputs`). Blocks keep their number in the whole network, so that the graphs of all stages have
the same weights under the same names. Shape letters as in `nd_jax.models.mmdit_block`; M tokens of the current clip.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np

from converters.graph import TRANSFORMER, Graph, GraphOptions, TensorSpec
from converters.mmdit_device import blocks_on_device, device_params, logit_bound
from nd_jax.errors import UserError
from nd_jax.generate.stage_inputs import DEVICE_MASKED_LOGIT, conditioning_input, geometry_inputs, stage_layouts
from nd_jax.models.mmdit import MMDiTConfig, PyramidMMDiT, keep_blocks
from nd_jax.models.mmdit_block import TokenGeometry
from nd_jax.pyramid.layout import TokenLayout, VideoSize
from nd_jax.weights.folder import Component
from nd_jax.weights.mmdit import PYRAMID_FLOW_MMDIT, PYRAMID_MMDIT

STAGES = 3
# What every part takes behind its streams.
COMMON_INPUTS = ("conditioning", "mask", "rotary_cos", "rotary_sin")


class _FromStreams(PyramidMMDiT):
    """The transformer from silu(temb), given as `pooled`, and behind the embeddings if `tokens` is the image stream."""

    embedded: bool = False

    def block_conditioning(self, timestep: jax.Array, pooled: jax.Array) -> jax.Array:
        return pooled

    def embed_tokens(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return tokens if self.embedded else super().embed_tokens(tokens, positions)

    def embed_context(self, context: jax.Array) -> jax.Array:
        return context if self.embedded else super().embed_context(context)


def reference_blocks(transformer: Component, blocks: range, output_tokens: int) -> Callable[..., tuple]:
    """(*inputs of the graph) -> its outputs, by the model that training uses."""
    config, params = transformer.config, transformer.params
    last = config.num_layers - 1
    if len(blocks) < config.num_layers:
        # A part that does not end with the last block has its outputs before it.
        params, config = keep_blocks(params, config, [*(k for k in blocks if k < last), last])
    model, states = _FromStreams(config, embedded=blocks.start > 0), () if last in blocks else (len(blocks),)

    @jax.jit
    def run(params, image, positions, text, conditioning, mask, cos, sin):
        geometry = TokenGeometry(positions, cos, sin, mask > DEVICE_MASKED_LOGIT / 2)
        out = model.apply(
            {"params": params}, image, text, conditioning, None, geometry, output_tokens, return_block_states=states
        )
        return (out.states.image[0], out.states.text[0]) if states else (out.velocity,)

    if blocks.start == 0:
        return functools.partial(run, params)
    return lambda image, *rest: run(params, image, None, *rest)


def mmdit_stage(components: Mapping[str, Component], options: GraphOptions, stage: int) -> Graph:
    """One call of the transformer at a stage, for every unit.

    Inputs, float32: `tokens` [1, N, p * p * C], `positions` [1, N, D] and `context` [B, T, context_dim], or with
    `options.blocks` behind the first block the streams `image` [B, N, D] and `text` [B, T, D]; then `conditioning`
    [B, D], `mask` [B, 1, L, L], `rotary_cos` and `rotary_sin` [1, N, K / 2]. Outputs: `velocity` [B, M, p * p * C], or
    before the last block `image_out` and `text_out`.

    Args:
      components: "diffusion_transformer_320p", with or without a context embedder.
      options: batch, length of the text, size of the video's latents, blocks.
      stage: 0 is the coarsest.

    Raises:
      UserError: a component of another class, sizes that the pyramid or the transformer cannot have, no such blocks.
    """
    transformer = components[TRANSFORMER]
    if transformer.network.name not in (PYRAMID_MMDIT.name, PYRAMID_FLOW_MMDIT.name):
        raise UserError(f"{TRANSFORMER} holds a {transformer.network.name}; this graph needs a video transformer")
    config, batch, blocks = transformer.config, options.batch, _blocks(options, transformer.config)
    video = VideoSize(options.latent_frames, options.latent_height, options.latent_width, STAGES)
    layouts = stage_layouts(config, video, stage, options.length)
    layout = layouts[0]
    first, last = blocks.start == 0, blocks.stop == config.num_layers
    spec = lambda name, *shape: TensorSpec(name, shape, "float32")
    image_length, width = layout.image_length, config.inner_dim
    ends = spec("image", batch, image_length, width), spec("text", batch, options.length, width)
    if first:
        starts = (
            spec("tokens", batch, image_length, config.token_dim),
            spec("positions", 1, image_length, width),
            spec("context", batch, options.length, config.context_dim),
        )
    turn = (1, image_length, config.attention_head_dim // 2)
    common = (batch, width), (batch, 1, layout.length, layout.length), turn, turn
    inputs = (
        *(starts if first else ends),
        *(spec(name, *shape) for name, shape in zip(COMMON_INPUTS, common, strict=True)),
    )
    outputs = tuple(spec(f"{end.name}_out", *end.shape) for end in ends)
    if last:
        outputs = (spec("velocity", batch, layout.output_tokens, config.token_dim),)
    params = device_params(transformer.params, config, blocks)

    def apply(params, *inputs):
        *streams, conditioning, mask, cos, sin = inputs
        return blocks_on_device(
            params, config, blocks, layout.output_tokens, tuple(streams), conditioning, mask, (cos, sin)
        )

    before = functools.cache(lambda: reference_blocks(transformer, range(blocks.start), layout.output_tokens))

    def sample(rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Of a part, the streams that the blocks before it leave behind."""
        inputs = random_inputs(transformer, layouts, batch, rng)
        if first:
            return inputs
        image, text = before()(*inputs.values())
        return {
            "image": np.asarray(image),
            "text": np.asarray(text),
            **{name: inputs[name] for name in COMMON_INPUTS},
        }

    count, final = len(blocks), int(last)
    name = f"mmdit_stage{stage}"
    return Graph(
        name=name if options.blocks is None else f"{name}_blocks{blocks.start}-{blocks.stop}",
        inputs=inputs,
        outputs=outputs,
        params=params,
        apply=apply,
        reference=reference_blocks(transformer, blocks, layout.output_tokens),
        sample=sample,
        # The last block's text has neither queries nor an MLP; the output has a norm of its own.
        native_ops={
            "Gelu": 2 * count - final,
            "LayerNormalization": 4 * count,
            "RMSNormalization": 4 * count - final,
            "Softmax": count,
        },
        notes={
            "masked_logit": DEVICE_MASKED_LOGIT,
            "logit_bound": logit_bound(params, config.attention_head_dim),
            "units": len(layouts),
            "padding": [unit.padding for unit in layouts],
            "blocks": [blocks.start, blocks.stop],
        },
    )


def random_inputs(
    transformer: Component, layouts: tuple[TokenLayout, ...], batch: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Inputs of the whole graph for a random unit, time and length of the text; all else is N(0, 1)."""
    config, layout = transformer.config, layouts[rng.integers(len(layouts))]
    normal = lambda *shape: rng.standard_normal((batch, *shape)).astype(np.float32)
    tokens = normal(layout.image_length, config.token_dim)
    tokens[:, : layout.padding] = 0
    valid = rng.integers(1, layout.text_length + 1, (batch, 1))
    geometry = geometry_inputs(layout, np.arange(layout.text_length)[None] < valid)
    pooled, timestep = normal(config.pooled_projection_dim), rng.uniform(0, 1000, batch)
    inputs = {
        "tokens": tokens,
        "context": normal(layout.text_length, config.context_dim),
        "conditioning": conditioning_input(config, transformer.params, timestep, pooled),
        **geometry,
    }
    return {name: inputs[name] for name in ("tokens", "positions", "context", *COMMON_INPUTS)}


def _blocks(options: GraphOptions, config: MMDiTConfig) -> range:
    start, stop = options.blocks or (0, config.num_layers)
    if not 0 <= start < stop <= config.num_layers:
        raise UserError(
            f"blocks {start}:{stop} of a transformer with {config.num_layers}: give A:B with "
            f"0 <= A < B <= {config.num_layers}"
        )
    return range(start, stop)


# One graph per stage, for the table of `graphs`.
STAGE_GRAPHS = {
    f"mmdit_stage{stage}": ((TRANSFORMER,), functools.partial(mmdit_stage, stage=stage)) for stage in range(STAGES)
}
