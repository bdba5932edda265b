"""Which parts of a graph stay in floating point when the rest is quantised to W8A16, and how weights are rounded.

A plan is a few patterns; what a graph has no plan for is quantised throughout, with weights rounded to nearest.
"""

import dataclasses
import fnmatch
from collections.abc import Iterable

from nd_jax.errors import UserError

ROUNDINGS = ("nearest", "compensated")


@dataclasses.dataclass(frozen=True)
class PrecisionPlan:
    """How one graph is quantised.

    Attributes:
      keep_float: patterns (`fnmatch`) of node names, such as "*attention*", that stay in FP16.
      rounding: "nearest", or "compensated": `converters.rounding`, for convolutions.
    """

    keep_float: tuple[str, ...] = ()
    rounding: str = "nearest"


PLANS = {"decoder_stream": PrecisionPlan(rounding="compensated")}


def plan_for(graph: str, keep_float: Iterable[str] = (), rounding: str | None = None) -> PrecisionPlan:
    """The plan of a graph with what the caller adds or sets."""
    plan = PLANS.get(graph, PrecisionPlan())
    return PrecisionPlan((*plan.keep_float, *keep_float), rounding or plan.rounding)


def float_nodes(plan: PrecisionPlan, names: Iterable[str]) -> list[str]:
    """The nodes of a graph that stay in floating point.

    Raises:
      UserError: a pattern that names no node.
    """
    names = list(names)
    for pattern in plan.keep_float:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"pattern {pattern!r} names no node of the graph, whose nodes are like {names[0]!r}")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in plan.keep_float)]
