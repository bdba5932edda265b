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

from converters import hexagon, onnx_check, qdq
from converters.output_files import replacing_files, write_json
from converters.progress import stages
from converters.samples import Sample, input_specs, read_model, read_samples
from nd_jax.errors import UserError, run_command

# The text encoders of the released system run in FP16; that is what the simulator gives with room to spare. The
# released decoder has 35 dB in W8A16.
MIN_SNR_DB = {"fp16": 45.0, "w8a16": 34.0}


def compile_graph(
    onnx_path: str | Path,
    output_dir: str | Path,
    soc: str,
    runs: int = 0,
    inputs: str | Path | None = None,
    reference: str | Path | None = None,
    traffic: bool = False,
) -> dict[str, Any]:
    """Compiles for one chip and, with `runs`, runs the binary on the simulator against float32 on the CPU.

    Args:
      onnx_path: the graph, float32 or of `converters.quantize`; external data beside it.
      output_dir: created if needed; files of the same names are replaced once all are complete.
      soc: a name of `hexagon.SOC_MODELS`.
      runs: number of samples; 0 compiles only.
      inputs: float samples in one of the two forms of `converters.samples`. By default NAME.inputs.npz beside the
        graph (for a quantised one beside the reference), which the export writes.
      reference: the float32 graph that a quantised one was made of.
      traffic: also report the bytes that a call moves between DRAM and the NPU, by the compiler's own plan.

    Returns:
      The report, as in NAME_SOC.json. `simulator["snr_db"]` is the worst sample per output, None when not finite;
      `simulator["outputs_differ"]` is None for a single sample.

    Raises:
      UserError: unknown chip, bad inputs, a graph that the HTP does not take, a compiler that died.
    """
    onnx_path, output_dir = Path(onnx_path), Path(output_dir)
    number = hexagon.soc_model(soc)
    hexagon.require_compiler()
    model = read_model(onnx_path)
    quantised, encodings = qdq.is_quantised(model), qdq.encodings(model)
    if quantised and runs and reference is None:
        raise UserError(f"{onnx_path.name} is quantised: give the float32 graph that it was made of with --reference")
    reference = Path(reference) if reference is not None else onnx_path
    samples = []
    if runs:
        path = Path(inputs) if inputs is not None else reference.with_suffix(".inputs.npz")
        samples = read_samples(path, input_specs(read_model(reference)), runs)
    name = f"{onnx_path.stem}_{soc}"
    with replacing_files(output_dir, f"{name}.onnx") as folder, stages(3 if runs else 1) as begin:
        begin(f"compile for {soc}")
        binary = hexagon.compile_binary(onnx_path, folder / f"{name}.onnx", soc, traffic)
        report = {
            "onnx": onnx_path.name,
            "soc": soc,
            "soc_model": number,
            "precision": "w8a16" if quantised else "fp16",
            "compile_seconds": round(binary.seconds, 2),
            "compile_cpu_seconds": round(binary.cpu_seconds, 2),
            "compile_peak_bytes": binary.peak_bytes,
            "binary_bytes": binary.bytes,
        }
        if traffic:
            report["traffic"] = binary.traffic
        if runs:
            begin("run on the simulator")
            integers = [qdq.to_integers(sample, encodings) for sample in samples]
            result = hexagon.run_on_simulator(binary.wrapper, soc, integers)
            begin("run on the CPU")
            outputs = [qdq.to_floats(output, encodings) for output in result.outputs]
            report["simulator"] = _assess(onnx_check.run_on_cpu(reference, samples), outputs, result)
        write_json(folder / f"{name}.json", report)
    return report


def _assess(references: list[Sample], outputs: list[Sample], result: hexagon.SimulatorRun) -> dict[str, Any]:
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


def faults(report: dict[str, Any], min_snr_db: float, max_dram_bytes: float = math.inf) -> list[str]:
    """What is wrong with the traffic and the results on the simulator, one phrase each."""
    found, simulator = [], report.get("simulator")
    moved = report.get("traffic", {"dram_read_bytes": 0})["dram_read_bytes"]
    if moved > max_dram_bytes:
        found.append(f"a call reads {moved / 1e6:.0f} MB from DRAM, more than {max_dram_bytes / 1e6:g}")
    if simulator is None:
        return found
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
    parser.add_argument("--reference", type=Path, help="the float32 graph that a quantised one was made of")
    parser.add_argument("--traffic", action="store_true", help="report the DRAM bytes of a call (compiles twice)")
    parser.add_argument(
        "--max-dram-mb", type=float, metavar="MB", help="fail when a call reads more from DRAM (implies --traffic)"
    )
    parser.add_argument(
        "--min-snr",
        type=float,
        metavar="DB",
        help="fail below this (default " + ", ".join(f"{name}: {limit:g}" for name, limit in MIN_SNR_DB.items()) + ")",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.run < 0:
        raise UserError(f"--run {args.run} is negative")
    budget = math.inf if args.max_dram_mb is None else args.max_dram_mb * 1e6
    traffic = args.traffic or args.max_dram_mb is not None
    report = compile_graph(args.onnx, args.output, args.soc, args.run, args.inputs, args.reference, traffic)
    limit = MIN_SNR_DB[report["precision"]] if args.min_snr is None else args.min_snr
    found = faults(report, limit, budget)
    if found:
        raise UserError(f"{args.onnx.name} for {args.soc}: {'; '.join(found)} (report in {args.output})")
    measured = ""
    if traffic:
        measured += f", {report['traffic']['dram_read_bytes'] / 1e6:.0f} MB read from DRAM a call"
    if args.run:
        snr = report["simulator"]["snr_db"]
        lowest = sorted(snr, key=snr.get)[:3]
        measured += ", simulator " + ", ".join(f"{name} {snr[name]:.1f} dB" for name in lowest)
        measured += f" and {len(snr) - 3} outputs above" if len(snr) > 3 else ""
    print(
        f"compiled {args.onnx.name} for {args.soc} in {report['compile_seconds']:.0f} s with "
        f"{report['compile_peak_bytes'] / 1e9:.1f} GB: {report['binary_bytes'] / 1e6:.1f} MB{measured}: "
        f"{args.output / f'{args.onnx.stem}_{args.soc}'}.onnx"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
