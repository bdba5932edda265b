"""Report, table and model card of the toy teacher, from the stages' results and the runs' metrics."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nd_jax.data.latents import read_manifest
from nd_jax.files import write_text
from nd_jax.report.curves import metric_series
from nd_jax.report.html import (
    BarPlot,
    Block,
    Command,
    Image,
    LinePlot,
    Section,
    Table,
    Text,
    Video,
    write_report,
)

Notes = Mapping[str, Mapping[str, Any]]
ATTRIBUTES = ("colour", "shape", "direction", "speed", "all")
# Stage of the walk -> what its clips are called in tables.
MEASURED = {"clips": "trained", "untrained": "untrained", "wrong_clips": "wrong objective"}
SHOWN_VIDEOS = 6


def accuracy_rows(notes: Notes) -> list[list[str]]:
    """One row per measured model, and chance: rate and 95 % interval of every attribute, Frechet distance."""
    rows = []
    for stage, label in MEASURED.items():
        if stage in notes:
            result = notes[stage]["result"]
            cell = lambda e: f"{100 * e['rate']:.1f} ({100 * e['low']:.1f} to {100 * e['high']:.1f})"
            cells = [cell(result["accuracy"][name]) for name in ATTRIBUTES]
            rows.append([label, *cells, f"{result['frechet_distance']:.2f}"])
    chance = next(notes[stage]["result"]["chance"] for stage in MEASURED if stage in notes)
    rows.append(["chance", *(f"{100 * chance[name]:.1f}" for name in ATTRIBUTES), ""])
    return rows


def accuracy_headers(notes: Notes) -> list[str]:
    count = next(notes[stage]["result"]["clips"] for stage in MEASURED if stage in notes)
    return [f"{count} clips, % right", *ATTRIBUTES, "Frechet distance"]


def print_table(notes: Notes) -> None:
    """Accuracy on the terminal."""
    from rich.console import Console
    from rich.table import Table as RichTable

    table = RichTable(*accuracy_headers(notes))
    for row in accuracy_rows(notes):
        table.add_row(*row)
    Console().print(table)


def write_toy_teacher_report(path: Path, workdir: Path, seed: int, notes: Notes) -> None:
    """One self-contained page."""
    vae, teacher = notes["vae"]["result"], notes["teacher"]["result"]
    sizes = notes["export"]["result"]
    summary: dict[str, Any] = {
        "VAE, held-out PSNR": f"{vae['eval/psnr_db']:.1f} dB",
        "Velocity error": f"{teacher['eval/velocity_error']:.3f}",
        "Weights": f"{sum(sizes.values()) / 1e6:.1f} MB",
        "Total time": f"{sum(note['seconds'] for note in notes.values()) / 60:.0f} min",
    }
    sections = []
    if "clips" in notes:
        accuracy = notes["clips"]["result"]["accuracy"]
        names = ("colour", "shape", "direction")
        summary = {name.capitalize(): f"{100 * accuracy[name]['rate']:.1f} %" for name in names} | summary
        sections.append(Section("Does it follow its captions?", _clips(workdir, notes)))
    sections += [
        Section("The transformer", _training(workdir, seed, notes)),
        Section("The video VAE", _vae(workdir)),
        Section(
            "Where the time went",
            [BarPlot("Seconds by stage", list(notes), [note["seconds"] for note in notes.values()], unit="s")],
        ),
        Section("Commands", [Command(note["command"]) for note in notes.values() if "command" in note]),
    ]
    write_report(path, "nd_jax: toy teacher", summary, sections)


def _clips(workdir: Path, notes: Notes) -> list[Block]:
    result = notes["clips"]["result"]
    blocks: list[Block] = [
        Text(
            f"Captions of seed {result['seed']}, which training never saw; {result['function_evaluations']} "
            "evaluations of the transformer a clip, both branches of guidance counted. A program reads each clip back; "
            "what it cannot read counts as wrong. Intervals are 95 % (Wilson). The Frechet distance is to drawn clips "
            "of the same captions, on 29 simple features."
        ),
        Table(accuracy_headers(notes), accuracy_rows(notes), align="l" + "r" * 6),
    ]
    if "wrong_clips" in notes:
        blocks.append(
            BarPlot(
                "All four attributes right, by objective",
                ["noise shared by a path's ends", "independent noise per stage (wrong)"],
                [100 * notes[stage]["result"]["accuracy"]["all"]["rate"] for stage in ("clips", "wrong_clips")],
                unit="%",
            )
        )
    for stage, label in MEASURED.items():
        if stage in notes:
            captions = "; ".join(notes[stage]["result"]["shown"])
            picture = (workdir / stage / "strips.png").read_bytes()
            blocks.append(Image(picture, f"Frames of clips, {label}", f"{label}, from the top: {captions}"))
    for k, caption in enumerate(result["shown"][:SHOWN_VIDEOS]):
        blocks.append(Video((workdir / "clips" / f"clip-{k:02d}.mp4").read_bytes(), caption, caption))
    return blocks


def _training(workdir: Path, seed: int, notes: Notes) -> list[Block]:
    runs = {"teacher": "", "wrong": ", wrong objective"} if "wrong" in notes else {"teacher": ""}
    stage_series = lambda key: [
        metric_series(workdir / run, key.format(i), f"stage {i}{label}")
        for run, label in runs.items()
        for i in range(3)
    ]
    config = json.loads((workdir / "teacher" / "config.json").read_text())
    model = config["model"]["mmdit"]
    return [
        Text(
            f"{model['num_layers']} blocks of width {model['num_attention_heads'] * model['attention_head_dim']}, "
            f"{config['num_steps']} steps of {config['batch_size']} rows, seed {seed}. Stage 0 is the coarsest; the "
            "stages' targets have unlike power, so their errors are not comparable with each other."
        ),
        LinePlot("Loss per stage", "step", "squared error", stage_series("train/loss_stage{}"), log_y=True),
        LinePlot(
            "Velocity error per stage, held-out clips, fixed noise",
            "step",
            "squared error",
            stage_series("eval/velocity_error_stage{}"),
            log_y=True,
        ),
    ]


def _vae(workdir: Path) -> list[Block]:
    runs = {"frames": "single frames", "vae": "clips"}
    series = lambda key: [metric_series(workdir / run, key, label) for run, label in runs.items()]
    return [
        LinePlot("Reconstruction, held-out clips", "step", "PSNR, dB", series("eval/psnr_db")),
        LinePlot("Loss", "step", "loss", series("train/loss"), log_y=True),
    ]


def write_model_card(path: Path, workdir: Path, seed: int, notes: Notes) -> None:
    """README.md of the model folder: what it is, the command, the seed and the numbers."""
    result = notes["clips"]["result"]
    config = json.loads((workdir / "teacher" / "config.json").read_text())
    model = config["model"]["mmdit"]
    width = model["num_attention_heads"] * model["attention_head_dim"]
    sizes = notes["export"]["result"]
    minutes = {name: note["seconds"] / 60 for name, note in notes.items()}
    records = read_manifest(workdir / "latents").num_records
    spent = ", ".join(f"{name} {value:.0f}" for name, value in minutes.items() if value >= 1)
    command = f"python -m experiments.toy_teacher --workdir runs/toy_teacher --seed {seed}"
    text = f"""# Toy teacher

A Pyramid-Flow teacher in the released layout, small enough for a CPU: causal video VAE (8 x 8 x 8, 16 latent channels),
T5 and two CLIPs, video transformer of {model["num_layers"]} blocks of width {width}. It makes clips of 17 frames of
64 x 64 pixels of the toy world from its captions. All weights were trained here, from scratch.

    {command}

Seed {seed}; {config["num_steps"]} steps of {config["batch_size"]} rows on {records} clips; {sum(minutes.values()):.0f}
minutes on 2 CPU cores, of them {spent}.

{_markdown(accuracy_headers(notes), accuracy_rows(notes))}

Captions of seed {result["seed"]}; {result["function_evaluations"]} evaluations of the transformer a clip, with 95 %
intervals. VAE: {notes["vae"]["result"]["eval/psnr_db"]:.1f} dB on held-out clips.

{_markdown(["component", "MB"], [[name, f"{size / 1e6:.2f}"] for name, size in sizes.items()])}
"""
    write_text(path, text)


def _markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    line = lambda cells: "| " + " | ".join(cells) + " |"
    return "\n".join([line(headers), line(["---"] * len(headers)), *map(line, rows)])
