"""Inputs of a graph in .npz files: one file that stacks them, or a folder with one file a sample.

A stack holds one array per graph input, [samples, *shape], or [*shape] for a single sample. A folder, the form of
calibration data, holds any number of .npz files, each with one array [*shape] per graph input. Others are ignored.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from converters.graph import TensorSpec
from nd_jax.errors import UserError

if TYPE_CHECKING:
    import onnx

Sample = dict[str, np.ndarray]


def read_samples(path: Path, specs: list[TensorSpec], count: int) -> list[Sample]:
    """The first `count` samples of a stack or a folder.

    Raises:
      UserError: no such file, too few samples, or an array that is absent or does not fit.
    """
    if path.is_dir():
        files = sample_files(path)
        if len(files) < count:
            raise UserError(f"{path}: holds {len(files)} samples, {count} are asked for")
        return [read_sample(file, specs) for file in files[:count]]
    stacks = {spec.name: _stack(path, spec, array) for spec, array in _columns(path, specs)}
    for name, stack in stacks.items():
        if len(stack) < count:
            raise UserError(f"{path}: {name!r} holds {len(stack)} samples, {count} are asked for")
    return [{name: stack[i] for name, stack in stacks.items()} for i in range(count)]


def sample_files(folder: Path) -> list[Path]:
    """The .npz files of a folder, by name.

    Raises:
      UserError: none.
    """
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise UserError(f"{folder}: holds no .npz files; write some with experiments.generate --capture")
    return files


def count_samples(path: Path, specs: list[TensorSpec]) -> int:
    """How many a stack or a folder holds.

    Raises:
      UserError: as `read_samples`.
    """
    if path.is_dir():
        return len(sample_files(path))
    return min(len(_stack(path, spec, array)) for spec, array in _columns(path, specs))


def each_sample(path: Path, specs: list[TensorSpec]) -> Iterator[Sample]:
    """All samples; those of a folder are read one at a time."""
    if path.is_dir():
        return (read_sample(file, specs) for file in sample_files(path))
    return iter(read_samples(path, specs, count_samples(path, specs)))


def read_sample(path: Path, specs: list[TensorSpec]) -> Sample:
    """One file of a folder.

    Raises:
      UserError: an array that is absent or does not fit.
    """
    arrays, sample = read_arrays(path), {}
    for spec in specs:
        array = _named(arrays, spec, path)
        if array.shape != spec.shape or array.dtype != spec.dtype:
            raise UserError(_misfit(path, spec, array))
        sample[spec.name] = array
    return sample


def input_specs(model: "onnx.ModelProto") -> list[TensorSpec]:
    """Name, shape and dtype of every input of a model."""
    import onnx

    return [
        TensorSpec(
            value.name,
            tuple(d.dim_value for d in value.type.tensor_type.shape.dim),
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
        )
        for value in model.graph.input
    ]


def read_model(path: Path) -> "onnx.ModelProto":
    """An ONNX file without its external data.

    Raises:
      UserError: no such file, or another kind of file.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise UserError(f"{path}: no such file; export one with converters.export_onnx")
    try:
        return onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise UserError(f"{path}: not an ONNX file; export one with converters.export_onnx") from error


def read_arrays(path: Path) -> Sample:
    """All arrays of an .npz file.

    Raises:
      UserError: no such file, or a damaged one.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; give samples of the graph's inputs")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a readable .npz file ({error})") from error


def _columns(path: Path, specs: list[TensorSpec]) -> list[tuple[TensorSpec, np.ndarray]]:
    arrays = read_arrays(path)
    return [(spec, _named(arrays, spec, path)) for spec in specs]


def _stack(path: Path, spec: TensorSpec, array: np.ndarray) -> np.ndarray:
    stack = array[None] if array.shape == spec.shape else array
    if stack.shape[1:] != spec.shape or array.dtype != spec.dtype:
        raise UserError(_misfit(path, spec, array) + " or a stack of those")
    return stack


def _named(arrays: Sample, spec: TensorSpec, path: Path) -> np.ndarray:
    if spec.name not in arrays:
        raise UserError(f"{path}: holds no array {spec.name!r}; the graph's inputs need one each")
    return arrays[spec.name]


def _misfit(path: Path, spec: TensorSpec, array: np.ndarray) -> str:
    return f"{path}: {spec.name!r} is {array.dtype} {array.shape}, expected {spec.dtype} {spec.shape}"
