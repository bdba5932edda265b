"""Where tensors come from: one file, or a set of shards behind an index.

`open_source` serves safetensors; `converters.torch_files` offers the same for PyTorch's own files. Files of a model
folder are foreign: a path in an index that leaves the folder is refused.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nd_jax.errors import UserError
from nd_jax.weights.safetensors_io import SafetensorsFile

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".tar")
HASH_RUN_BYTES = 1 << 22


class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    def keys(self) -> list[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str) -> np.dtype: ...

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of the first axis (all by default) in a fresh, row-major array."""
        ...

    def close(self) -> None: ...


class ShardedSource:
    """Several open files as one source; `files` maps file name -> source in the order of the file `index`."""

    def __init__(self, index: Path, files: Mapping[str, TensorSource]):
        self.index = index
        self.files = dict(files)
        self._owner: dict[str, TensorSource] = {}
        for name, source in self.files.items():
            twice = sorted(set(source.keys()) & set(self._owner))
            if twice:
                raise UserError(f"{name}: tensor {twice[0]} is also in another shard; keep one of the two")
            self._owner.update(dict.fromkeys(source.keys(), source))

    def keys(self) -> list[str]:
        return list(self._owner)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._owner[key].shape(key)

    def dtype(self, key: str) -> np.dtype:
        return self._owner[key].dtype(key)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self._owner[key].read(key, start, stop)

    def close(self) -> None:
        for source in self.files.values():
            source.close()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when the file is absent, not JSON, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give a model folder in the released layout") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy or download the file again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds {type(value).__name__}, not a JSON object; copy or download the file again")
    return value


def shard_names(index: Path) -> list[str]:
    """The shard files that an index names, in the order of their first appearance.

    Raises:
      UserError: no weight_map, a name that is not a plain file name in the index's folder, or a shard that is absent.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map; copy or download the index again")
    for name in weight_map.values():
        if not isinstance(name, str) or not is_plain_name(name):
            raise UserError(f"{index}: names the shard {name!r}, which is not a file of its own folder; refused")
    names = list(dict.fromkeys(weight_map.values()))
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise UserError(
            f"{index}: {len(absent)} of {len(names)} shards are absent: {listing(absent)}; copy or download them"
        )
    return names


def open_sharded(index: Path, open_file: Callable[[Path], TensorSource]) -> ShardedSource:
    """Opens the shards of an index and checks that they hold the tensors that it names."""
    with contextlib.ExitStack() as stack:
        files = {}
        for name in shard_names(index):
            files[name] = open_file(index.parent / name)
            stack.callback(files[name].close)
        source = ShardedSource(index, files)
        weight_map = read_json(index)["weight_map"]
        astray = [k for k, name in weight_map.items() if k not in files[name].keys()]
        if astray:
            raise UserError(
                f"{index}: {len(astray)} tensors are not in the shard it names: {listing(astray)}; "
                "index and shards are of different versions: copy or download all of them again"
            )
        stack.pop_all()
    return source


def open_source(path: Path) -> SafetensorsFile | ShardedSource:
    """The safetensors weights of a file or a component folder.

    Raises:
      UserError: none, or more than one candidate.
    """
    if path.is_file():
        return SafetensorsFile(path)
    weights = find_weights(path, (".safetensors",))
    if weights is None:
        raise UserError(f"{path}: holds no .safetensors weights; give a component folder with config.json and weights")
    return open_sharded(weights, SafetensorsFile) if weights.suffix == ".json" else SafetensorsFile(weights)


def find_weights(folder: Path, suffixes: tuple[str, ...]) -> Path | None:
    """The index, else the one weights file with one of these suffixes, else None.

    Files for another precision beside the plain ones (`model.fp16.safetensors`) are left aside.

    Raises:
      UserError: several files fit.
    """
    for what, candidates in (
        ("indexes", [p for s in suffixes for p in sorted(folder.glob(f"*{s}.index.json"))]),
        ("weights files", [p for s in suffixes for p in sorted(folder.glob(f"*{s}"))]),
    ):
        plain = [p for p in candidates if p.name.count(".") == (3 if what == "indexes" else 1)] or candidates
        if len(plain) == 1:
            return plain[0]
        if plain:
            raise UserError(
                f"{folder}: holds {len(plain)} {what} ({listing([p.name for p in plain])}); keep the one that is meant"
            )
    return None


def is_plain_name(name: str) -> bool:
    """Whether a name from a foreign file stays inside its folder."""
    return bool(name) and name not in (".", "..") and not any(c in name for c in ("/", "\\", "\0"))


def listing(names: list[str], limit: int = 10) -> str:
    """Up to `limit` names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more


def hash_files(paths: list[Path]) -> str:
    """sha256 over names and contents of files, in the order of their names; streamed."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            while block := file.read(HASH_RUN_BYTES):
                digest.update(block)
    return digest.hexdigest()
