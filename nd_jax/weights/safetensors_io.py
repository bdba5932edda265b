"""Reading and writing safetensors files tensor by tensor.

The format (https://github.com/huggingface/safetensors): 8 bytes, the header's length as a little-endian integer; the
header, JSON, padded with spaces to a multiple of 8 bytes; then the tensors' bytes, row-major, little-endian, without
gaps.

Reads go through `pread` into fresh arrays instead of a memory map, and both directions work on runs of rows, so that
resident memory is what the caller keeps plus one run. Files written here are byte-identical to those of the
`safetensors` library for the same tensors.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nd_jax.errors import UserError
from nd_jax.files import replacing

# From the lowest to the highest in the library's order: a file holds the highest first, names ascending within a dtype.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in (
        ("BOOL", np.bool_),
        ("U8", np.uint8),
        ("I8", np.int8),
        ("F8_E5M2", ml_dtypes.float8_e5m2),
        ("F8_E4M3", ml_dtypes.float8_e4m3fn),
        ("F8_E8M0", ml_dtypes.float8_e8m0fnu),
        ("I16", np.int16),
        ("U16", np.uint16),
        ("F16", np.float16),
        ("BF16", ml_dtypes.bfloat16),
        ("I32", np.int32),
        ("U32", np.uint32),
        ("F32", np.float32),
        ("C64", np.complex64),
        ("F64", np.float64),
        ("I64", np.int64),
        ("U64", np.uint64),
    )
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
RANKS = {name: rank for rank, name in enumerate(DTYPES)}

MAX_HEADER_BYTES = 100_000_000  # the library's own limit
ROW_RUN_BYTES = 1 << 22
TORCH_METADATA = {"format": "pt"}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in a header; `start` and `stop` are byte offsets behind the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = dict(pairs)
    if len(names) != len(pairs):
        raise ValueError("a name occurs twice")
    return names


def parse_header(text: str) -> dict[str, TensorInfo]:
    """The tensors that a header describes, by offset.

    Raises:
      ValueError: not such a header: unknown dtype, offsets that overlap, leave gaps or disagree with the shape.
    """
    entries = json.loads(text, object_pairs_hook=_unique)
    if not isinstance(entries, dict):
        raise ValueError("it is not a JSON object")
    infos = {}
    for key, entry in entries.items():
        if key == "__metadata__":
            continue
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the entry of {key!r} is not dtype, shape and data_offsets")
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{key!r} has dtype {entry['dtype']!r}, known are {', '.join(DTYPES)}")
        numbers = [*entry["shape"], *entry["data_offsets"]]
        if len(entry["data_offsets"]) != 2 or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{key!r} has shape {entry['shape']} and data_offsets {entry['data_offsets']}")
        infos[key] = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]), *entry["data_offsets"])
    infos = dict(sorted(infos.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = 0
    for key, info in infos.items():
        if info.start != end:
            raise ValueError(f"{key!r} starts at byte {info.start}, the tensor before it ends at {end}")
        if info.stop - info.start != math.prod(info.shape) * info.dtype.itemsize:
            raise ValueError(f"{key!r} has {info.stop - info.start} bytes, which do not fit {info.dtype} {info.shape}")
        end = info.stop
    return infos


def build_header(specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None) -> str:
    """The header, padding included, that the library writes for tensors of these dtypes and shapes."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for key in sorted(specs, key=lambda k: (-RANKS[NAMES[np.dtype(specs[k][0])]], k)):
        dtype, shape = np.dtype(specs[key][0]), tuple(int(n) for n in specs[key][1])
        stop = offset + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":"))
    return text + " " * (-len(text.encode("utf-8")) % 8)


class SafetensorsFile:
    """One open file; a `TensorSource` (see `sources.py`).

    Attributes:
      path: the file.
      header: the header's text as it stands in the file, padding included.
      infos: the tensors.

    Raises:
      UserError: the file cannot be opened, is truncated, or is not a valid safetensors file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self._fd = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be opened ({error.strerror}); check the path") from error
        try:
            self.header, self.infos, self._data_start = self._parse()
        except BaseException:
            self.close()
            raise

    def _parse(self) -> tuple[str, dict[str, TensorInfo], int]:
        size = os.fstat(self._fd).st_size
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little") if size >= 8 else 0
        if size < 8 or size < 8 + min(length, MAX_HEADER_BYTES):
            raise UserError(f"{self.path}: truncated within its header ({size} bytes); copy or download the file again")
        if length > MAX_HEADER_BYTES:
            raise UserError(
                f"{self.path}: states a header of {length} bytes, more than the format's {MAX_HEADER_BYTES}; "
                "it is not a safetensors file or it is damaged: copy or download it again"
            )
        try:
            header = os.pread(self._fd, length, 8).decode("utf-8")
            infos = parse_header(header)
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self.path}: not a valid safetensors header ({error}); copy or download the file again"
            ) from error
        needed = 8 + length + max((info.stop for info in infos.values()), default=0)
        if size != needed:
            state = "truncated" if size < needed else "followed by bytes that no tensor owns"
            raise UserError(
                f"{self.path}: {state} ({size} bytes, its header describes {needed}); copy or download the file again"
            )
        return header, infos, 8 + length

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def metadata(self) -> dict[str, str]:
        return json.loads(self.header).get("__metadata__", {})

    def keys(self) -> list[str]:
        return list(self.infos)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.infos[key].shape

    def dtype(self, key: str) -> np.dtype:
        return self.infos[key].dtype

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """A fresh array with rows `start` to `stop` of the first axis; all of the tensor without them."""
        info = self.infos[key]
        shape = info.shape
        if info.shape:
            first, last, _ = slice(start, stop).indices(info.shape[0])
            shape = (last - first, *info.shape[1:])
        else:
            first = 0
        array = np.empty(shape, info.dtype)
        view = memoryview(array.reshape(-1).view(np.uint8))
        position = self._data_start + info.start + first * math.prod(info.shape[1:]) * info.dtype.itemsize
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], position + done)
            if count == 0:
                raise UserError(f"{self.path}: became shorter while {key} was read; copy or download the file again")
            done += count
        return array


def row_runs(shape: tuple[int, ...], itemsize: int, run_bytes: int = ROW_RUN_BYTES) -> Iterator[tuple[int, int]]:
    """(start, stop) rows of the first axis, about `run_bytes` each; one run for a scalar."""
    if not shape:
        yield 0, 1
        return
    rows = max(1, run_bytes // max(1, math.prod(shape[1:]) * itemsize))
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


def write_safetensors(
    path: str | os.PathLike,
    header: str,
    tensor: Callable[[str], np.ndarray],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes one file, asking for one tensor at a time.

    Args:
      path: the file; it appears under this name only when it is complete.
      header: from `build_header`, or the `header` of another file, to write the same file again.
      tensor: key -> array of the header's shape and dtype; any strides.
      on_bytes: called with the number of bytes after each run of rows.

    Raises:
      UserError: the disk is full or the file cannot be written; no partial file is left.
      ValueError: an array has not the header's shape and dtype.
    """
    path = Path(path)
    encoded = header.encode("utf-8")
    with replacing(path) as temporary, open(temporary, "wb", buffering=0) as file:
        _write_all(file, len(encoded).to_bytes(8, "little") + encoded)
        for key, info in parse_header(header).items():
            array = tensor(key)
            if array.shape != info.shape or array.dtype != info.dtype:
                raise ValueError(f"{key} is {array.dtype} {array.shape}, the header has {info.dtype} {info.shape}")
            for start, stop in row_runs(array.shape, array.dtype.itemsize):
                rows = np.ascontiguousarray(array[start:stop] if array.ndim else array)
                _write_all(file, memoryview(rows.reshape(-1).view(np.uint8)))
                on_bytes(rows.nbytes)


def _write_all(file: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]
