"""Exports a graph of a model folder to ONNX for the Hexagon compiler.

    python -m converters.export_onnx --model DIR --graph text_encoder --output DIR

writes GRAPH.onnx, its weights GRAPH.onnx.data, GRAPH.json (the report) and GRAPH.inputs.npz (valid inputs that
`converters.compile_hexagon` runs by default).
"""

import argparse
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters import graph_sizes, graphs, onnx_check, onnx_edit, onnx_gelu, onnx_lint, onnx_rewrite, qdq, tflite_route
from converters.graphs import Graph, GraphOptions
from converters.numerics import FP16_MAX
from converters.output_files import replacing_files, write_json
from converters.packages import need
from converters.progress import stages
from converters.samples import each_sample
from nd_jax.errors import UserError, run_command
from nd_jax.weights.table import flatten

# Float32 against float32: what is left is the order of additions.
MIN_SNR_DB = 80.0
SAMPLES = 4
# Of a command-line option.
SIZES = "(default: as generation.json in the model folder says)"


def export_graph(
    model_dir: str | Path,
    graph: str,
    output_dir: str | Path,
    options: GraphOptions | None = None,
    *,
    keep_tflite: bool = False,
    allow_overflow: bool = False,
    seed: int = 0,
    samples: str | Path | None = None,
) -> dict[str, Any]:
    """Model folder -> ONNX, linted, compared with the Flax model and searched for values beyond FP16.

    Args:
      model_dir: released layout.
      graph: a name of `graphs.GRAPHS`.
      output_dir: created if needed; files of the same names are replaced, each when it is complete.
      options: sizes and residual scale.
      keep_tflite: keep the intermediate GRAPH.tflite.
      allow_overflow: export although an activation passes FP16's 65504.
      seed: of the inputs that the graph is compared on.
      samples: real inputs to compare on instead, in one of the two forms of `converters.samples`.

    Returns:
      The report, as in GRAPH.json.

    Raises:
      UserError: bad model folder or option, an operator that the HTP does not take, disagreement with JAX, overflow.
    """
    need("tensorflow", "tf2onnx", "onnx", "onnx_ir", "onnxscript", "onnxruntime")
    with stages(5) as begin:
        begin("load weights")
        loaded = graphs.load_graph(graph, model_dir, options or GraphOptions())
        return export_loaded(loaded, Path(output_dir), begin, keep_tflite, allow_overflow, seed, samples)


def convert(
    graph: Graph, tflite: Path, begin: Callable[[str], None] = lambda stage: None
) -> tuple[Any, dict[str, int], dict[str, int]]:
    """JAX -> TFLite -> ONNX with native operators, linted; nothing is run.

    Args:
      graph: what to trace.
      tflite: the intermediate file to write.
      begin: is called with the name of each stage.

    Returns:
      (`onnx_ir.Model` with weights, operators before the rewriting pass, number of places of each rewrite).

    Raises:
      UserError: an operator that a converter or the HTP does not take, a pattern that was not found.
    """
    begin("JAX -> TFLite -> ONNX")
    model = tflite_route.trace(graph, tflite)
    before = onnx_edit.op_counts(model)

    begin("restore native operators")
    rewrites = onnx_rewrite.restore_native(model)
    missing = onnx_rewrite.missing_native_ops(model, graph.native_ops)
    if missing:
        raise UserError(f"graph {graph.name}: native operators were not restored: {', '.join(missing)}")
    if graph.expand_gelu:
        rewrites["expand_gelu"] = onnx_gelu.expand_gelu(model)
    onnx_rewrite.readable_names(model, flatten(graph.params))
    onnx_lint.check(model, f"graph {graph.name}")
    return model, before, rewrites


def export_loaded(
    graph: Graph,
    output_dir: Path,
    begin: Callable[[str], None] = lambda stage: None,
    keep_tflite: bool = False,
    allow_overflow: bool = False,
    seed: int = 0,
    samples: str | Path | None = None,
) -> dict[str, Any]:
    """`export_graph` for a graph in memory; `begin` is called with the name of each stage."""
    import onnx_ir as ir

    start = time.perf_counter()
    with replacing_files(output_dir, f"{graph.name}.onnx") as folder:
        model, before, rewrites = convert(graph, folder / f"{graph.name}.tflite", begin)
        qdq.set_carried(model, graph.carried)

        begin("write")
        path = folder / f"{graph.name}.onnx"
        # Tensor by tensor; scalars and shapes stay in the graph.
        ir.save(model, path, external_data=f"{graph.name}.onnx.data", size_threshold_bytes=1024)
        counts = onnx_edit.op_counts(model)
        del model

        begin("compare with JAX")
        rng = np.random.default_rng(seed)
        if samples is None:
            inputs = [graph.sample(rng) for _ in range(SAMPLES)]
        else:
            inputs = list(itertools.islice(each_sample(Path(samples), list(graph.inputs)), SAMPLES))
        np.savez(folder / f"{graph.name}.inputs.npz", **{k: np.stack([s[k] for s in inputs]) for k in inputs[0]})
        snr = _compare(graph, path, inputs)
        ranges = onnx_check.value_ranges(path, inputs)
        ranges = {name: largest for name, largest in ranges.items() if not onnx_gelu.may_saturate(name)}
        overflow = onnx_check.beyond_fp16(ranges)
        if overflow and not allow_overflow:
            raise UserError(
                f"graph {graph.name}: {len(overflow)} values pass FP16's {FP16_MAX:.0f}, {overflow[0]!r} with "
                f"{ranges[overflow[0]]:.3g}; use --residual-scale auto, or --allow-overflow to export all the same"
            )
        report = {
            "graph": graph.name,
            "inputs": [dataclasses.asdict(spec) for spec in graph.inputs],
            "outputs": [dataclasses.asdict(spec) for spec in graph.outputs],
            "parameters": int(sum(np.size(leaf) for leaf in flatten(graph.params).values())),
            "carried": dict(graph.carried),
            "notes": dict(graph.notes),
            "opset": onnx_rewrite.OPSET,
            "nodes": sum(counts.values()),
            "ops": counts,
            "nodes_before_rewrite": sum(before.values()),
            "ops_before_rewrite": before,
            "rewrites": rewrites,
            "samples": {"count": len(inputs), "seed": seed if samples is None else None},
            "snr_db": {name: onnx_check.json_number(value) for name, value in snr.items()},
            "largest_values": {name: ranges[name] for name in list(ranges)[:5]},
            "beyond_fp16": overflow,
            "onnx_bytes": path.stat().st_size,
            "data_bytes": path.with_name(f"{graph.name}.onnx.data").stat().st_size,
            "seconds": round(time.perf_counter() - start, 2),
        }
        write_json(folder / f"{graph.name}.json", report)
        if not keep_tflite:
            (folder / f"{graph.name}.tflite").unlink()
    return report


def _compare(graph: Graph, path: Path, samples: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Output -> worst SNR of the ONNX graph in float32 against the Flax model."""
    names = [spec.name for spec in graph.outputs]
    references = [
        dict(zip(names, map(np.asarray, graph.reference(*(s[spec.name] for spec in graph.inputs))), strict=True))
        for s in samples
    ]
    snr = onnx_check.worst_snr_db(references, onnx_check.run_on_cpu(path, samples))
    for name, value in snr.items():
        if not value >= MIN_SNR_DB:
            raise UserError(
                f"graph {graph.name}: output {name!r} agrees with JAX to {value:.1f} dB only, expected "
                f"{MIN_SNR_DB:.0f}: the conversion is wrong, please report it with the model's config.json"
            )
    return snr


def calibration_tokens(model_dir: Path, prompts: Path, length: int, count: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Ids and masks, int32 [N, length], of the first `count` prompts, by the model folder's `tokenizer_3`."""
    from nd_jax.data.prompts import PromptSource
    from nd_jax.data.tokenizers import Tokenize, load_tokenizer

    source = PromptSource(prompts)
    tokenize = Tokenize(load_tokenizer(model_dir / "tokenizer_3"), length)
    rows = [tokenize(source[i]) for i in range(min(count, len(source)))]
    return np.stack([row["ids"] for row in rows]), np.stack([row["mask"] for row in rows])


def blocks(text: str) -> tuple[int, int]:
    """`0:6` -> (0, 6)."""
    first, colon, stop = text.partition(":")
    if not (colon and first.isdecimal() and stop.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a range of blocks such as 0:6")
    return int(first), int(stop)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m converters.export_onnx", description="Exports a graph of a model folder to ONNX for Hexagon."
    )
    parser.add_argument("--model", type=Path, required=True, help="model folder in the released layout")
    parser.add_argument("--graph", required=True, help=f"one of {', '.join(sorted(graphs.GRAPHS))}")
    parser.add_argument("--output", type=Path, required=True, help="folder for GRAPH.onnx and what belongs to it")
    parser.add_argument("--batch", type=int, default=1, help="static batch size (default 1)")
    parser.add_argument("--length", type=int, help=f"static number of text tokens {SIZES}")
    parser.add_argument("--latent-height", type=int, help=f"of the video's latents {SIZES}")
    parser.add_argument("--latent-width", type=int, help=f"of the video's latents {SIZES}")
    parser.add_argument("--latent-frames", type=int, help=f"of the video {SIZES}")
    parser.add_argument("--height", type=int, help=f"of the video's frames, in pixels {SIZES}")
    parser.add_argument("--width", type=int, help=f"of the video's frames, in pixels {SIZES}")
    parser.add_argument("--image-latent-height", type=int, help=f"of the first frame's latents {SIZES}")
    parser.add_argument("--image-latent-width", type=int, help=f"of the first frame's latents {SIZES}")
    parser.add_argument("--context-length", type=int, help=f"text tokens of the first frame {SIZES}")
    parser.add_argument("--blocks", type=blocks, metavar="A:B", help="blocks A to B - 1 of the transformer only")
    parser.add_argument(
        "--transformer",
        default=graphs.TRANSFORMER,
        help="subfolder of the transformer (default %(default)s), or the absolute path of one in its place",
    )
    parser.add_argument("--samples", type=Path, help="inputs to compare on, in the form of calibration data")
    parser.add_argument(
        "--residual-scale",
        default="auto",
        help="power of two folded into T5 so that its residual stream fits FP16: auto (measured), none, or a number",
    )
    parser.add_argument(
        "--gelu",
        default="expanded",
        choices=("expanded", "native"),
        help="GELU of the text networks in elementary operators (more accurate on the HTP) or as one Gelu",
    )
    parser.add_argument("--prompts", type=Path, help="prompts that auto measures on (default: random ids)")
    parser.add_argument("--allow-overflow", action="store_true", help="export although a value passes FP16's 65504")
    parser.add_argument("--keep-tflite", action="store_true", help="keep the intermediate GRAPH.tflite")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs that the graph is compared on")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    sizes = graph_sizes.folder_sizes(args.model)
    for name in ("batch", *sizes):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is not positive")
    sizes |= {name: getattr(args, name) for name in sizes if getattr(args, name) is not None}
    options = GraphOptions(
        batch=args.batch,
        residual_scale=args.residual_scale,
        gelu=args.gelu,
        calibration=calibration_tokens(args.model, args.prompts, sizes["length"]) if args.prompts else None,
        seed=args.seed,
        blocks=args.blocks,
        transformer=args.transformer,
        **sizes,
    )
    report = export_graph(
        args.model,
        args.graph,
        args.output,
        options,
        keep_tflite=args.keep_tflite,
        allow_overflow=args.allow_overflow,
        seed=args.seed,
        samples=args.samples,
    )
    worst = sorted(report["snr_db"].items(), key=lambda item: item[1])
    snr = ", ".join(f"{name} {value:.1f} dB" for name, value in worst[:3])
    snr += f" and {len(worst) - 3} outputs better than that" if len(worst) > 3 else ""
    print(
        f"exported {report['graph']}: {report['nodes_before_rewrite']} -> {report['nodes']} nodes, "
        f"{report['data_bytes'] / 1e6:.0f} MB of weights, agrees with JAX to {snr}, in {report['seconds']:.0f} s: "
        f"{args.output / report['graph']}.onnx"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
