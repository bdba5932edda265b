"""What a graph for the device is: its inputs, parameters, function to trace, and the model it must agree with."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nd_jax.errors import UserError
from nd_jax.generate.model_folder import TRANSFORMER
from nd_jax.weights.folder import Component
from nd_jax.weights.network import Network


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, static shape and numpy dtype name of a graph input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Graph:
    """One graph, ready to trace.

    Attributes:
      name: also the file name.
      inputs: in the order of `apply`'s arguments.
      outputs: in the order of `apply`'s results.
      params: nested dictionaries of float32 arrays. Every leaf becomes an initializer named by its path.
      apply: (params, *inputs) -> tuple of outputs; traced.
      reference: (*inputs) -> tuple of outputs by the model that training uses, on unchanged weights.
      sample: random generator -> one valid set of inputs by name.
      native_ops: how often each native operator must appear once they are restored; "A or B" for both together.
      expand_gelu: write GELU in elementary operators afterwards.
      carried: output name -> name of the input that takes it at the next call.
      notes: what the builder decided, for the report.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    params: dict[str, Any]
    apply: Callable[..., tuple]
    reference: Callable[..., tuple]
    sample: Callable[[np.random.Generator], dict[str, np.ndarray]]
    native_ops: Mapping[str, int]
    expand_gelu: bool = False
    carried: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class GraphOptions:
    """What a user may choose for a graph.

    Attributes:
      batch, length: static sizes of the token inputs.
      residual_scale: "auto", "none" or a power of two, see `converters.residual_scale`.
      gelu: "expanded" or "native", in the text networks; see `onnx_gelu.expand_gelu`.
      calibration: token ids and masks, int32 [N, length] each, that `auto` measures on; None for random ids.
      seed: of random calibration ids.
      latent_height, latent_width: of the video's latents, an eighth of its pixels.
      latent_frames: of the whole video.
      height, width: of the video's frames, in pixels.
      image_latent_height, image_latent_width: of the latents of the first frame's picture.
      context_length: text tokens of the first frame.
      blocks: (first, one past the last) of a transformer's blocks; None for all.
      transformer: the transformer's subfolder.
    """

    batch: int = 1
    length: int = 128
    residual_scale: str = "auto"
    gelu: str = "expanded"
    calibration: tuple[np.ndarray, np.ndarray] | None = None
    seed: int = 0
    latent_height: int = 40
    latent_width: int = 64
    latent_frames: int = 7
    height: int = 320
    width: int = 512
    image_latent_height: int = 80
    image_latent_width: int = 128
    context_length: int = 77
    blocks: tuple[int, int] | None = None
    transformer: str = TRANSFORMER


def component_of(components: Mapping[str, Component], folder: str, network: Network) -> Component:
    """The component of a subfolder.

    Raises:
      UserError: it is of another class.
    """
    component = components[folder]
    if component.network.name != network.name:
        raise UserError(f"{folder} holds a {component.network.name}; this graph needs a {network.name}")
    return component
