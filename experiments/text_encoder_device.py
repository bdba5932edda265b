"""The text encoder on the HTP simulator, with and without the folded residual scale.

    python -m experiments.text_encoder_device --size full --output DIR [--soc 8-elite]

Random weights, made so that the residual stream passes FP16's 65504 the way that of the trained T5 does: initialised as
in transformers, the kernels that write to the stream times four (so that the blocks and not the embedding make up most
of it), and then these kernels and the embedding times the factor that gives the wanted peak. The last factor does not
change what the network computes in float32. The model folder is then exported, compiled and run

    folded      with the residual scale that `auto` chooses,
    native_gelu the same with GELU as the HTP's own operator,
    unfolded    without the scale,
    raw         with the scale, but without the rewriting pass (TFLite -> tf2onnx only).

Writes DIR/text_encoder_device.json and prints the table.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters import (
    compile_hexagon,
    device_layers,
    export_onnx,
    graphs,
    hexagon,
    onnx_check,
    onnx_edit,
    residual_scale,
    tflite_route,
)
from converters.output_files import write_json
from nd_jax.errors import UserError, run_command
from nd_jax.models.context_adapter import ContextAdapterConfig
from nd_jax.models.t5 import DistilT5Config, T5Config
from nd_jax.weights import networks
from nd_jax.weights.folder import save_component

SIZES = {
    "full": (128, DistilT5Config(), ContextAdapterConfig()),
    "tiny": (
        32,
        DistilT5Config(T5Config(vocab_size=256, d_model=64, d_kv=16, d_ff=128, num_layers=4, num_heads=4), 96),
        ContextAdapterConfig(input_dims=96, output_dims=48, layer_depths=(96,) * 4),
    ),
}
# Of the kernels that write to the residual stream, relative to their initialisation.
GROWTH = 4.0
VARIANTS = ("folded", "native_gelu", "unfolded", "raw")


def random_params(network: networks.Network, config: Any, seed: int) -> dict[str, Any]:
    """Parameters by the module's own initialisers, as numpy arrays."""
    module = network.module(config)
    inputs = [np.zeros(spec.shape, spec.dtype) for spec in network.inputs(config)]
    return jax.tree.map(np.asarray, jax.jit(module.init)(jax.random.key(seed), *inputs)["params"])


def with_residual_peak(params: dict[str, Any], config: T5Config, length: int, peak: float, seed: int) -> dict[str, Any]:
    """DT5 parameters whose residual stream peaks at `peak` on random ids."""
    encoder = {**params["encoder"], "blocks": device_layers.unroll(params["encoder"]["blocks"])}
    encoder = {**residual_scale.fold(encoder, GROWTH), "token_embedding": encoder["token_embedding"]}
    sliced = {**encoder, "position_bias": graphs.position_bias(encoder["relative_bias"], length, config)}
    ids, mask = graphs.random_tokens(np.random.default_rng(seed), 4, length, config.vocab_size)
    measured = residual_scale.peak(lambda *args: graphs.encode(*args, config), sliced, ids, mask)
    scaled = residual_scale.fold(encoder, peak / measured)
    blocks = [scaled["blocks"][str(i)] for i in range(config.num_layers)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    return {**params, "encoder": {**scaled, "blocks": stacked}}


def write_model(folder: Path, size: str, peak: float, seed: int) -> int:
    """Model folder with random weights; returns the number of parameters."""
    length, dt5, adapter = SIZES[size]
    params = with_residual_peak(random_params(networks.DISTIL_T5, dt5, seed), dt5.encoder, length, peak, seed)
    adapter_params = random_params(networks.CONTEXT_ADAPTER, adapter, seed + 1)
    save_component(folder / "text_encoder_3", networks.DISTIL_T5, dt5, params)
    save_component(folder / "context_adapter", networks.CONTEXT_ADAPTER, adapter, adapter_params)
    return sum(leaf.size for leaf in jax.tree.leaves((params, adapter_params)))


def measure_exported(model: Path, output: Path, variant: str, length: int, soc: str, runs: int) -> dict[str, Any]:
    """One row of the table for a graph that went through the whole route."""
    options = graphs.GraphOptions(
        length=length,
        residual_scale="none" if variant == "unfolded" else "auto",
        gelu="native" if variant == "native_gelu" else "expanded",
    )
    exported = export_onnx.export_graph(
        model, "text_encoder", output / variant, options, allow_overflow=variant == "unfolded"
    )
    compiled = compile_hexagon.compile_graph(output / variant / "text_encoder.onnx", output / variant, soc, runs)
    simulator = compiled["simulator"]
    return {
        "residual_scale": exported["notes"]["residual_scale"],
        "residual_peak": exported["notes"]["residual_peak"],
        "largest_value": max(exported["largest_values"].values()),
        "nodes": exported["nodes"],
        "transposes": exported["ops"].get("Transpose", 0),
        "export_seconds": exported["seconds"],
        "export_snr_db": exported["snr_db"]["context"],
        "compile_seconds": compiled["compile_seconds"],
        "compile_peak_bytes": compiled["compile_peak_bytes"],
        "binary_bytes": compiled["binary_bytes"],
        "simulator_seconds": simulator["seconds"],
        "simulator_peak_bytes": simulator["peak_bytes"],
        "simulator_snr_db": simulator["snr_db"]["context"],
        "not_finite": simulator["not_finite"]["context"],
        "outputs_differ": (simulator["outputs_differ"] or {}).get("context"),
    }


def measure_raw(model: Path, output: Path, length: int, soc: str, runs: int) -> dict[str, Any]:
    """The row of the graph that tf2onnx writes, against the float32 results of the `folded` export."""
    import onnx_ir as ir

    folder = output / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    graph = graphs.load_graph("text_encoder", model, graphs.GraphOptions(length=length))
    raw = tflite_route.trace(graph, folder / "text_encoder.tflite")
    path = folder / "text_encoder.onnx"
    ir.save(raw, path, external_data="text_encoder.onnx.data")
    counts = onnx_edit.op_counts(raw)
    row = {
        "residual_scale": graph.notes["residual_scale"],
        "nodes": sum(counts.values()),
        "transposes": counts.get("Transpose", 0),
    }
    for old in folder.glob(f"text_encoder_{soc}*"):
        old.unlink()
    binary = hexagon.compile_binary(path, folder / f"text_encoder_{soc}.onnx", soc)
    reference = output / "folded" / "text_encoder.onnx"
    with np.load(reference.with_suffix(".inputs.npz")) as arrays:
        samples = [{name: arrays[name][i] for name in arrays.files} for i in range(runs)]
    result = hexagon.run_on_simulator(binary.wrapper, soc, samples)
    snr = onnx_check.worst_snr_db(onnx_check.run_on_cpu(reference, samples), result.outputs)["context"]
    return {
        **row,
        "compile_seconds": round(binary.seconds, 2),
        "compile_peak_bytes": binary.peak_bytes,
        "binary_bytes": binary.bytes,
        "simulator_seconds": [round(s, 2) for s in result.seconds],
        "simulator_peak_bytes": result.peak_bytes,
        "simulator_snr_db": onnx_check.json_number(snr),
        "not_finite": int(sum((~np.isfinite(out["context"])).sum() for out in result.outputs)),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    head = "| | scale | nodes (transposes) | compile | memory | binary | simulator | SNR |"
    lines = [head, "|---" * 8 + "|"]
    for name, row in rows.items():
        snr = "not finite" if row["simulator_snr_db"] is None else f"{row['simulator_snr_db']:.1f} dB"
        lines.append(
            f"| {name} | {row['residual_scale']:g} | {row['nodes']} ({row['transposes']}) "
            f"| {row['compile_seconds']:.1f} s | {row['compile_peak_bytes'] / 1e9:.2f} GB "
            f"| {row['binary_bytes'] / 1e6:.1f} MB | {np.mean(row['simulator_seconds']):.1f} s | {snr} |"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.text_encoder_device",
        description="Text encoder with random weights: ONNX, Hexagon binary, simulator; with and without scale.",
    )
    parser.add_argument("--size", choices=SIZES, default="tiny", help="default tiny; full needs 8 GB")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model, the graphs and the table")
    parser.add_argument("--soc", default="8-elite", help=f"one of {', '.join(hexagon.SOC_MODELS)} (default 8-elite)")
    parser.add_argument("--peak", type=float, default=3e5, help="of the residual stream (default 3e5)")
    parser.add_argument("--runs", type=int, default=2, help="samples on the simulator, 1 to 4 (default 2)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default all")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if not 1 <= args.runs <= export_onnx.SAMPLES:
        raise UserError(f"--runs {args.runs} is not between 1 and {export_onnx.SAMPLES}")
    if not 0 < args.peak < 1e30:
        raise UserError(f"--peak {args.peak} is not a positive number below 1e30")
    hexagon.soc_model(args.soc)
    hexagon.require_compiler()
    length = SIZES[args.size][0]
    model = args.output / "model"
    count = write_model(model, args.size, args.peak, args.seed)
    rows = {}
    # `raw` is compared with the results of `folded`.
    for variant in [v for v in VARIANTS if v in args.variants or (v == "folded" and "raw" in args.variants)]:
        if variant == "raw":
            rows[variant] = measure_raw(model, args.output, length, args.soc, args.runs)
        else:
            rows[variant] = measure_exported(model, args.output, variant, length, args.soc, args.runs)
        print(f"{variant}: {rows[variant]}", flush=True)
    report = {
        "size": args.size,
        "soc": args.soc,
        "seed": args.seed,
        "peak": args.peak,
        "parameters": count,
        "length": length,
        "text_encoder_3": dataclasses.asdict(SIZES[args.size][1]),
        "context_adapter": dataclasses.asdict(SIZES[args.size][2]),
        "variants": rows,
    }
    write_json(args.output / "text_encoder_device.json", report)
    print(table(rows))
    print(f"measured {len(rows)} variants at size {args.size}: {args.output / 'text_encoder_device.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
