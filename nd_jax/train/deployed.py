"""What a training run has to deliver: the deployed components of one of its checkpoints."""

import dataclasses
from pathlib import Path

from nd_jax.data.registry import tokenizer_folders
from nd_jax.distill.registry import build_method
from nd_jax.train.checkpoint import load_params
from nd_jax.weights.folder import Component


@dataclasses.dataclass(frozen=True)
class Deployed:
    """Components by the name of their subfolder, tokenizer folders by theirs, and the checkpoint's step."""

    components: dict[str, Component]
    tokenizers: dict[str, Path]
    step: int


def load_deployed(workdir: Path, step: int | None = None, ema: bool = True) -> Deployed:
    """Reads a checkpoint on the host; no mesh and no teacher is needed.

    Args:
      workdir: of `experiments.train`.
      step: which checkpoint; the latest when None.
      ema: take the moving averages where the run kept them (`ema_decay` above 0).

    Raises:
      UserError: no such checkpoint, or it is damaged.
    """
    params, meta, step = load_params(workdir, step, ema)
    deployed = build_method(meta["config"]).deploy(params)
    components = {name: Component(network, config, tree) for name, (network, config, tree) in deployed.items()}
    tokenizers = {name: path for name, path in tokenizer_folders(meta["config"], workdir).items() if path.exists()}
    return Deployed(components, tokenizers, step)
