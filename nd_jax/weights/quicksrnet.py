"""QuickSRNet in a component folder, with the keys of `QuickSRNetBase` in the AIMET model zoo.

The zoo publishes a PyTorch checkpoint and, apart from it, a model card; there is no config.json. Ours has the class and
its arguments. A model card is read in its place, so a checkpoint needs nothing else:

    python -m converters.import_torch --source quicksrnet_small_2x_checkpoint_float32.pth.tar --network quicksrnet \
        --config quicksrnet_small_2x_w8a8.json --component quicksrnet --output DIR

AIMET's simulation of quantisation keeps the ranges of values beside the parameters; they are left out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nd_jax.models.quicksrnet import COLOURS, QuickSRNet, QuickSRNetConfig
from nd_jax.weights.network import Network, config_fields
from nd_jax.weights.table import CONV2D, Weight, WeightTable

CLASS = "QuickSRNetBase"
# Of model cards: where they hold the arguments of the class.
CARD_ARGUMENTS = "model_args"


def quicksrnet_table(config: QuickSRNetConfig) -> WeightTable:
    """Rows. `cnn` holds convolution and activation in turn."""
    convs = [("conv_in", "cnn.0")]
    convs += [(f"convs_{i}", f"cnn.{2 * i + 2}") for i in range(config.num_intermediate_layers)]
    convs += [("conv_last", "conv_last")]
    convs += [("anchor", "anchor.net")] if config.use_ito_connection else []
    kernels = [Weight(f"{ours}/kernel", f"{theirs}.weight", CONV2D) for ours, theirs in convs]
    return (*kernels, *(Weight(f"{ours}/bias", f"{theirs}.bias") for ours, theirs in convs))


def _read(json: Mapping[str, Any]) -> QuickSRNetConfig:
    return QuickSRNetConfig(**config_fields(QuickSRNetConfig, json.get(CARD_ARGUMENTS, json)))


QUICKSRNET = Network(
    name="quicksrnet",
    class_names=(CLASS,),
    read_config=_read,
    write_config=lambda config: {"_class_name": CLASS, **dataclasses.asdict(config)},
    module=QuickSRNet,
    inputs=lambda config: (jax.ShapeDtypeStruct((1, 8, 8, COLOURS), jnp.float32),),
    table=quicksrnet_table,
    # At most half a million parameters: every device has all of them.
    logical_axes=(),
    # Ranges of AIMET 1 (learned) and AIMET 2.
    ignored=(r".*_encoding_(min|max)", r".*\.(input|output|param)_quantizers\..*"),
)
