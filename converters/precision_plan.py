"""Which parts of a graph stay in floating point when the rest is quantised to W8A16, and how weights are rounded.

A plan is a few patterns and two choices; what a graph has no plan for is quantised throughout, with weights rounded to
nearest. Parts of a network (`mmdit_stage0_blocks0-6`) have the plan of the whole.
"""

import dataclasses
import fnmatch
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from nd_jax.errors import UserError

if TYPE_CHECKING:
    import onnx

ROUNDINGS = ("nearest", "compensated", "sequential", "adaround")
# Their residual stream and their logits have a range that 16 bits do not cover; 9 dB quantised, 39 dB in FP16.
FP16_GRAPHS = ("text_encoder", "t5_encoder", "clip_l", "clip_g", "first_frame_clip_l", "first_frame_clip_g")

# What may stand between a softmax and the products beside it.
_BESIDE_SOFTMAX = ("Add", "Clip", "Div", "Mul", "Reshape", "Transpose")


@dataclasses.dataclass(frozen=True)
class PrecisionPlan:
    """How one graph is quantised.

    Attributes:
      keep_float: patterns (`fnmatch`) of node names, such as "*conv_out*", that stay in FP16.
      rounding: "nearest", "compensated" (`converters.rounding`), "sequential" (`converters.sequential_rounding`) or
        "adaround" (`converters.adaround`).
      float_attention: leave `attention_core` in FP16: of a product of two activations the HTP takes the second with 8
        bits, which turns 83 dB into 40.
      may_keep_float: as `keep_float`, for what some graphs of the plan do not have.
    """

    keep_float: tuple[str, ...] = ()
    rounding: str = "nearest"
    float_attention: bool = False
    may_keep_float: tuple[str, ...] = ()


# Rounded to nearest, the weights of the three stages are the same integers, and one binary can share them.
_STAGE = PrecisionPlan(float_attention=True, may_keep_float=("*context_embedder*",))
_PICTURES = PrecisionPlan(rounding="compensated", float_attention=True)
PLANS = {
    "decoder_stream": PrecisionPlan(rounding="compensated"),
    "mmdit_stage0": _STAGE,
    "mmdit_stage1": _STAGE,
    "mmdit_stage2": _STAGE,
    "unet": _PICTURES,
    "image_decoder": _PICTURES,
    "vae_encoder": _PICTURES,
    "quicksrnet": PrecisionPlan(rounding="sequential"),
}


def network_of(graph: str) -> str:
    """`mmdit_stage0_blocks0-6` -> `mmdit_stage0`: the graph that a part is of."""
    return re.sub(r"_blocks\d+-\d+$", "", graph)


def plan_for(graph: str, keep_float: Iterable[str] = (), rounding: str | None = None) -> PrecisionPlan:
    """The plan of a graph with what the caller adds or sets."""
    plan = PLANS.get(network_of(graph), PrecisionPlan())
    return dataclasses.replace(plan, keep_float=(*plan.keep_float, *keep_float), rounding=rounding or plan.rounding)


def check_graph(graph: str, force: bool = False) -> None:
    """Refuses the graphs that run in FP16.

    Raises:
      UserError: it is one of those and `force` is False.
    """
    if network_of(graph) in FP16_GRAPHS and not force:
        raise UserError(
            f"{graph} stays in FP16, since quantised it is of no use: give the float graph to "
            f"converters.compile_hexagon; --force quantises it all the same"
        )


def float_nodes(plan: PrecisionPlan, names: Iterable[str]) -> list[str]:
    """The nodes of a graph that a plan's patterns leave in floating point.

    Raises:
      UserError: a pattern of `keep_float` that names no node.
    """
    names = list(names)
    for pattern in plan.keep_float:
        if not fnmatch.filter(names, pattern):
            raise UserError(f"pattern {pattern!r} names no node of the graph, whose nodes are like {names[0]!r}")
    patterns = (*plan.keep_float, *plan.may_keep_float)
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def excluded_nodes(plan: PrecisionPlan, model: "onnx.ModelProto") -> list[str]:
    """Names of all nodes that stay in floating point, in the graph's order.

    Raises:
      UserError: as `float_nodes`.
    """
    kept = set(float_nodes(plan, [node.name for node in model.graph.node]))
    kept |= attention_core(model) if plan.float_attention else set()
    return [node.name for node in model.graph.node if node.name in kept]


def attention_core(model: "onnx.ModelProto") -> set[str]:
    """Names of the nodes from q k^T over the softmax to p v, found by what they do: names differ among networks.

    The products of two activations next to every Softmax, and what lies between. What only moves numbers in front of
    the first product and behind the second is not among them.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    before: dict[str, list[onnx.NodeProto]] = {}
    behind: dict[str, list[onnx.NodeProto]] = {}
    producers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        for source in (producers[name] for name in node.input if name in producers):
            before.setdefault(node.name, []).append(source)
            behind.setdefault(source.name, []).append(node)

    def to_product(node: "onnx.NodeProto", beside: "dict[str, list[onnx.NodeProto]]") -> set[str]:
        """The nodes on all ways to a product of two activations, without `node`; empty where there is none."""
        found = set()
        for other in beside.get(node.name, []):
            if other.op_type == "MatMul" and not constants & set(other.input):
                found.add(other.name)
            elif other.op_type in _BESIDE_SOFTMAX and (way := to_product(other, beside)):
                found |= {other.name} | way
        return found

    core: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "Softmax":
            core |= {node.name} | to_product(node, before) | to_product(node, behind)
    return core
