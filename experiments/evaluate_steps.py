"""`experiments.evaluate steps`: what student, teacher and fake model of a run make of the same rows, as a picture."""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.errors import UserError

RESULT, PICTURE = "steps.json", "predictions.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", required=True, type=Path, metavar="DIR", help="workdir of a training of `steps`")
    add("--output", required=True, type=Path, metavar="DIR", help=f"{PICTURE} and {RESULT} go here")
    add("--rows", type=int, default=6, metavar="N", help="held-out rows of every stage (default 6)")
    add("--step", type=int, metavar="N", help="checkpoint (default the latest)")


def evaluate_steps(args: argparse.Namespace) -> dict[str, Any]:
    """Draws the picture and returns what `steps.json` holds: its columns, its rows, and errors of every column.

    The picture has one line for every stage and row, coarsest stage first, and the columns of
    `nd_jax.evals.step_predictions`: each is the last video frame of that latent frame, behind the teacher's.
    """
    import jax
    import jax.numpy as jnp

    from nd_jax.data.registry import build_data
    from nd_jax.distill import steps_roles
    from nd_jax.distill.registry import build_method
    from nd_jax.evals.step_predictions import COLUMNS, TARGET, step_predictions
    from nd_jax.files import write_text
    from nd_jax.generate.model_folder import open_model
    from nd_jax.generate.pipeline import video_decoder
    from nd_jax.models.attention import default_attention
    from nd_jax.pyramid.schedule import PyramidSchedule
    from nd_jax.train.checkpoint import load_params
    from nd_jax.train.loop import HOST_COLUMNS

    if args.rows < 1:
        raise UserError(f"--rows is {args.rows}: use 1 or more")
    params, meta, step = load_params(args.run, args.step)
    # Of these devices, whatever the run was trained on.
    config = meta["config"] | {"attention": default_attention()}
    if meta["method"] != "steps":
        raise UserError(f"{args.run}: is a training of {meta['method']!r}; give one of `steps`")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.output}: cannot be created ({error.strerror}); choose another --output") from error
    method = build_method(config)
    given = {name: role.load() if role.frozen else params[name] for name, role in method.roles.items()}
    held_out = next(iter(build_data(config, args.run)[1]), None)
    if held_out is None:
        raise UserError(f"{args.run}: holds no rows out (data.eval_fraction); give a run that does")
    count = min(args.rows, int(held_out["valid"].sum()))
    batch = {name: jnp.asarray(x[:count]) for name, x in held_out.items() if name not in HOST_COLUMNS}
    networks, objective = steps_roles.networks_from_config(config), steps_roles.objective_from_config(config)
    decode = video_decoder(open_model(Path(config["model"]["folder"])), jnp.float32)

    def video_frame(latents: np.ndarray, unit: int, frame: np.ndarray) -> np.ndarray:
        """Last video frame [H, W, 3] of a latent frame [1, h, w, C] of any stage, behind the row's own [T, H, W, C]."""
        times = latents.shape[1] // frame.shape[1]
        whole = frame.repeat(times, axis=1).repeat(times, axis=2)
        return list(decode(np.concatenate([latents[:unit], whole])))[-1]

    settings = (networks, objective, PyramidSchedule())
    lines, errors = [], {}
    for stage in range(len(networks.tables)):
        predict = lambda *roles_and_batch, stage=stage: step_predictions(*settings, *roles_and_batch, stage)
        found, units = jax.device_get(jax.jit(predict)(given, batch))
        columns = {name: found[name] for name in COLUMNS if name in found}  # jit sorts dictionaries.
        for name, frames in columns.items():
            errors[f"{name}, stage {stage}"] = float(np.mean(np.square(frames - columns[TARGET])))
        for row in range(count):
            shown = [video_frame(np.asarray(batch["latents"][row]), int(units[row]), x[row]) for x in columns.values()]
            lines.append(np.concatenate(shown, axis=1))
    _write(args.output / PICTURE, np.concatenate(lines))
    result = {"run": str(args.run), "step": step, "columns": list(columns), "rows": count, "squared_errors": errors}
    write_text(args.output / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def describe(args: argparse.Namespace, result: dict[str, Any]) -> str:
    """The closing line."""
    return f"step {result['step']}: {', '.join(result['columns'])}: {args.output / PICTURE}"


def _write(path: Path, picture: np.ndarray) -> None:
    from PIL import Image

    from nd_jax.files import replacing

    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG")
