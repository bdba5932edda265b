"""All scores of a pruning plan as plain data, and the report that shows both rankings and how far they agree."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.distill.pruning_plan import PruningPlan
from nd_jax.evals.block_importance import correlation, mean_interval, ranks
from nd_jax.evals.calibration import Call
from nd_jax.report.html import Cell, Command, LinePlot, Section, Series, Table, Text, write_report

MEASURES = {
    "image": "visual importance",
    "text": "text importance",
    "velocity_error": "velocity error",
    "final_latent_error": "final latent error",
}


def summarize(
    image: np.ndarray, text: np.ndarray, velocity: np.ndarray, final: np.ndarray, calls: Sequence[Call]
) -> dict[str, Any]:
    """What importance.json holds of the blocks, plain data.

    Args:
      image, text: importance at every call, [prompts, calls, S] and [prompts, calls, S - 1].
      velocity: errors without one block, [probes, stages, S - 1].
      final: likewise of final latents, [probes, S - 1].
      calls: of a rollout.
    """
    removable = text.shape[-1]
    # Streams pair up prompt by prompt, and so do the two errors; across, only means are compared.
    streams = {"image": image.mean(1)[:, :removable], "text": text.mean(1)}
    errors = {"velocity_error": velocity.mean(1), "final_latent_error": final}
    summary: dict[str, Any] = {"prompts": len(image), "calls": len(calls), "probes": len(final)}
    for name, values in {"image": image.mean(1), "text": streams["text"], **errors}.items():
        low, high = mean_interval(values)
        summary[name] = {"mean": values.mean(0).tolist(), "low": low.tolist(), "high": high.tolist()}
    for stage, values in enumerate(velocity.mean(0)):
        summary["velocity_error"][f"stage_{stage}"] = values.tolist()

    pairs = {"image, text": (streams["image"], streams["text"])}
    pairs["velocity_error, final_latent_error"] = (errors["velocity_error"], errors["final_latent_error"])
    for one, stream in streams.items():
        for other, error in errors.items():
            # The probes are the first samples, so they are of other numbers than the prompts' means.
            pairs[f"{one}, {other}"] = (stream.mean(0, keepdims=True), error.mean(0, keepdims=True))
    summary["correlations"] = {name: _correlation(*pair) for name, pair in pairs.items()}

    where = lambda call: ("later" if call.unit else "first", call.stage, call.step)
    summary["steps"] = []
    for place in dict.fromkeys(map(where, calls)):
        at = [k for k, call in enumerate(calls) if where(call) == place]
        entry = dict(zip(("units", "stage", "step"), place, strict=True))
        summary["steps"].append(entry | _both(image[:, at].mean(1), text[:, at].mean(1)))
    summary["branches"] = {}
    for branch in dict.fromkeys(call.branch for call in calls):
        at = [k for k, call in enumerate(calls) if call.branch == branch]
        summary["branches"][branch] = _both(image[:, at].mean(1), text[:, at].mean(1))
    return summary


def _correlation(a: np.ndarray, b: np.ndarray) -> dict[str, float | None]:
    """Of [prompts, blocks]; an interval needs more than one prompt. None where there is no number."""
    found = {name: value if np.isfinite(value) else None for name, value in correlation(a, b)._asdict().items()}
    return found if len(a) > 1 else found | {"low": None, "high": None}


def _both(image: np.ndarray, text: np.ndarray) -> dict[str, Any]:
    found = _correlation(image[:, : text.shape[1]], text)
    return {"image": image.mean(0).tolist(), "text": text.mean(0).tolist(), **found}


# --- the report -------------------------------------------------------------------------------------------------------


def write_importance_report(path: Path, plan: PruningPlan, summary: Mapping[str, Any]) -> None:
    """The report of a plan and what `summarize` gave, with "choices", "settings" and "seconds"."""
    found = summary["correlations"]["image, text"]
    tiles = {
        "Blocks kept": f"{len(plan.kept)} of {plan.num_layers}",
        "Removed": ", ".join(map(str, plan.removed)),
        "Strategy": plan.strategy,
        "Visual and text ranks correlate by": _number(found["spearman"]),
        "95 % interval over prompts": _interval(found),
        "Prompts and samples": f"{summary['prompts']} x {summary['settings']['samples']}",
    }
    sections = [_rankings(plan, summary), _agreement(summary), _choices(plan, summary)]
    write_report(path, "Which blocks to remove", tiles, sections)


def _rankings(plan: PruningPlan, summary: Mapping[str, Any]) -> Section:
    blocks = range(plan.num_layers)
    lines = [Series(MEASURES[name], list(range(len(plan.scores[name]))), plan.scores[name]) for name in MEASURES]
    removable = plan.num_layers - 1
    rank = {name: ranks(np.asarray(plan.scores[name][:removable])) for name in MEASURES}
    numbers = lambda name: [Series(MEASURES[name], list(range(removable)), rank[name].tolist())]

    def row(block: int) -> list[Cell]:
        cells: list[Cell] = [str(block), "no" if block in plan.removed else "yes"]
        for name in MEASURES:
            score = plan.scores[name]
            cells.append(float(score[block]) if block < len(score) else None)
            cells.append(f"{rank[name][block]:g}" if block < removable else None)
        return cells

    headers = ["Block", "Kept", *[text for name in MEASURES.values() for text in (name, "rank")]]
    return Section(
        "The rankings",
        [
            Text(
                "Importance is 1 minus the mean cosine between a stream's tokens before and after a block, over all "
                "units, stages, steps and branches of guidance, every call alike. Errors are those of the network "
                "without the block, relative to the whole one's output. Rank 1 matters least. The last block has no "
                "text output and is always kept."
            ),
            LinePlot("Rank of every block", "block", "rank, 1 matters least", [*numbers("image"), *numbers("text")]),
            LinePlot("Importance of every block", "block", "1 - mean cosine", lines[:2], log_y=True),
            LinePlot("What the output loses without a block", "block", "relative squared error", lines[2:], log_y=True),
            Table(headers, [row(block) for block in blocks], align="ll" + "r" * 2 * len(MEASURES)),
        ],
    )


def _agreement(summary: Mapping[str, Any]) -> Section:
    table = [
        [" and ".join(MEASURES[name] for name in pair.split(", ")), *_cells(found)]
        for pair, found in summary["correlations"].items()
    ]
    branches = [[f"branch of the {name}", *_cells(found)] for name, found in summary["branches"].items()]
    headers = ["", "Spearman", "95 % interval", "p"]
    steps = summary["steps"]
    series = []
    for units in dict.fromkeys(step["units"] for step in steps):
        at = [k for k, step in enumerate(steps) if step["units"] == units]
        what = "first latent frame" if units == "first" else "later latent frames"
        for key, name in (("spearman", what), ("low", f"{what}, 2.5 %"), ("high", f"{what}, 97.5 %")):
            series.append(Series(name, at, [steps[k][key] for k in at]))
    rows = [[step["units"], f"{step['stage']}", f"{step['step']}", *_cells(step)] for step in steps]
    return Section(
        "Do visual and text importance agree?",
        [
            Text(
                "Rank correlation over the removable blocks: 1 for the same order, 0 for none, -1 for the opposite. "
                "The interval draws prompts with replacement and tells how well the correlation of these blocks is "
                "known; p is how often a random order of the blocks correlates as strongly, up or down. Few blocks "
                "need a strong correlation to be told from chance."
            ),
            Table(headers, [*table, *branches], align="lrrr"),
            LinePlot(
                "Visual and text ranks along the way",
                "steps of all stages in order, first latent frame and later ones",
                "Spearman",
                series,
            ),
            Table(["Latent frames", "Stage", "Step", "Spearman", "95 % interval", "p"], rows, align="lrrrrr"),
        ],
    )


def _choices(plan: PruningPlan, summary: Mapping[str, Any]) -> Section:
    removed = lambda kept: ", ".join(str(k) for k in range(plan.num_layers) if k not in kept)
    settings = summary["settings"]
    return Section(
        "The choice",
        [
            Table(["Block", "Why"], [[str(block), plan.why[block]] for block in plan.removed], caption="Removed"),
            Table(
                ["Strategy", "Removes"],
                [[name, removed(kept)] for name, kept in summary["choices"].items()],
                caption="What every strategy would remove",
            ),
            Command("\n".join(f"{name}: {value}" for name, value in settings.items())),
        ],
    )


def _cells(found: Mapping[str, Any]) -> list[Cell]:
    return [_number(found["spearman"]), _interval(found), _number(found["p_value"], 4)]


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(found: Mapping[str, Any]) -> str:
    return "–" if found["low"] is None else f"{found['low']:.2f} to {found['high']:.2f}"
