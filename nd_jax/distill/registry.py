"""From a config (plain dictionary) to a method. One line per method."""

from collections.abc import Mapping
from typing import Any

from nd_jax.distill.base import Distillation
from nd_jax.distill.text_encoder_roles import text_encoder_from_config
from nd_jax.errors import UserError

METHODS = {"text_encoder": text_encoder_from_config}


def build_method(config: Mapping[str, Any]) -> Distillation:
    """The method that `config["method"]` names, with its roles bound to the weights that the config names."""
    if config["method"] not in METHODS:
        raise UserError(f"method is {config['method']!r}: known methods are {', '.join(sorted(METHODS))}")
    return METHODS[config["method"]](config)
