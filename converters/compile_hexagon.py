"""Compiles ONNX graphs to Hexagon context binaries and measures them on the HTP simulator.

    python -m converters.compile_hexagon --onnx FILE --output DIR --soc 8-elite --run 2

writes NAME_SOC.onnx (the wrapper that onnxruntime loads), NAME_SOC_qnn.bin and NAME_SOC.json (the report), for every
graph and chip that is given. With --share the graphs also become one binary, which holds their common weights once:
NAME_SOC_shared.onnx for every graph and, named by the first, NAME_SOC_shared_qnn.bin and NAME_SOC_shared.json.
"""

import argparse
import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
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
# Of the weights of several graphs, the part that may be left of them in one binary for it to be of use.
SHARED_PART = 0.9


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
            report["simulator"] = assess(onnx_check.run_on_cpu(reference, samples), outputs, result)
        write_json(folder / f"{name}.json", report)
    return report


def assess(references: list[Sample], outputs: list[Sample], result: hexagon.SimulatorRun) -> dict[str, Any]:
    """What a run on the simulator gave, beside the float32 outputs of the same samples."""
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


def compile_shared(onnx_paths: Sequence[str | Path], output_dir: str | Path, soc: str) -> dict[str, Any]:
    """Compiles several graphs for one chip into one binary that holds weights which they have in common once.

    What is compiled is not run: see `hexagon.compile_shared`. Check the same graphs one by one with `compile_graph`.

    Args:
      onnx_paths: at least two graphs with different names, such as those of one chunk of blocks at every stage.
      output_dir: created if needed; files of the same names are replaced once all are complete.
      soc: a name of `hexagon.SOC_MODELS`.

    Returns:
      The report, as in NAME_SOC_shared.json: `weight_bytes` of all graphs together and of what they hold once each is
      counted a single time, `ran` (False), and costs as in the report of `compile_graph`.

    Raises:
      UserError: as `compile_graph`; fewer than two graphs, two of one name, or graphs with hardly an equal weight, as
        when each of them has been rounded with regard to its own inputs.
    """
    paths, output_dir = [Path(path) for path in onnx_paths], Path(output_dir)
    number = hexagon.soc_model(soc)
    hexagon.require_compiler()
    names = [f"{path.stem}_{soc}_shared" for path in paths]
    if len(set(names)) < max(2, len(names)):
        raise UserError(f"graphs {', '.join(path.stem for path in paths)}: give at least two, of different names")
    quantised = [qdq.is_quantised(read_model(path)) for path in paths]
    if len(set(quantised)) > 1:
        one, other = paths[quantised.index(True)].name, paths[quantised.index(False)].name
        raise UserError(f"{one} is quantised and {other} is not: they have no weights in common")
    separate, together = _weight_bytes(paths)
    if together > SHARED_PART * separate:
        raise UserError(
            f"{', '.join(path.name for path in paths)}: {together / separate:.0%} of their weights differ; give graphs "
            "of the same weights, quantised with --rounding nearest"
        )
    with replacing_files(output_dir, f"{names[0]}.onnx") as folder, stages(1) as begin:
        begin(f"compile for {soc}")
        binary = hexagon.compile_shared(paths, [folder / f"{name}.onnx" for name in names], soc)
        report = {
            "onnx": [path.name for path in paths],
            "soc": soc,
            "soc_model": number,
            "precision": "w8a16" if quantised[0] else "fp16",
            "compile_seconds": round(binary.seconds, 2),
            "compile_cpu_seconds": round(binary.cpu_seconds, 2),
            "compile_peak_bytes": binary.peak_bytes,
            "binary_bytes": binary.bytes,
            "weight_bytes": {"separate": separate, "together": together},
            "ran": False,
        }
        write_json(folder / f"{names[0]}.json", report)
    return report


def _weight_bytes(paths: Sequence[Path]) -> tuple[int, int]:
    """Bytes of the constants of all graphs, and of the different ones among them."""
    constants = [constant for path in paths for constant in _constants(path)]
    return sum(size for _, size in constants), sum(dict(constants).values())


def _constants(path: Path) -> Iterator[tuple[bytes, int]]:
    """(digest, bytes) of every constant of a graph, which are mapped into memory one by one."""
    import onnx_ir as ir

    for value in ir.load(path).graph.initializers.values():
        content = value.const_value.tobytes()
        yield hashlib.sha256(content).digest(), len(content)


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
        description="Compiles ONNX graphs to Hexagon context binaries and measures them on the HTP simulator.",
    )
    add = parser.add_argument
    add("--onnx", type=Path, nargs="+", required=True, help="graphs from converters.export_onnx or converters.quantize")
    add("--output", type=Path, required=True, help="folder for the binaries and their reports")
    add("--soc", nargs="+", required=True, help=f"chips, of {', '.join(hexagon.SOC_MODELS)}")
    add("--run", type=int, default=0, metavar="N", help="samples to run on the simulator (default 0)")
    add("--inputs", type=Path, nargs="+", help="inputs of the samples (default: NAME.inputs.npz beside each graph)")
    add("--reference", type=Path, nargs="+", help="the float32 graphs that quantised ones were made of")
    add("--share", action="store_true", help="also compile all graphs to one binary with common weights; it is not run")
    add("--traffic", action="store_true", help="report the DRAM bytes of a call (compiles twice)")
    add("--max-dram-mb", type=float, metavar="MB", help="fail when a call reads more from DRAM (implies --traffic)")
    add(
        "--min-snr",
        type=float,
        metavar="DB",
        help="fail below this (default " + ", ".join(f"{name}: {limit:g}" for name, limit in MIN_SNR_DB.items()) + ")",
    )
    args = parser.parse_args(argv)
    for name in ("inputs", "reference"):
        given = getattr(args, name)
        if given is not None and len(given) != len(args.onnx):
            parser.error(f"--{name} has {len(given)} entries and --onnx {len(args.onnx)}: give one for every graph")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.run < 0:
        raise UserError(f"--run {args.run} is negative")
    for soc in args.soc:
        hexagon.soc_model(soc)
    missing, found = [None] * len(args.onnx), []
    for soc in args.soc:
        separate = []
        for onnx, inputs, reference in zip(args.onnx, args.inputs or missing, args.reference or missing, strict=True):
            report, problems = _compile_one(args, onnx, soc, inputs, reference)
            separate.append(report["binary_bytes"])
            found += problems
        if args.share:
            report = compile_shared(args.onnx, args.output, soc)
            print(
                f"compiled {len(args.onnx)} graphs for {soc} to one binary {_cost(report)}, where their own have "
                f"{sum(separate) / 1e6:.1f} MB; not run, since none of several graphs loads on x86: "
                f"{args.output / f'{args.onnx[0].stem}_{soc}_shared'}.onnx"
            )
    if found:
        raise UserError(f"{'; '.join(found)} (report in {args.output})")
    return 0


def _compile_one(
    args: argparse.Namespace, onnx: Path, soc: str, inputs: Path | None, reference: Path | None
) -> tuple[dict[str, Any], list[str]]:
    """A graph's report, which it prints if nothing is wrong with it, and what is."""
    budget = math.inf if args.max_dram_mb is None else args.max_dram_mb * 1e6
    traffic = args.traffic or args.max_dram_mb is not None
    report = compile_graph(onnx, args.output, soc, args.run, inputs, reference, traffic)
    limit = MIN_SNR_DB[report["precision"]] if args.min_snr is None else args.min_snr
    found = faults(report, limit, budget)
    if found:
        return report, [f"{onnx.name} for {soc}: {fault}" for fault in found]
    measured = ""
    if traffic:
        measured += f", {report['traffic']['dram_read_bytes'] / 1e6:.0f} MB read from DRAM a call"
    if args.run:
        snr = report["simulator"]["snr_db"]
        lowest = sorted(snr, key=snr.get)[:3]
        measured += ", simulator " + ", ".join(f"{name} {snr[name]:.1f} dB" for name in lowest)
        measured += f" and {len(snr) - 3} outputs above" if len(snr) > 3 else ""
    print(f"compiled {onnx.name} for {soc} {_cost(report)}{measured}: {args.output / f'{onnx.stem}_{soc}'}.onnx")
    return report, []


def _cost(report: dict[str, Any]) -> str:
    return (
        f"in {report['compile_seconds']:.0f} s with {report['compile_peak_bytes'] / 1e9:.1f} GB: "
        f"{report['binary_bytes'] / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
