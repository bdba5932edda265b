"""A joint block on a GPU as training runs it: bfloat16, eight rows, ten calls before the host waits, against diffusers.

PyTorch's side is the block of `benchmark_networks.torch_joint_block` with PyTorch's own choice of attention kernel; it
knows no mask. Both sides share one GPU, and JAX must leave memory for PyTorch: set XLA_PYTHON_CLIENT_PREALLOCATE=false.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.packages import need
from experiments.benchmark_case import Case
from experiments.benchmark_networks import TEXT_TOKENS, joint_block_params, torch_joint_block
from nd_jax.errors import UserError
from nd_jax.models.mmdit import MMDiTConfig
from nd_jax.models.mmdit_block import JointBlock
from nd_jax.pyramid.layout import TokenLayout, VideoSize, video_layouts

ROWS, CALLS = 8, 10


def gpu_cases(
    config: MMDiTConfig | None = None, video: VideoSize | None = None, device: str = "cuda"
) -> Iterator[Case]:
    """The last unit of a video at the coarsest and the finest stage, by cuDNN's attention and by XLA's.

    Args:
      config, video: the released sizes by default.
      device: of PyTorch's side; JAX's side runs on JAX's default device.

    Raises:
      UserError: JAX or PyTorch sees no GPU.
    """
    config, video = config or MMDiTConfig(num_layers=2), video or VideoSize()
    attentions = ("xla",)
    if device == "cuda":
        check_gpu()
        attentions = ("cudnn", "xla")
    layouts = video_layouts(config, video, TEXT_TOKENS)
    for attention in attentions:
        for stage in (0, video.stages - 1):
            layout = layouts[video.units - 1, stage]
            for backward in (False, True):
                build = lambda layout=layout, backward=backward, attention=attention: block_calls(
                    config, layout, attention, backward, device
                )
                what = "forward + backward" if backward else "forward"
                sizes = {"rows": ROWS, "tokens": layout.length, "width": config.inner_dim, "calls": CALLS}
                yield Case(f"joint block by {attention}, {layout.length} tokens, {what}", sizes, build)


def check_gpu() -> None:
    """Raises UserError unless both JAX and PyTorch see a GPU."""
    need("torch")
    import torch

    if jax.default_backend() != "gpu" or not torch.cuda.is_available():
        raise UserError(
            "suite joint_block_gpu needs a GPU that JAX and PyTorch both see: install CUDA builds of both (docs/gpu.md)"
        )


def block_calls(
    config: MMDiTConfig, layout: TokenLayout, attention: str, backward: bool, device: str
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(ours, PyTorch's): functions of nothing that do `CALLS` calls with the same weights and inputs."""
    import torch

    block = torch_joint_block(config)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), joint_block_params(config, block))
    block = block.to(device, torch.bfloat16)
    arrays = block_arrays(config, layout.image_length)
    ours = our_call(config, layout, params, arrays, attention, backward)
    return ours, their_call(block, arrays, backward, device)


def block_arrays(config: MMDiTConfig, image_tokens: int, seed: int = 0) -> list[np.ndarray]:
    """Image tokens, text tokens, temb and the gradients of both outputs, float32, for `ROWS` rows."""
    rng = np.random.default_rng(seed)
    shapes = ((ROWS, image_tokens, config.inner_dim), (ROWS, TEXT_TOKENS, config.inner_dim))
    return [rng.standard_normal(shape, np.float32) for shape in (*shapes, (ROWS, config.inner_dim), *shapes)]


def our_call(
    config: MMDiTConfig, layout: TokenLayout, params: dict, arrays: list[np.ndarray], attention: str, backward: bool
) -> Callable[[], Any]:
    """Our block; backwards it returns the gradients of parameters, image, text and temb."""
    unseen = layout.output_tokens if layout.current_unseen else 0
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    block = JointBlock(
        config.num_attention_heads, config.attention_head_dim, attention=attention, unseen=unseen, **dtypes
    )
    geometry = jax.device_put(layout.geometry(np.ones((ROWS, TEXT_TOKENS), np.int32)))
    image, text, conditioning, *gradients = (jnp.asarray(array, jnp.bfloat16) for array in arrays)

    def forward(params: dict, image: jax.Array, text: jax.Array, conditioning: jax.Array) -> Any:
        return block.apply({"params": params}, image, text, jax.nn.silu(conditioning), geometry)

    def pull(primals: tuple, gradients: tuple) -> Any:
        outputs, pullback = jax.vjp(forward, *primals)
        return pullback(tuple(g.astype(o.dtype) for g, o in zip(gradients, outputs, strict=True)))

    primals = (params, image, text, conditioning)
    call = jax.jit(pull if backward else lambda primals, gradients: forward(*primals))

    def run() -> Any:
        for _ in range(CALLS):
            result = call(primals, tuple(gradients))
        return jax.block_until_ready(result)

    return run


def their_call(block: Any, arrays: list[np.ndarray], backward: bool, device: str) -> Callable[[], Any]:
    """`diffusers`' block; backwards it returns the gradients of image, text and temb and leaves those of parameters."""
    import torch

    image, text, conditioning, *gradients = (torch.from_numpy(a).to(device, torch.bfloat16) for a in arrays)

    def call() -> Any:
        if not backward:
            with torch.no_grad():
                return block(image, text, conditioning)[::-1]
        block.zero_grad(set_to_none=True)
        leaves = [x.detach().requires_grad_() for x in (image, text, conditioning)]
        torch.autograd.backward(block(*leaves)[::-1], gradients)
        return tuple(leaf.grad for leaf in leaves)

    def run() -> Any:
        for _ in range(CALLS):
            result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return run
