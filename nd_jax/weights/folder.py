"""Component folders of the released layout: config.json beside one weights file, or shards behind an index.

Tensors stream: a component's arrays are allocated once, stacked blocks included, and filled run by run; a file is
written run by run. Peak memory is the component plus one run of rows.
"""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from nd_jax.errors import UserError
from nd_jax.files import replacing_folder
from nd_jax.weights.buffers import check_buffers, make_buffers
from nd_jax.weights.network import Network, abstract_params, flat_shapes
from nd_jax.weights.networks import network_of
from nd_jax.weights.safetensors_io import (
    TORCH_METADATA,
    SafetensorsFile,
    build_header,
    parse_header,
    row_runs,
    write_safetensors,
)
from nd_jax.weights.sources import (
    WEIGHT_SUFFIXES,
    ShardedSource,
    TensorSource,
    hash_files,
    listing,
    open_source,
    read_json,
)
from nd_jax.weights.table import Tensor, expand, flatten, unflatten

BUFFER_LIMIT_BYTES = 1 << 20
ALIGNMENT = 64  # bytes; of XLA's buffers
OnBytes = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Component:
    """One network with its weights.

    Attributes:
      network: which one.
      config: its dataclass.
      params: nested dictionaries of arrays in our layout (blocks stacked on axis 0).
      origin: where it was read from; None for what was made here.
    """

    network: Network
    config: Any
    params: dict
    origin: "Origin | None" = None


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a component was read from, and how it was spelled there, so that the same bytes can be written again.

    The spelling is empty when the source was not safetensors, or held more than the component.

    Attributes:
      source: the folder or file.
      sha256: of its config.json and weights (`component_hash`), empty until someone has computed it.
      config_text: its config.json.
      headers: weights file name -> safetensors header: which of the tied keys it holds, dtypes, order, metadata.
      index: (file name, text) of the shard index, or None.
      buffers: the constant buffers of the checkpoint, which are no parameters, unless the config makes the same.
    """

    source: str
    sha256: str = ""
    config_text: str = ""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    index: tuple[str, str] | None = None
    buffers: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_config(folder: Path, expected: Network | None = None) -> tuple[Network, Any, dict[str, Any]]:
    """(network, its config, config.json's dictionary) of a component folder.

    Args:
      folder: the folder, or a config.json itself.
      expected: the network to read it as; by default the one that the file's class names.

    Raises:
      UserError: no config.json, an unsupported class, or values that the network refuses.
    """
    folder = Path(folder)
    path = folder if folder.is_file() else folder / "config.json"
    raw = read_json(path)
    network = expected or network_of(raw, str(path))
    try:
        return network, network.read_config(raw), raw
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a config of {network.name} ({error}); correct the file") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def load_component(
    folder: Path,
    network: Network | None = None,
    dtype: Any = None,
    read_tensor_source: Callable[[Path], TensorSource] = open_source,
    on_bytes: OnBytes = lambda count: None,
) -> Component:
    """Reads a component folder.

    Args:
      folder: holds config.json and weights.
      network: the network to read it as; by default the one that config.json names.
      dtype: dtype of the parameters; by default that of the file, tensor by tensor.
      read_tensor_source: opens the weights; `converters.torch_files.open_torch_source` reads PyTorch's own files.
      on_bytes: called with the number of bytes after each run of rows.

    Raises:
      UserError: bad config, damaged weights, or tensors that do not fit the network, all of them in one message.
    """
    folder = Path(folder)
    network, config, _ = read_config(folder, network)
    with contextlib.closing(read_tensor_source(folder)) as source:
        # Before the parameters: comparing the constant buffers takes memory of its own.
        origin = read_origin(network, config, folder / "config.json", source, str(folder))
        params = load_params(network, config, source, str(folder), dtype, on_bytes)
    return Component(network, config, params, origin)


def load_params(
    network: Network,
    config: Any,
    source: TensorSource,
    where: str,
    dtype: Any = None,
    on_bytes: OnBytes = lambda count: None,
) -> dict:
    """Parameters of a network out of a tensor source; `where` names the source in messages. See `load_component`."""
    shapes = flat_shapes(network, config)
    tensors = list(expand(network.table(config), shapes))
    check_tensors(network, tensors, source, where)
    check_buffers(network, config, source, where)
    params: dict[str, np.ndarray] = {}
    held = frozenset(source.keys())
    present = [[key for key in tensor.keys if key in held] for tensor in tensors]
    dtypes = _param_dtypes(tensors, present, source) if dtype is None else dict.fromkeys(shapes, np.dtype(dtype))
    for tensor, keys in zip(tensors, present, strict=True):
        path = tensor.weight.path
        if path not in params:
            params[path] = _empty(shapes[path], dtypes[path])
        # Ellipsis keeps a scalar a view.
        ours = params[path][...] if tensor.block is None else params[path][tensor.block, ...]
        _fill(tensor.weight.turn.theirs(ours), keys, source, where, on_bytes)
    return unflatten(params)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`numpy.empty` at an address that JAX computes on; it would copy others for every call, all parameters at once."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _param_dtypes(tensors: list[Tensor], present: list[list[str]], source: TensorSource) -> dict[str, np.dtype]:
    """Our path -> dtype. Blocks of unlike dtypes share the smallest one that holds all of them exactly."""
    dtypes: dict[str, np.dtype] = {}
    for tensor, keys in zip(tensors, present, strict=True):
        found = source.dtype(keys[0])
        before = dtypes.get(tensor.weight.path, found)
        dtypes[tensor.weight.path] = _common_dtype(before, found)
    return dtypes


def _common_dtype(one: np.dtype, other: np.dtype) -> np.dtype:
    if np.can_cast(one, other):
        return other
    return one if np.can_cast(other, one) else np.dtype(np.float32)  # float16 with bfloat16, and the like.


def _fill(out: np.ndarray, keys: list[str], source: TensorSource, where: str, on_bytes: OnBytes) -> None:
    """Copies a tensor into `out`, a view in their layout, and checks that tied keys hold the same values."""
    key, *others = keys
    for start, stop in row_runs(out.shape, source.dtype(key).itemsize):
        rows = source.read(key, start, stop)
        if out.ndim:
            out[start:stop] = rows
        else:
            out[...] = rows
        on_bytes(rows.nbytes)
        for other in others:
            if source.read(other, start, stop).tobytes() != rows.tobytes():
                raise UserError(
                    f"{where}: {other} and {key} are one tied weight but hold different values; remove the wrong one"
                )


def check_tensors(network: Network, tensors: list[Tensor], source: TensorSource, where: str) -> None:
    """Raises one UserError that lists everything in which the source does not fit the network."""
    keys = set(source.keys())
    known = {key for tensor in tensors for key in tensor.keys}
    missing = [" or ".join(t.keys) for t in tensors if not keys & set(t.keys)]
    extra = [] if network.partial else sorted(key for key in keys - known if not is_ignored(network, key))
    misshapen, not_float = [], []
    for tensor in tensors:
        for key in sorted(keys & set(tensor.keys)):
            if source.shape(key) != tensor.shape:
                misshapen.append(f"{key} {list(source.shape(key))} instead of {list(tensor.shape)}")
            if not jnp.issubdtype(source.dtype(key), jnp.floating):
                not_float.append(f"{key} {source.dtype(key)}")
    problems = [
        f"{len(names)} {what}: {listing(names)}"
        for what, names in (
            ("missing", missing),
            ("extra", extra),
            ("misshapen", misshapen),
            ("not floating-point", not_float),
        )
        if names
    ]
    if problems:
        raise UserError(
            f"{where}: tensors do not fit {network.name}: {'; '.join(problems)}; "
            "check that config.json and weights belong together and are of this class"
        )


def is_ignored(network: Network, key: str) -> bool:
    """Whether a key is one that checkpoints carry beside the parameters."""
    return any(re.fullmatch(pattern, key) for pattern in network.ignored)


def read_origin(network: Network, config: Any, config_file: Path, source: TensorSource, where: str) -> Origin:
    """Provenance and spelling of an open source that was read as `network`."""
    origin = Origin(where)
    files = list(source.files.values()) if isinstance(source, ShardedSource) else [source]
    if network.partial or not all(isinstance(file, SafetensorsFile) for file in files):
        return origin
    computed = network.buffers(config)
    ignored = [(f, key) for f in files for key in f.keys() if is_ignored(network, key) and key not in computed]
    if sum(file.infos[key].stop - file.infos[key].start for file, key in ignored) > BUFFER_LIMIT_BYTES:
        return origin
    index = source.index if isinstance(source, ShardedSource) else None
    return dataclasses.replace(
        origin,
        config_text=config_file.read_text(encoding="utf-8"),
        headers={file.path.name: file.header for file in files},
        index=None if index is None else (index.name, index.read_text(encoding="utf-8")),
        buffers={key: file.read(key) for file, key in ignored} | check_buffers(network, config, source, where),
    )


def component_hash(folder: Path) -> str:
    """sha256 over config.json, index and weights files of a component folder: the provenance of a frozen teacher."""
    files = [p for p in Path(folder).iterdir() if p.suffix in WEIGHT_SUFFIXES or p.name.endswith(".index.json")]
    config = Path(folder) / "config.json"
    return hash_files([*files, *([config] if config.is_file() else [])])


# --- writing ----------------------------------------------------------------------------------------------------------


def save_component(
    folder: Path,
    network: Network,
    config: Any,
    params: Mapping[str, Any],
    dtype: Any = None,
    extra_config: Mapping[str, Any] | None = None,
    origin: Origin | None = None,
    on_bytes: OnBytes = lambda count: None,
) -> None:
    """Writes a component folder that the released class loads with `strict=True`.

    Without `origin` every tied key is written, to one file, in the order of the `safetensors` library. The folder
    appears only when it is complete; a component folder that has the name is replaced then.

    Args:
      folder: the destination.
      network: the network.
      config: its dataclass.
      params: arrays (numpy or JAX) in our layout.
      dtype: dtype of the file; by default that of each array.
      extra_config: further entries of config.json.
      origin: spell the folder as the released one did (same files, keys, order and metadata, byte for byte where the
        values are those that were read). A `dtype` keeps of it config.json only.
      on_bytes: called with the number of bytes after each run of rows.

    Raises:
      UserError: the destination is a folder of something else, cannot be written, or the disk is full.
      ValueError: params and config do not belong together.
    """
    flat = flatten(params)
    shapes = {path: leaf.shape for path, leaf in flatten(abstract_params(network, config)).items()}
    unlike = [p for p in sorted(set(flat) | set(shapes)) if p not in flat or np.shape(flat[p]) != shapes.get(p)]
    if unlike:
        raise ValueError(f"parameters do not fit the config of {network.name}: {listing(unlike)}")
    tensors = {key: tensor for tensor in expand(network.table(config), shapes) for key in tensor.keys}
    arrays = {path: np.asarray(leaf) for path, leaf in flat.items()}
    computed = make_buffers(network, config)

    spelled = origin is not None and bool(origin.headers)
    if not spelled or dtype is not None:
        specs = {
            key: (np.dtype(dtype) if dtype is not None else arrays[t.weight.path].dtype, t.shape)
            for key, t in tensors.items()
        }
        specs |= {key: (np.dtype(dtype or array.dtype), array.shape) for key, array in computed.items()}
        headers, index, buffers = {network.weights_file: build_header(specs, TORCH_METADATA)}, None, computed
    else:
        headers, index, buffers = origin.headers, origin.index, computed | dict(origin.buffers)

    with replacing_folder(Path(folder)) as temporary:
        text = origin.config_text if spelled else _json_text(network.write_config(config))
        changes = {**(extra_config or {}), **_dtype_entries(text, dtype)}
        text = _json_text({**json.loads(text), **changes}) if changes else text
        (temporary / "config.json").write_text(text, encoding="utf-8")
        if index is not None:
            (temporary / index[0]).write_text(index[1], encoding="utf-8")
        for name, header in headers.items():
            infos = parse_header(header)

            def tensor(key: str, infos=infos) -> np.ndarray:
                array = buffers[key] if key in buffers else _theirs(tensors[key], arrays)
                return _cast(array, infos[key].dtype, key)

            write_safetensors(temporary / name, header, tensor, on_bytes)


def _theirs(tensor: Tensor, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    array = arrays[tensor.weight.path]
    return tensor.weight.turn.theirs(array if tensor.block is None else array[tensor.block])


def _cast(array: np.ndarray, dtype: np.dtype, key: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all() and np.isfinite(array).all():
        largest = float(np.abs(array).max())
        raise UserError(f"{key}: its largest value {largest:g} does not fit {dtype}; export as bfloat16 or float32")
    return cast


def _json_text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def _dtype_entries(config_text: str, dtype: Any) -> dict[str, str]:
    """The entries of config.json that name the weights' dtype, corrected."""
    if dtype is None:
        return {}
    return {name: np.dtype(dtype).name for name in ("torch_dtype", "dtype") if name in json.loads(config_text)}
