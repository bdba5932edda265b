"""Quantises an ONNX graph to W8A16 for Hexagon: 8-bit weights per channel, 16-bit activations.

    python -m converters.quantize --onnx FILE --calibration DIR --output FILE

writes the graph, its weights FILE.data and a report with the suffix .json. DIR holds .npz files, one array for every
input of the graph (`converters.samples`); the ranges of all values are taken from them. With --estimate it only prints
what accuracy there will be, and which half of the error costs it, and writes that as FILE.estimate.json.
"""

import argparse
import contextlib
import fnmatch
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters import onnx_check, precision_plan, qdq, qnn_quantiser, weight_rounding
from converters.output_files import replacing_files, write_json
from converters.packages import need
from converters.precision_plan import PrecisionPlan
from converters.progress import stages
from converters.samples import Sample, count_samples, each_sample, input_specs, read_model
from converters.shared_ranges import Range, share_ranges
from converters.split_norms import split_norms
from nd_jax.errors import UserError, run_command

# Samples that the error is estimated on, out of those for calibration.
CHECKED = 2


def quantize_graph(
    onnx_path: str | Path,
    calibration: str | Path,
    output: str | Path,
    plan: PrecisionPlan | None = None,
    *,
    overrides: Mapping[str, Range] | None = None,
    float_ends: bool = False,
    seed: int = 0,
    estimate: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Float32 graph -> W8A16 graph that the Hexagon compiler takes.

    Args:
      onnx_path: of `converters.export_onnx`; what its .json beside it says of carried states is kept.
      calibration: samples in one of the two forms of `converters.samples`.
      output: the file to write; replaced when it is complete.
      plan: by default the one of `precision_plan` for the file's name.
      overrides: pattern of names of values -> their range, in the place of what the samples show.
      float_ends: leave inputs and outputs float32 instead of uint16.
      seed: of the places where rounding looks at a layer's input.
      estimate: write no graph, and the report as OUTPUT.estimate.json.
      force: quantise a graph that stays in FP16 all the same.

    Returns:
      The report. `snr_db` has, per output and for the worst of `CHECKED` calibration samples, the SNR of the whole
      ("quantised") and of its two halves ("weights_only", "activations_only"), in onnxruntime's CPU provider.

    Raises:
      UserError: bad graph, calibration data, plan or override; a graph that stays in FP16; a group norm of a form that
        `converters.split_norms` does not know; a carried state whose two encodings differ.
    """
    need("onnx", "onnx_ir", "onnxruntime")
    onnx_path, output, start = Path(onnx_path), Path(output), time.perf_counter()
    model = read_model(onnx_path)
    if qdq.is_quantised(model):
        raise UserError(f"{onnx_path}: is quantised already; give the graph of converters.export_onnx")
    precision_plan.check_graph(onnx_path.stem, force)
    plan = plan or precision_plan.plan_for(onnx_path.stem)
    excluded = precision_plan.excluded_nodes(plan, model)
    calibration, specs = Path(calibration), input_specs(model)
    count = count_samples(calibration, specs)
    samples = lambda: each_sample(calibration, specs)
    carried = qdq.carried_states(model)
    if output.suffix != ".onnx" or output.resolve() == onnx_path.resolve():
        raise UserError(f"{output}: give another file that ends in .onnx")
    with (
        stages(4 if estimate else 5) as begin,
        replacing_files(output.parent, output.name) as folder,
        contextlib.ExitStack() as stack,
    ):
        begin("ranges")
        norms = stack.enter_context(split_norms(onnx_path, samples, excluded))
        model, excluded = read_model(norms.path), [*excluded, *norms.float_nodes]
        extremes = onnx_check.value_extremes(norms.path, samples())
        _check_ranges(extremes, calibration)
        extremes |= {name: tuple(more * limit for limit in extremes[name]) for name, more in norms.headroom.items()}
        ranges = share_ranges(model, extremes, carried, _matching(overrides or {}, extremes))
        begin("weights")
        rounded = weight_rounding.round_weights(norms.path, plan, [*excluded, *norms.sums], samples, seed)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            begin("quantise")
            qdq_path = Path(scratch) / "qdq.onnx"
            qnn_quantiser.write_qdq(norms.path, qdq_path, ranges, excluded, rounded)
            del rounded
            begin("estimate the error")
            snr = _error(norms.path, qdq_path, list(itertools.islice(samples(), CHECKED)))
            report = {
                "onnx": onnx_path.name,
                "precision": "w8a16",
                "calibration_samples": count,
                "rounding": plan.rounding,
                "float_nodes": excluded,
                "overrides": {name: list(pair) for name, pair in (overrides or {}).items()},
                "snr_db": {
                    kind: {name: onnx_check.json_number(value) for name, value in values.items()}
                    for kind, values in snr.items()
                },
            }
            if not estimate:
                begin("write")
                encodings = _write(qdq_path, folder / output.name, carried, {} if float_ends else ranges, float_ends)
                report |= {
                    "carried": carried,
                    "encodings": {name: vars(encoding) for name, encoding in encodings.items()},
                }
        report["seconds"] = round(time.perf_counter() - start, 2)
        write_json(folder / f"{output.stem}{'.estimate' if estimate else ''}.json", report)
    return report


def _check_ranges(extremes: dict[str, tuple[float, float]], calibration: str | Path) -> None:
    for name, pair in extremes.items():
        if not np.isfinite(pair).all():
            raise UserError(f"{calibration}: {name!r} is not finite on these samples; they or the weights are damaged")


def _matching(overrides: Mapping[str, Range], names: Iterable[str]) -> dict[str, Range]:
    """Patterns -> the values that they name."""
    names, found = list(names), {}
    for pattern, pair in overrides.items():
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise UserError(f"override {pattern!r} names no value of the graph, whose values are like {names[0]!r}")
        found |= dict.fromkeys(matched, pair)
    return found


def _error(onnx_path: Path, quantised: Path, samples: list[Sample]) -> dict[str, dict[str, float]]:
    """Kind -> output -> worst SNR against the float graph; both graphs have float32 ends.

    One graph at a time is in memory; weights are read as they are written.
    """
    references = onnx_check.run_on_cpu(onnx_path, samples)
    snr = {"quantised": onnx_check.worst_snr_db(references, onnx_check.run_on_cpu(quantised, samples))}
    for kind, build in (("weights_only", _only_weights), ("activations_only", _only_activations)):
        path = quantised.with_name(f".{kind}.onnx")
        build(onnx_path, quantised, path)
        snr[kind] = onnx_check.worst_snr_db(references, onnx_check.run_on_cpu(path, samples))
        for file in (path, path.with_name(f"{path.name}.data")):
            file.unlink(missing_ok=True)
    return snr


def _only_weights(onnx_path: Path, quantised: Path, output: Path) -> None:
    """The float graph with the quantised one's weights."""
    import onnx_ir as ir

    model = ir.load(onnx_path)
    for name, tensor in qdq.rounded_weights(ir.load(quantised)).items():
        model.graph.initializers[name].const_value = tensor
    _save(model, output)


def _only_activations(onnx_path: Path, quantised: Path, output: Path) -> None:
    """The quantised graph with the float one's weights."""
    import onnx_ir as ir

    model = ir.load(quantised)
    weights = {name: value.const_value for name, value in ir.load(onnx_path).graph.initializers.items()}
    qdq.with_float_weights(model, weights)
    _save(model, output)


def _save(model: Any, path: Path) -> None:
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)


def _write(
    qdq_path: Path, output: Path, carried: dict[str, str], ranges: Mapping[str, Range], float_ends: bool
) -> dict[str, qdq.Encoding]:
    """The final file, its large tensors in one file beside it; returns the encodings of its ends."""
    import onnx_ir as ir

    model = ir.load(qdq_path)
    encodings = {} if float_ends else qdq.integer_ends(model, ranges)
    for after, before in carried.items():
        if encodings.get(after) != encodings.get(before):
            raise UserError(
                f"{after} has {encodings.get(after)}, but {before} {encodings.get(before)}: it cannot return"
            )
    qdq.set_carried(model, carried)
    ir.save(model, output, external_data=f"{output.name}.data", size_threshold_bytes=1024)
    return encodings


def override(text: str) -> tuple[str, Range]:
    """`NAME=MIN,MAX` -> (NAME, (MIN, MAX))."""
    name, equals, numbers = text.rpartition("=")
    try:
        low, high = (float(number) for number in numbers.split(","))
    except ValueError:
        low, high = np.nan, np.nan
    if not (name and equals and np.isfinite([low, high]).all() and low < high and low <= 0 <= high):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=MIN,MAX with finite numbers and MIN <= 0 <= MAX")
    return name, (low, high)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m converters.quantize", description="Quantises an ONNX graph to W8A16 for Hexagon."
    )
    parser.add_argument("--onnx", type=Path, required=True, help="float32 graph from converters.export_onnx")
    parser.add_argument("--calibration", type=Path, required=True, help="folder of .npz files, or one file")
    parser.add_argument("--output", type=Path, required=True, help="file to write, such as GRAPH_w8a16.onnx")
    parser.add_argument(
        "--estimate", action="store_true", help="only print and write (OUTPUT.estimate.json) the accuracy it would have"
    )
    parser.add_argument(
        "--keep-float",
        action="append",
        default=[],
        metavar="PATTERN",
        help="also leave these nodes in FP16, such as '*conv_out*'; may be given several times",
    )
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        type=override,
        metavar="PATTERN=MIN,MAX",
        help="range of these values, instead of what the samples show; may be given several times",
    )
    parser.add_argument(
        "--rounding",
        choices=precision_plan.ROUNDINGS,
        help="of the weights: to nearest, so that errors of one layer make up for each other (compensated) and for "
        "those of the layers before (sequential), or learned (default: the graph's)",
    )
    parser.add_argument("--float-ends", action="store_true", help="leave inputs and outputs float32")
    parser.add_argument("--force", action="store_true", help="quantise even a graph that is meant to stay in FP16")
    parser.add_argument("--seed", type=int, default=0, help="of the places where rounding looks at pictures")
    return parser.parse_args(argv)


def table(snr: Mapping[str, Mapping[str, float | None]]) -> str:
    """One line per output: SNR of the whole, of the weights alone, of the activations alone."""
    show: Callable[[float | None], str] = lambda value: "nan" if value is None else f"{value:.1f}"
    rows = [("output", *(kind.replace("_", " ") for kind in snr))]
    rows += [(name, *(show(values[name]) for values in snr.values())) for name in snr["quantised"]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    plan = precision_plan.plan_for(args.onnx.stem, args.keep_float, args.rounding)
    report = quantize_graph(
        args.onnx,
        args.calibration,
        args.output,
        plan,
        overrides=dict(args.override),
        float_ends=args.float_ends,
        seed=args.seed,
        estimate=args.estimate,
        force=args.force,
    )
    done = f"{args.onnx.name} on {report['calibration_samples']} samples in {report['seconds']:.0f} s"
    if args.estimate:
        print(f"estimate for {done}, dB:\n{table(report['snr_db'])}")
        return 0
    number = lambda item: -np.inf if item[1] is None else item[1]
    worst = {kind: min(values.items(), key=number) for kind, values in report["snr_db"].items()}
    shown = ", ".join(f"{kind.replace('_', ' ')} {number(item):.1f} dB ({item[0]})" for kind, item in worst.items())
    print(f"quantised {done}; worst output: {shown}: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
