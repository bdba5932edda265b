"""Results, table and report of the step distillation walk, from the stages' results and the runs' metrics."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.evaluate_steps import PICTURE
from experiments.evaluate_toy_world import STRIPS
from nd_jax.report.curves import metric_series
from nd_jax.report.html import BarPlot, Block, Command, Image, LinePlot, Section, Series, Table, Text, write_report

Notes = Mapping[str, Mapping[str, Any]]
RESULTS = "results.json"
ATTRIBUTES = ("colour", "shape", "direction", "speed")
# Model -> what tables call it.
MODELS = {
    "teacher": "teacher, its steps, guided",
    "teacher_111": "teacher, 1-1-1",
    "finetune": "flow matching, 1-1-1",
    "progressive": "progressive, 1-1-1",
    "dmd": "pyramidal DMD, 1-1-1",
    "dmd4": "pyramidal DMD, 4-4-4",
}
TRAININGS = tuple(MODELS)[2:]
STAGES = 3
# Neodragon (arXiv 2511.06055): (steps, method, function evaluations, VBench total, model of ours).
PAPER = (
    ("20 and 10 a stage", "teacher, guided", 480, 80.31, "teacher"),
    ("4-4-4", "pyramidal DMD", 84, 80.37, "dmd4"),
    ("1-1-1", "teacher", 21, 59.62, "teacher_111"),
    ("1-1-1", "pyramidal DMD", 21, 76.48, "dmd"),
)


def summarize_walk(notes: Notes) -> dict[str, Any]:
    """What results.json holds: accuracy, Frechet distance, function evaluations and seconds of every model."""
    models = {}
    for name in MODELS:
        result = notes[f"clips_{name}"]["result"]
        rates = {key: result["accuracy"][key]["rate"] for key in (*ATTRIBUTES, "all")}
        rates["mean"] = statistics.fmean(rates[key] for key in ATTRIBUTES)
        models[name] = {
            "accuracy": rates,
            "interval_all": [result["accuracy"]["all"][key] for key in ("low", "high")],
            "frechet_distance": result["frechet_distance"],
            "function_evaluations": result["function_evaluations"],
            "seconds_per_clip": result["seconds"]["transformer"]["run"] / result["clips"],
        }
    for entry in models.values():
        entry["kept"] = entry["accuracy"]["mean"] / models["teacher"]["accuracy"]["mean"]
        entry["kept_all"] = entry["accuracy"]["all"] / max(models["teacher"]["accuracy"]["all"], 1e-8)
    return {
        "models": models,
        "clips": notes["clips_teacher"]["result"]["clips"],
        "seconds": {name: note["seconds"] for name, note in notes.items()},
    }


def result_headers() -> list[str]:
    accuracy = [f"{key}, %" for key in (*ATTRIBUTES, "mean", "all")]
    return ["model", *accuracy, "kept of mean", "kept of all", "Frechet distance", "evaluations", "s a clip"]


def result_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """One row per model, as text."""
    rows = []
    for name, label in MODELS.items():
        entry = results["models"][name]
        percent = [f"{100 * entry['accuracy'][key]:.1f}" for key in (*ATTRIBUTES, "mean", "all")]
        kept = [f"{100 * entry[key]:.0f} %" for key in ("kept", "kept_all")]
        rest = [f"{entry['frechet_distance']:.2f}", f"{entry['function_evaluations']}"]
        rows.append([label, *percent, *kept, *rest, f"{entry['seconds_per_clip']:.3f}"])
    return rows


def print_table(results: Mapping[str, Any]) -> None:
    """The columns of the table that a terminal has room for."""
    from rich.console import Console
    from rich.table import Table as RichTable

    headers = result_headers()
    shown = [headers.index(name) for name in ("model", "shape, %", "all, %", "kept of all", "evaluations", "s a clip")]
    table = RichTable()
    for k in shown:
        table.add_column(headers[k], no_wrap=k == 0)
    for row in result_rows(results):
        table.add_row(*(row[k] for k in shown))
    Console().print(table)


def write_steps_report(path: Path, workdir: Path, seed: int, results: Mapping[str, Any], notes: Notes) -> None:
    """One self-contained page."""
    models = results["models"]
    mean = lambda name: f"{100 * models[name]['accuracy']['mean']:.1f} %"
    summary = {
        "Accuracy, teacher": mean("teacher"),
        "Teacher at 1-1-1": mean("teacher_111"),
        "DMD at 1-1-1": mean("dmd"),
        "Function evaluations": " → ".join(str(models[name]["function_evaluations"]) for name in ("teacher", "dmd")),
        "Seed": seed,
        "Total time": f"{sum(results['seconds'].values()) / 60:.0f} min",
    }
    sections = [
        Section("Few steps", _table(results)),
        Section("Clips", [_strips(workdir, name, notes) for name in MODELS]),
        Section("Health", _health(workdir)),
        Section("Predictions side by side", [_predictions(workdir, name, notes) for name in TRAININGS]),
        Section("Commands", [Command(note["command"]) for note in notes.values() if "command" in note]),
    ]
    write_report(path, "nd_jax: few steps for a tiny teacher", summary, sections)


def _table(results: Mapping[str, Any]) -> list[Block]:
    models = results["models"]
    rows = []
    for steps, method, evaluations, total, name in PAPER:
        accuracy = [f"{100 * models[name]['accuracy'][key]:.1f}" for key in ("mean", "all")]
        mine = [*accuracy, str(models[name]["function_evaluations"])]
        rows.append([steps, method, str(evaluations), f"{total:.2f}", *mine])
    headers = ["steps", "method", "evaluations", "VBench total", "ours: accuracy, mean %", "all %", "evaluations"]
    return [
        Table(result_headers(), result_rows(results), align="l" + "r" * (len(result_headers()) - 1)),
        Text(
            f"Accuracy is of {results['clips']} clips of captions of a seed that nothing was trained on, read back by "
            "a program; all counts clips with all four attributes right, kept is in shares of the teacher's. The "
            "Frechet distance is to drawn clips. Evaluations are of the transformer, both branches of guidance "
            "counted; seconds are of the transformer alone."
        ),
        BarPlot(
            "Accuracy, mean of four attributes",
            list(MODELS.values()),
            [100 * models[name]["accuracy"]["mean"] for name in MODELS],
            unit="%",
        ),
        Table(headers, rows, align="ll" + "r" * 5, caption="The paper's rows and ours"),
        Text("The paper's scores are VBench's of another model; rows compare in their order, not in their values."),
    ]


def _strips(workdir: Path, name: str, notes: Notes) -> Block:
    shown = "; ".join(notes[f"clips_{name}"]["result"]["shown"])
    picture = (workdir / "clips" / name / STRIPS).read_bytes()
    return Image(picture, f"Clips of {MODELS[name]}", f"{MODELS[name]}. From the top: {shown}.")


def _predictions(workdir: Path, name: str, notes: Notes) -> Block:
    result = notes[f"predictions_{name}"]["result"]
    columns = ", ".join(result["columns"])
    caption = f"{MODELS[name]}, step {result['step']}. From the left: {columns}; {result['rows']} rows for every stage."
    return Image((workdir / "predictions" / name / PICTURE).read_bytes(), f"Predictions, {MODELS[name]}", caption)


def _health(workdir: Path) -> list[Block]:
    """Curves that show a collapse: spread and mean of what students make, the fake model's error, largest weights."""
    blocks: list[Block] = []
    for name in TRAININGS:
        by_stage = lambda key, name=name: [
            metric_series(workdir / name, f"{key}_stage{i}", f"stage {i}") for i in range(STAGES)
        ]
        label = MODELS[name]
        curves = {
            "standard deviation of clean frames, shares of the teacher's": by_stage("eval/std_ratio"),
            "shift of their mean, deviations": by_stage("eval/mean_shift"),
            "distance of clean frames to the teacher's": by_stage("eval/clean_error"),
            "norm of the matching direction": by_stage("train/direction_norm"),
            "error of the fake model": by_stage("eval/fake_error"),
            "largest weight": [
                metric_series(workdir / name, f"eval/{role}_largest_weight", role) for role in ("student", "fake")
            ],
        }
        for title, series in curves.items():
            drawn: list[Series] = [one for one in series if one.x]
            if drawn:
                blocks.append(LinePlot(f"{label}: {title}", "step", title.split(",")[0], drawn))
    return blocks
