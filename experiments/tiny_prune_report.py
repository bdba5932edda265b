"""Results, table and report of the pruning walk, from the stages' results and the runs' metrics."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.evaluate_rollouts import mean_and_spread, rollout_image, rollout_plots
from nd_jax.report.curves import metric_series
from nd_jax.report.html import BarPlot, Block, Command, LinePlot, Section, Series, Table, Text, write_report

Notes = Mapping[str, Mapping[str, Any]]
RESULTS = "results.json"
ATTRIBUTES = ("colour", "shape", "direction", "speed")
# Model -> what tables call it; the first two are what a recovery starts from.
MODELS = {
    "teacher": "teacher",
    "pruned": "pruned, no recovery",
    "stage1": "stage 1",
    "stage2_alone": "stage 2 alone",
    "stage2": "stage 1, then 2",
    "stage2_no_features": "stage 1, then 2 without features",
}
TRAININGS = tuple(MODELS)[2:]
# Measure of random choices -> (its name, whether more is better).
COMPARED = {
    "velocity_error": ("velocity error", False),
    "flow_error": ("to the teacher's", False),
    "cosine": ("cosine", True),
    "snr_db": ("SNR, dB", True),
    "mean": ("accuracy", True),
    "all": ("all four", True),
}
# Neodragon (arXiv 2511.06055), recoveries of 24 -> 18 blocks: (losses, VBench total, quality, semantic, model of ours).
PAPER = (
    ("data alone (stage 1)", 78.39, 81.58, 65.63, "stage1"),
    ("teacher's velocity alone", 80.00, 83.52, 65.89, None),
    ("teacher's velocity + data", 80.04, 83.52, 66.11, "stage2_no_features"),
    ("features (simple) + teacher's velocity + data", 80.21, 83.54, 66.90, "stage2"),
    ("features (next) + data", 80.35, 83.82, 66.48, None),
)


# --- results ----------------------------------------------------------------------------------------------------------


def summarize_walk(notes: Notes) -> dict[str, Any]:
    """What results.json holds.

    "models" have errors, rollouts against the teacher, accuracy, and the shares of lost accuracy that they recover;
    "choices" are the plan's blocks and random ones before any recovery, "spread" is that of the random ones.
    """
    models = {name: _model(notes, name, f"clips_{name}") for name in MODELS}
    for entry in models.values():
        entry["recovered"] = {
            key: recovered(*(models[name]["accuracy"][key] for name in ("teacher", "pruned")), entry["accuracy"][key])
            for key in ("mean", "all")
        }
    removed = notes["choices"]["result"]
    choices = {}
    for name, blocks in removed.items():
        label = "plan" if name == "pruned" else name
        entry = _model(notes, name, f"clips_{label}")
        values = {key: entry[key] for key in ("velocity_error", "flow_error")}
        values |= {key: entry["rollout"][key]["mean"] for key in ("cosine", "snr_db")}
        choices[label] = {"removed": blocks, **values, **{key: entry["accuracy"][key] for key in ("mean", "all")}}
    return {
        "models": models,
        "choices": choices,
        "spread": {key: _spread(choices, key, better) for key, (_, better) in COMPARED.items()},
        "paper": [dict(zip(("losses", "total", "quality", "semantic", "ours"), row, strict=True)) for row in PAPER],
        "clips": notes["clips_teacher"]["result"]["clips"],
        "random_clips": notes["clips_plan"]["result"]["clips"],
        "rollouts": notes["rollouts"]["result"]["prompts"],
        "held_out_rows": notes["velocity"]["result"]["rows"],
        "plan": {key: notes["plan"]["result"][key] for key in ("num_layers", "kept", "strategy", "removed")},
        "seconds": {name: note["seconds"] for name, note in notes.items()},
    }


def recovered(teacher: float, pruned: float, value: float) -> float | None:
    """Share of what pruning lost that is back: 0 for the pruned model, 1 for the teacher; None if nothing was lost."""
    return (value - pruned) / (teacher - pruned) if teacher > pruned else None


def _model(notes: Notes, name: str, clips: str) -> dict[str, Any]:
    measured = notes["velocity"]["result"]["models"][name]
    result = notes[clips]["result"]
    rates = {key: result["accuracy"][key]["rate"] for key in (*ATTRIBUTES, "all")}
    rates["mean"] = statistics.fmean(rates[key] for key in ATTRIBUTES)
    entry = {key: measured[key] for key in ("blocks", "velocity_error", "flow_error")}
    entry |= {"accuracy": rates, "frechet_distance": result["frechet_distance"]}
    entry["interval_all"] = [result["accuracy"]["all"][key] for key in ("low", "high")]
    if name in (students := notes["rollouts"]["result"]["students"]):
        entry["rollout"] = {key: students[name][f"video_{key}"] for key in ("cosine", "snr_db")}
    return entry


def _spread(choices: Mapping[str, Mapping[str, Any]], key: str, more_is_better: bool) -> dict[str, Any]:
    plan = choices["plan"][key]
    others = [choice[key] for name, choice in choices.items() if name != "plan"]
    worse = [other < plan if more_is_better else other > plan for other in others]
    mean = statistics.fmean(others)
    return {
        "plan": plan,
        "mean": mean,
        "std": statistics.pstdev(others),
        "min": min(others),
        "max": max(others),
        "plan_beats_mean": plan > mean if more_is_better else plan < mean,
        "plan_beats": sum(worse),
    }


# --- tables -----------------------------------------------------------------------------------------------------------


def result_headers() -> list[str]:
    accuracy = [f"{key}, %" for key in (*ATTRIBUTES, "mean", "all")]
    return ["model", "velocity error", "to the teacher's", "cosine", "SNR, dB", *accuracy, "mean back", "all back"]


def result_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """One row per model, as text."""
    rows = []
    for name, label in MODELS.items():
        entry = results["models"][name]
        rollout = entry.get("rollout")
        cells = ["", ""]
        if rollout:
            cells = [mean_and_spread(rollout["cosine"], 3), mean_and_spread(rollout["snr_db"], 1)]
        percent = [f"{100 * entry['accuracy'][key]:.1f}" for key in (*ATTRIBUTES, "mean", "all")]
        back = ["", ""] if name in ("teacher", "pruned") else [_percent(entry["recovered"][k]) for k in ("mean", "all")]
        rows.append([label, f"{entry['velocity_error']:.4f}", f"{entry['flow_error']:.4f}", *cells, *percent, *back])
    return rows


def columns(results: Mapping[str, Any], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows) of some columns of `result_headers`; all of them are too wide for a page or a terminal."""
    places = [result_headers().index(name) for name in names]
    return list(names), [[row[k] for k in places] for row in result_rows(results)]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def print_table(results: Mapping[str, Any]) -> None:
    """The columns of the table that a terminal has room for."""
    from rich.console import Console
    from rich.table import Table as RichTable

    headers, rows = columns(results, ("model", "velocity error", "mean, %", "all, %", "mean back", "all back"))
    table = RichTable()
    for k, header in enumerate(headers):
        table.add_column(header, no_wrap=k == 0)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


# --- the report -------------------------------------------------------------------------------------------------------


def write_prune_report(path: Path, workdir: Path, seed: int, results: Mapping[str, Any], notes: Notes) -> None:
    """One self-contained page."""
    plan, models = results["plan"], results["models"]
    spread = results["spread"]["mean"]
    removed = ", ".join(str(entry["block"]) for entry in plan["removed"])
    summary = {
        "Blocks": f"{len(plan['kept'])} of {plan['num_layers']}, without {removed}",
        "Accuracy, teacher": f"{100 * models['teacher']['accuracy']['mean']:.1f} %",
        "Pruned": f"{100 * models['pruned']['accuracy']['mean']:.1f} %",
        "Stage 1, then 2": f"{100 * models['stage2']['accuracy']['mean']:.1f} %",
        "Lost accuracy that is back": _percent(models["stage2"]["recovered"]["mean"]),
        "Plan beside random choices": f"{100 * spread['plan']:.1f} % and {100 * spread['mean']:.1f} %",
        "Seed": seed,
        "Total time": f"{sum(results['seconds'].values()) / 60:.0f} min",
    }
    sections = [
        Section("What recovery brings back", _recovery(results)),
        Section("Rollouts against the teacher", _rollouts(workdir, notes["rollouts"]["result"])),
        Section("The plan beside random choices", _choices(results)),
        Section("Training", _training(workdir)),
        Section(
            "Where the time went",
            [BarPlot("Seconds by stage", list(results["seconds"]), list(results["seconds"].values()), unit="s")],
        ),
        Section("Commands", [Command(note["command"]) for note in notes.values() if "command" in note]),
    ]
    write_report(path, "nd_jax: block pruning of a tiny teacher", summary, sections)


def _recovery(results: Mapping[str, Any]) -> list[Block]:
    models = results["models"]
    rows = []
    for row in results["paper"]:
        ours = models.get(row["ours"]) if row["ours"] else None
        cells = ["not run", "", ""]
        if ours:
            cells = [f"{100 * ours['accuracy']['mean']:.1f}", f"{100 * ours['accuracy']['all']:.1f}"]
            cells.append(f"{ours['velocity_error']:.4f}")
        rows.append([row["losses"], *(f"{row[key]:.2f}" for key in ("total", "quality", "semantic")), *cells])
    headers = ["losses", "VBench total", "quality", "semantic", "ours: accuracy, mean %", "all %", "velocity error"]
    errors = ("model", "velocity error", "to the teacher's", "cosine", "SNR, dB", "mean, %", "all, %")
    accuracy = ("model", *(f"{key}, %" for key in ATTRIBUTES), "mean back", "all back")
    return [
        *(Table(*columns(results, names), align="l" + "r" * 6) for names in (errors, accuracy)),
        Text(
            f"Velocity errors are mean squared errors on {results['held_out_rows']} held-out rows with fixed noise, "
            "times and latent frames, against the data's velocity and against the teacher's. Cosine and SNR are of "
            f"the latents of {results['rollouts']} videos from the teacher's noise, mean and standard deviation over "
            f"prompts. Accuracy is of {results['clips']} clips of captions of a seed that nothing was trained on: "
            "colour, shape, direction and speed are read back by a program, and all counts clips with all four right. "
            "Back: (accuracy - pruned) / (teacher - pruned)."
        ),
        BarPlot(
            "Accuracy, mean of four attributes",
            list(MODELS.values()),
            [100 * models[name]["accuracy"]["mean"] for name in MODELS],
            unit="%",
        ),
        Table(headers, rows, align="l" + "r" * 6, caption="The paper's recoveries and ours"),
        Text(
            "The paper's numbers are VBench scores of 24 -> 18 blocks; ours are of a toy world, so rows compare in "
            "their order, not in their values."
        ),
    ]


def _rollouts(workdir: Path, result: Mapping[str, Any]) -> list[Block]:
    labels = {name: label for name, label in MODELS.items() if name != "teacher"}
    rows = []
    for name, label in labels.items():
        snr = result["students"][name]["snr_db"]
        ends = [{"mean": mean[-1], "std": std[-1]} for mean, std in zip(snr["mean"], snr["std"], strict=True)]
        rows.append([label, *(mean_and_spread(end, 2) for end in ends)])
    frames = len(next(iter(result["students"].values()))["snr_db"]["mean"])
    headers = ["SNR, dB", *(f"latent frame {unit}" for unit in range(frames))]
    return [
        Text("Teacher and student start from the same noise and text, and each goes on from its own latent frames."),
        *rollout_plots(result, labels),
        Table(headers, rows, align="l" + "r" * frames, caption="Where latent frames end"),
        rollout_image(workdir / "rollouts", result),
    ]


def _choices(results: Mapping[str, Any]) -> list[Block]:
    spread = results["spread"]
    shown = lambda key, value: f"{100 * value:.1f} %" if key in ("mean", "all") else f"{value:.4g}"
    rows = [
        [name, ", ".join(map(str, choice["removed"])), *(shown(key, choice[key]) for key in COMPARED)]
        for name, choice in results["choices"].items()
    ]
    rows += [
        [f"random, {statistic}", "", *(shown(key, spread[key][statistic]) for key in COMPARED)]
        for statistic in ("mean", "std", "min", "max")
    ]
    count = len(results["choices"]) - 1
    rows.append(["plan beats", "", *(f"{spread[key]['plan_beats']} of {count}" for key in COMPARED)])
    return [
        Table(["choice", "removed", *(name for name, _ in COMPARED.values())], rows, align="ll" + "r" * len(COMPARED)),
        Text(
            f"Before any recovery. Accuracy is of {results['random_clips']} clips, the same captions and noise for "
            "all. Random choices differ from each other and from the plan's, and keep the last block."
        ),
    ]


def _training(workdir: Path) -> list[Block]:
    series = lambda key, names=TRAININGS: _drawn([metric_series(workdir / n, key, MODELS[n]) for n in names])
    plots = [
        LinePlot("Velocity error, held-out rows", "step", "squared error", series("eval/velocity_error"), log_y=True),
        LinePlot(
            "Error to the teacher's velocity, held-out rows",
            "step",
            "squared error",
            series("eval/flow_error"),
            log_y=True,
        ),
    ]
    for name in TRAININGS:
        parts = {"loss": "loss", "data": "data", "flow": "teacher's velocity", "image": "image", "text": "text"}
        curves = _drawn([metric_series(workdir / name, f"train/{key}", label) for key, label in parts.items()])
        plots.append(LinePlot(f"Losses: {MODELS[name]}", "step", "loss, before its weight", curves, log_y=True))
    return plots


def _drawn(series: Sequence[Series]) -> list[Series]:
    """Those that a run wrote."""
    return [one for one in series if one.x]
