"""Reads `experiments/configs/NAME.py:VARIANT` and applies `--config.KEY=VALUE` overrides."""

import ast
import difflib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from nd_jax.errors import UserError


def load_config(spec: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """The config of a file, locked, with overrides applied.

    Args:
      spec: path of the Python file and, after a colon, the variant ("tiny", "full").
      overrides: arguments of the form `--config.a.b=value`; values are Python literals, or strings.

    Raises:
      UserError: no such file, variant or key, or a value of another type.
    """
    path, _, variant = spec.partition(":")
    if not Path(path).is_file():
        names = sorted(p.name for p in Path("experiments/configs").glob("[a-z]*.py"))
        raise UserError(f"config file {path} does not exist: the configs in experiments/configs are {', '.join(names)}")
    module_spec = importlib.util.spec_from_file_location("_config", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    config = module.get_config(variant or "tiny")
    config.lock()
    for override in overrides:
        _apply(config, override)
    return config


def _apply(config: ml_collections.ConfigDict, override: str) -> None:
    name, equals, text = override.partition("=")
    prefix = "--config."
    if not name.startswith(prefix) or not equals:
        raise UserError(
            f"argument {override!r} is not understood: overrides look like --config.optimizer.learning_rate=1e-4"
        )
    *parents, leaf = name.removeprefix(prefix).split(".")
    node = config
    for depth, parent in enumerate(parents):
        node = _child(node, parent, ".".join(parents[:depth]))
        if not isinstance(node, ml_collections.ConfigDict):
            raise UserError(f"config key {'.'.join(parents[: depth + 1])} is a value, not a group: drop .{leaf}")
    old = _child(node, leaf, ".".join(parents))
    node[leaf] = _convert(_literal(text), old, name.removeprefix(prefix))


def _child(node: ml_collections.ConfigDict, key: str, where: str) -> Any:
    if key in node:
        return node[key]
    close = difflib.get_close_matches(key, list(node.keys()), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the keys there are {', '.join(sorted(node.keys()))}"
    raise UserError(f"unknown config key {'.'.join(filter(None, (where, key)))!r}: {hint}")


def _literal(text: str) -> Any:
    lowered = {"true": True, "false": False}
    if text.lower() in lowered:
        return lowered[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _convert(value: Any, old: Any, key: str) -> Any:
    if isinstance(old, ml_collections.ConfigDict):
        raise UserError(f"config key {key!r} is a group of values: set one of {', '.join(sorted(old.keys()))}")
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(old, str) and not isinstance(value, str):
        return str(value)
    if isinstance(old, tuple) and isinstance(value, list | tuple):
        return tuple(value)
    if type(old) is not type(value):
        raise UserError(f"config key {key!r} takes a {type(old).__name__} (now {old!r}), not {value!r}")
    return value


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Dictionaries, lists and scalars: what JSON gives back, so that a saved config compares equal."""
    convert = lambda v: (
        {k: convert(x) for k, x in v.items()} if isinstance(v, dict) else list(v) if isinstance(v, tuple) else v
    )
    return convert(config.to_dict())
