"""What roles read of model folders: configs of the right class, and hashes that name where weights came from."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nd_jax.errors import UserError
from nd_jax.weights.folder import component_hash, read_config
from nd_jax.weights.network import Network


def folder_config(folder: str | Path, *allowed: Network) -> tuple[Network, Any]:
    """(network, config) of a component folder.

    Raises:
      UserError: it holds none of the allowed networks, or no readable config.
    """
    network, config, _ = read_config(Path(folder))
    if network not in allowed:
        names = " or ".join(n.name for n in allowed)
        raise UserError(f"{folder} holds a {network.name}, but {names} is needed there")
    return network, config


def text_hash(text: str) -> str:
    """SHA-256 (hex)."""
    return hashlib.sha256(text.encode()).hexdigest()


def folders_hash(folders: Iterable[str | Path]) -> str:
    """SHA-256 (hex) over component folders in their order."""
    return text_hash("".join(component_hash(Path(folder)) for folder in folders))


def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes out of a saved config: its lists as the tuples of a frozen dataclass."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
