"""Compiles an ONNX graph to a Hexagon context binary and measures it on the HTP simulator.

    python -m converters.compile_hexagon --onnx FILE --output DIR --soc 8-elite --run 2

writes NAME_SOC.onnx (the wrapper that onnxruntime loads), NAME_SOC_qnn.bin and NAME_SOC.json (the report).
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters import hexagon, onnx_check
from converters.output_files import replacing_files, write_json
from converters.progress import stages
from nd_jax.errors import UserError, run_command

# The text encoders of the released system run in FP16; that is what the simulator gives with room to spare.
MIN_SNR_DB = 45.0


def compile_graph(
    onnx_path: str | Path,
    output_dir: str | Path,
    soc: str,
    runs: int = 0,
    inputs: str | Path | None = None,
    precision: str = "fp16",
) -> dict[str, Any]:
    """Compiles for one chip and, with `runs`, runs the binary on the simulator against float32 on the CPU.

    Args:
      onnx_path: the graph; external data beside it.
      output_dir: created if needed; files of the same names are replaced once all are complete.
      soc: a name of `hexagon.SOC_MODELS`.
      runs: number of samples; 0 compiles only.
      inputs: .npz of arrays named like the graph's inputs, [samples, *shape] or one sample of the input's shape.
        By default NAME.inputs.npz beside the graph, which the export writes.
      precision: "fp16".

    Returns:
      The report, as in NAME_SOC.json. `simulator["snr_db"]` is the worst sample per output, None when not finite;
      `simulator["outputs_differ"]` is None for a single sample.

    Raises:
      UserError: unknown chip, bad inputs, a graph that the HTP does not take, a compiler that died.
    """
    onnx_path, output_dir = Path(onnx_path), Path(output_dir)
    if precision not in hexagon.PRECISIONS:
        raise UserError(f"precision {precision!r} is not known; choose one of {', '.join(hexagon.PRECISIONS)}")
    if not onnx_path.is_file():
        raise UserError(f"{onnx_path}: no such file; export one with converters.export_onnx")
    number = hexagon.soc_model(soc)
    hexagon.require_compiler()
    samples = _samples(onnx_path, inputs, runs) if runs else []
    name = f"{onnx_path.stem}_{soc}"
    with replacing_files(output_dir, f"{name}.onnx") as folder, stages(3 if runs else 1) as begin:
        begin(f"compile for {soc}")
        binary = hexagon.compile_binary(onnx_path, folder / f"{name}.onnx", soc)
        report = {
            "onnx": onnx_path.name,
            "soc": soc,
            "soc_model": number,
            "precision": precision,
            "compile_seconds": round(binary.seconds, 2),
            "compile_cpu_seconds": round(binary.cpu_seconds, 2),
            "compile_peak_bytes": binary.peak_bytes,
            "binary_bytes": binary.bytes,
        }
        if runs:
            begin("run on the simulator")
            result = hexagon.run_on_simulator(binary.wrapper, soc, samples)
            begin("run on the CPU")
            report["simulator"] = _assess(onnx_check.run_on_cpu(onnx_path, samples), result)
        write_json(folder / f"{name}.json", report)
    return report


def _assess(references: list[dict[str, np.ndarray]], result: hexagon.SimulatorRun) -> dict[str, Any]:
    outputs = result.outputs
    differ = None
    if len(outputs) > 1:
        differ = {
            name: not any(np.array_equal(outputs[0][name], other[name]) for other in outputs[1:]) for name in outputs[0]
        }
    return {
        "samples": len(outputs),
        "snr_db": {name: onnx_check.json_number(v) for name, v in onnx_check.worst_snr_db(references, outputs).items()},
        "not_finite": {name: int(sum((~np.isfinite(out[name])).sum() for out in outputs)) for name in outputs[0]},
        "outputs_differ": differ,
        "seconds": [round(s, 2) for s in result.seconds],
        "peak_bytes": result.peak_bytes,
    }


def _samples(onnx_path: Path, inputs: str | Path | None, count: int) -> list[dict[str, np.ndarray]]:
    """The first `count` samples of the .npz, checked against the graph's inputs."""
    path = Path(inputs) if inputs is not None else onnx_path.with_suffix(".inputs.npz")
    if not path.is_file():
        raise UserError(f"{path}: no such file; give inputs with --inputs FILE.npz, or leave --run out")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: not a readable .npz file ({error})") from error
    columns = {}
    for name, shape, dtype in _graph_inputs(onnx_path):
        if name not in arrays:
            raise UserError(f"{path}: holds no array {name!r}; the graph's inputs need one each")
        array = arrays[name][None] if arrays[name].shape == shape else arrays[name]
        if array.shape[1:] != shape or array.dtype != dtype:
            raise UserError(
                f"{path}: {name!r} is {array.dtype} {arrays[name].shape}, expected {dtype} {shape} or a stack of those"
            )
        if len(array) < count:
            raise UserError(f"{path}: {name!r} holds {len(array)} samples, --run asks for {count}")
        columns[name] = array
    return [{name: array[i] for name, array in columns.items()} for i in range(count)]


def _graph_inputs(onnx_path: Path) -> list[tuple[str, tuple[int, ...], np.dtype]]:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(onnx_path), load_external_data=False).graph
    except DecodeError as error:
        raise UserError(f"{onnx_path}: not an ONNX file; export one with converters.export_onnx") from error
    return [
        (
            value.name,
            tuple(d.dim_value for d in value.type.tensor_type.shape.dim),
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type),
        )
        for value in graph.input
    ]


def faults(report: dict[str, Any], min_snr_db: float) -> list[str]:
    """What is wrong with the results on the simulator, one phrase each; empty when nothing was run."""
    simulator = report.get("simulator")
    if simulator is None:
        return []
    found = []
    for name, snr in simulator["snr_db"].items():
        if simulator["not_finite"][name]:
            found.append(f"{name} has {simulator['not_finite'][name]} values that are not finite")
        elif snr is None or not snr >= min_snr_db:
            found.append(f"{name} has {snr if snr is not None else math.nan:.1f} dB, less than {min_snr_db:g}")
        if simulator["outputs_differ"] is not None and not simulator["outputs_differ"][name]:
            found.append(f"{name} is the same for different inputs")
    return found


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m converters.compile_hexagon",
        description="Compiles an ONNX graph to a Hexagon context binary and measures it on the HTP simulator.",
    )
    parser.add_argument("--onnx", type=Path, required=True, help="graph from converters.export_onnx")
    parser.add_argument("--output", type=Path, required=True, help="folder for the binary and its report")
    parser.add_argument("--soc", required=True, help=f"one of {', '.join(hexagon.SOC_MODELS)}")
    parser.add_argument("--run", type=int, default=0, metavar="N", help="samples to run on the simulator (default 0)")
    parser.add_argument("--inputs", type=Path, help="inputs of the samples (default: NAME.inputs.npz beside the graph)")
    parser.add_argument("--precision", default="fp16", choices=hexagon.PRECISIONS, help="default fp16")
    parser.add_argument(
        "--min-snr", type=float, default=MIN_SNR_DB, metavar="DB", help=f"fail below this (default {MIN_SNR_DB:g})"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.run < 0:
        raise UserError(f"--run {args.run} is negative")
    report = compile_graph(args.onnx, args.output, args.soc, args.run, args.inputs, args.precision)
    found = faults(report, args.min_snr)
    if found:
        raise UserError(f"{args.onnx.name} on the simulator: {'; '.join(found)} (report in {args.output})")
    measured = ""
    if args.run:
        measured = ", simulator " + ", ".join(f"{n} {v:.1f} dB" for n, v in report["simulator"]["snr_db"].items())
    print(
        f"compiled {args.onnx.name} for {args.soc} in {report['compile_seconds']:.0f} s with "
        f"{report['compile_peak_bytes'] / 1e9:.1f} GB: {report['binary_bytes'] / 1e6:.1f} MB{measured}: "
        f"{args.output / f'{args.onnx.stem}_{args.soc}'}.onnx"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
