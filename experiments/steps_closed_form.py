"""Pyramidal DMD where the answer is known: numbers and a picture of `experiments.steps_toy`.

    python -m experiments.steps_closed_form --output DIR [--seed N] [--updates N]

For every stage, students of one step are compared with the target distribution by the energy distance:

    clean   z~ against z_i                                    what the method matches
    end     y - v, where the student's step ends, against y_end       what inference takes on to the next stage

beside another sample of the target (the floor), one step of the teacher, and the student before DMD; then the three
stages one after another, by jumps as in inference and with fresh noise. DIR gets steps_closed_form.json and
steps_closed_form.png.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from converters.progress import stages as progress
from experiments.steps_toy import (
    BATCH,
    SAMPLES,
    STAGES,
    Params,
    Samples,
    Toy,
    chain_fresh,
    chain_jump,
    distill,
    exact,
    fit,
    learned,
    one_step_samples,
    target_samples,
    toy_data,
    toy_pyramid,
)
from nd_jax.distill.steps import StepsObjective
from nd_jax.errors import UserError, run_command
from nd_jax.evals.gaussian_mixture import energy_distance, sample_mixture
from nd_jax.files import replacing, write_text
from nd_jax.pyramid.noise import halve, upsample

SEEDS = 3
TEACHER_STEPS = 50
ALONE = StepsObjective(cauchy_weight=0.0)
# What is trained at a stage: the method alone; beside the Cauchy loss, whose frame the coarsest stage's input says
# nothing of; and by the exact clean frame, where the two forms differ.
OBJECTIVES = (
    {"dmd": ALONE, "dmd_cauchy": StepsObjective()},
    {"dmd": ALONE, "dmd_exact": dataclasses.replace(ALONE, clean_form="exact")},
    {"dmd": ALONE},
)
RESULT, PICTURE = "steps_closed_form.json", "steps_closed_form.png"

# The picture: sizes in pixels, rows, and the panels of a row with their titles.
PANEL, MARGIN, HEADING = 240, 24, 72
CAPTION = (
    "Upper left latent pixel of every frame, as a point in the plane; grey: the target. "
    f"Numbers: energy distance of whole frames, {SEEDS} seeds."
)
ROWS = (
    "Stage 0 alone: 1 x 1 latent pixel, from noise",
    *(f"Stage {i} alone: {2**i} x {2**i} latent pixels, from the data's coarser frame" for i in range(1, STAGES)),
    "All stages one after another",
)
COMMON = {"target": "target", "before": "one step before DMD", "dmd": "after DMD"}
PANELS = (
    COMMON | {"dmd_cauchy": "DMD + Cauchy loss"},
    COMMON | {"dmd_exact": "DMD, exact form"},
    COMMON,
    COMMON | {"dmd": "after DMD, jumps", "dmd_fresh": "after DMD, fresh noise"},
)


# --- comparison -------------------------------------------------------------------------------------------------------


def compare(samples: Samples, targets: Samples) -> dict[str, Any]:
    """Energy distances of every seed's samples to its target, and of both what lies in no coarser frame.

    Args:
      samples, targets: with seeds on a further axis 0.
    """
    found = {"clean": distances(samples.clean, targets.clean), "end": distances(samples.end, targets.end)}
    if samples.clean.shape[-2] == 1:
        return found
    clean, end, noise = (np.asarray(jax.vmap(_detail)(x), np.float64) for x in samples)
    rms = lambda x: np.sqrt(np.mean(np.square(x), axis=(1, 2, 3, 4, 5)))
    correlation = np.mean(clean * noise, axis=(1, 2, 3, 4, 5)) / (rms(clean) * rms(noise))
    return found | {
        "detail_clean_rms": summary(rms(clean)),
        "detail_end_rms": summary(rms(end)),
        "detail_noise_correlation": summary(correlation),
    }


def distances(x: jax.Array, y: jax.Array) -> dict[str, Any]:
    """Energy distances of samples with seeds on axis 0."""
    return summary([energy_distance(*pair) for pair in zip(x, y, strict=True)])


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard deviation over seeds, and the values."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)), "values": list(map(float, values))}


def _detail(x: jax.Array) -> jax.Array:
    """R x: what halving averages away."""
    return x - upsample(halve(x))


# --- the experiment ---------------------------------------------------------------------------------------------------


class StageRun(NamedTuple):
    """A stage, with seeds on axis 0 of all arrays.

    Attributes:
      params: of the networks "before" and of those of `OBJECTIVES`.
      samples: of these, of the "target", of another sample of it ("floor") and of the teacher's one step.
    """

    params: dict[str, Params]
    samples: dict[str, Samples]


def run_stage(toy: Toy, stage: int, updates: int, key: jax.Array, begin: Callable[[str], None]) -> StageRun:
    """Fits, distils and samples one stage."""
    fit_keys, train_keys, target_keys, floor_keys, sample_keys = (seed_keys(key, use) for use in range(5))
    begin(f"stage {stage}: fit the teacher")
    params = {"before": each_seed(lambda key: fit(toy, stage, updates, key))(fit_keys)}
    for name, objective in OBJECTIVES[stage].items():
        begin(f"stage {stage}: {name}")
        train = each_seed(lambda initial, key, o=objective: distill(toy, stage, o, updates, initial, key)[0])
        params[name] = jax.block_until_ready(train(params["before"], train_keys))

    begin(f"stage {stage}: sample")
    target = each_seed(lambda key: target_samples(toy, stage, key))
    teacher = each_seed(lambda key: one_step_samples(toy, stage, ALONE, exact(toy, stage), key))
    samples = {"target": target(target_keys), "floor": target(floor_keys), "teacher_one_step": teacher(sample_keys)}
    for name, trained in params.items():
        objective = OBJECTIVES[stage].get(name, ALONE)
        one_step = lambda p, key, o=objective: one_step_samples(toy, stage, o, learned(toy, stage, p), key)
        samples[name] = each_seed(one_step)(trained, sample_keys)
    return StageRun(params, samples)


def run_chains(toy: Toy, runs: Sequence[StageRun], key: jax.Array) -> dict[str, jax.Array]:
    """Finest frames of every way to sample all stages, [SEEDS, SAMPLES, 1, h, w, C]."""
    target_keys, floor_keys, sample_keys = (seed_keys(key, use) for use in range(3))
    draw = each_seed(lambda key: sample_mixture(toy.mixtures[-1], key, SAMPLES))
    samples = {"target": draw(target_keys), "floor": draw(floor_keys)}
    teacher = [exact(toy, stage) for stage in range(STAGES)]
    for name, count in (("teacher_one_step", 1), (f"teacher_{TEACHER_STEPS}_steps", TEACHER_STEPS)):
        samples[name] = each_seed(lambda key, n=count: chain_jump(toy, teacher, key, n))(sample_keys)

    networks = lambda params: [learned(toy, stage, of_stage) for stage, of_stage in enumerate(params)]
    jump = each_seed(lambda params, key: chain_jump(toy, networks(params), key))
    for name, form in (("before", "extrapolated"), ("dmd", "extrapolated"), ("dmd_exact", "exact")):
        # The forms differ, and so do these students, at one stage alone.
        params = [run.params.get(name, run.params["dmd"]) for run in runs]
        fresh = each_seed(lambda params, key, form=form: chain_fresh(toy, networks(params), key, form))
        samples |= {name: jump(params, sample_keys), f"{name}_fresh": fresh(params, sample_keys)}
    return samples


def seed_keys(key: jax.Array, use: int) -> jax.Array:
    """A key a seed, [SEEDS]."""
    return jax.random.split(jax.random.fold_in(key, use), SEEDS)


def each_seed(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of every seed in one program; seeds are axis 0 of what it takes and gives."""
    return jax.jit(jax.vmap(function))


def results(toy: Toy, runs: Sequence[StageRun], chains: Mapping[str, jax.Array]) -> dict[str, Any]:
    """All comparisons as plain data."""
    stages = []
    for stage, (_, samples) in enumerate(runs):
        start, end = toy.schedule.flow_range(stage)
        of = {name: compare(x, samples["target"]) for name, x in samples.items() if name != "target"}
        stages.append({"stage": stage, "sigma_start": start, "sigma_end": end, "samples": of})
    return {
        "stages": stages,
        "chain": {name: distances(x, chains["target"]) for name, x in chains.items() if name != "target"},
    }


# --- the picture ------------------------------------------------------------------------------------------------------


def picture(found: Mapping[str, Any], runs: Sequence[StageRun], chains: Mapping[str, jax.Array]) -> Any:
    """The upper left latent pixel, a point in the plane, of the first seed's samples: a row a stage, and one of the
    chain. Behind samples lies their target in grey, above them their energy distance over all pixels and seeds."""
    from PIL import Image, ImageDraw, ImageFont

    drawn = [{name: x.clean for name, x in run.samples.items()} for run in runs] + [dict(chains)]
    numbers = [{name: x["clean"] for name, x in stage["samples"].items()} for stage in found["stages"]]
    numbers.append(found["chain"])
    size = (MARGIN + max(map(len, PANELS)) * (PANEL + MARGIN), MARGIN + len(ROWS) * (PANEL + HEADING) + MARGIN)
    image = Image.new("RGB", size, "white")
    draw, large, small = ImageDraw.Draw(image), ImageFont.load_default(size=16), ImageFont.load_default(size=13)
    for row, heading in enumerate(ROWS):
        top = MARGIN // 2 + row * (PANEL + HEADING)
        draw.text((MARGIN, top), heading, fill="black", font=large)
        points = {name: np.asarray(drawn[row][name][0, :, 0, 0, 0]) for name in PANELS[row]}
        limit = 1.2 * np.abs(points["target"]).max()
        for column, (name, title) in enumerate(PANELS[row].items()):
            left = MARGIN + column * (PANEL + MARGIN)
            number = numbers[row].get(name)
            title += f": {number['mean']:.3f} ± {number['std']:.3f}" if number else ""
            draw.text((left, top + 28), title, fill="black", font=small)
            behind = points["target"][: 0 if name == "target" else None]
            image.paste(Image.fromarray(_panel(points[name], behind, limit)), (left, top + 48))
    draw.text((MARGIN, size[1] - MARGIN - 4), CAPTION, fill="black", font=small)
    return image.quantize(32)


def _panel(points: np.ndarray, behind: np.ndarray, limit: float) -> np.ndarray:
    """Both [N, 2] within +-limit as dots that darken one another, `behind` in grey; uint8 [PANEL, PANEL, 3]."""
    panel = np.full((PANEL, PANEL, 3), 255.0)
    for dots, colour in ((behind, (190, 190, 190)), (points, (11, 92, 173))):
        at = ((dots * (1, -1) / limit + 1) / 2 * PANEL).astype(int)
        at = at[np.all((at >= 0) & (at < PANEL - 1), axis=1)]
        count = np.zeros((PANEL, PANEL))
        for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
            np.add.at(count, (at[:, 1] + down, at[:, 0] + right), 1)
        cover = (1 - 0.6**count)[..., None]
        panel = (1 - cover) * panel + cover * np.array(colour)
    panel[[0, -1]] = panel[:, [0, -1]] = 200
    return panel.astype(np.uint8)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.steps_closed_form",
        description="Pyramidal DMD of Gaussian mixtures with the exact velocity as the teacher: numbers and a picture.",
    )
    parser.add_argument("--output", type=Path, required=True, help=f"folder of {RESULT} and {PICTURE}")
    parser.add_argument("--seed", type=int, default=0, help="of data, networks and noise (default 0)")
    parser.add_argument("--updates", type=int, default=2000, help="of every student (default 2000)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.updates < 1:
        raise UserError(f"--updates {args.updates}: give at least 1")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be made ({error.strerror}); choose another folder") from error
    started = time.perf_counter()
    toy, key = toy_pyramid(toy_data()), jax.random.key(args.seed)
    # Of every stage the fit, every objective and the samples; then the chains and the comparison.
    with progress(sum(2 + len(objectives) for objectives in OBJECTIVES) + 2) as begin:
        runs = [run_stage(toy, i, args.updates, jax.random.fold_in(key, i), begin) for i in range(STAGES)]
        begin("all stages")
        chains = run_chains(toy, runs, jax.random.fold_in(key, STAGES))
        begin("compare")
        found = results(toy, runs, chains)
    settings = {"seed": args.seed, "seeds": SEEDS, "updates": args.updates, "samples": SAMPLES, "batch": BATCH}
    seconds = time.perf_counter() - started
    written = json.dumps({"settings": settings, **found, "seconds": seconds}, indent=1)
    write_text(args.output / RESULT, written + "\n")
    with replacing(args.output / PICTURE) as temporary:
        picture(found, runs, chains).save(temporary, format="PNG", optimize=True)
    of = lambda stage, name: stage["samples"][name]["clean"]["mean"]
    pairs = (f"{of(x, 'before'):.3f} -> {of(x, 'dmd'):.3f} (floor {of(x, 'floor'):.3f})" for x in found["stages"])
    chain = {name: f"{x['mean']:.3f}" for name, x in found["chain"].items()}
    print(
        f"energy distance of one step, before -> after DMD, stages 0 to {STAGES - 1}: {', '.join(pairs)}; all stages "
        f"{chain['before']} -> {chain['dmd']}, with fresh noise {chain['dmd_fresh']} (floor {chain['floor']}); "
        f"{seconds:.0f} s; {args.output / RESULT}, {args.output / PICTURE}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
