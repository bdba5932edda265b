"""What every graph of a model folder costs on a Hexagon chip, and how accurate it is: a table.

    python -m experiments.device_table --model DIR --output table --soc 8-elite --run 2
    python -m experiments.device_table --model DIR --output table --capture CAPTURE --precisions fp16,w8a16

For every graph: exported and compared with JAX, quantised where it has a plan for that, compiled, its DRAM bytes read
off the compiler's plan, and run on the HTP simulator against float32. Samples are those of `experiments.generate
--capture`, or random ones that the export draws; a part of them calibrates, others are run. Each step is a process, so
that its memory comes back. What fails is noted in its row, and the next one follows. The same command again does what
is missing, and anew what is of weights or samples that were written since.

    OUTPUT/device_table.json    all rows
    OUTPUT/GRAPH/               graph, binaries, reports; notes and logs of the commands in steps/
"""

import argparse
import math
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.device_steps import Step, python, read_note, run_steps
from nd_jax.errors import UserError, run_command

TABLE = "device_table.json"
PRECISIONS = ("fp16", "w8a16")
PART = re.compile(r"(mmdit_stage\d+)_blocks(\d+)-(\d+)")
HEAD = (
    *("graph", "precision", "samples", "nodes (transposes)", "against JAX, dB", "simulator, dB", "compile, CPU s"),
    *("memory, GB", "binary, MB", "DRAM read, MB", "written, MB", "a sample, CPU s"),
)


def device_table(
    model: Path,
    output: Path,
    soc: str,
    graphs: Sequence[str] | None = None,
    precisions: Sequence[str] = PRECISIONS,
    runs: int = 1,
    capture: Path | None = None,
    *,
    limit: float | None = 600,
    keep_tflite: bool = False,
    lean: bool = False,
    export: Sequence[str] = (),
    quantize: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Measures graphs of a model folder, and writes OUTPUT/device_table.json after each.

    Args:
      model: released layout.
      output: created if needed; what is done there is not done again.
      soc: a name of `converters.hexagon.SOC_MODELS`.
      graphs: names of `converters.graphs.GRAPHS`, or parts such as `mmdit_stage0_blocks0-6`; by default those that
        the folder's mode needs.
      precisions: of `PRECISIONS`; w8a16 for graphs with a plan of `converters.precision_plan` only.
      runs: samples on the simulator at most; 0 compiles only.
      capture: folder of `experiments.generate --capture`; random samples for graphs that it does not have.
      limit: seconds for the samples of a graph on the simulator; None for no limit.
      keep_tflite: keep the .tflite of the export.
      lean: delete weights and binaries of a graph when its rows are complete.
      export, quantize: further arguments of these commands.

    Returns:
      All rows of the table, those of earlier calls too; see `read_row`.

    Raises:
      UserError: unknown chip, graph or precision, no such folder. What fails for one graph is in its row.
    """
    from converters import hexagon
    from converters.output_files import write_json

    hexagon.soc_model(soc)
    hexagon.require_compiler()
    unknown = [name for name in precisions if name not in PRECISIONS]
    if unknown:
        raise UserError(f"precision {unknown[0]!r} is unknown; give some of {', '.join(PRECISIONS)}")
    if capture is not None and not capture.is_dir():
        raise UserError(f"{capture}: no such folder; make it with experiments.generate --capture")
    transformer, graphs = _choose(model, graphs)
    output.mkdir(parents=True, exist_ok=True)
    rows = _rows_before(output, model)
    for graph in graphs:
        folder = output / graph
        samples = sample_source(folder, graph, capture)
        exported = export_step(model, folder, graph, transformer, samples, keep_tflite, export)
        for precision in [name for name in precisions if name == "fp16" or has_plan(graph)]:
            try:
                run_steps(folder, [exported])
                count = split_samples(samples, folder)
                run_steps(folder, [exported, *steps(folder, graph, precision, soc, min(runs, count), limit, quantize)])
            except UserError as error:
                print(f"{graph}, {precision}: {error}", flush=True)
            row = read_row(folder, graph, precision, soc, captured=samples.is_dir())
            rows[graph, precision, soc] = row
            write_json(output / TABLE, {"model": str(model.resolve()), "rows": list(rows.values())})
            print("  ".join(cells(row)), flush=True)
        if lean:
            for path in (*folder.glob("*.data"), *folder.glob("*.bin")):
                path.unlink()
    return list(rows.values())


def _rows_before(output: Path, model: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(graph, precision, soc) -> row of an earlier call."""
    from nd_jax.weights.sources import read_json

    if not (output / TABLE).exists():
        return {}
    table = read_json(output / TABLE)
    if table["model"] != str(model.resolve()):
        raise UserError(f"{output}: holds the table of {table['model']}; choose another --output for {model}")
    return {(row["graph"], row["precision"], row["soc"]): row for row in table["rows"]}


def _choose(model: Path, graphs: Sequence[str] | None) -> tuple[str, list[str]]:
    """(subfolder of the transformer, the graphs); named graphs need no more of the folder than they are made of."""
    from converters.bundle_manifest import graph_names
    from converters.graphs import GRAPHS, TRANSFORMER
    from converters.precision_plan import network_of
    from nd_jax.generate.first_frame import has_first_frame, open_first_frame
    from nd_jax.generate.model_folder import open_model
    from nd_jax.generate.super_resolution import has_super_resolution

    if not model.is_dir():
        raise UserError(f"{model}: no such folder; give a model folder in the released layout")
    unknown = [name for name in graphs or () if network_of(name) not in GRAPHS]
    if unknown:
        raise UserError(f"graph {unknown[0]!r} does not exist; choose among {', '.join(sorted(GRAPHS))}")
    if graphs is not None and not any(TRANSFORMER in GRAPHS[network_of(name)][0] for name in graphs):
        return TRANSFORMER, list(graphs)
    opened = open_model(model)
    if graphs is None:
        first = open_first_frame(model) if opened.mode == "hybrid" and has_first_frame(model) else None
        graphs = graph_names(opened, first, has_super_resolution(model))
    return opened.parts["transformer"], list(graphs)


def has_plan(graph: str) -> bool:
    """Whether a graph is meant for W8A16; text networks are not."""
    from converters.precision_plan import PLANS, network_of

    return network_of(graph) in PLANS


# --- samples ----------------------------------------------------------------------------------------------------------


def sample_source(folder: Path, graph: str, capture: Path | None) -> Path:
    """The captured samples of a graph, or else the file of random ones that its export writes."""
    part = PART.fullmatch(graph)
    whole = part[1] if part else graph
    # A part behind the first block takes what the blocks before it make, which is not captured.
    if capture is not None and (not part or part[2] == "0") and (capture / whole).is_dir():
        return (capture / whole).resolve()
    return folder / f"{graph}.inputs.npz"


def split_samples(source: Path, folder: Path) -> int:
    """Makes FOLDER/calibration and FOLDER/held_out of all samples, and returns how many are held out.

    Of fewer than eight samples every second one is held out, else every fourth.

    Raises:
      UserError: a single sample, or none.
    """
    from converters.samples import sample_files

    files = sample_files(source) if source.is_dir() else None
    stacks = {} if files else dict(np.load(source))
    count = len(files) if files else len(next(iter(stacks.values())))
    if count < 2:
        raise UserError(f"{source}: holds {count} samples; two are needed, one to calibrate on and one to run")
    every = 2 if count < 8 else 4
    for name in ("calibration", "held_out"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir(parents=True)
    for i in range(count):
        place = folder / ("held_out" if i % every == every - 1 else "calibration")
        if files:
            (place / files[i].name).symlink_to(files[i])
        else:
            np.savez(place / f"random_{i}.npz", **{name: stack[i] for name, stack in stacks.items()})
    return count // every


# --- commands ---------------------------------------------------------------------------------------------------------


def export_step(
    model: Path, folder: Path, graph: str, transformer: str, samples: Path, keep_tflite: bool, more: Sequence[str]
) -> Step:
    from converters.graphs import component_folders

    part, onnx = PART.fullmatch(graph), folder / f"{graph}.onnx"
    reads = [model / "generation.json", *component_folders(part[1] if part else graph, model, transformer).values()]
    command = python("converters.export_onnx", "--model", model, "--graph", part[1] if part else graph)
    command += ["--output", str(folder)]
    command += ["--transformer", transformer]
    command += ["--blocks", f"{part[2]}:{part[3]}"] if part else []
    if samples.is_dir():
        command += ["--samples", str(samples)]
        reads.append(samples)
    command += ["--keep-tflite"] if keep_tflite else []
    return Step("export", [*command, *more], files=(onnx, onnx.with_name(f"{onnx.name}.data")), reads=tuple(reads))


def steps(
    folder: Path, graph: str, precision: str, soc: str, runs: int, limit: float | None, quantize: Sequence[str]
) -> list[Step]:
    """What follows the export for one row."""
    onnx, found, before = folder / f"{graph}.onnx", [], ("export",)
    compiled_from, reference = onnx, []
    if precision == "w8a16":
        compiled_from, reference = folder / f"{graph}_w8a16.onnx", ["--reference", onnx]
        command = python("converters.quantize", "--onnx", onnx, "--calibration", folder / "calibration")
        files = (compiled_from, compiled_from.with_name(f"{compiled_from.name}.data"))
        found.append(Step("quantize", [*command, "--output", str(compiled_from), *quantize], before, files))
        before = ("export", "quantize")
    wrapper = folder / f"{compiled_from.stem}_{soc}.onnx"
    command = python("converters.compile_hexagon", "--onnx", compiled_from, "--output", folder, "--soc", soc)
    files = (wrapper, wrapper.with_name(f"{wrapper.stem}_qnn.bin"))
    found.append(Step(f"compile_{precision}_{soc}", [*command, "--traffic"], before, files))
    if runs:
        command = python("converters.simulate_hexagon", "--onnx", compiled_from, "--compiled", wrapper, "--soc", soc)
        command += [*map(str, reference), "--inputs", str(folder / "held_out"), "--run", str(runs)]
        command += ["--output", str(wrapper.with_suffix(".simulator.json"))]
        before = (*before, found[-1].name)
        found.append(Step(f"simulate_{precision}_{soc}", command, before, limit=limit))
    return found


# --- rows -------------------------------------------------------------------------------------------------------------


def read_row(folder: Path, graph: str, precision: str, soc: str, captured: bool) -> dict[str, Any]:
    """A row from what the steps of a graph wrote: what is missing or failed is absent.

    Returns:
      {"graph", "precision", "soc", "inputs": "captured" or "random", "export", "quantize", "compile", "simulator": the
      reports of the commands, each with "step": its note; "error": {step: why it failed}}.
    """
    from nd_jax.weights.sources import read_json

    stem = graph if precision == "fp16" else f"{graph}_w8a16"
    reports = {
        "export": ("export", f"{graph}.json"),
        "quantize": ("quantize", f"{graph}_w8a16.json"),
        "compile": (f"compile_{precision}_{soc}", f"{stem}_{soc}.json"),
        "simulator": (f"simulate_{precision}_{soc}", f"{stem}_{soc}.simulator.json"),
    }
    if precision == "fp16":
        del reports["quantize"]
    row = {"graph": graph, "precision": precision, "soc": soc}
    row |= {"inputs": "captured" if captured else "random", "error": {}}
    newest = 0.0
    for name, (step, file) in reports.items():
        note = read_note(folder, step)
        if note is None or note["finished"] < newest:
            break  # Of an earlier state of the graph.
        newest = note["finished"]
        if "error" in note:
            row["error"][name] = note["error"]
            break
        row[name] = read_json(folder / file) | {"step": note}
    return row


def lowest(snr: Mapping[str, float | None] | None) -> str:
    """Lowest to highest SNR over the outputs."""
    if not snr:
        return "-"
    values = [math.nan if value is None else value for value in snr.values()]
    if not np.isfinite(values).all():
        return "not finite"
    low, high = min(values), max(values)
    return f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} to {high:.1f}"


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row as texts, in the order of `HEAD`."""
    exported, compiled, simulator = row.get("export"), row.get("compile"), row.get("simulator")
    texts = [row["graph"], row["precision"].upper(), row["inputs"], *["-"] * (len(HEAD) - 3)]
    if exported:
        texts[3:5] = f"{exported['nodes']} ({exported['ops'].get('Transpose', 0)})", lowest(exported["snr_db"])
    if compiled:
        texts[6:8] = f"{compiled['compile_cpu_seconds']:.1f}", f"{compiled['compile_peak_bytes'] / 1e9:.2f}"
        texts[8:11] = f"{compiled['binary_bytes'] / 1e6:.3g}", *_moved(compiled["traffic"])
    if simulator:
        seconds = simulator["step"]["cpu_seconds"] / simulator["samples"]
        texts[5], texts[11] = lowest(simulator["snr_db"]), f"{seconds:.1f}"
    return texts


def _moved(traffic: Mapping[str, int]) -> list[str]:
    """Megabytes read and written, and the part of operators outside VTCM where it is a hundredth or more."""
    texts = []
    for kind in ("read", "write"):
        total, outside = traffic[f"dram_{kind}_bytes"], traffic.get(f"outside_{kind}_bytes", 0)
        texts.append(f"{total / 1e6:.3g}" + (f" (outside VTCM {outside / 1e6:.3g})" if outside > total / 100 else ""))
    return texts


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table whose columns also line up on a terminal; errors are below it."""
    body = [cells(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(HEAD, *body, strict=True)]
    lines = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in (HEAD, *body)]
    lines.insert(1, ["-" * width for width in widths])
    errors = [
        f"{row['graph']}, {row['precision']}: {step}: {why}" for row in rows for step, why in row["error"].items()
    ]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + errors)


# --- command ----------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.device_table",
        description="Export, quantise, compile and simulate the graphs of a model folder; the same command continues.",
        allow_abbrev=False,
    )
    names = lambda text: [name for name in text.split(",") if name]
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="model folder in the released layout")
    add("--output", type=Path, required=True, metavar="DIR", help="graphs, binaries, reports and device_table.json")
    add("--soc", default="8-elite", help="chip, see converters.compile_hexagon (default 8-elite)")
    add("--capture", type=Path, metavar="DIR", help="samples of experiments.generate --capture (default: random)")
    add("--graphs", type=names, metavar="A,B", help="also parts: mmdit_stage0_blocks0-6 (default: what the mode needs)")
    add("--precisions", type=names, default=list(PRECISIONS), metavar="A,B", help="default fp16,w8a16")
    add("--run", type=int, default=1, metavar="N", help="samples on the simulator; 0 compiles only (default 1)")
    add("--limit", type=float, default=600, metavar="S", help="seconds for them; 0 for no limit (default 600)")
    add("--keep-tflite", action="store_true", help="keep GRAPH.tflite, which the export passes anyway")
    add("--lean", action="store_true", help="delete weights and binaries of a graph when its rows are complete")
    add("--export", action="append", default=[], metavar="ARG", help="further argument of converters.export_onnx")
    add("--quantize", action="append", default=[], metavar="ARG", help="further argument of converters.quantize")
    args = parser.parse_args(argv)
    if args.run < 0 or args.limit < 0:
        parser.error("--run and --limit must not be negative")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, 1 if a row is incomplete; raises UserError."""
    args = parse(argv)
    rows = device_table(
        args.model,
        args.output,
        args.soc,
        args.graphs,
        args.precisions,
        args.run,
        args.capture,
        limit=args.limit or None,
        keep_tflite=args.keep_tflite,
        lean=args.lean,
        export=args.export,
        quantize=args.quantize,
    )
    print(markdown(rows))
    failed = sum(bool(row["error"]) for row in rows)
    print(f"{len(rows)} rows, {failed} with an error: {args.output / TABLE}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
