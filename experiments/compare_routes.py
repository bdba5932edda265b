"""Our route from JAX to the Hexagon compiler beside two others, graph by graph.

    python -m experiments.compare_routes --model DIR --output DIR [--graphs A,B] [--jax2onnx PYTHON]

    ours      TFLite, tf2onnx, the rewriting pass: the graph of `converters.export_onnx`
    tf2onnx   the same without the rewriting pass
    jax2onnx  by the package of that name, in the environment that PYTHON belongs to; "not run" without one

All three trace the same `Graph.apply` with the same weights, are compiled in FP16 for the same chip, and run on the HTP
simulator on the same inputs. SNRs are against the model that training uses, in float32 in JAX; they differ by several
dB from input to input, so routes are compared by the differences on the same input. Writes DIR/routes.json after every
row, and goes on behind the last one when it is called again; rows of weights that were written since are made anew.

What holds weights or runs JAX is a process of its own (`converters.apart`): the memory is the compiler's afterwards.
"""

import argparse
import dataclasses
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters import (
    export_onnx,
    graph_sizes,
    graphs,
    hexagon,
    jax2onnx_route,
    onnx_check,
    onnx_edit,
    tflite_route,
)
from converters.apart import apart
from converters.graph import TRANSFORMER, GraphOptions
from converters.output_files import write_json
from converters.progress import stages
from converters.samples import Sample, read_arrays
from nd_jax.errors import UserError, run_command
from nd_jax.files import state_of_files

ROUTES = ("ours", "tf2onnx", "jax2onnx")
RESULT = "routes.json"
# Of a video of nine frames of 64 x 64 pixels, whatever the folder's own sizes are: full-width networks, small calls.
TOY_SIZES = {
    "length": 16,
    "latent_height": 8,
    "latent_width": 8,
    "latent_frames": 2,
    "height": 64,
    "width": 64,
    "image_latent_height": 16,
    "image_latent_width": 16,
    "context_length": 16,
}
# What is compared beside the SNR, less being better: key of a row -> (its name, unit of the table, format).
MEASURES = {
    "nodes": ("nodes", 1, "{:.0f}"),
    "transposes": ("transposes", 1, "{:.0f}"),
    "dram_read_bytes": ("bytes read", 1e4, "{:.2f} MB"),
    "dram_write_bytes": ("bytes written", 1e4, "{:.2f} MB"),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph to be exported, what its forms run on, and what the model makes of that in JAX, in files.

    Attributes:
      name: the one in `graphs.GRAPHS`.
      file_name: that of the graph, which may say more.
      model: folder in the released layout, out of which each process loads the weights that it needs.
      options: sizes of the graph.
      soc: the chip.
      inputs, references: stacks of samples, one array for each input and output; both None where nothing is run.
    """

    name: str
    file_name: str
    model: Path
    options: GraphOptions
    soc: str
    inputs: Path | None = None
    references: Path | None = None


def load_case(model: Path, name: str, options: GraphOptions, soc: str, count: int, seed: int, folder: Path) -> Case:
    """Loads the graph, draws `count` inputs and runs the model on them; both are written into the folder.

    Raises:
      UserError: the graph does not load.
    """
    graph, rng = graphs.load_graph(name, model, options), np.random.default_rng(seed)
    case = Case(name, graph.name, model, options, soc)
    if not count:
        return case
    samples = [graph.sample(rng) for _ in range(count)]
    names = [spec.name for spec in graph.outputs]
    results = [graph.reference(*(sample[spec.name] for spec in graph.inputs)) for sample in samples]
    references = [dict(zip(names, map(np.asarray, outputs), strict=True)) for outputs in results]
    case = dataclasses.replace(case, inputs=folder / "inputs.npz", references=folder / "references.npz")
    write_stack(case.inputs, samples)
    write_stack(case.references, references)
    return case


def write_stack(path: Path, samples: list[Sample]) -> None:
    """At least one sample, each with the same names and shapes, as one array for each name."""
    np.savez(path, **{name: np.stack([sample[name] for sample in samples]) for name in samples[0]})


def read_stack(path: Path) -> list[Sample]:
    """The samples of a file of `write_stack`."""
    arrays = read_arrays(path)
    return [dict(zip(arrays, parts, strict=True)) for parts in zip(*arrays.values(), strict=True)]


def write_onnx(case: Case, route: str, folder: Path, python: Path | None) -> tuple[Path, float]:
    """Exports the graph by one route into the folder; returns the file and the seconds.

    Raises:
      UserError: the route cannot convert the graph.
    """
    import onnx_ir as ir

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{case.file_name}.onnx"
    if route == "jax2onnx":
        return path, jax2onnx_route.export(python, case.model, case.name, case.options, path)
    graph = graphs.load_graph(case.name, case.model, case.options)
    start = time.perf_counter()
    trace = tflite_route.trace if route == "tf2onnx" else lambda *args: export_onnx.convert(*args)[0]
    model = trace(graph, path.with_suffix(".tflite"))
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=1024)
    return path, time.perf_counter() - start


def export(case: Case, route: str, folder: Path, python: Path | None) -> tuple[Path, dict[str, Any]]:
    """The ONNX file by one route, and what there is to say of it before it is compiled.

    Raises:
      UserError: as `write_onnx`.
    """
    import onnx_ir as ir

    path, seconds = write_onnx(case, route, folder, python)
    model = ir.load(path)
    ops = onnx_edit.op_counts(model)
    row = {
        "export_seconds": round(seconds, 2),
        "nodes": sum(ops.values()),
        "transposes": onnx_edit.transpose_count(model),
        "ops": ops,
    }
    if case.inputs is not None:
        outputs = onnx_check.run_on_cpu(path, read_stack(case.inputs))
        row["cpu_snr_db"] = _worst(read_stack(case.references), outputs)
    return path, row


def measure(case: Case, route: str, folder: Path, python: Path | None) -> dict[str, Any]:
    """One row. An export, a compilation or a run that fails is a result too: `failed` says at what, `reason` why."""
    step, row = "export", {}
    try:
        path, row = apart(f"graph {case.name} by {route}", export, case, route, folder, python)
        step = "compile"
        wrapper = folder / f"{case.file_name}_{case.soc}.onnx"
        binary = hexagon.compile_binary(path, wrapper, case.soc, traffic=True)
        row |= {
            "compile_seconds": round(binary.seconds, 2),
            "compile_cpu_seconds": round(binary.cpu_seconds, 2),
            "compile_peak_bytes": binary.peak_bytes,
            "binary_bytes": binary.bytes,
            "dram_read_bytes": binary.traffic["dram_read_bytes"],
            "dram_write_bytes": binary.traffic["dram_write_bytes"],
        }
        if case.inputs is None:
            return {**row, "failed": None}
        step = "run"
        result = hexagon.run_on_simulator(wrapper, case.soc, read_stack(case.inputs))
    except UserError as error:
        reason = str(error)
        return {**row, "failed": step, "reason": reason, "refused": refused_operators(reason)}
    pairs = zip(read_stack(case.references), result.outputs, strict=True)
    return {
        **row,
        "failed": None,
        "simulator_seconds": [round(s, 2) for s in result.seconds],
        "snr_db": [_worst([reference], [output]) for reference, output in pairs],
    }


def refused_operators(reason: str) -> list[str]:
    """Operators that the HTP does not take, out of the compiler's message, which may be cut; empty if it names none."""
    return sorted(set(re.findall(r"name: [^{}]*?, type: (\w+) \}", reason)))


def _worst(references: list[Sample], results: list[Sample]) -> float | None:
    """Lowest SNR of all outputs and samples; None where a value is not finite."""
    return onnx_check.json_number(float(np.min(list(onnx_check.worst_snr_db(references, results).values()))))


# --- rows -------------------------------------------------------------------------------------------------------------


def read_rows(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{graph: {route: row}} of an earlier run; empty without one.

    Raises:
      UserError: it was made with other settings.
    """
    if not path.exists():
        return {}
    try:
        report = json.loads(path.read_text())
        found, rows = report["settings"], report["graphs"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a result of this command; choose another --output") from error
    other = [name for name, value in settings.items() if found.get(name) != value]
    if other:
        changed = ", ".join(f"{name} {found.get(name)} instead of {settings[name]}" for name in other)
        raise UserError(f"{path}: was made with {changed}; choose another --output")
    return rows


def behind(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where our row of a graph is neither best nor equal: one phrase each.

    Numbers are compared as the table shows them, SNRs by `snr_difference`. Routes that the device does not run count as
    well, with what they have.
    """
    ours, found = rows["ours"], []
    for route, row in rows.items():
        if route == "ours":
            continue
        runs = "" if row["failed"] is None else ", which the HTP does not run"
        for key, (name, unit, form) in MEASURES.items():
            if key in row and (key not in ours or round(row[key] / unit) < round(ours[key] / unit)):
                own = _number(ours[key], unit, form) if key in ours else "none"
                found.append(f"{name}: {own}, {route} {_number(row[key], unit, form)}{runs}")
        difference = snr_difference(ours, row)
        if difference is not None and difference[0] > 2 * difference[1]:
            found.append("SNR: {} {:.1f} +- {:.1f} dB above ours".format(route, *difference))
    return found


def snr_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[float, float] | None:
    """How many dB theirs is above ours on the same input: mean and standard error over the samples.

    None where one of them did not run. A result that is not finite counts as 0 dB; of one sample the error is 0.
    """
    if not ours.get("snr_db") or not theirs.get("snr_db"):
        return None
    differences = np.subtract(*([x or 0.0 for x in row["snr_db"]] for row in (theirs, ours)))
    error = np.std(differences, ddof=1) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return float(np.mean(differences)), float(error)


def _number(value: float, unit: float, form: str) -> str:
    return form.format(value / 1e6 if unit == 1e4 else value)


def table(graph_rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The rows as Markdown."""
    heads = (
        "graph",
        "route",
        "nodes (transposes)",
        "float32",
        "compile, CPU s",
        "DRAM read",
        "written",
        "simulator",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for graph, rows in graph_rows.items():
        for route in ROUTES:
            lines.append(f"| `{graph}` | {route} | {' | '.join(_cells(rows.get(route)))} |")
    return "\n".join(lines)


def _cells(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return ["not run", *[""] * 5]
    if row["failed"] == "export":
        return [f"not exported: {row['reason']}", *[""] * 5]
    first = [f"{row['nodes']} ({row['transposes']})", _snr(row, "cpu_snr_db")]
    if row["failed"] == "compile":
        return [*first, "", "", "", f"refused: {', '.join(row['refused']) or row['reason']}"]
    moved = [f"{row[key] / 1e6:.2f} MB" for key in ("dram_read_bytes", "dram_write_bytes")]
    last = row["reason"] if row["failed"] else _snr(row, "snr_db")
    return [*first, f"{row['compile_cpu_seconds']:.1f}", *moved, last]


def _snr(row: Mapping[str, Any], key: str) -> str:
    """The lowest SNR of the samples; with several, their mean before it."""
    if key not in row:
        return "not run"
    values = row[key] if isinstance(row[key], list) else [row[key]]
    if None in values:
        return "not finite"
    lowest = f"{min(values):.1f} dB"
    return lowest if len(values) == 1 else f"{np.mean(values):.1f} dB, lowest {lowest}"


# --- command ----------------------------------------------------------------------------------------------------------


def graphs_of(model: Path) -> list[str]:
    """The graphs whose components a model folder has."""
    return [name for name, (folders, _) in graphs.GRAPHS.items() if all((model / f).is_dir() for f in folders)]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare_routes",
        description="Our route to the Hexagon compiler beside tf2onnx alone and jax2onnx, graph by graph.",
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="model folder in the released layout")
    add("--output", type=Path, required=True, help=f"folder for the graphs and {RESULT}; goes on where it stopped")
    add("--graphs", help="separated by commas (default: all that the folder has components for)")
    add(
        "--jax2onnx",
        type=Path,
        metavar="PYTHON",
        help=f"python of an environment with {jax2onnx_route.PACKAGES} (default: that route is not run)",
    )
    add("--size", choices=("folder", "toy"), default="folder", help="of generation.json (default), or small ones")
    add("--soc", default="8-elite", help=f"one of {', '.join(hexagon.SOC_MODELS)} (default 8-elite)")
    add("--transformer", default=TRANSFORMER, help="subfolder of the transformer (default %(default)s)")
    add("--blocks", type=export_onnx.blocks, metavar="A:B", help="blocks A to B - 1 of the transformer only")
    add("--samples", type=int, default=8, metavar="N", help="inputs on the simulator; 0 compiles only (default 8)")
    add("--seed", type=int, default=0, help="of the inputs")
    add("--keep", action="store_true", help="keep the graphs and binaries of all routes")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args = parse(argv)
    if args.samples < 0:
        raise UserError(f"--samples {args.samples} is negative")
    if not args.model.is_dir():
        raise UserError(f"{args.model}: no such folder; give a model folder with --model")
    hexagon.soc_model(args.soc)
    hexagon.require_compiler()
    names = args.graphs.split(",") if args.graphs else graphs_of(args.model)
    unknown = [name for name in names if name not in graphs.GRAPHS]
    if unknown or not names:
        raise UserError(f"--graphs {','.join(unknown)}: choose among {', '.join(graphs_of(args.model))}")
    sizes = TOY_SIZES if args.size == "toy" else graph_sizes.folder_sizes(args.model)
    settings = {
        "model": str(args.model),
        "soc": args.soc,
        "transformer": args.transformer,
        "blocks": list(args.blocks) if args.blocks else None,
        "samples": args.samples,
        "seed": args.seed,
        "sizes": sizes,
    }
    result = args.output / RESULT
    rows = read_rows(result, settings)
    options = GraphOptions(transformer=args.transformer, blocks=args.blocks, **sizes)
    wanted = [route for route in ROUTES if route != "jax2onnx" or args.jax2onnx is not None]
    args.output.mkdir(parents=True, exist_ok=True)
    folders = lambda name: graphs.component_folders(name, args.model, args.transformer).values()
    state = {name: {"model_files": state_of_files(folders(name))} for name in names}
    done = lambda name, route: rows.get(name, {}).get(route, {}).items() >= state[name].items()
    todo = {name: [route for route in wanted if not done(name, route)] for name in names}
    with stages(sum(map(len, todo.values()))) as begin:
        for name in filter(todo.get, names):
            with tempfile.TemporaryDirectory() as scratch:
                load = (args.model, name, options, args.soc, args.samples, args.seed, Path(scratch))
                case = apart(f"graph {name} in JAX", load_case, *load)
                for route in todo[name]:
                    begin(f"{name}: {route}")
                    folder = args.output / route / name
                    shutil.rmtree(folder, ignore_errors=True)
                    rows.setdefault(name, {})[route] = measure(case, route, folder, args.jax2onnx) | state[name]
                    write_json(result, {"settings": settings, "graphs": rows})
                    if not args.keep:
                        shutil.rmtree(folder, ignore_errors=True)
    shown = {name: rows[name] for name in names}
    print(table(shown))
    found = [f"{name}: {phrase}" for name in shown for phrase in behind(shown[name])]
    print("\n".join(["our route is neither best nor equal here:", *found] if found else ["our route is best or equal"]))
    print(f"compared {len(names)} graphs: {result}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
