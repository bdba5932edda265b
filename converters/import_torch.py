"""PyTorch weights -> a store of Orbax checkpoints.

    python -m converters.import_torch --source DIR_OR_FILE --output DIR [--network NAME] [--component NAME]

The source is a model folder in the released layout (one subfolder per component), one component folder, or one weights
file. Subfolders of a class that is not supported are skipped and named, on the screen and in
`OUTPUT/import.json`. Components stream: peak memory is the largest component and a little.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from converters.byte_progress import byte_progress
from converters.peak_memory import peak_bytes
from converters.torch_files import SUFFIXES, open_any_source
from nd_jax.errors import UserError, run_command
from nd_jax.files import write_text
from nd_jax.weights.folder import Component, component_hash, load_params, read_config, read_origin
from nd_jax.weights.networks import NETWORKS, Network, class_name, known_network
from nd_jax.weights.sources import WEIGHT_SUFFIXES, hash_files, read_json
from nd_jax.weights.store import save_store

REPORT = "import.json"


@dataclasses.dataclass(frozen=True)
class Plan:
    """One component to import: its name in the store, its config.json, its weights (a file or folder), its network."""

    name: str
    config: Path
    weights: Path
    network: Network | None

    @property
    def bytes(self) -> int:
        """Size of the weights files."""
        return sum(path.stat().st_size for path in self.files())

    def files(self) -> list[Path]:
        if self.weights.is_file():
            return [self.weights]
        return [path for path in self.weights.iterdir() if path.suffix in WEIGHT_SUFFIXES]

    def sha256(self) -> str:
        if self.weights.is_file():
            return hash_files([self.weights, self.config])
        return component_hash(self.weights)


@dataclasses.dataclass(frozen=True)
class Source:
    """What a source holds: components, folders to copy, and what is skipped, with the reason."""

    components: tuple[Plan, ...]
    folders: dict[str, Path]
    skipped: dict[str, str]


def find_components(source: Path, network: Network | None, component: str | None, config: Path | None) -> Source:
    """Looks at a source without reading weights.

    Args:
      source: model folder, component folder or weights file.
      network: what to read a single component as; by default what its config.json says.
      component: name of a single component in the store, or the only subfolder to import of a model folder.
      config: config.json of a single weights file; by default the one beside it.

    Raises:
      UserError: nothing to import is found, or an option does not fit the source.
    """
    if source.is_file():
        beside = config or source.parent / "config.json"
        if network is None and not beside.is_file():
            raise UserError(f"{source}: has no config.json beside it; give --config FILE, and --network NAME if needed")
        return Source((Plan(component or _name(source, network), beside, source, network),), {}, {})
    if not source.is_dir():
        raise UserError(f"{source}: no such file or folder; give --source an existing one")
    if config is not None:
        raise UserError(f"--config {config}: only for a single weights file, {source} is a folder")
    if (source / "config.json").is_file():
        found, _, _ = read_config(source, network)
        name = component or (found.name if found.partial else source.resolve().name)
        return Source((Plan(name, source / "config.json", source, network),), {}, {})
    if network is not None:
        raise UserError(f"--network {network.name}: only for a single component, {source} is a model folder")
    return _model_folder(source, component)


def _name(file: Path, network: Network | None) -> str:
    if network is not None and network.partial:
        return network.name
    generic = file.stem in ("model", "diffusion_pytorch_model", "pytorch_model")
    return file.resolve().parent.name if generic else file.stem


def _model_folder(source: Path, component: str | None) -> Source:
    components, folders, skipped = [], {}, {}
    subfolders = sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    if component is not None:
        if component not in {path.name for path in subfolders}:
            raise UserError(f"--component {component}: {source} has only {', '.join(p.name for p in subfolders)}")
        subfolders = [source / component]
    for folder in subfolders:
        if "tokenizer" in folder.name:
            folders[folder.name] = folder
        elif not (folder / "config.json").is_file():
            skipped[folder.name] = "no config.json"
        else:
            name = class_name(read_json(folder / "config.json"))
            network = known_network(name)
            if network is None:
                skipped[folder.name] = f"class {name} is not supported"
            else:
                components.append(Plan(folder.name, folder / "config.json", folder, network))
    if not components:
        reasons = "; ".join(f"{name}: {why}" for name, why in skipped.items()) or "it has no subfolders"
        raise UserError(f"{source}: holds no supported component ({reasons}); give a model or component folder")
    return Source(tuple(components), folders, skipped)


def load(plan: Plan, on_bytes) -> Component:
    """Reads one planned component, in the dtypes of its source, with provenance."""
    network, config, _ = read_config(plan.config, plan.network)
    with contextlib.closing(open_any_source(plan.weights)) as source:
        # Before the parameters: comparing the constant buffers takes memory of its own.
        origin = read_origin(network, config, plan.config, source, str(plan.weights))
        params = load_params(network, config, source, str(plan.weights), on_bytes=on_bytes)
    return Component(network, config, params, dataclasses.replace(origin, sha256=plan.sha256()))


def import_torch(
    source: Path,
    output: Path,
    network: Network | None = None,
    component: str | None = None,
    config: Path | None = None,
) -> dict:
    """Imports a source into a store and returns the report that `OUTPUT/import.json` holds. See `find_components`."""
    begin = time.perf_counter()
    found = find_components(source, network, component, config)
    for name, reason in found.skipped.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)
    with byte_progress("import", sum(plan.bytes for plan in found.components)) as on_bytes:

        def components() -> Iterator[tuple[str, Component]]:
            for plan in found.components:
                yield plan.name, load(plan, on_bytes)

        index = save_store(output, components(), str(source), found.folders)
    entries = index["components"]
    report = {
        "source": str(source),
        "components": {
            name: {key: entry[key] for key in ("network", "source", "sha256", "parameters", "bytes", "dtypes")}
            for name, entry in entries.items()
        },
        "copied": sorted(found.folders),
        "skipped": found.skipped,
        "parameters": sum(entry["parameters"] for entry in entries.values()),
        "bytes": sum(entry["bytes"] for entry in entries.values()),
        "seconds": time.perf_counter() - begin,
        "peak_bytes": peak_bytes(),
    }
    write_text(output / REPORT, json.dumps(report, indent=1) + "\n")
    return report


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m converters.import_torch",
        description="Import PyTorch weights into a store of Orbax checkpoints.",
    )
    parser.add_argument(
        "--source",
        type=Path,
        required=True,
        help=f"model folder, component folder, or one .safetensors, {', '.join(SUFFIXES)} file",
    )
    parser.add_argument("--output", type=Path, required=True, help="the store to write; an older store is replaced")
    parser.add_argument(
        "--network",
        choices=[network.name for network in NETWORKS],
        help="what a single component is; by default what its config.json says. context_embedder reads only that part "
        "of a Pyramid-Flow transformer",
    )
    parser.add_argument(
        "--component", help="name in the store of a single component; of a model folder, the one to import"
    )
    parser.add_argument(
        "--config", type=Path, help="config.json of a single weights file; by default the one beside it"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    network = next((network for network in NETWORKS if network.name == args.network), None)
    report = import_torch(args.source, args.output, network, args.component, args.config)
    skipped = f", {len(report['skipped'])} skipped" if report["skipped"] else ""
    print(
        f"imported {len(report['components'])} components, {report['parameters']:,} parameters, "
        f"{report['bytes'] / 1e9:.3f} GB at {report['bytes'] / 1e9 / report['seconds']:.2f} GB/s{skipped}: "
        f"{args.output}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
