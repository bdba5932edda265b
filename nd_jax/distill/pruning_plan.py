"""Which blocks of a video transformer stay: a plan in JSON that a person may edit.

    {"format": "nd_jax pruning plan", "version": 1,
     "num_layers": 24, "kept": [0, 1, 3, ..., 23], "strategy": "leave_one_out",
     "removed": [{"block": 2, "why": "..."}, ...], "scores": {"image": [...], ...}}

`kept` decides: edit it to choose otherwise. `removed` and `scores` say why, and are not needed to prune. The last block
is always kept: it has no text output and parameters of another structure, so no other block can take its place.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nd_jax.errors import UserError
from nd_jax.files import write_text
from nd_jax.weights.sources import read_json

FORMAT, VERSION = "nd_jax pruning plan", 1
BY_HAND = "chosen by hand"


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """A choice of blocks.

    Attributes:
      num_layers: blocks of the whole transformer.
      kept: numbers of the blocks that stay, rising, the last block among them.
      strategy: how they were chosen.
      why: reasons of removed blocks; one without is `BY_HAND`.
      scores: plain data that the choice was made by, such as {"image": a number per block}.

    Raises:
      UserError: `kept` is no choice of blocks.
    """

    num_layers: int
    kept: tuple[int, ...]
    strategy: str = BY_HAND
    why: Mapping[int, str] = dataclasses.field(default_factory=dict)
    scores: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_kept(self.num_layers, self.kept)

    @property
    def removed(self) -> tuple[int, ...]:
        """Numbers of the blocks that go, rising."""
        return tuple(sorted(set(range(self.num_layers)) - set(self.kept)))


def check_kept(num_layers: int, kept: Sequence[int]) -> None:
    """Raises UserError unless `kept` are rising numbers of 0 .. num_layers - 1 with the last one among them."""
    last = num_layers - 1
    for block in kept:
        if type(block) is not int or not 0 <= block <= last:
            raise UserError(f"kept names block {block!r}: the {num_layers} blocks are numbered 0 to {last}")
    for one, other in itertools.pairwise(kept):
        if other <= one:
            raise UserError(f"kept has {other} after {one}: give every block once, in rising order")
    if not kept or kept[-1] != last:
        raise UserError(
            f"kept lacks the last block {last}: it has no text output and parameters of its own structure, so no other "
            f"block can take its place; add {last}, and leave out another block instead"
        )


def read_plan(path: Path) -> PruningPlan:
    """A plan that `write_plan` or a person wrote.

    Raises:
      UserError: no plan, one of another version, or a choice that is none; with the file.
    """
    data = read_json(path)
    if (data.get("format"), data.get("version")) != (FORMAT, VERSION):
        raise UserError(
            f"{path}: not a pruning plan of version {VERSION} (format {data.get('format')!r}, version "
            f"{data.get('version')!r}); make one with experiments.prune_plan"
        )
    num_layers, kept = data.get("num_layers"), data.get("kept")
    if type(num_layers) is not int or num_layers < 1:
        raise UserError(f"{path}: num_layers is {num_layers!r}; give the number of blocks before pruning")
    if not isinstance(kept, list):
        raise UserError(f"{path}: kept is {kept!r}; give a list of block numbers, such as [0, 1, {num_layers - 1}]")
    try:
        check_kept(num_layers, kept)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    removed = data.get("removed", [])
    if not isinstance(removed, list) or not all(isinstance(entry, dict) for entry in removed):
        raise UserError(f'{path}: removed is {removed!r}; give a list of {{"block": number, "why": text}}, or none')
    # An edited choice leaves reasons behind that are no longer true.
    why = {entry.get("block"): str(entry.get("why", BY_HAND)) for entry in removed if entry.get("block") not in kept}
    return PruningPlan(num_layers, tuple(kept), str(data.get("strategy", BY_HAND)), why, data.get("scores", {}))


def write_plan(path: Path, plan: PruningPlan) -> None:
    """Writes a plan, one entry a line; the same plan gives the same bytes."""
    removed = [{"block": block, "why": plan.why.get(block, BY_HAND)} for block in plan.removed]
    nested = lambda items: ",\n  ".join(items)
    entries = {
        "format": json.dumps(FORMAT),
        "version": json.dumps(VERSION),
        "num_layers": json.dumps(plan.num_layers),
        "kept": json.dumps(list(plan.kept)),
        "strategy": json.dumps(plan.strategy),
        "removed": f"[\n  {nested(json.dumps(entry) for entry in removed)}\n ]" if removed else "[]",
        "scores": f"{{\n  {nested(f'{json.dumps(k)}: {json.dumps(v)}' for k, v in plan.scores.items())}\n }}",
    }
    lines = (f' "{name}": {value}' for name, value in entries.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
