"""Quantises an ONNX graph to W8A16 for Hexagon: 8-bit weights per channel, 16-bit activations.

    python -m converters.quantize --onnx FILE --calibration DIR --output FILE

writes the graph, its weights FILE.data and a report with the suffix .json. DIR holds .npz files, one array for every
input of the graph (`converters.samples`); the ranges of all values are taken from them.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters import onnx_check, precision_plan, qdq, qnn_quantiser, weight_rounding
from converters.output_files import replacing_files, write_json
from converters.packages import need
from converters.precision_plan import PrecisionPlan
from converters.progress import stages
from converters.samples import Sample, count_samples, each_sample, input_specs, read_model
from converters.shared_ranges import share_ranges
from nd_jax.errors import UserError, run_command

# Samples that the error is estimated on, out of those for calibration.
CHECKED = 2


def quantize_graph(
    onnx_path: str | Path,
    calibration: str | Path,
    output: str | Path,
    plan: PrecisionPlan | None = None,
    *,
    float_ends: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Float32 graph -> W8A16 graph that the Hexagon compiler takes.

    Args:
      onnx_path: of `converters.export_onnx`; what its .json beside it says of carried states is kept.
      calibration: samples in one of the two forms of `converters.samples`.
      output: the file to write; replaced when it is complete.
      plan: by default the one of `precision_plan` for the file's name.
      float_ends: leave inputs and outputs float32 instead of uint16.
      seed: of the places where compensated rounding looks at a layer's input.

    Returns:
      The report. `snr_db` has, per output and for the worst of `CHECKED` calibration samples, the SNR of the whole
      ("quantised") and of its two halves ("weights_only", "activations_only"), in onnxruntime's CPU provider.

    Raises:
      UserError: bad graph, calibration data or plan; a carried state whose two encodings differ.
    """
    need("onnx", "onnx_ir", "onnxruntime")
    onnx_path, output, start = Path(onnx_path), Path(output), time.perf_counter()
    model = read_model(onnx_path)
    if qdq.is_quantised(model):
        raise UserError(f"{onnx_path}: is quantised already; give the graph of converters.export_onnx")
    plan = plan or precision_plan.plan_for(onnx_path.stem)
    excluded = precision_plan.float_nodes(plan, [node.name for node in model.graph.node])
    calibration, specs = Path(calibration), input_specs(model)
    count = count_samples(calibration, specs)
    carried = qdq.carried_states(model)
    if output.suffix != ".onnx" or output.resolve() == onnx_path.resolve():
        raise UserError(f"{output}: give another file that ends in .onnx")
    with stages(5) as begin, replacing_files(output.parent, output.name) as folder:
        begin("ranges")
        extremes = onnx_check.value_extremes(onnx_path, each_sample(calibration, specs))
        _check_ranges(extremes, calibration)
        begin("weights")
        rounded = weight_rounding.round_weights(onnx_path, plan, excluded, each_sample(calibration, specs), seed)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            begin("quantise")
            qdq_path = Path(scratch) / "qdq.onnx"
            ranges = share_ranges(model, extremes, carried)
            qnn_quantiser.write_qdq(onnx_path, qdq_path, ranges, excluded, rounded)
            begin("estimate the error")
            samples = list(itertools.islice(each_sample(calibration, specs), CHECKED))
            snr = _error(onnx_path, qdq_path, samples)
            begin("write")
            encodings = _write(qdq_path, folder / output.name, carried, float_ends)
        report = {
            "onnx": onnx_path.name,
            "precision": "w8a16",
            "calibration_samples": count,
            "rounding": plan.rounding,
            "float_nodes": excluded,
            "carried": carried,
            "encodings": {name: vars(encoding) for name, encoding in encodings.items()},
            "snr_db": {
                kind: {name: onnx_check.json_number(value) for name, value in values.items()}
                for kind, values in snr.items()
            },
            "seconds": round(time.perf_counter() - start, 2),
        }
        write_json(folder / f"{output.stem}.json", report)
    return report


def _check_ranges(extremes: dict[str, tuple[float, float]], calibration: str | Path) -> None:
    for name, pair in extremes.items():
        if not np.isfinite(pair).all():
            raise UserError(f"{calibration}: {name!r} is not finite on these samples; they or the weights are damaged")


def _error(onnx_path: Path, quantised: Path, samples: list[Sample]) -> dict[str, dict[str, float]]:
    """Kind -> output -> worst SNR against the float graph; both graphs have float32 ends."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    references = onnx_check.run_on_cpu(onnx_path, samples)
    weights = {name: v.const_value for name, v in ir.load(onnx_path).graph.initializers.items()}
    snr = {"quantised": onnx_check.worst_snr_db(references, onnx_check.run_on_cpu(quantised, samples))}
    only_weights, only_activations = ir.load(onnx_path), ir.load(quantised)
    for name, array in qdq.rounded_weights(only_activations).items():
        only_weights.graph.initializers[name].const_value = ir.tensor(array)
    qdq.with_float_weights(only_activations, {name: tensor.numpy() for name, tensor in weights.items()})
    for kind, model in (("weights_only", only_weights), ("activations_only", only_activations)):
        RemoveUnusedNodesPass()(model)
        path = quantised.with_name(f".{kind}.onnx")
        ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
        snr[kind] = onnx_check.worst_snr_db(references, onnx_check.run_on_cpu(path, samples))
        for file in (path, path.with_name(f"{path.name}.data")):
            file.unlink()
    return snr


def _write(qdq_path: Path, output: Path, carried: dict[str, str], float_ends: bool) -> dict[str, qdq.Encoding]:
    """The final file, its large tensors in one file beside it; returns the encodings of its ends."""
    import onnx_ir as ir

    model = ir.load(qdq_path)
    encodings = {} if float_ends else qdq.integer_ends(model)
    for after, before in carried.items():
        if encodings.get(after) != encodings.get(before):
            raise UserError(
                f"{after} has {encodings.get(after)}, but {before} {encodings.get(before)}: it cannot return"
            )
    qdq.set_carried(model, carried)
    ir.save(model, output, external_data=f"{output.name}.data", size_threshold_bytes=1024)
    return encodings


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m converters.quantize", description="Quantises an ONNX graph to W8A16 for Hexagon."
    )
    parser.add_argument("--onnx", type=Path, required=True, help="float32 graph from converters.export_onnx")
    parser.add_argument("--calibration", type=Path, required=True, help="folder of .npz files, or one file")
    parser.add_argument("--output", type=Path, required=True, help="file to write, such as GRAPH_w8a16.onnx")
    parser.add_argument(
        "--keep-float",
        action="append",
        default=[],
        metavar="PATTERN",
        help="also leave these nodes in FP16, such as '*conv_out*'; may be given several times",
    )
    parser.add_argument(
        "--rounding",
        choices=precision_plan.ROUNDINGS,
        help="of the weights: to nearest, or so that errors of one layer make up for each other (default: the graph's)",
    )
    parser.add_argument("--float-ends", action="store_true", help="leave inputs and outputs float32")
    parser.add_argument("--seed", type=int, default=0, help="of compensated rounding")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    plan = precision_plan.plan_for(args.onnx.stem, args.keep_float, args.rounding)
    report = quantize_graph(args.onnx, args.calibration, args.output, plan, float_ends=args.float_ends, seed=args.seed)
    worst = {kind: min(values.items(), key=lambda item: item[1]) for kind, values in report["snr_db"].items()}
    shown = ", ".join(f"{kind.replace('_', ' ')} {value:.1f} dB ({name})" for kind, (name, value) in worst.items())
    print(
        f"quantised {args.onnx.name} on {report['calibration_samples']} samples in {report['seconds']:.0f} s; worst "
        f"output: {shown}: {args.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
