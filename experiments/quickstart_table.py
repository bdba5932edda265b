"""Numbers of the quickstart: what results.json holds, and the tables that a report and a terminal show."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.quickstart_device import summarize_device

Notes = Mapping[str, Mapping[str, Any]]
RESULTS = "results.json"
ATTRIBUTES = ("colour", "shape", "direction", "speed")
# Model -> (what tables call it, stage that notes its parameters). The cumulative ones, in order.
CUMULATIVE = {
    "teacher": ("teacher", "teacher"),
    "text": ("+ text encoder", "text_model"),
    "decoder": ("+ tiny decoder", "decoder_model"),
    "pruned": ("+ pruning", "pruned_model"),
    "student": ("+ one step a stage", "student"),
    "hybrid": ("+ first frame", "student"),
}
# Those that show what a distillation is for.
OTHERS = {
    "teacher_111": ("teacher, one step a stage", "teacher"),
    "cut": ("pruned, no recovery", "cut_model"),
    "stage1": ("pruned, stage 1", "cut_model"),
}
MODELS = CUMULATIVE | OTHERS
FINAL = "student"

# Neodragon (arXiv 2511.06055). VBench totals; parameters in billions or millions as text.
PAPER_TEXT = {
    "teacher": ("T5-XXL, context embedder", "4.77 B", 80.31),
    "text": ("DT5, ContextAdapter", "0.26 B", 79.64),
}
PAPER_DECODER = {"native": ("native", "226 M", 80.31), "student": ("tiny", "9.91 M", 80.25)}
# (losses, VBench total, quality, semantic, model of ours).
PAPER_PRUNING = (
    ("none: all blocks", 80.31, None, None, "decoder"),
    ("blocks out, no recovery", None, None, None, "cut"),
    ("data (stage 1)", 78.39, 81.58, 65.63, "stage1"),
    ("features, teacher, data (stage 2)", 80.21, 83.54, 66.90, "pruned"),
)
# (steps, method, function evaluations, VBench total, model of ours).
PAPER_STEPS = (
    ("20 and 10 a stage", "teacher, guided", "480", 80.31, "teacher"),
    ("1-1-1", "teacher", "21", 59.62, "teacher_111"),
    ("1-1-1", "pyramidal DMD", "21", 76.48, "student"),
    ("1-1-1", "the same, SSD-1B's first frame", "18 + 4", 81.61, "hybrid"),
)
# Table 9, W8A16: SNR in dB, by our names of the graphs.
PAPER_SNR = {"decoder_stream": 35, "mmdit_stage0": 29, "mmdit_stage1": 22, "mmdit_stage2": 24}


def summarize_walk(notes: Notes, parts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What results.json holds: every model's accuracy, distance, sizes and seconds; the distillations; costs by stage.

    `parts` are the stages of every part of the walk, whose seconds are added up. "kept" is the share of the teacher's
    accuracy: of the mean over four attributes, and of clips with all four right.
    """
    models = {name: _model(notes, name, stage) for name, (_, stage) in MODELS.items()}
    for entry in models.values():
        for key in ("mean", "all"):
            teacher = models["teacher"]["accuracy"][key]
            entry["kept" if key == "mean" else "kept_all"] = entry["accuracy"][key] / max(teacher, 1e-8)
    cost = lambda key: {name: note[key] for name, note in notes.items() if key in note}
    return {
        "models": models,
        "clips": notes["clips_teacher"]["result"]["clips"],
        "text": {k: v for k, v in notes["text"]["result"].items() if k.startswith("eval/")},
        "decoders": {name: notes["decoder_measure"]["result"][name] for name in ("native", "student")},
        "plan": {key: notes["plan"]["result"][key] for key in ("num_layers", "kept", "removed", "scores")},
        "device": summarize_device(notes),
        "seconds": cost("seconds"),
        "seconds_by_part": {part: sum(notes[name]["seconds"] for name in names) for part, names in parts.items()},
        "cpu_seconds": cost("cpu_seconds"),
        "peak_bytes": cost("peak_bytes"),
    }


def _model(notes: Notes, name: str, stage: str) -> dict[str, Any]:
    result = notes[f"clips_{name}"]["result"]
    rates = {key: result["accuracy"][key]["rate"] for key in (*ATTRIBUTES, "all")}
    rates["mean"] = statistics.fmean(rates[key] for key in ATTRIBUTES)
    seconds = {part: spent["run"] / result["clips"] for part, spent in result["seconds"].items()}
    return {
        "accuracy": rates,
        "interval_all": [result["accuracy"]["all"][key] for key in ("low", "high")],
        "frechet_distance": result["frechet_distance"],
        "function_evaluations": result["function_evaluations"],
        "seconds_per_clip": seconds | {"total": sum(seconds.values())},
        "parameters": notes[stage]["result"]["parameters"],
    }


# --- tables -----------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def cumulative_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows): what each step costs and saves, all steps before it kept."""
    headers = ["model", "mean, %", "all, %", "of the teacher's", "Frechet", "parameters", "NFE"]
    headers += ["s a clip", "chip, MB", "chip, dB"]
    rows = []
    for name, (label, _) in CUMULATIVE.items():
        entry = results["models"][name]
        rows.append([label, *accuracy_cells(entry), f"{percent(entry['kept'])}, {percent(entry['kept_all'])}"])
        rows[-1] += [f"{entry['frechet_distance']:.2f}", f"{entry['parameters']['total']:,}"]
        rows[-1] += [str(entry["function_evaluations"]), f"{entry['seconds_per_clip']['total']:.3f}"]
        rows[-1] += device_cells(results["device"]) if name == FINAL else ["–", "–"]
    return headers, rows


def accuracy_cells(entry: Mapping[str, Any]) -> list[str]:
    """Mean of four attributes, and clips with all four right, in percent."""
    return [percent(entry["accuracy"][key]) for key in ("mean", "all")]


def device_cells(device: Mapping[str, Any]) -> list[str]:
    """MB of all binaries, and the lowest SNR of a graph; in FP16 and, behind the stroke, quantised as in the paper."""
    megabytes = [f"{device['binary_bytes'][p] / 1e6:.1f}" for p in ("fp16", "w8a16")]
    return [" / ".join(megabytes), " / ".join(f"{device['lowest_snr_db'][p]:.0f}" for p in ("fp16", "w8a16"))]


def device_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows): every graph and precision, beside the paper's SNR where it gives one."""
    headers = [
        "graph",
        "precision",
        "paper, dB",
        "simulator, dB",
        "ONNX, dB",
        "nodes",
        "compile, s",
    ]
    rows = []
    for row in results["device"]["rows"]:
        paper = PAPER_SNR.get(row["graph"]) if row["precision"] == "w8a16" else None
        cells = ["–" if paper is None else str(paper), f"{row['snr_db']:.1f}", f"{row['onnx_snr_db']:.1f}"]
        cells += [str(row["nodes"]), f"{row['compile_seconds']:.1f}", f"{row['compile_peak_bytes'] / 1e9:.2f}"]
        rows.append([row["graph"], row["precision"].upper(), *cells, f"{row['binary_bytes'] / 1e6:.2f}"])
    return [*headers, "memory, GB", "binary, MB"], rows


def attribute_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows): every attribute of every model."""
    headers = ["model", *(f"{name}, %" for name in ATTRIBUTES), "all four, %", "95 % interval"]
    rows = []
    for name, (label, _) in MODELS.items():
        entry = results["models"][name]
        interval = " to ".join(percent(end) for end in entry["interval_all"])
        rows.append([label, *(percent(entry["accuracy"][key]) for key in (*ATTRIBUTES, "all")), interval])
    return headers, rows


def seconds_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headers, rows): seconds of a clip by part of the pipeline."""
    parts = ("text", "encoder", "transformer", "decoder", "total")
    cell = lambda spent, part: f"{1000 * spent[part]:.1f}" if part in spent else "–"
    rows = [
        [label, *(cell(results["models"][name]["seconds_per_clip"], part) for part in parts)]
        for name, (label, _) in CUMULATIVE.items()
    ]
    return ["ms a clip", *parts], rows


def text_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, (label, size, total) in PAPER_TEXT.items():
        entry = results["models"][name]
        # Of the CLIPs, which stay, neither side counts anything; of the teacher, the embedder does.
        ours = entry["parameters"]["context"]
        rows.append(
            [label, size, f"{total:.2f}", f"{ours:,}", *accuracy_cells(entry), f"{entry['frechet_distance']:.2f}"]
        )
    headers = ["text encoder", "parameters", "VBench total", "ours: parameters", "mean, %", "all four, %", "Frechet"]
    return headers, rows


def decoder_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for (name, (label, size, total)), model in zip(PAPER_DECODER.items(), ("text", "decoder"), strict=True):
        measured = results["decoders"][name]
        cells = [f"{measured[key]['mean']:.{digits}f}" for key, digits in (("psnr_db", 2), ("ssim", 3))]
        rows.append([label, size, f"{total:.2f}", f"{measured['parameters']:,}", *cells])
        rows[-1] += accuracy_cells(results["models"][model])
    headers = [
        "decoder",
        "parameters",
        "VBench total",
        "ours: parameters",
        "PSNR, dB",
        "SSIM",
        "mean, %",
        "all four, %",
    ]
    return headers, rows


def pruning_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    number = lambda value: "–" if value is None else f"{value:.2f}"
    rows = []
    for losses, *scores, name in PAPER_PRUNING:
        entry = results["models"][name]
        rows.append([losses, *map(number, scores), *accuracy_cells(entry), f"{entry['frechet_distance']:.2f}"])
    headers = ["recovery", "VBench total", "quality", "semantic", "ours: mean, %", "all four, %", "Frechet"]
    return headers, rows


def steps_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for steps, method, evaluations, total, name in PAPER_STEPS:
        entry = results["models"][name]
        ours = [str(entry["function_evaluations"]), *accuracy_cells(entry), f"{entry['frechet_distance']:.2f}"]
        rows.append([steps, method, evaluations, f"{total:.2f}", *ours])
    headers = [
        "steps",
        "method",
        "evaluations",
        "VBench total",
        "ours: evaluations",
        "mean, %",
        "all four, %",
        "Frechet",
    ]
    return headers, rows


def print_table(results: Mapping[str, Any]) -> None:
    """The columns of the cumulative table that a terminal has room for."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    headers, rows = cumulative_table(results)
    shown = [headers.index(name) for name in ("model", "mean, %", "all, %", "parameters", "NFE", "s a clip")]
    table = Table(box=SIMPLE, pad_edge=False)
    for k in shown:
        table.add_column(headers[k], no_wrap=True, justify="left" if k == 0 else "right")
    for row in rows:
        table.add_row(*(row[k] for k in shown))
    Console().print(table)


def align(headers: Sequence[str], left: int = 1) -> str:
    """Alignment of a table whose first columns are words."""
    return "l" * left + "r" * (len(headers) - left)
