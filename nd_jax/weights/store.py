"""The store of imported weights: one Orbax checkpoint per component, and `model.json` that says what they are.

STORE/model.json             networks, sources and their hashes, file sizes, spelling of the released files
STORE/NAME/config.json       config of the component, as in its released folder
STORE/NAME/params/           Orbax PyTree checkpoint of the parameters, in our layout and the source's dtypes
STORE/NAME/buffers.safetensors   constant buffers of the source, if it had any
STORE/tokenizer*/            copied as they are
"""

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from nd_jax.errors import UserError, first_line
from nd_jax.files import replacing_folder
from nd_jax.weights.folder import Component, Origin, read_config
from nd_jax.weights.networks import NETWORKS, flat_shapes
from nd_jax.weights.safetensors_io import TORCH_METADATA, SafetensorsFile, build_header, write_safetensors
from nd_jax.weights.sources import is_plain_name, listing, read_json
from nd_jax.weights.table import flatten, unflatten

INDEX = "model.json"
FORMAT = "nd_jax.store.1"
BUFFERS = "buffers.safetensors"


def save_store(
    directory: Path,
    components: Mapping[str, Component] | Iterable[tuple[str, Component]],
    source: str,
    folders: Mapping[str, Path] | None = None,
) -> dict[str, Any]:
    """Writes a store; it appears under its name when it is complete, and replaces an older store only then.

    Args:
      directory: the destination.
      components: name -> component, or pairs from a generator that loads one component at a time; one is held at once.
      source: what was imported, for the record.
      folders: name -> folder to copy along (tokenizers).

    Returns:
      What `model.json` holds.

    Raises:
      UserError: the destination is something else, cannot be written, or the disk is full.
    """
    directory = Path(directory).absolute()
    index: dict[str, Any] = {"format": FORMAT, "source": source, "components": {}, "folders": sorted(folders or {})}
    pairs = iter(components.items() if isinstance(components, Mapping) else components)
    with replacing_folder(directory, INDEX) as temporary:
        # `next` instead of a `for`, whose variable would keep a component while the next one is being loaded.
        while (pair := next(pairs, None)) is not None:
            name, component = pair
            index["components"][name] = _save_component(temporary / name, component)
            del pair, component
        for name, folder in (folders or {}).items():
            shutil.copytree(folder, temporary / name)
        (temporary / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return index


def _save_component(folder: Path, component: Component) -> dict[str, Any]:
    network, origin = component.network, component.origin
    params = jax.tree.map(np.asarray, component.params)
    leaves = jax.tree.leaves(params)
    size, free = sum(leaf.nbytes for leaf in leaves), shutil.disk_usage(folder.parent).free
    if size > free:
        # Found here, a full disk is one line; within Orbax it is a page of tracebacks of its threads.
        raise UserError(f"{folder.name}: needs {size} bytes and the disk has {free}; free space and run again")
    folder.mkdir()
    config_text = origin.config_text if origin and origin.config_text else None
    text = config_text or json.dumps(network.write_config(component.config), indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    if origin and origin.buffers:
        specs = {key: (array.dtype, array.shape) for key, array in origin.buffers.items()}
        write_safetensors(folder / BUFFERS, build_header(specs, TORCH_METADATA), lambda key: origin.buffers[key])
    # Saving is synchronous, so Orbax need not copy the arrays first. One uncompressed file per parameter is written
    # straight from its array; OCDBT or smaller chunks would hold hundreds of megabytes of copies.
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False, type_handler_registry=registry)
    with _quiet(), ocp.Checkpointer(handler) as checkpointer:
        try:
            checkpointer.save(folder / "params", args=ocp.args.PyTreeSave(params))
        except ValueError as error:  # TensorStore's errors, a full disk among them.
            raise UserError(f"{folder}: cannot be written ({first_line(error)}); free space and run again") from error
    return {
        "network": network.name,
        "source": origin.source if origin else None,
        "sha256": origin.sha256 if origin else None,
        "parameters": sum(leaf.size for leaf in leaves),
        "bytes": size,
        "dtypes": sorted({leaf.dtype.name for leaf in leaves}),
        "headers": dict(origin.headers) if origin else {},
        "index": list(origin.index) if origin and origin.index else None,
        "files": {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()},
    }


def is_store(directory: Path) -> bool:
    """Whether a folder is a store of imported weights."""
    return (Path(directory) / INDEX).is_file()


def read_store(directory: Path) -> dict[str, Any]:
    """What `model.json` holds, checked.

    Raises:
      UserError: not a store, or one that is damaged.
    """
    path = Path(directory) / INDEX
    index = read_json(path)
    if index.get("format") != FORMAT:
        raise UserError(f"{path}: format {index.get('format')!r} is not {FORMAT!r}; import the weights again")
    names = [*index.get("components", {}), *index.get("folders", [])]
    for entry in index.get("components", {}).values():
        names += [*entry["headers"], *(entry["index"] or ())[:1]]
    if not all(is_plain_name(name) for name in names):
        raise UserError(f"{path}: names a file outside of the store; import the weights again")
    return index


def load_store(
    directory: Path,
    names: Iterable[str] | None = None,
    shardings: Mapping[str, Any] | None = None,
    dtype: Any = None,
) -> dict[str, Component]:
    """Components of a store, all or those named. `shardings` maps names to trees, see `load_stored`."""
    known = read_store(directory)["components"]
    return {
        name: load_stored(directory, name, (shardings or {}).get(name), dtype)
        for name in (known if names is None else names)
    }


def load_stored(directory: Path, name: str, shardings: Any = None, dtype: Any = None) -> Component:
    """One component of a store.

    Args:
      directory: the store.
      name: the component.
      shardings: a tree like the parameters of `jax.sharding.Sharding`; the result then holds JAX arrays, else numpy.
      dtype: dtype of the result; by default that of the store.

    Raises:
      UserError: no such store or component, or it is damaged.
    """
    directory = Path(directory).absolute()
    known = read_store(directory)["components"]
    if name not in known:
        raise UserError(f"{directory}: has no component {name!r}; it has {', '.join(sorted(known)) or 'none'}")
    entry, folder = known[name], directory / name
    network = next((n for n in NETWORKS if n.name == entry.get("network")), None)
    if network is None:
        raise UserError(f"{directory / INDEX}: network {entry.get('network')!r} is not known; import the weights again")
    wrong = [
        f for f, size in entry["files"].items() if not (folder / f).is_file() or (folder / f).stat().st_size != size
    ]
    if wrong:
        raise UserError(f"{folder}: damaged, absent or truncated are {listing(wrong)}; import the weights again")
    _, config, _ = read_config(folder, network)
    shapes = flat_shapes(network, config)
    leaf_args = (
        dict.fromkeys(shapes, ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype))
        if shardings is None
        else {p: ocp.ArrayRestoreArgs(sharding=s, dtype=dtype) for p, s in flatten(shardings).items()}
    )
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, _LargestFirst({path.replace("/", "."): math.prod(shape) for path, shape in shapes.items()})),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
        try:
            params = checkpointer.restore(
                folder / "params", args=ocp.args.PyTreeRestore(restore_args=unflatten(leaf_args))
            )
        except (ValueError, KeyError, OSError) as error:
            raise UserError(f"{folder}: cannot be read ({first_line(error)}); import the weights again") from error
    found = {path: leaf.shape for path, leaf in flatten(params).items()}
    unlike = [p for p in sorted(set(found) | set(shapes)) if found.get(p) != shapes.get(p)]
    if unlike:
        raise UserError(f"{folder}: parameters do not fit config.json: {listing(unlike)}; import the weights again")
    return Component(network, config, params, _origin(folder, entry))


class _LargestFirst(ocp.type_handlers.NumpyHandler):
    """Reads one parameter after another, the largest first.

    While a parameter is read, TensorStore holds its file beside the array. Orbax reads all of them at once, which was
    1.4 times the component; in this order the file of the largest parameter goes before the others come.
    """

    def __init__(self, sizes: Mapping[str, int]):
        """`sizes`: name of a parameter, with dots between the parts of its path -> number of values."""
        super().__init__()
        self._sizes = sizes

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> list[np.ndarray]:
        args = args or [ocp.RestoreArgs()] * len(infos)
        arrays: list[Any] = [None] * len(infos)
        for i in sorted(range(len(infos)), key=lambda i: -self._sizes.get(infos[i].name, 0)):
            (arrays[i],) = await super().deserialize([infos[i]], [args[i]])
        return arrays


def _origin(folder: Path, entry: Mapping[str, Any]) -> Origin | None:
    if entry["source"] is None:
        return None
    buffers = {}
    if (folder / BUFFERS).is_file():
        with SafetensorsFile(folder / BUFFERS) as file:
            buffers = {key: file.read(key) for key in file.keys()}
    return Origin(
        entry["source"],
        entry["sha256"],
        (folder / "config.json").read_text(encoding="utf-8"),
        entry["headers"],
        tuple(entry["index"]) if entry["index"] else None,
        buffers,
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax warns that there are no OCDBT files to merge (none were asked for), and logs errors that are raised too."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
