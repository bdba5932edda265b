"""A graph by jax2onnx, the other converter that `experiments.compare_routes` measures.

jax2onnx (PyPI) needs Orbax 0.11 and this project a newer one, so it lives in an environment of its own. That
environment's python runs this module from this checkout: the same `graphs.load_graph`, and so the same function and
weights as on our route, but traced by jax2onnx.

    PYTHON -m converters.jax2onnx_route REQUEST.json

It needs what `converters.graphs` imports beside jax2onnx: flax (which jax2onnx brings), ml-collections, safetensors.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from converters import graphs
from nd_jax.errors import UserError

VERSION = "0.17.1"
PACKAGES = f"jax2onnx=={VERSION} ml-collections safetensors"
OPSET = 23


def export(python: Path, model_dir: Path, name: str, options: graphs.GraphOptions, output: Path) -> float:
    """Writes graph `name` of a model folder to `output` (weights beside it); returns the seconds that it took.

    Args:
      python: of the environment that has jax2onnx.
      model_dir: released layout.
      name: a name of `graphs.GRAPHS`.
      options: sizes and residual scale, without calibration.
      output: the ONNX file.

    Raises:
      UserError: python does not start or lacks packages, or jax2onnx cannot convert the graph.
    """
    # The other process sees other folders: absolute paths.
    paths = {"model": str(model_dir.resolve()), "output": str(output.resolve())}
    request = {**paths, "graph": name, "options": dataclasses.asdict(options)}
    root = str(Path(__file__).resolve().parent.parent)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "request.json"
        file.write_text(json.dumps(request))
        environment = {**os.environ, "PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
        command = [str(python), "-m", "converters.jax2onnx_route", str(file)]
        start = time.perf_counter()
        try:
            child = subprocess.run(
                command, cwd=scratch, env=environment, capture_output=True, text=True, errors="replace"
            )
        except OSError as error:
            raise UserError(f"{python}: cannot be run ({error.strerror}); give the python of an environment") from error
    if child.returncode == 0:
        return time.perf_counter() - start
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    reason = lines[-1][:500] if lines else f"exit status {child.returncode}"
    if "ModuleNotFoundError" in reason:
        raise UserError(f"{python}: {reason}; run: {python} -m pip install {PACKAGES}")
    raise UserError(f"graph {name}: jax2onnx cannot convert it: {reason}")


# --- In the other environment -----------------------------------------------------------------------------------------


def convert(graph: graphs.Graph) -> Any:
    """`onnx_ir.Model` of the traced function with jax2onnx's own choices; inputs and outputs are named as the graph's.

    Weights are constants of the trace.
    """
    import jax
    from jax2onnx import to_onnx

    return to_onnx(
        lambda *inputs: graph.apply(graph.params, *inputs),
        inputs=[jax.ShapeDtypeStruct(spec.shape, np.dtype(spec.dtype)) for spec in graph.inputs],
        input_names=[spec.name for spec in graph.inputs],
        output_names=[spec.name for spec in graph.outputs],
        model_name=graph.name,
        opset=OPSET,
        return_mode="ir",
    )


def _child(request_file: str) -> None:
    import onnx_ir as ir

    request = json.loads(Path(request_file).read_text())
    options, output = request["options"], Path(request["output"])
    if options["blocks"] is not None:
        options["blocks"] = tuple(options["blocks"])
    graph = graphs.load_graph(request["graph"], request["model"], graphs.GraphOptions(**options))
    ir.save(convert(graph), output, external_data=f"{output.name}.data", size_threshold_bytes=1024)


if __name__ == "__main__":
    _child(sys.argv[1])
