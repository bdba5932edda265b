"""The last part of the quickstart: the student's graphs, in one bundle and each on the simulator of a chip."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.samples import sample_files
from experiments.device_table import split_samples
from experiments.stages import Stage, Stages, python, reader
from nd_jax.weights.sources import read_json

# The graphs of a student that makes all frames, and those of them that are quantised as well.
GRAPHS = ("text_encoder", "clip_l", "clip_g", "mmdit_stage0", "mmdit_stage1", "mmdit_stage2", "decoder_stream")
QUANTISED = GRAPHS[3:]
PROMPTS_SEED = 6000  # added to the seed
RUNS = 2  # samples of a graph on the simulator
CAPTURED = 16  # samples of a graph that are kept: three quarters to calibrate on, the others to run
PROMPTS = "video_captions.txt"

NAMES = ("videos", "bundle", "bundle_video", *(f"quantize_{name}" for name in QUANTISED))
NAMES += (*(f"chip_{name}" for name in GRAPHS), *(f"chip_{name}_w8a16" for name in QUANTISED))


def device_stages(args: argparse.Namespace, model: Path) -> Stages:
    """Videos and samples of a model folder, its bundle, and every graph in FP16, some in W8A16."""
    work, bundle = args.workdir, args.workdir / "bundle"
    given = ["--model", model, "--prompts", work / PROMPTS, "--output", work / "videos", "--batch", args.videos]
    given += ["--capture", work / "capture", "--capture-samples", CAPTURED]
    generate = python("experiments.generate", *given)
    given = ["--bundle", bundle, "--prompt", video_captions(args)[0], "--compare", model]
    given += ["--output", work / "bundle_video" / "video.mp4"]
    stages = {
        "videos": Stage(
            "generate videos, and keep what the graphs get",
            lambda: split_capture(work),
            generate,
            "videos",
        ),
        "bundle": Stage(
            "export all graphs to ONNX",
            lambda: read_bundle(bundle),
            python("converters.bundle", "--model", model, "--output", bundle),
            "bundle",
        ),
        "bundle_video": Stage(
            "make a video with these graphs, and compare it with JAX",
            reader(work, "bundle_video", "video.json"),
            python("converters.run_hexagon", *given),
            "bundle_video",
        ),
    }
    onnx = lambda name: bundle / "graphs" / f"{name}.onnx"
    quantised = lambda name: work / "w8a16" / f"{name}_w8a16.onnx"
    for name in QUANTISED:
        given = ["--onnx", onnx(name), "--calibration", work / "samples" / name / "calibration"]
        stages[f"quantize_{name}"] = Stage(
            f"quantise {name}",
            reader(work, "w8a16", f"{name}_w8a16.json"),
            python("converters.quantize", *given, "--output", quantised(name)),
        )
    for name in GRAPHS:
        stages[f"chip_{name}"] = chip_stage(args, name, onnx(name))
    for name in QUANTISED:
        stages[f"chip_{name}_w8a16"] = chip_stage(args, name, quantised(name), "--reference", onnx(name))
    return stages


def chip_stage(args: argparse.Namespace, graph: str, onnx: Path, *more: object) -> Stage:
    """Compiles a graph and runs held-out samples on the simulator; how accurate it is, the report shows."""
    work = args.workdir
    command = ["--onnx", onnx, "--output", work / "chip", "--soc", args.soc, "--run", RUNS, "--min-snr", -1000]
    command = python("converters.compile_hexagon", *command, "--inputs", work / "samples" / graph / "held_out", *more)
    finish = reader(work, "chip", f"{onnx.stem}_{args.soc}.json")
    return Stage(f"compile {onnx.stem} for {args.soc} and run the simulator", finish, command)


def video_captions(args: argparse.Namespace) -> list[str]:
    """Of the student's videos; a seed of their own."""
    from nd_jax.data.toy_prompts import toy_prompts

    return toy_prompts(args.videos, PROMPTS_SEED + args.seed)


def split_capture(workdir: Path) -> dict[str, Any]:
    """samples/GRAPH/calibration and held_out: captured inputs to calibrate on, and others to run. Their numbers."""
    counts = {}
    for graph in GRAPHS:
        source = (workdir / "capture" / graph).resolve()
        held_out = split_samples(source, workdir / "samples" / graph)
        counts[graph] = {"samples": len(sample_files(source)), "held_out": held_out}
    return counts


def read_bundle(bundle: Path) -> dict[str, Any]:
    """The export's report of every graph, as far as tables need it."""
    kept = ("nodes", "parameters", "data_bytes", "snr_db", "seconds")
    reports = {name: read_json(bundle / "graphs" / f"{name}.json") for name in GRAPHS}
    return {name: {key: report[key] for key in kept} for name, report in reports.items()}


# --- results ----------------------------------------------------------------------------------------------------------


def summarize_device(notes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What results.json has under "device": a row for every graph and precision, and what they add up to."""
    rows = [_row(notes, name, "") for name in GRAPHS] + [_row(notes, name, "_w8a16") for name in QUANTISED]
    # All graphs in FP16; and those of them quantised that have a plan for it, as they are deployed.
    sets = {
        "fp16": [row for row in rows if row["precision"] == "fp16"],
        "w8a16": [row for row in rows if row["precision"] == "w8a16" or row["graph"] not in QUANTISED],
    }
    return {
        "rows": rows,
        "lowest_snr_db": {name: min(row["snr_db"] for row in chosen) for name, chosen in sets.items()},
        "binary_bytes": {name: sum(row["binary_bytes"] for row in chosen) for name, chosen in sets.items()},
        "video_psnr_db": notes["bundle_video"]["result"]["psnr_db"],
    }


def _row(notes: Mapping[str, Mapping[str, Any]], graph: str, suffix: str) -> dict[str, Any]:
    exported = notes["bundle"]["result"][graph]
    report = notes[f"chip_{graph}{suffix}"]["result"]
    # None is a value that is not finite.
    lowest = lambda snr: min(math.nan if value is None else value for value in snr.values())
    return {
        "graph": graph,
        "precision": report["precision"],
        "nodes": exported["nodes"],
        "onnx_snr_db": lowest(exported["snr_db"]),
        "snr_db": lowest(report["simulator"]["snr_db"]),
        "samples": report["simulator"]["samples"],
        "compile_seconds": report["compile_seconds"],
        "compile_peak_bytes": report["compile_peak_bytes"],
        "binary_bytes": report["binary_bytes"],
    }
