"""Floating-point operations of a JAX program, counted from its jaxpr.

    dot    2 (values of the result) (length of the contracted axes)                                               (1)
    conv   2 (values of the result) (values of the kernel) / (output channels) / (input dilation)                 (2)
    scan   length x body,  cond: its most expensive branch,  shard_map: body x devices                            (3)
    kernel what its author declares (`cost_estimate`), else body x grid; cuDNN's attention: 2 products of all
           pairs of tokens forward, 5 backward                                                                    (4)

What a backward pass computes again is in the jaxpr, so it counts. Everything else, element by element, does not: on a
TPU it runs beside the matrix unit. XLA's own count (`cost_analysis`) takes the body of a scan once.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jax.extend import core


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of one call on all devices together.

    Attributes:
      by_dtype: dtype of the operands -> operations.
      open_loops: `while` loops whose length the program decides; their body counted once.
    """

    by_dtype: Mapping[str, int]
    open_loops: int = 0

    @property
    def total(self) -> int:
        return sum(self.by_dtype.values())


def jaxpr_flops(jaxpr: Any) -> Flops:
    """Equations 1 to 4 of a jaxpr, closed or not."""
    count, loops = _walk(getattr(jaxpr, "jaxpr", jaxpr))
    return Flops(dict(count), loops)


# Primitives of `jax.nn.dot_product_attention` by cuDNN, and their products of [queries, keys].
CUDNN_PRODUCTS = {"dot_product_attention_fwd": 2, "dot_product_attention_bwd": 5}

Count = collections.Counter  # dtype -> operations


def _walk(jaxpr: core.Jaxpr) -> tuple[Count, int]:
    count, loops = Count(), 0
    for eqn in jaxpr.eqns:
        own, own_loops = _equation(eqn)
        count.update(own)
        loops += own_loops
    return count, loops


def _equation(eqn: Any) -> tuple[Count, int]:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        return _dot(eqn), 0
    if name == "conv_general_dilated":
        return _conv(eqn), 0
    if name == "cond":
        branches = [_walk(branch.jaxpr) for branch in params["branches"]]
        return max(branches, key=lambda branch: branch[0].total())
    if name == "pallas_call":
        return _kernel(eqn)
    if name.startswith(tuple(CUDNN_PRODUCTS)):
        return _cudnn_attention(eqn), 0
    factor = 1
    if name == "scan":
        factor = params["length"]
    elif name == "shard_map":
        mesh = params["mesh"]
        axes = params.get("newly_manual_axes") or params.get("manual_axes") or mesh.axis_names
        factor = math.prod(mesh.shape[axis] for axis in axes)
    count, loops = Count(), int(name == "while")
    for inner in core.jaxprs_in_params(params):
        body, body_loops = _walk(inner)
        count.update({dtype: factor * flops for dtype, flops in body.items()})
        loops += body_loops
    return count, loops


def _dtype(eqn: Any) -> str:
    """Of two unlike operands, the wider one decides how fast a product is."""
    return str(max((operand.aval.dtype for operand in eqn.invars[:2]), key=lambda dtype: dtype.itemsize))


def _dot(eqn: Any) -> Count:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    length = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return Count({_dtype(eqn): 2 * math.prod(eqn.outvars[0].aval.shape) * length})


def _conv(eqn: Any) -> Count:
    kernel = eqn.invars[1].aval.shape
    per_value = math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]]
    # A dilated input is mostly zeros, which no good implementation multiplies.
    dilation = math.prod(eqn.params["lhs_dilation"] or (1,))
    return Count({_dtype(eqn): 2 * math.prod(eqn.outvars[0].aval.shape) * per_value // dilation})


def _cudnn_attention(eqn: Any) -> Count:
    query, key = (operand.aval.shape for operand in eqn.invars[:2])  # [B, L, H, K], [B, S, H, K]
    (products,) = (n for name, n in CUDNN_PRODUCTS.items() if eqn.primitive.name.startswith(name))
    return Count({_dtype(eqn): products * 2 * math.prod(query) * key[1]})


def _kernel(eqn: Any) -> tuple[Count, int]:
    """Equation 4. Without an estimate, blocks that a kernel skips (`pl.when`) count like all others."""
    body, loops = _walk(eqn.params["jaxpr"])
    estimate = eqn.params["cost_estimate"]
    if estimate is not None:
        dtype = max(body, key=body.get) if body else str(eqn.invars[-1].aval.dtype)
        return Count({dtype: estimate.flops}), 0
    steps = math.prod(n for n in eqn.params["grid_mapping"].grid if isinstance(n, int))
    return Count({dtype: steps * flops for dtype, flops in body.items()}), loops
