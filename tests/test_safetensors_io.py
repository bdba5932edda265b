"""Safetensors files: the library's bytes, streaming reads, and files that are not what they claim."""

import errno
import json
import os

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import save as library_save

from nd_jax.errors import UserError
from nd_jax.weights import safetensors_io
from nd_jax.weights.safetensors_io import DTYPES, TORCH_METADATA, SafetensorsFile, build_header, write_safetensors

TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}


def write(path, arrays, metadata=TORCH_METADATA):
    specs = {key: (array.dtype, array.shape) for key, array in arrays.items()}
    write_safetensors(path, build_header(specs, metadata), lambda key: arrays[key])


def random_array(name, shape, seed=0):
    """Random bits of a dtype; bool only 0 and 1."""
    dtype = DTYPES[name]
    count = int(np.prod(shape)) * dtype.itemsize
    bits = np.random.default_rng(seed).integers(0, 2 if name == "BOOL" else 256, count, dtype=np.uint8)
    return bits.view(dtype).reshape(shape)


def library_bytes(arrays):
    import torch

    tensors = {}
    for key, array in arrays.items():
        dtype = getattr(torch, TORCH_NAMES[safetensors_io.NAMES[array.dtype]])
        flat = torch.frombuffer(bytearray(array.tobytes() or b"\0" * 8), dtype=torch.uint8)[: array.nbytes]
        tensors[key] = flat.view(dtype).reshape(array.shape)
    return library_save(tensors, TORCH_METADATA)


@given(
    st.dictionaries(
        st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=8).filter(
            lambda k: k != "__metadata__"
        ),
        st.tuples(st.sampled_from(sorted(TORCH_NAMES)), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=8,
    )
)
def test_bytes_are_those_of_the_library(tmp_path_factory, specs):
    path = tmp_path_factory.mktemp("bytes") / "x.safetensors"
    arrays = {key: random_array(name, shape, seed) for seed, (key, (name, shape)) in enumerate(specs.items())}
    write(path, arrays)
    assert path.read_bytes() == library_bytes(arrays)
    with SafetensorsFile(path) as file:
        assert set(file.keys()) == set(arrays)
        for key, array in arrays.items():
            read = file.read(key)
            assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_rows_are_read_alone_and_transposed_arrays_are_written_row_major(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_io, "ROW_RUN_BYTES", 40)
    array = np.arange(15, dtype=np.float32).reshape(3, 5)
    counts = []
    header = build_header({"a": (array.dtype, (5, 3))}, None)
    write_safetensors(tmp_path / "a.safetensors", header, lambda key: array.T, counts.append)
    assert sum(counts) == 60
    assert np.array_equal(load_file(tmp_path / "a.safetensors")["a"], array.T)
    with SafetensorsFile(tmp_path / "a.safetensors") as file:
        assert np.array_equal(file.read("a", 2, 4), array.T[2:4])
        assert file.read("a", 4).shape == (1, 3)


def test_a_foreign_header_is_written_again_byte_by_byte(tmp_path):
    header = (
        '{"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a":{"dtype":"I64","shape":[],"data_offsets":[4,12]}}'
    )
    original = len(header).to_bytes(8, "little") + header.encode() + bytes(range(12))
    (tmp_path / "x.safetensors").write_bytes(original)
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        write_safetensors(tmp_path / "y.safetensors", file.header, file.read)
    assert (tmp_path / "y.safetensors").read_bytes() == original


def _file(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _entry(start, stop, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "truncated within its header"),
        (b"\x10\0\0\0\0\0\0\0{}", "truncated within its header"),
        ((200_000_000).to_bytes(8, "little") + b"{}", "truncated within its header"),
        (_file({"a": _entry(0, 4)}, b"abc"), "truncated (72 bytes, its header describes 73)"),
        (_file({"a": _entry(0, 4)}, b"abcde"), "followed by bytes that no tensor owns"),
        (_file({"a": _entry(0, 4), "b": _entry(2, 6)}, b"abcdef"), "'b' starts at byte 2"),
        (_file({"a": _entry(0, 4), "b": _entry(8, 12)}, b"x" * 12), "'b' starts at byte 8"),
        (_file({"a": _entry(4, 0)}, b"abcd"), "starts at byte 4"),
        (_file({"a": _entry(0, 4, (2,))}, b"abcd"), "do not fit"),
        (_file({"a": _entry(0, 4, (-1,))}, b"abcd"), "has shape [-1]"),
        (_file({"a": _entry(0, 4, (1,), "F4")}, b"abcd"), "dtype 'F4'"),
        (_file({"a": 3}), "is not dtype, shape and data_offsets"),
        (_file([1]), "not a JSON object"),
        (_file(b"{"), "not a valid safetensors header"),
        (_file(b"\xff\xfe"), "not a valid safetensors header"),
        (_file(b'{"a":1,"a":1}'), "a name occurs twice"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, says):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        SafetensorsFile(path)
    assert says in str(error.value) and str(path) in str(error.value) and "again" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_header_above_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_io, "MAX_HEADER_BYTES", 16)
    (tmp_path / "x.safetensors").write_bytes(_file({"a": _entry(0, 4)}, b"abcd"))
    with pytest.raises(UserError, match="more than the format's 16"):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_full_disk_leaves_the_old_file_and_no_partial_one(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write(path, {"a": np.zeros(4, np.float32)})
    before = path.read_bytes()

    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors_io, "_write_all", full)
    with pytest.raises(UserError, match=r"x\.safetensors: the disk is full"):
        write(path, {"a": np.ones(4, np.float32)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_wrong_array_is_refused(tmp_path):
    header = build_header({"a": (np.dtype(ml_dtypes.bfloat16), (2,))}, None)
    with pytest.raises(ValueError, match="the header has bfloat16"):
        write_safetensors(tmp_path / "x.safetensors", header, lambda key: np.zeros(2, np.float32))
    assert os.listdir(tmp_path) == []
