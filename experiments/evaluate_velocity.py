"""`experiments.evaluate velocity`: transformers on the held-out states of a recovery run."""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.evaluate_rollouts import TEACHER, add_student, student_names
from nd_jax.errors import UserError

RESULT = "velocity.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--run", required=True, type=Path, metavar="DIR", help="workdir of a `prune` training, which has the states")
    add_student(parser)
    add("--output", required=True, type=Path, metavar="DIR", help=f"{RESULT} goes here")


def evaluate_velocity(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the run's teacher and all students, and returns what `velocity.json` holds.

    Of every model: "velocity_error" against the data's velocity, also by stage, and "flow_error" against the teacher's:
    what the run's own evaluations say, on the same states, of weights in folders.
    """
    from nd_jax.data.registry import build_data
    from nd_jax.distill.transformer_roles import transformer_config
    from nd_jax.files import write_text
    from nd_jax.models.attention import default_attention
    from nd_jax.train.checkpoint import CONFIG_FILE
    from nd_jax.weights.folder import load_component
    from nd_jax.weights.sources import read_json

    path = args.run / CONFIG_FILE
    config = read_json(path)
    if config.get("method") != "prune":
        raise UserError(f"{path}: of method {config.get('method')!r}; give the workdir of a training of `prune`")
    # Of these devices, whatever the run was trained on.
    config["attention"] = default_attention()
    folders = {TEACHER: Path(config["model"]["folder"]) / config["model"]["transformer"]} | student_names(args.student)
    network, teacher = transformer_config(folders[TEACHER])
    blocks = {}
    for name, folder in folders.items():
        found, sizes = transformer_config(folder)
        same = (found, dataclasses.replace(sizes, num_layers=teacher.num_layers)) == (network, teacher)
        if not same or sizes.num_layers > teacher.num_layers:
            raise UserError(f"{folder}: is not the teacher of {args.run} with fewer blocks; give a student of it")
        blocks[name] = sizes.num_layers
    batches = list(build_data(config, args.run)[1])
    if not batches:
        raise UserError(f"{path}: holds no rows out (data.eval_fraction); give a run that does")

    measures: dict[int, Callable] = {}
    models = {}
    for name, folder in folders.items():
        count = blocks[name]
        if count not in measures:
            measures[count] = _measure(config, count, batches)
        models[name] = {"blocks": count, **measures[count](load_component(folder, network, "float32").params)}
    rows = int(sum(batch["valid"].sum() for batch in batches))
    result = {"run": str(args.run), "rows": rows, "models": models}
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{args.output}: cannot be created ({error.strerror}); choose another --output") from error
    write_text(args.output / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def describe(args: argparse.Namespace, result: dict[str, Any]) -> str:
    """The closing line."""
    shown = "; ".join(f"{name} {found['velocity_error']:.4f}" for name, found in result["models"].items())
    return f"velocity error of {result['rows']} rows: {shown}: {args.output / RESULT}"


def _measure(config: Mapping[str, Any], blocks: int, batches: list[dict[str, np.ndarray]]) -> Callable:
    """Parameters of a transformer of so many blocks -> its errors. Transformers of one size share a program."""
    import jax

    from nd_jax.distill.prune import STUDENT
    from nd_jax.distill.registry import build_method
    from nd_jax.distill.teacher import TRANSFORMER
    from nd_jax.train.loop import HOST_COLUMNS

    # Features need to know which blocks were taken, velocities do not.
    loss = {**config["loss"], "data_weight": 1.0, "flow_weight": 1.0, "image_weight": 0.0, "text_weight": 0.0}
    last = config["model"]["mmdit"]["num_layers"] - 1
    kept = [*range(blocks - 1), last]
    method = build_method({**config, "loss": loss, "model": {**config["model"], "kept": kept}})
    frozen = {name: jax.device_put(role.load()) for name, role in method.roles.items() if name != STUDENT}
    roles = lambda student, frozen: {STUDENT: {TRANSFORMER: student}, **frozen}
    evaluate = jax.jit(lambda student, frozen, batch: method.evaluate(roles(student, frozen), batch))

    def measure(params: Any) -> dict[str, float]:
        student, totals = jax.device_put(params), {}
        for batch in batches:
            means = evaluate(student, frozen, {k: v for k, v in batch.items() if k not in HOST_COLUMNS})
            for name, mean in jax.device_get(means).items():
                totals[name] = totals.get(name, 0.0) + np.array([mean.total, mean.weight], np.float64)
        return method.summarize({name: float(total / weight) for name, (total, weight) in totals.items()})

    return measure
