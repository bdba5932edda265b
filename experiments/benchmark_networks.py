"""Benchmark cases of single layers, side by side with the PyTorch implementation that they correspond to.

Both sides get the same weights, the same inputs and, backwards, the same gradients of their outputs. Forward runs
without anything kept for a gradient; forward + backward returns the outputs and the gradients of every input and
parameter. The one difference: our joint block also turns queries and keys by time and obeys the mask of the video,
which `diffusers`' block knows nothing of.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.packages import need
from experiments.benchmark_case import Case
from nd_jax.models.attention import default_attention
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.mmdit_block import HEAD_NORM_EPSILON, JointBlock, TokenGeometry
from nd_jax.models.t5 import T5_XXL, T5Block, T5Config, attention_bias
from nd_jax.pyramid.layout import VideoSize, video_layouts
from nd_jax.weights.mmdit import PYRAMID_MMDIT
from nd_jax.weights.network import Network
from nd_jax.weights.networks import T5_ENCODER
from nd_jax.weights.table import unflatten

TEXT_TOKENS = 128


def block_params(network: Network, config: Any, state: Mapping[str, Any]) -> dict:
    """Parameters of one block from the state dict of the PyTorch block.

    Args:
      network: whose table names the weights of a block.
      config: of the network, with more than one block.
      state: key -> tensor, keys without the name of the block.
    """
    rows = [row for row in network.table(config) if row.path.startswith("blocks/") and row.stacked]
    key = lambda row: row.key.split("{}.")[1]
    return unflatten({row.path.removeprefix("blocks/"): row.turn.ours(state[key(row)].numpy()) for row in rows})


# --- joint block ------------------------------------------------------------------------------------------------------


def torch_joint_block(config: MMDiTConfig, seed: int = 0) -> Any:
    """`diffusers`' block of Stable Diffusion 3 with random weights and our epsilon in the norms of the heads."""
    need("torch")
    need("diffusers")
    import torch
    from diffusers.models.attention import JointTransformerBlock

    torch.manual_seed(seed)
    block = JointTransformerBlock(
        config.inner_dim, config.num_attention_heads, config.attention_head_dim, qk_norm="rms_norm"
    )
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        getattr(block.attn, name).eps = HEAD_NORM_EPSILON
    return block


def joint_block_params(config: MMDiTConfig, block: Any) -> dict:
    """Our parameters of a `torch_joint_block`, whose names of two norms differ from the video transformer's."""
    state = {key.replace("norm_added_", "norm_add_"): value for key, value in block.state_dict().items()}
    return block_params(PYRAMID_MMDIT, config, state)


def joint_block_call(
    config: MMDiTConfig, params: dict, arrays: list[np.ndarray], geometry: TokenGeometry, unseen: int, backward: bool
) -> Callable[[], Any]:
    """Our block as a function of nothing; `arrays` as in `joint_block_arrays`."""
    block = JointBlock(
        config.num_attention_heads, config.attention_head_dim, attention=default_attention(), unseen=unseen
    )
    image, text, conditioning, *gradients = map(jnp.asarray, arrays)
    params, geometry = jax.device_put((params, geometry))

    def forward(params, image, text, conditioning, geometry):
        return block.apply({"params": params}, image, text, jax.nn.silu(conditioning), geometry)

    return _ours(forward, (params, image, text, conditioning), geometry, tuple(gradients), backward)


def torch_joint_block_call(block: Any, arrays: list[np.ndarray], backward: bool) -> Callable[[], Any]:
    """`diffusers`' block as a function of nothing: (image, text), and backwards the gradients of the three inputs."""
    import torch

    image, text, conditioning, *gradients = map(torch.from_numpy, arrays)

    def forward(image, text, conditioning):
        text, image = block(image, text, conditioning)
        return image, text

    return _theirs(block, forward, (image, text, conditioning), tuple(gradients), backward)


def joint_block_arrays(config: MMDiTConfig, image_tokens: int, text_tokens: int, seed: int = 0) -> list[np.ndarray]:
    """Image tokens, text tokens, temb, and the gradients of both outputs, float32, for a batch of one."""
    rng = np.random.default_rng(seed)
    shapes = ((1, image_tokens, config.inner_dim), (1, text_tokens, config.inner_dim))
    return [rng.standard_normal(shape, np.float32) for shape in (*shapes, (1, config.inner_dim), *shapes)]


def joint_block_cases(config: MMDiTConfig | None = None, video: VideoSize | None = None) -> Iterator[Case]:
    """The last unit of a video at every stage, whose length all units with a history share; the released sizes."""
    config, video = config or MMDiTConfig(num_layers=2), video or VideoSize()
    layouts = video_layouts(config, video, TEXT_TOKENS)
    for stage in range(video.stages):
        layout = layouts[video.units - 1, stage]
        for backward in (False, True):

            def build(layout=layout, backward=backward):
                block = torch_joint_block(config)
                arrays = joint_block_arrays(config, layout.image_length, TEXT_TOKENS)
                geometry = layout.geometry(np.ones((1, TEXT_TOKENS), np.int32))
                unseen = layout.output_tokens if layout.current_unseen else 0
                params = joint_block_params(config, block)
                ours = joint_block_call(config, params, arrays, geometry, unseen, backward)
                return ours, torch_joint_block_call(block, arrays, backward)

            what = "forward + backward" if backward else "forward"
            sizes = {"tokens": layout.length, "text_tokens": TEXT_TOKENS, "width": config.inner_dim}
            yield Case(f"joint block, stage {stage}, {layout.length} tokens, {what}", sizes, build)


# --- T5 ---------------------------------------------------------------------------------------------------------------


def torch_t5_block(config: T5Config, seed: int = 0) -> Any:
    """`transformers`' encoder block with random weights."""
    need("torch")
    import torch
    from transformers import T5Config as TorchT5Config
    from transformers.models.t5.modeling_t5 import T5Block as TorchT5Block

    torch.manual_seed(seed)
    settings = dict(feed_forward_proj="gated-gelu", is_decoder=False, use_cache=False, attn_implementation="eager")
    block = TorchT5Block(TorchT5Config(**dataclasses.asdict(config), **settings)).eval()
    for parameter in block.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return block


def t5_block_calls(config: T5Config, block: Any, x: np.ndarray) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(our block, the PyTorch block) forward on [B, L, D], with a bias of relative positions and no padding."""
    import torch

    rng = np.random.default_rng(1)
    table = rng.standard_normal((config.relative_attention_num_buckets, config.num_heads), np.float32)
    bias = np.asarray(attention_bias(jnp.asarray(table), np.ones(x.shape[:2], np.int32), config))
    params = block_params(T5_ENCODER, config, block.state_dict())
    forward = lambda params, x, bias: (T5Block(config).apply({"params": params}, x, bias),)
    ours = _ours(forward, (jax.device_put(params), jnp.asarray(x)), jnp.asarray(bias), (), backward=False)
    their_bias = torch.from_numpy(bias.copy())
    theirs = _theirs(block, lambda x: (block(x, position_bias=their_bias)[0],), (torch.from_numpy(x),), (), False)
    return ours, theirs


def t5_layer_cases(config: T5Config | None = None) -> Iterator[Case]:
    """One layer of the frozen teacher's text encoder, 128 tokens."""
    config = config or T5_XXL

    def build():
        x = np.random.default_rng(0).standard_normal((1, TEXT_TOKENS, config.d_model), np.float32)
        return t5_block_calls(config, torch_t5_block(config), x)

    sizes = {"tokens": TEXT_TOKENS, "width": config.d_model}
    yield Case(f"T5 layer, width {config.d_model}, {TEXT_TOKENS} tokens, forward", sizes, build)


# --- both sides as functions of nothing -------------------------------------------------------------------------------


def _ours(forward: Callable, primals: tuple, constant: Any, gradients: tuple, backward: bool) -> Callable[[], Any]:
    """Outputs, or (outputs, gradients of `primals`); the compiled program runs on arrays that are on the device."""

    def both(primals: tuple, constant: Any, gradients: tuple) -> Any:
        outputs, pullback = jax.vjp(lambda *args: forward(*args, constant), *primals)
        return outputs, pullback(gradients)

    run = jax.jit(both if backward else lambda primals, constant, gradients: forward(*primals, constant))
    return lambda: jax.block_until_ready(run(primals, constant, gradients))


def _theirs(
    block: Any, forward: Callable, inputs: tuple, gradients: tuple, backward: bool
) -> Callable[[], tuple[Any, ...]]:
    """The same in PyTorch; gradients of parameters are left in the block, those of inputs are returned."""
    import torch

    def run() -> tuple[Any, ...]:
        if not backward:
            with torch.no_grad():
                return forward(*inputs)
        block.zero_grad(set_to_none=True)
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = forward(*leaves)
        torch.autograd.backward(outputs, gradients)
        return outputs, tuple(leaf.grad for leaf in leaves)

    return run
