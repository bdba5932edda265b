"""Everything of a model folder that a phone needs to make its videos, in one folder.

    python -m converters.bundle --model DIR --output BUNDLE
    python -m converters.bundle --model DIR --output BUNDLE --precision w8a16 --calibration CAPTURE
    python -m converters.run_hexagon --bundle BUNDLE --prompt TEXT --output video.mp4

    BUNDLE/model.json         graphs, order of calls, sampler, constants (converters/bundle_manifest.py)
    BUNDLE/graphs/            NAME.onnx and what export_onnx writes beside it
    BUNDLE/host.safetensors   weights and tables of what the host computes (converters/bundle_host.py)
    BUNDLE/tokenizer*/        copies

The mode and all sizes are those of generation.json. With --precision w8a16 the graphs that have a plan for that
(converters/precision_plan.py) are quantised on samples of `experiments.generate --capture`; the others stay float32,
which is compiled to FP16. With --chunk N the transformer's stages are several graphs of N blocks, whose weights one
binary can share (`compile_hexagon --share`). The folder appears when it is complete.
"""

import argparse
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters import chain, export_onnx, graph_sizes, graphs, onnx_check, quantize
from converters.bundle_manifest import HOST, MANIFEST, TEXT_GRAPHS, graph_names, manifest, stage_arrays
from converters.first_frame_graph import CONDITIONING_PARAMS
from converters.graph import TRANSFORMER, Graph, GraphOptions
from converters.output_files import write_json
from converters.packages import need
from converters.precision_plan import PLANS
from converters.progress import stages
from converters.samples import read_arrays, sample_files
from nd_jax.errors import UserError, run_command
from nd_jax.files import replacing_folder
from nd_jax.generate import lcm
from nd_jax.generate.first_frame import GUIDANCE_SCALE, UNET_FOLDER, has_first_frame, open_first_frame
from nd_jax.generate.model_folder import ModelFolder, open_model
from nd_jax.generate.parts import open_tokenizer
from nd_jax.generate.super_resolution import has_super_resolution, open_super_resolution
from nd_jax.weights.folder import Component, load_component
from nd_jax.weights.safetensors_io import build_header, write_safetensors
from nd_jax.weights.table import flatten
from nd_jax.weights.vae import ASYMMETRIC_VIDEO_VAE

MMDIT_EMBEDDERS = ("timestep_embedder", "pooled_embedder")


def write_bundle(
    model_dir: str | Path,
    output: str | Path,
    allow_overflow: bool = False,
    residual_scale: str = "auto",
    calibration: str | Path | None = None,
    chunk: int | None = None,
) -> dict[str, Any]:
    """Exports all graphs of a model folder's mode, and writes what goes with them.

    Args:
      model_dir: released layout, with the tiny video decoder.
      output: the bundle; one that is there is replaced.
      allow_overflow: as of `export_onnx.export_graph`, for every graph.
      residual_scale: of T5, see `converters.residual_scale`.
      calibration: folder of `experiments.generate --capture`; with it graphs that have a plan become W8A16.
      chunk: blocks of a graph of the transformer; None for all of them.

    Returns:
      `model.json`.

    Raises:
      UserError: a bad model folder, one with Pyramid-Flow's own decoder, a graph that does not export, or one that has
        no samples.
    """
    need("tensorflow", "tf2onnx", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
    model_dir, output = Path(model_dir), Path(output)
    model = open_model(model_dir)
    if model.vae_network is not ASYMMETRIC_VIDEO_VAE:
        raise UserError(
            f"{model.path('vae')}: holds a {model.vae_network.name}, whose decoder is no graph; a bundle needs the "
            "tiny decoder (docs/decoder.md): put one in its place in a copy of the model folder"
        )
    drawn = model.mode == "hybrid" and has_first_frame(model_dir)
    first = open_first_frame(model_dir) if drawn else None
    enlarges = has_super_resolution(model_dir)
    if enlarges:
        open_super_resolution(model_dir)
    names = graph_names(model, first, enlarges)
    blocks = [] if chunk is None else chain.block_ranges(model.transformer.num_layers, chunk)
    calibration = None if calibration is None else Path(calibration)
    for name in names if calibration else ():
        if name in PLANS and not (calibration / name).is_dir():
            raise UserError(
                f"{calibration}: holds no samples of {name}; make them with experiments.generate --capture, from this "
                "model folder"
            )
    options = GraphOptions(
        residual_scale=residual_scale,
        calibration=None if calibration is None else _token_samples(calibration, names),
        **graph_sizes.folder_sizes(model_dir),
    )
    with replacing_folder(output, MANIFEST) as folder, stages(len(names) + 1) as begin:
        reports, arrays = _export(model, names, options, blocks, folder / "graphs", allow_overflow, calibration, begin)
        begin("host")
        entry = manifest(model, first, reports)
        for tokenizer in entry["tokenizers"].values():
            source, target = model_dir / tokenizer["folder"], folder / tokenizer["folder"]
            open_tokenizer(source, tokenizer["vocab_size"], tokenizer["length"])
            shutil.copytree(source, target)
        arrays |= stage_arrays(model)
        header = build_header({name: (array.dtype, array.shape) for name, array in arrays.items()}, None)
        write_safetensors(folder / HOST, header, arrays.__getitem__)
        shapes = {name: {"shape": list(a.shape), "dtype": a.dtype.name} for name, a in sorted(arrays.items())}
        entry["host"] = {"file": HOST, "arrays": shapes}
        write_json(folder / MANIFEST, entry)
    return entry


def _token_samples(calibration: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids and masks, int32 [N, L] each, that T5's residual scale is measured on; None without captured ones."""
    (folder,) = (calibration / name for name in names if name in TEXT_GRAPHS)
    if not folder.is_dir():
        return None
    stacks = [read_arrays(file) for file in sample_files(folder)]
    return tuple(np.concatenate([arrays[name] for arrays in stacks]) for name in ("input_ids", "attention_mask"))


def _export(
    model: ModelFolder,
    names: Sequence[str],
    options: GraphOptions,
    blocks: Sequence[tuple[int, int]],
    folder: Path,
    allow_overflow: bool,
    calibration: Path | None,
    begin: Callable[[str], None],
) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """(report of every graph, the weights of what the host computes)."""
    reports, arrays, loaded = {}, {}, {}
    for name in names:
        begin(name)
        loaded = load_components(model, name, loaded)
        parts = blocks if TRANSFORMER in loaded and len(blocks) > 1 else [None]
        with tempfile.TemporaryDirectory() as scratch:
            samples = calibration and calibration / name
            for number, part in enumerate(parts):
                graph = build_graph(name, loaded, dataclasses.replace(options, blocks=part))
                if calibration is None or name not in PLANS:
                    reports[graph.name] = export_onnx.export_loaded(graph, folder, allow_overflow=allow_overflow)
                    continue
                following = Path(scratch) / str(number) if part and part != parts[-1] else None
                reports[graph.name] = _export_quantised(graph, folder, samples, following)
                samples = following
        arrays |= host_weights(loaded)
    return reports, arrays


def _export_quantised(graph: Graph, folder: Path, samples: Path, following: Path | None = None) -> dict[str, Any]:
    """The report of the export, with that of the quantisation under "quantised".

    `following` is a folder to make, for samples of the part behind this one: what the float graph gives for these.
    """
    # What FP16 cannot hold is no fault of a graph of integers; the float one is here for a moment only.
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        report = export_onnx.export_loaded(graph, Path(scratch), allow_overflow=True, samples=samples)
        path = Path(scratch) / f"{graph.name}.onnx"
        quantised = quantize.quantize_graph(path, samples, folder / path.name)
        shutil.copy(path.with_suffix(".inputs.npz"), folder)
        if following is not None:
            following.mkdir()
            for file in sample_files(samples):
                arrays = read_arrays(file)
                (outputs,) = onnx_check.run_on_cpu(path, [{spec.name: arrays[spec.name] for spec in graph.inputs}])
                np.savez(following / file.name, **arrays | chain.passed_on(outputs))
    return report | {"quantised": quantised}


def load_components(model: ModelFolder, graph: str, loaded: Mapping[str, Component]) -> dict[str, Component]:
    """The components of a graph by the graph's names for their subfolders, float32.

    Args:
      model: the folder.
      graph: a name of `graphs.GRAPHS`.
      loaded: those of another graph, of which common ones are not read again; the others are let go.
    """
    places = {TRANSFORMER: model.parts["transformer"], "context_adapter": model.parts.get("context_adapter", "")}
    return {
        part: loaded.get(part) or load_component(model.root / places.get(part, part), dtype=np.float32)
        for part in graphs.GRAPHS[graph][0]
    }


def build_graph(name: str, components: Mapping[str, Component], options: GraphOptions) -> Graph:
    """A graph of `graphs.GRAPHS` on components in memory."""
    return graphs.GRAPHS[name][1](components, options)


def host_weights(components: Mapping[str, Component]) -> dict[str, np.ndarray]:
    """Weights of equations 1 and 6 of `bundle_host`, where the transformer or the UNet is among the components."""
    arrays = {}
    if TRANSFORMER in components:
        arrays |= flatten({name: components[TRANSFORMER].params[name] for name in MMDIT_EMBEDDERS})
    if UNET_FOLDER in components:
        unet = components[UNET_FOLDER]
        tree = {name: unet.params[name] for name in CONDITIONING_PARAMS if name in unet.params}
        channels, guidance = (
            unet.config.time_cond_proj_dim,
            np.zeros((1, unet.config.block_out_channels[0]), np.float32),
        )
        if channels is not None:  # Nothing is guided, so that this is a constant.
            embedded = np.asarray(lcm.guidance_embedding(np.full(1, GUIDANCE_SCALE, np.float32), channels))
            guidance = embedded @ tree.pop("guidance_projection")["kernel"]
        arrays |= flatten({"unet": tree | {"guidance": guidance}})
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m converters.bundle",
        description="Export all graphs of a model folder, with what a phone needs to run them.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model folder in the released layout")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the bundle")
    parser.add_argument("--residual-scale", default="auto", help="of T5: auto, none or a power of two (default auto)")
    parser.add_argument("--allow-overflow", action="store_true", help="export although a value passes FP16's 65504")
    parser.add_argument(
        "--precision", choices=("fp16", "w8a16"), default="fp16", help="of the graphs with a plan (default fp16)"
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="DIR", help="samples of experiments.generate --capture, for w8a16"
    )
    parser.add_argument("--chunk", type=int, metavar="N", help="blocks of a graph of the transformer (default all)")
    args = parser.parse_args(argv)
    if (args.precision == "w8a16") != (args.calibration is not None):
        parser.error("--precision w8a16 and --calibration DIR go together")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args = parse(argv)
    entry = write_bundle(
        args.model, args.output, args.allow_overflow, args.residual_scale, args.calibration, args.chunk
    )
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    quantised = sum(graph["precision"] == "w8a16" for graph in entry["graphs"].values())
    print(
        f"{len(entry['graphs'])} graphs, {quantised} of them in W8A16, mode {entry['mode']}, {size / 1e6:.1f} MB: "
        f"{args.output / MANIFEST}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
