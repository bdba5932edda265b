"""A store or a training run -> a model folder in the released layout.

    python -m converters.export_torch --checkpoint DIR --output DIR [--step N] [--dtype float32|bfloat16|float16]

A component that was imported from safetensors and is exported in its own dtype gets the very files that it came from:
keys, order, metadata and shards. Everything else is written with all tied keys to one file.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from converters.byte_progress import byte_progress
from converters.peak_memory import peak_bytes
from nd_jax.errors import UserError, run_command
from nd_jax.files import write_text
from nd_jax.train.deployed import load_deployed
from nd_jax.weights.folder import Component, save_component
from nd_jax.weights.store import is_store, load_stored, read_store

REPORT = "export.json"
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def export_torch(
    checkpoint: Path, output: Path, step: int | None = None, dtype: str | None = None, ema: bool = True
) -> dict:
    """Exports every component of a checkpoint and returns the report that `OUTPUT/export.json` holds.

    Args:
      checkpoint: a store of imported weights, or the workdir of a training run.
      output: the model folder; component folders in it that have the same names are replaced.
      step: of a training run; by default the last one.
      dtype: of the files, a key of `DTYPES`; by default that of the checkpoint.
      ema: of a training run that kept moving averages, export those.

    Raises:
      UserError: the checkpoint is neither, or damaged; a value does not fit `dtype`; the output cannot be written.
    """
    begin = time.perf_counter()
    if is_store(checkpoint):
        if step is not None:
            raise UserError(f"--step {step}: {checkpoint} holds imported weights, which have no steps; leave it out")
        index = read_store(checkpoint)
        total = sum(entry["bytes"] for entry in index["components"].values())
        folders = {name: checkpoint / name for name in index["folders"]}
        components = ((name, load_stored(checkpoint, name)) for name in index["components"])
    elif (checkpoint / "checkpoints").is_dir():
        deployed = load_deployed(checkpoint, step, ema)
        total = sum(leaf.nbytes for c in deployed.components.values() for leaf in jax.tree.leaves(c.params))
        folders, components = deployed.tokenizers, iter(deployed.components.items())
    else:
        raise UserError(
            f"{checkpoint}: neither a store (model.json) nor a training workdir (checkpoints/); check the path"
        )
    return _write(components, folders, total, checkpoint, output, dtype, begin)


def _write(
    components: Iterator[tuple[str, Component]],
    folders: dict[str, Path],
    total: int,
    checkpoint: Path,
    output: Path,
    dtype: str | None,
    begin: float,
) -> dict:
    report = {"checkpoint": str(checkpoint), "components": {}, "copied": sorted(folders), "skipped": {}}
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be created ({error.strerror}); choose another --output") from error
    with byte_progress("export", total) as on_bytes:
        # `next` instead of a `for`, whose variable would keep a component while the next one is being loaded.
        while (pair := next(components, None)) is not None:
            name, component = pair
            if component.network.partial:
                report["skipped"][name] = f"{component.network.name} is only a part of its released class"
                continue
            save_component(
                output / name,
                component.network,
                component.config,
                component.params,
                dtype=None if dtype is None else DTYPES[dtype],
                origin=component.origin,
                on_bytes=on_bytes,
            )
            leaves = jax.tree.leaves(component.params)
            report["components"][name] = {
                "network": component.network.name,
                "parameters": sum(leaf.size for leaf in leaves),
                "bytes": sum(path.stat().st_size for path in (output / name).iterdir()),
                "dtypes": [dtype] if dtype else sorted({str(leaf.dtype) for leaf in leaves}),
            }
            del pair, component, leaves
    for name, folder in folders.items():
        try:
            shutil.copytree(folder, output / name, dirs_exist_ok=True)
        except OSError as error:
            raise UserError(f"{output / name}: cannot be written ({error}); free space or check permissions") from error
    for key in ("parameters", "bytes"):
        report[key] = sum(entry[key] for entry in report["components"].values())
    report |= {"seconds": time.perf_counter() - begin, "peak_bytes": peak_bytes()}
    write_text(output / REPORT, json.dumps(report, indent=1) + "\n")
    return report


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m converters.export_torch",
        description="Export a checkpoint as a model folder in the released layout.",
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="store of imported weights, or training workdir")
    parser.add_argument("--output", type=Path, required=True, help="model folder to write component folders into")
    parser.add_argument("--step", type=int, help="step of a training run; by default its last checkpoint")
    parser.add_argument("--no-ema", action="store_true", help="the weights themselves where a run kept moving averages")
    parser.add_argument("--dtype", choices=list(DTYPES), help="dtype of the files; by default the checkpoint's")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    report = export_torch(args.checkpoint, args.output, args.step, args.dtype, ema=not args.no_ema)
    for name, reason in report["skipped"].items():
        print(f"skipped {name}: {reason}", file=sys.stderr)
    print(
        f"exported {len(report['components'])} components, {report['parameters']:,} parameters, "
        f"{report['bytes'] / 1e9:.3f} GB at {report['bytes'] / 1e9 / report['seconds']:.2f} GB/s: {args.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
