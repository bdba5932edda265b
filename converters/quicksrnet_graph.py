"""Graph `quicksrnet`: frames -> frames of r times the rows and columns.

The network is the one of `nd_jax.models.quicksrnet`, unmodified; its last step is DepthToSpace in ONNX's mode CRD.
"""

from collections.abc import Mapping

import jax
import numpy as np

from converters.graph import Graph, GraphOptions, TensorSpec, component_of
from nd_jax.generate.super_resolution import FOLDER
from nd_jax.models.quicksrnet import COLOURS, QuickSRNet
from nd_jax.weights import networks
from nd_jax.weights.folder import Component


def quicksrnet(components: Mapping[str, Component], options: GraphOptions) -> Graph:
    """`frame` [B, H, W, 3] in [0, 1] -> `large_frame` [B, r H, r W, 3] in [0, 1], float32.

    Args:
      components: "quicksrnet".
      options: batch, and height and width of a frame.

    Raises:
      UserError: a component of another class.
    """
    component = component_of(components, FOLDER, networks.QUICKSRNET)
    config = component.config
    frame = (options.batch, options.height, options.width, COLOURS)
    large = (options.batch, *(config.scaling_factor * side for side in frame[1:3]), COLOURS)
    apply = lambda params, frame: (QuickSRNet(config).apply({"params": params}, frame),)
    reference = jax.jit(apply)
    return Graph(
        name="quicksrnet",
        inputs=(TensorSpec("frame", frame, "float32"),),
        outputs=(TensorSpec("large_frame", large, "float32"),),
        params=component.params,
        apply=apply,
        reference=lambda frame: reference(component.params, frame),
        sample=lambda rng: {"frame": rng.random(frame, np.float32)},
        native_ops={
            "Conv": config.num_intermediate_layers + 2 + config.use_ito_connection,
            "Clip": config.num_intermediate_layers + 2,
            "DepthToSpace": 1,
            "Transpose": 2,
        },
        notes={"scaling_factor": config.scaling_factor},
    )
