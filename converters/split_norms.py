"""Group norms of a graph that is quantised: sums on integers, only the root in FP16.

    y = (x - m) / sqrt(v + eps) * scale + bias,    m, v: mean and variance of a group                     (1)

On integers the HTP computes InstanceNormalization wrong at some sizes, without a word, and one in FP16 between integers
makes the compiler move the picture five to eight times. Sums over columns, over rows, and over the channels of a group
(a 1 x 1 convolution) do neither.

Squares need twice the bits. So each group is divided by a power of two c about its standard deviation on the samples,

    y = (x / c - m / c) / sqrt(v / c^2 + eps / c^2) * scale + bias,                                       (2)

which is the same, and makes all variances about 1. Values beyond FP16 (the trained encoder of a video VAE reaches 3e5)
never meet FP16.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from converters import onnx_check
from converters.samples import Sample
from converters.shared_ranges import HEADROOM
from nd_jax.errors import UserError

if TYPE_CHECKING:
    import onnx

# The two forms of a group norm, see `converters.onnx_norm`, by the norm.
FORMS = {
    "InstanceNormalization": ("Reshape", "InstanceNormalization", "Reshape", "Mul", "Add"),
    "LayerNormalization": ("Reshape", "LayerNormalization", "Reshape", "BatchNormalization"),
}
# Operators and what they make, in FP16.
ROOT = (("Add", "padded"), ("Sqrt", "deviation"), ("Div", "inverse"))
# What is wider than on the samples: squares, by the square of the headroom of other values; and 1 / sqrt(v), which is
# larger in a picture of less contrast, by three bits of sixteen.
WIDER = {
    **dict.fromkeys(("square", "row_variance", "channel_variance", "variance"), HEADROOM),
    **dict.fromkeys(("inverse", "factor"), 8.0),
}
# A group whose numbers are so much smaller than those of the largest is not told from zero by 16 bits anyway.
SMALLEST = 2.0**-12


@dataclasses.dataclass(frozen=True)
class SplitNorms:
    """A graph with its group norms split.

    Attributes:
      path: the graph, beside the original and with its external data.
      float_nodes: nodes that stay in FP16: the roots, and a BatchNormalization behind a norm that stays.
      sums: convolutions that add up or spread groups, whose weights 8 bits hold exactly.
      headroom: value -> by how much its range must be wider than that of others.
    """

    path: Path
    float_nodes: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    headroom: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Norm:
    """One group norm: its nodes in order, the picture that it reads, and sizes."""

    nodes: "tuple[onnx.NodeProto, ...]"
    name: str
    picture: str
    channels: int
    groups: int
    epsilon: float
    scale: np.ndarray
    bias: np.ndarray


@contextlib.contextmanager
def split_norms(
    onnx_path: Path, samples: Callable[[], Iterable[Sample]], keep: Collection[str] = ()
) -> Iterator[SplitNorms]:
    """Equation 2 for every group norm of a float graph; the file is deleted at the end.

    Args:
      onnx_path: of `converters.export_onnx`, whose group norms have one of the `FORMS`.
      samples: called for one pass over the inputs of the graph.
      keep: names of nodes that stay as they are.

    Raises:
      UserError: a norm of another form.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(str(onnx_path), load_external_data=False))
    norms, kept = _find(model, onnx_path, keep)
    if not norms:
        yield SplitNorms(onnx_path, kept)
        return
    path = onnx_path.with_name(f".{onnx_path.stem}.split.onnx")
    try:
        for norm in norms:
            _split(model, norm)
        onnx.save(model, str(path))
        _divide(model, norms, _variances(path, norms, samples()))
        onnx.save(model, str(path))
        yield SplitNorms(
            path,
            float_nodes=(*kept, *(f"{op}:{norm.name}/{value}" for norm in norms for op, value in ROOT)),
            sums=tuple(node.name for node in model.graph.node if node.name.startswith("Conv:group_sum/")),
            headroom={f"{norm.name}/{value}": more for norm in norms for value, more in WIDER.items()},
        )
    finally:
        path.unlink(missing_ok=True)


def _find(model: "onnx.ModelProto", onnx_path: Path, keep: Collection[str]) -> tuple[list[_Norm], tuple[str, ...]]:
    """The group norms, and every BatchNormalization behind one that `keep` names, which is not found."""
    import onnx

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    ends = {value.name for value in model.graph.output}
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.value_info, *model.graph.output)
    }
    producers = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    arrays = lambda names: [onnx.numpy_helper.to_array(constants[name], str(onnx_path.parent)) for name in names]
    found, kept = [], []
    for norm in model.graph.node:
        form = FORMS.get(norm.op_type)
        if form is None:
            continue
        nodes = [producers.get(norm.input[0]), norm]
        for _ in form[2:]:
            behind = readers.get(nodes[-1].output[0], [])
            nodes += behind if len(behind) == 1 else []
        picture = nodes[0].input[0] if nodes[0] is not None else ""
        ops = tuple(node.op_type for node in nodes if node is not None)
        if norm.op_type == "LayerNormalization" and not _of_picture(ops, shapes.get(picture, [])):
            continue
        if norm.name in keep:
            kept += [node.name for node in nodes if node.op_type == "BatchNormalization" and node.name not in keep]
            continue
        factors = [name for node in nodes[3:] for name in node.input[:3] if name in constants]
        moments = [name for node in nodes[3:] for name in node.input[3:] if name in constants]
        if (
            ops != form
            or len(factors) != 2
            or not _only_scales(nodes[-1], arrays(moments))
            or any(node.output[0] in ends for node in nodes[:-1])
            or shapes[picture] != shapes[nodes[2].output[0]]
            or len(shapes[picture]) != 4
        ):
            raise UserError(
                f"{onnx_path}: {norm.name!r} is not a group norm between two Reshapes with a scale and a bias of the "
                "channels behind it; --keep-float leaves it in FP16"
            )
        scale, bias = arrays(factors)
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        channels, groups = shapes[picture][1], shapes[norm.input[0]][1]
        found.append(_Norm(tuple(nodes), norm.output[0], picture, channels, groups, epsilon, scale.reshape(-1), bias))
    return found, tuple(kept)


def _of_picture(ops: tuple[str, ...], shape: list[int]) -> bool:
    """Whether a LayerNormalization among these operators is a group norm's: others are of tokens."""
    return ops[:3] == ("Reshape", "LayerNormalization", "Reshape") and len(shape) == 4


def _only_scales(node: "onnx.NodeProto", moments: list[np.ndarray]) -> bool:
    """False for a BatchNormalization that is more than x * scale + bias, or may be: its moments are not constant."""
    if node.op_type != "BatchNormalization":
        return True
    epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
    return epsilon == 0 and len(moments) == 2 and not moments[0].any() and bool((moments[1] == 1).all())


def _split(model: "onnx.ModelProto", norm: _Norm) -> None:
    """Equation 2 with c = 1 in the place of the norm's nodes."""
    import onnx

    name, made, group = norm.name, [], np.arange(norm.channels) * norm.groups // norm.channels
    member = (np.arange(norm.groups)[:, None] == group).astype(np.float32)[:, :, None, None]

    def constant(name: str, array: np.ndarray) -> str:
        if all(tensor.name != name for tensor in model.graph.initializer):
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return name

    def add(op: str, inputs: list[str], value: str, label: str = "", **attributes: int) -> str:
        made.append(onnx.helper.make_node(op, inputs, [value], f"{op}:{label}{value}", **attributes))
        return value

    def mean(x: str, value: str) -> str:
        """Of every channel, then of every group."""
        row = add("ReduceMean", [x, constant("axis/3", np.array([3]))], f"{name}/row_{value}")
        channel = add("ReduceMean", [row, constant("axis/2", np.array([2]))], f"{name}/channel_{value}")
        average = constant(
            f"group_average/{norm.channels}/{norm.groups}", member * np.float32(norm.groups / norm.channels)
        )
        return add("Conv", [channel, average], f"{name}/{value}", "group_sum/")

    spread = constant(f"group_spread/{norm.channels}/{norm.groups}", member.swapaxes(0, 1))
    scale = constant(f"{name}/group_scale", member.swapaxes(0, 1) * norm.scale[:, None, None, None])
    shrink = constant(f"{name}/shrink", np.ones((1, norm.channels, 1, 1), np.float32))
    x = add("Mul", [norm.picture, shrink], f"{name}/x")
    centre = add("Conv", [mean(x, "mean"), spread], f"{name}/centre", "group_sum/")
    centred = add("Sub", [x, centre], f"{name}/centred")
    variance = mean(add("Mul", [centred, centred], f"{name}/square"), "variance")
    epsilon = constant(f"{name}/epsilon", np.full((1, norm.groups, 1, 1), norm.epsilon, np.float32))
    deviation = add("Sqrt", [add("Add", [variance, epsilon], f"{name}/padded")], f"{name}/deviation")
    inverse = add("Div", [constant(f"{name}/one", np.ones((1, 1, 1, 1), np.float32)), deviation], f"{name}/inverse")
    factor = add("Conv", [inverse, scale], f"{name}/factor", "group_sum/")
    scaled = add("Mul", [centred, factor], f"{name}/scaled")
    bias = constant(f"{name}/bias", norm.bias.reshape(-1, 1, 1))
    add("Add", [scaled, bias], norm.nodes[-1].output[0])
    place = list(model.graph.node).index(norm.nodes[0])
    gone = {output for node in norm.nodes[:-1] for output in node.output}
    for value in [value for value in model.graph.value_info if value.name in gone]:
        model.graph.value_info.remove(value)
    for node in norm.nodes:
        model.graph.node.remove(node)
    for i, node in enumerate(made):
        model.graph.node.insert(place + i, node)


def _variances(path: Path, norms: list[_Norm], samples: Iterable[Sample]) -> dict[str, np.ndarray]:
    """Norm -> variances of its groups, [G], mean of the samples."""
    names = {f"{norm.name}/variance": norm.name for norm in norms}
    found: dict[str, list[np.ndarray]] = {norm.name: [] for norm in norms}
    for values in onnx_check.inner_values(path, list(names), samples, at_once=len(names)):
        for value, variance in values:
            found[names[value]].append(variance.reshape(-1))
    return {name: np.mean(variances, axis=0, dtype=np.float64) for name, variances in found.items()}


def _divide(model: "onnx.ModelProto", norms: list[_Norm], variances: Mapping[str, np.ndarray]) -> None:
    """Puts c into the constants: 1 / c and eps / c^2."""
    import onnx

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for norm in norms:
        shrink = 1 / powers_of_two(variances[norm.name])
        arrays = {
            "shrink": np.repeat(shrink, norm.channels // norm.groups).reshape(1, -1, 1, 1),
            "epsilon": (norm.epsilon * shrink**2).reshape(1, -1, 1, 1),
        }
        for suffix, array in arrays.items():
            name = f"{norm.name}/{suffix}"
            constants[name].CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), name))


def powers_of_two(variances: np.ndarray) -> np.ndarray:
    """c of each group: next to its standard deviation, and not below `SMALLEST` of the largest; 1 for all zeros."""
    deviations = np.sqrt(variances)
    if not deviations.max() > 0:
        return np.ones_like(deviations)
    return 2.0 ** np.round(np.log2(np.maximum(deviations, SMALLEST * deviations.max())))
