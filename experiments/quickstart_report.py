"""Table and HTML report of the quickstart, from the stages' results and the runs' metrics."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nd_jax.report.curves import metric_series
from nd_jax.report.html import BarPlot, Command, LinePlot, Section, Series, Table, Text, write_report
from nd_jax.train.metrics import read_metrics

Stages = Mapping[str, Mapping[str, Any]]


def hops(stages: Stages, soc: str) -> list[list[str]]:
    """Each hop of the weights, what it is compared with, and the signal-to-noise ratio."""
    train, export = stages["train"]["result"], stages["export"]["result"]
    onnx, hexagon = stages["onnx"]["result"], stages["hexagon"]["result"]
    identical = "bit-identical" if export["bit_identical"] else "NOT bit-identical"
    worst = lambda snr: "exact" if None in snr.values() else f"{min(snr.values()):.1f} dB"
    return [
        ["student, JAX float32", "teacher, held-out prompts", f"{train['eval/snr_db']:.1f} dB"],
        ["PyTorch folder, read back", "checkpoint", identical],
        ["PyTorch folder, run by transformers", "JAX", f"{export['pytorch_snr_db']:.1f} dB"],
        ["ONNX, float32", "JAX", worst(onnx["snr_db"])],
        [f"Hexagon {soc}, FP16 on the simulator", "ONNX, float32", worst(hexagon["simulator"]["snr_db"])],
    ]


def losses(workdir: Path) -> list[list[Any]]:
    """Before and after, with and without the cosine term."""
    rows = []
    for name, label in (("train", "MSE + cosine"), ("ablation", "MSE alone")):
        metrics = read_metrics(workdir / name / "metrics.jsonl")
        evals = [m for m in metrics if "eval/cosine" in m]
        for key, what in (("eval/mse", "MSE"), ("eval/cosine", "cosine"), ("eval/snr_db", "SNR, dB")):
            rows.append([label, what, f"{evals[0][key]:.3f}", f"{evals[-1][key]:.3f}"])
        spread = lambda m: f"{m['eval/collapse_student']:.3f} ({m['eval/collapse_teacher']:.3f})"
        rows.append([label, "collapse meter (teacher's)", spread(evals[0]), spread(evals[-1])])
    return rows


def print_table(workdir: Path, stages: Stages, soc: str) -> None:
    """Loss before and after, and the SNR at each hop, on the terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    for headers, rows in (
        (("loss", "held-out", "before", "after"), losses(workdir)),
        (("hop", "against", "SNR"), hops(stages, soc)),
    ):
        table = RichTable(*headers)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def write_quickstart_report(path: Path, workdir: Path, prompts: str, seed: int, soc: str, stages: Stages) -> None:
    """One self-contained page."""
    train, hexagon, onnx = (stages[n]["result"] for n in ("train", "hexagon", "onnx"))
    parameters = stages["export"]["result"]["parameters"]
    runs = {"MSE + cosine": workdir / "train", "MSE alone": workdir / "ablation"}
    curve = lambda key, label: metric_series(runs[label], key, label)
    both = lambda key: [curve(key, label) for label in runs]
    teacher = curve("eval/collapse_teacher", "MSE + cosine")
    hop_rows = hops(stages, soc)
    summary = {
        "Held-out cosine": f"{train['eval/cosine']:.3f}",
        "Student against teacher": hop_rows[0][2],
        "Hexagon against float32": hop_rows[-1][2],
        "Student parameters": sum(parameters.values()),
        "Binary": f"{hexagon['binary_bytes'] / 1e6:.2f} MB",
        "Total time": f"{sum(s['seconds'] for s in stages.values()):.0f} s",
    }
    sections = [
        Section(
            "Distillation",
            [
                Text(
                    "DT5 and the ContextAdapter (student) learn the context that T5 and the context embedder (teacher) "
                    f"give the denoiser. Teacher: {_teacher(workdir)}. Prompts: {prompts}; a tenth is held out. "
                    f"Seed {seed}."
                ),
                Table(["loss", "held-out", "before", "after"], losses(workdir), align="llrr"),
                LinePlot("Training loss (MSE part)", "step", "MSE", both("train/mse"), log_y=True),
                LinePlot("Cosine to the teacher, held-out prompts", "step", "cosine", both("eval/cosine")),
                LinePlot("Signal-to-noise against the teacher, held-out", "step", "dB", both("eval/snr_db")),
                LinePlot(
                    "Collapse meter: cosine between tokens of different prompts",
                    "step",
                    "mean cosine",
                    [*both("eval/collapse_student"), Series("teacher", teacher.x, teacher.y)],
                ),
            ],
        ),
        Section(
            "From the checkpoint to the chip",
            [
                Table(["hop", "against", "SNR"], hop_rows, align="llr"),
                Table(
                    [
                        "graph",
                        "weights and constants",
                        "nodes",
                        "residual scale",
                        "compile, s",
                        "peak memory, GB",
                        "binary, MB",
                    ],
                    [
                        [
                            f"{onnx['graph']} for {soc}",
                            onnx["parameters"],
                            onnx["nodes"],
                            str(onnx["notes"].get("residual_scale", "-")),
                            hexagon["compile_seconds"],
                            hexagon["compile_peak_bytes"] / 1e9,
                            hexagon["binary_bytes"] / 1e6,
                        ]
                    ],
                    caption="FP16, on the compiler's own simulator of the chip; it says nothing about speed.",
                ),
            ],
        ),
        Section(
            "Where the time went",
            [BarPlot("Seconds by stage", list(stages), [s["seconds"] for s in stages.values()], unit="s")],
        ),
        Section("Commands", [Command(s["command"]) for s in stages.values() if "command" in s]),
    ]
    write_report(path, "nd_jax: text-encoder distillation", summary, sections)


def _teacher(workdir: Path) -> str:
    config = json.loads((workdir / "train" / "config.json").read_text())["teacher"]
    folder = config["text_encoder"]
    encoder = config["encoder"]
    size = f"{encoder['num_layers']} blocks of width {encoder['d_model']}"
    return f"{folder} ({size})" if folder else f"random weights with T5's initialisation, {size}, seed {config['seed']}"
