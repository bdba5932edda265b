"""Every component of a model folder, into a store of Orbax checkpoints and out again: seconds, memory, and the bytes.

    python -m experiments.random_model --size teacher --output teacher
    python -m experiments.round_trip --model teacher --output round_trip [--components text_encoder_3,causal_video_vae]

A component is read by `converters.import_torch` and written by `converters.export_torch`, each a process of its own
that reports its largest resident memory. Then every file of the component's folder is compared, byte by byte, with the
one that came back. Store and copy are removed before the next component, so that the disk needs twice the largest one.

OUTPUT/round_trip.json has the numbers; the command fails when a file came back otherwise. The same command again does
what is missing. `ratio` is the memory of a process over the bytes of its component, and says nothing about small ones:
Python, JAX and Orbax alone have some hundred megabytes.
"""

import argparse
import filecmp
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.export_torch import REPORT as EXPORT_REPORT
from converters.import_torch import REPORT as IMPORT_REPORT
from converters.import_torch import find_components
from converters.output_files import write_json
from nd_jax.errors import UserError, run_command
from nd_jax.weights.sources import read_json

REPORT = "round_trip.json"
WAYS = ("import", "export")
COPIES = "round_trip"  # a folder of its own, so that nothing else in OUTPUT is removed


def planned(model: Path, names: Sequence[str] | None = None) -> list[str]:
    """The components of a model folder, all or those named.

    Raises:
      UserError: not a model folder, or it has no component of a name.
    """
    found = [plan.name for plan in find_components(model, None, None, None).components]
    unknown = [name for name in names or () if name not in found]
    if unknown:
        raise UserError(f"--components {','.join(unknown)}: {model} has only {', '.join(found)}")
    return [name for name in found if names is None or name in names]


def round_trip(source: Path, scratch: Path, keep: bool = False) -> dict[str, Any]:
    """One component folder through a store: the row of the report.

    Args:
      source: the component folder.
      scratch: a folder for store and copy; what is in it is replaced.
      keep: leave store and copy there.

    Raises:
      UserError: one of the two commands failed; the message is its own.
    """
    store, copy = scratch / "store", scratch / "model"
    shutil.rmtree(copy, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    row: dict[str, Any] = {}
    try:
        row["import"] = _run("converters.import_torch", "--source", source, "--output", store)
        imported = json.loads((store / IMPORT_REPORT).read_text(encoding="utf-8"))
        row["export"] = _run("converters.export_torch", "--checkpoint", store, "--output", copy)
        exported = json.loads((copy / EXPORT_REPORT).read_text(encoding="utf-8"))
        different = different_files(source, copy / source.name)
    finally:
        if not keep:
            shutil.rmtree(scratch, ignore_errors=True)
    (entry,) = imported["components"].values()
    for way, report in zip(WAYS, (imported, exported), strict=True):
        row[way] |= {"peak_bytes": report["peak_bytes"], "ratio": report["peak_bytes"] / entry["bytes"]}
    size = {name: entry[name] for name in ("network", "parameters", "bytes", "dtypes")}
    return {**size, **row, "different": different, "identical": not different}


def _run(module: str, *args: Any) -> dict[str, float]:
    """Runs a command; its seconds and those of the processors, the start of Python included."""
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", module, *map(str, args)], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UserError(f"{module}: {last.removeprefix('error: ')}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - begin, "cpu_seconds": cpu}


def different_files(one: Path, other: Path) -> list[str]:
    """Paths below two folders of the files that are not in both of them with the same bytes."""
    listed = [{path.relative_to(root) for path in root.rglob("*") if path.is_file()} for root in (one, other)]
    unlike = [p for p in listed[0] & listed[1] if not filecmp.cmp(one / p, other / p, shallow=False)]
    return sorted(map(str, [*(listed[0] ^ listed[1]), *unlike]))


def rows_before(output: Path, model: Path) -> dict[str, dict[str, Any]]:
    """Rows of an earlier call, without those of components that came back otherwise.

    Raises:
      UserError: the report there is that of another model folder.
    """
    if not (output / REPORT).is_file():
        return {}
    report = read_json(output / REPORT)
    if report["model"] != str(model.resolve()):
        raise UserError(f"{output}: holds the report of {report['model']}; choose another --output for {model}")
    return {name: row for name, row in report["components"].items() if row["identical"]}


def summarised(model: Path, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The report: all rows, and the largest memory of a process over the largest component."""
    largest = max(row["bytes"] for row in rows.values())
    return {
        "model": str(model.resolve()),
        "components": rows,
        "bytes": sum(row["bytes"] for row in rows.values()),
        "seconds": {way: sum(row[way]["seconds"] for row in rows.values()) for way in WAYS},
        "peak_over_largest": {way: max(row[way]["peak_bytes"] for row in rows.values()) / largest for way in WAYS},
        "identical": all(row["identical"] for row in rows.values()),
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The rows as Markdown, the largest component first."""
    lines = [
        "| component | network | size | in (CPU) | peak | out (CPU) | peak | same bytes |",
        "|---" * 8 + "|",
    ]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["bytes"]):
        cells = [name, row["network"], f"{row['bytes'] / 1e9:.3f} GB"]
        for way in WAYS:
            ratio = row[way]["ratio"]
            peak = f"{row[way]['peak_bytes'] / 1e9:.2f} GB" + (f" ({ratio:.2f}x)" if ratio < 10 else "")
            cells += [f"{row[way]['seconds']:.0f} s ({row[way]['cpu_seconds']:.0f} s)", peak]
        lines.append("| " + " | ".join([*cells, "yes" if row["identical"] else "no"]) + " |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.round_trip",
        description="Import every component of a model folder into a store, export it, and compare the bytes.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model folder in the released layout")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder for the report and the copies"
    )
    parser.add_argument("--components", metavar="A,B", help="only these, separated by commas (default all)")
    parser.add_argument("--keep", action="store_true", help=f"keep stores and copies in OUTPUT/{COPIES}")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    names = planned(args.model, args.components.split(",") if args.components else None)
    rows = rows_before(args.output, args.model)
    for name in names:
        if name not in rows:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows[name] = round_trip(args.model / name, args.output / COPIES / name, args.keep)
            write_json(args.output / REPORT, summarised(args.model, rows))
    report = summarised(args.model, rows)
    print(table(rows))
    changed = [f"{name}: {', '.join(row['different'])}" for name, row in rows.items() if row["different"]]
    if changed:
        raise UserError(f"came back otherwise: {'; '.join(changed)}; compare them with --keep")
    over = report["peak_over_largest"]
    print(
        f"{len(rows)} components, {report['bytes'] / 1e9:.1f} GB, came back byte by byte; peak memory over the largest "
        f"component: import {over['import']:.2f}, export {over['export']:.2f}: {args.output / REPORT}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
