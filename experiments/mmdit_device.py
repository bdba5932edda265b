"""The stages of the video transformer for the device: whole, and in chunks of blocks that share their weights.

    python -m experiments.mmdit_device --size full --output DIR [--steps block chunks shared whole]

Random weights at the released width (`experiments.random_model` has the distribution), 24 heads of 64, 18 blocks, 49
frames of 320 x 512, 128 text tokens. Steps:

    block   the first block of every stage, and that of the first stage on the simulator;
    chunks  every chunk of every stage in a binary of its own;
    shared  each chunk's graphs of all stages in one binary that holds their weights once;
    whole   every stage in one binary, W8A16.

Graphs are exported, compared with JAX and quantised block by block, which takes little memory: a block is given what
the block before it gave in float32. Chunks and whole stages are joined from them. Activation ranges are those of
--samples random inputs: enough for sizes, times and traffic, and for the accuracy on such inputs, not for a trained
model.

What is done is not done again: DIR/reports has a file per measurement, to delete for a new one. Float graphs are
deleted with the chunk that they are for; what compiles and what exports has a process of its own, so that memory is
its own. Writes DIR/mmdit_device.json and prints the table.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters import chain, compile_hexagon, hexagon, onnx_check, qdq, samples
from converters.apart import apart
from converters.graph import TRANSFORMER, GraphOptions
from converters.output_files import write_json
from converters.shared_ranges import HEADROOM
from nd_jax.errors import UserError, run_command
from nd_jax.generate.stage_inputs import DEVICE_MASKED_LOGIT
from nd_jax.models.mmdit import MMDiTConfig

SIZES = {
    "full": (MMDiTConfig(), GraphOptions()),
    "tiny": (
        MMDiTConfig(
            sample_size=16,
            in_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=4,
            caption_projection_dim=64,
            pooled_projection_dim=16,
            pos_embed_max_size=16,
        ),
        GraphOptions(length=8, latent_height=8, latent_width=16, latent_frames=3),
    ),
}
STAGES = (0, 1, 2)
STEPS = ("block", "chunks", "shared", "whole")
PRECISIONS = ("fp16", "w8a16")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is measured, and where. `chunk` is the number of blocks in a chunk, `count` that of the random inputs."""

    output: Path
    size: str
    soc: str
    seed: int
    chunk: int
    count: int

    @property
    def config(self) -> MMDiTConfig:
        return SIZES[self.size][0]

    @property
    def chunks(self) -> list[tuple[int, int]]:
        return chain.block_ranges(self.config.num_layers, self.chunk)

    def graph(self, name: str, form: str = "") -> Path:
        """A block in float32, or quantised with float32 ends (form "ends"); what is joined (its precision)."""
        return self.output / "graphs" / f"{name}{form and f'_{form}'}.onnx"

    def samples(self, stage: int, block: int) -> Path:
        return self.output / "samples" / f"stage{stage}_block{block}.npz"

    def report(self, name: str) -> Path:
        return self.output / "reports" / f"{name}.json"


def open_output(setup: Setup) -> None:
    """Notes the settings in the output folder.

    Raises:
      UserError: it has measurements of other ones.
    """
    path = setup.output / "settings.json"
    ours = {field.name: getattr(setup, field.name) for field in dataclasses.fields(setup) if field.name != "output"}
    before = json.loads(path.read_text()) if path.exists() else ours
    if before != ours:
        raise UserError(f"{setup.output}: has measurements of {before}, not {ours}; choose another --output")
    setup.output.mkdir(parents=True, exist_ok=True)
    write_json(path, ours)


def part(stage: int, blocks: tuple[int, int]) -> str:
    return chain.part_name(f"mmdit_stage{stage}", *blocks)


# --- weights ----------------------------------------------------------------------------------------------------------


def transformer(setup: Setup) -> Any:
    """The component, with random weights in files that are mapped into memory: 5.2 GB of them at full size."""
    import jax

    from nd_jax.weights.folder import Component
    from nd_jax.weights.mmdit import PYRAMID_MMDIT
    from nd_jax.weights.network import abstract_params

    folder, done = setup.output / "weights", setup.output / "weights" / "complete"
    draw, rng = not done.exists(), np.random.default_rng(setup.seed)
    folder.mkdir(parents=True, exist_ok=True)

    def leaf(path: tuple, spec: Any) -> np.ndarray:
        file = folder / f"{'.'.join(key.key for key in path)}.npy"
        if draw:
            array = np.lib.format.open_memmap(file, "w+", np.float32, spec.shape)
            for row in array if path[0].key == "blocks" else [array]:
                row[...] = random_leaf(path[-1].key, row.shape, rng)
            array.flush()
        return np.load(file, mmap_mode="r")

    params = jax.tree_util.tree_map_with_path(leaf, abstract_params(PYRAMID_MMDIT, setup.config))
    done.touch()
    return Component(PYRAMID_MMDIT, setup.config, params)


def random_leaf(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """As `random_model.random_params`: kernels N(0, 1 / fan in), scales 1 + 0.1 N(0, 1), all else 0.1 N(0, 1)."""
    noise = rng.standard_normal(shape, np.float32)
    noise *= math.prod(shape[:-1]) ** -0.5 if name == "kernel" else 0.1
    return noise + np.float32(name == "scale")


# --- measurements -----------------------------------------------------------------------------------------------------


def record(setup: Setup, name: str, report: dict[str, Any]) -> dict[str, Any]:
    """Writes and prints a measurement."""
    setup.report(name).parent.mkdir(parents=True, exist_ok=True)
    write_json(setup.report(name), report)
    print(f"{name}: {json.dumps(report)}", flush=True)
    return report


def make_blocks(setup: Setup, stage: int, blocks: tuple[int, int], precision: str) -> None:
    """What `join` needs, where it is missing."""
    component = transformer(setup)
    for number in range(*blocks):
        name = part(stage, (number, number + 1))
        done = setup.graph(name, "ends" if precision == "w8a16" else "").exists()
        if not done and not setup.graph(name).exists():
            record(setup, f"{name}_export", export_block(setup, component, stage, number))
        if not done and precision == "w8a16":
            record(setup, f"{name}_quantise", quantise_block(setup, stage, number))


def export_block(setup: Setup, component: Any, stage: int, number: int) -> dict[str, Any]:
    """The float32 graph of a block, and what it gives on its samples as those of the next one."""
    from converters import export_onnx, mmdit_graph

    options = dataclasses.replace(SIZES[setup.size][1], blocks=(number, number + 1))
    graph = mmdit_graph.mmdit_stage({TRANSFORMER: component}, options, stage)
    inputs, following = setup.samples(stage, number), setup.samples(stage, number + 1)
    inputs.parent.mkdir(parents=True, exist_ok=True)
    if number == 0 and not inputs.exists():
        rng = np.random.default_rng(setup.seed)
        _save(inputs, [graph.sample(rng) for _ in range(setup.count)])
    path = setup.graph(graph.name)
    report = export_onnx.export_loaded(graph, path.parent, samples=inputs)
    if number + 1 < setup.config.num_layers and not following.exists():
        before = samples.read_samples(inputs, list(graph.inputs), setup.count)
        common = [{name: sample[name] for name in mmdit_graph.COMMON_INPUTS} for sample in before]
        after = map(chain.passed_on, onnx_check.run_on_cpu(path, before))
        _save(following, [one | other for one, other in zip(common, after, strict=True)])
    return {key: report[key] for key in ("snr_db", "nodes", "data_bytes", "seconds", "largest_values")}


def _save(path: Path, arrays: list[dict[str, np.ndarray]]) -> None:
    stacked = {name: np.stack([sample[name] for sample in arrays]) for name in arrays[0]}
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        np.savez(Path(scratch) / path.name, **stacked)
        (Path(scratch) / path.name).replace(path)


def quantise_block(setup: Setup, stage: int, number: int) -> dict[str, Any]:
    """W8A16 with float32 ends, to be joined."""
    from converters import quantize

    name = part(stage, (number, number + 1))
    report = quantize.quantize_graph(
        setup.graph(name), setup.samples(stage, number), setup.graph(name, "ends"), float_ends=True, seed=setup.seed
    )
    return {key: report[key] for key in ("snr_db", "rounding", "seconds")} | {"float": len(report["float_nodes"])}


def join(setup: Setup, stage: int, blocks: tuple[int, int], precision: str) -> None:
    """One graph of several blocks, on their files of weights."""
    import onnx
    import onnx_ir as ir

    form = "ends" if precision == "w8a16" else ""
    paths = [setup.graph(part(stage, (number, number + 1)), form) for number in range(*blocks)]
    model = ir.from_proto(chain.joined([samples.read_model(path) for path in paths], part(stage, blocks)))
    if precision == "w8a16":
        # The mask, which the attention core reads in floating point, may have no QuantizeLinear to take a range from.
        qdq.integer_ends(model, {"mask": (HEADROOM * DEVICE_MASKED_LOGIT, 0.0)})
    # Not by `ir.save`: what is in other files stays there.
    onnx.save(ir.to_proto(model), str(setup.graph(part(stage, blocks), precision)))


def compiled(setup: Setup, name: str, precision: str, runs: int = 0) -> dict[str, Any]:
    """Numbers of a graph in a binary of its own; with `runs`, on the simulator too."""
    with tempfile.TemporaryDirectory(dir=setup.output) as scratch:
        return compile_hexagon.compile_graph(
            setup.graph(name, precision), scratch, setup.soc, runs, reference=setup.graph(name)
        )


def shared(setup: Setup, blocks: tuple[int, int], stages: Sequence[int], precision: str) -> dict[str, Any]:
    """Numbers of the binary of a chunk's graphs of several stages."""
    paths = [setup.graph(part(stage, blocks), precision) for stage in stages]
    with tempfile.TemporaryDirectory(dir=setup.output) as scratch:
        return compile_hexagon.compile_shared(paths, scratch, setup.soc)


# --- steps ------------------------------------------------------------------------------------------------------------


def prepare(setup: Setup, stage: int, blocks: tuple[int, int], precision: str) -> None:
    """The graph of some blocks in a precision."""
    apart(f"blocks of stage {stage}", make_blocks, setup, stage, blocks, precision)
    join(setup, stage, blocks, precision)


def clean(setup: Setup, stage: int, blocks: tuple[int, int], form: str = "") -> None:
    """Deletes graphs of single blocks. Samples stay."""
    for number in range(*blocks):
        path = setup.graph(part(stage, (number, number + 1)), form)
        for file in path.parent.glob(f"{path.stem}.*"):
            file.unlink()


def measure(setup: Setup, name: str, precision: str, make: Callable[[], None], *, traffic: bool, runs: int = 0) -> None:
    """Compiles a graph, which `make` makes, and once more for its traffic; what is measured already is left out."""
    wanted = {
        f"{name}_{precision}": lambda: compiled(setup, name, precision, runs),
        f"{name}_{precision}_traffic": lambda: hexagon.planned_traffic(setup.graph(name, precision), setup.soc),
    }
    for report, numbers in list(wanted.items())[: 1 + traffic]:
        if not setup.report(report).exists():
            make()
            record(setup, report, numbers())


def measure_blocks(setup: Setup, stages: Sequence[int], precisions: Sequence[str], runs: int) -> None:
    for stage in stages:
        for precision in precisions:
            make = functools.partial(prepare_block, setup, stage, precision)
            on_simulator = runs if stage == stages[0] else 0
            measure(setup, part(stage, (0, 1)), precision, make, traffic=True, runs=on_simulator)


def prepare_block(setup: Setup, stage: int, precision: str) -> None:
    """The first block, and the float graph that its outputs are compared with."""
    for needed in ("fp16", precision):
        prepare(setup, stage, (0, 1), needed)


def measure_chunks(
    setup: Setup, stages: Sequence[int], precisions: Sequence[str], steps: Sequence[str], traffic: bool
) -> None:
    """Chunk by chunk, so that the disk holds the float graphs of one chunk at most."""
    for blocks in setup.chunks:
        for precision in precisions:
            make = {stage: functools.partial(prepare, setup, stage, blocks, precision) for stage in stages}
            together = f"blocks{blocks[0]}-{blocks[1]}_{precision}_shared"
            if "shared" in steps and not setup.report(together).exists():
                for stage in stages:
                    make[stage]()
                record(setup, together, shared(setup, blocks, stages, precision))
            for stage in stages if "chunks" in steps else ():
                measure(setup, part(stage, blocks), precision, make[stage], traffic=traffic)
        for stage in stages:
            clean(setup, stage, blocks)


def measure_whole(setup: Setup, stages: Sequence[int], traffic: bool) -> None:
    blocks = (0, setup.config.num_layers)
    for stage in stages:
        make = functools.partial(prepare, setup, stage, blocks, "w8a16")
        measure(setup, part(stage, blocks), "w8a16", make, traffic=traffic)
        clean(setup, stage, blocks)


def read_reports(setup: Setup) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(setup.report("x").parent.glob("*.json"))}


def table(reports: dict[str, dict[str, Any]]) -> str:
    """What was compiled, as Markdown."""
    lines = ["| graph | compile, CPU s | memory | binary | DRAM read | written | simulator |", "|---" * 7 + "|"]
    for name, report in reports.items():
        if "binary_bytes" not in report:
            continue
        traffic, simulator = reports.get(f"{name}_traffic"), report.get("simulator")
        moved = [f"{traffic[f'dram_{way}_bytes'] / 1e6:.0f} MB" if traffic else "" for way in ("read", "write")]
        snr = simulator["snr_db"] if simulator else {}
        shown = ", ".join(f"{key} {'not finite' if db is None else f'{db:.1f} dB'}" for key, db in snr.items())
        lines.append(
            f"| {name} | {report['compile_cpu_seconds']:.0f} | {report['compile_peak_bytes'] / 1e9:.1f} GB "
            f"| {report['binary_bytes'] / 1e6:.0f} MB | {moved[0]} | {moved[1]} | {shown} |"
        )
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.mmdit_device",
        description="Stages of the video transformer with random weights for the device: whole and in shared chunks.",
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="tiny", help="default tiny; full needs 12 GB of memory and 16 GB of disk")
    add("--output", type=Path, required=True, help="folder for weights, graphs, reports and the table")
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="default all")
    add("--stages", nargs="+", type=int, choices=STAGES, default=list(STAGES), help="default all")
    add("--precisions", nargs="+", choices=PRECISIONS, default=["w8a16"], help="of blocks and chunks (default w8a16)")
    add("--chunk", type=int, default=6, help="blocks in a chunk (default 6)")
    add("--soc", default="8-elite", help=f"one of {', '.join(hexagon.SOC_MODELS)} (default 8-elite)")
    add("--samples", type=int, default=1, help="random inputs for the ranges, 1 to 4 (default 1)")
    add("--runs", type=int, default=1, help="of them on the simulator, for one block (default 1)")
    add("--traffic", action="store_true", help="of chunks and whole stages too (compiles them twice)")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if not 1 <= args.samples <= 4 or not 0 <= args.runs <= args.samples:
        raise UserError(
            f"--samples {args.samples} --runs {args.runs}: give 1 to 4 samples, and not more runs than these"
        )
    if args.chunk < 1:
        raise UserError(f"--chunk {args.chunk}: a chunk has at least 1 block")
    hexagon.soc_model(args.soc)
    hexagon.require_compiler()
    setup = Setup(args.output.resolve(), args.size, args.soc, args.seed, args.chunk, args.samples)
    open_output(setup)
    if "block" in args.steps:
        measure_blocks(setup, args.stages, args.precisions, args.runs)
    measure_chunks(setup, args.stages, args.precisions, args.steps, args.traffic)
    if "whole" in args.steps:
        measure_whole(setup, args.stages, args.traffic)
    reports = read_reports(setup)
    settings = json.loads((setup.output / "settings.json").read_text())
    write_json(setup.output / "mmdit_device.json", settings | {"reports": reports})
    print(table(reports))
    print(f"{len(reports)} measurements: {setup.output / 'mmdit_device.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
