"""What a benchmark compares: two functions of nothing that do the same work."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
      name: what runs.
      sizes: its sizes, for the record.
      build: makes (ours, reference), two functions of nothing that return when their work is done.
      reference: what the other side is.
      amount, unit: what one run of either side works through, such as 8192 "prompts"; 0 where no rate is of use.
      waited: a run of ours appends the seconds for which it kept a training loop waiting; empty where none waits.
    """

    name: str
    sizes: Mapping[str, int]
    build: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]]
    reference: str = "PyTorch"
    amount: float = 0.0
    unit: str = ""
    waited: list[float] = dataclasses.field(default_factory=list)
