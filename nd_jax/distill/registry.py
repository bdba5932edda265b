"""From a config (plain dictionary) to a method. One line per method; a name that has none is a module's."""

from collections.abc import Mapping
from typing import Any

from nd_jax.data.registry import own_method
from nd_jax.distill import (
    decoder_roles,
    prune_roles,
    steps_roles,
    super_resolution_roles,
    teacher_roles,
    text_encoder_roles,
    video_vae_roles,
)
from nd_jax.distill.base import Distillation

# name -> (fills in what the config's folders say, builds the method of a filled-in config)
METHODS = {
    "text_encoder": (text_encoder_roles.resolve_config, text_encoder_roles.text_encoder_from_config),
    "teacher": (teacher_roles.resolve_config, teacher_roles.teacher_from_config),
    "decoder": (decoder_roles.resolve_config, decoder_roles.decoder_from_config),
    "prune": (prune_roles.resolve_config, prune_roles.prune_from_config),
    "steps": (steps_roles.resolve_config, steps_roles.steps_from_config),
    "video_vae": (video_vae_roles.resolve_config, video_vae_roles.video_vae_from_config),
    "super_resolution": (super_resolution_roles.resolve_config, super_resolution_roles.super_resolution_from_config),
}


def resolve_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with everything filled in that the folders which it names say; what a run saves."""
    return _method(config)[0](config)


def build_method(config: Mapping[str, Any]) -> Distillation:
    """The method that a resolved config describes."""
    return _method(config)[1](config)


def _method(config: Mapping[str, Any]) -> tuple:
    if config["method"] in METHODS:
        return METHODS[config["method"]]
    module = own_method(config["method"])
    return module.resolve_config, module.build_method
