"""The public TAEHV checkpoints (github.com/madebyollin/taehv): the decoder that Neodragon's tiny one grew from.

A file holds `decoder.{k}` where the released `AsymmetricCausalVideoVAE` has `decoder.blocks.{k}`, in the same order,
and an encoder, which is not read. Its widths and the groups that double the frames are seen from the shapes.
"""

from pathlib import Path

import numpy as np

from nd_jax.errors import UserError
from nd_jax.models.taehv import GROUPS, TAEHVConfig
from nd_jax.models.video_vae import AsymmetricVideoVAEConfig
from nd_jax.weights.network import flat_shapes
from nd_jax.weights.sources import TensorSource, open_source
from nd_jax.weights.table import expand, to_ours
from nd_jax.weights.vae import ASYMMETRIC_VIDEO_VAE, TINY_FIRST_GROUP, TINY_GROUP_LENGTH, tiny_decoder_table

THEIRS, OURS = "decoder.", "decoder.blocks."


def taehv_sizes(path: Path) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """(widths of the groups and of the last convolution, which groups double the frames) of a file.

    Raises:
      UserError: not a safetensors file, or one that holds no such decoder.
    """
    source = _open(path)
    try:
        grow = [_shape(source, path, f"{THEIRS}{_first(group) + 4}.conv.weight") for group in range(GROUPS)]
        last = _shape(source, path, f"{THEIRS}{_first(GROUPS - 1) + 5}.weight")
    finally:
        source.close()
    return (*(shape[1] for shape in grow), last[0]), tuple(shape[0] == 2 * shape[1] for shape in grow)


def read_taehv(path: Path, wanted: TAEHVConfig) -> tuple[dict, tuple[bool, ...]]:
    """(parameters of a `TAEHVDecoder`, which of its groups double the frames).

    Args:
      path: a safetensors file.
      wanted: the decoder that it shall grow into; everything but its doublings must be that of the file.

    Raises:
      UserError: a tensor is missing or has another shape.
    """
    features, doubles = taehv_sizes(path)
    config = AsymmetricVideoVAEConfig(
        encoder_out_channels=wanted.latent_channels,
        encoder_in_channels=wanted.out_channels,
        decoder_num_features=features,
        decoder_time_upscale=doubles,
        decoder_space_upscale=wanted.space_upscale,
    )
    ours = lambda path: path.startswith("decoder/")
    table = tuple(weight for weight in tiny_decoder_table(config) if ours(weight.path))
    shapes = {path: shape for path, shape in flat_shapes(ASYMMETRIC_VIDEO_VAE, config).items() if ours(path)}
    source, tensors = _open(path), {}
    try:
        for tensor in expand(table, shapes):
            (released,) = tensor.keys
            key = THEIRS + released.removeprefix(OURS)
            found = _shape(source, path, key)
            if found != tuple(tensor.shape):
                raise UserError(f"{path}: {key} has the shape {list(found)}, and {list(tensor.shape)} is needed")
            tensors[released] = source.read(key).astype(np.float32)
    finally:
        source.close()
    return to_ours(tensors, table, shapes)["decoder"], doubles


def _first(group: int) -> int:
    return TINY_FIRST_GROUP + group * TINY_GROUP_LENGTH


def _open(path: Path) -> TensorSource:
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: TAEHV weights are read from .safetensors alone; the public repository has them, too")
    return open_source(path)


def _shape(source: TensorSource, path: Path, key: str) -> tuple[int, ...]:
    if key not in source.keys():
        raise UserError(f"{path}: has no tensor {key}; give a TAEHV checkpoint with 3 x 3 memory blocks")
    return tuple(source.shape(key))
