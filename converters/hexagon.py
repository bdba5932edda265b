"""Compiling an ONNX graph to a Qualcomm context binary and running that binary on the HTP simulator.

onnxruntime-qnn holds both. The native libraries may run out of memory or crash, so each of the two steps is a child
process: `python -m converters.hexagon REQUEST.json`, which writes its answer to the file that the request names.
A child that dies is reported with its signal, and its peak memory is its own.
"""

import dataclasses
import functools
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters import schematic
from converters.packages import need
from converters.peak_memory import peak_bytes
from nd_jax.errors import UserError

if TYPE_CHECKING:
    import onnxruntime

# Names that we use -> soc_model of the QNN SDK. All of these compile with onnxruntime-qnn 2.7; 8-gen-2, 8-gen-3,
# 8-elite and 8-elite-gen-5 also ran on the simulator.
SOC_MODELS = {"8-gen-1": 36, "8-gen-2": 43, "8-gen-3": 57, "x-elite": 60, "8-elite": 69, "8-elite-gen-5": 87}
PROVIDER = "QNNExecutionProvider"


@dataclasses.dataclass(frozen=True)
class Binary:
    """A compiled graph.

    Attributes:
      wrapper: ONNX file of one EPContext node, the form in which onnxruntime loads the binary beside it.
      bytes: size of the binary.
      seconds, cpu_seconds: of the compilation.
      peak_bytes: largest resident memory of the compiler process.
      traffic: bytes a call by the compiler's own plan, see `converters.schematic`; None when it was not asked for.
    """

    wrapper: Path
    bytes: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    traffic: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class SharedBinary:
    """Several graphs in one binary, see `compile_shared`. Fields as those of `Binary`, one wrapper a graph."""

    wrappers: tuple[Path, ...]
    bytes: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class SimulatorRun:
    """Results on the simulator: one {output name: array} per sample; wall seconds per sample; peak memory."""

    outputs: list[dict[str, np.ndarray]]
    seconds: list[float]
    peak_bytes: int


def soc_model(name: str) -> int:
    """Number of a chip in the QNN SDK.

    Raises:
      UserError: the name is not in the table; the message lists the names.
    """
    if name not in SOC_MODELS:
        raise UserError(f"chip {name!r} is not known; choose one of {', '.join(SOC_MODELS)}")
    return SOC_MODELS[name]


def require_compiler() -> None:
    """Raises a UserError where the compiler cannot run: another platform, or a package that is missing."""
    system = (platform.system(), platform.machine())
    if system != ("Linux", "x86_64"):
        raise UserError(f"the Hexagon compiler of onnxruntime-qnn is for Linux x86_64 only, this is {' '.join(system)}")
    need("onnx", "onnxruntime", "onnxruntime_qnn")


def compile_binary(onnx_path: Path, wrapper: Path, soc: str, traffic: bool = False) -> Binary:
    """Compiles a graph for one chip: float32 to FP16 code, quantised parts to integer code.

    Args:
      onnx_path: the graph; external data beside it.
      wrapper: the ONNX file to write; the binary is written beside it.
      soc: a name of `SOC_MODELS`.
      traffic: compile a second time, with the compiler's trace, and read the memory traffic out of it.

    Raises:
      UserError: unknown chip, missing package, an operator that the HTP does not take, a compiler that died.
    """
    size, cost = _compiled([onnx_path], [wrapper], soc)
    return Binary(wrapper, size, *cost, planned_traffic(onnx_path, soc) if traffic else None)


def planned_traffic(onnx_path: Path, soc: str) -> dict[str, Any]:
    """Bytes of a call by the compiler's own plan (`converters.schematic`); the binary is not kept.

    Raises:
      UserError: as `compile_binary`.
    """
    require_compiler()
    with tempfile.TemporaryDirectory() as scratch:
        request = _compile_request([onnx_path], [Path(scratch) / onnx_path.name], soc)
        return _in_child({**request, "trace": True}, f"{onnx_path.name} for {soc}")["traffic"]


def compile_shared(onnx_paths: Sequence[Path], wrappers: Sequence[Path], soc: str) -> SharedBinary:
    """Compiles several graphs into one binary that holds weights which they have in common once.

    Weights are shared when their bytes are equal; whatever names they have. The binary is named by the first wrapper,
    and all wrappers refer to it. onnxruntime-qnn 2.7 crashes (SIGSEGV) when it loads such a binary on x86, so that
    none of it runs on the simulator.

    Args:
      onnx_paths: the graphs; external data beside them.
      wrappers: the ONNX files to write, one a graph, in one folder.
      soc: a name of `SOC_MODELS`.

    Raises:
      UserError: as `compile_binary`.
    """
    size, cost = _compiled(onnx_paths, wrappers, soc)
    return SharedBinary(tuple(wrappers), size, *cost)


def _compile_request(onnx_paths: Sequence[Path], wrappers: Sequence[Path], soc: str) -> dict[str, Any]:
    # Absolute paths: the child works in a folder of its own.
    pairs = [[str(onnx.resolve()), str(wrapper.resolve())] for onnx, wrapper in zip(onnx_paths, wrappers, strict=True)]
    return {"action": "compile", "graphs": pairs, "soc_model": soc_model(soc), "trace": False}


def _compiled(onnx_paths: Sequence[Path], wrappers: Sequence[Path], soc: str) -> tuple[int, tuple[float, float, int]]:
    """(bytes of the binary, (seconds, CPU seconds, peak memory))."""
    require_compiler()
    what = f"{', '.join(path.name for path in onnx_paths)} for {soc}"
    answer = _in_child(_compile_request(onnx_paths, wrappers, soc), what)
    binaries = [path for path in wrappers[0].parent.glob("*.bin") if path.name.startswith(wrappers[0].stem)]
    if len(binaries) != 1:
        raise UserError(
            f"{what}: the compiler wrote {len(binaries)} binaries instead of 1; run the graph through "
            "converters.onnx_lint"
        )
    return binaries[0].stat().st_size, (answer["seconds"], answer["cpu_seconds"], answer["peak_bytes"])


def run_on_simulator(wrapper: Path, soc: str, samples: list[dict[str, np.ndarray]]) -> SimulatorRun:
    """Runs a compiled binary on the HTP simulator. Bit-identical from run to run; says nothing of device time.

    Args:
      wrapper: of `compile_binary`.
      soc: the chip that it was compiled for.
      samples: inputs by name.
    """
    require_compiler()
    with tempfile.TemporaryDirectory() as scratch:
        inputs, outputs = Path(scratch) / "inputs.npz", Path(scratch) / "outputs.npz"
        np.savez(inputs, **{f"{i}/{name}": array for i, sample in enumerate(samples) for name, array in sample.items()})
        request = {
            "action": "run",
            "wrapper": str(wrapper.resolve()),
            "soc_model": soc_model(soc),
            "inputs": str(inputs),
            "outputs": str(outputs),
            "count": len(samples),
        }
        answer = _in_child(request, f"{wrapper.name} on the simulator")
        results = _split_samples(outputs, len(samples))
    return SimulatorRun(results, answer["seconds"], answer["peak_bytes"])


def _split_samples(npz: Path, count: int) -> list[dict[str, np.ndarray]]:
    with np.load(npz) as arrays:
        return [
            {key.split("/", 1)[1]: arrays[key] for key in arrays.files if key.split("/", 1)[0] == str(i)}
            for i in range(count)
        ]


def _in_child(request: dict[str, Any], what: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        request_file, answer_file = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        request_file.write_text(json.dumps({**request, "answer": str(answer_file)}))
        root = str(Path(__file__).resolve().parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        child = subprocess.run(
            [sys.executable, "-m", "converters.hexagon", str(request_file)],
            cwd=scratch,  # the compiler may leave files in its working directory
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            errors="replace",
        )
        if child.returncode == 0:
            return json.loads(answer_file.read_text())
    if child.returncode < 0:
        name = signal.Signals(-child.returncode).name
        raise UserError(
            f"{what}: the QNN library was killed by signal {name}: not enough memory, or a graph that it cannot take"
        )
    raise UserError(f"{what}: {_explain(child.stdout + child.stderr)}")


def _explain(log: str) -> str:
    """One line: the nodes that the HTP refused if the log names them, else the last line that is not empty."""
    refused = re.search(r"Unsupported nodes in QNN EP: (.*?),? *(\x1b|$)", log, re.MULTILINE)
    if refused:
        return (
            f"the HTP does not take these nodes, and falling back to the CPU is refused: {refused.group(1)[:1000]}; "
            "express them in operators that converters.onnx_lint accepts"
        )
    lines = [" ".join(line.split()) for line in log.splitlines() if line.strip()]
    return lines[-1][:1000] if lines else "the QNN process failed without a message"


# --- In the child -----------------------------------------------------------------------------------------------------


def _session(
    path: str, soc: int, entries: dict[str, str], more: dict[str, str] | None = None
) -> "onnxruntime.InferenceSession":
    import onnxruntime as ort
    import onnxruntime_qnn

    _register_provider()
    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    options = ort.SessionOptions()
    options.log_severity_level = 2
    options.intra_op_num_threads = os.cpu_count() or 1
    for key, value in {"session.disable_cpu_ep_fallback": "1", **entries}.items():
        options.add_session_config_entry(key, value)
    provider = {
        "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
        "soc_model": str(soc),
        "enable_htp_fp16_precision": "1",
        **(more or {}),
    }
    options.add_provider_for_devices(devices[:1], provider)
    return ort.InferenceSession(path, options)


@functools.cache
def _register_provider() -> None:
    import onnxruntime as ort
    import onnxruntime_qnn

    ort.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())


def _compile(request: dict[str, Any]) -> dict[str, Any]:
    start, start_cpu = time.perf_counter(), time.process_time()
    trace = {"profiling_level": "optrace", "profiling_file_path": "trace.csv"} if request["trace"] else {}
    graphs = request["graphs"]
    for number, (onnx, wrapper) in enumerate(graphs, 1):
        entries = {"ep.context_enable": "1", "ep.context_file_path": wrapper, "ep.context_embed_mode": "0"}
        if len(graphs) > 1:
            entries["ep.share_ep_contexts"] = "1"
            # With the last graph the binary of all of them is written.
            entries["ep.stop_share_ep_contexts"] = str(int(number == len(graphs)))
        _session(onnx, request["soc_model"], entries, trace)
    answer = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}
    if trace:
        schematics = sorted(Path().glob("*_schematic.bin"))  # in the working directory
        if len(schematics) != 1:
            raise UserError(f"the compiler wrote {len(schematics)} schematics instead of 1")
        answer["traffic"] = schematic.traffic(schematics[0])
    return answer


def _run(request: dict[str, Any]) -> dict[str, Any]:
    session = _session(request["wrapper"], request["soc_model"], {})
    names = [output.name for output in session.get_outputs()]
    seconds, results = [], {}
    for i, sample in enumerate(_split_samples(Path(request["inputs"]), request["count"])):
        start = time.perf_counter()
        outputs = session.run(names, sample)
        seconds.append(time.perf_counter() - start)
        results.update({f"{i}/{name}": array for name, array in zip(names, outputs, strict=True)})
    np.savez(request["outputs"], **results)
    return {"seconds": seconds}


def _child(request_file: str) -> None:
    request = json.loads(Path(request_file).read_text())
    answer = {"compile": _compile, "run": _run}[request["action"]](request)
    answer["peak_bytes"] = peak_bytes()
    Path(request["answer"]).write_text(json.dumps(answer))


if __name__ == "__main__":
    _child(sys.argv[1])
