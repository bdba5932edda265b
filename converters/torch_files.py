"""PyTorch's own weight files (`.pt`, `.pth`, `.pth.tar`, `.bin`) as tensor sources.

Files are loaded with `weights_only=True`: tensors and plain containers, never code. Memory maps keep the tensors on
disk until they are read.
"""

import pickle
import re
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from nd_jax.errors import UserError
from nd_jax.weights.safetensors_io import SafetensorsFile
from nd_jax.weights.sources import TensorSource, find_weights, open_sharded, open_source

# Training scripts call checkpoints `.pth.tar`, which are no tar archives.
SUFFIXES = (".bin", ".pt", ".pth", ".pth.tar")
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
# What PyTorch's reader raises on bytes that are no file of its own.
UNREADABLE = (
    RuntimeError,
    EOFError,
    ValueError,
    OSError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    struct.error,
)
PREFIX = "module."  # of torch.nn.DataParallel and DistributedDataParallel
AIMET_WRAPPER = "._module_to_wrap."  # of the layers in a QuantizationSimModel of AIMET 1


def import_torch_package() -> Any:
    """The torch module. Raises UserError naming the install when it is absent."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            "PyTorch is needed to read .pt and .bin files: run `pip install -r requirements-dev.txt`, "
            "or convert the file to safetensors"
        ) from error
    return torch


class TorchFile:
    """One state dict; a `TensorSource`.

    Raises:
      UserError: the file is absent or damaged, needs code to load, or holds no state dict.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file; check the path")
        self._torch = import_torch_package()
        self._tensors = unwrap(self._load(), self._torch.Tensor, self.path)
        self._dtypes = {
            getattr(self._torch, name): np.dtype(dtype)
            for name, dtype in (
                ("bool", np.bool_),
                ("uint8", np.uint8),
                ("int8", np.int8),
                ("int16", np.int16),
                ("int32", np.int32),
                ("int64", np.int64),
                ("float8_e5m2", ml_dtypes.float8_e5m2),
                ("float8_e4m3fn", ml_dtypes.float8_e4m3fn),
                ("float16", np.float16),
                ("bfloat16", ml_dtypes.bfloat16),
                ("float32", np.float32),
                ("float64", np.float64),
                ("complex64", np.complex64),
            )
        }
        for key, tensor in self._tensors.items():
            if tensor.dtype not in self._dtypes or tensor.layout is not self._torch.strided:
                raise UserError(
                    f"{self.path}: {key} is {tensor.dtype}, {tensor.layout}; only dense tensors of "
                    f"{', '.join(d.name for d in self._dtypes.values())} are read: convert it with PyTorch first"
                )

    def _load(self) -> Any:
        load = self._torch.load
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Its advice on pickle protocols is no use to the reader of a model.
                try:
                    return load(self.path, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError as error:
                    if "mmap can only be used" not in str(error):
                        raise
                    # Files of PyTorch before 1.6 are no zip archives and cannot be mapped.
                    return load(self.path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            # PyTorch's own message advises to load the file without protection: only the name is repeated.
            name = re.search(r"GLOBAL (\S+)", str(error))
            if name is None:
                raise UserError(
                    f"{self.path}: refused, because it is no state dict that loads without running code, or no PyTorch "
                    "file; copy or download it again, or convert it to safetensors where you trust it"
                ) from error
            raise UserError(
                f"{self.path}: refused, because its pickle names {name.group(1)}, which is code and no tensor, and "
                "loading it could run anything; convert it to safetensors where you trust it"
            ) from error
        except UNREADABLE as error:
            raise UserError(
                f"{self.path}: not a PyTorch file, or truncated ({type(error).__name__}); copy or download it again, "
                "or convert it to safetensors"
            ) from error

    def keys(self) -> list[str]:
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> np.dtype:
        return self._dtypes[self._tensors[key].dtype]

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `TensorSource.read`."""
        tensor, dtype = self._tensors[key].detach(), self.dtype(key)
        tensor = tensor[start:stop] if tensor.ndim else tensor
        # numpy() knows no bfloat16 and float8: carry the bits in an integer type.
        bits = {1: self._torch.uint8, 2: self._torch.int16}.get(dtype.itemsize) if dtype.kind == "V" else None
        array = (tensor if bits is None else tensor.contiguous().view(bits)).numpy()
        return np.array(array if bits is None else array.view(dtype), order="C")

    def close(self) -> None:
        self._tensors = {}


def unwrap(value: Any, tensor_type: type, path: Path) -> dict[str, Any]:
    """The state dict inside a loaded file: taken out of one known wrapper, and without what wrappers of
    modules add to the keys.

    Raises:
      UserError: none is found, or several are.
    """
    if isinstance(value, Mapping) and not any(isinstance(v, tensor_type) for v in value.values()):
        inner = [name for name in WRAPPERS if isinstance(value.get(name), Mapping)]
        if len(inner) > 1:
            raise UserError(f"{path}: holds several state dicts ({', '.join(inner)}); save the one that is meant")
        if inner:
            return unwrap(value[inner[0]], tensor_type, path)
    if not isinstance(value, Mapping) or not value:
        raise UserError(f"{path}: holds {type(value).__name__}, no state dict; save `model.state_dict()`")
    others = [str(name) for name, item in value.items() if not isinstance(item, tensor_type)]
    if others:
        raise UserError(f"{path}: entries that are no tensors ({', '.join(others[:10])}); save `model.state_dict()`")
    prefix = PREFIX if all(key.startswith(PREFIX) for key in value) else ""
    return {key.removeprefix(prefix).replace(AIMET_WRAPPER, "."): tensor for key, tensor in value.items()}


def open_any_source(path: Path) -> TensorSource:
    """The weights of a file or component folder, safetensors if there are any, else PyTorch's own.

    Raises:
      UserError: no weights are found, or they cannot be read.
    """
    if path.is_file():
        return _open_file(path)
    if find_weights(path, (".safetensors",)) is not None:
        return open_source(path)
    weights = find_weights(path, SUFFIXES)
    if weights is None:
        raise UserError(
            f"{path}: holds no weights ({', '.join(('.safetensors', *SUFFIXES))}); give a component folder, "
            "and check that the download is complete"
        )
    return open_sharded(weights, TorchFile) if weights.suffix == ".json" else TorchFile(weights)


def _open_file(path: Path) -> TensorSource:
    if path.name.endswith(".index.json"):
        return open_sharded(path, _open_file)
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.name.endswith(SUFFIXES):
        return TorchFile(path)
    raise UserError(f"{path}: not a weights file; known are .safetensors, {', '.join(SUFFIXES)}")
