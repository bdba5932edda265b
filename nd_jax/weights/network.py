"""One class of network in a model folder: its config, its module and its weight table in one value."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from nd_jax.errors import UserError
from nd_jax.weights.table import WeightTable, flatten


@dataclasses.dataclass(frozen=True)
class Network:
    """One class of network in a model folder.

    Attributes:
      name: ours, for messages and metadata.
      class_names: values of `architectures` or `_class_name` in config.json that mean this network.
      read_config: config.json's dictionary -> our config.
      write_config: our config -> the released class's config.json.
      module: (config, dtype=, param_dtype=) -> Flax module.
      inputs: config -> abstract inputs for `eval_shape`.
      table: config -> weight table.
      logical_axes: (path pattern, axis names) of the parameters, see `nd_jax.train.sharding`.
      weights_file: name of the weights file when the folder is written.
      partial: True when the file holds more than this network reads (its other tensors are ignored).
      ignored: patterns of keys that published checkpoints carry beside the parameters: constant buffers, and the
        decoder of a whole T5.
      buffers: config -> {key: function that makes the array}: constants that the released class has in its state dict
        and that follow from the config. They are `ignored` among the tensors that are read, have to agree with the
        config where a file holds them, and are written with the parameters.
    """

    name: str
    class_names: tuple[str, ...]
    read_config: Callable[[Mapping[str, Any]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    module: Callable[..., nn.Module]
    inputs: Callable[[Any], tuple]
    table: Callable[[Any], WeightTable]
    logical_axes: tuple
    weights_file: str = "model.safetensors"
    partial: bool = False
    ignored: tuple[str, ...] = ()
    buffers: Callable[[Any], Mapping[str, Callable[[], np.ndarray]]] = lambda config: {}


def abstract_params(network: Network, config: Any, dtype: Any = jnp.float32) -> dict:
    """Parameter tree of `jax.ShapeDtypeStruct`s, without allocating or computing anything."""
    # A tree of the caller's own: the traced one is kept.
    return jax.tree.map(lambda leaf: leaf, _traced_params(network, config, jnp.dtype(dtype)))


@functools.lru_cache(maxsize=64)
def _traced_params(network: Network, config: Any, dtype: np.dtype) -> dict:
    """Traced once: every role and folder of a network asks for its shapes, which adds up to seconds of a start."""
    module = network.module(config, param_dtype=dtype)
    variables = jax.eval_shape(module.init, jax.random.key(0), *network.inputs(config))
    return variables["params"]


def flat_shapes(network: Network, config: Any) -> dict[str, tuple[int, ...]]:
    """Our parameter path -> shape."""
    return {path: leaf.shape for path, leaf in flatten(abstract_params(network, config)).items()}


def config_fields(config_class: type, json: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of config.json that the dataclass has, lists as tuples."""
    names = {f.name for f in dataclasses.fields(config_class)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in json.items() if k in names and v is not None}


# Beside names with a leading underscore: entries of config.json that say nothing about the numbers.
BESIDE_SETTINGS = ("dtype", "torch_dtype")


def strict_config_fields(
    config_class: type,
    json: Mapping[str, Any],
    absent: Mapping[str, Any],
    fixed: Mapping[str, tuple],
    unused: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The entries of config.json that the dataclass has, of a class with many settings: none is passed over in silence.

    Args:
      config_class: the dataclass.
      json: config.json's dictionary.
      absent: what the released class takes for a key that is not there, where that is not what we would take.
      fixed: key -> its supported values, of settings that the dataclass lacks. The first is taken for an absent key.
      unused: keys of settings without effect on the numbers.

    Raises:
      UserError: a setting that is not known, or a value that is not supported.
    """
    names = {f.name for f in dataclasses.fields(config_class)}
    values = {**absent, **json}
    for key, value in values.items():
        if key in fixed and value not in fixed[key]:
            given = "" if key in json else ", the default of the released class"
            supported = " or ".join(map(repr, fixed[key]))
            raise UserError(f"{key} is {value!r}{given}: only {supported} is supported")
        known = key in names or key in fixed or key in unused or key in BESIDE_SETTINGS or key.startswith("_")
        if not known:
            raise UserError(f"{key} is {value!r}: this setting is not supported; leave it out if it changes nothing")
    return {key: _tuples(value) for key, value in values.items() if key in names}


def _tuples(value: Any) -> Any:
    """Lists as tuples, within each other too."""
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value
