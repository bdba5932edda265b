"""The first whole walk at tiny size: text-encoder distillation, from prompts to a Hexagon binary, and one report.

    python -m experiments.quickstart --workdir runs/quickstart [--prompts FILE] [--seed N] [--only STAGE] [--from STAGE]

Every stage is a command that you could type; the report shows it. A stage that is done is not run again: the same
command continues an interrupted walk.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.quickstart_report import print_table, write_quickstart_report
from experiments.stages import Stage, Stages, add_arguments, python, read_results, run_stages
from nd_jax.data.toy_prompts import toy_prompts
from nd_jax.errors import run_command
from nd_jax.files import write_text

CONFIG = "experiments/configs/text_encoder.py:tiny"
GRAPH = "text_encoder"


@dataclasses.dataclass(frozen=True)
class Walk:
    """What the stages share.

    Attributes:
      workdir: everything is written below it.
      prompts: prompts to distil on.
      seed: of training.
      soc: chip of the binary.
    """

    workdir: Path
    prompts: Path
    seed: int
    soc: str


def train_command(walk: Walk, name: str, *overrides: str) -> list[str]:
    return python(
        "experiments.train",
        "--config",
        CONFIG,
        "--workdir",
        walk.workdir / name,
        f"--config.data.prompts={walk.prompts}",
        f"--config.seed={walk.seed}",
        *overrides,
    )


def stages(walk: Walk) -> Stages:
    """The walk, in order."""
    work = walk.workdir
    read = lambda *parts: lambda: json.loads(work.joinpath(*parts).read_text())
    onnx = python("converters.export_onnx", "--model", work / "model", "--graph", GRAPH, "--output", work / "onnx")
    hexagon = python("converters.compile_hexagon", "--onnx", work / "onnx" / f"{GRAPH}.onnx")
    hexagon += ["--output", str(work / "hexagon"), "--soc", walk.soc, "--run", "4"]
    return {
        "train": Stage(
            "distil the text encoder", read("train", "result.json"), train_command(walk, "train"), folder="train"
        ),
        "ablation": Stage(
            "the same without the cosine term",
            read("ablation", "result.json"),
            train_command(walk, "ablation", "--config.loss.cosine_weight=0.0"),
            folder="ablation",
        ),
        "export": Stage(
            "write the PyTorch model folder",
            lambda: check_folder(walk),
            python("converters.export_torch", "--checkpoint", work / "train", "--output", work / "model"),
        ),
        "onnx": Stage("export to ONNX", read("onnx", f"{GRAPH}.json"), [*onnx, "--prompts", str(walk.prompts)]),
        "hexagon": Stage(
            f"compile for {walk.soc} and run the simulator", read("hexagon", f"{GRAPH}_{walk.soc}.json"), hexagon
        ),
        "report": Stage("write the report", lambda: report(walk), always=True),
    }


def check_folder(walk: Walk) -> dict[str, Any]:
    """Reads the model folder back: bit-identical to the checkpoint, and the same context in PyTorch."""
    import jax
    import numpy as np

    from converters.numerics import snr_db
    from converters.torch_reference import text_encoder_context
    from nd_jax.models import context_adapter, t5
    from nd_jax.train.deployed import load_deployed
    from nd_jax.weights.folder import load_component

    model = walk.workdir / "model"
    ours = load_deployed(walk.workdir / "train").components
    folder = {name: load_component(model / name) for name in ours}
    same = jax.tree.map(
        np.array_equal, {n: c.params for n, c in ours.items()}, {n: c.params for n, c in folder.items()}
    )
    ids, mask = _held_out_tokens(walk)
    dt5, adapter = folder["text_encoder_3"], folder["context_adapter"]
    hidden = t5.DistilT5(dt5.config).apply({"params": dt5.params}, ids, mask)
    context = np.asarray(context_adapter.ContextAdapter(adapter.config).apply({"params": adapter.params}, hidden))
    sizes = {name: sum(x.size for x in jax.tree.leaves(c.params)) for name, c in ours.items()}
    return {
        "bit_identical": all(jax.tree.leaves(same)),
        "pytorch_snr_db": snr_db(context, text_encoder_context(model, ids, mask)),
        "parameters": sizes,
    }


def _held_out_tokens(walk: Walk) -> Any:
    """Ids and masks, int32 [8, L], of prompts that training did not see."""
    from nd_jax.data.registry import build_data
    from nd_jax.train.checkpoint import CONFIG_FILE

    config = json.loads((walk.workdir / "train" / CONFIG_FILE).read_text())
    _, held_out = build_data(config, walk.workdir / "train")
    batch = next(iter(held_out))
    return batch["ids"][:8], batch["mask"][:8]


def report(walk: Walk) -> dict[str, Any]:
    """Writes report.html and prints the table."""
    done = read_results(walk.workdir, stages(walk))
    path = walk.workdir / "report.html"
    write_quickstart_report(path, walk.workdir, walk.prompts.name, walk.seed, walk.soc, done)
    print_table(walk.workdir, done, walk.soc)
    return {"report": str(path)}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    names = ("train", "ablation", "export", "onnx", "hexagon", "report")
    parser = argparse.ArgumentParser(
        prog="python -m experiments.quickstart",
        description="Text-encoder distillation at tiny size: prompts -> training -> PyTorch folder -> ONNX -> Hexagon.",
    )
    parser.add_argument(
        "--workdir", type=Path, required=True, help="everything is written below it; a second run continues"
    )
    parser.add_argument(
        "--prompts", type=Path, help="a .txt, .jsonl or .array_record file (default: captions of a grammar)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of training (default 0)")
    parser.add_argument("--soc", default="8-elite", help="chip, see converters.compile_hexagon (default 8-elite)")
    add_arguments(parser, names)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    begin = time.monotonic()
    args.workdir.mkdir(parents=True, exist_ok=True)
    walk = Walk(args.workdir, _prompts(args), args.seed, args.soc)
    run_stages(args.workdir, stages(walk), args.only, args.start)
    print(f"quickstart done in {time.monotonic() - begin:.0f} s, report: {(args.workdir / 'report.html').resolve()}")
    return 0


def _prompts(args: argparse.Namespace) -> Path:
    """The user's file, or captions written into the workdir."""
    if args.prompts is not None:
        return args.prompts
    path = args.workdir / "prompts.txt"
    if not path.exists():
        write_text(path, "\n".join(toy_prompts(2000, seed=0)) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(run_command(main))
