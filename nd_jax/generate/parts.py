"""What the parts of a pipeline share: parameters on their devices, tokenizers, and the clock."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nd_jax.data.tokenizers import Tokenize, load_tokenizer
from nd_jax.errors import UserError
from nd_jax.generate.sampler import StageEnd
from nd_jax.weights.folder import load_component
from nd_jax.weights.network import Network
from nd_jax.weights.table import flatten, unflatten


class Timings:
    """Seconds of every part.

    Attributes:
      seconds: {part: {"load" | "compile" | "run": seconds}}.
      calls: {(what, part of it): seconds of each call}: of the transformer, whose units are "first" or "later" and have
        stages, and of the UNet, "first_frame" and "unet". A call is one step of a whole batch, with both branches of
        guidance.
    """

    def __init__(self):
        self.seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.calls: dict[tuple[str, str], list[float]] = defaultdict(list)

    @contextlib.contextmanager
    def of(self, part: str, what: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[part][what] += time.perf_counter() - begin

    def stage(self, end: StageEnd) -> None:
        """Notes a stage of a rollout."""
        self.seconds["transformer"]["compile"] += end.compile_seconds
        self.seconds["transformer"]["run"] += end.seconds
        self.calls["later" if end.unit else "first", f"stage_{end.stage}"].append(end.seconds / end.steps)

    def summary(self) -> dict[str, Any]:
        """Plain data: seconds, and the median of each kind of call."""
        calls: dict[str, dict[str, float]] = defaultdict(dict)
        for (what, part), seconds in sorted(self.calls.items()):
            calls[what][part] = round(float(np.median(seconds)), 4)
        parts = {part: {what: round(s, 3) for what, s in whats.items()} for part, whats in self.seconds.items()}
        return {"seconds": parts, "seconds_per_call": dict(calls)}


def place_params(
    folder: Path, network: Network | None, dtype: Any, keep: tuple[str, ...] = (), shardings: Any = None
) -> dict:
    """Parameters of a component folder on the device or on a mesh.

    Host arrays go one by one, so that there are never two whole copies.

    Args:
      folder: the component's.
      network: what to read it as; None for what its config.json says.
      dtype: of the parameters.
      keep: beginnings of the paths to keep; all by default.
      shardings: a tree of them; the default device without.

    Raises:
      UserError: damaged weights, or weights of another network.
    """
    flat = flatten(load_component(folder, network, dtype).params)
    for path in [path for path in flat if keep and not path.startswith(keep)]:
        del flat[path]
    places, placed = flatten(shardings) if shardings else {}, {}
    while flat:
        path, array = flat.popitem()
        placed[path] = jax.block_until_ready(jax.device_put(array, places.get(path)))
        del array
    return unflatten(placed)


def open_tokenizer(folder: Path, vocab_size: int, length: int) -> Tokenize:
    """The tokenizer of an encoder, which pads and truncates to `length`.

    Raises:
      UserError: it is absent or damaged, or has more tokens than the encoder.
    """
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > vocab_size:
        raise UserError(f"{folder}: {len(tokenizer)} tokens do not fit an encoder of {vocab_size}; copy the right one")
    return Tokenize(tokenizer, length)


def each_row(
    program: jax.stages.Wrapped,
    params: Any,
    rows: Iterable[Any],
    timings: Timings,
    part: str,
    on_row: Callable[[], None] = lambda: None,
) -> Any:
    """`program(params, row)` of one row after another, joined along axis 0; numpy, so that no result fills a device.

    Args:
      program: jitted; gives arrays [1, ...].
      params: of its network.
      rows: at least one; taken one at a time, all of the same shapes.
      timings: gets compilation and runs of `part`.
      part: what the clock calls it.
      on_row: called after every row.
    """
    results = []
    for row in rows:
        if not results:
            with timings.of(part, "compile"):
                program.lower(params, row).compile()
        with timings.of(part, "run"):
            results.append(jax.device_get(program(params, row)))
        on_row()
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *results)
