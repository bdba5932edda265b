"""One page about a quickstart: cumulative table, what each distillation did, clips, the chip, costs."""

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import quickstart_table as tables
from experiments.evaluate_decoder import PICTURE
from experiments.evaluate_toy_world import SHOWN_FRAMES
from experiments.quickstart_table import CUMULATIVE, FINAL, Notes, align, percent
from nd_jax.generate.videos import write_video
from nd_jax.report.curves import metric_series
from nd_jax.report.html import BarPlot, Block, Command, Details, Image, LinePlot, Section, Series, Table, Text, Video
from nd_jax.report.html import write_report as write

SHOWN = 3  # captions whose clips are shown, side by side for all models
SCALE, COLUMNS = 3, 3  # of their pixels; of clips beside each other
STAGES = 3
NOT_SCORES = (
    "The paper's numbers are VBench totals of a model with a thousand times as many parameters; ours are of a toy "
    "world. Rows compare in their order, not in their values."
)


def write_quickstart_report(path: Path, workdir: Path, seed: int, results: Mapping[str, Any], notes: Notes) -> None:
    """Writes the page.

    Args:
      path: report.html.
      workdir: of the walk.
      seed: of the walk.
      results: of `quickstart_table.summarize_walk`.
      notes: of all stages.
    """
    models, device = results["models"], results["device"]
    teacher, student = models["teacher"], models[FINAL]
    arrow = lambda one, other: f"{one} → {other}"
    total = lambda key: sum(results[key].values())
    summary = {
        "Accuracy, mean of four": arrow(*(f"{percent(m['accuracy']['mean'])} %" for m in (teacher, student))),
        "All four right": arrow(*(f"{percent(m['accuracy']['all'])} %" for m in (teacher, student))),
        "Parameters": arrow(*(f"{m['parameters']['total'] / 1e6:.2f} M" for m in (teacher, student))),
        "Evaluations a clip": arrow(*(m["function_evaluations"] for m in (teacher, student))),
        "Seconds a clip": arrow(*(f"{m['seconds_per_clip']['total']:.3f}" for m in (teacher, student))),
        "Lowest SNR on the simulator": f"{device['lowest_snr_db']['fp16']:.1f} dB (FP16)",
        "Seed": seed,
        "Time": f"{total('seconds') / 60:.1f} min",
    }
    commands = [Command(note["command"]) for note in notes.values() if "command" in note]
    sections = [
        Section("Step by step", _steps_so_far(results)),
        Section("Clips", _clips(workdir, notes)),
        Section("1. Text encoder", _text(workdir, results)),
        Section("2. Tiny decoder", _decoder(workdir, results, notes)),
        Section("3. Block pruning", _pruning(workdir, results)),
        Section("4. One step a stage", _steps(workdir, results)),
        Section("On the chip", _device(results)),
        Section("Where the time went", _time(results)),
        Section("Commands", [Details("All of them, in their order", commands)]),
    ]
    write(path, "nd_jax quickstart: the whole paper at toy scale", summary, sections)


def _table(content: tuple[list[str], list[list[str]]], caption: str = "", left: int = 1) -> Table:
    headers, rows = content
    return Table(headers, rows, align=align(headers, left), caption=caption)


def _steps_so_far(results: Mapping[str, Any]) -> list[Block]:
    labels = [label for label, _ in CUMULATIVE.values()]
    entries = [results["models"][name] for name in CUMULATIVE]
    bars = lambda title, key: BarPlot(title, labels, [100 * e["accuracy"][key] for e in entries], unit="%")
    return [
        _table(tables.cumulative_table(results)),
        Text(
            f"Each row keeps what the rows above it changed. Accuracy is of {results['clips']} clips of captions that "
            "nothing was trained on: a program reads colour, shape, direction and speed back; the mean is over the "
            "four, and all counts clips with every one right. Of the teacher's: share of either. The Frechet "
            "distance is to drawn clips. Parameters are of text networks, transformer and decoder; NFE are "
            "evaluations of the transformer, both branches of guidance counted. Seconds are of this machine in JAX, "
            "without loading and compiling, many clips at a time. Chip: all binaries of the student and the lowest "
            "SNR of a graph on the simulator, in FP16 / with transformer and decoder in W8A16.\n\nFirst frame: mode "
            "hybrid, which goes on from a given picture. The released system makes it by SSD-1B; here the toy world "
            "draws it, so colour, shape and place are given and its row is not comparable with the others. The "
            "student itself makes all frames."
        ),
        bars("Accuracy, mean of four attributes", "mean"),
        bars("Clips with all four right", "all"),
        Details(
            "Every attribute, and seconds by part",
            [_table(tables.attribute_table(results)), _table(tables.seconds_table(results))],
        ),
    ]


# --- clips ------------------------------------------------------------------------------------------------------------


def _clips(workdir: Path, notes: Notes) -> list[Block]:
    order = ", ".join(label for label, _ in CUMULATIVE.values())
    blocks: list[Block] = [
        Text(f"The same captions and noise for all; in the clips line by line, in the pictures from the top: {order}.")
    ]
    for k, caption in enumerate(notes["clips_teacher"]["result"]["shown"][:SHOWN]):
        video, strip = side_by_side(workdir, k)
        blocks += [Video(video, f"Clips of all models: {caption}", caption), Image(strip, f"Frames: {caption}")]
    return blocks


def side_by_side(workdir: Path, number: int) -> tuple[bytes, bytes]:
    """(MP4, PNG) of one clip by all models: videos in two lines, and their frames in rows from the top."""
    import numpy as np
    from PIL import Image as Picture

    clips = [read_clip(workdir / "clips" / name / f"clip-{number:02d}.mp4") for name in CUMULATIVE]
    videos, frame_rate = [video for video, _ in clips], clips[0][1]
    lines = [np.concatenate(videos[k : k + COLUMNS], axis=2) for k in range(0, len(videos), COLUMNS)]
    large = np.concatenate(lines, axis=1).repeat(SCALE, axis=1).repeat(SCALE, axis=2)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "clip.mp4"
        write_video(path, large, frame_rate)
        shown = path.read_bytes()
    chosen = np.linspace(0, len(videos[0]) - 1, SHOWN_FRAMES).round().astype(int)
    rows = [np.concatenate(list(video[chosen]), axis=1) for video in videos]
    picture = io.BytesIO()
    Picture.fromarray(np.concatenate(rows)).save(picture, format="PNG")
    return shown, picture.getvalue()


def read_clip(path: Path) -> tuple[Any, float]:
    """(frames uint8 [F, H, W, 3], frames per second) of a short video."""
    import av
    import numpy as np

    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        return frames, float(container.streams.video[0].average_rate)


# --- distillations ----------------------------------------------------------------------------------------------------


def _curves(runs: Mapping[str, Path], key: str) -> list[Series]:
    """A metric of several runs: label -> folder. Those that wrote none are left out."""
    series = [metric_series(folder, key, label) for label, folder in runs.items()]
    return [one for one in series if one.x]


def _text(workdir: Path, results: Mapping[str, Any]) -> list[Block]:
    run, measured = workdir / "text", results["text"]
    meters = {"student": "eval/collapse_student", "teacher": "eval/collapse_teacher"}
    return [
        Text(
            "DT5 and the ContextAdapter learn the context that the teacher's T5 and context embedder give its "
            "transformer, from captions alone. The paper keeps a trained DT5 as it is (mode RM); here it starts at "
            f"random and trains, too (TDT5). Held-out captions: cosine {measured['eval/cosine']:.3f}, SNR "
            f"{measured['eval/snr_db']:.1f} dB."
        ),
        _table(tables.text_table(results)),
        Text(NOT_SCORES),
        LinePlot("Training loss", "step", "squared error", _curves({"student": run}, "train/mse"), log_y=True),
        LinePlot("Held-out captions", "step", "cosine to the teacher", _curves({"student": run}, "eval/cosine")),
        LinePlot(
            "Collapse meter: cosine between tokens of different captions",
            "step",
            "mean cosine",
            [metric_series(run, key, name) for name, key in meters.items()],
        ),
    ]


def _decoder(workdir: Path, results: Mapping[str, Any], notes: Notes) -> list[Block]:
    run, measured = workdir / "decoder", notes["decoder_measure"]["result"]
    psnr = {"tiny": "eval/psnr_db", "native": "eval/native_psnr_db"}
    order = ", ".join(measured["shown"])
    return [
        Text(
            "The encoder stays; a TAEHV decoder of a tenth of the parameters learns to read its latents. PSNR and "
            f"SSIM are of {measured['clips']} clips that training never saw. The paper reports more than 29 dB on "
            "DAVIS."
        ),
        _table(tables.decoder_table(results)),
        LinePlot("Held-out clips", "step", "PSNR, dB", [metric_series(run, key, name) for name, key in psnr.items()]),
        LinePlot("Loss", "step", "loss", _curves({"tiny decoder": run}, "train/loss"), log_y=True),
        Image((workdir / "reconstructed" / PICTURE).read_bytes(), "Decoded frames", f"From the left: {order}."),
    ]


def _pruning(workdir: Path, results: Mapping[str, Any]) -> list[Block]:
    plan = results["plan"]
    removed = [entry["block"] for entry in plan["removed"]]
    scores = {"image": "changes image tokens", "text": "changes text tokens", "velocity_error": "velocity without it"}
    label = lambda block: f"block {block}" + (" (removed)" if block in removed else "")
    bars = [
        BarPlot(f"Importance: {what}", [label(k) for k in range(len(plan["scores"][key]))], plan["scores"][key])
        for key, what in scores.items()
    ]
    runs = {"stage 1": workdir / "stage1", "stage 2": workdir / "stage2"}
    parts = {"data": "data", "flow": "teacher's velocity", "image": "image features", "text": "text features"}
    return [
        Text(
            f"{plan['num_layers']} blocks become {len(plan['kept'])}; out go {', '.join(map(str, removed))}, one "
            "after another the one whose loss changes the guided velocity least. 1 - cosine of a stream before and "
            "after a block says how much it changes; the last block always stays. Stage 1 trains on the data's "
            "velocity, stage 2 from there on features and velocity of the whole model as well."
        ),
        *bars,
        _table(tables.pruning_table(results)),
        LinePlot(
            "Velocity error, held-out rows", "step", "squared error", _curves(runs, "eval/velocity_error"), log_y=True
        ),
        LinePlot("Error to the whole model's", "step", "squared error", _curves(runs, "eval/flow_error"), log_y=True),
        LinePlot(
            "Parts of the loss, stage 2",
            "step",
            "loss, before its weight",
            [metric_series(workdir / "stage2", f"train/{key}", name) for key, name in parts.items()],
            log_y=True,
        ),
    ]


def _steps(workdir: Path, results: Mapping[str, Any]) -> list[Block]:
    run = workdir / "dmd"
    stages = lambda key: [metric_series(run, f"{key}_stage{i}", f"stage {i}") for i in range(STAGES)]
    plot = lambda title, key, what, log=False: LinePlot(title, "step", what, stages(key), log_y=log)
    return [
        Text(
            "Pyramidal distribution matching on clips that the teacher generated: student and fake model are copies "
            "of the pruned transformer, the guided teacher has all blocks. One step of three updates the student."
        ),
        _table(tables.steps_table(results), left=2),
        plot("Standard deviation of clean frames", "eval/std_ratio", "shares of the teacher's"),
        plot("Distance of clean frames to the teacher's", "eval/clean_error", "squared error"),
        plot("Matching direction", "eval/direction_norm", "norm", log=True),
        plot("Fake model", "eval/fake_error", "squared error", log=True),
    ]


# --- chip and costs ---------------------------------------------------------------------------------------------------


def _device(results: Mapping[str, Any]) -> list[Block]:
    device = results["device"]
    samples, psnr = min(row["samples"] for row in device["rows"]), device["video_psnr_db"]
    agreement = "equals the one by JAX" if psnr is None else f"has {psnr:.1f} dB PSNR against the one by JAX"
    return [
        Text(
            "Every graph of the student, compiled and run on the compiler's own simulator of the chip against "
            f"float32, on {samples} samples of its videos that the quantisation has not seen; the SNR is that of the "
            "worst output. The simulator says nothing about speed. Text networks stay in FP16, as in the paper, "
            "whose numbers are of its own weights at full size. A video by the float32 graphs in onnxruntime "
            f"{agreement}."
        ),
        _table(tables.device_table(results), left=2),
    ]


def _time(results: Mapping[str, Any]) -> list[Block]:
    seconds, parts, cpu, peak = (results[k] for k in ("seconds", "seconds_by_part", "cpu_seconds", "peak_bytes"))
    largest = max(peak, key=peak.get)
    return [
        Text(
            f"{sum(seconds.values()) / 60:.1f} minutes, {sum(cpu.values()) / 60:.1f} minutes of CPU time. The largest "
            f"process had {peak[largest] / 1e9:.2f} GB ({largest})."
        ),
        BarPlot("Seconds by part", list(parts), list(parts.values()), unit="s"),
        Details(
            "Every stage",
            [
                Table(
                    ["stage", "seconds", "CPU seconds", "peak, GB"],
                    [
                        [
                            name,
                            f"{s:.1f}",
                            f"{cpu.get(name, 0):.1f}",
                            f"{peak[name] / 1e9:.2f}" if name in peak else "–",
                        ]
                        for name, s in seconds.items()
                    ],
                    align="lrrr",
                )
            ],
        ),
    ]
