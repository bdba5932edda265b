"""The exported text encoder, run by PyTorch: an independent check of what a model folder says.

DT5 goes through `transformers.T5EncoderModel`; its projection and the ContextAdapter, which no public package has, are
written out below with plain `torch.nn.functional` calls on the folder's own tensors.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from converters.packages import need
from nd_jax.errors import UserError


def text_encoder_context(model_dir: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Adapted context of a model folder's `text_encoder_3` and `context_adapter`, float32 [B, L, D].

    Args:
      model_dir: released layout.
      ids, mask: int32 [B, L].

    Raises:
      UserError: torch is not installed, or `T5EncoderModel` misses a tensor.
    """
    need("torch")
    import torch
    from safetensors.torch import load_file
    from torch.nn import functional
    from transformers import T5Config, T5EncoderModel

    folder = model_dir / "text_encoder_3"
    state = load_file(folder / "model.safetensors")
    encoder = T5EncoderModel(T5Config(**json.loads((folder / "config.json").read_text()))).eval()
    wanted = {key.removeprefix("encoder."): value for key, value in state.items() if key.startswith("encoder.")}
    loaded = encoder.load_state_dict(wanted, strict=False)
    if loaded.missing_keys or loaded.unexpected_keys:
        raise UserError(
            f"{folder}: T5EncoderModel misses {loaded.missing_keys} and does not know {loaded.unexpected_keys}"
        )
    with torch.no_grad():
        tokens = {"input_ids": torch.from_numpy(ids).long(), "attention_mask": torch.from_numpy(mask).long()}
        hidden = encoder(**tokens).last_hidden_state
        hidden = functional.relu(functional.linear(hidden, state["final_projection.0.weight"]))
        hidden = functional.linear(hidden, state["final_projection.3.weight"])
        return _adapter(model_dir / "context_adapter", hidden).numpy()


def _adapter(folder: Path, x: Any) -> Any:
    """The released form of the ContextAdapter: activations behind the layers, exact GELU unless config.json says so."""
    import torch
    from safetensors.torch import load_file
    from torch.nn import functional

    config = json.loads((folder / "config.json").read_text())
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    if config["pre_activation"] or config["out_activation_fn"] != "linear":
        raise UserError(f"{folder}: pre_activation and out_activation_fn are not checked here; use the Flax module")
    activation = {"gelu": functional.gelu, "silu": functional.silu, "relu": functional.relu}[config["activation_fn"]]
    y, skips = x, [False, *config["skips"]]
    for i in range(len(config["layer_depths"])):
        y = torch.cat([x, y], dim=-1) if skips[i] else y
        y = activation(
            functional.linear(y, state[f"network_layers.{i}.1.weight"], state.get(f"network_layers.{i}.1.bias"))
        )
    last = f"network_layers.{len(config['layer_depths'])}.0"
    y = torch.cat([x, y], dim=-1) if skips[-1] else y
    return functional.linear(y, state[f"{last}.weight"], state.get(f"{last}.bias"))
