"""One model folder out of what several trainings exported.

    python -m experiments.assemble --model TEACHER --text TEXT --output student
    python -m experiments.assemble --model TEACHER --text TEXT --decoder DECODER --transformer PRUNED \
        --steps 1,1,1 --guidance 1,1 --output student

Everything that is not named comes from --model, tokenizers and generation.json too. Where --text brings DT5 and a
ContextAdapter, what the adapter puts out takes the place of what the transformer's context embedder does, so the
embedder is left out and the transformer becomes a PyramidMMDiT, the released student's class. Other folders are left
as they are. The folder appears when it is complete and its parts fit each other.
"""

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.evaluate_rollouts import find_transformer
from experiments.generate import numbers, whole_numbers
from nd_jax.errors import UserError, run_command

REPORT = "assemble.json"
GENERATION = "generation.json"
TEXT = ("text_encoder_3", "context_adapter", "tokenizer_3")
VAE, TRANSFORMER = "causal_video_vae", "diffusion_transformer_320p"
# What makes the context, and what the pooled text, for tables of parameters.
CONTEXT, POOLED = ("text_encoder_3", "context_adapter"), ("text_encoder", "text_encoder_2")


def assemble(
    model: Path,
    output: Path,
    text: Path | None = None,
    decoder: Path | None = None,
    transformer: Path | None = None,
    plan: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Writes a model folder.

    Args:
      model: whole model folder; what nothing else replaces is copied from it.
      output: the folder to make; one that an earlier call made is replaced.
      text: folder with `text_encoder_3`, `context_adapter` and `tokenizer_3`.
      decoder: folder with a `causal_video_vae`.
      transformer: a transformer, or a folder with one.
      plan: a pruning plan; the transformer loses the blocks that it removes.
      **settings: entries of generation.json to put in the place of the model's; None changes nothing.

    Returns:
      What `OUTPUT/assemble.json` holds: sources, settings, and parameters as `count_parameters` gives them.

    Raises:
      UserError: a folder lacks what it is named for, or the parts do not fit each other.
    """
    from nd_jax.files import replacing_folder, write_text
    from nd_jax.generate.model_folder import open_model
    from nd_jax.weights.sources import read_json

    opened = open_model(model)
    sources = {path.name: path for path in sorted(model.iterdir()) if path.is_dir()}
    given = [(text, name) for name in TEXT if text] + ([(decoder, VAE)] if decoder else [])
    for folder, name in given:
        if not (folder / name).is_dir():
            raise UserError(f"{folder}: has no {name}; give what converters.export_torch made of that training")
        sources[name] = folder / name
    place = sources.pop(opened.parts["transformer"])
    place = place if transformer is None else find_transformer(transformer)
    # Its mode is said, because DT5 alone would mean another.
    before = read_json(model / GENERATION) if (model / GENERATION).is_file() else {}
    entries = before | {"mode": opened.mode} | {key: value for key, value in settings.items() if value is not None}
    with replacing_folder(output, REPORT) as folder:
        for name, source in sources.items():
            shutil.copytree(source, folder / name)
        _write_transformer(place, folder, plan)
        write_text(folder / GENERATION, json.dumps(entries, indent=2) + "\n")
        open_model(folder)
        report = {
            "sources": {name: str(source) for name, source in (sources | {TRANSFORMER: place}).items()},
            "plan": None if plan is None else str(plan),
            "generation": entries,
            "parameters": count_parameters(folder),
        }
        write_text(folder / REPORT, json.dumps(report, indent=1) + "\n")
    return report


def _write_transformer(source: Path, folder: Path, plan: Path | None) -> None:
    """The transformer without the blocks that a plan removes, and without a context embedder behind an adapter."""
    from nd_jax.distill.pruning_plan import read_plan
    from nd_jax.models.mmdit import keep_blocks
    from nd_jax.weights import networks
    from nd_jax.weights.folder import load_component, read_config, save_component
    from nd_jax.weights.mmdit import PYRAMID_FLOW_MMDIT, PYRAMID_MMDIT

    network, config, _ = read_config(source)
    # An adapter of the embedder's input width (mode EM of the text distillation) keeps the embedder behind it.
    adapter = folder / "context_adapter"
    embedded = network is PYRAMID_FLOW_MMDIT and adapter.is_dir()
    if embedded:
        width = read_config(adapter, networks.CONTEXT_ADAPTER)[1].output_dims
        embedded = width == config.caption_projection_dim
    if plan is None and not embedded:
        shutil.copytree(source, folder / TRANSFORMER)
        return
    params = load_component(source, network).params
    if plan is not None:
        chosen = read_plan(plan)
        if chosen.num_layers != config.num_layers:
            raise UserError(f"{plan}: plans for {chosen.num_layers} blocks and {source} has {config.num_layers}")
        params, config = keep_blocks(params, config, chosen.kept)
    if embedded:
        params = {name: tree for name, tree in params.items() if name != "context_embedder"}
        network, config = PYRAMID_MMDIT, dataclasses.replace(config, context_embedder=False)
    save_component(folder / TRANSFORMER, network, config, params)


def count_parameters(model: Path) -> dict[str, int]:
    """Parameters of a model folder that makes all frames: {"context", "pooled", "transformer", "decoder", "total"}.

    A context embedder is counted with the context that it makes, and of a VAE the decoder half. Reads no weights.
    """
    import jax

    from nd_jax.generate.model_folder import find_transformer
    from nd_jax.weights.folder import read_config
    from nd_jax.weights.network import abstract_params

    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    read = lambda name: abstract_params(*read_config(model / name)[:2])
    sizes = lambda names: sum(size(read(name)) for name in names if (model / name).is_dir())
    transformer, vae = read(find_transformer(model, "monolithic")), read(VAE)
    embedder = size(transformer.pop("context_embedder", {}))
    counts = {
        "context": sizes(CONTEXT) + embedder,
        "pooled": sizes(POOLED),
        "transformer": size(transformer),
        "decoder": size([vae[part] for part in ("decoder", "post_quant_conv")]),
    }
    return counts | {"total": sum(counts.values())}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.assemble",
        description="Put a model folder together out of what several trainings exported.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, type=Path, metavar="DIR", help="model folder that everything else comes from")
    add("--output", required=True, type=Path, metavar="DIR", help="the model folder to make")
    add("--text", type=Path, metavar="DIR", help=f"folder with {', '.join(TEXT)}")
    add("--decoder", type=Path, metavar="DIR", help=f"folder with {VAE}")
    add("--transformer", type=Path, metavar="DIR", help="transformer, or a folder with one")
    add("--plan", type=Path, metavar="FILE", help="plan.json of experiments.prune_plan: leave its blocks out")
    add("--mode", choices=("hybrid", "monolithic"), help="of generation.json (default: the model's)")
    add("--steps", type=whole_numbers, metavar="A,B,C", help="Euler steps per stage of all latent frames, likewise")
    add("--guidance", type=numbers, metavar="A,B", help="of the first latent frame and of the others; 1 is none")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status; raises UserError."""
    args = parse(argv)
    parts = {name: getattr(args, name) for name in ("text", "decoder", "transformer", "plan")}
    settings = {"mode": args.mode, "steps": args.steps, "first_steps": args.steps, "guidance": args.guidance}
    report = assemble(args.model, args.output, **parts, **settings)
    shown = ", ".join(f"{name} {count:,}" for name, count in report["parameters"].items())
    print(f"parameters: {shown}: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
