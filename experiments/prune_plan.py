"""Which blocks of a teacher to remove: importance over calibration prompts, and a plan.

    python -m experiments.prune_plan --model TEACHER --prompts FILE --keep 18 --output DIR

Samples every prompt several times and looks at all blocks on the way: how much each changes image and text tokens, and
what the output loses without it. OUTPUT gets plan.json, which says what stays and why and which you may edit,
importance.json with every score, and report.html with both rankings and how far they agree.

The same command continues a run that was interrupted and gives the same plan; with another --keep or --strategy it
chooses again from what was measured. Several processes share the work: start the command once in each, with
--num-processes and --process-id and one --output; the last to finish writes the plan.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nd_jax.errors import UserError, run_command

PLAN, IMPORTANCE, REPORT = "plan.json", "importance.json", "report.html"
PARTS, SETTINGS, LEFT_OUT = "parts", "settings.json", "left-out.json"
# The names of `block_importance.STRATEGIES`, for a --help that loads nothing.
STRATEGY_NAMES = ("visual", "text", "rank_sum", "leave_one_out")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.prune_plan",
        description="Choose the blocks that a pruned transformer keeps; the same command continues an interrupted run.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="model folder of the teacher, which makes all frames")
    add("--prompts", required=True, type=Path, metavar="FILE", help=".txt, one prompt a line, or .jsonl")
    add("--keep", required=True, type=int, metavar="N", help="blocks that stay, the last one among them")
    add("--output", required=True, type=Path, metavar="DIR", help=f"{PLAN}, {IMPORTANCE} and {REPORT} go here")
    add("--strategy", choices=STRATEGY_NAMES, default="leave_one_out", help="of the choice (default leave_one_out)")
    add("--samples", type=int, default=5, metavar="N", help="of every prompt (default 5)")
    add("--batch", type=int, default=8, metavar="N", help="samples at once, split over local devices (default 8)")
    add("--probes", type=int, default=32, metavar="N", help="samples for effects of one block left out (default 32)")
    add("--draws", type=int, default=4, metavar="N", help="states of a probe for each stage (default 4)")
    add("--seed", type=int, default=0, help="of noise and states (default 0)")
    add("--transformer", metavar="NAME", help="subfolder of the model, where it has several transformers")
    add("--dtype", choices=("bfloat16", "float32"), help="of the networks (default bfloat16; float32 on a CPU)")
    add("--num-processes", type=int, default=1, help="how many processes share the work")
    add("--process-id", type=int, default=0, help="which one this is, from 0")
    args = parser.parse_args(argv)
    for name in ("samples", "batch", "probes", "draws", "num_processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: give at least 1")
    if not 0 <= args.process_id < args.num_processes:
        parser.error(f"--process-id {args.process_id} is not below --num-processes {args.num_processes}")
    if not 0 <= args.seed < 2**32:
        parser.error("--seed must be from 0 to 4294967295")
    return args


# --- the work in parts ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """Samples in batches. Sample j is of prompt j mod P, so that the first ones are of different prompts.

    Attributes:
      folder: of the parts.
      prompts: all P of them.
      samples: of each.
      batch: B.
      probes: so many samples are probes, rounded up to whole batches.
    """

    folder: Path
    prompts: Sequence[str]
    samples: int
    batch: int
    probes: int

    @property
    def count(self) -> int:
        return len(self.prompts) * self.samples

    @property
    def batches(self) -> range:
        return range(-(-self.count // self.batch))

    @property
    def probe_batches(self) -> range:
        return self.batches[: -(-self.probes // self.batch)]

    def ids(self, batch: int) -> range:
        """Samples of a batch."""
        return range(self.count)[batch * self.batch : (batch + 1) * self.batch]

    def rows(self, batch: int) -> np.ndarray:
        """The same, filled up to B with the last one."""
        ids = np.asarray(self.ids(batch))
        return np.pad(ids, (0, self.batch - len(ids)), mode="edge")

    def path(self, batch: int) -> Path:
        return self.folder / f"batch-{batch:05d}-of-{len(self.batches):05d}.safetensors"

    def write(self, batch: int, arrays: dict[str, np.ndarray], seconds: float) -> None:
        """A part: the real rows of every array."""
        from nd_jax.weights.safetensors_io import build_header, write_safetensors

        real = {name: np.asarray(array, np.float32)[: len(self.ids(batch))] for name, array in arrays.items()}
        header = build_header({n: (a.dtype, a.shape) for n, a in real.items()}, {"seconds": f"{seconds:.3f}"})
        write_safetensors(self.path(batch), header, real.__getitem__)

    def read(self, batch: int) -> tuple[dict[str, np.ndarray], float]:
        """(arrays, seconds) of a part."""
        from nd_jax.weights.safetensors_io import SafetensorsFile

        try:
            with SafetensorsFile(self.path(batch)) as file:
                return {name: file.read(name) for name in file.keys()}, float(file.metadata["seconds"])
        except (UserError, KeyError, ValueError) as error:
            raise UserError(f"{self.path(batch)}: damaged ({error}); delete it, the same command makes it") from error


def claim(output: Path, settings: dict[str, Any]) -> None:
    """Makes the output folder, or checks that it was made with the same settings."""
    from nd_jax.files import write_text
    from nd_jax.weights.sources import read_json

    path = output / PARTS / SETTINGS
    if path.exists():
        before = read_json(path)
        unlike = [name for name in settings if before.get(name) != settings[name]]
        if unlike:
            raise UserError(
                f"{output}: measured with {unlike[0]} {before.get(unlike[0])!r}, not {settings[unlike[0]]!r}; "
                "choose another --output"
            )
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be created ({error.strerror}); choose another --output") from error
    write_text(path, json.dumps(settings, indent=2) + "\n")


# --- measuring --------------------------------------------------------------------------------------------------------


class Measuring:
    """The teacher and the text of some samples, loaded when something is to be measured.

    Args:
      args: of the command.
      folder: the opened model.
      work: all samples.
      batches: those whose text is needed.
      bar: shows the prompts that are encoded.
    """

    def __init__(self, args: argparse.Namespace, folder: Any, work: Work, batches: Sequence[int], bar: "Bar"):
        import jax
        import jax.numpy as jnp

        from nd_jax.evals.calibration import load_teacher
        from nd_jax.generate.pipeline import encode_prompts
        from nd_jax.train.sharding import make_mesh

        self.args, self.work = args, work
        dtype, guided = jnp.dtype(args.dtype), folder.sampler().needs_negative
        needed = sorted({int(row) % len(work.prompts) for batch in batches for row in work.rows(batch)})
        self.place = {prompt: k for k, prompt in enumerate(needed)}
        # The last row is the negative prompt's.
        texts = [work.prompts[k] for k in needed] + [folder.settings.negative_prompt] * guided
        bar.phase("text", len(texts))
        text = encode_prompts(folder, texts, dtype, on_prompt=bar.advance)
        self.text = jax.tree.map(lambda x: x[: len(needed)], text)
        self.negative = jax.tree.map(lambda x: x[len(needed) :], text) if guided else None
        devices = jax.local_devices()[: math.gcd(args.batch, jax.local_device_count())]
        self.teacher = load_teacher(folder, dtype, make_mesh({"data": -1}, devices) if len(devices) > 1 else None)

    def batch(self, batch: int) -> Any:
        import jax

        from nd_jax.evals.calibration import Batch

        rows = self.work.rows(batch)
        places = np.asarray([self.place[int(row) % len(self.work.prompts)] for row in rows])
        return Batch(jax.tree.map(lambda x: x[places], self.text), self.negative, rows, self.args.seed)

    def probe(self, batch: int, latents: np.ndarray) -> Any:
        """`Probe` of a batch; latents of its real rows."""
        from nd_jax.evals.calibration import Probe

        fill = ((0, self.args.batch - len(latents)), *[(0, 0)] * (latents.ndim - 1))
        return Probe(self.teacher, self.batch(batch), np.pad(latents, fill, mode="edge"), self.args.draws)


def measure_missing(args: argparse.Namespace, folder: Any, work: Work, bar: "Bar") -> int:
    """Makes the parts of this process that are missing; returns the number of their samples."""
    from nd_jax.evals.calibration import observe_rollouts, rollout_errors

    mine = work.batches[args.process_id :: args.num_processes]
    missing = [batch for batch in mine if not work.path(batch).exists()]
    if not missing:
        return 0
    measuring = Measuring(args, folder, work, missing, bar)
    teacher = measuring.teacher
    config, blocks = teacher.config, len(teacher.removable)
    probes = len(set(missing) & set(work.probe_batches))
    bar.phase("blocks", len(missing) * len(config.sampled_units) * config.video.stages + 2 * blocks * probes)
    for index in missing:
        begin, batch = time.perf_counter(), measuring.batch(index)
        arrays, latents = observe_rollouts(teacher, batch, bar.advance)
        if index in work.probe_batches:
            arrays["latents"] = np.asarray(latents)
            arrays["final_latent_error"] = rollout_errors(teacher, batch, latents, bar.advance)
            probe, errors = measuring.probe(index, arrays["latents"]), []
            for block in teacher.removable:
                errors.append(probe.error_without((block,)))
                bar.advance()
            arrays["velocity_error"] = np.stack(errors, axis=-1)
        work.write(index, arrays, time.perf_counter() - begin)
    return sum(len(work.ids(index)) for index in missing)


class LeftOut:
    """Velocity error of the probes without some blocks; sets of several blocks are measured once and noted in a file.

    Args:
      single: errors without one block, [S - 1].
      path: of the notes.
      measuring: loads what measuring needs.
      parts: arrays of the probe batches.
      bar: shows the sets that are measured.
    """

    def __init__(
        self,
        single: np.ndarray,
        path: Path,
        measuring: Callable[[], Measuring],
        parts: Sequence[dict[str, np.ndarray]],
        bar: "Bar",
    ):
        from nd_jax.weights.sources import read_json

        self._single, self._path, self._measuring, self._parts, self._bar = single, path, measuring, parts, bar
        self._noted = read_json(path) if path.exists() else {}
        self._probes: list[Any] | None = None

    def __call__(self, removed: tuple[int, ...]) -> float:
        """Error without the blocks `removed`, a mean over samples and stages."""
        from nd_jax.files import write_text

        if len(removed) == 1:
            return float(self._single[removed[0]])
        key = ",".join(map(str, removed))
        if key not in self._noted:
            if self._probes is None:
                measuring = self._measuring()
                self._probes = [measuring.probe(k, part["latents"]) for k, part in enumerate(self._parts)]
                self._bar.phase("choose", None)
            errors = [
                probe.error_without(removed)[: len(part["latents"])]
                for probe, part in zip(self._probes, self._parts, strict=True)
            ]
            self._noted[key] = float(np.concatenate(errors).astype(np.float64).mean())
            write_text(self._path, json.dumps(self._noted, indent=1) + "\n")
            self._bar.advance()
        return self._noted[key]


# --- the plan ---------------------------------------------------------------------------------------------------------


def choose_blocks(args: argparse.Namespace, folder: Any, work: Work, settings: dict[str, Any], bar: "Bar") -> Any:
    """Reads all parts, writes the plan and what it was chosen by; returns (plan, correlation of both streams)."""
    from experiments.prune_plan_report import summarize, write_importance_report
    from nd_jax.distill.pruning_plan import PruningPlan, write_plan
    from nd_jax.evals.block_importance import Evidence, choose
    from nd_jax.evals.calibration import rollout_calls
    from nd_jax.files import write_text

    parts, seconds = zip(*(work.read(batch) for batch in work.batches), strict=True)
    join = lambda name, count: np.concatenate([part[name] for part in parts[:count]]).astype(np.float64)
    # [samples, prompts, ...] and then the mean over samples.
    by_prompt = lambda x: x.reshape(work.samples, len(work.prompts), *x.shape[1:]).mean(axis=0)
    image, text = (by_prompt(join(name, None)) for name in ("image", "text"))
    probes = len(work.probe_batches)
    velocity, final = (join(name, probes) for name in ("velocity_error", "final_latent_error"))

    measuring = lambda: Measuring(args, folder, work, work.probe_batches, bar)
    left_out = LeftOut(velocity.mean((0, 1)), args.output / PARTS / LEFT_OUT, measuring, parts[:probes], bar)
    evidence = Evidence(image.mean((0, 1)), text.mean((0, 1)), left_out)
    kept, why = choose(args.strategy, evidence, args.keep)
    scores = {
        "image": evidence.image.tolist(),
        "text": evidence.text.tolist(),
        "velocity_error": velocity.mean((0, 1)).tolist(),
        "final_latent_error": final.mean(0).tolist(),
    }
    plan = PruningPlan(folder.transformer.num_layers, kept, args.strategy, why, scores)
    # Of the other strategies, those that cost nothing.
    others = [name for name in STRATEGY_NAMES if name not in ("leave_one_out", args.strategy)]
    choices = {args.strategy: kept} | {name: choose(name, evidence, args.keep)[0] for name in others}
    summary = summarize(image, text, velocity, final, rollout_calls(folder.sampler()))
    summary |= {"choices": choices, "seconds": round(sum(seconds), 1), "settings": settings}
    write_text(args.output / IMPORTANCE, json.dumps(summary, indent=1) + "\n")
    write_importance_report(args.output / REPORT, plan, summary)
    write_plan(args.output / PLAN, plan)
    return plan, summary["correlations"]["image, text"]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args = parse(argv)

    import jax

    from nd_jax.data.prompts import PromptSource
    from nd_jax.evals.block_importance import check_keep
    from nd_jax.generate.model_folder import open_model
    from nd_jax.weights.folder import component_hash

    args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    folder = open_model(args.model, args.transformer, mode="monolithic")
    check_keep(folder.transformer.num_layers, args.keep)
    prompts = PromptSource(args.prompts)
    work = Work(args.output / PARTS, list(prompts), args.samples, args.batch, args.probes)
    settings = {
        "model": str(args.model.resolve()),
        "transformer": component_hash(folder.path("transformer")),
        "prompts": prompts.fingerprint,
        **{name: getattr(args, name) for name in ("samples", "batch", "probes", "draws", "seed", "dtype")},
        "sampler": json.loads(json.dumps(dataclasses.asdict(folder.sampler()))),
    }
    claim(args.output, settings)
    begin = time.perf_counter()
    with progress() as bar:
        count = measure_missing(args, folder, work, bar)
        seconds = time.perf_counter() - begin
        done = f"{count} samples measured in {seconds:.0f} s" if count else "nothing to measure"
        left = [batch for batch in work.batches if not work.path(batch).exists()]
        if left:
            print(f"{done}; {len(left)} of {len(work.batches)} batches are left to other processes: {args.output}")
            return 0
        plan, found = choose_blocks(args, folder, work, settings, bar)
    print(
        f"{done}; visual and text importance correlate by {found['spearman']:.2f} "
        f"(95 % interval {found['low']:.2f} to {found['high']:.2f}); {len(plan.kept)} of {plan.num_layers} blocks "
        f"kept, without {', '.join(map(str, plan.removed))}: {args.output / PLAN}"
    )
    return 0


# --- progress ---------------------------------------------------------------------------------------------------------


class Bar:
    """One bar a phase on a terminal, nothing elsewhere."""

    def __init__(self, bars: Any):
        self._bars, self._task = bars, None

    def phase(self, name: str, total: int | None) -> None:
        self._task = self._bars.add_task(name, total=total)

    def advance(self) -> None:
        self._bars.advance(self._task)


@contextlib.contextmanager
def progress() -> Iterator[Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bars:
        yield Bar(bars)


if __name__ == "__main__":
    sys.exit(run_command(main))
