"""Runs a compiled graph on the HTP simulator, against the float32 graph that it was made of.

    python -m converters.simulate_hexagon --onnx FILE --compiled WRAPPER --soc 8-elite --run 2 --output REPORT.json

`converters.compile_hexagon --run` does both in one command; this is for what takes long to compile, or to run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from converters import hexagon, onnx_check, qdq
from converters.compile_hexagon import assess
from converters.output_files import write_json
from converters.samples import input_specs, read_model, read_samples
from nd_jax.errors import UserError, run_command


def simulate_graph(
    onnx_path: str | Path,
    compiled: str | Path,
    soc: str,
    runs: int,
    inputs: str | Path | None = None,
    reference: str | Path | None = None,
) -> dict[str, Any]:
    """The numbers that `compile_hexagon.compile_graph` has under "simulator", of a graph that is compiled already.

    Args:
      onnx_path: what was compiled, float32 or of `converters.quantize`.
      compiled: the wrapper NAME_SOC.onnx.
      soc: the chip that it was compiled for.
      runs: number of samples.
      inputs: float samples in one of the two forms of `converters.samples`; by default those of the export.
      reference: the float32 graph that a quantised one was made of.

    Raises:
      UserError: unknown chip, bad inputs, no such files, a simulator that died.
    """
    onnx_path, compiled = Path(onnx_path), Path(compiled)
    hexagon.soc_model(soc)
    hexagon.require_compiler()
    model = read_model(onnx_path)
    if qdq.is_quantised(model) and reference is None:
        raise UserError(f"{onnx_path.name} is quantised: give the float32 graph that it was made of with --reference")
    if not compiled.is_file():
        raise UserError(f"{compiled}: no such file; compile the graph with converters.compile_hexagon")
    reference = onnx_path if reference is None else Path(reference)
    path = Path(inputs) if inputs is not None else reference.with_suffix(".inputs.npz")
    samples, encodings = read_samples(path, input_specs(read_model(reference)), runs), qdq.encodings(model)
    result = hexagon.run_on_simulator(compiled, soc, [qdq.to_integers(sample, encodings) for sample in samples])
    outputs = [qdq.to_floats(output, encodings) for output in result.outputs]
    return assess(onnx_check.run_on_cpu(reference, samples), outputs, result)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m converters.simulate_hexagon",
        description="Run a compiled graph on the HTP simulator, and compare it with float32.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--onnx", type=Path, required=True, metavar="FILE", help="the graph that was compiled")
    add("--compiled", type=Path, required=True, metavar="FILE", help="NAME_SOC.onnx of converters.compile_hexagon")
    add("--soc", required=True, help=f"the chip that it is for: {', '.join(hexagon.SOC_MODELS)}")
    add("--run", type=int, default=1, metavar="N", help="samples (default 1)")
    add("--inputs", type=Path, help="inputs of the samples (default: NAME.inputs.npz beside the graph)")
    add("--reference", type=Path, metavar="FILE", help="the float32 graph that a quantised one was made of")
    add("--output", type=Path, required=True, metavar="FILE", help="the report, JSON")
    args = parser.parse_args(argv)
    if args.run < 1:
        parser.error("--run must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args = parse(argv)
    report = simulate_graph(args.onnx, args.compiled, args.soc, args.run, args.inputs, args.reference)
    write_json(args.output, report)
    worst = min(report["snr_db"].items(), key=lambda item: -999.0 if item[1] is None else item[1])
    shown = "not finite" if worst[1] is None else f"{worst[1]:.1f} dB"
    print(
        f"{report['samples']} samples in {sum(report['seconds']):.0f} s, worst output {worst[0]} {shown}: {args.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
