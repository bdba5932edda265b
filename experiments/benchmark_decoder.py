"""Benchmark cases of the tiny decoder, side by side with the same network in PyTorch.

Both sides stream: one latent frame in, eight video frames out, nine carried states, the same weights, float32. That of
PyTorch is written out of its layers here, in channels-last memory, because the public class decodes all frames at
once, which at 49 frames of 320 x 512 needs more memory than the machines that decode have.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.packages import need
from experiments.benchmark_case import Case
from nd_jax.models.taehv import GROUPS, MEMORY_BLOCKS, TAEHVConfig, TAEHVDecoder, initial_states

LATENT_SIZE = (40, 64)


def torch_decoder(config: TAEHVConfig, params: dict) -> Any:
    """`TAEHVDecoder.stream` in PyTorch: (latent [B, C, h, w], 9 states) -> (list of frames [B, 3, 8h, 8w], states)."""
    need("torch")
    import torch
    from torch.nn import functional

    weights = jax.tree.map(
        lambda x: torch.from_numpy(np.array(x.transpose(3, 2, 0, 1) if x.ndim == 4 else x)).contiguous(
            memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format
        ),
        jax.device_get(params),
    )

    def conv(x: Any, of: dict) -> Any:
        return functional.conv2d(x, of["kernel"], of.get("bias"), padding=of["kernel"].shape[-1] // 2)

    def memory(x: Any, past: Any, of: dict) -> Any:
        y = conv(torch.cat([x, past], dim=1), of["convs_0"]).relu_()
        y = conv(conv(y, of["convs_1"]).relu_(), of["convs_2"])
        return y.add_(x).relu_()

    def stream(latent: Any, states: tuple) -> tuple[list, tuple]:
        frames, following = [conv(3 * torch.tanh(latent / 3), weights["conv_in"]).relu_()], []
        for group in range(GROUPS):
            for index in range(group * MEMORY_BLOCKS, (group + 1) * MEMORY_BLOCKS):
                pasts = [states[index], *frames[:-1]]
                following.append(frames[-1])
                frames = [memory(x, p, weights[f"memory_{index}"]) for x, p in zip(frames, pasts, strict=True)]
            grown = []
            for x in frames:
                if config.space_upscale[group]:
                    x = functional.interpolate(x, scale_factor=2, mode="nearest")
                grown += conv(x, weights[f"grow_{group}"]).chunk(2 if config.time_upscale[group] else 1, dim=1)
            frames = [conv(x, weights[f"conv_{group}"]) for x in grown]
        return [conv(x.relu_(), weights["conv_out"]) for x in frames], tuple(following)

    return stream


def decoder_calls(
    config: TAEHVConfig, params: dict, height: int, width: int, latent_frames: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(ours, PyTorch's): both decode the same random latents and return the frames of the last one."""
    import torch

    rng = np.random.default_rng(0)
    latents = rng.standard_normal((latent_frames, 1, height, width, config.latent_channels), np.float32)
    decoder, on_device = TAEHVDecoder(config), jax.device_put(latents)
    step = jax.jit(lambda params, z, states: decoder.apply({"params": params}, z, states, method="stream"))
    params = jax.device_put(params)

    def ours() -> Any:
        states = initial_states(config, 1, height, width)
        for z in on_device:
            frames, states = step(params, z, states)
        return jax.block_until_ready(frames)

    stream = torch_decoder(config, params)
    last = lambda x: torch.from_numpy(np.array(x.transpose(0, 3, 1, 2))).contiguous(memory_format=torch.channels_last)
    their_latents = [last(z) for z in latents]

    def theirs() -> Any:
        states = tuple(last(np.asarray(s)) for s in initial_states(config, 1, height, width))
        with torch.no_grad():
            for z in their_latents:
                frames, states = stream(z, states)
        return frames

    return ours, theirs


def decoder_cases(config: TAEHVConfig | None = None, size: tuple[int, int] = LATENT_SIZE) -> Iterator[Case]:
    """One latent frame of 320 x 512 pixels, and the seven of a video of 49 frames."""
    config = config or TAEHVConfig()

    def params() -> dict:
        decoder = TAEHVDecoder(config)
        z = jnp.zeros((1, 1, 2, 2, config.latent_channels))
        return jax.jit(lambda: decoder.init(jax.random.key(0), z)["params"])()

    for latent_frames in (1, 7):
        build = lambda count=latent_frames: decoder_calls(config, params(), *size, count)
        frames = config.time_factor * latent_frames - config.dropped_frames
        sizes = {"latent_frames": latent_frames, "height": 8 * size[0], "width": 8 * size[1]}
        yield Case(f"tiny decoder, {latent_frames} latent frames ({frames} video frames)", sizes, build)
